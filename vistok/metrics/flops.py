"""What a pruner saves on a model of a given size, without its weights.

    profile("llava-v1.5-7b", TransPrune("high"), visual=576, text=64)

Counts come from formulas (`vistok.pruners.cost`); `counted_flops` runs the decoder's layers on the meta device under
torch's own counter, to check them. Papers count differently: compare figures of one convention only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vistok.errors import InvalidInputError
from vistok.pruners.cost import Convention, DecoderShape, kv_bytes, paper_macs, prefill_flops
from vistok.pruners.pruner import Pruner

__all__ = ["SHAPES", "Profile", "counted_flops", "profile", "shape_of", "tower_flops"]

SHAPES: dict[str, DecoderShape] = {
    "llava-v1.5-7b": DecoderShape(32, 4096, 11008, 32, 32, 128),
    "llava-v1.5-13b": DecoderShape(40, 5120, 13824, 40, 40, 128),
    "llava-v1.6-vicuna-7b": DecoderShape(32, 4096, 11008, 32, 32, 128),
    "llava-onevision-qwen2-0.5b": DecoderShape(24, 896, 4864, 14, 2, 64),
    "llava-onevision-qwen2-7b": DecoderShape(28, 3584, 18944, 28, 4, 128),
    "llava-onevision-qwen2-72b": DecoderShape(80, 8192, 29568, 64, 8, 128),
    "qwen2.5-vl-3b": DecoderShape(36, 2048, 11008, 16, 2, 128),
    "qwen2.5-vl-7b": DecoderShape(28, 3584, 18944, 28, 4, 128),
}
"""Decoders of published models."""


@dataclass(frozen=True)
class Profile:
    """Costs of one prompt's prefill and cache, pruned and not.

    Attributes:
        visual_per_layer: visual tokens of each layer after pruning.
        text: the other tokens.
        visual: visual tokens at first.
        shape: widths of the decoder.
        bytes_per_value: of the cache.
    """

    visual_per_layer: list[int]
    text: int
    visual: int
    shape: DecoderShape
    bytes_per_value: int = 2

    def _tokens(self, pruned: bool) -> list[int]:
        visual = self.visual_per_layer if pruned else [self.visual] * self.shape.layers
        return [count + self.text for count in visual]

    def flops(self, pruned: bool = True, causal: bool = False) -> float:
        """Floating point operations (2 a multiply-add) of all tokens."""
        return prefill_flops(self.shape, self._tokens(pruned), causal=causal)

    def paper_macs(self, convention: Convention = "transprune", pruned: bool = True) -> float:
        """Multiply-adds in the convention of a paper."""
        if convention == "visionzip":
            return paper_macs(self.shape, self._tokens(pruned), convention)
        visual = self.visual_per_layer if pruned else [self.visual] * self.shape.layers
        return paper_macs(self.shape, visual, convention)

    def kv_bytes(self, pruned: bool = True) -> int:
        """Bytes of the cache."""
        return kv_bytes(self.shape, self._tokens(pruned), self.bytes_per_value)

    @property
    def average_kept(self) -> float:
        """Share of visual tokens that a layer sees on average."""
        return sum(self.visual_per_layer) / (self.shape.layers * max(1, self.visual))

    def __str__(self) -> str:
        return (
            f"kept over depth {100 * self.average_kept:.1f} %; prefill {self.flops() / 1e12:.3f} of "
            f"{self.flops(False) / 1e12:.3f} TFLOPs; visual multiply-adds {self.paper_macs() / 1e12:.3f} of "
            f"{self.paper_macs(pruned=False) / 1e12:.3f} T; cache {self.kv_bytes() / 2**20:.1f} of "
            f"{self.kv_bytes(False) / 2**20:.1f} MiB"
        )


def shape_of(model: str | DecoderShape | Any) -> DecoderShape:
    """The decoder of a name in `SHAPES`, a transformers configuration, or a model.

    Raises:
        InvalidInputError: for an unknown name.
    """
    if isinstance(model, DecoderShape):
        return model
    if isinstance(model, str):
        if model not in SHAPES:
            raise InvalidInputError(f"no decoder is called {model!r}; there are: {', '.join(SHAPES)}")
        return SHAPES[model]
    return DecoderShape.from_config(getattr(model, "config", model))


def profile(
    model: str | DecoderShape | Any,
    pruner: Pruner | Sequence[int],
    *,
    visual: int,
    text: int = 0,
    bytes_per_value: int = 2,
) -> Profile:
    """Costs of a pruner on a model of some size.

    Args:
        model: a name of `SHAPES`, a transformers configuration, or a model (on the meta device, too).
        pruner: a pruner whose counts do not depend on the picture, or the visual tokens of each layer.
        visual: visual tokens of the prompt.
        text: other tokens.

    Raises:
        InvalidInputError: for an unknown name, or a pruner that cannot be planned.
    """
    if visual < 1 or text < 0:
        raise InvalidInputError(f"a prompt has at least one visual token and no negative text, got {visual} and {text}")
    shape = shape_of(model)
    tokens = pruner.plan(shape.layers, visual) if isinstance(pruner, Pruner) else [int(count) for count in pruner]
    if len(tokens) != shape.layers:
        raise InvalidInputError(f"the decoder has {shape.layers} layers, got the tokens of {len(tokens)}")
    return Profile(tokens, text, visual, shape, bytes_per_value)


def tower_flops(config: Any, patches: int, views: int = 1, layers: int | None = None) -> float:
    """Floating point operations of a vision tower with full attention.

    Args:
        config: its transformers configuration.
        patches: tokens of one view, the class token included.
        layers: how many layers run; default all.
    """
    width = config.hidden_size
    depth = layers or getattr(config, "num_hidden_layers", None) or config.depth
    layer = 4 * patches * width**2 + 2 * patches**2 * width + 2 * patches * width * config.intermediate_size
    return 2.0 * views * depth * layer


def counted_flops(config: Any, tokens: Sequence[int], text_model: Any = None) -> float:
    """The prefill's operations as torch counts them: every decoder layer runs on the meta device at its own length.

    Args:
        config: a transformers configuration of a decoder (or of a model with one inside).
        tokens: tokens of each layer.
        text_model: the decoder, where it exists already.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel

    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    with torch.device("meta"):
        decoder = text_model or AutoModel.from_config(config)
        shape = DecoderShape.from_config(config)
        if len(tokens) != shape.layers:
            raise InvalidInputError(f"the decoder has {shape.layers} layers, got the tokens of {len(tokens)}")
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            for layer, count in zip(decoder.layers, tokens):
                hidden = torch.empty(1, count, shape.hidden, dtype=decoder.dtype)
                table = torch.empty(1, count, shape.head_dim, dtype=decoder.dtype)
                layer(hidden, attention_mask=None, position_embeddings=(table, table), position_ids=None)
    totals: Mapping[str, Any] = counter.get_flop_counts()
    return float(sum(totals.get("Global", {}).values()))
