"""Text conditioning: any transformers text encoder, used the way LlamaGen and NAR used FLAN-T5.

A caption is cleaned, tokenised, encoded, cut or padded to the T tokens that the generator was trained with, and moved
to the right end (source: LlamaGen, arXiv 2406.06525, and the authors' text pipeline).

Letters: B captions, T tokens, D channels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vistok.errors import CheckpointError, InvalidInputError
from vistok.nn.text import TextCondition, clean_caption, left_pad

__all__ = ["TextEncoder"]

# A tokenizer with fewer words than this is taken to know all of its language: an unknown word is then a mistake.
CLOSED_VOCABULARY = 1000
# Captions are padded to a multiple of this for the encoder, instead of to T: few shapes, little wasted work.
PADDING = 16
ASSETS = Path(__file__).parent.parent / "assets"


class TextEncoder(nn.Module):
    """Captions to features, left-padded. Nothing is kept between calls.

    Args:
        model: a transformers text encoder whose output has `last_hidden_state`.
        tokenizer: its tokenizer.
        clean: run captions through `vistok.nn.text.clean_caption`, as the published models did; None does so unless the
            vocabulary is closed (the lab's, where every word counts).
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, clean: bool | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.clean = self.known_words is None if clean is None else clean

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, dtype: torch.dtype | str | None = torch.float32, clean: bool | None = None
    ) -> TextEncoder:
        """Load a text encoder (of a T5-like model, its encoder half) in eval mode.

        Args:
            name: shipped name (`text-shapes`), folder, or Hub id (`google/flan-t5-xl`).
            dtype: floating point type; "auto" is the checkpoint's.
            clean: see the class.

        Raises:
            CheckpointError: nothing usable there, damaged files, or weights that do not cover the network.
        """
        from safetensors import SafetensorError
        from transformers import (
            MODEL_FOR_TEXT_ENCODING_MAPPING,
            AutoConfig,
            AutoModel,
            AutoModelForTextEncoding,
            AutoTokenizer,
        )

        shipped = ASSETS / os.fspath(name)
        source = str(shipped if shipped.is_dir() else name)
        try:
            config = AutoConfig.from_pretrained(source)
            network = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
            model, report = network.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CheckpointError(f"no text encoder could be loaded from {os.fspath(name)!r}: {reason}") from error
        missing = sorted(report["missing_keys"])
        if missing:  # transformers would go on with random weights
            raise CheckpointError(
                f"the files of {os.fspath(name)!r} lack {len(missing)} weights of {type(model).__name__}: "
                f"{', '.join(missing[:6])}{' ...' if len(missing) > 6 else ''}"
            )
        return cls(model.eval(), tokenizer, clean=clean)

    @property
    def known_words(self) -> list[str] | None:
        """Every word that the tokenizer knows, if its vocabulary is closed; None for a sub-word tokenizer."""
        if len(self.tokenizer) >= CLOSED_VOCABULARY or self.tokenizer.unk_token_id is None:
            return None
        return sorted(self.tokenizer.get_vocab().keys() - set(self.tokenizer.all_special_tokens))

    def check_words(self, captions: Sequence[str]) -> None:
        """Raise InvalidInputError naming the words that a closed vocabulary lacks, and those it has."""
        known = self.known_words
        if known is None:
            return
        unknown: dict[str, None] = {}
        for caption in captions:
            encoding = self.tokenizer(caption, return_offsets_mapping=True)
            for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
                if token == self.tokenizer.unk_token_id:
                    unknown[caption[start:end]] = None
        if unknown:
            listed = ", ".join(repr(word) for word in unknown)
            raise InvalidInputError(
                f"unknown word{'s' if len(unknown) > 1 else ''} {listed}; this text encoder knows: {', '.join(known)}"
            )

    def check_captions(self, captions: Sequence[str], num_tokens: int) -> None:
        """Check captions before any work; a closed vocabulary also refuses unknown words and overlong captions.

        Raises:
            InvalidInputError: no captions, something else than texts, unknown words, or a caption that is too long.
        """
        if isinstance(captions, str) or not captions or not all(isinstance(text, str) for text in captions):
            raise InvalidInputError(f"captions must be a list of texts; got {captions!r}")
        if self.known_words is None:
            return
        self.check_words(captions)
        for caption in captions:
            length = len(self.tokenizer(caption)["input_ids"])
            if length > num_tokens:
                raise InvalidInputError(
                    f"the caption {caption!r} has {length} tokens; this model was trained with at most {num_tokens}"
                )

    @torch.no_grad()
    def forward(self, captions: Sequence[str], *, num_tokens: int) -> TextCondition:
        """Encode captions; equal ones are computed once.

        Args:
            captions: B texts.
            num_tokens: T, the length that the generator was trained with; longer captions are cut, with a warning (with
                a closed vocabulary they are refused instead).

        Returns:
            Features [B, T, D] with their mask, left-padded with zeros.

        Raises:
            InvalidInputError: see `check_captions`.
        """
        self.check_captions(captions, num_tokens)
        place = {caption: index for index, caption in enumerate(dict.fromkeys(captions))}
        texts = [clean_caption(caption) for caption in place] if self.clean else list(place)
        lengths = [len(ids) for ids in self.tokenizer(texts)["input_ids"]]
        if max(lengths) > num_tokens:
            longest = list(place)[lengths.index(max(lengths))]
            warnings.warn(
                f"the caption {longest[:60]!r}... has {max(lengths)} tokens; only the first {num_tokens} are used",
                stacklevel=2,
            )
        padded = min(num_tokens, -(-max(lengths) // PADDING) * PADDING)
        encoded = self.tokenizer(texts, padding="max_length", max_length=padded, truncation=True, return_tensors="pt")
        device = next(self.model.parameters()).device
        mask = encoded["attention_mask"].to(device)
        hidden = self.model(input_ids=encoded["input_ids"].to(device), attention_mask=mask).last_hidden_state
        hidden = functional.pad(hidden, (0, 0, 0, num_tokens - padded))
        features, valid = left_pad(hidden, functional.pad(mask, (0, num_tokens - padded)))
        if len(place) < len(captions):
            rows = torch.tensor([place[caption] for caption in captions], device=device)
            features, valid = features.index_select(0, rows), valid.index_select(0, rows)
        return TextCondition(features, valid)
