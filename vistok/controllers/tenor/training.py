"""Fine-tuning with Tenor: the objectives of the UNets (full) and of FLUX (adapters), and a small loop on Accelerate.

Letters: B batch, H heads, S objects of a caption, N text positions, h and w sides of an attention map, L image tokens.

UNets learn to denoise and, at four resolutions, to attend to each object's words where the object is (section 4.1);
FLUX learns the plain flow objective (section 4.2).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.files import atomic_path, read_state_dict

from .attention import AttentionMaps, Tenor, resized_mask
from .checkpoints import FluxLowRankAdapters

__all__ = [
    "FineTuneSettings",
    "FluxObjective",
    "UNetObjective",
    "fine_tune",
    "flux_schedule",
    "flux_training_times",
    "pack_latents",
    "pixel_loss",
    "sample_flux",
    "shift_of",
    "token_loss",
]

Positions = Sequence[Sequence[int]]


def token_loss(layers: Sequence[Tensor], masks: Tensor, positions: Positions) -> Tensor:
    """How much of each word's attention falls outside its object; summed over layers, averaged over objects.

    Args:
        layers: attention maps [H, h, w, N] of one image.
        masks: [S, h, w] of {0, 1}.
        positions: S lists of token positions.
    """
    total = masks.new_zeros(())
    for maps in layers:
        for mask, tokens in zip(masks, positions, strict=True):
            chosen = maps[..., list(tokens)]
            inside = (chosen * mask[None, :, :, None]).sum(dim=(1, 2)) / chosen.sum(dim=(1, 2))
            total = total + (1 - inside.mean(dim=0)).square().mean()
    return total / len(positions)


def pixel_loss(layers: Sequence[Tensor], masks: Tensor, positions: Positions) -> Tensor:
    """Binary cross-entropy of each object's attention (all its words, mean over heads and layers) against its mask.

    Args as in `token_loss`.
    """
    mean = torch.stack([maps.mean(dim=0) for maps in layers]).mean(dim=0)
    losses = [
        functional.binary_cross_entropy(mean[..., list(tokens)].sum(dim=-1).clamp(0, 1), mask)
        for mask, tokens in zip(masks, positions, strict=True)
    ]
    return torch.stack(losses).mean()


class UNetObjective(nn.Module):
    """Denoising plus attention terms for a UNet with Tenor attached.

    Args:
        unet: Stable Diffusion's or SDXL's.
        scheduler: gives noise levels and the prediction type (a DDPM scheduler, or any with `add_noise`).
        token_scale: weight of the token term.
        pixel_scale: weight of the pixel term.
    """

    def __init__(self, unet: Any, scheduler: Any, *, token_scale: float = 1e-3, pixel_scale: float = 5e-5) -> None:
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.token_scale, self.pixel_scale = token_scale, pixel_scale
        self.maps = AttentionMaps()
        self._tenor = Tenor(self.maps, training=True)

    def places(self, side: int) -> list[str]:
        """Where attention is judged, for latents of `side`: the middle, and the upper levels but the coarsest one."""
        coarsest = len(self.unet.config.block_out_channels) - 1  # 3 in every published UNet
        return [f"mid_{side >> coarsest}", *(f"up_{side >> level}" for level in range(coarsest - 1, -1, -1))]

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """See `training_loss`."""
        return self.training_loss(batch, generator=generator)

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            batch: `latents` [B, C, H, W] (scaled); `encoder_hidden_states` [B, N, D]; optionally `noise`, `timesteps`
                [B], `added_cond_kwargs` (SDXL), and for the attention terms `masks` [B, S, H', W'] in [0, 1] with
                `token_positions`, B lists of S lists (an empty list where the caption was dropped).
            generator: of noise and timesteps where they are not given.

        Returns:
            `loss` and its parts `denoise`, `token`, `pixel`; `token.<place>` and `pixel.<place>`; and the prediction.
        """
        latents = batch["latents"]
        count = latents.shape[0]
        noise = batch.get("noise")
        if noise is None:
            where = generator.device if generator is not None else latents.device
            noise = torch.randn(latents.shape, generator=generator, device=where).to(latents)
        timesteps = batch.get("timesteps")
        if timesteps is None:
            steps = int(self.scheduler.config.num_train_timesteps)
            where = generator.device if generator is not None else latents.device
            timesteps = torch.randint(0, steps, (count,), generator=generator, device=where).to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            target = noise
        elif kind == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        else:
            raise InvalidInputError(f"the objective knows epsilon and v_prediction, not {kind!r}")
        self.maps.clear()
        judged = batch.get("token_positions") is not None and batch.get("masks") is not None
        extra = {"added_cond_kwargs": batch["added_cond_kwargs"]} if "added_cond_kwargs" in batch else {}
        checkpointing = bool(getattr(self.unet, "is_gradient_checkpointing", False)) and torch.is_grad_enabled()
        if judged and checkpointing:
            # Recomputation would record every map twice, and the loss would lose its way to the first ones.
            raise InvalidInputError(
                "the attention terms need the maps of one forward pass; disable gradient checkpointing of the UNet, or "
                "train without masks"
            )
        tenor = self._tenor if judged else Tenor()
        with tenor.attached(self.unet):
            prediction = self.unet(
                noisy, timesteps, encoder_hidden_states=batch["encoder_hidden_states"], return_dict=False, **extra
            )[0]
        denoise = functional.mse_loss(prediction.float(), target.float())
        zero = denoise.new_zeros(())
        terms: dict[str, Tensor] = {}
        token, pixel = zero, zero
        if judged:
            positions, masks = batch["token_positions"], batch["masks"]
            for place in self.places(latents.shape[-1]):
                layers = self.maps.maps.get(place)
                if not layers:
                    raise InvalidInputError(
                        f"this UNet has no cross-attention at {place}; it has {', '.join(self.maps.maps)}"
                    )
                token_terms, pixel_terms = [], []
                for row in range(count):
                    if not positions[row]:  # a dropped caption names no objects
                        continue
                    own = [maps[row].float() for maps in layers]
                    small = resized_mask(masks[row].to(denoise.device), own[0].shape[1])
                    token_terms.append(token_loss(own, small, positions[row]))
                    pixel_terms.append(pixel_loss(own, small, positions[row]))
                terms[f"token.{place}"] = torch.stack(token_terms).sum() / count if token_terms else zero
                terms[f"pixel.{place}"] = torch.stack(pixel_terms).sum() / count if pixel_terms else zero
                token, pixel = token + terms[f"token.{place}"], pixel + terms[f"pixel.{place}"]
        self.maps.clear()
        return {
            "loss": denoise + self.token_scale * token + self.pixel_scale * pixel,
            "denoise": denoise,
            "token": token,
            "pixel": pixel,
            **terms,
            "prediction": prediction,
            "target": target,
            "noisy": noisy,
        }


