"""Token embeddings and heads that start from a tokenizer's codebook.

Letters: V codes, C numbers a code, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vistok.errors import InvalidInputError

__all__ = ["start_from_codebook"]


@torch.no_grad()
def start_from_codebook(codes: Tensor, embedding: nn.Embedding, heads: Iterable[nn.Linear], vocab_size: int) -> None:
    """Set embeddings [V, D] and heads to random projections of the codebook [V, C]: like codes start alike.

    Raises:
        InvalidInputError: if the codebook has another size than the vocabulary.
    """
    if len(codes) != vocab_size:
        raise InvalidInputError(f"the codebook has {len(codes)} codes, the vocabulary {vocab_size}")
    centred = codes.float() - codes.float().mean(0)
    centred = centred / centred.square().mean().sqrt().clamp_min(1e-12)
    for module in (embedding, *heads):
        projection = torch.randn(codes.shape[1], module.weight.shape[1]) / codes.shape[1] ** 0.5
        module.weight[: len(codes)] = 0.02 * centred @ projection  # a separator may follow the codes
    # A little noise keeps codes apart that the projection maps to one point.
    embedding.weight.add_(torch.randn_like(embedding.weight), alpha=0.005)
