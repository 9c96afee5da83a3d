"""FlexTok as described by its authors (arXiv 2502.13967), on the weights of our models: nothing is left out or kept.

Every sample carries all N registers, dropped ones as mask tokens; each step computes the modulation of every block anew
and spreads it over all rows; conditional and unconditional velocities are two passes; the encoder runs all registers
under one mask; the generator reads the whole prefix again for every token.

Letters: B samples, P patches, N registers, D channels, Z, h, w channels and sides of the latents, V codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vistok.generators.flextok_ar import FlexTokAR
from vistok.kernels.finite_scalar import finite_scalar_codes, reference
from vistok.nn import sampling
from vistok.nn.sampling import Generators
from vistok.tokenizers.flextok import FlexTok, FlowDecoder, NormalizedGuidance, classifier_free_guidance
from vistok.tokenizers.flextok.blocks import Block, Modulate, masked_attention, unpatchify

__all__ = ["decode_latents", "encode", "generate", "velocity"]


class _EachRow(Modulate):
    """Shift, scale and gate [B, P + N, D] of every row, written out."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def spread(self, value: Tensor) -> Tensor:
        """[B, E, D] -> [B, P + N, D]."""
        repeats = self.lengths if value.shape[1] > 1 else self.lengths.sum().view(1)
        return value.repeat_interleave(repeats.to(value.device), dim=1)

    def scale(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return x * (1 + self.spread(scale)) + self.spread(shift)

    def add(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return x + self.spread(gate) * branch


@torch.no_grad()
def encode(model: FlexTok, latents: Tensor) -> Tensor:
    """All ids [B, N] of scaled latents [B, Z, h, w]."""
    encoder, total = model.encoder, model.num_registers
    patches = encoder.embed(latents).flatten(1, 2)
    count = patches.shape[1]
    x = torch.cat([patches, encoder.registers.expand(len(patches), -1, -1)], dim=1)
    mask = torch.ones(count + total, count + total, dtype=torch.bool, device=x.device).tril()
    mask[:, :count] = True  # patches see all patches and no register
    attend = masked_attention(mask)
    for block in encoder.blocks:
        x = block(x, attend)
    z = encoder.head(encoder.norm(x[:, count:]))
    return reference(z.flatten(0, 1), list(model.levels)).view(z.shape[:2])


def _all_registers(decoder: FlowDecoder, codes: Tensor, lengths: Sequence[int], null: bool) -> Tensor:
    """[B, N, D]: kept registers with positions, then mask tokens; or null tokens alone."""
    rows = decoder.embed_codes(codes)
    kept = torch.arange(rows.shape[1], device=rows.device) < torch.tensor(lengths, device=rows.device)[:, None]
    return decoder.null_token.expand_as(rows) if null else torch.where(kept[..., None], rows, decoder.mask_token)


def velocity(model: FlexTok, x_t: Tensor, t: float, codes: Tensor, lengths: Sequence[int], null: bool) -> Tensor:
    """[B, Z, h, w] of noisy latents at the moment t.

    Args:
        model: the tokenizer.
        x_t: noisy latents.
        t: moment.
        codes: [B, N, C], padded.
        lengths: registers that each sample keeps.
        null: the unconditional pass.
    """
    decoder = model.decoder
    registers = _all_registers(decoder, codes, lengths, null)
    embedded = decoder.embed(x_t)
    patches = embedded.flatten(1, 2)
    count = patches.shape[1]
    x = torch.cat([patches, registers], dim=1)
    activated = functional.silu(decoder.time_embedding(torch.full((len(x),), t, device=x.device)))
    modulate = _EachRow([count, registers.shape[1]])
    attend = masked_attention(torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device))
    block: Block
    for block in decoder.blocks:  # type: ignore[assignment]
        x = block(x, attend, block.modulations(activated), modulate)
    shift, scale = decoder.head_modulation(activated)[:, None].chunk(2, dim=-1)
    patches = decoder.norm(x[:, :count]) * (1 + scale) + shift
    return unpatchify(decoder.head(patches).unflatten(1, embedded.shape[1:3]), decoder.patch_size)


@torch.no_grad()
def decode_latents(
    model: FlexTok,
    ids: Tensor,
    lengths: Sequence[int],
    noise: Tensor,
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 7.5,
    guidance: str = "normalized",
) -> Tensor:
    """Latents [B, Z, h, w] of ids [B, k]; arguments as in `FlexTok.decode`."""
    padded = functional.pad(ids, (0, model.num_registers - ids.shape[1]))
    codes = finite_scalar_codes(padded, model.levels)
    guide = NormalizedGuidance() if guidance == "normalized" else classifier_free_guidance
    x = noise.clone()
    for step in range(num_inference_steps, 0, -1):
        t = step / num_inference_steps
        found = velocity(model, x, t, codes, lengths, null=False)
        if guidance_scale != 1.0:
            found = guide(found, velocity(model, x, t, codes, lengths, null=True), guidance_scale)
        x = x - found / num_inference_steps
    return x


@torch.no_grad()
def generate(
    model: FlexTokAR,
    labels: Tensor,
    *,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: Generators = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Ids [B, n] of a class-conditional generator; arguments as in `FlexTokAR.sample`."""
    guided = guidance_scale > 1.0
    first = model.class_embedding(labels)
    if guided:
        first = torch.cat([first, torch.zeros_like(first)])
    ids = torch.zeros(len(labels), 0, dtype=torch.int64, device=labels.device)
    for _ in range(model.num_tokens if num_tokens is None else num_tokens):
        read = torch.cat([ids, ids]) if guided else ids
        # The authors also apply the head to every position; left out, so that the comparison is about the cache alone.
        logits = model.head(model.run_blocks(model.embed(read, first), None)[:, -1:]).float()
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + guidance_scale * (cond - uncond)
        chosen = sampling.choose_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        ids = torch.cat([ids, chosen], dim=1)
    return ids
