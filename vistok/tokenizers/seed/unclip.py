"""From CLIP image embeddings to pictures, through diffusers' unCLIP Stable Diffusion 2.1.

Source: SEED's de-tokenizer (arXiv 2310.01218, section 3.1) is `stabilityai/stable-diffusion-2-1-unclip` as published;
what is added here is a negative embedding, batches, a generator for every picture, and no work done twice.

Shape letters: B pictures, E image embedding, T text positions, h, w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vistok.attach import Handle
from vistok.errors import InvalidInputError, InvalidOutputError

__all__ = ["PromptDecoder", "UnCLIPDecoder", "UnCLIPStep"]

PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer", "image_normalizer", "image_noising_scheduler")


@dataclass(frozen=True)
class UnCLIPStep:
    """One call of the denoiser.

    Attributes:
        index: number of the step, from 0.
        total: steps of the whole run.
        timestep: diffusion time.
        latents: [B, 4, h, w] after the step.
    """

    index: int
    total: int
    timestep: Tensor
    latents: Tensor


class _SharedText:
    """Cross-attention to a text that is the same for all rows and all steps: keys and values are computed once."""

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if self.held is None:
            assert encoder_hidden_states is not None
            text = encoder_hidden_states[:1]
            self.held = (
                attn.to_k(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2),
                attn.to_v(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2),
            )
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        key, value = (part.expand(len(query), -1, -1, -1) for part in self.held)
        attended = functional.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


class _Known(torch.nn.Module):
    """Stands for a network whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Tensor:
        return self.output


