"""The lab's language model that reads and writes pictures: a small Llama with the words of captions and of a SEED.

The result is a stock transformers `LlamaForCausalLM` with a stock word-level tokenizer, which `vistok.load` and
`ImageLanguageModel.from_pretrained` take, and `AutoModelForCausalLM` and `AutoTokenizer` as well.

Shape letters: B sentences, T words, n codes of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vistok.data.shapes.words import caption_tokenizer
from vistok.nn.model import VistokModel
from vistok.tokenizers.seed import ImageLanguageModel, extend_language_model

__all__ = ["ImageLanguage", "SentenceWriter"]

MAX_LENGTH = 64


class SentenceWriter:
    """Training sentences of pictures and captions, as SEED-LLaMA's pairs, with nothing learnt from what is given.

    Args:
        codebook_size: codes of the SEED.
        num_codes: codes of a picture, n.
    """

    def __init__(self, codebook_size: int, num_codes: int) -> None:
        self.sizes = {"codebook_size": codebook_size, "num_codes": num_codes}
        self._builder: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_builder": None}

    def __call__(self, ids: Tensor, captions: Sequence[str], image_first: Sequence[bool]) -> dict[str, Tensor]:
        """Sentences.

        Args:
            ids: codes int64 [B, n].
            captions: B texts.
            image_first: of each, whether the picture is given and the caption learnt, or the other way round.

        Returns:
            `input_ids`, `attention_mask`, `labels`, int64 [B, T] with T of the longest.
        """
        if self._builder is None:
            self._builder = ImageLanguage.tiny(**self.sizes).language.sequences(MAX_LENGTH)
        rows = [
            self._builder.pair(codes, text, image_first=first, mask_condition=True)
            for codes, text, first in zip(ids, captions, image_first, strict=True)
        ]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        longest = int(batch["attention_mask"].sum(1).max())
        return {name: value[:, :longest] for name, value in batch.items()}


class ImageLanguage(VistokModel):
    """A Llama over the words of the lab's captions and of a SEED's codes.

    Args:
        codebook_size: codes of the SEED.
        num_codes: codes of a picture, n.
        hidden_size: width.
        num_layers: transformer layers.
        num_heads: attention heads.
        ffn_size: width of the gated feed-forward layers.
    """

    system: ClassVar[str] = "image-language"
    kind: ClassVar[str] = "language model"

    @register_to_config
    def __init__(
        self,
        codebook_size: int = 256,
        num_codes: int = 16,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        ffn_size: int = 352,
    ) -> None:
        super().__init__()
        tokenizer = caption_tokenizer(MAX_LENGTH)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden_size,
                intermediate_size=ffn_size,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                num_key_value_heads=num_heads,
                max_position_embeddings=MAX_LENGTH,
                tie_word_embeddings=False,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        # torch's fused bfloat16 attention is slow to train on a CPU (see `vistok.nn.attention`).
        self.model.set_attn_implementation("eager")
        self.language: ImageLanguageModel = extend_language_model(
            self.model, tokenizer, codebook_size=codebook_size, num_codes=num_codes, mean_resizing=False
        )
        self.register_to_config(vocab_size=len(tokenizer))

    @property
    def codebook_size(self) -> int:
        """Codes of its SEED."""
        return self.config.codebook_size

    @classmethod
    def tiny(cls, **overrides: Any) -> ImageLanguage:
        """Random weights that build in milliseconds."""
        sizes = {
            "hidden_size": 16,
            "num_layers": 1,
            "num_heads": 2,
            "ffn_size": 16,
            "codebook_size": 64,
            "num_codes": 8,
        }
        return cls(**{**sizes, **overrides})

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Next-word cross entropy.

        Args:
            batch: `input_ids`, `attention_mask`, `labels`, int64 [B, T] (see `SentenceWriter`).
            generator: unused (the objective draws nothing).
        """
        names = ("input_ids", "attention_mask", "labels")
        return self.language.training_loss({name: batch[name] for name in names})

    is_stock: ClassVar[bool] = True

    def save_transformers(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write model and tokenizer as transformers files.

        Args:
            folder: to write.
            tensors: weights under this network's names.
        """
        self.load_state_dict(tensors)
        self.to(next(iter(tensors.values())).dtype)
        self.language.save_pretrained(folder)

    def facts(self) -> dict[str, Any]:
        """What `vistok.json` says of it."""
        sizes = {"codebook_size": self.config.codebook_size, "num_tokens": self.config.num_codes}
        return {"system": "image-language-model", "kind": "language model", **sizes}
