"""The denoiser of any diffusers text-to-image pipeline behind one face: predict, clean estimate, sampler step.

Letters: R rows, N text positions, D text width, P pooled width, L latent shape (C, H, W), or (tokens, channels) in
FLUX, S sampler steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from vistok.errors import InvalidInputError

__all__ = ["Denoiser"]


class Denoiser:
    """The denoiser of a pipeline together with a deterministic sampler.

    UNets (Stable Diffusion 1.x/2.x, SDXL) are sampled by DDIM built from the pipeline's scheduler configuration, flow
    models (SD3, FLUX) by Euler steps. The pipeline's own scheduler is left alone.

    Args:
        pipe: a diffusers pipeline.
        num_inference_steps: S.
        guidance: FLUX's embedded guidance; other models ignore it.
        size: pixels a side that SDXL is told for predictions (not for sampling); None for the latents' own size.

    Raises:
        InvalidInputError: for a pipeline of another family.
    """

    def __init__(self, pipe: Any, num_inference_steps: int, *, guidance: float = 3.5, size: int | None = None) -> None:
        parts = getattr(pipe, "components", {})
        network = parts.get("unet") if parts.get("unet") is not None else parts.get("transformer")
        name = type(network).__name__
        known = {
            "UNet2DConditionModel": "unet",
            "SD3Transformer2DModel": "sd3",
            "FluxTransformer2DModel": "flux",
        }
        if name not in known:
            raise InvalidInputError(f"{type(pipe).__name__} denoises with a {name}; expected {', '.join(known)}")
        self.family = known[name]
        self.network: Any = network
        self.pipe = pipe
        self.guidance = guidance
        self.size = size
        self.pixels = int(getattr(pipe, "vae_scale_factor", 8))
        self.steps = num_inference_steps
        if self.family == "unet":
            self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
            self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        else:
            self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
            self._set_flow_timesteps()

    def _set_flow_timesteps(self) -> None:
        settings: dict[str, Any] = {}
        config = self.scheduler.config
        if config.get("use_dynamic_shifting", False):
            size = self.latent_shape()
            tokens = size[0] if self.family == "flux" else (size[1] // 2) * (size[2] // 2)
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
            settings["mu"] = slope * (tokens - low) + config.get("base_shift", 0.5)
        if self.family == "flux" and not config.get("use_flow_sigmas", False):
            settings["sigmas"] = np.linspace(1.0, 1 / self.steps, self.steps)
            self.scheduler.set_timesteps(device=self.device, **settings)
        else:
            self.scheduler.set_timesteps(self.steps, device=self.device, **settings)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return torch.device(self.pipe._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """The network's floating point type."""
        return next(self.network.parameters()).dtype

    @property
    def timesteps(self) -> Tensor:
        """[S], from noise to image."""
        return self.scheduler.timesteps

    def latent_shape(self, side: int | None = None) -> tuple[int, ...]:
        """L of one image of `side` pixels; None for the network's own size."""
        if self.family == "flux":
            across = side // (self.pixels * 2) if side else int(getattr(self.pipe, "default_sample_size", 128)) // 2
            return across * across, int(self.network.config.in_channels)
        own = self.network.config.sample_size
        across = side // self.pixels if side else int(own if isinstance(own, int) else own[0])
        return int(self.network.config.in_channels), across, across

    def noise(self, rows: int, generator: torch.Generator | None = None, side: int | None = None) -> Tensor:
        """Initial latents [R, *L]: normal noise drawn on the generator's device."""
        where = generator.device if generator is not None else self.device
        drawn = torch.randn((rows, *self.latent_shape(side)), generator=generator, device=where)
        return drawn.to(self.device, self.dtype)

    def _time_ids(self, latents: Tensor, size: int | None) -> Tensor:
        height, width = (size, size) if size else (latents.shape[-2] * self.pixels, latents.shape[-1] * self.pixels)
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=self.dtype, device=latents.device)
        return ids.expand(latents.shape[0], -1)

    def predict(
        self, latents: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor | None, *, size: int | None = None
    ) -> Tensor:
        """The network's raw output [R, *L] (noise, velocity, or clean sample), without guidance.

        Args:
            latents: [R, *L].
            timestep: scalar or [R].
            embeds: [R, N, D].
            pooled: [R, P] where the network takes it.
            size: see the class.
        """
        timestep = timestep.to(latents.device).expand(latents.shape[0])
        embeds = embeds.to(latents.dtype)
        if self.family == "unet":
            added = None
            if getattr(self.network.config, "addition_embed_type", None) == "text_time":
                if pooled is None:
                    raise InvalidInputError("this UNet needs pooled text embeddings")
                added = {"text_embeds": pooled.to(latents.dtype), "time_ids": self._time_ids(latents, size)}
            return self.network(
                latents, timestep, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False
            )[0]
        if pooled is None:
            raise InvalidInputError("this transformer needs pooled text embeddings")
        pooled = pooled.to(latents.dtype)
        if self.family == "sd3":
            return self.network(
                hidden_states=latents,
                timestep=timestep,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        across = round(latents.shape[1] ** 0.5)
        image_ids = torch.zeros(across, across, 3, device=latents.device, dtype=latents.dtype)
        image_ids[..., 1] += torch.arange(across, device=latents.device, dtype=latents.dtype)[:, None]
        image_ids[..., 2] += torch.arange(across, device=latents.device, dtype=latents.dtype)[None]
        guidance = None
        if self.network.config.guidance_embeds:
            guidance = torch.full((latents.shape[0],), self.guidance, device=latents.device, dtype=torch.float32)
        return self.network(
            hidden_states=latents,
            timestep=timestep.to(latents.dtype) / 1000,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3, device=latents.device, dtype=latents.dtype),
            img_ids=image_ids.flatten(0, 1),
            return_dict=False,
        )[0]

    def level(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise) factors of x_t, float32, in the shape of `timestep`."""
        if self.family == "unet":
            alphas = self.scheduler.alphas_cumprod.to(timestep.device)[timestep.long()]
            return alphas.sqrt(), (1 - alphas).sqrt()
        sigma = timestep.float() / self.scheduler.config.num_train_timesteps
        return 1 - sigma, sigma

    def clean(self, output: Tensor, latents: Tensor, timestep: Tensor) -> Tensor:
        """The clean sample [R, *L] that a raw output stands for.

        Raises:
            InvalidInputError: for an unknown prediction type.
        """
        shape = (-1,) + (1,) * (latents.ndim - 1)
        signal, noise = (part.reshape(shape).to(latents.device) for part in self.level(timestep.to(latents.device)))
        if self.family != "unet":
            return latents - noise * output
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return (latents - noise * output) / signal
        if kind == "v_prediction":
            return signal * latents - noise * output
        if kind == "sample":
            return output
        raise InvalidInputError(f"unknown prediction type {kind!r} of the scheduler")

    def clean_estimate(self, latents: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor | None) -> Tensor:
        """`clean` of `predict` at the declared size."""
        return self.clean(self.predict(latents, timestep, embeds, pooled, size=self.size), latents, timestep)

    @torch.no_grad()
    def trajectory(
        self,
        latents: Tensor,
        embeds: Tensor,
        pooled: Tensor | None,
        negative: Tensor | None,
        negative_pooled: Tensor | None,
        guidance_scale: float,
    ) -> Iterator[Tensor]:
        """The sampler's latents [R, *L] after 0, 1, ... S steps; both halves of guidance run in one batch.

        Args:
            latents: initial noise [R, *L].
            embeds: [R, N, D]; pooled: [R, P] or None.
            negative: the unconditional embeddings, or None for no guidance.
            negative_pooled: their pooled vectors.
            guidance_scale: at most 1 for no guidance. FLUX ignores it (its guidance is embedded).
        """
        guided = guidance_scale > 1 and self.family != "flux" and negative is not None
        both = torch.cat([negative, embeds]) if guided and negative is not None else embeds
        both_pooled = pooled
        if guided and pooled is not None and negative_pooled is not None:
            both_pooled = torch.cat([negative_pooled, pooled])
        if self.family != "unet":
            self.scheduler._step_index = None
            self.scheduler.set_begin_index(0)
        yield latents
        for timestep in self.timesteps:
            inputs = torch.cat([latents, latents]) if guided else latents
            output = self.predict(inputs, timestep, both, both_pooled)
            if guided:
                without, with_prompt = output.chunk(2)
                output = without + guidance_scale * (with_prompt - without)
            latents = self.scheduler.step(output, timestep, latents, return_dict=False)[0]
            yield latents
