"""FlexTok: an image as 1 to N ordered tokens, coarse to fine, and back through a flow decoder at any of these lengths.

Paper: Bachmann, Allardice, Mizrahi et al., "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length"
(arXiv 2502.13967). Origin of the weights: EPFL-VILAB on the Hub (research licence of Apple).

An auto-encoder turns the image into latents; registers read the latents in a transformer and are rounded by finite
scalar quantisation; in training a random suffix of them is dropped, so that the first ones learn what matters most; a
rectified-flow transformer draws latents from what is kept.

Top to bottom: configuration and network; auto-encoder; objective; image to tokens; tokens to image; pictures; the
authors' files. What is checked, the blocks, the two transformers, the flow's mathematics and the authors' names are the
neighbours of this file.

Letters: B images, H, W pixels, Z, h, w channels and sides of the latents, N registers, k tokens, C code channels,
T steps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.files import open_image
from vistok.kernels.finite_scalar import finite_scalar, finite_scalar_codes, finite_scalar_quantize
from vistok.nn.diffusion import gaussian_noise
from vistok.nn.flow import interpolate, velocity_target
from vistok.nn.model import VistokModel
from vistok.nn.sampling import Generators, uniform
from vistok.registry import Published
from vistok.tokenizers.pictures import postprocess_images
from vistok.tokenizers.transforms import to_tensor
from vistok.tokens import VisualTokens

from . import official
from .autoencoder import (
    Autoencoder,
    build_vae,
    check_autoencoder,
    tokenizer_images,
    tokenizer_latents,
    vae_images,
    vae_latents,
)
from .blocks import ProjectionHead
from .budget import TokenBudget, choose_lengths
from .decoder import FlowDecoder, RegisterEncoder
from .flow import (
    NOISE_SCHEDULES,
    PREFIX_MODES,
    GuidanceScale,
    NormalizedGuidance,
    classifier_free_guidance,
    noise_levels,
    prefix_lengths,
    representation_loss,
    scale_at,
    shift_levels,
)
from .inputs import check_images, check_length, check_size, check_tokens, resize_and_crop

__all__ = ["FlexTok", "Teacher"]

LEVELS = (8, 8, 8, 5, 5, 5)
GUIDANCE = ("normalized", "classifier_free")

Teacher: TypeAlias = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [-1, 1] -> features [B, F, rows, columns] of a frozen network (DINOv2 in the paper)."""


