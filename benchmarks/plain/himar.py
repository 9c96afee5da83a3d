"""Hi-MAR's sampler as described by its authors (arXiv 2505.20288, section 3), on the weights of our model.

Every step encodes all known tokens anew, modulates every block, decodes every position and runs the heads on twice as
many rows under guidance; conditions and timesteps are embedded in every diffusion step.

Letters: B images, R rows (2 B with guidance), T condition tokens, P pivots, N dense tokens, L = P + N, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.plain.diffusion import known_after, reverse_step
from benchmarks.plain.mar import modulated, sample_head
from vistok.generators.himar import DiffusionTransformer, HiMAR
from vistok.nn import diffusion, masked
from vistok.nn.diffusion import cosine_process
from vistok.nn.diffusion_head import timestep_features
from vistok.nn.masked import patchify, unpatchify
from vistok.nn.sampling import Generators

__all__ = ["generate"]


def modulated_block(block: torch.nn.Module, x: Tensor, vector: Tensor, phase: int) -> Tensor:
    """A block whose branches are scaled at runtime."""
    scales = vector * block.adaLN_scale[phase, 0, 0] + block.adaLN_shift[phase, 0, 0]
    before1, after1, before2, after2 = scales.chunk(4)
    x = x + after1 * block.attn(block.norm1(x) * (1 + before1))
    return x + after2 * block.mlp(block.norm2(x) * (1 + before2))


def hidden_states(model: HiMAR, tokens: Tensor, mask: Tensor, context: Tensor, phase: int) -> Tensor:
    """Decoder outputs [R, L, D] of a phase from embedded tokens [R, L, D], mask bool [R, L] and context [R, T, D]."""
    rows, total, length = len(tokens), model.num_condition_tokens, mask.shape[1]
    places = slice(phase * (total + length), (phase + 1) * (total + length))
    x = torch.cat([context, tokens], dim=1) + model.encoder_pos_embed_learned[:, places]
    x = model.z_proj_ln(x)
    shown = torch.cat([mask.new_zeros(rows, total), mask], dim=1).logical_not()
    x = x[shown].view(rows, -1, x.shape[-1])
    vector = model.encoder_blocks_ada(model.encoder_task_emb.weight[phase])
    for block in model.encoder_blocks:
        x = modulated_block(block, x, vector, phase)
    x = model.decoder_embed(model.encoder_norm(x))
    masks = model.mask_token[:, phase * length : (phase + 1) * length]
    full = torch.cat([x[:, :total], masks.repeat(rows, 1, 1)], dim=1)
    full[shown] = x.flatten(0, 1)
    full = full + model.decoder_pos_embed_learned[:, places]
    vector = model.decoder_blocks_ada(model.decoder_task_emb.weight[phase])
    for block in model.decoder_blocks:
        full = modulated_block(block, full, vector, phase)
    return model.decoder_norm(full)[:, total:] + model.diffusion_pos_embed_learned


def denoise(net: DiffusionTransformer, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
    """The dense head's network on latents [R, C, H, W]: each block makes its own modulation of every token."""
    states = net.x_embedder(patchify(x, 1)) + net.pos_embed
    embedded = net.t_embedder.mlp(timestep_features(timesteps))[:, None] + net.c_embedder(condition)
    for block in net.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(embedded).chunk(6, dim=-1)
        states = states + gate1 * block.attn(modulated(states, shift1, scale1))
        states = states + gate2 * block.mlp(modulated(states, shift2, scale2))
    last = net.final_layer
    states = last.linear(modulated(states, *last.adaLN_modulation(embedded).chunk(2, dim=-1)))
    return unpatchify(states, net.tokens, 1)


def sample_dense(
    net: DiffusionTransformer,
    condition: Tensor,
    shape: tuple[int, int, int, int],
    guidance_scale: float | None,
    temperature: float,
    num_diffusion_steps: str | int,
    generator: Generators,
    known: Tensor,
    unknown: Tensor,
) -> Tensor:
    """Latents [B, C, H, W] from conditions [R, N, D], with known ones noised to each level."""
    process = cosine_process(num_diffusion_steps)
    images, copies = shape[0], 1 if guidance_scale is None else 2
    start = diffusion.gaussian_noise(shape, generator, condition.device).repeat(copies, 1, 1, 1)
    known, unknown, x = known.repeat(copies, 1, 1, 1), unknown.repeat(copies, 1, 1, 1), start
    for step in reversed(range(len(process))):
        index = torch.full((len(x),), step)
        x = torch.where(unknown, x, process.add_noise(known, index, start))
        eps = denoise(net, x[:images].repeat(copies, 1, 1, 1), torch.tensor(process.timesteps)[index], condition)
        if guidance_scale is not None:
            with_condition, without = eps.chunk(2)
            eps = (without + guidance_scale * (with_condition - without)).repeat(2, 1, 1, 1)
        noise = torch.zeros_like(x)
        if step and temperature:
            noise = diffusion.gaussian_noise(shape, generator, condition.device).repeat(copies, 1, 1, 1)
        x = reverse_step(process, x, index, eps, None, noise, temperature)
    return x[:images]


