"""Controllers the plain way: every product that the package saves is computed, nothing is kept between calls.

Letters: B batch, N text positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional

from vistok.controllers.tenor import position_code


class PlainTenorCrossAttention:
    """Cross-attention of a UNet: the code is added to the text states, which are projected at every step."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        code = torch.zeros_like(text)
        if encoder_hidden_states is not None:
            code = position_code(text.shape[1], text.shape[2], text.dtype, text.device).expand_as(text)
        query, key, value = attn.to_q(hidden_states), attn.to_k(text + code), attn.to_v(text)
        heads = [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        result = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return attn.to_out[0](result)


class PlainTenorJointAttention:
    """Joint attention: all text is projected twice, with and without the code, and half of each is thrown away."""

    def __init__(self, text_first: bool) -> None:
        self.text_first = text_first

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states
        code = position_code(text.shape[1], text.shape[2], text.dtype, text.device)
        coded = [layer(text + code) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        plain = [layer(text) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        words = [coded[0], coded[1], plain[2]]
        image = [layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v)]
        joined = []
        for index, name in enumerate("qkv"):
            ours, theirs = (part[index].unflatten(-1, (attn.heads, -1)) for part in (image, words))
            if getattr(attn, f"norm_{name}", None) is not None:
                ours = getattr(attn, f"norm_{name}")(ours)
            if getattr(attn, f"norm_added_{name}", None) is not None:
                theirs = getattr(attn, f"norm_added_{name}")(theirs)
            part = torch.cat([theirs, ours] if self.text_first else [ours, theirs], dim=1)
            if image_rotary_emb is not None and index < 2:
                part = apply_rotary_emb(part, image_rotary_emb, sequence_dim=1)
            joined.append(part.transpose(1, 2))
        result = functional.scaled_dot_product_attention(*joined).transpose(1, 2).flatten(2)
        count = text.shape[1]
        words_out, image_out = (
            (result[:, :count], result[:, count:])
            if self.text_first
            else (result[:, hidden_states.shape[1] :], result[:, : hidden_states.shape[1]])
        )
        if not getattr(attn, "context_pre_only", False):
            words_out = attn.to_add_out(words_out)
        return attn.to_out[0](image_out), words_out


def select_pairs_plainly(
    boxes: Sequence[Sequence[float]], categories: Sequence[int], width: float, height: float, thresholds: Any
) -> list[tuple[int, int]]:
    """SCOP's rules one pair at a time; returns the kept pairs of one image."""
    kept = []
    usable = [index for index, box in enumerate(boxes) if box[2] * box[3] >= thresholds.min_area]
    for place, one in enumerate(usable):
        for two in usable[place + 1 :]:
            (ax, ay, aw, ah), (bx, by, bw, bh) = boxes[one], boxes[two]
            small, large = sorted((aw * ah, bw * bh))
            distance = ((ax + aw / 2 - bx - bw / 2) ** 2 + (ay + ah / 2 - by - bh / 2) ** 2) ** 0.5
            diagonal = min((aw**2 + ah**2) ** 0.5, (bw**2 + bh**2) ** 0.5)
            across = min(ax + aw, bx + bw) - max(ax, bx)
            down = min(ay + ah, by + bh) - max(ay, by)
            if (
                aw * ah + bw * bh >= thresholds.visual_significance * width * height
                and categories[one] != categories[two]
                and distance <= thresholds.spatial_clarity * diagonal
                and (across < 0 or down < 0 or across * down < thresholds.minimal_overlap * small)
                and small >= thresholds.size_balance * large
            ):
                kept.append((one, two))
    return kept
