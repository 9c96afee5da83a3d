"""Masked autoregression over continuous tokens: what MAR and Hi-MAR share.

An encoder sees a condition and the tokens known so far, a decoder adds mask tokens for the rest, and its output at a
position conditions the diffusion head that draws the token there. Attention has no mask anywhere, so the sequences
here are not in raster order: known tokens stand in the order in which they became known, and those wanted next last.

Source: Li et al., "Autoregressive Image Generation without Vector Quantization" (arXiv 2406.11838).
Letters: B images, R rows (2 B with guidance), U distinct rows, T condition tokens, L token positions, V visible and
M masked ones, Q positions whose output is wanted, E and D channels of encoder and decoder, C channels of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from vistok.errors import InvalidInputError
from vistok.nn import sampling
from vistok.nn.conditions import check_labels, check_text
from vistok.nn.continuous import FiniteCheck, known_values
from vistok.nn.model import VistokModel
from vistok.nn.positions import plane_sinusoids
from vistok.nn.sampling import Generators, Step
from vistok.nn.text import TextCondition
from vistok.nn.vit import BlockScales, ViTBlock
from vistok.tokens import VisualTokens

__all__ = [
    "OFFICIAL_NAMES",
    "GuidanceSchedule",
    "MaskedGenerator",
    "MaskedRun",
    "Phase",
    "PlannedStep",
    "TokenValues",
    "cosine_rate",
    "count_blocks",
    "grid_places",
    "guidance_at",
    "patchify",
    "plan_steps",
    "random_orders",
    "take_tokens",
    "truncated_normal_rate",
    "unpatchify",
    "without_wrapper",
]

# "linear" raises the scale from 1 with the share of tokens written, "constant" keeps it, a function maps that share
# (0..1, after the step) to the scale.
GuidanceSchedule: TypeAlias = str | Callable[[float], float]
SCHEDULES = ("linear", "constant")
POSITION_INITS = ("normal", "sinusoid")
# The authors' constructor argument -> ours, where MAR and Hi-MAR agree.
OFFICIAL_NAMES = {
    "vae_embed_dim": "latent_channels",
    "encoder_depth": "encoder_layers",
    "encoder_num_heads": "encoder_heads",
    "decoder_depth": "decoder_layers",
    "decoder_num_heads": "decoder_heads",
    "mlp_ratio": "mlp_ratio",
    "norm_eps": "norm_eps",
    "class_num": "num_classes",
    "buffer_size": "num_condition_tokens",
    "label_drop_prob": "condition_dropout",
    "attn_dropout": "attention_dropout",
    "proj_dropout": "projection_dropout",
    "diffloss_d": "head_layers",
    "diffloss_w": "head_width",
    "num_sampling_steps": "num_diffusion_steps",
    "diffusion_batch_mul": "diffusion_repeats",
    "mask_ratio_min": "mask_ratio_min",
}


# ---------------------------------------------------------------------------------------------------- tokens and masks
def patchify(latents: Tensor, patch_size: int) -> Tensor:
    """Latents [B, C, H, W] to tokens [B, N, C p p] in raster order; in a token: channel, then row, then column."""
    batch, channels, height, width = latents.shape
    rows, cols = height // patch_size, width // patch_size
    cut = latents.reshape(batch, channels, rows, patch_size, cols, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * cols, -1)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Tokens [B, N, C p p] of a (rows, cols) grid to latents [B, C, H, W]."""
    (rows, cols), side = grid, patch_size
    cut = tokens.reshape(len(tokens), rows, cols, -1, side, side)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, rows * side, cols * side)


def grid_places(grid: tuple[int, int]) -> Tensor:
    """(row, column) of every cell, float32 [N, 2] in raster order."""
    rows, cols = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in grid), indexing="ij")
    return torch.stack([rows.flatten(), cols.flatten()], dim=1)


def random_orders(batch: int, length: int, generator: Generators) -> Tensor:
    """A random order of 0..length-1 for each image, int64 [B, length] on the CPU.

    Args:
        batch: B.
        length: positions.
        generator: one for all images, or one an image (whose order then does not depend on the batch).
    """
    if isinstance(generator, Sequence):
        return torch.cat([random_orders(1, length, one) for one in generator])
    source = torch.device("cpu") if generator is None else generator.device
    return torch.rand(batch, length, generator=generator, device=source).argsort(dim=1).cpu()


