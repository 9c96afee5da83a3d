"""MAR's sampler as described by its authors (arXiv 2406.11838, sections 3 and 4), on the weights of our model.

Every step encodes all known tokens anew, decodes every position, and runs the head on twice as many rows under
guidance; nothing is kept between steps.

Letters: B images, R rows (2 B with guidance), T condition tokens, L tokens, C channels of a token, N rows of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.plain.diffusion import known_after, reverse_step
from vistok.generators.mar import MAR
from vistok.nn import diffusion, masked
from vistok.nn.diffusion import cosine_process
from vistok.nn.diffusion_head import NORM_EPS, DiffusionHead, MLPDenoiser, timestep_features
from vistok.nn.sampling import Generators

__all__ = ["generate", "modulated", "sample_head"]


def hidden_states(model: MAR, tokens: Tensor, mask: Tensor, context: Tensor) -> Tensor:
    """Decoder outputs [R, L, D] from tokens [R, L, C], mask bool [R, L] and context [R, T, E]."""
    rows, total = len(tokens), model.num_condition_tokens
    x = torch.cat([context, model.z_proj(tokens)], dim=1) + model.encoder_pos_embed_learned
    x = model.z_proj_ln(x)
    shown = torch.cat([mask.new_zeros(rows, total), mask], dim=1).logical_not()
    x = x[shown].view(rows, -1, x.shape[-1])
    for block in model.encoder_blocks:
        x = block(x)
    x = model.decoder_embed(model.encoder_norm(x))
    full = model.mask_token.repeat(rows, shown.shape[1], 1)
    full[shown] = x.flatten(0, 1)
    full = full + model.decoder_pos_embed_learned
    for block in model.decoder_blocks:
        full = block(full)
    return model.decoder_norm(full)[:, total:] + model.diffusion_pos_embed_learned


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then modulation."""
    return functional.layer_norm(x, (x.shape[-1],), eps=NORM_EPS) * (1 + scale) + shift


def denoise(net: MLPDenoiser, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
    """The head's network: each row embeds its timestep and condition, and each block modulates them for itself."""
    embedded = net.time_embed.mlp(timestep_features(timesteps)) + net.cond_embed(condition)
    x = net.input_proj(x)
    for block in net.res_blocks:
        shift, scale, gate = block.adaLN_modulation(embedded).chunk(3, dim=-1)
        x = x + gate * block.mlp(block.in_ln(x) * (1 + scale) + shift)
    last = net.final_layer
    return last.linear(modulated(x, *last.adaLN_modulation(embedded).chunk(2, dim=-1)))


def sample_head(
    head: DiffusionHead,
    condition: Tensor,
    guidance_scale: float | None,
    temperature: float,
    num_diffusion_steps: str | int,
    num_images: int,
    generator: Generators,
) -> Tensor:
    """Tokens [N, C] from conditions [N, D] (with guidance, [2 N, D])."""
    process = cosine_process(num_diffusion_steps)
    rows = len(condition) if guidance_scale is None else len(condition) // 2
    shape = (num_images, rows // num_images, head.token_size)
    x = diffusion.gaussian_noise(shape, generator, condition.device).flatten(0, 1)
    if guidance_scale is not None:
        x = torch.cat([x, x])
    for step in reversed(range(len(process))):
        index = torch.full((len(x),), step)
        timesteps = torch.tensor(process.timesteps)[index]
        if guidance_scale is None:
            eps, logits = denoise(head.net, x, timesteps, condition).chunk(2, dim=-1)
        else:
            both = torch.cat([x[:rows], x[:rows]])
            eps, logits = denoise(head.net, both, timesteps, condition).chunk(2, dim=-1)
            with_condition, without = eps.chunk(2)
            guided = without + guidance_scale * (with_condition - without)
            eps = torch.cat([guided, guided])
        noise = torch.zeros_like(x)
        if step and temperature:
            drawn = diffusion.gaussian_noise(shape, generator, condition.device).flatten(0, 1)
            noise = drawn if guidance_scale is None else torch.cat([drawn, drawn])
        x = reverse_step(process, x, index, eps, logits, noise, temperature)
    return x[:rows]


@torch.no_grad()
def generate(
    model: MAR,
    labels: Tensor,
    *,
    guidance_scale: float = 1.0,
    guidance_schedule: str = "linear",
    temperature: float = 1.0,
    num_inference_steps: int = 64,
    num_diffusion_steps: str | int | None = None,
    generator: Generators = None,
) -> Tensor:
    """Tokens [B, L, C]; arguments as in `MAR.sample`."""
    steps = model.config.num_diffusion_steps if num_diffusion_steps is None else num_diffusion_steps
    batch, total = len(labels), model.num_tokens
    order = masked.random_orders(batch, total, generator)
    tokens = torch.zeros(batch, total, model.token_size)
    guided, left = guidance_scale != 1.0, total
    for index in range(num_inference_steps):
        mask = torch.zeros(batch, total, dtype=torch.bool).scatter(1, order[:, :left], True)
        context = model.class_emb(labels)[:, None].expand(-1, model.num_condition_tokens, -1)
        rows, hidden = tokens, mask
        if guided:
            context = torch.cat([context, model.fake_latent[None].expand_as(context)])
            rows, hidden = tokens.repeat(2, 1, 1), mask.repeat(2, 1)
        z = hidden_states(model, rows, hidden, context)
        remaining = known_after(total, index, num_inference_steps, left)
        start = 0 if index + 1 == num_inference_steps else remaining
        chosen = torch.zeros_like(mask).scatter(1, order[:, start:left], True)
        left = start if start else left
        if not bool(chosen.any()):
            continue
        z = z[chosen.repeat(2, 1) if guided else chosen]
        scale = guidance_scale
        if guidance_schedule == "linear":
            scale = 1 + (guidance_scale - 1) * (total - remaining) / total
        tokens[chosen] = sample_head(model.diffloss, z, scale if guided else None, temperature, steps, batch, generator)
    return tokens