class UnCLIPDecoder:
    """Paints image embeddings with a `StableUnCLIPImg2ImgPipeline`.

    Args:
        pipeline: the pipeline, loaded by diffusers and on its device.
        prompt: text that goes with all pictures (the authors use none).

    Raises:
        InvalidInputError: if it is no unCLIP pipeline, naming the parts it lacks.
    """

    def __init__(self, pipeline: Any, prompt: str = "") -> None:
        lacking = [name for name in PARTS if getattr(pipeline, name, None) is None]
        if lacking:
            raise InvalidInputError(
                f"{type(pipeline).__name__} is no unCLIP pipeline: it lacks {', '.join(lacking)}; load "
                "StableUnCLIPImg2ImgPipeline.from_pretrained('stabilityai/stable-diffusion-2-1-unclip')"
            )
        self.pipeline = pipeline
        self.prompt = prompt
        self._text: tuple[Any, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.pipeline.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the denoiser."""
        return next(self.pipeline.unet.parameters()).dtype

    @torch.no_grad()
    def text_states(self) -> Tensor:
        """States [1, T, cross_attention_dim] of the prompt, computed once."""
        encoder, tokenizer = self.pipeline.text_encoder, self.pipeline.tokenizer
        if self._text is None or self._text[0] is not encoder:
            ids = tokenizer(
                self.prompt,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            self._text = (encoder, encoder(ids.to(next(encoder.parameters()).device))[0])
        return self._text[1].to(self.device, self.dtype)

    def noised(self, embeddings: Tensor, noise_level: int, noise: Tensor) -> Tensor:
        """Embedding with noise, and the noise level beside it: [B, 2 E].

        Args:
            embeddings: [B, E].
            noise_level: 0 (almost none) up to the schedule's last step.
            noise: [B, E] of a normal distribution.
        """
        levels = self.pipeline.image_noising_scheduler.config.num_train_timesteps
        if not 0 <= noise_level < levels:
            raise InvalidInputError(f"noise_level must lie in 0..{levels - 1}; got {noise_level}")
        return self.pipeline.noise_image_embeddings(embeddings, noise_level, noise=noise)

    def class_labels(
        self,
        embeddings: Tensor,
        negative: Tensor | None,
        guided: bool,
        noise_level: int,
        noise: Tensor,
        negative_noise: Tensor | None,
    ) -> Tensor:
        """What the denoiser is conditioned on: [B, 2 E], or [2 B, 2 E] with the negative half first.

        Without negative embeddings that half is all zeros; with them, it always has noise level 0 (the authors' way).
        """
        positive = self.noised(embeddings, noise_level, noise)
        if not guided:
            return positive
        if negative is None:
            return torch.cat([torch.zeros_like(positive), positive])
        assert negative_noise is not None
        return torch.cat([self.noised(negative, 0, negative_noise), positive])

    @staticmethod
    def _normal(
        shape: tuple[int, ...],
        generator: torch.Generator | Sequence[torch.Generator] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        several = generator if generator is None or isinstance(generator, torch.Generator) else list(generator)
        return randn_tensor(shape, generator=several, device=device, dtype=dtype)

    def sample(
        self,
        embeddings: Tensor,
        *,
        negative: Tensor | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 10.0,
        noise_level: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        noise: Tensor | None = None,
        negative_noise: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[UnCLIPStep]:
        """Denoise, one step after the other.

        Args:
            embeddings: [B, E].
            negative: [B, E] of what to stay away from.
            num_inference_steps: steps; PNDM adds one.
            guidance_scale: strength of the condition; up to 1 means no guidance.
            noise_level: noise on the embeddings (more gives more variety).
            generator: one for all pictures, or one a picture (each then does not depend on the others).
            latents: [B or 1, 4, h, w] to start from.
            noise, negative_noise: [B, E], draws for the embeddings.
            height, width: of the pictures in pixels; None is what the denoiser was trained for.

        Yields:
            `UnCLIPStep` after each call of the denoiser.

        Raises:
            InvalidInputError: at once, if shapes or settings are out of range.
        """
        if embeddings.ndim != 2:
            raise InvalidInputError(f"expected image embeddings [B, E]; got {list(embeddings.shape)}")
        if negative is not None and negative.shape != embeddings.shape:
            raise InvalidInputError(f"negative must be {list(embeddings.shape)}; got {list(negative.shape)}")
        if num_inference_steps < 1 or not 0 <= guidance_scale < float("inf"):
            raise InvalidInputError(
                f"expected at least one step and a guidance scale >= 0; got {num_inference_steps}, {guidance_scale}"
            )
        if isinstance(generator, Sequence) and len(generator) != len(embeddings):
            raise InvalidInputError(f"{len(generator)} generators for {len(embeddings)} pictures")
        if not bool(torch.isfinite(embeddings).all()):
            raise InvalidInputError("the image embeddings contain NaN or infinity")
        pipeline, unet = self.pipeline, self.pipeline.unet
        device, dtype, batch = self.device, self.dtype, len(embeddings)
        factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        side = unet.config.sample_size
        rows, cols = (side if size is None else size // factor for size in (height, width))
        shape = (batch, unet.config.in_channels, rows, cols)
        embeddings = embeddings.to(device, dtype)
        guided = guidance_scale > 1
        noise = self._normal(tuple(embeddings.shape), generator, device, dtype) if noise is None else noise
        if negative is not None and guided:
            negative = negative.to(device, dtype)
            if negative_noise is None:
                negative_noise = self._normal(tuple(embeddings.shape), generator, device, dtype)
            negative_noise = negative_noise.to(device, dtype)
        labels = self.class_labels(embeddings, negative, guided, noise_level, noise.to(device, dtype), negative_noise)
        if latents is None:
            latents = self._normal(shape, generator, device, dtype)
        if latents.shape[1:] != shape[1:] or len(latents) not in (1, batch):
            raise InvalidInputError(f"latents must be {list(shape)}; got {list(latents.shape)}")
        return self._run(labels, latents.to(device, dtype).expand(shape), num_inference_steps, guidance_scale, guided)

    @torch.no_grad()
    def _run(
        self, labels: Tensor, latents: Tensor, num_inference_steps: int, guidance_scale: float, guided: bool
    ) -> Iterator[UnCLIPStep]:
        pipeline = self.pipeline
        # The scheduler counts; a copy of its own lets several runs go on at once.
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        text = self.text_states().expand(len(labels), -1, -1)
        latents = latents * scheduler.init_noise_sigma
        total = len(scheduler.timesteps)
        shortcuts = _Shortcuts(pipeline.unet, labels)
        for index, timestep in enumerate(scheduler.timesteps):
            rows = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
            with shortcuts.in_force():
                output = pipeline.unet(
                    rows, timestep, encoder_hidden_states=text, class_labels=labels, return_dict=False
                )[0]
            if guided:
                away, towards = output.chunk(2)
                output = away + guidance_scale * (towards - away)
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
            yield UnCLIPStep(index, total, timestep, latents)

    @torch.no_grad()
    def paint(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] to pictures [B, 3, H, W], about [-1, 1]."""
        vae = self.pipeline.vae
        images = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        if not bool(torch.isfinite(images).all()):
            raise InvalidOutputError("the diffusion model produced NaN: try float32 or bfloat16")
        return images

    def __call__(self, embeddings: Tensor, **settings: Any) -> Tensor:
        """Image embeddings [B, E] to pictures [B, 3, H, W], about [-1, 1]; arguments as in `sample`."""
        latents = None
        for step in self.sample(embeddings, **settings):
            latents = step.latents
        assert latents is not None
        return self.paint(latents)


class PromptDecoder:
    """Paints SEED-1's text-like embeddings: they take the place of a prompt of Stable Diffusion 1.

    Args:
        pipeline: a diffusers pipeline that takes `prompt_embeds`, such as `StableDiffusionPipeline`.
        negative_prompt: text of the other half of the guidance.
    """

    def __init__(self, pipeline: Any, negative_prompt: str = "") -> None:
        self.pipeline, self.negative_prompt = pipeline, negative_prompt

    @torch.no_grad()
    def __call__(
        self,
        embeddings: Tensor,
        *,
        negative: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        **settings: Any,
    ) -> Tensor:
        """Embeddings [B, T, D] to pictures [B, 3, H, W] in [-1, 1].

        Args:
            embeddings: of `SEED(head="text")`.
            negative: of what to stay away from; None is the negative prompt.
            generator: one for all pictures, or one a picture.
            num_inference_steps, guidance_scale, settings: arguments of the pipeline.

        Raises:
            InvalidInputError: for embeddings of another shape.
        """
        if embeddings.ndim != 3:
            raise InvalidInputError(
                f"expected text-like embeddings [B, T, D] (head='text'); got {list(embeddings.shape)}: image "
                "embeddings are painted by UnCLIPDecoder"
            )
        dtype = next(self.pipeline.unet.parameters()).dtype
        given: dict[str, Any] = {"prompt_embeds": embeddings.to(dtype)}
        if negative is None:
            given["negative_prompt"] = [self.negative_prompt] * len(embeddings)
        else:
            given["negative_prompt_embeds"] = negative.to(dtype)
        images = self.pipeline(
            **given,
            generator=generator if generator is None or isinstance(generator, torch.Generator) else list(generator),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="pt",
            **settings,
        ).images
        return images * 2 - 1


class _Shortcuts:
    """What a denoiser need not compute at every step: text keys and values, and the class embedding.

    In force around its calls alone, because between two steps others may use the denoiser.
    """

    def __init__(self, unet: Any, labels: Tensor) -> None:
        self.unet = unet
        self.attentions = [
            (module, _SharedText())
            for name, module in unet.named_modules()
            if name.endswith(".attn2") and _is_plain(module)
        ]
        embed = getattr(unet, "class_embedding", None)
        self.class_embedding = None if embed is None else _Known(embed(labels))

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside, the denoiser takes them."""
        with Handle() as handle:
            for attention, processor in self.attentions:
                handle.replace(attention, "processor", processor)
            if self.class_embedding is not None:
                handle.undo_with(setattr, self.unet, "class_embedding", self.unet.class_embedding)
                self.unet.class_embedding = self.class_embedding
            yield


def _is_plain(attention: Any) -> bool:
    """Whether a cross-attention has none of the extras that `_SharedText` leaves out."""
    return (
        attention.group_norm is None
        and attention.spatial_norm is None
        and not attention.norm_cross
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
        and getattr(attention, "norm_q", None) is None
        and type(attention.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0")
    )