def truncated_normal_rate(low: float, generator: torch.Generator | None) -> float:
    """One draw from a normal of mean 1 and deviation 0.25, cut to [low, 1]: the share of tokens to mask in training."""
    uniform = float(torch.rand(1, generator=generator, device=None if generator is None else generator.device))
    start = 0.5 * (1.0 + math.erf((low - 1.0) / 0.25 / math.sqrt(2.0)))
    place = torch.tensor(2.0 * (start + uniform * (0.5 - start)) - 1.0, dtype=torch.float64)
    return min(1.0, max(low, 1.0 + 0.25 * math.sqrt(2.0) * float(torch.erfinv(place))))


def cosine_rate(generator: torch.Generator | None) -> float:
    """One draw of cos(pi / 2 u), u uniform: the share of tokens to mask, as often as decoding meets it."""
    return math.cos(math.pi / 2.0 * float(sampling.uniform((1,), generator, "cpu")))


class PlannedStep(NamedTuple):
    """A decoding step: of `masked` unknown tokens, all but `left` are drawn; `share` of all tokens is then counted as
    written by linear guidance (never 1: the last step counts one token as missing, as the authors' code does)."""

    masked: int
    left: int
    share: float


def plan_steps(total: int, num_steps: int, unknown: int | None = None) -> list[PlannedStep]:
    """The cosine schedule: how many tokens each step draws.

    Args:
        total: L.
        num_steps: steps for all of them; more than L is as good as L.
        unknown: how many are unknown at the start (None: all); the schedule is entered where as many are left.
    """
    steps, masked, start = [], total, total if unknown is None else unknown
    for index in range(num_steps):
        # numpy's cosine, term by term as published: the floor of a last digit decides.
        planned = int(np.floor(total * np.cos(math.pi / 2.0 * (index + 1) / num_steps)))
        counted = max(1, min(masked - 1, planned))
        left = 0 if index + 1 == num_steps else counted
        if left < min(masked, start):
            steps.append(PlannedStep(min(masked, start), left, (total - counted) / total))
        masked = left
    return steps


