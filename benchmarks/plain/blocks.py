"""What both plain samplers share: attention over every slot of a cache, guidance on logits, one token at a time.

Letters: B images, R rows (2 B with guidance), T condition tokens, S slots, Q positions fed at once, D channels,
V codes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional

from vistok.kernels import filter_logits
from vistok.nn import sampling
from vistok.nn.llama import ConditionalLlama
from vistok.nn.rope import apply_rotation
from vistok.nn.sampling import Generators
from vistok.nn.text import TextCondition
from vistok.nn.transformer import TransformerBlock

__all__ = ["SAVINGS", "Slots", "choose", "condition_rows", "guide"]

# What a plain sampler can be told to save, one by one, to see what each is worth.
SAVINGS = {
    "prefix": "attention over the filled slots in decoding order, instead of all slots under a mask",
    "heads": "guidance (and NAR's mix of heads) on hidden states before one product, instead of on logits",
    "choice": "all tokens of a step chosen at once, without sorting, instead of one by one with softmax and sort",
    "null": "unconditional rows dropped when guidance ends, instead of computed and thrown away",
}


class Slots:
    """Keys and values of every position that there will be, and which of them each position may see.

    Args:
        model: the generator whose blocks run.
        condition: B labels or captions, whose padding is hidden.
        rows: R.
        order: bool [L, L], which position may see which, L = T + N.
        rotation: complex [L, C / 2].
        prefix: positions are fed in order, so that the filled slots are all that may be seen.
    """

    def __init__(
        self,
        model: ConditionalLlama,
        condition: Tensor | TextCondition,
        rows: int,
        order: Tensor,
        rotation: Tensor,
        *,
        prefix: bool,
    ) -> None:
        self.model, self.rotation, self.prefix, self.filled = model, rotation, prefix, 0
        length, device = len(order), order.device
        slots = -(-length // 8) * 8
        mask = torch.zeros(rows, slots, slots, dtype=torch.bool, device=device)
        mask[:, :length, :length] = order
        padded = isinstance(condition, TextCondition) and condition.mask is not None
        if isinstance(condition, TextCondition) and condition.mask is not None:
            valid = condition.mask.repeat(rows // len(condition), 1)
            mask[:, :, : valid.shape[1]] &= valid[:, None]
            mask |= torch.eye(slots, dtype=torch.bool, device=device)
        self.mask: Tensor | None = mask if padded or not prefix else None
        weight = model.tok_embeddings.weight
        shape = (rows, model.num_kv_heads, slots, model.head_dim)
        self.cache = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in model.layers]

    def keep(self, rows: int) -> None:
        """Forget all rows but the first."""
        self.mask = None if self.mask is None else self.mask[:rows]
        self.cache = [(keys[:rows], values[:rows]) for keys, values in self.cache]

    def run(self, x: Tensor, positions: Tensor) -> list[Tensor]:
        """All blocks on the slots at `positions` [Q]; the output [R, Q, D] of each block."""
        self.filled += len(positions)
        seen = self.filled if self.prefix else self.cache[0][0].shape[2]
        # Condition tokens fed together are causal; later, what may be seen in order is all that is filled.
        mask = None if self.mask is None else self.mask[:, None, positions, :seen]
        causal = mask is None and self.filled == len(positions) > 1
        outputs = []
        for layer, (keys, values) in zip(self.model.layers, self.cache, strict=True):
            x = self._block(layer, x, positions, keys, values, seen, mask, causal)
            outputs.append(x)
        return outputs

    def _block(
        self,
        layer: TransformerBlock,
        x: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        seen: int,
        mask: Tensor | None,
        causal: bool,
    ) -> Tensor:
        attention = layer.attention
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        projected = attention.wqkv(layer.attention_norm(x)).unflatten(-1, (-1, attention.head_dim))
        query, key, value = projected.split([heads, kv_heads, kv_heads], dim=2)
        rotation = self.rotation[positions]
        query, key = apply_rotation(query, rotation), apply_rotation(key, rotation)
        keys[:, :, positions] = key.transpose(1, 2)
        values[:, :, positions] = value.transpose(1, 2)
        attended = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys[:, :, :seen].repeat_interleave(heads // kv_heads, dim=1),
            values[:, :, :seen].repeat_interleave(heads // kv_heads, dim=1),
            attn_mask=mask,
            is_causal=causal,
        )
        x = x + attention.wo(attended.transpose(1, 2).flatten(2))
        return x + layer.feed_forward(layer.ffn_norm(x))


def condition_rows(model: ConditionalLlama, condition: Tensor | TextCondition, guided: bool) -> Tensor:
    """Embedded condition tokens [R, T, D]: those of every image, and with guidance as many null conditions."""
    if isinstance(condition, TextCondition):
        features = condition.features
        if guided:
            null = model.cls_embedding.uncond_embedding.expand_as(features)
            features = torch.cat([features, null.to(features.dtype)])
        return model.cls_embedding(features, None)
    if guided:
        condition = torch.cat([condition, torch.full_like(condition, model.num_classes)])
    return model.cls_embedding(condition, None)


def guide(rows: Tensor, batch: int, guidance_scale: float, on: bool) -> Tensor:
    """[B, Q, K] of logits (or features) [R, Q, K]: guided, or those of the conditional half."""
    if not on:
        return rows[:batch]
    cond, uncond = rows.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def choose(
    logits: Tensor,
    savings: Collection[str],
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: Generators,
) -> Tensor:
    """One token for each position, int64 [B, Q], from logits [B, Q, V]; draws are taken as vistok takes them."""
    if "choice" in savings:
        return sampling.choose_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    noise = sampling.exponential_noise(tuple(logits.shape), generator, logits.device)
    chosen = []
    for position in range(logits.shape[1]):
        tempered = logits[:, position] / max(temperature, 1e-5)
        probabilities = filter_logits(tempered, top_k, top_p).softmax(dim=-1)
        chosen.append((probabilities / noise[:, position]).argmax(dim=-1))
    return torch.stack(chosen, dim=1)
