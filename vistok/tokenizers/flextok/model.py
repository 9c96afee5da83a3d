"""FlexTok: an image as 1 to N ordered tokens, coarse to fine, and back through a flow decoder at any of these lengths.

Paper: Bachmann, Allardice, Mizrahi et al., "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length"
(arXiv 2502.13967). Origin of the weights: EPFL-VILAB on the Hub (research licence of Apple).

An auto-encoder turns the image into latents; registers read the latents in a transformer and are rounded by finite
scalar quantisation; in training a random suffix of them is dropped, so that the first ones learn what matters most; a
rectified-flow transformer draws latents from what is kept.

Top to bottom: configuration and network; objective; image to tokens; tokens to image; pictures; the authors' files. The
blocks, the two transformers, the flow's mathematics and the authors' names are the neighbours of this file.

Letters: B images, H, W pixels, Z, h, w channels and sides of the latents, N registers, k tokens, C code channels,
T steps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.files import open_image
from vistok.kernels.finite_scalar import finite_scalar, finite_scalar_codes, finite_scalar_quantize
from vistok.nn.diffusion import gaussian_noise
from vistok.nn.flow import interpolate, velocity_target
from vistok.nn.model import VistokModel
from vistok.nn.sampling import Generators, uniform
from vistok.registry import Published
from vistok.tokenizers.transforms import to_tensor
from vistok.tokens import VisualTokens

from . import official
from .blocks import ProjectionHead
from .decoder import FlowDecoder, RegisterEncoder
from .flow import (
    NOISE_SCHEDULES,
    PREFIX_MODES,
    GuidanceScale,
    NormalizedGuidance,
    classifier_free_guidance,
    noise_levels,
    prefix_lengths,
    scale_at,
)

__all__ = ["FlexTok", "Teacher", "TokenBudget"]

LEVELS = (8, 8, 8, 5, 5, 5)
GUIDANCE = ("normalized", "classifier_free")

Teacher: TypeAlias = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [-1, 1] -> features [B, F, rows, columns] of a frozen network (DINOv2 in the paper)."""


def _published(name: str, hub: str, encoder: tuple[int, int], decoder: tuple[int, int], parameters: int) -> Published:
    return Published(
        name=name,
        system="flextok",
        config={
            "encoder_depth": encoder[0],
            "encoder_size": encoder[1],
            "decoder_depth": decoder[0],
            "decoder_size": decoder[1],
        },
        hub_id=f"EPFL-VILAB/{hub}",
        hub_file="model.safetensors",
        licence="Apple Machine Learning Research Model",
        paper="arXiv:2502.13967",
        origin="apple/ml-flextok",
        image_size=256,
        num_tokens=256,
        codebook_size=64000,
        preprocessing="short side to 256 (bilinear), centre crop, [-1, 1]",
        parameters=parameters,
    )


@dataclass(frozen=True)
class TokenBudget:
    """Result of `FlexTok.tokens_for`.

    Attributes:
        tokens: ids [B, longest] with a mask: the chosen prefix of each image.
        lengths: int64 [B], tokens of each image.
        errors: float [B], the error at that length.
        satisfied: bool [B], whether that is within the bound (False: even all tokens were not enough).
    """

    tokens: VisualTokens
    lengths: Tensor
    errors: Tensor
    satisfied: Tensor


