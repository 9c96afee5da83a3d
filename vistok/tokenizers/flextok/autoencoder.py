"""The auto-encoder between pixels and the latents that FlexTok works on: its own, another tokenizer's, or none.

Letters: B images, H, W pixels, Z, h, w channels and sides of the latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.nn.diffusion import gaussian_noise
from vistok.nn.sampling import Generators
from vistok.tokens import VisualTokens

__all__ = [
    "Autoencoder",
    "build_vae",
    "check_autoencoder",
    "tokenizer_images",
    "tokenizer_latents",
    "vae_images",
    "vae_latents",
]


class Autoencoder(Protocol):
    """A KL tokenizer (`KLModel`) in the place of FlexTok's own auto-encoder; it brings its scale along."""

    @property
    def downsample_factor(self) -> int:
        """Pixels of a token in each direction."""
        ...

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance [B, 2 Z, h, w] of images [B, 3, H, W]."""
        ...

    def tokens_from_moments(
        self, moments: Tensor, *, sample: bool = True, generator: Generators = None
    ) -> VisualTokens:
        """Scaled tokens of moments."""
        ...

    def latents_from_tokens(self, tokens: VisualTokens) -> Tensor:
        """Tokens laid out as latents [B, Z, h, w]."""
        ...

    def tokens_from_latents(self, latents: Tensor) -> VisualTokens:
        """The inverse."""
        ...

    def decode(self, tokens: VisualTokens) -> Tensor:
        """Tokens to images [B, 3, H, W]."""
        ...


def check_autoencoder(autoencoder: Any, latent_channels: int, factor: int) -> None:
    """Raise InvalidInputError unless a given tokenizer makes latents of this kind."""
    if not (hasattr(autoencoder, "moments") and hasattr(autoencoder, "latents_from_tokens")):
        raise InvalidInputError(
            f"FlexTok's auto-encoder must be a KL tokenizer, such as KLModel; got a {type(autoencoder).__name__}"
        )
    found = int(autoencoder.config.latent_channels), int(autoencoder.downsample_factor)
    if found != (latent_channels, factor) or autoencoder.config.get("patch_size", 1) != 1:
        raise InvalidInputError(
            f"this FlexTok works on latents of {latent_channels} channels, one for {factor}x{factor} pixels; the "
            f"auto-encoder makes {found[0]} channels for {found[1]}x{found[1]} pixels"
        )


def build_vae(
    block_out_channels: Sequence[int], layers: int, groups: int, latent_channels: int, scaling_factor: float
) -> AutoencoderKL:
    """FlexTok's own auto-encoder, frozen, as diffusers has it."""
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


@torch.no_grad()
def vae_latents(
    vae: AutoencoderKL,
    images: Tensor,
    scale: float,
    *,
    sample: bool,
    generator: Generators,
    noise: Tensor | None,
) -> Tensor:
    """Images [B, 3, H, W] to scaled latents [B, Z, h, w], float32; convolutions stay out of autocast.

    Args:
        vae: FlexTok's own auto-encoder.
        images: in [-1, 1].
        scale: of the latents.
        sample: draw from the posterior; otherwise its mean.
        generator: source of the draws.
        noise: standard normal [B, Z, h, w] to use instead of draws.
    """
    with torch.autocast(images.device.type, enabled=False):
        posterior = vae.encode(images.to(vae.dtype)).latent_dist
        latents = posterior.mean
        if sample:
            if noise is None:
                noise = gaussian_noise(latents.shape, generator, latents.device)
            latents = latents + posterior.std * noise.to(latents)
    return latents.float() * scale


@torch.no_grad()
def vae_images(vae: AutoencoderKL, latents: Tensor, scale: float) -> Tensor:
    """Scaled latents [B, Z, h, w] to images [B, 3, H, W], float32, not clamped."""
    with torch.autocast(latents.device.type, enabled=False):
        return vae.decode((latents.float() / scale).to(vae.dtype)).sample.float()


@torch.no_grad()
def tokenizer_latents(autoencoder: Autoencoder, images: Tensor, *, sample: bool, generator: Generators) -> Tensor:
    """`vae_latents` of a given tokenizer, which scales them itself."""
    with torch.autocast(images.device.type, enabled=False):
        tokens = autoencoder.tokens_from_moments(autoencoder.moments(images), sample=sample, generator=generator)
        return autoencoder.latents_from_tokens(tokens).float()


@torch.no_grad()
def tokenizer_images(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """`vae_images` of a given tokenizer."""
    with torch.autocast(latents.device.type, enabled=False):
        return autoencoder.decode(autoencoder.tokens_from_latents(latents.float())).float()