def shift_of(tokens: int) -> float:
    """mu for a number of image tokens: linear through (256, 0.5) and (4096, 1.15)."""
    return 0.5 + (1.15 - 0.5) / (4096 - 256) * (tokens - 256)


def flux_schedule(steps: int, tokens: int | None = None, *, mu: float | None = None) -> Tensor:
    """float64 [steps + 1] from 1 to 0, shifted towards noise for larger pictures.

    Args:
        steps: sampler steps.
        tokens: image tokens; the authors' pipeline passes pixels / 16384 here, sixty times fewer.
        mu: the shift itself, instead of `tokens`.
    """
    if (tokens is None) == (mu is None):
        raise InvalidInputError("give either tokens or mu")
    mu = shift_of(tokens) if tokens is not None else mu
    assert mu is not None
    # Linear times in float32, as the authors draw them; the shift in double precision.
    times = torch.linspace(1, 0, steps + 1)
    factor = math.exp(mu)
    return torch.where(
        times > 0, factor / (factor + (1 / times.clamp_min(1e-30) - 1)), torch.zeros_like(times)
    ).double()


def flux_training_times() -> Tensor:
    """float64 [1000]: the times that training draws from, shifted as for 4096 image tokens whatever the size."""
    return flux_schedule(999, mu=1.15)


