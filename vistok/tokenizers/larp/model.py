"""LARP: a video becomes a sequence of integers and back; each token has read the whole clip.

The encoder is a transformer over the clip's patches and as many learned queries as there shall be tokens; the outputs
at the queries, squeezed to few channels, are quantised. The decoder is a transformer over the tokens and one query for
each patch. While training, a small autoregressive prior reads along, so that tokens become easy to predict in order.

Source: Wang et al., "LARP: Tokenizing Videos with a Learned Autoregressive Generative Prior" (arXiv 2410.21264).
Origin of the weights: hywang66/LARP (MIT). NAR generates videos for the same tokenizer.

Letters: B videos, F frames, H, W pixels, P patches, N tokens, D channels, C code dimension, K codes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from PIL import Image, ImageSequence
from torch import Tensor, nn

from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.files import open_image, read_state_dict
from vistok.nn import sampling
from vistok.nn.model import VistokModel
from vistok.nn.positions import sinusoids, video_sinusoids
from vistok.nn.sampling import Generators
from vistok.nn.vit import ViTBlock
from vistok.registry import Published
from vistok.tokens import VisualTokens

from .names import arguments_from_official, to_official, to_ours
from .prior import ContinuousPrior
from .quantizer import Quantization, StochasticQuantizer

__all__ = ["LARP", "LARPOutput"]

BLOCK_EPS = 1e-5  # of the timm release that the published tokenizer was trained with; later ones use 1e-6
OUTPUT_EPS = 1e-6
FAR_OUTSIDE = 0.25  # a video in [-1, 1] or 0..255 is refused, a slight overshoot of a decoder is not
PRIOR_S = {"prior_layers": 12, "prior_heads": 6, "prior_hidden_size": 384}
PARAMETERS = 172_179_984
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass
class LARPOutput:
    """Result of `LARP.forward`.

    Attributes:
        sample: reconstruction [B, 3, F, H, W], about [0, 1], not clamped.
        quantization: ids, codes and losses.
    """

    sample: Tensor
    quantization: Quantization


class VideoPositions(nn.Module):
    """A vector for each patch of a video: fixed sines and cosines, or learned ones for frame, row and column.

    Args:
        grid: patches (frames, rows, cols).
        size: D.
        learned: sum of three learned tables instead of a fixed one.
        kind: add one learned vector that tells patches from tokens.
    """

    def __init__(self, grid: tuple[int, int, int], size: int, learned: bool, kind: bool) -> None:
        super().__init__()
        frames, rows, cols = grid
        self.learned = learned
        if learned:
            self.frames = nn.Parameter(sinusoids(torch.arange(frames), size).view(1, frames, 1, 1, size))
            self.rows = nn.Parameter(sinusoids(torch.arange(rows), size).view(1, 1, rows, 1, size))
            self.cols = nn.Parameter(sinusoids(torch.arange(cols), size).view(1, 1, 1, cols, size))
        else:
            self.register_buffer("table", video_sinusoids(grid, size)[None])
        self.kind = nn.Parameter(0.02 * torch.randn(1, 1, size)) if kind else None

    def forward(self) -> Tensor:
        """[1, P, D] in raster order (frame, row, column)."""
        table = (self.rows + self.cols + self.frames).flatten(1, 3) if self.learned else self.table
        return table if self.kind is None else table + self.kind


class LARP(VistokModel):
    """Video tokenizer with holistic, ordered tokens. The defaults are the published LARP-L-Long.

    Args:
        in_channels: channels of the videos.
        num_frames: frames of a clip.
        image_size: side of its frames in pixels.
        temporal_patch_size, patch_size: frames and pixels a side of the encoder's patches.
        decoder_temporal_patch_size, decoder_patch_size: of the decoder's; None is as the encoder.
        num_tokens: N.
        encoder_hidden_size, encoder_layers, encoder_heads: D, blocks and heads of the encoder.
        decoder_hidden_size, decoder_layers, decoder_heads: of the decoder.
        codebook_size: number of codes K.
        codebook_dim: dimension of a code C.
        l2_normalize: compare and decode unit vectors.
        stochastic: draw codes in training from softmax(cosine / temperature), instead of taking the nearest.
        stochastic_temperature: of that draw; None learns it.
        commitment_weight, codebook_weight: weights of the two losses of the quantiser.
        quantizer_loss_weight: weight of the quantiser's loss in `training_loss`.
        latent_position_base: base of the fixed positions of the tokens.
        learned_encoder_positions, learned_encoder_queries, learned_decoder_positions, learned_decoder_queries: learn
            these vectors instead of fixed sines and cosines: of the encoder's patches, of its queries, of the tokens
            in the decoder, of the decoder's queries.
        encoder_position_kind, encoder_query_kind, decoder_position_kind, decoder_query_kind: add to them one learned
            vector, the same for all places.
        prior_layers: blocks of the training-time prior; None trains without one.
        prior_hidden_size, prior_heads, prior_dropout: its width, heads and dropout.
        prior_max_tokens: longest sequence it has positions for.
        prior_l2_normalize: it predicts unit vectors.
        prior_rounds: it reads the tokens so often; each round after the first sees some of its own predictions.
        prior_averages_rounds: every round counts in the loss, or the last alone.
        prior_temperature: of its logits.
        prior_mix_ratio: share of its own predictions in later rounds, at most.
        prior_mix_peak: share of the training after which this is reached; it rises linearly from 0.
        prior_loss_weight: weight of the prior's loss in `training_loss`.

    Raises:
        InvalidInputError: if the arguments do not fit each other.
    """

    system: ClassVar[str] = "larp"
    published: ClassVar[dict[str, Published]] = {
        "larp-l-long.ucf101": Published(
            name="larp-l-long.ucf101",
            system="larp",
            config={},
            hub_id="hywang66/LARP-L-long-tokenizer",
            hub_file="model.safetensors",
            licence="mit",
            paper="arXiv:2410.21264",
            origin="hywang66/LARP",
            image_size=128,
            num_tokens=1024,
            codebook_size=8192,
            preprocessing="16 frames, short side 128, centre crop, [0, 1]",
            parameters=PARAMETERS,
        )
    }
    _supports_gradient_checkpointing = True
    _no_split_modules = ["ViTBlock"]  # noqa: RUF012 - the name and type that accelerate reads

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        num_frames: int = 16,
        image_size: int = 128,
        temporal_patch_size: int = 4,
        patch_size: int = 8,
        decoder_temporal_patch_size: int | None = None,
        decoder_patch_size: int | None = None,
        num_tokens: int = 1024,
        encoder_hidden_size: int = 768,
        encoder_layers: int = 12,
        encoder_heads: int = 12,
        decoder_hidden_size: int = 768,
        decoder_layers: int = 12,
        decoder_heads: int = 12,
        codebook_size: int = 8192,
        codebook_dim: int = 16,
        l2_normalize: bool = True,
        stochastic: bool = True,
        stochastic_temperature: float | None = 0.03,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        quantizer_loss_weight: float = 0.1,
        latent_position_base: float = 10000.0,
        learned_encoder_positions: bool = False,
        learned_encoder_queries: bool = True,
        learned_decoder_positions: bool = False,
        learned_decoder_queries: bool = False,
        encoder_position_kind: bool = False,
        encoder_query_kind: bool = False,
        decoder_position_kind: bool = False,
        decoder_query_kind: bool = True,
        prior_layers: int | None = None,
        prior_hidden_size: int = 384,
        prior_heads: int = 6,
        prior_dropout: float = 0.0,
        prior_max_tokens: int = 1024,
        prior_l2_normalize: bool = True,
        prior_rounds: int = 2,
        prior_averages_rounds: bool = True,
        prior_temperature: float = 1.0,
        prior_mix_ratio: float = 0.5,
        prior_mix_peak: float = 0.3,
        prior_loss_weight: float = 0.06,
    ) -> None:
        super().__init__()
        self.patch = (temporal_patch_size, patch_size)
        self.decoder_patch = (decoder_temporal_patch_size or temporal_patch_size, decoder_patch_size or patch_size)
        for frames, side in (self.patch, self.decoder_patch):
            if num_frames % frames or image_size % side:
                raise InvalidInputError(
                    f"clips of {num_frames} frames of {image_size}x{image_size} pixels cannot be cut into patches of "
                    f"{frames} frames of {side}x{side}"
                )
        for name, size, heads in (
            ("encoder", encoder_hidden_size, encoder_heads),
            ("decoder", decoder_hidden_size, decoder_heads),
        ):
            if size % heads:
                raise InvalidInputError(f"{name}_hidden_size {size} must be a multiple of {name}_heads {heads}")
        if prior_layers is not None and prior_max_tokens < num_tokens:
            raise InvalidInputError(f"prior_max_tokens {prior_max_tokens} is less than num_tokens {num_tokens}")
        self.gradient_checkpointing = False

        def grid(patch: tuple[int, int]) -> tuple[int, int, int]:
            return num_frames // patch[0], image_size // patch[1], image_size // patch[1]

        def blocks(size: int, layers: int, heads: int) -> nn.ModuleList:
            return nn.ModuleList(
                ViTBlock(size, heads, 4 * size, norm_eps=BLOCK_EPS, qkv_bias=False) for _ in range(layers)
            )

        def latents(size: int) -> Tensor:
            return sinusoids(torch.arange(num_tokens), size, latent_position_base)

        kernel = (temporal_patch_size, patch_size, patch_size)
        self.patch_embedding = nn.Conv3d(in_channels, encoder_hidden_size, kernel, stride=kernel)
        self.encoder_positions = VideoPositions(
            grid(self.patch), encoder_hidden_size, learned_encoder_positions, encoder_position_kind
        )
        self.encoder_queries: Tensor
        if learned_encoder_queries:
            self.encoder_queries = nn.Parameter(0.02 * torch.randn(num_tokens, encoder_hidden_size))
        else:
            self.register_buffer("encoder_queries", latents(encoder_hidden_size))
        self.encoder_queries_kind = (
            nn.Parameter(0.02 * torch.randn(1, 1, encoder_hidden_size)) if encoder_query_kind else None
        )
        self.encoder = blocks(encoder_hidden_size, encoder_layers, encoder_heads)
        self.bottleneck_in = nn.Linear(encoder_hidden_size, codebook_dim)
        self.quantizer = StochasticQuantizer(
            codebook_size,
            codebook_dim,
            commitment_weight=commitment_weight,
            codebook_weight=codebook_weight,
            l2_normalize=l2_normalize,
            stochastic=stochastic,
            temperature=stochastic_temperature,
        )
        self.bottleneck_out = nn.Linear(codebook_dim, decoder_hidden_size)
        self.decoder_positions: Tensor
        if learned_decoder_positions:
            self.decoder_positions = nn.Parameter(0.02 * torch.randn(1, num_tokens, decoder_hidden_size))
        else:
            self.register_buffer("decoder_positions", latents(decoder_hidden_size)[None])
        self.decoder_positions_kind = (
            nn.Parameter(0.02 * torch.randn(1, 1, decoder_hidden_size)) if decoder_position_kind else None
        )
        self.decoder_queries = VideoPositions(
            grid(self.decoder_patch), decoder_hidden_size, learned_decoder_queries, decoder_query_kind
        )
        self.decoder = blocks(decoder_hidden_size, decoder_layers, decoder_heads)
        self.output_norm = nn.LayerNorm(decoder_hidden_size, eps=OUTPUT_EPS)
        self.output = nn.Linear(
            decoder_hidden_size, math.prod(self.decoder_patch) * self.decoder_patch[1] * in_channels
        )
        self._initialise()
        self.prior: ContinuousPrior | None = None
        if prior_layers is not None:
            self.prior = ContinuousPrior(
                codebook_dim,
                prior_hidden_size,
                prior_layers,
                prior_heads,
                prior_max_tokens,
                prior_dropout,
                prior_l2_normalize,
            )

    def _initialise(self) -> None:
        """Xavier's uniform distribution for every matrix (patches, too), zeros for biases and the last layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.output.weight)

    @classmethod
    def tiny(cls, **overrides: Any) -> LARP:
        """Random weights in eval mode, builds in milliseconds: 4 frames of 16x16 pixels, 24 tokens of 64 codes."""
        arguments: dict[str, Any] = {
            "num_frames": 4,
            "image_size": 16,
            "temporal_patch_size": 2,
            "patch_size": 8,
            "num_tokens": 24,
            "encoder_hidden_size": 32,
            "encoder_layers": 2,
            "encoder_heads": 4,
            "decoder_hidden_size": 32,
            "decoder_layers": 2,
            "decoder_heads": 4,
            "codebook_size": 64,
            "codebook_dim": 8,
            "prior_hidden_size": 32,
            "prior_heads": 4,
        }
        return cls(**{**arguments, **overrides}).eval()

    @property
    def codebook_size(self) -> int:
        """Number of codes, K."""
        return self.quantizer.codebook.shape[0]

    # ---- network

    def _run(self, blocks: nn.ModuleList, context: Tensor, queries: Tensor) -> Tensor:
        """Blocks over context [B, M, D] and the same queries [1, Q, D] for all; the outputs [B, Q, D] at the queries.

        What the first block projects of the queries is the same for the whole batch, and of the last block nothing but
        the queries is wanted.
        """
        batch, wanted = len(context), queries.shape[1]
        queries = queries.to(context.dtype)
        x = torch.cat([context, queries.expand(batch, -1, -1)], dim=1)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for index, block in enumerate(blocks):
            qkv = None
            if index == 0:
                assert isinstance(block, ViTBlock)
                qkv = torch.cat([block.project(context), block.project(queries).expand(batch, -1, -1)], dim=1)
            kept = wanted if index + 1 == len(blocks) else None
            if recompute:
                x = self._gradient_checkpointing_func(block, x, qkv, kept)
            else:
                x = block(x, qkv, kept)
        return x[:, -wanted:]

    def encode_features(self, videos: Tensor) -> Tensor:
        """Videos [B, 3, F, H, W] (F may be less than `num_frames`) to vectors [B, N, C] before quantisation."""
        patches = self.patch_embedding(videos.to(self.dtype)).flatten(2).transpose(1, 2)
        patches = patches + self.encoder_positions()[:, : patches.shape[1]].to(patches.dtype)
        queries = self.encoder_queries[None]
        if self.encoder_queries_kind is not None:
            queries = queries + self.encoder_queries_kind
        return self.bottleneck_in(self._run(self.encoder, patches, queries))

    def decode_features(self, quantized: Tensor, num_frames: int | None = None) -> Tensor:
        """Codes [B, N, C] to videos [B, 3, F, H, W], not clamped; F is `num_frames`, or all if None."""
        tokens = self.bottleneck_out(quantized.to(self.dtype)) + self.decoder_positions.to(self.dtype)
        if self.decoder_positions_kind is not None:
            tokens = tokens + self.decoder_positions_kind
        frames, side = self.decoder_patch
        rows = self.config.image_size // side
        steps = (self.config.num_frames if num_frames is None else num_frames) // frames
        queries = self.decoder_queries()[:, : steps * rows * rows]
        pixels = self.output(self.output_norm(self._run(self.decoder, tokens, queries)))
        pixels = pixels.view(len(pixels), steps, rows, rows, frames, side, side, self.config.in_channels)
        return pixels.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(2, 3).flatten(3, 4).flatten(4, 5)

    def forward(self, videos: Tensor, *, generator: Generators = None) -> LARPOutput:
        """Encode, quantise (drawing codes in training mode) and decode; gradients pass straight through.

        Args:
            videos: [B, 3, F, H, W] in [0, 1].
            generator: draws the codes.
        """
        z = self.encode_features(videos)
        quantization = self.quantizer(z, stochastic=self.training, generator=generator)
        return LARPOutput(self.decode_features(quantization.quantized, videos.shape[2]), quantization)

    # ---- objective

    def prior_loss(
        self, quantization: Quantization, *, progress: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Cross-entropy of the prior's predictions of each token from those before it (section 3.3).

        Args:
            quantization: of the batch; gradients reach the encoder through the codes that the prior reads.
            progress: share of the training that is done, 0..1; the prior's own predictions come in with it.
            generator: draws which tokens are replaced by predictions, and the predictions.

        Raises:
            InvalidInputError: if the tokenizer has no prior.
        """
        if self.prior is None:
            raise InvalidInputError("this tokenizer has no prior; build it with prior_layers")
        config, codes = self.config, self.quantizer.codes().detach()
        given, targets = quantization.quantized, quantization.ids[:, 1:].clamp_min(0)
        rise = 1.0 if config.prior_mix_peak == 0 else min(progress / config.prior_mix_peak, 1.0)
        shape = (*targets.shape, 1)
        own = sampling.uniform(shape, generator, given.device) < rise * config.prior_mix_ratio
        inputs, losses = given, []
        for remaining in reversed(range(config.prior_rounds)):
            counts = remaining == 0 or config.prior_averages_rounds
            with torch.set_grad_enabled(torch.is_grad_enabled() and counts):
                predicted = self.prior(inputs[:, :-1].to(self.prior.pos_emb.dtype)).float()
                with torch.autocast(predicted.device.type, enabled=False):
                    logits = F.linear(predicted, codes) / config.prior_temperature
            if counts:
                losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
            if remaining:
                drawn = sampling.choose_tokens(logits.detach(), generator=generator).clamp_min(0)
                inputs = torch.cat([given[:, :1], torch.where(own, codes[drawn], given[:, 1:])], dim=1)
        return torch.stack(losses).mean()

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """L1 distance, plus the weighted losses of the quantiser and of the prior.

        The authors' recipe adds a perceptual and an adversarial loss on `LARPOutput.sample`.

        Args:
            batch: `videos` [B, 3, F, H, W] in [0, 1]; optionally `progress`, the share of the training that is done
                (default 1), which the prior's scheduled sampling follows.
            generator: draws codes and the prior's predictions.

        Returns:
            `loss` and its parts `reconstruction`, `codebook`, `commitment`, `quantizer` and, with a prior, `prior`.

        Raises:
            InvalidInputError: without videos.
        """
        if "videos" not in batch:
            raise InvalidInputError(f"LARP trains on batches with 'videos'; got {', '.join(sorted(batch)) or 'none'}")
        videos = batch["videos"]
        output = self(videos, generator=generator)
        quantization = output.quantization
        reconstruction = F.l1_loss(output.sample.float(), videos.float())
        loss = reconstruction + self.config.quantizer_loss_weight * quantization.loss
        losses = {
            "reconstruction": reconstruction.detach(),
            "codebook": quantization.codebook_loss.detach(),
            "commitment": quantization.commitment_loss.detach(),
            "quantizer": quantization.loss.detach(),
        }
        if self.prior is not None:
            prior = self.prior_loss(quantization, progress=float(batch.get("progress", 1.0)), generator=generator)
            loss = loss + self.config.prior_loss_weight * prior
            losses["prior"] = prior.detach()
        return {"loss": loss, **losses}

    # ---- inference

    @torch.no_grad()
    def encode(self, videos: Tensor, *, stochastic: bool = False, generator: Generators = None) -> VisualTokens:
        """Videos to tokens.

        Args:
            videos: float [B, 3, F, H, W] in [0, 1]; F up to `num_frames`.
            stochastic: draw codes, as in training (and as the authors' code does unless told otherwise), instead of
                taking the best.
            generator: draws them; one for all videos, or one a video.

        Returns:
            ids [B, N], an ordered sequence without a grid.

        Raises:
            InvalidInputError: wrong shape, size, type or range; NaN or infinite pixels.
            InvalidOutputError: if the encoder produces NaNs.
        """
        self._check_videos(videos)
        quantization = self.quantizer(
            self.encode_features(videos.to(self.device)), stochastic=stochastic, generator=generator
        )
        ids = quantization.ids
        if ids.numel() and int(ids.min()) < 0:
            raise InvalidOutputError("the encoder produced NaN or infinite features: check the model's weights")
        return VisualTokens(ids=ids)

    @torch.no_grad()
    def decode(
        self, tokens: VisualTokens, *, num_frames: int | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Tokens to videos.

        Args:
            tokens: ids [B, N].
            num_frames: frames to decode, the first ones; None is all.
            generator: accepted for symmetry with stochastic decoders; this one draws nothing.

        Returns:
            [B, 3, F, H, W], about [0, 1], not clamped.

        Raises:
            InvalidInputError: no ids, another number of them, or ids outside the codebook.
        """
        if tokens.ids is None:
            raise InvalidInputError("LARP.decode needs ids; these tokens are continuous features")
        if tokens.num_tokens != self.config.num_tokens:
            raise InvalidInputError(f"expected {self.config.num_tokens} tokens a video; got {tokens.num_tokens}")
        limit, step = self.config.num_frames, self.decoder_patch[0]
        if num_frames is not None and (not 0 < num_frames <= limit or num_frames % step):
            raise InvalidInputError(f"num_frames must be a multiple of {step}, at most {limit}; got {num_frames}")
        ids = tokens.ids.to(self.device)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.codebook_size):
            raise InvalidInputError(
                f"ids must lie in 0..{self.codebook_size - 1}; got {int(ids.min())}..{int(ids.max())}: "
                "do these tokens come from another tokenizer?"
            )
        return self.decode_features(self.quantizer.lookup(ids), num_frames)

    def _check_videos(self, videos: Tensor) -> None:
        channels, limit, size = self.config.in_channels, self.config.num_frames, self.config.image_size
        expected = f"[B, {channels}, frames, {size}, {size}]"
        if videos.ndim != 5 or videos.shape[1] != channels or tuple(videos.shape[3:]) != (size, size):
            raise InvalidInputError(f"videos must be {expected}; got {list(videos.shape)}: see preprocess()")
        step = math.lcm(self.patch[0], self.decoder_patch[0])
        if not 0 < videos.shape[2] <= limit or videos.shape[2] % step:
            raise InvalidInputError(
                f"the number of frames must be a multiple of {step}, at most {limit}; got {videos.shape[2]}"
            )
        if not videos.is_floating_point():
            raise InvalidInputError(f"videos must be floating point in [0, 1]; got {videos.dtype}: use preprocess()")
        if videos.numel():
            low, high = (float(value) for value in torch.aminmax(videos))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise InvalidInputError("videos contain NaN or infinite pixels")
            if low < -FAR_OUTSIDE or high > 1.0 + FAR_OUTSIDE:
                raise InvalidInputError(
                    f"videos must lie in [0, 1]; got {low:.4g}..{high:.4g}: scale them (images lie in [-1, 1])"
                )

    # ---- pictures

    def preprocess(
        self,
        video: str | os.PathLike[str] | Sequence[Image.Image | str | os.PathLike[str]] | Tensor | np.ndarray,
        *,
        start: int = 0,
    ) -> Tensor:
        """A video to a batch of one that `encode` accepts.

        Consecutive frames from `start` on, of a short video the last one repeated; short side scaled (bilinear,
        antialiased), centre crop.

        Args:
            video: frames as pictures or paths; an animated picture (GIF, WebP, PNG) or a folder of frames, by path; or
                uint8 [F, H, W, 3].
            start: first frame.

        Returns:
            float32 [1, 3, `num_frames`, `image_size`, `image_size`] in [0, 1] on the CPU.

        Raises:
            InvalidInputError: no frames, unreadable or unequal ones, or a start outside the video.
        """
        frames = _read_frames(video)
        if not 0 <= start < len(frames):
            raise InvalidInputError(f"start must lie in 0..{len(frames) - 1} for {len(frames)} frames; got {start}")
        size, count = self.config.image_size, self.config.num_frames
        index = torch.arange(start, start + count).clamp_max(len(frames) - 1)
        pixels = frames[index].permute(0, 3, 1, 2).float() / 255.0
        height, width = pixels.shape[-2:]
        scale = size / min(height, width)
        target = [max(size, int(height * scale)), max(size, int(width * scale))]
        if target != [height, width]:
            pixels = F.interpolate(pixels, target, mode="bilinear", antialias=True, align_corners=False)
        top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
        pixels = pixels[..., top : top + size, left : left + size].clamp(0.0, 1.0)
        return pixels.transpose(0, 1)[None]

    def postprocess(self, videos: Tensor, output_type: str = "pil") -> Any:
        """Videos [B, 3, F, H, W] in [0, 1] to frames.

        Args:
            videos: output of `decode`; values outside the range are clamped.
            output_type: `"pil"` (a list of frames for each video), `"uint8"` (tensor [B, F, H, W, 3]), `"np"` (float
                [B, F, H, W, 3]) or `"pt"` (float [B, 3, F, H, W]).

        Raises:
            InvalidInputError: unknown output type.
            InvalidOutputError: if there are NaNs.
        """
        videos = videos.detach()
        if not bool(torch.isfinite(videos).all()):
            raise InvalidOutputError("the decoded videos contain NaN or infinite pixels: check the model's weights")
        scaled = videos.float().clamp(0.0, 1.0)
        if output_type == "pt":
            return scaled
        scaled = scaled.permute(0, 2, 3, 4, 1)
        if output_type == "np":
            return scaled.cpu().numpy()
        pixels = (255.0 * scaled).round().to(torch.uint8)
        if output_type == "uint8":
            return pixels
        if output_type == "pil":
            return [[Image.fromarray(frame) for frame in video] for video in pixels.cpu().numpy()]
        raise InvalidInputError(f"output_type must be 'pil', 'np', 'pt' or 'uint8'; got {output_type!r}")

    # ---- the authors' files

    @classmethod
    def from_official(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        config: str | Mapping[str, Any],
        *,
        prior: bool = False,
    ) -> LARP:
        """Load a file of the authors (see `VistokModel.from_official`).

        Args:
            source: file, or its content: a flat state dict or a training checkpoint around one.
            config: published name, or constructor arguments (the authors' names or ours).
            prior: for a published name, load the prior of the training, too; it takes no part in coding, and without
                this the file's is left out.
        """
        if not isinstance(config, str) or config not in cls.published:
            return super().from_official(source, config)
        arguments = dict(cls.published[config].config)
        if prior:
            return super().from_official(source, {**arguments, **PRIOR_S})
        content = source if isinstance(source, Mapping) else read_state_dict(source)
        state = {
            key: value for key, value in cls.unwrap_official(content).items() if not key.startswith("prior_model.")
        }
        return super().from_official(state, arguments)

    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our constructor arguments from the authors' (or from our own, which pass unchanged)."""
        return arguments_from_official(config) if "bottleneck" in config else dict(config)

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Flat, or under "sd" inside "model"."""
        for key in ("model", "sd", "module", "state_dict"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
        return {key.removeprefix("_orig_mod."): value for key, value in state.items()}

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official names to ours; the separate queries, keys and values of the prior are joined."""
        return to_ours(state)

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names, which `from_official` reads back."""
        return to_official(self.state_dict())

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise generators, and files with a prior."""
        if any(key.startswith(("tok_embeddings.", "layers.")) for key in unexpected):
            return "This is a generator (of LARP or NAR), not a video tokenizer."
        if unexpected and all(key.startswith("prior.") for key in unexpected) and not missing:
            return "The file holds the prior of the training, which this configuration lacks (prior_layers)."
        return None


def _read_frames(video: Any) -> Tensor:
    """uint8 [F, H, W, 3] from anything that `LARP.preprocess` takes."""
    if isinstance(video, Tensor | np.ndarray):
        pixels = torch.as_tensor(video)
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != torch.uint8 or not pixels.numel():
            raise InvalidInputError(f"a video must be uint8 [F, H, W, 3]; got {pixels.dtype} {list(pixels.shape)}")
        return pixels.cpu()
    if isinstance(video, str | os.PathLike):
        path = Path(video)
        if path.is_dir():
            video = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not video:
                raise InvalidInputError(f"{path} holds no frames ({', '.join(sorted(IMAGE_SUFFIXES))})")
        else:
            open_image(path)  # says clearly what is wrong with a file that is no picture
            with Image.open(path) as animation:
                video = [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]
    pictures = [open_image(frame) for frame in video]
    sizes = sorted({(picture.height, picture.width) for picture in pictures})
    if len(sizes) != 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sizes[:4])
        raise InvalidInputError(f"a video needs frames of one size; got {shown or 'no frames'}")
    return torch.stack([torch.from_numpy(np.array(picture, dtype=np.uint8)) for picture in pictures])