class FlexTok(VistokModel):
    """Tokenizer with ordered one-dimensional tokens and a flow decoder. The defaults are d12-d12 of the paper.

    Args:
        vae_block_out_channels: widths of the auto-encoder's levels, finest first, each after the first halving the
            sides; None builds none.
        vae_layers_per_block: residual blocks of a level.
        vae_norm_groups: groups of its normalisations.
        latent_channels: Z.
        scaling_factor: latents are multiplied by it after encoding and divided before decoding.
        sample_posterior: training draws latents from the auto-encoder's posterior instead of taking its mean.
        patch_size: side of a patch of latents.
        grid: (rows, columns) of patches that the position tables cover.
        num_registers: N, the most tokens an image can have.
        levels: levels of each code channel; their product is the codebook size.
        encoder_size, encoder_depth, encoder_head_dim, encoder_mlp_ratio: channels, blocks, channels of a head, and
            hidden width over channels.
        decoder_size, decoder_depth, decoder_head_dim, decoder_mlp_ratio: the same of the decoder.
        gated_mlp, activation, qk_norm, qkv_bias, proj_bias, mlp_bias, mup_scale: see `Attention` and `FeedForward`.
        modulation_segments: 2 gives patches and registers their own modulation by time, 1 the same.
        frequency_size, max_timestep: see `TimeEmbedding`.
        encoder_positions, decoder_positions, register_positions: see `PositionTable`.
        position_scaling: `"interpolate"` stretches the tables to other image sizes than the trained one.
        register_order: how fewer registers come out of N: `"nested"` (the first ones) or `"avg_pool"`.
        nested_dropout: lengths in training: `"uniform"`, `"pow2"`, `"uniform_pow2"`, or `"none"`, which gives tokens no
            order.
        condition_dropout: probability of the null condition in training.
        quantization_dropout: probability of codes that are squashed but not rounded, in training.
        noise_schedule, mode_scale, noise_shift: see `noise_levels` and `shift_levels`.
        repa_layer: decoder block (from 0) whose output the representation loss reads; None has no such loss.
        repa_channels: channels of the teacher; None builds no head, as in the published files.
        repa_hidden_size: hidden channels of the head that maps decoder features to the teacher's.
        repa_weight: weight of the representation loss.
        autoencoder: name of a KL tokenizer (for `vistok.load`) whose latents this FlexTok works on; its weights are no
            part of this model. None and no `vae_block_out_channels` works on pixels (then `latent_channels` must be 3).
        autoencoder_factor: pixels of such a latent in each direction.
        num_inference_steps, guidance_scale, guidance: what `decode` uses where it is told nothing else.

    Raises:
        InvalidInputError: if the arguments do not fit each other.
    """

    system = "flextok"
    published: ClassVar[dict[str, Published]] = official.PUBLISHED
    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules: ClassVar[list[str]] = ["vae"]  # its convolutions overflow in half precision

    @register_to_config
    def __init__(
        self,
        vae_block_out_channels: Sequence[int] | None = (128, 256, 512, 512),
        vae_layers_per_block: int = 2,
        vae_norm_groups: int = 32,
        latent_channels: int = 16,
        scaling_factor: float = 1.0,
        sample_posterior: bool = True,
        patch_size: int = 2,
        grid: Sequence[int] = (16, 16),
        num_registers: int = 256,
        levels: Sequence[int] = LEVELS,
        encoder_size: int = 768,
        encoder_depth: int = 12,
        encoder_head_dim: int = 64,
        encoder_mlp_ratio: float = 4.0,
        decoder_size: int = 768,
        decoder_depth: int = 12,
        decoder_head_dim: int = 64,
        decoder_mlp_ratio: float = 4.0,
        gated_mlp: bool = True,
        activation: str = "silu",
        qk_norm: bool = True,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        mlp_bias: bool = False,
        mup_scale: bool = True,
        modulation_segments: int = 2,
        frequency_size: int = 256,
        max_timestep: float = 1.0,
        encoder_positions: str = "sincos",
        decoder_positions: str = "sincos",
        register_positions: str = "learnable_sum",
        position_scaling: str = "absolute",
        register_order: str = "nested",
        nested_dropout: str = "pow2",
        condition_dropout: float = 0.2,
        quantization_dropout: float = 0.0,
        noise_schedule: str = "mode",
        mode_scale: float = 0.25,
        noise_shift: float = 1.0,
        repa_layer: int | None = 1,
        repa_channels: int | None = None,
        repa_hidden_size: int = 2048,
        repa_weight: float = 1.0,
        autoencoder: str | None = None,
        autoencoder_factor: int = 8,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        guidance: str = "normalized",
    ) -> None:
        super().__init__()
        for name, given, known in (
            ("nested_dropout", nested_dropout, PREFIX_MODES),
            ("noise_schedule", noise_schedule, NOISE_SCHEDULES),
            ("register_order", register_order, ("nested", "avg_pool")),
            ("modulation_segments", modulation_segments, (1, 2)),
            ("guidance", guidance, GUIDANCE),
        ):
            if given not in known:
                raise InvalidInputError(f"{name} must be one of {', '.join(map(str, known))}; got {given!r}")
        if not noise_shift > 0:
            raise InvalidInputError(f"noise_shift must be greater than 0; got {noise_shift}")
        if num_registers < 1:
            raise InvalidInputError(f"num_registers must be at least 1; got {num_registers}")
        if not len(levels) or min(levels) < 2:
            raise InvalidInputError(f"levels must be numbers, each at least 2; got {list(levels)}")
        if vae_block_out_channels is None and autoencoder is None and latent_channels != 3:
            raise InvalidInputError(f"without an auto-encoder latent_channels must be 3; got {latent_channels}")
        if vae_block_out_channels is not None and autoencoder is not None:
            raise InvalidInputError(
                "give either vae_block_out_channels (an auto-encoder of its own) or autoencoder; got both, the latter "
                f"{autoencoder!r}"
            )
        if repa_channels is not None and (repa_layer is None or not 0 <= repa_layer < decoder_depth):
            raise InvalidInputError(
                f"repa_layer must name one of the {decoder_depth} decoder blocks for repa_channels; got {repa_layer}"
            )
        self.levels = tuple(int(level) for level in levels)
        self.vae = (
            None
            if vae_block_out_channels is None
            else build_vae(
                vae_block_out_channels, vae_layers_per_block, vae_norm_groups, latent_channels, scaling_factor
            )
        )
        shared: dict[str, Any] = {
            "position_scaling": position_scaling,
            "gated_mlp": gated_mlp,
            "activation": activation,
            "qk_norm": qk_norm,
            "qkv_bias": qkv_bias,
            "proj_bias": proj_bias,
            "mlp_bias": mlp_bias,
            "mup_scale": mup_scale,
        }
        sides = (int(grid[0]), int(grid[1]))
        self.encoder = RegisterEncoder(
            latent_channels,
            patch_size,
            sides,
            encoder_size,
            encoder_depth,
            encoder_head_dim,
            num_registers,
            len(self.levels),
            mlp_ratio=encoder_mlp_ratio,
            positions=encoder_positions,
            register_order=register_order,
            **shared,
        )
        self.decoder = FlowDecoder(
            latent_channels,
            patch_size,
            sides,
            decoder_size,
            decoder_depth,
            decoder_head_dim,
            num_registers,
            len(self.levels),
            mlp_ratio=decoder_mlp_ratio,
            expansion=modulation_segments,
            frequency_size=frequency_size,
            max_timestep=max_timestep,
            positions=decoder_positions,
            register_positions=register_positions,
            **shared,
        )
        if repa_channels is not None:
            self.repa_head = ProjectionHead(decoder_size, repa_hidden_size, repa_channels)
        if self.vae is None:
            object.__setattr__(self, "_keep_in_fp32_modules", [])  # or diffusers would warn at every cast
        self._teacher: Teacher | None = None
        self._autoencoder: Autoencoder | None = None
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for every product, zero for modulations and both heads: the velocity and the codes start at 0."""
        for part in (self.encoder, self.decoder):
            for name, module in part.named_modules():
                if isinstance(module, torch.nn.Linear):
                    zero = name in ("head", "head_modulation") or name.endswith("modulation")
                    torch.nn.init.zeros_(module.weight) if zero else torch.nn.init.xavier_uniform_(module.weight)
                    if module.bias is not None:
                        torch.nn.init.zeros_(module.bias)

    @classmethod
    def tiny(cls, **overrides: Any) -> FlexTok:
        """Random weights in eval mode, no layer at zero: 32x32 pixels, 16 tokens of 1600 codes."""
        arguments: dict[str, Any] = {
            "vae_block_out_channels": (8, 8),
            "vae_layers_per_block": 1,
            "vae_norm_groups": 4,
            "latent_channels": 4,
            "patch_size": 4,
            "grid": (4, 4),
            "num_registers": 16,
            "levels": (8, 8, 5, 5),
            "encoder_size": 32,
            "encoder_depth": 2,
            "encoder_head_dim": 16,
            "decoder_size": 32,
            "decoder_depth": 2,
            "decoder_head_dim": 16,
            "frequency_size": 32,
        }
        model = cls(**{**arguments, **overrides})
        with torch.no_grad():
            for part in (model.encoder, model.decoder):
                for parameter in part.parameters():
                    if not bool(parameter.any()):
                        parameter.normal_(std=0.2)
        return model.eval()

    @property
    def num_registers(self) -> int:
        """The most tokens an image can have, N."""
        return self.decoder.num_registers

    @property
    def codebook_size(self) -> int:
        """Product of the levels."""
        return math.prod(self.levels)

    def code_features(self) -> Tensor:
        """What tells the codes apart, float [codebook size, sum of (level - 1)].

        Of each channel, which of its steps a code has climbed: neighbours share all but one of these numbers.
        """
        ids = torch.arange(self.codebook_size)
        columns = []
        basis = 1
        for level in self.levels:
            digits = ids // basis % level
            columns += [digits >= step for step in range(1, level)]
            basis *= level
        return torch.stack(columns, dim=1).float()

    @property
    def downsample_factor(self) -> int:
        """Pixels of a latent pixel in each direction."""
        channels = self.config.vae_block_out_channels
        if channels is None:
            return 1 if self.config.autoencoder is None else self.config.autoencoder_factor
        return 2 ** (len(channels) - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the position tables were made for."""
        side = self.config.patch_size * self.downsample_factor
        return self.config.grid[0] * side, self.config.grid[1] * side

    @property
    def patch_pixels(self) -> int:
        """Pixels of a patch in each direction: what the sides of images must be multiples of."""
        return self.downsample_factor * self.config.patch_size

    def latent_size(self, image_size: int | Sequence[int] | None = None) -> tuple[int, int]:
        """(h, w) of the latents of an image of (H, W) pixels; None is the trained size.

        Raises:
            InvalidInputError: sides that patches do not fill.
        """
        height, width = check_size(self.image_size if image_size is None else image_size, self.patch_pixels)
        return height // self.downsample_factor, width // self.downsample_factor

    # ----------------------------------------------------------------------------------------------- auto-encoder
    def set_autoencoder(self, autoencoder: Autoencoder) -> None:
        """Give the KL tokenizer whose latents this FlexTok works on; `vistok.load` does so by its name.

        It is frozen, follows the model from device to device, stays in its own precision, and is not saved with it.

        Raises:
            InvalidInputError: this FlexTok has an auto-encoder of its own or works on pixels; or other latents.
        """
        if self.config.autoencoder is None:
            raise InvalidInputError("this FlexTok needs no auto-encoder: build it with autoencoder= for that")
        check_autoencoder(autoencoder, self.config.latent_channels, self.downsample_factor)
        if isinstance(autoencoder, torch.nn.Module):
            autoencoder.requires_grad_(False).eval()
        object.__setattr__(self, "_autoencoder", autoencoder)  # past nn.Module, which would make it a part
        self._move_autoencoder()

    def _move_autoencoder(self) -> None:
        if isinstance(self._autoencoder, torch.nn.Module) and self.device.type != "meta":
            self._autoencoder.to(self.device)

    def _apply(self, fn: Any, recurse: bool = True) -> FlexTok:
        super()._apply(fn, recurse)
        self._move_autoencoder()
        return self

    def _given_autoencoder(self) -> Autoencoder | None:
        """The tokenizer whose latents this works on; None works on pixels."""
        if self.config.autoencoder is not None and self._autoencoder is None:
            raise InvalidInputError(
                f"this FlexTok works on latents of {self.config.autoencoder!r}, which is no part of it: load it with "
                "vistok.load, or give the tokenizer with set_autoencoder()"
            )
        return self._autoencoder

    def encode_latents(
        self,
        images: Tensor,
        *,
        sample_posterior: bool = False,
        generator: Generators = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Images [B, 3, H, W] to scaled latents [B, Z, h, w], float32, without gradient.

        Args:
            images: in [-1, 1].
            sample_posterior: draw from the posterior; otherwise its mean.
            generator: source of the draws.
            noise: standard normal [B, Z, h, w] to use instead of draws.
        """
        scale = self.config.scaling_factor
        if self.vae is not None:
            return vae_latents(self.vae, images, scale, sample=sample_posterior, generator=generator, noise=noise)
        given = self._given_autoencoder()
        if given is None:
            return images.float() * scale
        if noise is not None:
            raise InvalidInputError("noise is for FlexTok's own auto-encoder; give a generator")
        return tokenizer_latents(given, images, sample=sample_posterior, generator=generator)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, Z, h, w] to images [B, 3, H, W], not clamped."""
        scale = self.config.scaling_factor
        if self.vae is not None:
            return vae_images(self.vae, latents, scale)
        given = self._given_autoencoder()
        return latents.float() / scale if given is None else tokenizer_images(given, latents)

    # -------------------------------------------------------------------------------------------------- objective
    def set_teacher(self, teacher: Teacher | None) -> None:
        """The frozen network whose features the representation loss asks for; it is not saved with the model."""
        if teacher is not None and self.config.repa_channels is None:
            raise InvalidInputError("this FlexTok has no head for a teacher: build it with repa_channels=")
        object.__setattr__(self, "_teacher", teacher)  # past nn.Module, which would register a network as a part

    def remove_teacher_head(self) -> None:
        """Drop the head of the representation loss, which only training needs."""
        if self.config.repa_channels is not None:
            del self.repa_head
            self._teacher = None
            self.register_to_config(repa_channels=None)

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Squared error of the velocity, and the representation loss where there is a teacher (arXiv 2410.06940).

        Args:
            batch: `images` [B, 3, H, W] in [-1, 1], or their scaled `latents` [B, Z, h, w]; optionally
                `teacher_features` [B, F, rows, columns], computed beforehand.
            generator: source of all draws: posterior, noise, moments, lengths, null conditions.

        Returns:
            `loss` and its parts `flow` and `repa`.
        """
        if "latents" in batch:
            latents = batch["latents"]
        elif "images" in batch:
            latents = self.encode_latents(
                batch["images"], sample_posterior=self.config.sample_posterior, generator=generator
            )
        else:
            raise InvalidInputError(
                f"FlexTok trains on 'images' or 'latents'; got {', '.join(sorted(batch)) or 'none'}"
            )
        count, device = len(latents), latents.device
        noise = gaussian_noise(latents.shape, generator, device)
        schedule = self.config.noise_schedule
        draw = gaussian_noise if schedule == "logit_normal" else uniform
        t = noise_levels(draw((count,), generator, device), schedule, self.config.mode_scale)
        t = shift_levels(t, self.config.noise_shift)
        lengths = prefix_lengths(count, self.num_registers, self.config.nested_dropout, generator)
        dropped = (uniform((count,), generator, "cpu") < self.config.condition_dropout).tolist()
        unrounded = None
        if self.config.quantization_dropout:
            unrounded = (uniform((count,), generator, device) < self.config.quantization_dropout)[:, None]
        features = batch.get("teacher_features")
        if features is None and self._teacher is not None and "images" in batch:
            with torch.no_grad():
                features = self._teacher(batch["images"])
        return self.flow_loss(latents, noise, t, lengths, dropped, unrounded=unrounded, teacher_features=features)

    def flow_loss(
        self,
        latents: Tensor,
        noise: Tensor,
        t: Tensor,
        lengths: Sequence[int],
        dropped: Sequence[bool],
        *,
        unrounded: Tensor | None = None,
        teacher_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The objective with all draws given.

        Only the registers that some sample keeps are encoded; the dropped ones cost the decoder one row a sample.

        Args:
            latents: scaled [B, Z, h, w].
            noise: standard normal, same shape.
            t: [B] moments in 0..1.
            lengths: registers that each sample keeps.
            dropped: samples that get the null condition.
            unrounded: bool [B, 1], codes that are not rounded.
            teacher_features: [B, F, rows, columns].
        """
        kept = [0 if null else length for length, null in zip(lengths, dropped, strict=True)]
        count = min(max(max(kept), 1), self.num_registers)
        if self.config.register_order != "nested":
            count = self.num_registers
        codes, _ = self.quantize(self.encoder(latents, count), unrounded)
        x_t = interpolate(latents, noise, t.view(-1, 1, 1, 1))
        registers = self.decoder.registers(codes, lengths, dropped)
        observed: dict[int, Tensor] = {}
        observe = None
        if teacher_features is not None:
            if self.config.repa_channels is None:
                raise InvalidInputError("teacher features were given, but this FlexTok has no head: set repa_channels")

            def observe(index: int, x: Tensor, rows: Any) -> None:
                if index == self.config.repa_layer:
                    observed[index] = x[: rows.split].unflatten(0, (rows.batch, -1))

        velocity = self.decoder(x_t, registers, self.decoder.modulations(t), observe)
        flow = functional.mse_loss(velocity, velocity_target(latents, noise).float())
        losses = {"loss": flow, "flow": flow.detach()}
        if teacher_features is not None:
            patches = observed[self.config.repa_layer].index_select(0, torch.argsort(registers.order))
            grid = tuple(side // self.config.patch_size for side in latents.shape[2:])
            repa = representation_loss(self.repa_head(patches.unflatten(1, grid)), teacher_features)
            losses |= {"loss": flow + self.config.repa_weight * repa, "repa": repa.detach()}
        return losses

    def quantize(self, z: Tensor, unrounded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes [B, k, C] with straight-through gradient, and ids int64 [B, k], of z [B, k, C]; always in float32."""
        with torch.autocast(z.device.type, enabled=False):
            return finite_scalar_quantize(z.float(), self.levels, unrounded)

    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The training objective of images [B, 3, H, W]; see `training_loss`."""
        return self.training_loss({"images": images}, generator=generator)

    # --------------------------------------------------------------------------------------------- image to tokens
    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        num_tokens: int | None = None,
        *,
        sample_posterior: bool = False,
        generator: Generators = None,
    ) -> VisualTokens:
        """Images to their first tokens.

        Only the registers that are asked for are computed; they are the same as the first ones of all.

        Args:
            images: float [B, 3, H, W] in [-1, 1]; sides divisible by `downsample_factor * patch_size`.
            num_tokens: k, 1..N; None is N.
            sample_posterior: draw latents from the auto-encoder's posterior, as the authors do; the mean is the
                default, so that the same image gives the same tokens.
            generator: source of these draws.

        Returns:
            ids [B, k], ordered; without a grid.

        Raises:
            InvalidInputError: wrong shape, size, type or range; NaN; k out of range.
            InvalidOutputError: if the encoder produces NaN.
        """
        count = check_length(num_tokens, self.num_registers)
        check_images(images, self.patch_pixels)
        latents = self.encode_latents(images.to(self.device), sample_posterior=sample_posterior, generator=generator)
        return self.tokenize_latents(latents, count)

    @torch.no_grad()
    def tokenize_latents(self, latents: Tensor, num_tokens: int | None = None) -> VisualTokens:
        """Scaled latents [B, Z, h, w] to their first k tokens."""
        z = self.encoder(latents, check_length(num_tokens, self.num_registers))
        ids = finite_scalar(z.flatten(0, 1), self.levels).view(z.shape[:2])
        if ids.numel() and int(ids.min()) < 0:
            raise InvalidOutputError("the encoder produced NaN: check the model's weights")
        return VisualTokens(ids=ids)

    def tokens_for(
        self,
        images: Tensor,
        max_error: float,
        *,
        lengths: Iterable[int] | None = None,
        error: Callable[[Tensor, Tensor], Tensor] | None = None,
        generator: Generators = None,
        **sampling: Any,
    ) -> TokenBudget:
        """As few tokens as each image needs: the shortest prefix whose reconstruction is within a bound.

        Lengths are tried from short to long, all with the same noise for an image, and an image that is satisfied is
        decoded no further.

        Args:
            images: float [B, 3, H, W] in [-1, 1].
            max_error: bound on the error, > 0.
            lengths: lengths to try; None is 1, 2, 4, ... and N.
            error: (reconstructions, images) -> float [B]; None is the mean squared error of pixels in [0, 1], by which
                0.01 is 20 dB.
            generator: source of the noise: one, or one an image.
            sampling: further arguments of `decode`.

        Raises:
            InvalidInputError: bad images, bound or lengths.
        """
        return choose_lengths(self, images, max_error, lengths=lengths, error=error, generator=generator, **sampling)

    # --------------------------------------------------------------------------------------------- tokens to image
    def decode(
        self,
        tokens: VisualTokens | Sequence[Tensor] | Sequence[Sequence[int]],
        *,
        generator: Generators = None,
        noise: Tensor | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Draw an image for each sequence of tokens.

        Args:
            tokens: ids [B, k], shorter sequences by a mask that is True at a prefix; or a list of sequences of any
                lengths. A prefix of an image's tokens stands for the whole image.
            generator: source of the initial noise: one, or one an image. The noise of an image does not depend on the
                others.
            noise: standard normal [B, Z, h, w] to use instead.
            sampling: `num_inference_steps`, `guidance_scale` (a number, or a function of t; 1 is none), `guidance`
                (`"normalized"` or `"classifier_free"`), all three by default as the configuration says (published
                models: 25, 7.5, `"normalized"`), and `image_size` ((height, width) in pixels).

        Returns:
            [B, 3, H, W], about [-1, 1], not clamped.

        Raises:
            InvalidInputError: empty or too long sequences, ids outside the codebook, settings out of range.
        """
        *_, latents = self.denoise(tokens, generator=generator, noise=noise, **sampling)
        return self.decode_latents(latents)

    def decode_prefixes(
        self,
        tokens: VisualTokens,
        lengths: Sequence[int],
        *,
        generator: Generators = None,
        noise: Tensor | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Images of several prefixes of the same tokens in one batch, all from the same noise.

        Args:
            tokens: ids [B, k].
            lengths: L prefix lengths, each 1..k.
            generator, noise, sampling: see `decode`; noise is [B, Z, h, w].

        Returns:
            [B, L, 3, H, W].
        """
        if tokens.ids is None:
            raise InvalidInputError("decode_prefixes needs tokens with ids")
        available = tokens.num_tokens if tokens.mask is None else int(tokens.mask.sum(1).min())
        bad = [length for length in lengths if not 1 <= int(length) <= available]
        if bad or not len(lengths):
            raise InvalidInputError(f"prefix lengths must lie in 1..{available}; got {list(lengths)}")
        if noise is None:
            noise = self.draw_noise(len(tokens), sampling.get("image_size"), generator)
        sequences = [row[: int(length)] for row in tokens.ids for length in lengths]
        decoded = self.decode(sequences, noise=noise.repeat_interleave(len(lengths), 0), **sampling)
        return decoded.unflatten(0, (len(tokens), len(lengths)))

    def draw_noise(
        self, batch: int, image_size: int | Sequence[int] | None = None, generator: Generators = None
    ) -> Tensor:
        """Initial noise [B, Z, h, w], float32, drawn image by image."""
        height, width = self.latent_size(image_size)
        shape = (1, self.config.latent_channels, height, width)
        sources = list(generator) if isinstance(generator, Sequence) else [generator] * batch
        if len(sources) != batch:
            raise InvalidInputError(f"{len(sources)} generators for {batch} images; give one, or one an image")
        return torch.cat([gaussian_noise(shape, source, self.device) for source in sources])

    def denoise(
        self,
        tokens: VisualTokens | Sequence[Tensor] | Sequence[Sequence[int]],
        *,
        generator: Generators = None,
        noise: Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: GuidanceScale | None = None,
        guidance: str | None = None,
        image_size: int | Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """`decode` step by step: yields the latents [B, Z, h, w], float32, after each Euler step from t = 1 to 0.

        Arguments as in `decode`; they are checked at once.

        The condition is embedded once. Modulations depend on the moment alone, so those of all steps are computed
        before the first and kept for the next call with as many steps. Conditional and unconditional samples run in one
        batch, of different lengths: all dropped registers of a sample cost one row.
        """
        config = self.config
        num_inference_steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance_scale = config.guidance_scale if guidance_scale is None else guidance_scale
        guidance = config.guidance if guidance is None else guidance
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise InvalidInputError(f"num_inference_steps must be an integer >= 1; got {num_inference_steps!r}")
        if guidance not in GUIDANCE:
            raise InvalidInputError(f"guidance must be one of {', '.join(GUIDANCE)}; got {guidance!r}")
        if not callable(guidance_scale) and not math.isfinite(guidance_scale):
            raise InvalidInputError(f"guidance_scale must be a finite number or a function of t; got {guidance_scale}")
        ids, lengths = check_tokens(tokens, self.num_registers, self.codebook_size, self.device)
        height, width = self.latent_size(image_size)
        shape = (len(ids), self.config.latent_channels, height, width)
        if noise is None:
            noise = self.draw_noise(len(ids), image_size, generator)
        elif tuple(noise.shape) != shape:
            raise InvalidInputError(f"noise must be {list(shape)} for these tokens; got {list(noise.shape)}")
        return self._denoise(ids, lengths, noise, num_inference_steps, guidance_scale, guidance)

    @torch.no_grad()
    def _denoise(
        self,
        ids: Tensor,
        lengths: list[int],
        noise: Tensor,
        steps: int,
        guidance_scale: GuidanceScale,
        guidance: str,
    ) -> Iterator[Tensor]:
        conditional = self.decoder.registers(finite_scalar_codes(ids, self.levels), lengths)
        guided = callable(guidance_scale) or guidance_scale != 1.0
        both = conditional + self.decoder.null_registers(len(ids)) if guided else conditional
        blocks, head = self.decoder.schedule(steps)
        normalized = NormalizedGuidance() if guidance == "normalized" else None
        x = noise.to(device=self.device, dtype=torch.float32).clone()
        for step in range(steps):
            moment = slice(step, step + 1)
            modulations = ([block[moment] for block in blocks], head[moment])
            scale = scale_at(guidance_scale, (steps - step) / steps)
            # Momentum needs the unconditional velocity of every step; plain guidance by 1 does not.
            if not guided or (normalized is None and scale == 1.0):
                velocity = self.decoder(x, conditional, modulations)
            else:
                cond, uncond = self.decoder(x, both, modulations).chunk(2)
                velocity = (normalized or classifier_free_guidance)(cond, uncond, scale)
            x = x.sub(velocity, alpha=1 / steps)
            yield x

    # --------------------------------------------------------------------------------------------------- pictures
    def preprocess(
        self,
        images: Image.Image | str | os.PathLike[str] | Sequence[Image.Image | str | os.PathLike[str]],
        size: int | None = None,
    ) -> Tensor:
        """Pictures to a batch that `encode` accepts: short side resized (bilinear), centre cut out.

        Args:
            images: a picture, a path, or a list of them.
            size: side in pixels; None is the trained size.

        Returns:
            float32 [B, 3, size, size] in [-1, 1] on the CPU.
        """
        side = self.image_size[0] if size is None else size
        listed = [images] if isinstance(images, (Image.Image, str, os.PathLike)) else list(images)
        if not listed:
            raise InvalidInputError("preprocess() needs at least one image")
        return torch.stack([to_tensor(resize_and_crop(open_image(item), side)) for item in listed])

    def postprocess(self, images: Tensor, output_type: str = "pil") -> Any:
        """Images [B, 3, H, W] in [-1, 1] to pictures.

        Args:
            images: output of `decode`; values outside the range are clamped.
            output_type: `"pil"`, `"uint8"` (tensor [B, H, W, 3], truncated as published), `"np"` (float [B, H, W, 3] in
                [0, 1]) or `"pt"` (float [B, 3, H, W] in [0, 1]).

        Raises:
            InvalidOutputError: if there are NaNs.
        """
        return postprocess_images(images, output_type, _truncated)

    # ------------------------------------------------------------------------------------------- the authors' files
    @classmethod
    def from_official(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    ) -> FlexTok:
        """Load a published tokenizer (see `VistokModel.from_official`) without running what its configuration names.

        Args:
            source: `model.safetensors` (its header or a `config.json` beside it may hold the configuration), the folder
                of both, or a state dict.
            config: a published name, the authors' configuration (or the path of their `config.json`), or our own
                arguments. What the file says about itself counts more than a published name, because the authors
                document no such values elsewhere; None takes it alone.

        Raises:
            CheckpointError: keys that do not fit, or no configuration anywhere.
            InvalidInputError: a configuration that names unknown modules.
        """
        source, config = official.find_config(source, config)
        return super().from_official(source, config)

    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our constructor arguments from the authors' configuration tree (our own pass unchanged)."""
        return official.config_from_official(config) if official.is_official(config) else dict(config)

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official names to ours; queries, keys and values are joined, and so are the halves of SwiGLU."""
        return official.from_official_keys(state)

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names."""
        return official.to_official_keys(self.state_dict(), self.config.gated_mlp)

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise the neighbours of these files."""
        if any(key.startswith("models.ar_image_model.") for key in unexpected):
            return "This is an autoregressive generator (FlexAR); load it with FlexTokAR."
        if unexpected and all(
            key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")) for key in unexpected
        ):
            return "This is an auto-encoder alone; load it with diffusers' AutoencoderKL."
        return None


def _truncated(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 [B, H, W, 3], rounded down as published."""
    return ((images.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)
