"""Normalisation layers. Letters: D channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """Root mean square norm, x / sqrt(mean(x^2) + eps) * weight: statistics in float32, cast back before the weight.

    Args:
        size: channels D.
        eps: inside the square root.
    """

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., D]."""
        return functional.rms_norm(x.float(), (x.shape[-1],), None, self.eps).to(x.dtype) * self.weight