class FlexTok(VistokModel):
    """Tokenizer with ordered one-dimensional tokens and a flow decoder. The defaults are d12-d12 of the paper.

    Args:
        vae_block_out_channels: widths of the auto-encoder's levels, finest first, each after the first halving the
            sides; None works on pixels, without an auto-encoder (then `latent_channels` must be 3).
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
        nested_dropout: lengths in training: `"uniform"`, `"pow2"` or `"uniform_pow2"`.
        condition_dropout: probability of the null condition in training.
        quantization_dropout: probability of codes that are squashed but not rounded, in training.
        noise_schedule, mode_scale: see `noise_levels`.
        repa_layer: decoder block (from 0) whose output the representation loss reads; None has no such loss.
        repa_channels: channels of the teacher; None builds no head, as in the published files.
        repa_hidden_size: hidden channels of the head that maps decoder features to the teacher's.
        repa_weight: weight of the representation loss.

    Raises:
        InvalidInputError: if the arguments do not fit each other.
    """

    system = "flextok"
    published: ClassVar[dict[str, Published]] = {
        entry.name: entry
        for entry in (
            _published("flextok-d12-d12.imagenet", "flextok_d12_d12_in1k", (12, 768), (12, 768), 341_258_521),
            _published("flextok-d18-d18.imagenet", "flextok_d18_d18_in1k", (18, 1152), (18, 1152), 949_144_729),
            _published("flextok-d18-d28.imagenet", "flextok_d18_d28_in1k", (18, 1152), (28, 1792), 2_540_129_177),
            _published("flextok-d18-d28.dfn", "flextok_d18_d28_dfn", (18, 1152), (28, 1792), 2_540_129_177),
        )
    }
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
        repa_layer: int | None = 1,
        repa_channels: int | None = None,
        repa_hidden_size: int = 2048,
        repa_weight: float = 1.0,
    ) -> None:
        super().__init__()
        for name, given, known in (
            ("nested_dropout", nested_dropout, PREFIX_MODES),
            ("noise_schedule", noise_schedule, NOISE_SCHEDULES),
            ("register_order", register_order, ("nested", "avg_pool")),
            ("modulation_segments", modulation_segments, (1, 2)),
        ):
            if given not in known:
                raise InvalidInputError(f"{name} must be one of {', '.join(map(str, known))}; got {given!r}")
        if num_registers < 1:
            raise InvalidInputError(f"num_registers must be at least 1; got {num_registers}")
        if not len(levels) or min(levels) < 2:
            raise InvalidInputError(f"levels must be numbers, each at least 2; got {list(levels)}")
        if vae_block_out_channels is None and latent_channels != 3:
            raise InvalidInputError(f"without an auto-encoder latent_channels must be 3; got {latent_channels}")
        if repa_channels is not None and (repa_layer is None or not 0 <= repa_layer < decoder_depth):
            raise InvalidInputError(
                f"repa_layer must name one of the {decoder_depth} decoder blocks for repa_channels; got {repa_layer}"
            )
        self.levels = tuple(int(level) for level in levels)
        self.vae = (
            None
            if vae_block_out_channels is None
            else _build_vae(
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
        self._teacher: Teacher | None = None
        self._schedule: tuple[Any, list[Tensor], tuple[list[Tensor], Tensor]] | None = None
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

    @property
    def downsample_factor(self) -> int:
        """Pixels of a latent pixel in each direction."""
        channels = self.config.vae_block_out_channels
        return 1 if channels is None else 2 ** (len(channels) - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the position tables were made for."""
        side = self.config.patch_size * self.downsample_factor
        return self.config.grid[0] * side, self.config.grid[1] * side

    # ----------------------------------------------------------------------------------------------- auto-encoder
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
        if self.vae is None:
            return images.float() * self.config.scaling_factor
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
            latents = posterior.mean
            if sample_posterior:
                if noise is None:
                    noise = gaussian_noise(latents.shape, generator, latents.device)
                latents = latents + posterior.std * noise.to(latents)
        return latents.float() * self.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, Z, h, w] to images [B, 3, H, W], not clamped."""
        latents = latents.float() / self.config.scaling_factor
        if self.vae is None:
            return latents
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.to(self.vae.dtype)).sample.float()

    # -------------------------------------------------------------------------------------------------- objective
    def set_teacher(self, teacher: Teacher | None) -> None:
        """The frozen network whose features the representation loss asks for; it is not saved with the model."""
        if teacher is not None and self.config.repa_channels is None:
            raise InvalidInputError("this FlexTok has no head for a teacher: build it with repa_channels=")
        object.__setattr__(self, "_teacher", teacher)  # past nn.Module, which would register a network as a part

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
            repa = self._representation_loss(patches.unflatten(1, grid), teacher_features)
            losses |= {"loss": flow + self.config.repa_weight * repa, "repa": repa.detach()}
        return losses

    def _representation_loss(self, patches: Tensor, features: Tensor) -> Tensor:
        """1 - cosine similarity of projected patches [B, rows, columns, D] with a teacher [B, F, rows', columns']."""
        projected = self.repa_head(patches).permute(0, 3, 1, 2).float()
        if projected.shape[:2] != features.shape[:2]:
            raise InvalidInputError(
                f"teacher features must be [{len(projected)}, {projected.shape[1]}, rows, columns]; "
                f"got {list(features.shape)}"
            )
        if projected.shape[2:] != features.shape[2:]:
            projected = functional.interpolate(projected, features.shape[2:], mode="bilinear", antialias=False)
        return 1 - functional.cosine_similarity(projected, features.float(), dim=1).mean()

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
        count = self._check_length(num_tokens)
        self._check_images(images)
        latents = self.encode_latents(images.to(self.device), sample_posterior=sample_posterior, generator=generator)
        return self.tokenize_latents(latents, count)

    @torch.no_grad()
    def tokenize_latents(self, latents: Tensor, num_tokens: int | None = None) -> VisualTokens:
        """Scaled latents [B, Z, h, w] to their first k tokens."""
        z = self.encoder(latents, self._check_length(num_tokens))
        ids = finite_scalar(z.flatten(0, 1), self.levels).view(z.shape[:2])
        if ids.numel() and int(ids.min()) < 0:
            raise InvalidOutputError("the encoder produced NaN: check the model's weights")
        return VisualTokens(ids=ids)

    @torch.no_grad()
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
        if not 0 < max_error < math.inf:
            raise InvalidInputError(f"max_error must be a positive number; got {max_error}")
        total = self.num_registers
        powers = {1 << power for power in range(total.bit_length())} | {total}
        tried = sorted({self._check_length(int(length)) for length in (powers if lengths is None else lengths)})
        if not tried:
            raise InvalidInputError("lengths is empty: give at least one number of tokens to try")
        images = images.to(self.device)
        tokens = self.encode(images, tried[-1])
        assert tokens.ids is not None
        size = (images.shape[-2], images.shape[-1])
        noise = self.draw_noise(len(images), size, generator)
        measure = _pixel_error if error is None else error
        chosen = torch.full((len(images),), tried[-1], device=self.device)
        errors = torch.full((len(images),), math.inf, device=self.device)
        open_ = torch.arange(len(images), device=self.device)
        for length in tried:
            decoded = self.decode(
                VisualTokens(ids=tokens.ids[open_, :length]), noise=noise[open_], image_size=size, **sampling
            )
            found = measure(decoded, images[open_]).float()
            errors[open_], chosen[open_] = found, length
            open_ = open_[found > max_error]
            if not len(open_):
                break
        longest = int(chosen.max())
        mask = torch.arange(longest, device=self.device) < chosen[:, None]
        kept = torch.where(mask, tokens.ids[:, :longest], 0)
        return TokenBudget(VisualTokens(ids=kept, mask=mask), chosen, errors, errors <= max_error)

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
            sampling: `num_inference_steps` (25), `guidance_scale` (7.5; a number, or a function of t; 1 is none),
                `guidance` (`"normalized"` or `"classifier_free"`), `image_size` ((height, width) in pixels).

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
        height, width = self._latent_size(image_size)
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
        num_inference_steps: int = 25,
        guidance_scale: GuidanceScale = 7.5,
        guidance: str = "normalized",
        image_size: int | Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """`decode` step by step: yields the latents [B, Z, h, w], float32, after each Euler step from t = 1 to 0.

        Arguments as in `decode`; they are checked at once.

        The condition is embedded once. Modulations depend on the moment alone, so those of all steps are computed
        before the first and kept for the next call with as many steps. Conditional and unconditional samples run in one
        batch, of different lengths: all dropped registers of a sample cost one row.
        """
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise InvalidInputError(f"num_inference_steps must be an integer >= 1; got {num_inference_steps!r}")
        if guidance not in GUIDANCE:
            raise InvalidInputError(f"guidance must be one of {', '.join(GUIDANCE)}; got {guidance!r}")
        if not callable(guidance_scale) and not math.isfinite(guidance_scale):
            raise InvalidInputError(f"guidance_scale must be a finite number or a function of t; got {guidance_scale}")
        ids, lengths = self._check_tokens(tokens)
        height, width = self._latent_size(image_size)
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
        blocks, head = self._modulations_of(steps)
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

    def _modulations_of(self, steps: int) -> tuple[list[Tensor], Tensor]:
        """Modulations of every block at the T moments of a run; kept until a weight or the number of steps changes."""
        parts = [self.decoder.time_embedding, self.decoder.head_modulation]
        parts += [block.modulation for block in self.decoder.blocks]
        sources = [parameter for part in parts for parameter in part.parameters()]
        moments = torch.tensor([(steps - step) / steps for step in range(steps)], device=self.device)
        if any(one.is_inference() for one in sources):  # such weights do not tell when they change
            return self.decoder.modulations(moments)
        stamp: list[Any] = [(one.data_ptr(), one._version, one.dtype, one.device) for one in sources]
        key = (steps, torch.is_autocast_enabled(self.device.type), stamp)
        if self._schedule is not None and self._schedule[0] == key:
            return self._schedule[2]
        found = self.decoder.modulations(moments)
        # The weights are held, so that no others can take their addresses and pass for them.
        self._schedule = (key, [one.detach() for one in sources], found)
        return found

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
        images = images.detach()
        if not bool(torch.isfinite(images).all()):
            raise InvalidOutputError("the decoded images contain NaN or infinite pixels: check the model's weights")
        scaled = (images.float() * 0.5 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return scaled
        if output_type == "np":
            return scaled.permute(0, 2, 3, 1).cpu().numpy()
        if output_type not in ("pil", "uint8"):
            raise InvalidInputError(f"output_type must be 'pil', 'np', 'pt' or 'uint8'; got {output_type!r}")
        pixels = (scaled * 255).to(torch.uint8).permute(0, 2, 3, 1)
        return pixels if output_type == "uint8" else [Image.fromarray(one) for one in pixels.cpu().numpy()]

    # -------------------------------------------------------------------------------------------- what is accepted
    def _check_length(self, num_tokens: int | None) -> int:
        if num_tokens is None:
            return self.num_registers
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or not 1 <= num_tokens <= self.num_registers:
            raise InvalidInputError(f"num_tokens must be an integer in 1..{self.num_registers}; got {num_tokens!r}")
        return num_tokens

    def _check_tokens(
        self, tokens: VisualTokens | Sequence[Tensor] | Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[int]]:
        """ids int64 [B, longest] on the model's device (0 where there is none), and the length of each sequence."""
        if isinstance(tokens, VisualTokens):
            if tokens.ids is None or tokens.grid is not None:
                raise InvalidInputError(
                    "FlexTok decodes ordered ids without a grid; were these made by FlexTok.encode?"
                )
            ids, lengths = tokens.ids, [tokens.num_tokens] * len(tokens)
            if tokens.mask is not None:
                mask = tokens.mask.cpu()
                if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                    raise InvalidInputError("the mask of tokens must be True at a prefix of each sequence")
                lengths = mask.sum(1).tolist()
                ids = torch.where(tokens.mask, ids, 0)
        else:
            rows = [torch.as_tensor(row).flatten().to(self.device) for row in tokens]
            wrong = [row.dtype for row in rows if len(row) and (row.is_floating_point() or row.dtype == torch.bool)]
            if wrong:
                raise InvalidInputError(f"token ids must be integers; got {wrong[0]}")
            lengths = [len(row) for row in rows]
            ids = torch.zeros(len(rows), max(lengths, default=0), dtype=torch.int64, device=self.device)
            for index, row in enumerate(rows):
                ids[index, : len(row)] = row
        if not lengths:
            raise InvalidInputError("no tokens were given; expected at least one sequence")
        if min(lengths) < 1 or max(lengths) > self.num_registers:
            raise InvalidInputError(
                f"a sequence must have 1..{self.num_registers} tokens; got lengths {min(lengths)}..{max(lengths)}"
            )
        ids = ids[:, : max(lengths)].to(self.device)
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= self.codebook_size:
            raise InvalidInputError(
                f"ids must lie in 0..{self.codebook_size - 1}; got {low}..{high}: do these tokens come from another "
                "tokenizer?"
            )
        return ids, lengths

    def _latent_size(self, image_size: int | Sequence[int] | None) -> tuple[int, int]:
        given = self.image_size if image_size is None else image_size
        height, width = (given, given) if isinstance(given, int) else (int(given[0]), int(given[1]))
        factor = self.downsample_factor * self.config.patch_size
        if min(height, width) < factor or height % factor or width % factor:
            raise InvalidInputError(f"image_size must be multiples of {factor}; got {height}x{width}")
        return height // self.downsample_factor, width // self.downsample_factor

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise InvalidInputError(f"images must be [B, 3, H, W]; got {list(images.shape)}")
        if not images.is_floating_point():
            raise InvalidInputError(f"images must be floating point in [-1, 1]; got {images.dtype}: use preprocess()")
        factor = self.downsample_factor * self.config.patch_size
        height, width = images.shape[-2:]
        if not height or not width or height % factor or width % factor:
            raise InvalidInputError(
                f"height and width must be multiples of {factor}, the side of a patch; got {height}x{width}: "
                "use preprocess(), which resizes and crops"
            )
        if images.numel():
            low, high = (float(value) for value in torch.aminmax(images))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise InvalidInputError("images contain NaN or infinite pixels")
            if max(-low, high) > 16.0:
                raise InvalidInputError(f"images must lie in [-1, 1]; got {low:.4g}..{high:.4g}: use preprocess()")

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
        own: Mapping[str, Any] | None = None
        if not isinstance(source, Mapping):
            path = Path(source)
            path = path / "model.safetensors" if path.is_dir() else path
            source, own = path, _own_config(path)
        if isinstance(config, (str, os.PathLike)) and str(config).endswith(".json"):
            config = _read_json(Path(config))
        if isinstance(config, str) and config in cls.published and own is not None:
            config = {**cls.published[config].config, **cls.config_from_official(own)}
        elif config is None:
            if own is None:
                raise CheckpointError(
                    f"{source if isinstance(source, Path) else 'the state dict'} holds no configuration: give the name "
                    f"of a published checkpoint ({', '.join(cls.published)}) or a config.json"
                )
            config = own
        assert isinstance(config, (str, Mapping))
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


def _build_vae(
    block_out_channels: Sequence[int], layers: int, groups: int, latent_channels: int, scaling_factor: float
) -> AutoencoderKL:
    """The frozen auto-encoder, as diffusers has it."""
    levels = len(block_out_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers,
        norm_num_groups=groups,
        latent_channels=latent_channels,
        sample_size=1024,
        scaling_factor=scaling_factor,
    )
    return vae.requires_grad_(False).eval()


def _pixel_error(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Mean squared error [B] of pixels in [0, 1]."""
    return ((reconstructions.clamp(-1, 1) - images).float() / 2).square().flatten(1).mean(1)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size` pixels (bilinear, antialiased), then the centre square."""
    if size < 1:
        raise InvalidInputError(f"size must be at least 1 pixel; got {size}")
    width, height = image.size
    if width <= height:
        target = (size, int(size * height / width))
    else:
        target = (int(size * width / height), size)
    if target != image.size:
        image = image.resize(target, Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def _own_config(path: Path) -> Mapping[str, Any] | None:
    """The authors' configuration in the header of a file, or in a `config.json` beside it; None if there is neither."""
    own: Mapping[str, Any] | None = None
    if path.suffix == ".safetensors" and path.is_file():
        own = official.parse_metadata(_safetensors_metadata(path))
    beside = path.with_name("config.json")
    if own is None and beside.is_file():
        content = _read_json(beside)
        own = content if official.is_official(content) else None
    return own


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no readable configuration ({error})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} must hold a dictionary; it holds a {type(content).__name__}")
    return content


def _safetensors_metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error})") from error
