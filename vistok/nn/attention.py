"""Scaled dot-product attention as torch has it, but for one case that torch is slow at.

Letters: B batch, H heads, Q and L positions, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, in float32 where a CPU trains in half precision.

    The backward pass of torch's bfloat16 attention on a CPU takes two to four times as long as the float32 one (65
    positions, 16 to 48 channels a head, torch 2.15).

    Args:
        query: [B, H, Q, d].
        key, value: [B, H, L, d].
        mask: bool (True: may attend) or additive, broadcast to [B, H, Q, L].
        dropout_p: of the attention weights.
        is_causal: position i sees positions 0..i.

    Returns:
        [B, H, Q, d], in the type that torch's own gives.
    """
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if query.device.type != "cpu" or not needs_grad:
        return functional.scaled_dot_product_attention(query, key, value, mask, dropout_p, is_causal)
    wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    with torch.autocast("cpu", enabled=False):
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.float()
        attended = functional.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), mask, dropout_p, is_causal
        )
    return attended.to(wanted)