def pack_latents(latents: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens [B, L, 4 C], ids [L, 3]) of latents [B, C, H, W]: 2 x 2 cells become tokens; ids are (0, row, column)."""
    if latents.shape[-1] % 2 or latents.shape[-2] % 2:
        raise InvalidInputError(f"FLUX packs 2 x 2 cells; got latents of {list(latents.shape[-2:])}")
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    tokens = latents.unflatten(-1, (columns, 2)).unflatten(-3, (rows, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    ids = torch.zeros(rows, columns, 3, device=latents.device, dtype=latents.dtype)
    ids[..., 1] = torch.arange(rows, device=latents.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=latents.device)[None]
    return tokens.flatten(1, 2), ids.flatten(0, 1)


def _flux_forward(
    network: Any, tokens: Tensor, times: Tensor, text: Tensor, pooled: Tensor, ids: Tensor, guidance: float
) -> Tensor:
    strength = None
    if network.config.guidance_embeds:
        strength = torch.full((tokens.shape[0],), guidance, device=tokens.device, dtype=torch.float32)
    return network(
        hidden_states=tokens,
        timestep=times.to(tokens.dtype),
        guidance=strength,
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3, device=tokens.device, dtype=tokens.dtype),
        img_ids=ids,
        return_dict=False,
    )[0]


class FluxObjective(nn.Module):
    """The flow objective of FLUX with Tenor and adapters attached; only the adapters train.

    Args:
        transformer: FLUX.
        adapters: fresh or loaded ones.
        guidance: embedded guidance during training.
    """

    def __init__(self, transformer: Any, adapters: FluxLowRankAdapters, *, guidance: float = 1.0) -> None:
        super().__init__()
        self.adapters = adapters
        # Kept out of the module's own parameters: the base model is frozen and not saved.
        self.__dict__["transformer"] = transformer.requires_grad_(False)
        self.guidance = guidance
        self.register_buffer("times", flux_training_times(), persistent=False)

    def forward(self, batch: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """See `training_loss`."""
        return self.training_loss(batch, generator=generator)

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss of one batch.

        Args:
            batch: `latents` [B, C, H, W] (`0.3611 (z - 0.1159)` of the autoencoder's z); `text` [B, N, D], T5 states;
                `pooled` [B, P], CLIP's vector; optionally `noise` [B, L, 4 C] and `time_index` [B] into `times`.
            generator: of noise and times where they are not given.

        Returns:
            `loss`, and `prediction` and `noisy` [B, L, 4 C].
        """
        tokens, ids = pack_latents(batch["latents"])
        where = generator.device if generator is not None else tokens.device
        noise = batch.get("noise")
        if noise is None:
            noise = torch.randn(tokens.shape, generator=generator, device=where).to(tokens)
        index = batch.get("time_index")
        if index is None:
            index = torch.randint(0, len(self.times), (tokens.shape[0],), generator=generator, device=where)
        times = self.times.to(tokens.device)[index.to(tokens.device)].reshape(-1).to(tokens.dtype)
        noisy = (1 - times[:, None, None]) * tokens + times[:, None, None] * noise
        network = self.__dict__["transformer"]
        with self.adapters.attached(network), Tenor().attached(network):
            prediction = _flux_forward(
                network, noisy, times.expand(tokens.shape[0]), batch["text"], batch["pooled"], ids, self.guidance
            )
        loss = functional.mse_loss(prediction.float(), (noise - tokens).float())
        return {"loss": loss, "prediction": prediction, "noisy": noisy}


@torch.no_grad()
def sample_flux(
    network: Any,
    latents: Tensor,
    text: Tensor,
    pooled: Tensor,
    schedule: Tensor,
    *,
    guidance: float = 4.0,
    true_guidance: float = 1.0,
    negative_text: Tensor | None = None,
    negative_pooled: Tensor | None = None,
    first_guided_step: int = 0,
) -> Tensor:
    """The authors' Euler loop: embedded guidance, and true guidance against a negative prompt from a step on.

    Both halves of true guidance run in one batch (the authors run two passes).

    Args:
        network: FLUX, with Tenor and adapters attached as wanted.
        latents: [B, C, H, W], noise.
        text: [B, N, D]; pooled: [B, P].
        schedule: times from 1 to 0, see `flux_schedule`.
        guidance: embedded guidance.
        true_guidance: factor on `positive - negative`.
        negative_text: [B, N, D]; negative_pooled: [B, P]; None for no true guidance.
        first_guided_step: true guidance starts here.

    Returns:
        Packed latents [B, L, 4 C].
    """
    tokens, ids = pack_latents(latents)
    guided = negative_text is not None and negative_pooled is not None
    for step, (now, then) in enumerate(zip(schedule[:-1].tolist(), schedule[1:].tolist(), strict=True)):
        both = guided and step >= first_guided_step
        inputs = torch.cat([tokens, tokens]) if both else tokens
        words = torch.cat([negative_text, text]) if both and negative_text is not None else text
        vectors = torch.cat([negative_pooled, pooled]) if both and negative_pooled is not None else pooled
        times = torch.full((inputs.shape[0],), now, device=tokens.device, dtype=tokens.dtype)
        prediction = _flux_forward(network, inputs, times, words, vectors, ids, guidance)
        if both:
            negative, positive = prediction.chunk(2)
            prediction = negative + true_guidance * (positive - negative)
        tokens = tokens + (then - now) * prediction
    return tokens


