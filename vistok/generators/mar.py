"""MAR: masked autoregression over continuous tokens, each drawn by a small diffusion model.

An encoder sees the class and the tokens known so far, a decoder fills in mask tokens, and its output at an unknown
position conditions an MLP that denoises the token there. Positions become known in a random order, few at first and
many later (cosine schedule): 256 tokens in 64 steps are a good compromise, the published figures take 256.

Source: Li et al., "Autoregressive Image Generation without Vector Quantization" (arXiv 2406.11838).
Letters: B images, R rows (2 B with guidance), T condition tokens, L image tokens, V visible ones, Q wanted ones,
E and D channels of encoder and decoder, C channels of a latent, p side of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vistok.errors import InvalidInputError
from vistok.nn import masked
from vistok.nn.continuous import imagenet_checkpoint
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
    without_wrapper,
)
from vistok.nn.sampling import Generators, Step
from vistok.nn.text import TextCondition
from vistok.registry import Published
from vistok.tokens import VisualTokens

__all__ = ["MAR"]

# name -> (width of encoder and decoder, layers of each, heads, layers and width of the diffusion head)
SIZES = {"b": (768, 12, 12, 6, 1024), "l": (1024, 16, 16, 8, 1280), "h": (1280, 20, 16, 12, 1536)}
# What the authors evaluate with, by size; 64 steps are nearly as good.
GUIDANCE_SCALES = {"b": 2.9, "l": 3.0, "h": 3.2}
PARAMETERS = {"b": 207_924_768, "l": 478_326_304, "h": 942_403_104}
OFFICIAL_FILES = {"b": "mar-base", "l": "mar-large", "h": "mar-huge"}
# The authors' constructor argument -> ours.
OFFICIAL_NAMES = {
    **masked.OFFICIAL_NAMES,
    "patch_size": "patch_size",
    "encoder_embed_dim": "encoder_hidden_size",
    "decoder_embed_dim": "decoder_hidden_size",
}
# Only the authors' configurations have these; gradient checkpointing is switched on by a method here.
OFFICIAL_ONLY = (OFFICIAL_NAMES.keys() - OFFICIAL_NAMES.values()) | {"img_size", "vae_stride"}
OFFICIAL_IGNORED = {"grad_checkpointing"}


def _published() -> dict[str, Published]:
    entries = [
        imagenet_checkpoint(
            "mar",
            size,
            {
                "encoder_hidden_size": width,
                "encoder_layers": layers,
                "encoder_heads": heads,
                "decoder_hidden_size": width,
                "decoder_layers": layers,
                "decoder_heads": heads,
                "head_layers": head_layers,
                "head_width": head_width,
            },
            hub_id="jadechoghari/mar",
            hub_file=f"{OFFICIAL_FILES[size]}.safetensors",
            licence="mit",
            paper="arXiv:2406.11838",
            origin="LTH14/mar",
            sampling={
                "guidance_scale": GUIDANCE_SCALES[size],
                "guidance_schedule": "linear",
                "temperature": 1.0,
                "num_inference_steps": 256,
                "num_diffusion_steps": 100,
            },
            parameters=PARAMETERS[size],
        )
        for size, (width, layers, heads, head_layers, head_width) in SIZES.items()
    ]
    return {entry.name: entry for entry in entries}


class MAR(MaskedGenerator):
    """Masked autoregressive generator of continuous tokens.

    Class-conditional with `num_classes`, text-conditional with `caption_dim` (and `num_classes=None`).

    Args:
        latent_channels: channels C of the tokenizer's latents.
        patch_size: p; a token is a patch of p x p latents.
        grid: (rows, cols) of tokens.
        encoder_hidden_size, encoder_layers, encoder_heads: the stack that sees known tokens.
        decoder_hidden_size, decoder_layers, decoder_heads: the stack that sees mask tokens, too.
        mlp_ratio: hidden width of the blocks' MLPs over their width.
        norm_eps: of the LayerNorms.
        num_classes: classes; None for a text-conditional model.
        caption_dim: channels of the text features; None for a class-conditional model.
        num_condition_tokens: T; a class fills all of them with its vector, a caption has one each.
        condition_dropout: probability of "no condition" in training.
        attention_dropout, projection_dropout: dropout rates of the blocks, in training only.
        head_layers, head_width: residual blocks of the diffusion head, and their width.
        num_diffusion_steps: how the head samples by default, e.g. "100" (see `respaced_timesteps`).
        diffusion_repeats: noise levels at which each masked token is trained in a step.
        loss_weighting: "epsilon" (published), or "velocity" (see `vistok.nn.diffusion.loss_weights`).
        mask_ratio_min: the share of masked tokens in training is drawn from a normal of mean 1, cut to [this, 1].
        position_init: the learned positions start from a normal of deviation 0.02 ("normal", published), or as sines
            and cosines of row and column ("sinusoid").
        scaling_factor: what the tokenizer's latents were multiplied by in training, if known; the pipeline refuses a
            tokenizer with another one.

    Raises:
        InvalidInputError: sizes that do not fit each other.
    """

    system = "mar"
    published: ClassVar[dict[str, Published]] = _published()
    sampling_defaults: ClassVar[dict[str, Any]] = {
        "guidance_scale": 1.0,
        "guidance_schedule": "linear",
        "temperature": 1.0,
        "num_inference_steps": 64,
        "num_diffusion_steps": None,
    }

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        patch_size: int = 1,
        grid: Sequence[int] = (16, 16),
        encoder_hidden_size: int = 1024,
        encoder_layers: int = 16,
        encoder_heads: int = 16,
        decoder_hidden_size: int = 1024,
        decoder_layers: int = 16,
        decoder_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        num_classes: int | None = 1000,
        caption_dim: int | None = None,
        num_condition_tokens: int = 64,
        condition_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        projection_dropout: float = 0.1,
        head_layers: int = 3,
        head_width: int = 1024,
        num_diffusion_steps: str = "100",
        diffusion_repeats: int = 4,
        loss_weighting: str = "epsilon",
        mask_ratio_min: float = 0.7,
        position_init: str = "normal",
        scaling_factor: float | None = None,
    ) -> None:
        super().__init__()
        if len(grid) != 2 or min(grid) < 1:
            raise InvalidInputError(f"grid must be (rows, cols), both at least 1; got {tuple(grid)}")
        self.check_respacing(num_diffusion_steps)
        check_weighting(loss_weighting)
        self.loss_weighting = loss_weighting
        self.grid = (int(grid[0]), int(grid[1]))
        self.patch_size, self.latent_channels = patch_size, latent_channels
        self.num_tokens = self.grid[0] * self.grid[1]
        self.token_size = latent_channels * patch_size**2
        self.diffusion_repeats, self.mask_ratio_min = diffusion_repeats, mask_ratio_min
        length = num_condition_tokens + self.num_tokens
        self._build_conditions(num_classes, caption_dim, num_condition_tokens, condition_dropout, encoder_hidden_size)
        self._build_stacks(
            (encoder_hidden_size, decoder_hidden_size),
            (encoder_layers, decoder_layers),
            (encoder_heads, decoder_heads),
            mlp_ratio,
            norm_eps,
            attention_dropout,
            projection_dropout,
        )
        self.z_proj = nn.Linear(self.token_size, encoder_hidden_size)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, encoder_hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_hidden_size))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, length, decoder_hidden_size))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, self.num_tokens, decoder_hidden_size))
        self.diffloss = DiffusionHead(self.token_size, decoder_hidden_size, head_layers, head_width)
        self._initialise()
        self._initialise_positions(grid_places(self.grid), position_init)
        self.diffloss.initialise()

    @classmethod
    def tiny(cls, **overrides: Any) -> MAR:
        """Random weights in eval mode, builds in milliseconds: a 4x4 grid of 4 channels and 10 classes."""
        arguments: dict[str, Any] = {
            "latent_channels": 4,
            "grid": (4, 4),
            "encoder_hidden_size": 32,
            "encoder_layers": 2,
            "encoder_heads": 4,
            "decoder_hidden_size": 32,
            "decoder_layers": 2,
            "decoder_heads": 4,
            "num_classes": 10,
            "num_condition_tokens": 4,
            "head_layers": 2,
            "head_width": 32,
            "num_diffusion_steps": "8",
        }
        return cls(**{**arguments, **overrides}).eval()

    # ------------------------------------------------------------------------------------------------ official files
    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """From the authors' constructor arguments; our own pass unchanged."""
        if not config.keys() & OFFICIAL_ONLY:
            return dict(config)
        given = {key: value for key, value in config.items() if key not in OFFICIAL_IGNORED}
        side, stride = given.pop("img_size", 256), given.pop("vae_stride", 16) * given.get("patch_size", 1)
        if side % stride:
            raise InvalidInputError(f"img_size {side} must be a multiple of vae_stride * patch_size = {stride}")
        return {"grid": (side // stride,) * 2, **{OFFICIAL_NAMES.get(key, key): value for key, value in given.items()}}

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Flat, or the averaged weights (`model_ema`) of a training checkpoint."""
        return without_wrapper(state)

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise Hi-MAR's files."""
        if "cond_tokens" in unexpected:
            return "this is a Hi-MAR checkpoint: it has pivots (cond_*), which MAR lacks; load it with HiMAR."
        return None

    @classmethod
    def infer_config(cls, state: Mapping[str, Any], *, num_heads: int, patch_size: int = 1) -> dict[str, Any]:
        """Constructor arguments from the shapes in a state dict of a class-conditional model (any wrapper).

        Args:
            state: the authors' file, read.
            num_heads: attention heads of both stacks, which no shape shows.
            patch_size: p, likewise.
        """
        flat = without_wrapper(state)
        total = flat["diffusion_pos_embed_learned"].shape[1]
        side = math.isqrt(total)
        return {
            "latent_channels": flat["z_proj.weight"].shape[1] // patch_size**2,
            "patch_size": patch_size,
            "grid": (side, total // side),
            "encoder_hidden_size": flat["z_proj.weight"].shape[0],
            "encoder_layers": count_blocks(flat, "encoder_blocks"),
            "encoder_heads": num_heads,
            "decoder_hidden_size": flat["decoder_embed.weight"].shape[0],
            "decoder_layers": count_blocks(flat, "decoder_blocks"),
            "decoder_heads": num_heads,
            "mlp_ratio": flat["encoder_blocks.0.mlp.fc1.weight"].shape[0] / flat["z_proj.weight"].shape[0],
            "num_classes": flat["class_emb.weight"].shape[0],
            "num_condition_tokens": flat["encoder_pos_embed_learned"].shape[1] - total,
            "head_layers": count_blocks(flat, "diffloss.net.res_blocks"),
            "head_width": flat["diffloss.net.input_proj.weight"].shape[0],
        }

    # ------------------------------------------------------------------------------------------------------- network
    def phase(self) -> Phase:
        """The tables of the network, without their batch dimension."""
        return Phase(
            self.encoder_pos_embed_learned[0],
            self.decoder_pos_embed_learned[0],
            self.mask_token[0],
            self.diffusion_pos_embed_learned[0],
            [None] * len(self.encoder_blocks),
            [None] * len(self.decoder_blocks),
        )

    def forward(
        self, tokens: Tensor, mask: Tensor, condition: Tensor | TextCondition | None, drop: Tensor | None = None
    ) -> Tensor:
        """Conditions of the head [B, L, D] at every position, in raster order.

        Args:
            tokens: float [B, L, C p p] in raster order (see `vistok.nn.masked.patchify`).
            mask: bool [B, L], True where a token is unknown; the same number in every image.
            condition: labels int64 [B], a `TextCondition`, or None for none.
            drop: bool [B], conditions to leave out.

        Raises:
            InvalidInputError: if the images have different numbers of unknown tokens.
        """
        counts = mask.sum(1)
        if bool((counts != counts[0]).any()):
            raise InvalidInputError(
                f"every image of a batch must have the same number of unknown tokens; got {counts.tolist()}"
            )
        known = self.num_tokens - int(counts[0])
        order = mask.long().argsort(dim=1, stable=True)
        visible, hidden = order[:, :known], order[:, known:]
        encoded = self._encode(tokens, visible, self.context(condition, drop))
        outputs = self.decode_hidden(self.phase(), encoded, visible, hidden, self.num_tokens)
        return take_tokens(outputs, order.argsort(dim=1))

    def _encode(self, tokens: Tensor, visible: Tensor, context: Tensor) -> Tensor:
        """Encoder outputs [B, T + V, E] of the tokens at `visible` [B, V]."""
        known = take_tokens(tokens, visible)
        context = context.expand(len(tokens), -1, -1)
        return self.encode_visible(self.phase(), context, self.z_proj(known.to(context.dtype)), visible)

    # ------------------------------------------------------------------------------------------------------ training
    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The diffusion loss of the masked tokens (section 3).

        Decoder outputs and the head are computed for masked tokens alone; the others would count with weight 0.

        Args:
            batch: `latents` [B, C, H, W] or `features` [B, L, C p p], scaled; `labels` int64 [B], or `text_features`
                [B, T, caption_dim] with `text_mask` bool [B, T].
            generator: draws orders, the share of masked tokens, condition dropout, noise levels and noise.
        """
        tokens = self.batch_tokens(batch, ("latents", "features"), self.grid, self.latent_channels, self.patch_size)
        condition = self.batch_condition(batch)
        order = masked.random_orders(len(tokens), self.num_tokens, generator).to(tokens.device)
        count = math.ceil(self.num_tokens * masked.truncated_normal_rate(self.mask_ratio_min, generator))
        hidden, visible = order[:, :count].sort(1).values, order[:, count:].sort(1).values
        context = self.context(condition, self.condition_drop(len(tokens), generator))
        z = self.decode_hidden(self.phase(), self._encode(tokens, visible, context), visible, hidden, count)
        target = take_tokens(tokens, hidden)
        loss = self.diffloss.loss(
            target.flatten(0, 1),
            z.flatten(0, 1),
            repeats=self.diffusion_repeats,
            weighting=self.loss_weighting,
            generator=generator,
        )
        return {"loss": loss}

    # ------------------------------------------------------------------------------------------------------ sampling
    def known_tokens(self, prefix: VisualTokens | None, batch: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """See `known_values`."""
        return self.known_values(prefix, batch, grid, self.token_size)

    def sample(
        self,
        condition: Tensor | TextCondition | None = None,
        *,
        num_images: int | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "linear",
        temperature: float = 1.0,
        num_inference_steps: int = 64,
        num_diffusion_steps: str | int | None = None,
        generator: Generators = None,
        grid: Sequence[int] | None = None,
        prefix: VisualTokens | None = None,
    ) -> Iterator[Step]:
        """Write images in a random order, several tokens a step.

        Args:
            condition: class labels int64 [B], or a `TextCondition`.
            num_images: B, to draw without a condition.
            guidance_scale: u + s (c - u) on the noise that the head predicts; 1 is no guidance.
            guidance_schedule: "linear" raises the scale from 1 with the share of tokens written, "constant" keeps it; a
                function maps that share to the scale.
            temperature: scales the noise of the head's steps; 0 adds none.
            num_inference_steps: steps for a whole image; more than it has tokens is as good as one a token.
            num_diffusion_steps: of the head, e.g. 100 (see `respaced_timesteps`); None is the checkpoint's.
            generator: one for all images, or one an image (each image then does not depend on the others).
            grid: must be the training grid, whose positions are learned.
            prefix: known tokens, which are kept: any cells (its `mask`), equally many in each image. The schedule is
                entered where as many tokens are left.

        Yields:
            A `Step` for every step that had tokens to draw; `changed` is [B, Q], as images differ in their order.
            `tokens.features` are scaled as in training.

        Raises:
            InvalidInputError: at once, if an argument is out of range.
            InvalidOutputError: NaN tokens (with CUDA, after the last step).
        """
        steps = self.config.num_diffusion_steps if num_diffusion_steps is None else num_diffusion_steps
        settings = {
            "guidance_scale": guidance_scale,
            "guidance_schedule": guidance_schedule,
            "temperature": temperature,
            "num_inference_steps": num_inference_steps,
            "num_diffusion_steps": steps,
        }
        condition, batch = self.check_sampling(condition, num_images, grid, self.grid, generator, settings)
        features, known = self.known_tokens(prefix, batch, self.grid)
        unknown = self.num_tokens - int(known[0].sum())
        plan = plan_steps(self.num_tokens, num_inference_steps, unknown)
        scales = [guidance_at(guidance_schedule, guidance_scale, step.share) for step in plan]
        guided = guidance_scale != 1.0
        return self._write(
            condition, features, known, plan, scales if guided else [None] * len(plan), temperature, steps, generator
        )

    @torch.no_grad()
    def _write(
        self,
        condition: Tensor | TextCondition | None,
        features: Tensor,
        known: Tensor,
        plan: list[PlannedStep],
        scales: Sequence[float | None],
        temperature: float,
        num_diffusion_steps: str | int,
        generator: Generators,
    ) -> Iterator[Step]:
        if not plan:
            return
        batch, device = len(features), features.device
        order = masked.random_orders(batch, self.num_tokens, generator)
        order = order.gather(1, known.gather(1, order).long().argsort(dim=1, stable=True))  # unknown ones first
        context, rows = self.distinct_context(condition, batch, scales[0] is not None)
        run = MaskedRun(self, self.phase(), context, rows, batch)
        values = TokenValues(features, known, self.grid)
        draw = self.diffloss.sampler(num_diffusion_steps)
        if plan[0].masked < self.num_tokens:
            given = order[:, plan[0].masked :].sort(1).values.to(device)
            taken = take_tokens(features, given)
            run.add(self.z_proj(taken.to(self.dtype)), given)
        for index, (step, scale) in enumerate(zip(plan, scales)):
            changed = order[:, step.left : step.masked].sort(1).values
            positions = changed.to(device)
            unknown = torch.cat([order[:, : step.left].to(device), positions], dim=1)
            z = run.hidden(unknown, positions.shape[1]).flatten(0, 1)
            drawn = draw(z, num_images=batch, guidance_scale=scale, temperature=temperature, generator=generator)
            drawn = drawn.unflatten(0, (batch, -1))
            last = index + 1 == len(plan)
            tokens = values.write(drawn, positions, last=last)
            if not last:
                run.add(self.z_proj(drawn.to(self.dtype)), positions)
            yield Step(index, len(plan), tokens, changed)
