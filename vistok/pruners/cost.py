"""What visual tokens cost: floating point operations of a prefill and bytes of the key-value cache.

Papers count differently, and their figures cannot be compared. `prefill_flops` counts real operations (2 a
multiply-add) of all tokens, with grouped keys; `paper_macs` gives the papers' own conventions, visual tokens only.

Letters: d hidden width, d_kv width of all key heads, m width of the MLP, n tokens that a layer sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vistok.errors import InvalidInputError

__all__ = ["DecoderShape", "kv_bytes", "paper_macs", "prefill_flops"]

Convention = Literal["fastv", "pyramiddrop", "sparsevlm", "transprune", "visionzip"]


@dataclass(frozen=True)
class DecoderShape:
    """The widths of a decoder that costs depend on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """From a transformers configuration; one with a text part inside gives that part's."""
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


def _lengths(shape: DecoderShape, tokens: Sequence[int]) -> list[int]:
    if len(tokens) != shape.layers:
        raise InvalidInputError(f"the decoder has {shape.layers} layers, got the tokens of {len(tokens)}")
    if any(count < 0 for count in tokens):
        raise InvalidInputError(f"token counts cannot be negative: {list(tokens)}")
    return [int(count) for count in tokens]


def prefill_flops(shape: DecoderShape, tokens: Sequence[int], *, causal: bool = False) -> float:
    """Floating point operations of one prompt's prefill, without embeddings and head.

    Per layer `2 [n d (q + 2 d_kv) + n q d + 2 n^2 q / 2 + 3 n d m]` with q = heads x head_dim, where the attention term
    counts scores and weighted sum over the full square.

    Args:
        tokens: tokens that each layer sees.
        causal: count half of the attention square, as a causal kernel computes it.
    """
    queries, keys = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    total = 0.0
    for count in _lengths(shape, tokens):
        projections = count * shape.hidden * (queries + 2 * keys) + count * queries * shape.hidden
        attention = 2 * count**2 * queries * (0.5 if causal else 1.0)
        total += 2 * (projections + attention + 3 * count * shape.hidden * shape.intermediate)
    return total


def paper_macs(shape: DecoderShape, tokens: Sequence[int], convention: Convention = "transprune") -> float:
    """Multiply-adds as a paper counts them: `4 n d^2 + 2 n^2 d` and two or three MLP matrices, no grouped keys.

    Args:
        tokens: the tokens that the paper counts in each layer: visual ones, for VisionZip all.
        convention: FastV and VisionZip count two MLP matrices, PyramidDrop, SparseVLM and TransPrune three.
    """
    matrices = {"fastv": 2, "visionzip": 2, "pyramiddrop": 3, "sparsevlm": 3, "transprune": 3}
    if convention not in matrices:
        raise InvalidInputError(f"unknown convention {convention!r}; there are: {', '.join(matrices)}")
    d, m = shape.hidden, shape.intermediate
    return float(sum(4 * n * d**2 + 2 * n**2 * d + matrices[convention] * n * d * m for n in _lengths(shape, tokens)))


def kv_bytes(shape: DecoderShape, tokens: Sequence[int], bytes_per_value: int = 2) -> int:
    """Bytes of the keys and values of one prompt: `2 sum_l n_l heads_kv head_dim bytes`."""
    return 2 * sum(_lengths(shape, tokens)) * shape.key_heads * shape.head_dim * bytes_per_value