def contexts(model: HiMAR, labels: Tensor, guided: bool) -> Tensor:
    """[R, T, D]."""
    context = model.class_emb(labels)[:, None].expand(-1, model.num_condition_tokens, -1)
    return torch.cat([context, model.fake_latent[None].expand_as(context)]) if guided else context


@torch.no_grad()
def generate(
    model: HiMAR,
    labels: Tensor,
    *,
    guidance_scale: float = 1.0,
    pivot_guidance_scale: float = 1.0,
    temperature: float = 1.0,
    num_inference_steps: int = 4,
    num_pivot_steps: int | None = None,
    generator: Generators = None,
) -> tuple[Tensor, Tensor]:
    """Pivots [B, P, C] and tokens [B, N, C] with linear guidance; arguments as in `HiMAR.sample`."""
    batch, pivots, dense = len(labels), model.num_pivots, model.num_tokens
    channels, config = model.token_size, model.config
    orders = [masked.random_orders(batch, count, generator) for count in (pivots, dense)]
    small, states = torch.zeros(batch, pivots, channels), torch.zeros(batch, pivots, model.fake_latent.shape[1])
    guided, left, steps = pivot_guidance_scale != 1.0, pivots, num_pivot_steps or 4 * model.pivot_grid[0]
    copies = 2 if guided else 1
    for index in range(steps):
        mask = torch.ones(batch, pivots + dense, dtype=torch.bool)
        mask[:, :pivots] = torch.zeros(batch, pivots, dtype=torch.bool).scatter(1, orders[0][:, :left], True)
        tokens = torch.cat([model.cond_proj(small), model.z_proj(torch.zeros(batch, dense, channels))], dim=1)
        context = contexts(model, labels, guided)
        z = hidden_states(model, tokens.repeat(copies, 1, 1), mask.repeat(copies, 1), context, 0)[:, :pivots]
        remaining = known_after(pivots, index, steps, left)
        start = 0 if index + 1 == steps else remaining
        chosen = torch.zeros(batch, pivots, dtype=torch.bool).scatter(1, orders[0][:, start:left], True)
        left = start if start else left
        if not bool(chosen.any()):
            continue
        scale = 1 + (pivot_guidance_scale - 1) * (pivots - remaining) / pivots if guided else None
        states[chosen] = z[:batch][chosen]
        small[chosen] = sample_head(
            model.diffloss,
            z[chosen.repeat(copies, 1)],
            scale,
            temperature,
            config.num_diffusion_steps,
            batch,
            generator,
        )
    image = torch.zeros(batch, dense, channels)
    guided, left = guidance_scale != 1.0, dense
    copies, shape = 2 if guided else 1, (batch, channels, *model.grid)
    for index in range(num_inference_steps):
        unknown = torch.zeros(batch, dense, dtype=torch.bool).scatter(1, orders[1][:, :left], True)
        mask = functional.pad(unknown, (pivots, 0))
        tokens = torch.cat([model.cond_z_proj(states), model.z_proj(image)], dim=1)
        context = contexts(model, labels, guided)
        z = hidden_states(model, tokens.repeat(copies, 1, 1), mask.repeat(copies, 1), context, 1)[:, pivots:]
        remaining = known_after(dense, index, num_inference_steps, left)
        start = 0 if index + 1 == num_inference_steps else remaining
        chosen = torch.zeros_like(unknown).scatter(1, orders[1][:, start:left], True)
        left = start if start else left
        if not bool(chosen.any()):
            continue
        scale = 1 + (guidance_scale - 1) * (dense - remaining) / dense if guided else None
        latents = sample_dense(
            model.cond_diffloss.net,
            z,
            shape,
            scale,
            temperature,
            config.num_dense_diffusion_steps,
            generator,
            image.mT.reshape(shape),
            unknown.view(batch, 1, *model.grid),
        )
        image[chosen] = latents.flatten(2).mT[chosen]
    return small, image
