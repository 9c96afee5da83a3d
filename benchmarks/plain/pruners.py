"""Visual-token pruning the plain way: whole attention matrices, every module's input and output, all tokens projected.

What `vistok.pruners` saves over this is listed in `SAVINGS`; the results must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SAVINGS", "received_attention", "transprune"]

SAVINGS = {
    "rows": "attention of the needed rows only, streamed over heads, instead of the whole matrix",
    "watched layers": "transition values in accumulation layers up to the last pruning only",
    "prefill": "nothing is computed while decoding",
    "one softmax": "norms and cosine of a module read its input and output once",
}


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Column means float32 [V, P] of the attention matrix [V, H, P, P]."""
    return (query.float() @ key.float().transpose(2, 3) * scale).softmax(dim=-1).mean(dim=1).mean(dim=1)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]


def _transition(before: Tensor, after: Tensor) -> Tensor:
    before, after = before.float(), after.float()
    magnitude = after.norm(dim=-1) / before.norm(dim=-1)
    turned = torch.exp(1 - torch.cosine_similarity(before, after, dim=-1))
    return magnitude * turned / turned.sum()


@torch.no_grad()
def transprune(
    model: Any, inputs: dict[str, Tensor], accumulate: Sequence[int], prune: Sequence[int], ratios: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """TransPrune on a LLaVA-1.5 model and one sample, layer by layer.

    Returns:
        The logits [1, V] of the last prompt token, and the kept visual tokens after each pruning.
    """
    language = model.model.language_model
    ids = inputs["input_ids"]
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output))
    hidden = language.embed_tokens(ids)
    visual = (ids[0] == model.config.image_token_id).nonzero()[:, 0]
    hidden[0, visual] = features.to(hidden.dtype)
    start, first = int(visual[0]), len(visual)
    count, total, alive, kept = first, None, torch.arange(first, device=ids.device), []
    for number, layer in enumerate(language.layers, 1):
        positions = torch.arange(hidden.shape[1], device=ids.device)[None]
        tables = language.rotary_emb(hidden, position_ids=positions)
        before = layer.input_layernorm(hidden)
        after = layer.self_attn(hidden_states=before, position_embeddings=tables, attention_mask=None)[0]
        value = _transition(before, after)
        hidden = hidden + after
        before = layer.post_attention_layernorm(hidden)
        after = layer.mlp(before)
        value = value + _transition(before, after)
        hidden = hidden + after
        if number in accumulate:
            total = value if total is None else total + value
        if number not in prune:
            continue
        following = language.layers[number]
        normed, attention = following.input_layernorm(hidden), following.self_attn

        def heads(states: Tensor, attention: Any = attention) -> Tensor:
            return states.view(*states.shape[:2], -1, attention.head_dim).transpose(1, 2)

        query = _rotate(heads(attention.q_proj(normed)), *tables)
        key = _rotate(heads(attention.k_proj(normed)), *tables)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        size = hidden.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool, device=ids.device).tril()
        logits = (query.float() @ key.float().transpose(2, 3) * attention.scaling).masked_fill(~mask, float("-inf"))
        matrix = logits.softmax(dim=-1).mean(dim=1)[0]
        span = slice(start, start + count)
        asked = matrix[start + count :, span].mean(dim=0)
        score = asked / (asked.sum() + 1e-8)
        if total is not None:
            score = score + total[0, span] / (total[0, span].sum() + 1e-8)
        chosen = score.topk(int(first * ratios[list(prune).index(number)])).indices.sort().values
        places = torch.cat([positions[0, :start], chosen + start, torch.arange(start + count, size, device=ids.device)])
        hidden, count, alive = hidden[:, places], len(chosen), alive[chosen]
        total = None if total is None else total[:, places]
        kept.append(alive)
    return model.lm_head(language.norm(hidden[:, -1])), kept