def guidance_at(schedule: GuidanceSchedule, guidance_scale: float, share: float) -> float:
    """The guidance scale of a step after which `share` of the tokens is written."""
    if callable(schedule):
        return float(schedule(share))
    return guidance_scale if schedule == "constant" else 1.0 + (guidance_scale - 1.0) * share


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for a table [L, D] and int64 [B, N]: a flat index_select copies whole rows."""
    return table.index_select(0, index.flatten()).unflatten(0, index.shape)


def take_tokens(values: Tensor, index: Tensor) -> Tensor:
    """The rows of values [B, N, D] at int64 [B, n], image by image: [B, n, D]."""
    batch, total = values.shape[:2]
    starts = torch.arange(batch, device=values.device)[:, None] * total
    return gather_rows(values.flatten(0, 1), index + starts)


# ------------------------------------------------------------------------------------------------------- the two stacks
@dataclass(frozen=True)
class Phase:
    """The tables of one pass over the network.

    Attributes:
        encoder_positions: [T + L, E], condition tokens first.
        decoder_positions: [T + L, D].
        mask_tokens: [L, D] or [1, D].
        output_positions: [L, D], added to the decoder's output.
        encoder_scales, decoder_scales: one entry a block.
    """

    encoder_positions: Tensor
    decoder_positions: Tensor
    mask_tokens: Tensor
    output_positions: Tensor
    encoder_scales: Sequence[BlockScales | None]
    decoder_scales: Sequence[BlockScales | None]


class MaskedGenerator(VistokModel):
    """Base of MAR and Hi-MAR: conditions, the two stacks, checks. The constructors' arguments are documented there."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ViTBlock"]  # noqa: RUF012 - the name and type that accelerate reads
    # Settings of `sample`, with what it does when nothing is said. The pipeline takes exactly these.
    sampling_defaults: ClassVar[dict[str, Any]] = {}

    def _build_conditions(
        self,
        num_classes: int | None,
        caption_dim: int | None,
        num_condition_tokens: int,
        condition_dropout: float,
        hidden_size: int,
    ) -> None:
        if (num_classes is None) == (caption_dim is None):
            raise InvalidInputError(
                f"give num_classes for a class-conditional model or caption_dim for a text-conditional one, not "
                f"{'neither' if num_classes is None else 'both'}"
            )
        if num_condition_tokens < 1:
            raise InvalidInputError(f"num_condition_tokens must be at least 1; got {num_condition_tokens}")
        self.num_classes, self.caption_dim = num_classes, caption_dim
        self.num_condition_tokens, self.condition_dropout = num_condition_tokens, condition_dropout
        self.gradient_checkpointing = False
        if num_classes is not None:
            self.class_emb = nn.Embedding(num_classes, hidden_size)
        else:
            assert caption_dim is not None
            self.caption_proj = nn.Linear(caption_dim, hidden_size)
        self.fake_latent = nn.Parameter(torch.zeros(1, hidden_size))

    def _build_stacks(
        self,
        sizes: tuple[int, int],
        layers: tuple[int, int],
        heads: tuple[int, int],
        mlp_ratio: float,
        norm_eps: float,
        attention_dropout: float,
        projection_dropout: float,
        block: Callable[..., ViTBlock] = ViTBlock,
    ) -> None:
        """Encoder and decoder, in this order in each pair."""
        for size, count, side in zip(sizes, heads, ("encoder", "decoder")):
            if size % count:
                raise InvalidInputError(f"{side}_hidden_size {size} must be a multiple of {side}_heads {count}")

        def stack(index: int) -> nn.ModuleList:
            return nn.ModuleList(
                block(
                    sizes[index],
                    heads[index],
                    int(sizes[index] * mlp_ratio),
                    norm_eps=norm_eps,
                    attention_dropout=attention_dropout,
                    projection_dropout=projection_dropout,
                )
                for _ in range(layers[index])
            )

        if min(layers) < 1:
            raise InvalidInputError(f"encoder and decoder need at least one layer; got {layers}")
        self.z_proj_ln = nn.LayerNorm(sizes[0], eps=1e-6)
        self.encoder_blocks = stack(0)
        self.encoder_norm = nn.LayerNorm(sizes[0], eps=norm_eps)
        self.decoder_embed = nn.Linear(sizes[0], sizes[1])
        self.decoder_blocks = stack(1)
        self.decoder_norm = nn.LayerNorm(sizes[1], eps=norm_eps)

    def _initialise(self) -> None:
        """Xavier matrices with zero biases, Normal(0, 0.02) for class vectors, mask tokens and positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.normal_(getattr(self, name), std=0.02)

    def _initialise_positions(self, places: Tensor, kind: str) -> None:
        """Where the learned position vectors of the tokens start.

        Args:
            places: (row, column) of each token [L, 2].
            kind: "normal" leaves them as they are; "sinusoid" starts with what says where they lie, which a small
                network would otherwise have to learn first.

        Raises:
            InvalidInputError: another kind.
        """
        if kind not in POSITION_INITS:
            raise InvalidInputError(f"position_init must be one of {', '.join(POSITION_INITS)}; got {kind!r}")
        if kind == "normal":
            return
        with torch.no_grad():
            for name in ("encoder", "decoder", "diffusion"):
                table = getattr(self, f"{name}_pos_embed_learned")
                vectors = plane_sinusoids(places, table.shape[-1])
                before = 0 if name == "diffusion" else self.num_condition_tokens
                # Of each phase: condition tokens, whose vectors stay, then tokens.
                table.unflatten(1, (-1, before + len(places)))[:, :, before:] = vectors

    def _blocks(
        self,
        blocks: nn.ModuleList,
        x: Tensor,
        qkv: Tensor | None,
        wanted: int | None,
        scales: Sequence[BlockScales | None],
    ) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for index, (block, scale) in enumerate(zip(blocks, scales, strict=True)):
            rows = wanted if index + 1 == len(blocks) else None
            if recompute:
                x = self._gradient_checkpointing_func(block, x, None, rows, scale)
            else:
                x = block(x, qkv if index == 0 else None, rows, scale)
        return x

    def run_encoder(self, phase: Phase, x: Tensor, qkv: Tensor | None = None) -> Tensor:
        """Normed inputs [B, T + V, E] (and what the first block projects them to) to outputs of the same shape."""
        return self.encoder_norm(self._blocks(self.encoder_blocks, x, qkv, None, phase.encoder_scales))

    def run_decoder(self, phase: Phase, x: Tensor, wanted: int, qkv: Tensor | None = None) -> Tensor:
        """Inputs [B, T + L, D] with positions to the last `wanted` outputs [B, Q, D], without output positions."""
        return self.decoder_norm(self._blocks(self.decoder_blocks, x, qkv, wanted, phase.decoder_scales))

    def encode_visible(self, phase: Phase, context: Tensor, tokens: Tensor, visible: Tensor) -> Tensor:
        """Encoder outputs [B, T + V, E] of context [B, T, E] and projected tokens [B, V, E] at `visible` [B, V].

        Positions are added before the norm, which covers the context, too.
        """
        positions, total = phase.encoder_positions, self.num_condition_tokens
        known = tokens + gather_rows(positions[total:], visible)
        return self.run_encoder(phase, self.z_proj_ln(torch.cat([context + positions[:total], known], dim=1)))

    def decode_hidden(self, phase: Phase, encoded: Tensor, visible: Tensor, masked: Tensor, wanted: int) -> Tensor:
        """Conditions of the head [B, Q, D] at the last `wanted` positions of `visible` [B, V] and then `masked` [B, M].

        `encoded` [B, T + V, E] is what the encoder made of the context and the visible tokens.
        """
        positions, total = phase.decoder_positions, self.num_condition_tokens
        x = self.decoder_embed(encoded)
        known = x[:, total:] + gather_rows(positions[total:], visible)
        unknown = gather_rows(phase.mask_tokens + positions[total:], masked)
        x = torch.cat([x[:, :total] + positions[:total], known, unknown.to(x.dtype)], dim=1)
        order = torch.cat([visible, masked], dim=1)[:, -wanted:]
        return self.run_decoder(phase, x, wanted) + gather_rows(phase.output_positions, order)

    # --------------------------------------------------------------------------------------------------- conditions
    @property
    def is_text_conditional(self) -> bool:
        """Whether the condition is a caption rather than a class."""
        return self.caption_dim is not None

    def context(self, condition: Tensor | TextCondition | None, drop: Tensor | None = None) -> Tensor:
        """Condition tokens [B, T, E].

        A class fills all T with its vector, a caption has one each. "No condition" is one learned vector: in every
        place if there is none (None: a single row) or it is dropped (bool [B]), and where a caption has padding.
        """
        null, total = self.fake_latent, self.num_condition_tokens
        if condition is None:
            return null[None].expand(1, total, -1)
        if isinstance(condition, TextCondition):
            x = self.caption_proj(condition.features.to(null.dtype))
            if condition.mask is not None:
                x = torch.where(condition.mask[..., None], x, null)
            return x if drop is None else torch.where(drop[:, None, None], null, x)
        x = self.class_emb(condition)
        if drop is not None:
            x = torch.where(drop[:, None], null, x)
        return x[:, None].expand(-1, total, -1)

    def condition_drop(self, batch: int, generator: torch.Generator | None) -> Tensor | None:
        """bool [B], which conditions this training step replaces by "no condition"; None outside training."""
        if not self.training or self.condition_dropout == 0.0:
            return None
        return sampling.uniform((batch,), generator, self.device) < self.condition_dropout

    def distinct_context(
        self, condition: Tensor | TextCondition | None, batch: int, guided: bool
    ) -> tuple[Tensor, Tensor]:
        """Distinct condition rows [U, T, E] and int64 [R], which of them each row is; unconditional rows come last."""
        if condition is None:
            return self.context(None), torch.zeros(batch, dtype=torch.int64, device=self.device)
        if isinstance(condition, TextCondition):
            features, mask = condition.features, condition.mask
            # Captions of one prompt follow each other, so comparing neighbours finds them.
            same = (features[1:] == features[:-1]).flatten(1).all(1)
            if mask is not None:
                same &= (mask[1:] == mask[:-1]).all(1)
            first = torch.cat([same.new_ones(1), ~same])
            rows = first.cumsum(0) - 1
            held = self.context(TextCondition(features[first], None if mask is None else mask[first]))
        else:
            labels, rows = torch.unique(condition, return_inverse=True)
            held = self.context(labels)
        if guided:
            rows = torch.cat([rows, torch.full_like(rows, len(held))])
            held = torch.cat([held, self.context(None)])
        return held, rows

    def check_condition(self, condition: Tensor | TextCondition) -> Tensor | TextCondition:
        """The condition on the model's device, or an InvalidInputError that says what was expected."""
        name = type(self).__name__
        if self.caption_dim is not None:
            return check_text(condition, self.num_condition_tokens, self.caption_dim, name).to(self.device)
        assert self.num_classes is not None
        return check_labels(condition, self.num_classes, name).to(self.device)

    def batch_condition(self, batch: Mapping[str, Any]) -> Tensor | TextCondition:
        """The condition of a training batch: `labels`, or `text_features` with `text_mask`."""
        key = "text_features" if self.is_text_conditional else "labels"
        if key not in batch:
            given = ", ".join(sorted(batch)) or "none"
            raise InvalidInputError(f"this {type(self).__name__} trains on batches with {key!r}; got {given}")
        if self.is_text_conditional:
            return TextCondition(batch["text_features"], batch.get("text_mask"))
        return batch["labels"]

    def batch_tokens(
        self, batch: Mapping[str, Any], names: tuple[str, str], grid: tuple[int, int], channels: int, patch_size: int
    ) -> Tensor:
        """Training tokens float32 [B, N, C p p]: latents [B, C, H, W] under the first name, or tokens under the second.

        Raises:
            InvalidInputError: missing, misshapen, or with NaN or infinity.
        """
        name = next((name for name in names if name in batch), None)
        if name is None:
            given = ", ".join(sorted(batch)) or "none"
            raise InvalidInputError(f"this {type(self).__name__} trains on batches with {names[0]!r}; got {given}")
        values: Tensor = batch[name]
        shape: tuple[int, ...] = (channels, grid[0] * patch_size, grid[1] * patch_size)
        if name == names[1]:
            shape = (grid[0] * grid[1], channels * patch_size**2)
        if tuple(values.shape[1:]) != shape:
            raise InvalidInputError(
                f"{name} must be [B, {', '.join(map(str, shape))}] for this {type(self).__name__}; got "
                f"{list(values.shape)}: was another tokenizer or image size used?"
            )
        if not bool(torch.isfinite(values).all()):
            raise InvalidInputError(f"{name} contain NaN or infinity: check the tokenizer and the cached files")
        return values.float() if name == names[1] else patchify(values.float(), patch_size)

    # ----------------------------------------------------------------------------------------------------- sampling
    def check_settings(self, generator: Generators, batch: int, **settings: Any) -> None:
        """Raise InvalidInputError, saying what is allowed, if a setting of `sample` for `batch` images is out of range.

        Names that are None stand for their default and pass.
        """
        if isinstance(generator, Sequence) and len(generator) != batch:
            raise InvalidInputError(f"{len(generator)} generators for {batch} images; give one, or one an image")
        for name, value in settings.items():
            if value is None:
                continue
            if name.endswith("guidance_scale") and not 0.0 <= value < float("inf"):
                raise InvalidInputError(f"{name} must be a number >= 0 (1 is no guidance); got {value}")
            if name == "guidance_schedule" and not callable(value) and value not in SCHEDULES:
                raise InvalidInputError(
                    f"guidance_schedule must be {' or '.join(map(repr, SCHEDULES))}, or a function of the share of "
                    f"tokens written; got {value!r}"
                )
            if name == "temperature" and not 0.0 <= value < float("inf"):
                raise InvalidInputError(f"temperature must be a number >= 0 (0 adds no noise); got {value}")
            if name.endswith("diffusion_steps"):
                self.check_respacing(value)
            elif name.endswith("_steps") and (not isinstance(value, int) or value < 1):
                raise InvalidInputError(f"{name} must be at least 1; got {value}")

    @staticmethod
    def check_respacing(respacing: str | int) -> None:
        """Raise InvalidInputError if this says no diffusion steps."""
        from vistok.nn.diffusion import respaced_timesteps

        respaced_timesteps(respacing)

    def check_sampling(
        self,
        condition: Tensor | TextCondition | None,
        num_images: int | None,
        grid: Sequence[int] | None,
        own_grid: tuple[int, int],
        generator: Generators,
        settings: Mapping[str, Any],
    ) -> tuple[Tensor | TextCondition | None, int]:
        """Check the arguments of `sample` before any work; the condition on the model's device, and B.

        Raises:
            InvalidInputError: an argument out of range, or a model in training mode.
        """
        name = type(self).__name__
        if self.training:
            raise InvalidInputError(
                f"this {name} is in training mode, where dropout spoils the samples: call eval() first"
            )
        if (condition is None) == (num_images is None):
            raise InvalidInputError("give a condition, or num_images for images without one, but not both")
        if condition is not None:
            condition = self.check_condition(condition)
            num_images = len(condition)
        assert num_images is not None
        if num_images < 1:
            raise InvalidInputError(f"num_images must be at least 1; got {num_images}")
        if grid is not None and tuple(grid) != own_grid:
            raise InvalidInputError(
                f"{name} has learned the positions of a {own_grid[0]}x{own_grid[1]} grid; it cannot write {tuple(grid)}"
            )
        self.check_settings(generator, num_images, **settings)
        scales = [value for key, value in settings.items() if key.endswith("guidance_scale") and value is not None]
        if any(scale != 1.0 for scale in scales):
            if condition is None:
                raise InvalidInputError("guidance needs a condition; without one use guidance_scale=1")
            if self.condition_dropout == 0.0:
                raise InvalidInputError(
                    "this model was trained without condition dropout and does not know images without a condition; "
                    "use guidance_scale=1"
                )
        return condition, num_images

    def known_values(
        self, prefix: VisualTokens | None, batch: int, grid: tuple[int, int], channels: int
    ) -> tuple[Tensor, Tensor]:
        """What an inpainting starts from (see `vistok.nn.continuous.known_values`).

        Cells may differ between images, their number may not.

        Raises:
            InvalidInputError: if the prefix does not fit.
        """
        features, known = known_values(prefix, batch, grid, channels, self.device)
        if len(set(known.sum(1).tolist())) > 1:
            raise InvalidInputError("every image of a batch must have the same number of known tokens")
        return features, known

    def sample(self, *args: Any, **settings: Any) -> Iterator[Step]:
        """Write images step by step; the generators define it."""
        raise InvalidInputError(f"{type(self).__name__} defines no decoding order")

    def generate(self, condition: Tensor | TextCondition | None = None, **settings: Any) -> VisualTokens:
        """All tokens at once: the last step of `sample`, which documents the settings."""
        tokens = settings.get("prefix")  # nothing is left to write if it is complete
        for step in self.sample(condition, **settings):
            tokens = step.tokens
        assert tokens is not None
        return VisualTokens(features=tokens.features, grid=tokens.grid)


