"""VQ tokenizer: an image becomes a grid of integers and back (LlamaGen's VQ-16 and VQ-8).

Paper: "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", arXiv 2406.06525, section 3.1, after
VQGAN (arXiv 2012.09841) and ViT-VQGAN's normalised, low-dimensional codes (arXiv 2110.04627).
Origin of the weights: FoundationVision/LlamaGen (MIT). PAR, NAR, RandAR and others generate for the same tokenizer.

Top to bottom: configuration and network; objective; inference; pictures; report; the authors' files. The quantiser, the
tables of official names and the adversarial loss are the neighbours of this file.

Shape letters: B images, H, W pixels, f downsampling factor, h = H / f, w = W / f, N = h * w tokens an image,
C code dimension, K codes, Z channels of the auto-encoder's bottleneck.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from PIL import Image
from torch import Tensor, nn

from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.files import read_state_dict
from vistok.kernels.nearest_code import nearest_code
from vistok.nn.conv import ConvDecoder, ConvEncoder, merge_attention_keys, run_tiled, split_attention_keys
from vistok.nn.model import VistokModel
from vistok.registry import Published
from vistok.tokenizers.pictures import (
    Pictures,
    check_images,
    padded_picture,
    postprocess_images,
    preprocess_images,
)
from vistok.tokenizers.transforms import to_uint8
from vistok.tokens import VisualTokens

from .names import OFFICIAL_ARGUMENTS, OFFICIAL_PRESETS, OFFICIAL_TO_OURS, OURS_TO_OFFICIAL, VQ8, VQ16
from .quantizer import CodebookReport, QuantizerOutput, VectorQuantizer

__all__ = ["VQModel", "VQModelOutput"]


@dataclass
class VQModelOutput:
    """Result of `VQModel.forward`.

    Attributes:
        sample: reconstruction [B, 3, H, W], about [-1, 1], not clamped.
        quantization: ids, losses and usage.
    """

    sample: Tensor
    quantization: QuantizerOutput

    @property
    def bottleneck_loss(self) -> Tensor:
        """Scalar, the losses of the quantiser, ready to be added to a mean error of pixels."""
        return self.quantization.loss

    @property
    def usage(self) -> Tensor | None:
        """Fraction of the codebook in use, where it is measured."""
        return self.quantization.usage


@dataclass(frozen=True)
class _Tables:
    """Tables of inference, and which weights they were made of (held, so that no other tensor takes their address)."""

    stamp: list[tuple[Any, ...]]
    codes: Tensor
    features: Tensor
    sources: list[Tensor]


def _published(
    name: str, hub_id: str, hub_file: str, multipliers: tuple[int, ...], size: int, parameters: int
) -> Published:
    factor = 2 ** (len(multipliers) - 1)
    return Published(
        name=name,
        system="vq",
        config={"encoder_channel_multipliers": multipliers, "decoder_channel_multipliers": multipliers},
        hub_id=hub_id,
        hub_file=hub_file,
        licence="mit",
        paper="2406.06525",
        origin="https://github.com/FoundationVision/LlamaGen",
        image_size=size,
        num_tokens=(size // factor) ** 2,
        codebook_size=16384,
        preprocessing="ADM centre crop, RGB scaled to [-1, 1]",
        parameters=parameters,
    )


class VQModel(VistokModel):
    """Convolutional auto-encoder with a vector-quantised bottleneck.

    Fully convolutional: any H and W divisible by `downsample_factor`. The defaults are VQ-16.

    Args:
        in_channels: channels of the images.
        base_channels: width that the multipliers refer to; a multiple of `norm_groups`.
        encoder_channel_multipliers: width of each encoder level, finest first; each level after the first halves.
        decoder_channel_multipliers: the same of the decoder, also finest first.
        num_res_blocks: residual blocks an encoder level (the decoder has one more).
        z_channels: width Z of the bottleneck before and after quantisation.
        codebook_size: number of codes K.
        codebook_dim: dimension of a code C.
        commitment_weight: weight of the commitment loss.
        entropy_weight: weight of the entropy loss; 0 leaves it out.
        l2_normalize: compare and decode unit vectors.
        dropout: dropout of the residual blocks.
        attention: `"bottleneck"` puts attention after each residual block of the coarsest level (published),
            `"middle"` only between the two middle blocks.
        usage_window: recent tokens that `usage` and dead codes are judged by.
        revive_dead_codes: replace unused codes during training (see `VectorQuantizer`).
        norm_groups: groups of the normalisations; 32 in the published models, fewer where layers are narrow.

    Raises:
        InvalidInputError: if the arguments do not fit each other.
    """

    system: ClassVar[str] = "vq"
    published: ClassVar[dict[str, Published]] = {
        entry.name: entry
        for entry in (
            _published("vq16.imagenet", "FoundationVision/LlamaGen", "vq_ds16_c2i.pt", VQ16, 256, 71_883_403),
            _published("vq16.t2i", "peizesun/llamagen_t2i", "vq_ds16_t2i.pt", VQ16, 256, 71_883_403),
            _published("vq8.imagenet", "FoundationVision/LlamaGen", "vq_ds8_c2i.pt", VQ8, 256, 70_109_835),
        )
    }
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        encoder_channel_multipliers: Sequence[int] = VQ16,
        decoder_channel_multipliers: Sequence[int] = VQ16,
        num_res_blocks: int = 2,
        z_channels: int = 256,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        l2_normalize: bool = True,
        dropout: float = 0.0,
        attention: str = "bottleneck",
        usage_window: int = 65536,
        revive_dead_codes: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        if base_channels % norm_groups:
            raise InvalidInputError(
                f"base_channels must be a multiple of norm_groups ({norm_groups}); got {base_channels}"
            )
        if len(encoder_channel_multipliers) != len(decoder_channel_multipliers):
            raise InvalidInputError(
                f"encoder and decoder need the same number of levels; got {list(encoder_channel_multipliers)} and "
                f"{list(decoder_channel_multipliers)}"
            )
        if attention not in ("bottleneck", "middle"):
            raise InvalidInputError(f"attention must be 'bottleneck' or 'middle'; got {attention!r}")
        coarsest = len(encoder_channel_multipliers) - 1
        attention_levels = (coarsest,) if attention == "bottleneck" else ()
        self.encoder = ConvEncoder(
            in_channels,
            base_channels,
            encoder_channel_multipliers,
            num_res_blocks,
            z_channels,
            attention_levels=attention_levels,
            dropout=dropout,
            norm_groups=norm_groups,
        )
        self.quant_conv = nn.Conv2d(z_channels, codebook_dim, 1)
        self.quantizer = VectorQuantizer(
            codebook_size,
            codebook_dim,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            l2_normalize=l2_normalize,
            usage_window=usage_window,
            revive_dead_codes=revive_dead_codes,
        )
        self.post_quant_conv = nn.Conv2d(codebook_dim, z_channels, 1)
        self.decoder = ConvDecoder(
            z_channels,
            base_channels,
            decoder_channel_multipliers,
            num_res_blocks,
            in_channels,
            attention_levels=attention_levels,
            dropout=dropout,
            norm_groups=norm_groups,
        )
        self.tile_size: int | None = None
        self.tile_overlap = 0
        self._tables: _Tables | None = None

    @classmethod
    def tiny(cls, **overrides: Any) -> VQModel:
        """Random weights, 2x downsampling, 64 codes."""
        multipliers = (1, 1)
        arguments = {
            "base_channels": 32,
            "encoder_channel_multipliers": multipliers,
            "decoder_channel_multipliers": multipliers,
            "num_res_blocks": 1,
            "z_channels": 16,
            "codebook_size": 64,
            "usage_window": 1024,
        }
        return cls(**{**arguments, **overrides})

    @property
    def downsample_factor(self) -> int:
        """Pixels a token covers in each direction, f."""
        return 2 ** (len(self.config.encoder_channel_multipliers) - 1)

    @property
    def codebook_size(self) -> int:
        """Number of codes, K."""
        return self.quantizer.codebook_size

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, where `VQLoss` balances gradients."""
        return self.decoder.conv_out.weight

    # ---- objective

    def forward(self, images: Tensor, *, generator: torch.Generator | None = None) -> VQModelOutput:
        """Encode, quantise and decode; gradients pass straight through the quantiser.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            generator: source of the draws of `revive_dead_codes`.
        """
        quantization = self.quantizer(self.encode_features(images), generator=generator)
        return VQModelOutput(self.decode_features(quantization.quantized), quantization)

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Squared error plus the losses of the quantiser (for the adversarial objective see `VQLoss`).

        Args:
            batch: `images` [B, 3, H, W] in [-1, 1].
            generator: source of the draws of `revive_dead_codes`.

        Returns:
            `loss` and its parts `reconstruction`, `codebook`, `commitment` (and `entropy`, `usage` where they exist).
        """
        images = batch["images"]
        output = self(images, generator=generator)
        quantization = output.quantization
        reconstruction = F.mse_loss(output.sample.float(), images.float())
        losses = {"loss": reconstruction + quantization.loss, "reconstruction": reconstruction.detach()}
        losses["codebook"] = quantization.codebook_loss.detach()
        losses["commitment"] = quantization.commitment_loss.detach()
        if self.quantizer.entropy_weight:
            losses["entropy"] = quantization.entropy_loss.detach()
        if quantization.usage is not None:
            losses["usage"] = quantization.usage
        return losses

    # ---- inference

    def encode_features(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to the feature map [B, C, h, w] before quantisation."""
        return self.quant_conv(self.encoder(images.to(self.dtype)))

    def decode_features(self, quantized: Tensor) -> Tensor:
        """Codes [B, C, h, w] to images [B, 3, H, W], not clamped."""
        return self.decoder(self.post_quant_conv(quantized.to(self.dtype)))

    @torch.no_grad()
    def encode(self, images: Tensor) -> VisualTokens:
        """Images to tokens.

        Args:
            images: float [B, 3, H, W] in [-1, 1]; H and W divisible by `downsample_factor`.

        Returns:
            ids [B, N] in raster order, with `grid` = (h, w).

        Raises:
            InvalidInputError: wrong shape, channels, size, type or range; NaN or infinite pixels.
            InvalidOutputError: if the encoder produces NaNs.
        """
        check_images(images, self.config.in_channels, self.downsample_factor)
        factor = self.downsample_factor
        if self.tile_size is not None and max(images.shape[-2:]) > self.tile_size:
            z = run_tiled(self.encode_features, images, self.tile_size, self.tile_overlap, factor, enlarge=False)
        else:
            z = self.encode_features(images)
        batch, dim, rows, cols = z.shape
        with torch.autocast(z.device.type, enabled=False):
            vectors = z.float().permute(0, 2, 3, 1).reshape(-1, dim)
            if self.config.l2_normalize:
                vectors = F.normalize(vectors, dim=-1)
            ids = nearest_code(vectors, self._inference_tables()[0])
        if ids.numel() and int(ids.min()) < 0:
            raise InvalidOutputError("the encoder produced NaN or infinite features: check the model's weights")
        return VisualTokens(ids=ids.view(batch, rows * cols), grid=(rows, cols))

    def decode(self, tokens: VisualTokens, *, generator: torch.Generator | None = None) -> Tensor:
        """Tokens to images.

        Args:
            tokens: ids [B, N]; without a `grid`, N must be a square number.
            generator: accepted for symmetry with stochastic decoders; this one draws nothing.

        Returns:
            [B, 3, H, W], about [-1, 1], not clamped.

        Raises:
            InvalidInputError: no ids, ids outside the codebook, or no way to lay them out.
        """
        if tokens.ids is None:
            raise InvalidInputError("VQModel.decode needs ids; these tokens are continuous features")
        batch, total = tokens.ids.shape
        side = math.isqrt(total)
        if tokens.grid is None and side * side != total:
            raise InvalidInputError(f"{total} tokens without a grid: give VisualTokens(grid=(rows, cols))")
        rows, cols = tokens.grid or (side, side)
        ids = tokens.ids.to(self.device)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.codebook_size):
            raise InvalidInputError(
                f"ids must lie in 0..{self.codebook_size - 1}; got {int(ids.min())}..{int(ids.max())}: "
                "do these tokens come from another tokenizer?"
            )
        # In channels-last memory the lookup's result needs no copy.
        features = F.embedding(ids, self._inference_tables()[1]).view(batch, rows, cols, -1).permute(0, 3, 1, 2)
        tile = None if self.tile_size is None else self.tile_size // self.downsample_factor
        if tile is not None and max(rows, cols) > tile:
            overlap = self.tile_overlap // self.downsample_factor
            return run_tiled(self.decoder, features, tile, overlap, self.downsample_factor, enlarge=True)
        return self.decoder(features)

    def _inference_tables(self) -> tuple[Tensor, Tensor]:
        """(codes float32 [K, C], codes after `post_quant_conv` [K, Z] in the model's type).

        Without gradients both are kept until a weight changes.
        """
        sources = (self.quantizer.codebook, self.post_quant_conv.weight, self.post_quant_conv.bias)
        cacheable = not (torch.is_grad_enabled() or any(source.is_inference() for source in sources))
        stamp = [(source.data_ptr(), source._version, source.dtype, source.device) for source in sources if cacheable]
        if self._tables is not None and self._tables.stamp == stamp:
            return self._tables.codes, self._tables.features
        codes = self.quantizer.codes()
        with torch.autocast(codes.device.type, enabled=False):
            weight, bias = self.post_quant_conv.weight.float(), self.post_quant_conv.bias.float()
            features = F.linear(codes, weight.flatten(1), bias).to(self.dtype)
        if cacheable:
            self._tables = _Tables(stamp, codes, features, [source.detach() for source in sources])
        return codes, features

    def enable_tiling(self, tile_size: int = 512, overlap: int = 64) -> None:
        """Encode and decode large images in overlapping square tiles, blended linearly.

        Attention costs the square of the number of tokens, and activations fill the memory; tiles bound both. The
        result differs slightly from an untiled one, because normalisation then sees one tile at a time.

        Args:
            tile_size: side of a tile in pixels, a multiple of `downsample_factor`.
            overlap: pixels that neighbours share, a multiple of `downsample_factor`, less than `tile_size`.
        """
        factor = self.downsample_factor
        if tile_size % factor or overlap % factor or not 0 <= overlap < tile_size:
            raise InvalidInputError(
                f"tile_size and overlap must be multiples of {factor} with 0 <= overlap < tile_size; "
                f"got {tile_size} and {overlap}"
            )
        self.tile_size, self.tile_overlap = tile_size, overlap

    def disable_tiling(self) -> None:
        """Encode and decode whole images again."""
        self.tile_size, self.tile_overlap = None, 0

    # ---- pictures

    def preprocess(self, images: Pictures, size: int | tuple[int, int] | None = None) -> Tensor:
        """Pictures to a batch that `encode` accepts.

        Args:
            images: a picture, a path, or a list of them.
            size: side of a square or (height, width), divisible by `downsample_factor`: pictures are scaled to cover it
                and cut to the centre (ADM's centre crop). None keeps the scale and cuts at most
                `downsample_factor - 1` pixels a direction, evenly on both sides.

        Returns:
            float32 [B, 3, H, W] in [-1, 1] on the CPU.

        Raises:
            InvalidInputError: unreadable pictures, pictures smaller than a token, or unequal sizes without `size`.
        """
        return preprocess_images(images, size, self.downsample_factor)

    def postprocess(self, images: Tensor, output_type: str = "pil") -> Any:
        """Images [B, 3, H, W] in [-1, 1] to pictures.

        Args:
            images: output of `decode`; values outside the range are clamped.
            output_type: `"pil"` (list of pictures), `"uint8"` (tensor [B, H, W, 3], the published evaluation's
                rounding), `"np"` (float [B, H, W, 3] in [0, 1]) or `"pt"` (float [B, 3, H, W] in [0, 1]).

        Raises:
            InvalidOutputError: if there are NaNs.
        """
        return postprocess_images(images, output_type, to_uint8)

    @torch.no_grad()
    def reconstruct(self, image: Image.Image | str | os.PathLike[str], *, tile_size: int | None = None) -> Image.Image:
        """A picture of any size through the tokens and back, in its own size.

        The picture is padded by reflection to a multiple of `downsample_factor`, and the padding is cut off afterwards.

        Args:
            image: a picture or a path.
            tile_size: side of the tiles in pixels (see `enable_tiling`); None tiles pictures above 1024x1024 pixels by
                512, or as `enable_tiling` was told.
        """
        factor = self.downsample_factor
        padded, (height, width) = padded_picture(image, factor)
        before = (self.tile_size, self.tile_overlap)
        if tile_size is None and before[0] is None and height * width > 1024 * 1024:
            tile_size = -(-512 // factor) * factor
        try:
            if tile_size is not None:
                self.enable_tiling(tile_size, tile_size // factor // 8 * factor)
            decoded = self.decode(self.encode(padded.to(self.device)))
        finally:
            self.tile_size, self.tile_overlap = before
        return self.postprocess(decoded[..., :height, :width])[0]

    # ---- report

    def codebook_report(self, tokens: VisualTokens | Iterable[VisualTokens]) -> CodebookReport:
        """Usage, dead codes and perplexity of the codebook over some tokens (masked ones do not count).

        Args:
            tokens: tokens, or an iterable of them (for example of the batches of a validation set).

        Raises:
            InvalidInputError: tokens without ids, or ids outside the codebook.
        """
        counts = torch.zeros(self.codebook_size, dtype=torch.int64)
        for part in [tokens] if isinstance(tokens, VisualTokens) else tokens:
            if part.ids is None:
                raise InvalidInputError("codebook_report needs tokens with ids")
            ids = (part.ids if part.mask is None else part.ids[part.mask]).flatten().cpu()
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.codebook_size:
                raise InvalidInputError(
                    f"ids must lie in 0..{self.codebook_size - 1}; got {int(ids.min())}..{int(ids.max())}"
                )
            counts += torch.bincount(ids, minlength=self.codebook_size)
        return CodebookReport(counts, int(counts.sum()))

    # ---- the authors' files

    @classmethod
    def from_official(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        config: str | Mapping[str, Any],
        *,
        weights: str = "auto",
    ) -> VQModel:
        """Load a file of the authors (see `VistokModel.from_official`).

        Args:
            source: file, or its content: a flat state dict or a training checkpoint around one.
            config: published name, or constructor arguments (the authors' names or ours).
            weights: which state dict of a training checkpoint: `"ema"`, `"model"`, or `"auto"` (the moving average
                where there is one, as the authors' reconstruction script does).
        """
        if weights == "auto":
            return super().from_official(source, config)
        content = source if isinstance(source, Mapping) else read_state_dict(source)
        if not isinstance(content.get(weights), Mapping):
            raise CheckpointError(
                f"the checkpoint has no {weights!r} weights; top-level keys: {', '.join(map(str, content))}"
            )
        return super().from_official(content[weights], config)

    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our constructor arguments from the authors' `ModelArgs` (or `vq_model`: "VQ-16" | "VQ-8")."""
        arguments = dict(config)
        preset = arguments.pop("vq_model", None)
        if preset is not None:
            if preset not in OFFICIAL_PRESETS:
                raise InvalidInputError(f"vq_model must be one of {', '.join(OFFICIAL_PRESETS)}; got {preset!r}")
            arguments = {
                "encoder_ch_mult": OFFICIAL_PRESETS[preset],
                "decoder_ch_mult": OFFICIAL_PRESETS[preset],
                **arguments,
            }
        if not arguments.pop("codebook_show_usage", True):
            arguments["usage_window"] = 0
        return {OFFICIAL_ARGUMENTS.get(name, name): value for name, value in arguments.items()}

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Take the state dict out of `ema`, `model`, `module` or `state_dict`, and strip wrapper prefixes."""
        for key in ("ema", "model", "module", "state_dict"):
            if isinstance(state.get(key), Mapping):
                return cls.unwrap_official(state[key])
        return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official names to ours; the separate q, k, v convolutions are joined."""
        renamed = {}
        for key, value in merge_attention_keys(state).items():
            for pattern, replacement in OFFICIAL_TO_OURS:
                key = re.sub(pattern, replacement, key)
            renamed[key] = value.to(torch.int32) if key == "quantizer.usage_queue" else value
        return renamed

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names."""
        official = {}
        for key, value in split_attention_keys(self.state_dict()).items():
            if key == "quantizer.tokens_since_revival":
                continue
            if key == "quantizer.usage_queue":
                value = value.clamp_min(0).float()
            for pattern, replacement in OURS_TO_OFFICIAL:
                key = re.sub(pattern, replacement, key)
            official[key] = value
        return official

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise the generators that are published beside this tokenizer, and VQGAN files of other families."""
        if any(key.startswith(("tok_embeddings.", "layers.", "cls_embedding.")) for key in unexpected):
            return "This is a generator (a LlamaGen or NAR transformer), not an image tokenizer."
        if any(key.startswith(("encoder.down.", "decoder.up.")) for key in unexpected):
            return "This is an auto-encoder of the CompVis layout (VQGAN or KL), not LlamaGen's."
        if any(key.startswith("main.") for key in unexpected):
            return "This is a PatchGAN discriminator."
        return None
