"""Scaled dot-product attention as torch has it, but for one case that torch is slow at.

Letters: B batch, H heads, Q and L positions, d channels of a head.
"""

from __future__ import annotations

from typing import Any

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
    scale: float | None = None,
    enable_gqa: bool = False,
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
        scale: factor of the scores; None for 1 / sqrt(d).
        enable_gqa: keys and values have fewer heads, each for several of the queries'.

    Returns:
        [B, H, Q, d], in the type that torch's own gives.
    """
    settings: dict[str, Any] = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if query.device.type != "cpu" or not needs_grad or wanted not in (torch.bfloat16, torch.float16):
        return functional.scaled_dot_product_attention(query, key, value, mask, **settings)
    with torch.autocast("cpu", enabled=False):
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.float()
        attended = functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask, **settings)
    return attended.to(wanted)
