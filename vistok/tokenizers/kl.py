"""KL tokenizers: an image becomes a grid of continuous tokens and back (KL-16, and any diffusers KL auto-encoder).

KL-16: "Autoregressive Image Generation without Vector Quantization", arXiv 2406.11838 (LTH14/mar, MIT): the
auto-encoder of latent diffusion (arXiv 2112.10752) with 16 x 16 pixels and 16 channels a token, without attention in
the decoder's levels. MAR, Hi-MAR and xAR write its tokens. The network is diffusers' `AutoencoderKL`; the table at the
end renames the authors' keys.

Top to bottom: configuration; objective; inference; cached moments; pictures; statistics; the authors' files.

Shape letters: B images, H, W pixels, C latent channels, h, w sides of the latents, p side of a patch of latents,
N = (h / p) (w / p) tokens an image, D = C p^2 channels of a token, f pixels a token covers in each direction.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook
from PIL import Image
from torch import Tensor

from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.files import atomic_path
from vistok.nn.adversarial import AdversarialLoss
from vistok.nn.diffusion import gaussian_noise
from vistok.nn.masked import patchify, unpatchify
from vistok.nn.model import VistokModel
from vistok.nn.sampling import Generators
from vistok.registry import Published
from vistok.tokenizers.pictures import (
    Pictures,
    check_images,
    padded_picture,
    postprocess_images,
    preprocess_images,
)
from vistok.tokens import VisualTokens

__all__ = [
    "KLLoss",
    "KLModel",
    "KLModelOutput",
    "LatentStatistics",
    "load_moments",
    "save_moments",
    "stock_autoencoder",
    "to_uint8",
]

# The authors' class leaves these at their values; the parity files vary them.
OFFICIAL_DEFAULTS: dict[str, Any] = {
    "embed_dim": 16,
    "ch_mult": (1, 1, 2, 2, 4),
    "ch": 128,
    "num_res_blocks": 2,
    "attn_resolutions": (16,),
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
}
OFFICIAL_IGNORED = {"use_variational", "ckpt_path", "double_z", "dropout", "resamp_with_conv", "z_channels"}
LATENT_SCALE = 0.2325


def official_configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `KLModel` from those of the authors' Encoder and Decoder.

    Raises:
        InvalidInputError: unknown names, or a first multiplier other than 1, which diffusers cannot express.
    """
    unknown = sorted(config.keys() - OFFICIAL_DEFAULTS.keys() - OFFICIAL_IGNORED)
    if unknown:
        raise InvalidInputError(
            f"unknown argument of the KL auto-encoder: {', '.join(unknown)}; known: {', '.join(OFFICIAL_DEFAULTS)}"
        )
    given = {**OFFICIAL_DEFAULTS, **{key: value for key, value in config.items() if key not in OFFICIAL_IGNORED}}
    multipliers = [int(value) for value in given["ch_mult"]]
    if config.get("z_channels", given["embed_dim"]) != given["embed_dim"]:
        raise InvalidInputError(
            f"embed_dim {given['embed_dim']} and z_channels {config['z_channels']} differ; they must be equal here"
        )
    if not multipliers or multipliers[0] != 1:
        raise InvalidInputError(f"ch_mult must begin with 1 (conv_in has the first level's width); got {multipliers}")
    levels = len(multipliers)
    # Whether a level has attention depends on the nominal resolution, not on the size of the images.
    attention = [given["resolution"] // 2**level in tuple(given["attn_resolutions"]) for level in range(levels)]
    return {
        "in_channels": given["in_channels"],
        "out_channels": given["out_ch"],
        "down_block_types": tuple("AttnDownEncoderBlock2D" if on else "DownEncoderBlock2D" for on in attention),
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(given["ch"] * factor for factor in multipliers),
        "layers_per_block": given["num_res_blocks"],
        "latent_channels": given["embed_dim"],
        "sample_size": given["resolution"],
        "scaling_factor": LATENT_SCALE,
    }


@dataclass
class KLModelOutput:
    """Result of `KLModel.forward`.

    Attributes:
        sample: reconstruction [B, 3, H, W], about [-1, 1], not clamped.
        posterior: the distribution of the latents.
        bottleneck_loss: scalar, the weighted KL divergence, ready to be added to a mean error of pixels.
    """

    sample: Tensor
    posterior: DiagonalGaussianDistribution
    bottleneck_loss: Tensor


@dataclass(frozen=True)
class LatentStatistics:
    """Moments of a tokenizer's latents over some images, before any scaling.

    Attributes:
        mean, std: over all values.
        channel_mean, channel_std: of each channel, float64 [C].
        count: values measured.
    """

    mean: float
    std: float
    channel_mean: Tensor
    channel_std: Tensor
    count: int

    @property
    def scaling_factor(self) -> float:
        """What brings the latents to standard deviation 1 (MAR: 0.2325; the mean is not corrected)."""
        return 1.0 / self.std


class KLLoss(AdversarialLoss):
    """Reconstruction + perceptual + adversarial losses and the KL divergence (arguments: `AdversarialLoss`).

    Latent diffusion's settings: `reconstruction="l1"`, `adaptive_weight=True`, `adversarial_start=50001`, and a
    `kl_weight` of 1e-6 in the model. One training step:

        output = model(images)
        losses = objective.generator_turn(images, output.sample, output.bottleneck_loss, step, model.last_layer)
        losses["loss"].backward()                 # then step the optimiser of the model
        losses = objective.discriminator_turn(images, output.sample, step)
        losses["loss"].backward()                 # then step the optimiser of objective.discriminator
    """

    bottleneck = "kl"


class KLModel(VistokModel, AutoencoderKL):
    """Convolutional auto-encoder with a Gaussian bottleneck.

    A diffusers `AutoencoderKL` (same arguments, same defaults, same keys) that speaks `VisualTokens`: `encode` and
    `decode` apply the scale, `from_pretrained` takes any folder or Hub repository with a KL auto-encoder
    (`KLModel.from_pretrained("stabilityai/sd-vae-ft-ema", patch_size=2)` is MAR's KL-8). Slicing, tiling, gradient
    checkpointing and attention processors are diffusers'.

    Fully convolutional: any H and W divisible by `downsample_factor`.

    Args:
        in_channels, out_channels: channels of the images.
        down_block_types: an encoder block a level, finest first.
        up_block_types: a decoder block a level, coarsest first.
        block_out_channels: channels of each level, finest first.
        layers_per_block: residual blocks an encoder level (the decoder has one more).
        act_fn: nonlinearity.
        latent_channels: C.
        norm_num_groups: groups of the normalisations.
        sample_size: side of the training images in pixels; larger ones are tiled once `enable_tiling` was called.
        scaling_factor: tokens are latents times this.
        shift_factor: subtracted from the latents before scaling; None for nothing.
        latents_mean, latents_std: [C], subtracted and divided by before scaling; None for nothing.
        force_upcast: read by diffusers' pipelines only.
        use_quant_conv, use_post_quant_conv: 1x1 convolutions around the bottleneck.
        mid_block_add_attention: attention between the two middle blocks.
        patch_size: p; a token is a p x p patch of latents, channel by channel.
        kl_weight: weight of the KL divergence in nats an image against the *sum* of errors over pixel values (latent
            diffusion's convention).

    Raises:
        InvalidInputError: if the arguments do not fit each other.
    """

    system: ClassVar[str] = "kl"
    # diffusers' own class reads its folder.
    ships_packed: ClassVar[bool] = False
    published: ClassVar[dict[str, Published]] = {
        "kl16.mar": Published(
            name="kl16.mar",
            system="kl",
            config=official_configuration({}),
            hub_id="jadechoghari/mar",  # a mirror; the authors' own kl16.ckpt is not on the Hub
            hub_file="kl16.safetensors",
            licence="mit",
            paper="2406.11838",
            origin="https://github.com/LTH14/mar",
            image_size=256,
            num_tokens=256,
            preprocessing="ADM centre crop, RGB scaled to [-1, 1]",
            parameters=66_456_019,
        )
    }

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        patch_size: int = 1,
        kl_weight: float = 1e-6,
    ) -> None:
        levels = len(block_out_channels)
        if len(down_block_types) != levels or len(up_block_types) != levels:
            raise InvalidInputError(
                f"down_block_types, up_block_types and block_out_channels need one entry a level; got "
                f"{len(down_block_types)}, {len(up_block_types)} and {levels}"
            )
        if any(width % norm_num_groups for width in block_out_channels):
            raise InvalidInputError(
                f"block_out_channels must be multiples of norm_num_groups ({norm_num_groups}); got "
                f"{list(block_out_channels)}"
            )
        if not (math.isfinite(scaling_factor) and scaling_factor > 0):
            raise InvalidInputError(f"scaling_factor must be a positive number; got {scaling_factor}")
        for name, values in (("latents_mean", latents_mean), ("latents_std", latents_std)):
            if values is not None and len(values) != latent_channels:
                raise InvalidInputError(f"{name} needs {latent_channels} values, one a channel; got {len(values)}")
        if patch_size < 1:
            raise InvalidInputError(f"patch_size must be at least 1; got {patch_size}")
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=cast(Any, tuple(down_block_types)),
            up_block_types=cast(Any, tuple(up_block_types)),
            block_out_channels=cast(Any, tuple(block_out_channels)),
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=cast(Any, latents_mean),
            latents_std=cast(Any, latents_std),
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )

    @classmethod
    def from_single_file(cls, *arguments: Any, **options: Any) -> KLModel:
        """Refused: diffusers' converter leaves out the attention of the encoder's levels, which KL-16 has.

        Raises:
            InvalidInputError: always; use `from_official`.
        """
        raise InvalidInputError(
            "KLModel.from_single_file would lose the attention of the encoder's levels; use "
            'KLModel.from_official("kl16.ckpt", "kl16.mar")'
        )

    @classmethod
    def tiny(cls, **overrides: Any) -> KLModel:
        """Random weights in eval mode: 2x downsampling, 4 channels."""
        arguments: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (16, 16),
            "norm_num_groups": 8,
            "latent_channels": 4,
            "sample_size": 8,
            "scaling_factor": 1.0,
        }
        return cls(**{**arguments, **overrides}).eval()

    @property
    def downsample_factor(self) -> int:
        """Pixels a token covers in each direction, f."""
        return 2 ** (len(self.config.block_out_channels) - 1) * self.config.patch_size

    @property
    def token_size(self) -> int:
        """Channels of a token, D."""
        return self.config.latent_channels * self.config.patch_size**2

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, where `KLLoss` balances gradients."""
        return self.decoder.conv_out.weight

    # ---- objective

    def forward(self, images: Tensor, *, generator: Generators = None) -> KLModelOutput:
        """Encode, sample the posterior (in training; else its mean) and decode.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            generator: draws of the posterior.
        """
        posterior = self.posterior(images)
        latents = sample_posterior(posterior, generator) if self.training else posterior.mode()
        # The sum over pixel values and the KL an image, both divided by the pixel values an image.
        weight = self.config.kl_weight / images[0].numel()
        return KLModelOutput(self._decoded(latents), posterior, weight * posterior.kl().mean())

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Squared error plus the KL divergence.

        The published objective with its absolute, perceptual and adversarial terms is `KLLoss`. The absolute error
        alone is content with grey scenes for a long time.

        Args:
            batch: `images` [B, 3, H, W] in [-1, 1].
            generator: draws of the posterior.

        Returns:
            `loss`, `reconstruction` (mean squared error) and `kl` (weighted).
        """
        images = batch["images"]
        output = self(images, generator=generator)
        reconstruction = F.mse_loss(output.sample.float(), images.float())
        return {
            "loss": reconstruction + output.bottleneck_loss,
            "reconstruction": reconstruction.detach(),
            "kl": output.bottleneck_loss.detach(),
        }

    # ---- inference

    def posterior(self, images: Tensor) -> DiagonalGaussianDistribution:
        """Distribution of the (unscaled) latents [B, C, h, w] of images [B, 3, H, W]; float32, log-variance clamped to
        [-30, 20].
        """
        return DiagonalGaussianDistribution(self.moments(images).float())

    @apply_forward_hook
    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance, stacked to [B, 2C, h, w] and not clamped, of images [B, 3, H, W]."""
        images = images.to(self.dtype)
        if self.use_slicing and len(images) > 1:
            return torch.cat([self._encode(image) for image in images.split(1)])
        return self._encode(images)

    @torch.no_grad()
    def encode(self, images: Tensor, *, sample: bool = False, generator: Generators = None) -> VisualTokens:
        """Images to tokens.

        Args:
            images: float [B, 3, H, W] in [-1, 1]; H and W divisible by `downsample_factor`.
            sample: draw from the posterior (as generators are trained); False takes its mean.
            generator: one for all images, or one an image.

        Returns:
            Scaled `features` [B, N, D] in raster order, with `grid`.

        Raises:
            InvalidInputError: wrong shape, channels, size, type or range; NaN or infinite pixels.
            InvalidOutputError: if the encoder produces NaNs.
        """
        check_images(images, self.config.in_channels, self.downsample_factor)
        return self.tokens_from_moments(self.moments(images), sample=sample, generator=generator)

    def tokens_from_moments(
        self, moments: Tensor, *, sample: bool = True, generator: Generators = None
    ) -> VisualTokens:
        """Tokens from moments [B, 2C, h, w], such as cached ones (arguments as in `encode`).

        Raises:
            InvalidInputError: wrong shape.
            InvalidOutputError: NaNs.
        """
        channels = 2 * self.config.latent_channels
        if moments.ndim != 4 or moments.shape[1] != channels:
            raise InvalidInputError(f"moments must be [B, {channels}, h, w]; got {list(moments.shape)}")
        posterior = DiagonalGaussianDistribution(moments.float())
        latents = sample_posterior(posterior, generator) if sample else posterior.mode()
        if not bool(torch.isfinite(latents).all()):
            raise InvalidOutputError(
                "the latents are NaN or infinite: check the weights, or encode in float32 or bfloat16"
            )
        return self.tokens_from_latents(self.scale_latents(latents))

    @torch.no_grad()
    def decode(self, tokens: VisualTokens, *, generator: Generators = None) -> Tensor:
        """Tokens to images.

        Args:
            tokens: scaled features [B, N, D]; without a `grid`, N must be a square number.
            generator: accepted for symmetry with stochastic decoders; this one draws nothing.

        Returns:
            [B, 3, H, W], about [-1, 1], not clamped.

        Raises:
            InvalidInputError: no features, NaNs, features of another width, or no way to lay them out.
        """
        latents = self.latents_from_tokens(tokens)
        if not bool(torch.isfinite(latents).all()):
            raise InvalidInputError("the features of these tokens are NaN or infinite; did the generator overflow?")
        return self._decoded(self.unscale_latents(latents.to(self.device)))

    @apply_forward_hook
    def _decoded(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.dtype)
        if self.use_slicing and len(latents) > 1:
            return torch.cat([self._decode(part).sample for part in latents.split(1)])
        return self._decode(latents).sample

    def scale_latents(self, latents: Tensor) -> Tensor:
        """What generators see: (z - mean) / std * scale, or (z - shift) * scale, [B, C, h, w]."""
        shift, factor = self._affine(latents)
        return (latents - shift) * factor

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `scale_latents`."""
        shift, factor = self._affine(latents)
        return latents / factor + shift

    def _affine(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        config = self.config
        shift: Tensor | float = config.shift_factor or 0.0
        factor: Tensor | float = config.scaling_factor
        if config.latents_mean is not None:
            shift = shift + latents.new_tensor(config.latents_mean).view(-1, 1, 1)
        if config.latents_std is not None:
            factor = factor / latents.new_tensor(config.latents_std).view(-1, 1, 1)
        return shift, factor

    def tokens_from_latents(self, latents: Tensor) -> VisualTokens:
        """Scaled latents [B, C, h, w] as tokens; channels of a token are those of C, each with its p x p places.

        Raises:
            InvalidInputError: sides not divisible by p.
        """
        side = self.config.patch_size
        height, width = latents.shape[2:]
        if height % side or width % side:
            raise InvalidInputError(f"latents of {height}x{width} do not divide into patches of {side}x{side}")
        grid = (height // side, width // side)
        return VisualTokens(features=patchify(latents, side), grid=grid)

    def latents_from_tokens(self, tokens: VisualTokens) -> Tensor:
        """The inverse of `tokens_from_latents`.

        Raises:
            InvalidInputError: no features, features of another width, or no way to lay them out.
        """
        if tokens.features is None:
            raise InvalidInputError("KLModel.decode needs features; these tokens are ids of a codebook (use VQModel)")
        _, total, width = tokens.features.shape
        if width != self.token_size:
            raise InvalidInputError(
                f"this tokenizer's tokens have {self.token_size} channels, these have {width}: do they come from a "
                "generator for another tokenizer?"
            )
        root = math.isqrt(total)
        if tokens.grid is None and root * root != total:
            raise InvalidInputError(f"{total} tokens without a grid: give VisualTokens(grid=(rows, cols))")
        rows, cols = tokens.grid or (root, root)
        return unpatchify(tokens.features, (rows, cols), self.config.patch_size)

    # ---- cached moments

    @torch.no_grad()
    def cached_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Moments [B, 2C, h, w] of images and of their mirror images, both encoded in one batch.

        With them a generator is trained without the encoder: each epoch picks one of the two and samples the posterior
        anew (`tokens_from_moments`).
        """
        check_images(images, self.config.in_channels, self.downsample_factor)
        both = self.moments(torch.cat([images, images.flip(-1)]))
        straight, mirrored = both.chunk(2)
        return straight, mirrored

    # ---- pictures

    def preprocess(self, images: Pictures, size: int | tuple[int, int] | None = None) -> Tensor:
        """Pictures to a batch that `encode` accepts, float32 [B, 3, H, W] in [-1, 1] on the CPU.

        Args:
            images: a picture, a path, or a list of them.
            size: side of a square or (height, width), divisible by `downsample_factor`: pictures are scaled to cover it
                and cut to the centre (ADM's centre crop). None keeps the scale and cuts at most
                `downsample_factor - 1` pixels a direction.

        Raises:
            InvalidInputError: unreadable pictures, pictures smaller than a token, or unequal sizes without `size`.
        """
        return preprocess_images(images, size, self.downsample_factor)

    def postprocess(self, images: Tensor, output_type: str = "pil") -> Any:
        """Images [B, 3, H, W] in [-1, 1] to pictures.

        Args:
            images: output of `decode`; values outside the range are clamped.
            output_type: `"pil"`, `"uint8"` (tensor [B, H, W, 3], rounded half to even), `"np"` (float [B, H, W, 3] in
                [0, 1]) or `"pt"` (float [B, 3, H, W] in [0, 1]).

        Raises:
            InvalidOutputError: if there are NaNs.
        """
        return postprocess_images(images, output_type, to_uint8)

    @torch.no_grad()
    def reconstruct(self, image: Image.Image | str | os.PathLike[str]) -> Image.Image:
        """A picture of any size through the tokens and back, in its own size (padded by reflection meanwhile)."""
        padded, (height, width) = padded_picture(image, self.downsample_factor)
        decoded = self.decode(self.encode(padded.to(self.device)))
        return self.postprocess(decoded[..., :height, :width])[0]

    # ---- statistics

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[Tensor], *, generator: Generators = None) -> LatentStatistics:
        """Mean and standard deviation of sampled latents over batches of images [B, 3, H, W]: where a scale comes from.

        Raises:
            InvalidInputError: no images.
        """
        count = 0
        total = torch.zeros(self.config.latent_channels, dtype=torch.float64)
        squares = torch.zeros_like(total)
        for images in batches:
            check_images(images, self.config.in_channels, self.downsample_factor)
            latents = sample_posterior(self.posterior(images.to(self.device)), generator).double().cpu()
            total += latents.sum((0, 2, 3))
            squares += latents.square().sum((0, 2, 3))
            count += latents[:, 0].numel()
        if not count:
            raise InvalidInputError("no images were given to measure latents of")
        mean, power = total / count, squares / count
        variance = float(power.mean() - mean.mean().square())
        deviation = (power - mean.square()).clamp_min(0).sqrt()
        return LatentStatistics(float(mean.mean()), math.sqrt(variance), mean, deviation, count * len(mean))

    @torch.no_grad()
    def absorb_statistics(self, statistics: LatentStatistics) -> None:
        """Give every latent channel mean 0 and deviation 1, in the convolutions around the bottleneck.

        Images are decoded as before. What MAR corrects by one factor is then right for each channel, also for
        pipelines of diffusers that know a `scaling_factor` only (which becomes 1).

        Raises:
            InvalidInputError: a model without these convolutions, or a channel that never varies.
        """
        if self.quant_conv is None or self.post_quant_conv is None:
            raise InvalidInputError("only models with use_quant_conv and use_post_quant_conv can absorb statistics")
        mean, std = (value.float() for value in (statistics.channel_mean, statistics.channel_std))
        if not bool((std > 0).all()):
            raise InvalidInputError(f"latent channels {(std == 0).nonzero().flatten().tolist()} never vary")
        encode, decode = self.quant_conv, self.post_quant_conv
        assert encode.bias is not None
        assert decode.bias is not None
        decode.bias += decode.weight[:, :, 0, 0] @ mean.to(decode.weight)
        decode.weight *= std.to(decode.weight)[None, :, None, None]
        # The upper half is the log-variance, which std shifts.
        encode.weight[: len(std)] /= std.to(encode.weight)[:, None, None, None]
        encode.bias -= torch.cat([mean, 2 * std.log()]).to(encode.bias)
        encode.bias[: len(std)] /= std.to(encode.bias)
        self.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)

    # ---- the authors' files

    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """From the authors' arguments (`embed_dim`, `ch_mult`, ...); diffusers' pass unchanged."""
        official = config.keys() & (OFFICIAL_DEFAULTS.keys() - {"in_channels"})
        return official_configuration(config) if official or not config else dict(config)

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weights under "model" (MAR) or "state_dict" (latent diffusion), without the objective's (`loss.*`)."""
        for key in ("model", "state_dict"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
                break
        return {key: value for key, value in state.items() if not key.startswith(("loss.", "model_ema."))}

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The CompVis names to diffusers'; attention projections become matrices."""
        numbers = [found[1] for key in state if (found := re.match(r"decoder\.up\.(\d+)\.", key))]
        levels = 1 + max(map(int, numbers), default=0)
        renamed = {}
        for key, value in state.items():
            name = diffusers_key(key, levels)
            projection = re.search(r"\.(to_q|to_k|to_v|to_out\.0)\.weight$", name) is not None
            renamed[name] = value.flatten(1) if projection and value.ndim == 4 else value
        return renamed

    @classmethod
    def rename_diffusers(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights that early versions of diffusers saved, under today's names (`from_pretrained` does it by itself)."""
        return {
            re.sub(
                r"(\.attentions\.\d+\.)(query|key|value|proj_attn)\.",
                lambda found: found[1] + EARLY_ATTENTION_NAMES[found[2]] + ".",
                key,
            ): value
            for key, value in state.items()
        }

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the CompVis names, which `from_official` reads back."""
        return official_state(self.state_dict(), len(self.config.block_out_channels))

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise a VQGAN of the same layout, and generators."""
        if any(key.startswith("quantize.") for key in unexpected):
            return "This is a VQGAN (it has a codebook), not a KL auto-encoder."
        if any(key.startswith(("encoder_blocks.", "diffloss.", "class_emb.")) for key in unexpected):
            return "This is a generator (MAR, Hi-MAR or xAR), not an image tokenizer."
        if any("_blocks." in key and ".attentions." in key for key in [*missing, *unexpected]):
            return "Attention lies at other levels: check attn_resolutions and resolution."
        return None


def sample_posterior(posterior: DiagonalGaussianDistribution, generator: Generators = None) -> Tensor:
    """mean + std * N(0, 1), [B, C, h, w]; a list of generators holds one an image."""
    mean = posterior.mean
    return mean + posterior.std * gaussian_noise(mean.shape, generator, mean.device).to(mean.dtype)


def to_uint8(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] as uint8 [B, H, W, 3]: clipped after scaling to 0..255, rounded half to even."""
    scaled = (255.0 * (images.detach().float() + 1.0) / 2.0).clamp(0.0, 255.0)
    return scaled.round().permute(0, 2, 3, 1).to(torch.uint8)


def save_moments(path: str | os.PathLike[str], moments: Tensor, mirrored: Tensor) -> None:
    """Write the moments [2C, h, w] of one image and of its mirror image as MAR's cache does: an .npz with `moments`
    and `moments_flip`. Their type is kept: float16 halves the file (bfloat16 becomes float32).
    """
    arrays = {}
    for name, value in (("moments", moments), ("moments_flip", mirrored)):
        value = value.detach().cpu()
        arrays[name] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def load_moments(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor]:
    """Read what `save_moments`, or MAR's caching script, wrote: float32 [2C, h, w], straight and mirrored.

    Raises:
        CheckpointError: if the file is none or is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            straight, mirrored = (
                torch.from_numpy(archive[name].astype(np.float32)) for name in ("moments", "moments_flip")
            )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(
            f"{path} holds no cached moments ({error}); expected an .npz with moments and moments_flip"
        ) from error
    except Exception as error:  # zipfile.BadZipFile, zlib.error: what numpy lets through for truncated files
        raise CheckpointError(f"{path} is damaged: {error}; encode the image again") from error
    return straight, mirrored


# (pattern of an official key, diffusers' name); `{level}` counts the decoder's levels from the coarsest.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^(encoder|decoder)\.mid\.block_1\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.mid\.block_2\.", r"\1.mid_block.resnets.1."),
    (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.attn\.(\d+)\.", r"encoder.down_blocks.\1.attentions.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.conv\.", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"^decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^decoder\.up\.(\d+)\.attn\.(\d+)\.", r"decoder.up_blocks.\1.attentions.\2."),
    (r"^decoder\.up\.(\d+)\.upsample\.conv\.", r"decoder.up_blocks.\1.upsamplers.0.conv."),
)
ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
EARLY_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def stock_autoencoder(model: AutoencoderKL) -> AutoencoderKL:
    """The plain diffusers class of an auto-encoder, which pipelines expect, on the same weights.

    Its latents times its `scaling_factor` are the tokens of a KL tokenizer.
    """
    if type(model) is AutoencoderKL:
        return model
    names = inspect.signature(AutoencoderKL.__init__).parameters
    with torch.device("meta"):
        stock = AutoencoderKL(**{name: value for name, value in model.config.items() if name in names})
    stock.load_state_dict(model.state_dict(), strict=True, assign=True)
    return stock.eval()


def diffusers_key(key: str, levels: int) -> str:
    """diffusers' name of an official key; unknown keys keep theirs."""
    for pattern, replacement in RENAMES:
        renamed = re.sub(pattern, replacement, key)
        if renamed != key:
            key = renamed
            break
    key = key.replace(".nin_shortcut.", ".conv_shortcut.")
    key = re.sub(
        r"(\.attentions\.\d+\.)(norm|q|k|v|proj_out)\.", lambda found: found[1] + ATTENTION_NAMES[found[2]] + ".", key
    )
    return re.sub(
        r"^decoder\.up_blocks\.(\d+)\.", lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}.", key
    )


def official_state(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The inverse of `KLModel.rename_official`."""
    inverse = {ours: theirs for theirs, ours in ATTENTION_NAMES.items()}
    blocks = {"down_blocks": "down", "up_blocks": "up"}
    layers = {"resnets": "block", "attentions": "attn"}
    official = {}
    for key, value in state.items():
        key = re.sub(
            r"^decoder\.up_blocks\.(\d+)\.", lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}.", key
        )
        projection = re.search(r"\.(to_q|to_k|to_v|to_out\.0)\.weight$", key) is not None
        key = re.sub(
            r"(\.attentions\.\d+\.)(group_norm|to_q|to_k|to_v|to_out\.0)\.",
            lambda found: found[1] + inverse[found[2]] + ".",
            key,
        )
        key = key.replace(".conv_norm_out.", ".norm_out.").replace(".conv_shortcut.", ".nin_shortcut.")
        key = key.replace(".mid_block.resnets.0.", ".mid.block_1.").replace(".mid_block.resnets.1.", ".mid.block_2.")
        key = key.replace(".mid_block.attentions.0.", ".mid.attn_1.")
        key = re.sub(r"\.(down_blocks|up_blocks)\.", lambda found: f".{blocks[found[1]]}.", key)
        key = re.sub(r"\.(resnets|attentions)\.(\d+)\.", lambda found: f".{layers[found[1]]}.{found[2]}.", key)
        key = re.sub(r"\.(downsample|upsample)rs\.0\.conv\.", lambda found: f".{found[1]}.conv.", key)
        official[key] = value[..., None, None] if projection else value
    return official