@dataclass(frozen=True)
class FineTuneSettings:
    """How a model is fine-tuned; the defaults are the authors' for UNets (FLUX: learning_rate 1e-5, warmup_steps 10).

    Attributes:
        steps: optimiser steps.
        learning_rate: of AdamW, constant after the warm-up.
        warmup_steps: with a linearly growing rate.
        betas: of AdamW.
        weight_decay: of AdamW.
        max_gradient_norm: gradients are clipped to it.
        accumulation: batches a step.
        mixed_precision: `no`, `bf16` or `fp16`, of Accelerate.
        seed: of noise and timesteps.
        checkpoint_every: steps between two checkpoints.
    """

    steps: int = 24_000
    learning_rate: float = 5e-6
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    max_gradient_norm: float = 1.0
    accumulation: int = 2
    mixed_precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 1000


def fine_tune(
    objective: UNetObjective | FluxObjective,
    batches: Iterable[Mapping[str, Any]],
    settings: FineTuneSettings | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    progress: bool = True,
) -> list[float]:
    """Fine-tune on Accelerate: the whole UNet, or FLUX's adapters.

    Args:
        objective: `UNetObjective` or `FluxObjective`; its trainable parameters train.
        batches: see the objective's `training_loss`. Started again when it is used up (shuffle it yourself; with
            several processes give each its own share).
        settings: see there.
        checkpoint: file (`.pt`); an existing one is resumed.
        on_step: called with (step, losses).
        progress: show a bar where the output is a terminal.

    Returns:
        The loss of each step.

    Raises:
        InvalidOutputError: if the loss is no number.
        InvalidInputError: if there are no batches or no trainable parameters.
    """
    from accelerate import Accelerator

    settings = settings or FineTuneSettings()
    parameters = [value for value in objective.parameters() if value.requires_grad]
    if not parameters:
        raise InvalidInputError("nothing trains: every parameter of the objective is frozen")
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    if isinstance(objective, FluxObjective):
        objective.__dict__["transformer"].to(accelerator.device)
    model, optimizer = accelerator.prepare(objective, optimizer)
    step, losses = 0, []
    if checkpoint is not None and Path(checkpoint).exists():
        content = read_state_dict(checkpoint)
        missing = [name for name in ("model", "optimizer", "step") if name not in content]
        if missing:
            raise CheckpointError(f"{checkpoint} is no fine-tuning checkpoint: it has no {', '.join(missing)}")
        objective.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        step, losses = int(content["step"]), list(content.get("losses", []))

    def save() -> None:
        if checkpoint is None or not accelerator.is_main_process:
            return
        content = {
            "model": accelerator.unwrap_model(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "losses": losses,
        }
        with atomic_path(checkpoint) as temporary:
            torch.save(content, temporary)

    stream = _endless(batches)
    for _ in range(step * settings.accumulation):  # what the run had read before
        next(stream)
    bar = tqdm(
        total=settings.steps,
        initial=step,
        desc="fine-tuning",
        unit="step",
        disable=True if not progress or not accelerator.is_main_process else None,
    )
    with bar:
        while step < settings.steps:
            total = 0.0
            for micro in range(settings.accumulation):
                batch = {
                    name: value.to(accelerator.device) if isinstance(value, Tensor) else value
                    for name, value in next(stream).items()
                }
                number = (step * settings.accumulation + micro) * accelerator.num_processes + accelerator.process_index
                generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
                with accelerator.autocast():
                    results = model(batch, generator)
                if not bool(torch.isfinite(results["loss"])):
                    raise InvalidOutputError(f"the loss became {float(results['loss'].detach())} at step {step}")
                accelerator.backward(results["loss"] / settings.accumulation)
                total += float(results["loss"].detach()) / settings.accumulation
            accelerator.clip_grad_norm_(parameters, settings.max_gradient_norm)
            warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warm
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            losses.append(total)
            bar.update()
            bar.set_postfix(loss=f"{total:.4g}")
            if on_step is not None:
                on_step(step, {"loss": total})
            if step % settings.checkpoint_every == 0:
                save()
    save()
    return losses


def _endless(batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise InvalidInputError("there are no batches to train on")
