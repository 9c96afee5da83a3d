"""xAR's sampler as the paper describes it (arXiv 2502.20388), on the weights of our model.

Every call of the network feeds all entities so far, the finished ones at time 0, under the block mask of training, for
both branches of guidance; modulations are computed and spread over the tokens in every block and call.

Letters: B images, R rows (2 B with guidance), n tokens fed, C channels of a token, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from vistok.generators.xar import XAR
from vistok.generators.xar.network import Block, rotate
from vistok.nn import diffusion
from vistok.nn.flow import flow_schedule
from vistok.nn.sampling import Generators

__all__ = ["SAVINGS", "generate"]

# What the plain sampler can be told to save, one by one, to see what each is worth.
SAVINGS = {
    "cache": "keys and values of finished entities kept, as the authors' code does, instead of computed in every call",
    "unconditional": "unconditional rows run for guided entities alone, instead of always",
}

Past = list[tuple[Tensor, Tensor]]


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """RMS norm and modulation, [R, n, D]."""
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed.to(x.dtype) * (1 + scale) + shift


def run_block(
    block: Block,
    x: Tensor,
    condition: Tensor,
    rotation: Tensor,
    mask: Tensor | None,
    past: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A block on tokens [R, n, D] with a condition each [R, n, D]; its output, and all keys and values."""
    values = block.ada_lin[1](functional.silu(condition)).unflatten(-1, (6, -1))
    gate_attention, gate_mlp, scale_attention, scale_mlp, shift_attention, shift_mlp = values.unbind(-2)
    normed = modulated(x, scale_attention, shift_attention)
    heads = block.attn.num_heads
    query, key, value = block.attn.qkv(normed).unflatten(-1, (3, heads, -1)).unbind(2)
    query, key = (rotate(part, rotation).transpose(1, 2) for part in (query, key))
    value = value.transpose(1, 2)
    if past is not None:
        key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    x = x + gate_attention * block.attn.proj(attended.transpose(1, 2).flatten(2))
    x = x + gate_mlp * block.mlp(modulated(x, scale_mlp, shift_mlp))
    return x, (key, value)


def network(
    model: XAR, tokens: Tensor, labels: Tensor, index: Tensor, start: int, mask: Tensor | None, past: Past | None
) -> tuple[Tensor, Past]:
    """Velocities [R, n, C] of tokens from position `start` on, at times `index` [n]; and keys and values."""
    stop = start + tokens.shape[1]
    condition = (model.class_emb(labels)[:, None] + model.time_embed(index)).expand(-1, tokens.shape[1], -1)
    x = model.z_proj_ln(model.z_proj(tokens) + model.encoder_pos_embed_learned[:, start:stop])
    kept: Past = []
    for number, block in enumerate([*model.encoder_blocks, *model.decoder_blocks]):
        if number == len(model.encoder_blocks):
            x = model.decoder_embed(model.encoder_norm(x)) + model.decoder_pos_embed_learned[:, start:stop]
        rotation = model.rotation(model.config.hidden_size // block.attn.num_heads)[start:stop]
        x, pair = run_block(block, x, condition, rotation, mask, None if past is None else past[number])
        kept.append(pair)
    return model.pred(model.decoder_norm(x)), kept


@torch.no_grad()
def generate(
    model: XAR,
    labels: Tensor,
    *,
    guidance_scale: float = 1.0,
    num_inference_steps: int = 50,
    solver: str = "euler_maruyama",
    generator: Generators = None,
    savings: Collection[str] = (),
) -> Tensor:
    """Tokens [B, rows * cols, C] in raster order.

    Args:
        model: the generator.
        labels: int64 [B].
        guidance_scale: of the last entity; the first has 1.
        num_inference_steps: network calls an entity.
        solver: `"euler_maruyama"` or `"euler"`.
        generator: drawn from as `XAR.sample` does.
        savings: names of `SAVINGS`.
    """
    layout, batch, device = model.layout, len(labels), labels.device
    spans: Sequence[tuple[int, int]] = list(pairwise(layout.starts))
    schedule = flow_schedule(num_inference_steps, solver)
    both = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    finished = torch.empty(batch, 0, model.token_size, device=device)
    past: Past | None = None
    for entity, (start, stop) in enumerate(spans):
        weight = 1.0 + (guidance_scale - 1.0) * entity / (len(spans) - 1) if len(spans) > 1 else guidance_scale
        x = diffusion.gaussian_noise((batch, stop - start, model.token_size), generator, device).double()
        mask = None if "cache" in savings else layout.mask()[:stop, :stop].to(device)
        rows = both if weight > 1.0 or "unconditional" not in savings else labels
        for call in range(num_inference_steps):
            time, step = schedule.times[call], schedule.times[call + 1] - schedule.times[call]
            if "cache" in savings:
                fed, first = x.float(), start
                seen = None if past is None else [(key[: len(rows)], value[: len(rows)]) for key, value in past]
            else:
                fed, first, seen = torch.cat([finished, x.float()], dim=1), 0, None
            index = torch.zeros(fed.shape[1], dtype=torch.int64, device=device)
            index[start - first :] = schedule.indices[call]
            found, _ = network(model, fed.repeat(len(rows) // batch, 1, 1), rows, index, first, mask, seen)
            found = found[:, start - first :].double()
            velocity = found[:batch]
            if weight > 1.0:
                velocity = found[batch:] + weight * (velocity - found[batch:])
            if solver == "euler":
                x = x + step * velocity
                continue
            x = x + step * ((2.0 - time) * velocity + x)
            if call + 1 < num_inference_steps:
                noise = diffusion.gaussian_noise(x.shape, generator, device).double()
                x = x + (2.0 * time) ** 0.5 * abs(step) ** 0.5 * noise
        finished = torch.cat([finished, x.float()], dim=1)
        if "cache" in savings and entity + 1 < len(spans):
            index = torch.zeros(stop - start, dtype=torch.int64, device=device)
            _, past = network(model, x.float().repeat(2, 1, 1), both, index, start, None, past)
    return layout.to_raster(finished)
