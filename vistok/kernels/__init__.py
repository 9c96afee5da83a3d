"""Fused ops, one file each: reference, plain PyTorch path, Triton kernel, and one function that picks among them."""

from __future__ import annotations

from vistok.kernels.adaptive_norm import gated_modulated_norm, modulated_norm
from vistok.kernels.attention_rows import attention_received
from vistok.kernels.dispatch import BACKENDS, Choice, Declined, current, explain, operations, use
from vistok.kernels.finite_scalar import finite_scalar, finite_scalar_codes, finite_scalar_quantize
from vistok.kernels.guided_sampling import filter_logits, guided_sampling
from vistok.kernels.nearest_code import nearest_code

__all__ = [
    "BACKENDS",
    "Choice",
    "Declined",
    "attention_received",
    "current",
    "explain",
    "filter_logits",
    "finite_scalar",
    "finite_scalar_codes",
    "finite_scalar_quantize",
    "gated_modulated_norm",
    "guided_sampling",
    "modulated_norm",
    "nearest_code",
    "operations",
    "use",
]
