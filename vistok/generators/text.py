"""Text conditioning: any transformers text encoder, used the way LlamaGen and NAR used FLAN-T5.

Letters: B captions, T tokens, D channels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vistok.errors import CheckpointError, InvalidInputError
from vistok.nn.text import TextCondition, left_pad

__all__ = ["TextEncoder"]

# A tokenizer with fewer words than this is taken to know all of its language: an unknown word is then a mistake.
CLOSED_VOCABULARY = 1000


class TextEncoder(nn.Module):
    """Captions to features, left-padded.

    Args:
        model: a transformers text encoder whose output has `last_hidden_state`.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> TextEncoder:
        """Load the encoder half of a T5-like model, or any other encoder, from a folder, a shipped name or the Hub.

        Raises:
            CheckpointError: if there is none.
        """
        from pathlib import Path

        from transformers import AutoConfig, AutoModel, AutoTokenizer, T5EncoderModel

        shipped = Path(__file__).parent.parent / "assets" / str(name)
        source = str(shipped if shipped.is_dir() else name)
        try:
            config = AutoConfig.from_pretrained(source)
            network = T5EncoderModel if config.model_type in ("t5", "mt5", "umt5") else AutoModel
            model = network.from_pretrained(source, **kwargs)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"no text encoder could be loaded from {name!r}: {reason}") from error
        return cls(model.eval(), tokenizer)

    @property
    def known_words(self) -> list[str] | None:
        """Every word that the tokenizer knows, if its vocabulary is closed; None for a sub-word tokenizer."""
        vocabulary = self.tokenizer.get_vocab()
        if len(vocabulary) >= CLOSED_VOCABULARY or self.tokenizer.unk_token_id is None:
            return None
        return sorted(word for word in vocabulary if word not in self.tokenizer.all_special_tokens)

    def check_words(self, captions: Sequence[str]) -> None:
        """Raise InvalidInputError naming the words that a closed vocabulary lacks, and those it has."""
        known = self.known_words
        if known is None:
            return
        unknown = []
        for caption in captions:
            encoding = self.tokenizer(caption, return_offsets_mapping=True)
            for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
                if token == self.tokenizer.unk_token_id and caption[start:end] not in unknown:
                    unknown.append(caption[start:end])
        if unknown:
            listed = ", ".join(repr(word) for word in unknown)
            raise InvalidInputError(f"unknown word {listed}; this text encoder knows: {', '.join(known)}")

    @torch.no_grad()
    def forward(self, captions: Sequence[str], *, num_tokens: int) -> TextCondition:
        """Encode captions; equal ones are computed once.

        Args:
            captions: B texts.
            num_tokens: T, the length that the generator was trained with; longer captions are cut (with a closed
                vocabulary they are refused instead).

        Returns:
            Features [B, T, D] with their mask, left-padded with zeros.

        Raises:
            InvalidInputError: no captions, something else than texts, unknown words, or a caption that is too long.
        """
        if isinstance(captions, str) or not captions or not all(isinstance(text, str) for text in captions):
            raise InvalidInputError(f"captions must be a list of texts; got {captions!r}")
        self.check_words(captions)
        distinct = list(dict.fromkeys(captions))
        encoded = self.tokenizer(
            distinct, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt"
        )
        if self.known_words is not None:
            for caption in distinct:
                length = len(self.tokenizer(caption)["input_ids"])
                if length > num_tokens:
                    raise InvalidInputError(
                        f"the caption {caption!r} has {length} tokens; this model was trained with at most {num_tokens}"
                    )
        device = next(self.model.parameters()).device
        mask = encoded["attention_mask"].to(device)
        hidden = self.model(input_ids=encoded["input_ids"].to(device), attention_mask=mask).last_hidden_state
        features, valid = left_pad(hidden, mask)
        if len(distinct) < len(captions):
            place = {caption: index for index, caption in enumerate(distinct)}
            rows = torch.tensor([place[caption] for caption in captions], device=device)
            features, valid = features[rows], valid[rows]
        return TextCondition(features, valid)