class MaskedRun:
    """One phase of a sampling run: keeps what does not change while tokens become known.

    Of the encoder, the inputs of the context and of known tokens and what its first block projects them to; of the
    decoder, the same for mask tokens. As long as nothing is known, equal rows (same class, and the unconditional ones)
    are run once.

    Args:
        model: the generator.
        phase: its tables.
        context: distinct condition rows [U, T, E].
        rows: int64 [R], which of them each row is; the conditional rows of B images come first.
        batch: B.
        outputs: positions (first, stop) whose output is ever wanted.
    """

    def __init__(
        self,
        model: MaskedGenerator,
        phase: Phase,
        context: Tensor,
        rows: Tensor,
        batch: int,
        outputs: tuple[int, int] | None = None,
    ) -> None:
        self.model, self.phase, self.rows, self.batch = model, phase, rows, batch
        self.total = model.num_condition_tokens
        self.size = len(phase.output_positions)
        self.outputs = (0, self.size) if outputs is None else outputs
        self.visible = torch.empty(batch, 0, dtype=torch.int64, device=context.device)
        self.x = model.z_proj_ln(context + phase.encoder_positions[: self.total])
        self.qkv = self._project(self.x)
        self.masks = (phase.mask_tokens + phase.decoder_positions[self.total :]).to(self.x.dtype)
        self.mask_qkv = model.decoder_blocks[0].project(self.masks, phase.decoder_scales[0])

    def _project(self, x: Tensor) -> Tensor:
        return self.model.encoder_blocks[0].project(x, self.phase.encoder_scales[0])

    def add(self, tokens: Tensor, positions: Tensor) -> None:
        """Make projected tokens [B, n, E] at `positions` [B, n] known."""
        places = self.phase.encoder_positions[self.total :]
        x = self.model.z_proj_ln(tokens + gather_rows(places, positions))
        qkv = self._project(x)
        copies = len(self.rows) // self.batch
        stop = self.total + self.visible.shape[1]
        if stop == self.total:  # rows part ways now
            self.x, self.qkv = (self._spread(held) for held in (self.x, self.qkv))
        for held, new in ((self.x, x), (self.qkv, qkv)):
            held[:, stop : stop + new.shape[1]] = new if copies == 1 else new.repeat(copies, 1, 1)
        self.visible = torch.cat([self.visible, positions], dim=1)

    def _spread(self, held: Tensor) -> Tensor:
        """Rows [U, T, ...] copied to [R, T + L, ...], the rest left for tokens."""
        spread = held.new_empty(len(self.rows), self.total + self.size, held.shape[2])
        spread[:, : self.total] = held.index_select(0, self.rows)
        return spread

    def hidden(self, masked: Tensor, wanted: int) -> Tensor:
        """Conditions of the head [R, Q, D].

        Args:
            masked: int64 [B, M], the unknown positions; no known one may miss here and in what was added.
            wanted: the last so many of all positions, known ones first, are wanted.
        """
        model, phase, total = self.model, self.phase, self.total
        known, copies = self.visible.shape[1], len(self.rows) // self.batch
        if known == 0 and len(self.x) < len(self.rows):
            return self._first(masked[:, -wanted:])
        stop = total + known
        x, qkv = self.x[:, :stop], self.qkv[:, :stop]
        if known == 0:
            x, qkv = x.index_select(0, self.rows), qkv.index_select(0, self.rows)
        visible = self.visible.repeat(copies, 1)
        masked = masked.repeat(copies, 1)
        x = model.decoder_embed(model.run_encoder(phase, x, qkv))
        places = phase.decoder_positions
        x = x + torch.cat([places[:total].expand(len(x), -1, -1), gather_rows(places[total:], visible)], dim=1)
        qkv = model.decoder_blocks[0].project(x, phase.decoder_scales[0])
        x = torch.cat([x, gather_rows(self.masks, masked)], dim=1)
        qkv = torch.cat([qkv, gather_rows(self.mask_qkv, masked)], dim=1)
        order = torch.cat([visible, masked], dim=1)[:, -wanted:]
        return model.run_decoder(phase, x, wanted, qkv) + gather_rows(phase.output_positions, order)

    def _first(self, positions: Tensor) -> Tensor:
        """`hidden` while nothing is known: every output of each distinct row, then those that each row wants."""
        model, phase = self.model, self.phase
        first, stop = self.outputs
        order = torch.cat([torch.arange(stop, self.size), torch.arange(stop)]).to(positions.device)
        x = model.decoder_embed(model.run_encoder(phase, self.x, self.qkv)) + phase.decoder_positions[: self.total]
        qkv = model.decoder_blocks[0].project(x, phase.decoder_scales[0])
        x = torch.cat([x, self.masks[order].expand(len(x), -1, -1)], dim=1)
        qkv = torch.cat([qkv, self.mask_qkv[order].expand(len(qkv), -1, -1)], dim=1)
        outputs = model.run_decoder(phase, x, stop - first, qkv) + phase.output_positions[first:stop]
        positions = positions.repeat(len(self.rows) // self.batch, 1)
        return gather_rows(outputs.flatten(0, 1), self.rows[:, None] * (stop - first) + positions - first)


class TokenValues:
    """The tokens of a sampling run, which must be numbers.

    Args:
        features: float32 [B, N, C], what is known at the start.
        known: bool [B, N] on the CPU.
        grid: (rows, cols).
    """

    def __init__(self, features: Tensor, known: Tensor, grid: tuple[int, int]) -> None:
        self.features, self.known, self.grid = features, known.to(features.device), grid
        self.check = FiniteCheck(features.device)

    def write(self, values: Tensor, positions: Tensor, *, last: bool) -> VisualTokens:
        """Put values [B, n, C] at `positions` int64 [B, n]; all tokens so far.

        Raises:
            InvalidOutputError: at the first value that is no number; with CUDA after the last step.
        """
        self.check(values, last=last)
        self.features = self.features.scatter(1, positions[..., None].expand_as(values), values)
        self.known = self.known.scatter(1, positions, True)
        return VisualTokens(features=self.features, grid=self.grid, mask=self.known)


# ------------------------------------------------------------------------------------------------------- official files
def without_wrapper(state: Mapping[str, Any]) -> dict[str, Any]:
    """The flat state dict of a file: the averaged weights (`model_ema`) of a training checkpoint, else `model`."""
    for key in ("model_ema", "model", "state_dict"):
        if isinstance(state.get(key), Mapping):
            return dict(state[key])
    return dict(state)


def count_blocks(state: Mapping[str, Any], prefix: str) -> int:
    """How many numbered modules the keys `prefix.0...`, `prefix.1...` name."""
    places = {key.removeprefix(f"{prefix}.").split(".")[0] for key in state if key.startswith(f"{prefix}.")}
    return len({place for place in places if place.isdigit()})
