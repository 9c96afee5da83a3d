"""Hi-MAR: masked autoregression in two resolutions.

One network writes an image twice. First the "pivots", the tokens of a small version of the image, one after the other
as MAR does. Then the dense tokens in a handful of steps, conditioned on the hidden states of the pivots, with a
diffusion transformer that draws all unknown tokens jointly. A learned scale vector tells the blocks which phase it is.

Source: Zheng et al., "Hierarchical Masked Autoregressive Models with Low-Resolution Token Pivots" (arXiv 2505.20288).
Letters: B images, R rows (2 B with guidance), T condition tokens, P pivots, N dense tokens, L = P + N positions,
Q wanted ones, D channels of the network, C channels of a latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.nn import masked, sampling
from vistok.nn.diffusion import check_weighting
from vistok.nn.diffusion_head import DiffusionHead
from vistok.nn.masked import (
    GuidanceSchedule,
    MaskedGenerator,
    MaskedRun,
    Phase,
    PlannedStep,
    TokenValues,
    count_blocks,
    grid_places,
    guidance_at,
    plan_steps,
    take_tokens,
    unpatchify,
    without_wrapper,
)
from vistok.nn.sampling import Generators, Step
from vistok.nn.text import TextCondition
from vistok.nn.vit import BlockScales, ViTBlock
from vistok.registry import Published
from vistok.tokens import VisualTokens

from .head import TransformerHead, TransformerHeadSampler
from .names import OFFICIAL_IGNORED, OFFICIAL_NAMES, OFFICIAL_ONLY, UNUSED_KEYS, published_checkpoints

__all__ = ["HiMAR", "ScaleAwareBlock"]

PIVOTS, DENSE = 0, 1
# Shares of the two phases in the loss: 2 * 64 / 320 and 0.75 * 256 / 320.
PIVOT_WEIGHT, DENSE_WEIGHT = 0.4, 0.6
DENSE_HEADS = ("transformer", "mlp")
DENSE_MASK_RATIOS = ("cosine", "truncated_normal")


class ScaleAwareBlock(ViTBlock):
    """A ViT block whose branches are scaled by an affine function of the phase's vector; no shift.

    Starts as a plain block: the scales of the inputs are 0, those of the outputs 1.
    """

    def __init__(self, size: int, num_heads: int, mlp_size: int, **settings: Any) -> None:
        super().__init__(size, num_heads, mlp_size, **settings)
        self.adaLN_scale = nn.Parameter(torch.zeros(2, 1, 1, 4 * size))
        start = torch.tensor([0.0, 1.0, 0.0, 1.0]).repeat_interleave(size)
        self.adaLN_shift = nn.Parameter(start.repeat(2, 1, 1, 1))

    def scales(self, vector: Tensor, phase: int) -> BlockScales:
        """The scales of a phase from its vector [4 D]."""
        scaled = torch.addcmul(self.adaLN_shift[phase, 0, 0], vector, self.adaLN_scale[phase, 0, 0])
        return BlockScales(*scaled.chunk(4))


class HiMAR(MaskedGenerator):
    """Hierarchical masked autoregressive generator of continuous tokens.

    Class-conditional with `num_classes`, text-conditional with `caption_dim` (and `num_classes=None`): a caption's
    tokens then stand where the class vector is repeated.

    Args:
        latent_channels: C.
        grid: (rows, cols) of dense tokens.
        pivot_grid: (rows, cols) of pivots.
        hidden_size: D of both stacks.
        encoder_layers, encoder_heads: the stack that sees known tokens.
        decoder_layers, decoder_heads: the stack that sees mask tokens, too.
        mlp_ratio: hidden width of the blocks' MLPs over their width.
        norm_eps: of the LayerNorms.
        num_classes: classes; None for a text-conditional model.
        caption_dim: channels of the text features; None for a class-conditional model.
        num_condition_tokens: T; a class fills all of them with its vector, a caption has one each.
        condition_dropout: probability of "no condition" in training, drawn for each phase.
        attention_dropout, projection_dropout: dropout rates of the blocks, in training only.
        head_layers, head_width: the MLP that draws pivots.
        dense_head: "transformer" draws all dense tokens jointly, "mlp" one by one as MAR does.
        dense_head_layers, dense_head_width, dense_head_heads, dense_head_mlp_ratio: of the dense head (an MLP has
            neither heads nor a ratio).
        num_diffusion_steps, num_dense_diffusion_steps: how the two heads sample by default (see `respaced_timesteps`).
        diffusion_repeats: noise levels at which each sample is trained in a step.
        loss_weighting: "epsilon" (published), or "velocity" (see `vistok.nn.diffusion.loss_weights`).
        mask_ratio_min: the share of masked pivots in training is drawn from a normal of mean 1, cut to [this, 1].
        dense_mask_ratio: "cosine" draws the share of masked dense tokens as cos(pi / 2 u), "truncated_normal" as that
            of the pivots.
        dense_mask_ratio_min: lower end of the latter.
        pivot_rate: share of training images whose dense phase gets hidden states of pivots rather than placeholders.
        pivot_warmup_epochs: until `model.epoch` reaches this, that share rises from 0.
        position_init: the learned positions start from a normal of deviation 0.02 ("normal", published), or as sines
            and cosines of row and column ("sinusoid").
        scaling_factor: what the tokenizer's latents were multiplied by in training, if known; the pipeline refuses a
            tokenizer with another one.

    Attributes:
        epoch: set by a trainer that wants the warm-up; None is after it.

    Raises:
        InvalidInputError: sizes that do not fit each other.
    """

    system = "himar"
    published: ClassVar[dict[str, Published]] = published_checkpoints()
    sampling_defaults: ClassVar[dict[str, Any]] = {
        "guidance_scale": 1.0,
        "pivot_guidance_scale": None,
        "guidance_schedule": "linear",
        "temperature": 1.0,
        "num_inference_steps": 4,
        "num_pivot_steps": None,
        "num_diffusion_steps": None,
        "num_dense_diffusion_steps": None,
    }

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        grid: Sequence[int] = (16, 16),
        pivot_grid: Sequence[int] = (8, 8),
        hidden_size: int = 768,
        encoder_layers: int = 12,
        encoder_heads: int = 12,
        decoder_layers: int = 12,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        num_classes: int | None = 1000,
        caption_dim: int | None = None,
        num_condition_tokens: int = 64,
        condition_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        projection_dropout: float = 0.1,
        head_layers: int = 6,
        head_width: int = 1024,
        dense_head: str = "transformer",
        dense_head_layers: int = 6,
        dense_head_width: int = 512,
        dense_head_heads: int = 8,
        dense_head_mlp_ratio: float = 4.0,
        num_diffusion_steps: str = "100",
        num_dense_diffusion_steps: str = "250",
        diffusion_repeats: int = 4,
        loss_weighting: str = "epsilon",
        mask_ratio_min: float = 0.7,
        dense_mask_ratio: str = "cosine",
        dense_mask_ratio_min: float = 0.38,
        pivot_rate: float = 0.25,
        pivot_warmup_epochs: float = 100.0,
        position_init: str = "normal",
        scaling_factor: float | None = None,
    ) -> None:
        super().__init__()
        for name, sides in (("grid", grid), ("pivot_grid", pivot_grid)):
            if len(sides) != 2 or min(sides) < 1:
                raise InvalidInputError(f"{name} must be (rows, cols), both at least 1; got {tuple(sides)}")
        for name, value, allowed in (
            ("dense_head", dense_head, DENSE_HEADS),
            ("dense_mask_ratio", dense_mask_ratio, DENSE_MASK_RATIOS),
        ):
            if value not in allowed:
                raise InvalidInputError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        if dense_head == "transformer" and (dense_head_width % dense_head_heads or dense_head_width % 4):
            raise InvalidInputError(
                f"dense_head_width must be a multiple of 4 and of dense_head_heads {dense_head_heads}; "
                f"got {dense_head_width}"
            )
        self.check_respacing(num_diffusion_steps)
        self.check_respacing(num_dense_diffusion_steps)
        check_weighting(loss_weighting)
        self.grid = (int(grid[0]), int(grid[1]))
        self.pivot_grid = (int(pivot_grid[0]), int(pivot_grid[1]))
        self.token_size = latent_channels
        self.num_tokens, self.num_pivots = self.grid[0] * self.grid[1], self.pivot_grid[0] * self.pivot_grid[1]
        self.epoch: float | None = None
        total = self.num_pivots + self.num_tokens
        self._build_conditions(num_classes, caption_dim, num_condition_tokens, condition_dropout, hidden_size)
        self._build_stacks(
            (hidden_size, hidden_size),
            (encoder_layers, decoder_layers),
            (encoder_heads, decoder_heads),
            mlp_ratio,
            norm_eps,
            attention_dropout,
            projection_dropout,
            ScaleAwareBlock,
        )
        for side in ("encoder", "decoder"):
            setattr(self, f"{side}_task_emb", nn.Embedding(2, hidden_size))
            setattr(self, f"{side}_blocks_ada", nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 4 * hidden_size)))
        self.z_proj = nn.Linear(latent_channels, hidden_size)
        self.cond_proj = nn.Linear(latent_channels, hidden_size)
        self.cond_z_proj = nn.Linear(hidden_size, hidden_size)
        self.cond_tokens = nn.Parameter(torch.zeros(1, self.num_pivots, latent_channels))
        length = 2 * (num_condition_tokens + total)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, hidden_size))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 2 * total, hidden_size))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, total, hidden_size))
        self.diffloss = DiffusionHead(latent_channels, hidden_size, head_layers, head_width)
        self.cond_diffloss: TransformerHead | DiffusionHead
        if dense_head == "mlp":
            self.cond_diffloss = DiffusionHead(latent_channels, hidden_size, dense_head_layers, dense_head_width)
        else:
            self.cond_diffloss = TransformerHead(
                self.grid,
                latent_channels,
                hidden_size,
                dense_head_layers,
                dense_head_width,
                dense_head_heads,
                dense_head_mlp_ratio,
            )
        self._initialise()
        dense, pivots = grid_places(self.grid), grid_places(self.pivot_grid)
        # A pivot lies in the middle of the dense tokens that it stands for.
        apart = torch.tensor([side / coarse for side, coarse in zip(self.grid, self.pivot_grid)])
        self._initialise_positions(torch.cat([(pivots + 0.5) * apart - 0.5, dense]), position_init)
        nn.init.normal_(self.encoder_task_emb.weight)
        nn.init.normal_(self.decoder_task_emb.weight)
        self.diffloss.initialise()
        self.cond_diffloss.initialise()

    @classmethod
    def tiny(cls, **overrides: Any) -> HiMAR:
        """Random weights in eval mode, builds in milliseconds: 2x2 pivots, a 4x4 grid of 4 channels, 10 classes."""
        arguments: dict[str, Any] = {
            "latent_channels": 4,
            "grid": (4, 4),
            "pivot_grid": (2, 2),
            "hidden_size": 32,
            "encoder_layers": 2,
            "encoder_heads": 4,
            "decoder_layers": 2,
            "decoder_heads": 4,
            "num_classes": 10,
            "num_condition_tokens": 4,
            "head_layers": 2,
            "head_width": 32,
            "dense_head_layers": 2,
            "dense_head_width": 32,
            "dense_head_heads": 4,
            "num_diffusion_steps": "8",
            "num_dense_diffusion_steps": "8",
        }
        return cls(**{**arguments, **overrides}).eval()

    # ------------------------------------------------------------------------------------------------ official files
    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """From the authors' constructor arguments; our own pass unchanged.

        Raises:
            InvalidInputError: patches of several latents, or unequal widths, which their code does not support either.
        """
        if not config.keys() & OFFICIAL_ONLY:
            return dict(config)
        given = {key: value for key, value in config.items() if key not in OFFICIAL_IGNORED}
        side, stride, pivots = given.pop("img_size", 256), given.pop("vae_stride", 16), given.pop("cond_scale", 8)
        width, channels = given.get("encoder_embed_dim", 1024), given.get("vae_embed_dim", 16)
        for name, expected in (("patch_size", 1), ("decoder_embed_dim", width), ("cond_dim", channels)):
            if given.pop(name, expected) != expected:
                raise InvalidInputError(f"Hi-MAR needs {name}={expected}; got {config[name]}")
        if side % stride:
            raise InvalidInputError(f"img_size {side} must be a multiple of vae_stride {stride}")
        cosine = given.pop("cos", False)
        return {
            "grid": (side // stride,) * 2,
            "pivot_grid": (pivots, pivots),
            "dense_mask_ratio": "cosine" if cosine else "truncated_normal",
            **{OFFICIAL_NAMES.get(key, key): value for key, value in given.items()},
        }

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Flat, or the averaged weights (`model_ema`) of a training checkpoint."""
        return without_wrapper(state)

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without what nothing reads."""
        return {key: value for key, value in state.items() if key not in UNUSED_KEYS}

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise MAR's files."""
        if {"cond_tokens", "encoder_task_emb.weight"} <= set(missing):
            return "this is a MAR checkpoint: the pivots (cond_*) are missing; load it with MAR."
        return None

    @classmethod
    def infer_config(cls, state: Mapping[str, Any], *, num_heads: int, dense_head_heads: int) -> dict[str, Any]:
        """Constructor arguments from the shapes in a state dict of a class-conditional model (any wrapper).

        Args:
            state: the authors' file, read.
            num_heads: attention heads of both stacks, which no shape shows.
            dense_head_heads: those of the diffusion transformer.
        """
        flat = without_wrapper(state)
        pivots = flat["cond_tokens"].shape[1]
        total = flat["diffusion_pos_embed_learned"].shape[1]
        rows, pivot_rows = math.isqrt(total - pivots), math.isqrt(pivots)
        width, dense = flat["z_proj.weight"].shape[0], "cond_diffloss.net"
        return {
            "latent_channels": flat["z_proj.weight"].shape[1],
            "grid": (rows, (total - pivots) // rows),
            "pivot_grid": (pivot_rows, pivots // pivot_rows),
            "hidden_size": width,
            "encoder_layers": count_blocks(flat, "encoder_blocks"),
            "encoder_heads": num_heads,
            "decoder_layers": count_blocks(flat, "decoder_blocks"),
            "decoder_heads": num_heads,
            "mlp_ratio": flat["encoder_blocks.0.mlp.fc1.weight"].shape[0] / width,
            "num_classes": flat["class_emb.weight"].shape[0],
            "num_condition_tokens": flat["encoder_pos_embed_learned"].shape[1] // 2 - total,
            "head_layers": count_blocks(flat, "diffloss.net.res_blocks"),
            "head_width": flat["diffloss.net.input_proj.weight"].shape[0],
            "dense_head_layers": count_blocks(flat, f"{dense}.blocks"),
            "dense_head_width": flat[f"{dense}.x_embedder.proj.weight"].shape[0],
            "dense_head_heads": dense_head_heads,
            "dense_head_mlp_ratio": (
                flat[f"{dense}.blocks.0.mlp.fc1.weight"].shape[0] / flat[f"{dense}.x_embedder.proj.weight"].shape[0]
            ),
        }

    # ------------------------------------------------------------------------------------------------------- network
    def scale_vector(self, side: str, phase: int) -> Tensor:
        """The vector [4 D] of a phase that all blocks of the "encoder" or the "decoder" share."""
        return getattr(self, f"{side}_blocks_ada")(getattr(self, f"{side}_task_emb").weight[phase])

    def phase(self, index: int) -> Phase:
        """The tables of a phase (0 pivots, 1 dense). Positions 0..P-1 are the pivots, the dense tokens follow."""
        total = self.num_pivots + self.num_tokens
        length = self.num_condition_tokens + total
        places = slice(index * length, (index + 1) * length)
        vectors = {side: self.scale_vector(side, index) for side in ("encoder", "decoder")}
        return Phase(
            self.encoder_pos_embed_learned[0, places],
            self.decoder_pos_embed_learned[0, places],
            self.mask_token[0, index * total : (index + 1) * total],
            self.diffusion_pos_embed_learned[0],
            [block.scales(vectors["encoder"], index) for block in self.encoder_blocks],
            [block.scales(vectors["decoder"], index) for block in self.decoder_blocks],
        )

    def pivot_states(self, pivots: Tensor, visible: Tensor, wanted: Tensor, context: Tensor) -> Tensor:
        """Hidden states [B, Q, D] of pivots at `wanted` [B, Q], from those at `visible` [B, V]; the pivot phase.

        Args:
            pivots: [B, P, C]; only visible ones are read.
            visible, wanted: together all pivots, or with visible ones among the wanted.
            context: [B, T, D].
        """
        phase, batch = self.phase(PIVOTS), len(pivots)
        known = take_tokens(pivots, visible)
        tokens = self.cond_proj(known.to(context.dtype))
        encoded = self.encode_visible(phase, context.expand(batch, -1, -1), tokens, visible)
        dense = torch.arange(self.num_pivots, self.num_pivots + self.num_tokens, device=pivots.device)
        masked_positions = torch.cat([dense.expand(batch, -1), wanted], dim=1)
        return self.decode_hidden(phase, encoded, visible, masked_positions, wanted.shape[1])

    def dense_states(
        self, tokens: Tensor, visible: Tensor, hidden: Tensor, pivots: Tensor, context: Tensor, *, every: bool
    ) -> Tensor:
        """Hidden states of dense tokens; the dense phase.

        Args:
            tokens: [B, N, C]; only visible ones are read.
            visible, hidden: int64 [B, V] and [B, M], which of 0..N-1 are known and unknown.
            pivots: [B, P, D], what stands for them.
            context: [B, T, D].
            every: return all [B, N, D] in raster order rather than those of `hidden`.
        """
        phase, batch = self.phase(DENSE), len(tokens)
        known = take_tokens(tokens, visible)
        inputs = torch.cat([pivots, self.z_proj(known.to(context.dtype))], dim=1)
        places = torch.arange(self.num_pivots, device=tokens.device).expand(batch, -1)
        places = torch.cat([places, visible + self.num_pivots], dim=1)
        encoded = self.encode_visible(phase, context.expand(batch, -1, -1), inputs, places)
        wanted = self.num_tokens if every else hidden.shape[1]
        states = self.decode_hidden(phase, encoded, places, hidden + self.num_pivots, wanted)
        return in_raster_order(states, torch.cat([visible, hidden], dim=1)) if every else states

    # ------------------------------------------------------------------------------------------------------ training
    @staticmethod
    def pivot_images(images: Tensor, size: tuple[int, int]) -> Tensor:
        """The small images [B, 3, h, w] whose tokens are the pivots, from images [B, 3, H, W] in [-1, 1].

        Bicubic without antialiasing, as the published models were trained; a little beyond [-1, 1] at edges.
        """
        return functional.interpolate(images, size=size, mode="bicubic", align_corners=False)

    @property
    def placeholder_rate(self) -> float:
        """Share of training images whose dense phase sees placeholders instead of any pivot."""
        epochs = self.config.pivot_warmup_epochs
        warmth = 1.0 if self.epoch is None or epochs <= 0 else min(1.0, self.epoch / epochs)
        return 1.0 - self.config.pivot_rate * warmth

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Both phases in one forward pass (section 3): 0.4 of the pivots' loss and 0.6 of the dense tokens'.

        The dense phase sees the hidden states of the pivots that the pivot phase predicted (through which no gradient
        flows), placeholders for the pivots that it was given, and in most images nothing but placeholders.

        Args:
            batch: `latents` [B, C, H, W] or `features` [B, N, C], and of the small image (bicubic without antialiasing)
                `pivot_latents` [B, C, h, w] or `pivot_features` [B, P, C], scaled; `labels` int64 [B], or
                `text_features` [B, T, caption_dim] with `text_mask` bool [B, T].
            generator: draws orders, shares of masked tokens, dropped conditions and pivots, noise levels and noise.

        Returns:
            `loss`, `pivot_loss` and `dense_loss`.
        """
        channels = self.token_size
        dense = self.batch_tokens(batch, ("latents", "features"), self.grid, channels, 1)
        pivots = self.batch_tokens(batch, ("pivot_latents", "pivot_features"), self.pivot_grid, channels, 1)
        condition, device, size = self.batch_condition(batch), dense.device, len(dense)
        if len(pivots) != size:
            raise InvalidInputError(f"{len(pivots)} images of pivots for {size} images")
        orders = [
            masked.random_orders(size, count, generator).to(device) for count in (self.num_pivots, self.num_tokens)
        ]

        count = math.ceil(self.num_pivots * masked.truncated_normal_rate(self.config.mask_ratio_min, generator))
        hidden, visible = orders[0][:, :count].sort(1).values, orders[0][:, count:].sort(1).values
        context = self.context(condition, self.condition_drop(size, generator))
        states = self.pivot_states(pivots, visible, hidden, context)
        target = take_tokens(pivots, hidden).flatten(0, 1)
        settings = {
            "repeats": self.config.diffusion_repeats,
            "weighting": self.config.loss_weighting,
            "generator": generator,
        }
        pivot_loss = self.diffloss.loss(target, states.flatten(0, 1), **settings)

        if self.config.dense_mask_ratio == "cosine":
            rate = masked.cosine_rate(generator)
        else:
            rate = masked.truncated_normal_rate(self.config.dense_mask_ratio_min, generator)
        stand_ins = self.training_pivots(states, hidden, generator)
        count = max(1, math.ceil(self.num_tokens * rate))
        hidden, visible = orders[1][:, :count].sort(1).values, orders[1][:, count:].sort(1).values
        context = self.context(condition, self.condition_drop(size, generator))
        joint = isinstance(self.cond_diffloss, TransformerHead)
        states = self.dense_states(dense, visible, hidden, stand_ins, context, every=joint)
        if isinstance(self.cond_diffloss, TransformerHead):
            mask = torch.zeros(size, self.num_tokens, device=device).scatter(1, hidden, 1.0).view(size, 1, *self.grid)
            target = unpatchify(dense, self.grid, 1)
            dense_loss = self.cond_diffloss.loss(target, states, mask, **settings)
        else:
            target = take_tokens(dense, hidden).flatten(0, 1)
            dense_loss = self.cond_diffloss.loss(target, states.flatten(0, 1), **settings)
        loss = PIVOT_WEIGHT * pivot_loss + DENSE_WEIGHT * dense_loss
        return {"loss": loss, "pivot_loss": pivot_loss.detach(), "dense_loss": dense_loss.detach()}

    def training_pivots(self, states: Tensor, predicted: Tensor, generator: torch.Generator | None) -> Tensor:
        """What the dense phase sees of the pivots in training [B, P, D].

        Args:
            states: hidden states [B, Q, D] of the pivots at `predicted` int64 [B, Q].
            predicted: pivots that the pivot phase predicted.
            generator: draws the images that get placeholders only.
        """
        placeholders = self.cond_proj(self.cond_tokens.to(states.dtype)).expand(len(states), -1, -1)
        inputs = self.cond_z_proj(states.detach())
        mixed = placeholders.scatter(1, predicted[..., None].expand_as(inputs), inputs)
        drop = sampling.uniform((len(states),), generator, states.device) <= self.placeholder_rate
        return torch.where(drop[:, None, None], placeholders, mixed)

    # ------------------------------------------------------------------------------------------------------ sampling
    def known_tokens(self, prefix: VisualTokens | None, batch: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """See `known_values`; known tokens are dense ones, on the whole grid."""
        if prefix is not None and prefix.grid != grid:
            raise InvalidInputError(
                f"Hi-MAR keeps known tokens of its {grid[0]}x{grid[1]} grid (give a mask for a part of it), not of "
                f"{prefix.grid}: pivots cannot be given"
            )
        return self.known_values(prefix, batch, grid, self.token_size)

    def sample(
        self,
        condition: Tensor | TextCondition | None = None,
        *,
        num_images: int | None = None,
        guidance_scale: float = 1.0,
        pivot_guidance_scale: float | None = None,
        guidance_schedule: GuidanceSchedule = "linear",
        temperature: float = 1.0,
        num_inference_steps: int = 4,
        num_pivot_steps: int | None = None,
        num_diffusion_steps: str | int | None = None,
        num_dense_diffusion_steps: str | int | None = None,
        generator: Generators = None,
        grid: Sequence[int] | None = None,
        prefix: VisualTokens | None = None,
    ) -> Iterator[Step]:
        """Write the pivots of the images, then the images.

        Args:
            condition: class labels int64 [B], or a `TextCondition`.
            num_images: B, to draw without a condition.
            guidance_scale: u + s (c - u) on the noise of the dense tokens; 1 is no guidance. The unconditional rows see
                the conditional pivots.
            pivot_guidance_scale: the same for the pivots; None takes `guidance_scale`.
            guidance_schedule: "linear" raises the scales from 1 with the share of tokens written, "constant" keeps
                them; a function maps that share to the scale of both phases (where guidance is on at all).
            temperature: scales the noise of the heads' steps; 0 adds none.
            num_inference_steps: steps of the dense phase.
            num_pivot_steps: steps of the pivot phase; None is four for each row of pivots.
            num_diffusion_steps, num_dense_diffusion_steps: of the two heads; None is the checkpoint's.
            generator: one for all images, or one an image (each image then does not depend on the others).
            grid: must be the training grid, whose positions are learned.
            prefix: known dense tokens, which are kept: any cells (its `mask`), equally many in each image.

        Yields:
            A `Step` for every step of both phases that had tokens to draw; `changed` is [B, Q]. Those of the pivot
            phase hold the pivots on their own grid, those of the dense phase the image's tokens. `tokens.features` are
            scaled as in training.

        Raises:
            InvalidInputError: at once, if an argument is out of range.
            InvalidOutputError: NaN tokens (with CUDA, after the last step of a phase).
        """
        config = self.config
        settings = {
            "guidance_scale": guidance_scale,
            "pivot_guidance_scale": guidance_scale if pivot_guidance_scale is None else pivot_guidance_scale,
            "guidance_schedule": guidance_schedule,
            "temperature": temperature,
            "num_inference_steps": num_inference_steps,
            "num_pivot_steps": 4 * self.pivot_grid[0] if num_pivot_steps is None else num_pivot_steps,
            "num_diffusion_steps": config.num_diffusion_steps if num_diffusion_steps is None else num_diffusion_steps,
            "num_dense_diffusion_steps": (
                config.num_dense_diffusion_steps if num_dense_diffusion_steps is None else num_dense_diffusion_steps
            ),
        }
        condition, batch = self.check_sampling(condition, num_images, grid, self.grid, generator, settings)
        features, known = self.known_tokens(prefix, batch, self.grid)
        return self._write(condition, features, known, settings, generator)

    @torch.no_grad()
    def _write(
        self,
        condition: Tensor | TextCondition | None,
        features: Tensor,
        known: Tensor,
        settings: Mapping[str, Any],
        generator: Generators,
    ) -> Iterator[Step]:
        batch, device = len(features), features.device
        pivot_plan = plan_steps(self.num_pivots, settings["num_pivot_steps"])
        dense_plan = plan_steps(self.num_tokens, settings["num_inference_steps"], int((~known[0]).sum()))
        if not dense_plan:
            return
        orders = [masked.random_orders(batch, count, generator) for count in (self.num_pivots, self.num_tokens)]
        orders[1] = orders[1].gather(1, known.gather(1, orders[1]).long().argsort(dim=1, stable=True))
        total = len(pivot_plan) + len(dense_plan)

        states = torch.zeros(batch, self.num_pivots, self.fake_latent.shape[1], device=device, dtype=self.dtype)
        pivots = self._pivot_steps(condition, orders[0], pivot_plan, states, settings, generator)
        for index, (tokens, changed) in enumerate(pivots):
            yield Step(index, total, tokens, changed)
        values = TokenValues(features, known, self.grid)
        dense = self._dense_steps(condition, orders[1], dense_plan, states, values, settings, generator)
        for index, (tokens, changed) in enumerate(dense, len(pivot_plan)):
            yield Step(index, total, tokens, changed)

    def _pivot_steps(
        self,
        condition: Tensor | TextCondition | None,
        order: Tensor,
        plan: list[PlannedStep],
        states: Tensor,
        settings: Mapping[str, Any],
        generator: Generators,
    ) -> Iterator[tuple[VisualTokens, Tensor]]:
        """The pivot phase; fills `states` [B, P, D] with the hidden states behind the pivots."""
        batch, device, scale = len(order), states.device, settings["pivot_guidance_scale"]
        guided = scale != 1.0
        context, rows = self.distinct_context(condition, batch, guided)
        run = MaskedRun(self, self.phase(PIVOTS), context, rows, batch, (0, self.num_pivots))
        draw = self.diffloss.sampler(settings["num_diffusion_steps"])
        nothing = torch.zeros(batch, self.num_pivots, self.token_size, device=device)
        values = TokenValues(nothing, torch.zeros(batch, self.num_pivots, dtype=torch.bool), self.pivot_grid)
        dense = torch.arange(self.num_pivots, self.num_pivots + self.num_tokens, device=device).expand(batch, -1)
        for index, step in enumerate(plan):
            changed = order[:, step.left : step.masked].sort(1).values
            positions = changed.to(device)
            unknown = torch.cat([dense, order[:, : step.left].to(device), positions], dim=1)
            z = run.hidden(unknown, positions.shape[1])
            states.scatter_(1, positions[..., None].expand(-1, -1, z.shape[2]), z[:batch])
            drawn = draw(
                z.flatten(0, 1),
                num_images=batch,
                guidance_scale=guidance_at(settings["guidance_schedule"], scale, step.share) if guided else None,
                temperature=settings["temperature"],
                generator=generator,
            ).unflatten(0, (batch, -1))
            last = index + 1 == len(plan)
            tokens = values.write(drawn, positions, last=last)
            if not last:
                run.add(self.cond_proj(drawn.to(self.dtype)), positions)
            yield tokens, changed

    def _dense_steps(
        self,
        condition: Tensor | TextCondition | None,
        order: Tensor,
        plan: list[PlannedStep],
        states: Tensor,
        values: TokenValues,
        settings: Mapping[str, Any],
        generator: Generators,
    ) -> Iterator[tuple[VisualTokens, Tensor]]:
        """The dense phase, given the hidden states [B, P, D] of the pivots; `order` has the unknown tokens first."""
        batch, device, scale = len(order), states.device, settings["guidance_scale"]
        guided = scale != 1.0
        context, rows = self.distinct_context(condition, batch, guided)
        run = MaskedRun(self, self.phase(DENSE), context, rows, batch)
        run.add(self.cond_z_proj(states), torch.arange(self.num_pivots, device=device).expand(batch, -1))
        draw = self.cond_diffloss.sampler(settings["num_dense_diffusion_steps"])
        shared: dict[str, Any] = {"temperature": settings["temperature"], "generator": generator}
        given = order[:, plan[0].masked :].to(device)
        if given.shape[1]:
            taken = take_tokens(values.features, given)
            run.add(self.z_proj(taken.to(self.dtype)), given + self.num_pivots)
        for index, step in enumerate(plan):
            changed = order[:, step.left : step.masked].sort(1).values
            positions = changed.to(device)
            unknown = torch.cat([order[:, : step.left].to(device), positions], dim=1)
            shared["guidance_scale"] = guidance_at(settings["guidance_schedule"], scale, step.share) if guided else None
            joint = isinstance(draw, TransformerHeadSampler)
            z = run.hidden(unknown + self.num_pivots, self.num_tokens if joint else positions.shape[1])
            if isinstance(draw, TransformerHeadSampler):
                z = in_raster_order(z, torch.cat([run.visible[:, self.num_pivots :] - self.num_pivots, unknown], dim=1))
                held, missing = None, None
                if step.masked < self.num_tokens:
                    held = unpatchify(values.features, self.grid, 1)
                    missing = ~values.known.view(batch, 1, *self.grid)
                drawn = draw(z, (batch, self.token_size, *self.grid), known=held, unknown=missing, **shared)
                drawn = take_tokens(drawn.flatten(2).mT, positions)
            else:
                drawn = draw(z.flatten(0, 1), num_images=batch, **shared).unflatten(0, (batch, -1))
            last = index + 1 == len(plan)
            tokens = values.write(drawn, positions, last=last)
            if not last:
                run.add(self.z_proj(drawn.to(self.dtype)), positions + self.num_pivots)
            yield tokens, changed


def in_raster_order(states: Tensor, positions: Tensor) -> Tensor:
    """Rows [R, N, D] that stand at `positions` int64 [B, N], sorted by them; with guidance R is 2 B."""
    places = positions.repeat(len(states) // len(positions), 1).argsort(dim=1)
    return take_tokens(states, places)
