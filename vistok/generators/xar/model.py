"""xAR: next-X prediction; an image grows entity by entity, and each entity flows from noise to data.

X, the entity, is a token, a square cell of tokens, a subsample (tokens at a stride), a scale, or the whole image. One
transformer reads the finished entities and predicts the velocity of the one that is being made. In training every
entity has its own noise level and sees noisy earlier ones (Noisy Context Learning), so no clean copy is fed.

Source: Ren et al., "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv 2502.20388).
The published models write four 8x8 cells of KL-16 tokens. The paper describes the other entities and releases no code
for them; their layout here is our reading of it.

Top to bottom: configuration; official files; network; objective; sampling. The entities, the block and
the sampling run are the neighbours of this file.

Letters: B images, E entities, T tokens of an entity, N tokens of the sequence, C channels of a token, D width, H heads,
L blocks, R rows fed at once (2 B with guidance), U distinct conditions, S solver steps of an entity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.nn import diffusion, flow, sampling
from vistok.nn.attention import attention
from vistok.nn.conditions import check_labels
from vistok.nn.continuous import FiniteCheck, imagenet_checkpoint, known_values
from vistok.nn.diffusion_head import TimestepEmbedding
from vistok.nn.flow import FlowSchedule
from vistok.nn.masked import patchify
from vistok.nn.model import VistokModel
from vistok.nn.norms import RMSNorm
from vistok.nn.sampling import Generators, Step
from vistok.registry import Published
from vistok.tokens import VisualTokens

from .entities import EntityLayout, attention_mask, entity_layout
from .network import NORM_EPS, Attend, Block, attend_to_prefixes, axial_rotation
from .run import EntityRun

__all__ = ["XAR"]

CONTEXTS = ("noisy", "clean")
GUIDANCE_SCHEDULES = ("linear", "constant")
# Up to so many entities, training on a GPU attends entity by entity; beyond, a mask is cheaper than the calls.
MOST_CALLS = 8

# name -> (width, blocks of each half, heads)
SIZES = {"b": (768, 8, 12), "l": (1024, 16, 16), "h": (1280, 20, 16)}
# What the authors recommend: (steps an entity, guidance scale at the last one)
SAMPLING = {"b": (40, 2.7), "l": (50, 2.3), "h": (50, 2.2)}
PARAMETERS = {"b": 172_638_224, "l": 608_397_968, "h": 1_186_024_096}

OFFICIAL_NAMES = {
    "vae_embed_dim": "latent_channels",
    "encoder_embed_dim": "hidden_size",
    "encoder_depth": "encoder_layers",
    "encoder_num_heads": "encoder_heads",
    "decoder_depth": "decoder_layers",
    "decoder_num_heads": "decoder_heads",
    "label_drop_prob": "condition_dropout",
    "class_num": "num_classes",
    "attn_dropout": "attention_dropout",
    "proj_dropout": "projection_dropout",
}
OFFICIAL_IGNORED = {"norm_layer", "diffusion_batch_mul", "decoder_embed_dim"}
OFFICIAL_ONLY = OFFICIAL_NAMES.keys() | OFFICIAL_IGNORED | {"img_size", "vae_stride", "clusters"}


def _published() -> dict[str, Published]:
    entries = [
        imagenet_checkpoint(
            "xar",
            size,
            {
                "hidden_size": width,
                "encoder_layers": layers,
                "encoder_heads": heads,
                "decoder_layers": layers,
                "decoder_heads": heads,
            },
            hub_id="OliverRen/xAR",
            hub_file=f"xAR-{size.upper()}.pth",
            licence="none declared",
            paper="arXiv:2502.20388",
            origin="OliverRensu/xAR",
            sampling={
                "guidance_scale": SAMPLING[size][1],
                "guidance_schedule": "linear",
                "num_inference_steps": SAMPLING[size][0],
                "solver": "euler_maruyama",
            },
            parameters=PARAMETERS[size],
        )
        for size, (width, layers, heads) in SIZES.items()
    ]
    return {entry.name: entry for entry in entries}


class XAR(VistokModel):
    """Next-X generator of continuous tokens, class-conditional.

    Args:
        latent_channels: channels of the tokenizer's latents.
        patch_size: p; a token is a patch of p x p latents, C = latent_channels p^2.
        grid: (rows, cols) of tokens.
        entity: what X is: `"token"`, `"cell"`, `"subsample"`, `"scale"` or `"image"` (see `entity_layout`).
        entity_size: side of a cell, or stride of a subsample.
        scales: rows of each scale; None halves while it can.
        hidden_size: width D.
        encoder_layers, encoder_heads: blocks before the middle norm, and their heads.
        decoder_layers, decoder_heads: blocks after it.
        mlp_ratio: 2/3 of this times D is the hidden width of the gated MLPs.
        num_classes: classes, without the null class.
        condition_dropout: probability of the null class in training.
        attention_dropout, projection_dropout: dropout rates of the blocks, in training only.
        context: what an entity sees of earlier ones in training: `"noisy"` (Noisy Context Learning, published), or
            `"clean"` (teacher forcing, which doubles the sequence; for comparison).
        scaling_factor: what the tokenizer's latents were multiplied by in training, if known; the pipeline refuses a
            tokenizer with another one.

    Raises:
        InvalidInputError: sizes that do not fit each other.
    """

    system = "xar"
    published: ClassVar[dict[str, Published]] = _published()
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - the name and type that accelerate reads
    # Settings of `sample`, with what it does when nothing is said. The pipeline takes exactly these.
    sampling_defaults: ClassVar[dict[str, Any]] = {
        "guidance_scale": 1.0,
        "guidance_schedule": "linear",
        "num_inference_steps": 50,
        "solver": "euler_maruyama",
    }

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        patch_size: int = 1,
        grid: Sequence[int] = (16, 16),
        entity: str = "cell",
        entity_size: int = 8,
        scales: Sequence[int] | None = None,
        hidden_size: int = 768,
        encoder_layers: int = 8,
        encoder_heads: int = 12,
        decoder_layers: int = 8,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        condition_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        projection_dropout: float = 0.1,
        context: str = "noisy",
        scaling_factor: float | None = None,
    ) -> None:
        super().__init__()
        if len(grid) != 2:
            raise InvalidInputError(f"grid must be (rows, cols); got {tuple(grid)}")
        self.grid = (int(grid[0]), int(grid[1]))
        self._entities = (self.grid, entity, entity_size, None if scales is None else tuple(scales))
        layout = entity_layout(*self._entities)
        for heads in (encoder_heads, decoder_heads):
            if hidden_size % heads or hidden_size // heads % 4:
                raise InvalidInputError(
                    f"hidden_size {hidden_size} over {heads} heads must give a head width divisible by 4 (2-D rotary "
                    "positions)"
                )
        if min(encoder_layers, decoder_layers) < 1:
            raise InvalidInputError(
                f"encoder and decoder need at least one layer; got {encoder_layers} and {decoder_layers}"
            )
        if context not in CONTEXTS:
            raise InvalidInputError(f"context must be 'noisy' or 'clean'; got {context!r}")
        if num_classes < 1 or patch_size < 1 or latent_channels < 1:
            raise InvalidInputError(
                f"num_classes, patch_size and latent_channels must be at least 1; got {num_classes}, {patch_size} and "
                f"{latent_channels}"
            )
        self.num_classes, self.condition_dropout, self.context = num_classes, condition_dropout, context
        self.latent_channels, self.patch_size = latent_channels, patch_size
        self.token_size = latent_channels * patch_size**2
        self.gradient_checkpointing = False
        self._rotations: dict[tuple[int, torch.device], Tensor] = {}

        def stack(layers: int, heads: int) -> nn.ModuleList:
            return nn.ModuleList(
                Block(
                    hidden_size,
                    heads,
                    int(hidden_size * mlp_ratio * 2 / 3),
                    attention_dropout=attention_dropout,
                    projection_dropout=projection_dropout,
                )
                for _ in range(layers)
            )

        self.class_emb = nn.Embedding(num_classes + 1, hidden_size)
        self.time_embed = TimestepEmbedding(hidden_size)
        self.z_proj = nn.Linear(self.token_size, hidden_size)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, layout.length, hidden_size))
        self.z_proj_ln = RMSNorm(hidden_size, NORM_EPS)
        self.encoder_blocks = stack(encoder_layers, encoder_heads)
        self.encoder_norm = RMSNorm(hidden_size, NORM_EPS)
        self.decoder_embed = nn.Linear(hidden_size, hidden_size)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, layout.length, hidden_size))
        self.decoder_blocks = stack(decoder_layers, decoder_heads)
        self.decoder_norm = RMSNorm(hidden_size, NORM_EPS)
        self.pred = nn.Linear(hidden_size, self.token_size)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier matrices with zero biases (also of modulation and prediction: no zero start), N(0, 0.02) tables."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_emb.weight, self.encoder_pos_embed_learned, self.decoder_pos_embed_learned):
            nn.init.normal_(table, std=0.02)

    @classmethod
    def tiny(cls, **overrides: Any) -> XAR:
        """Random weights in eval mode, builds in milliseconds: four 2x2 cells of a 4x4 grid, 4 channels, 10 classes."""
        arguments: dict[str, Any] = {
            "latent_channels": 4,
            "grid": (4, 4),
            "entity_size": 2,
            "hidden_size": 32,
            "encoder_layers": 2,
            "encoder_heads": 4,
            "decoder_layers": 2,
            "decoder_heads": 2,
            "num_classes": 10,
        }
        return cls(**{**arguments, **overrides}).eval()

    @property
    def layout(self) -> EntityLayout:
        """The order of the entities and of their tokens."""
        return entity_layout(*self._entities)

    @property
    def is_text_conditional(self) -> bool:
        """Always False: xAR takes classes."""
        return False

    # ------------------------------------------------------------------------------------------------ official files
    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """From the authors' constructor arguments; our own pass unchanged.

        Raises:
            InvalidInputError: widths of encoder and decoder that differ, or a number of cells that is no square.
        """
        if not config.keys() & OFFICIAL_ONLY:
            return dict(config)
        given = {key: value for key, value in config.items() if key not in OFFICIAL_IGNORED}
        side, stride = given.pop("img_size", 256), given.pop("vae_stride", 16) * given.get("patch_size", 1)
        clusters = given.pop("clusters", 4)
        cells = math.isqrt(clusters)
        if side % stride or cells * cells != clusters or side // stride % cells:
            raise InvalidInputError(
                f"img_size {side} with {stride} pixels a token cannot be cut into {clusters} equal square cells"
            )
        width = config.get("encoder_embed_dim")
        if config.get("decoder_embed_dim", width) != width:
            raise InvalidInputError(
                f"encoder_embed_dim {width} and decoder_embed_dim {config['decoder_embed_dim']} must be equal: one "
                "condition modulates both"
            )
        rows = side // stride
        return {
            "grid": (rows, rows),
            "entity": "cell",
            "entity_size": rows // cells,
            **{OFFICIAL_NAMES.get(key, key): value for key, value in given.items()},
        }

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Flat, or the averaged weights (`model_ema`) of a training checkpoint."""
        for key in ("model_ema", "model"):
            if isinstance(state.get(key), Mapping):
                return dict(state[key])
        return dict(state)

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Drop the tables that follow from the configuration (`mask`, `rope.*`)."""
        return {key: value for key, value in state.items() if key != "mask" and ".attn.rope." not in key}

    def to_official(self) -> dict[str, Tensor]:
        """The state dict with the authors' tables, which `from_official` reads back."""
        layout, device = self.layout, self.device
        official = dict(self.state_dict())
        blocked = torch.zeros(layout.length, layout.length).masked_fill(~layout.mask(), float("-inf"))
        official["mask"] = blocked[None, None].to(device)
        for stack in ("encoder", "decoder"):
            for index, block in enumerate(getattr(self, f"{stack}_blocks")):
                width = block.attn.head_dim
                prefix = f"{stack}_blocks.{index}.attn.rope"
                turns = torch.view_as_real(self.rotation(width)).repeat_interleave(2, dim=1)
                rates = 1.0 / 10000.0 ** (torch.arange(0, width // 2, 2)[: width // 4].float() / (width // 2))
                official[f"{prefix}.freqs"] = rates.to(device)
                official[f"{prefix}.freqs_cos"] = turns[..., 0].clone()
                official[f"{prefix}.freqs_sin"] = turns[..., 1].clone()
        return official

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise MAR's files."""
        if any(key.startswith("diffloss.") for key in unexpected):
            return "this is a MAR or Hi-MAR checkpoint (it has a diffusion head); load it with MAR or HiMAR."
        return None

    # ------------------------------------------------------------------------------------------------------- network
    def rotation(self, head_dim: int) -> Tensor:
        """Rotary factors complex64 [N, C / 2] in entity order; kept."""
        key = (head_dim, self.device)
        if key not in self._rotations:
            with torch.inference_mode(False):  # a table made while sampling must serve training, too
                self._rotations[key] = axial_rotation(self.layout.coordinates, head_dim, self.device)
        return self._rotations[key]

    def embed(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Tokens [R, T, C] at sequence positions start..stop-1 as inputs of the first block [R, T, D]."""
        positions = self.encoder_pos_embed_learned[:, start:stop]
        return self.z_proj_ln(self.z_proj(x.to(self.z_proj.weight.dtype)) + positions)

    def cross(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Outputs of the encoder [..., T, D] as inputs of the decoder."""
        return self.decoder_embed(self.encoder_norm(x)) + self.decoder_pos_embed_learned[0, start:stop]

    def forward(self, tokens: Tensor, index: Tensor, labels: Tensor, *, clean: Tensor | None = None) -> Tensor:
        """Velocity of every entity from itself and the earlier ones, all at the noise levels that they are given at.

        Args:
            tokens: noisy tokens [B, N, C] in entity order.
            index: int64 [B, E], time of each entity, trunc(1000 t).
            labels: int64 [B]; `num_classes` is the null class.
            clean: [B, N, C]: each entity sees these instead of the noisy earlier ones (teacher forcing).

        Returns:
            [B, N, C] in entity order.
        """
        layout = self.layout
        x = self.embed(tokens)
        if clean is not None:
            x = torch.cat([self.embed(clean), x], dim=1)
            index = torch.cat([torch.zeros_like(index), index], dim=1)
        condition = self.class_emb(labels)[:, None] + self.time_embed(index.flatten()).view(*index.shape, -1)
        activated = functional.silu(condition)
        copies = 1 if clean is None else 2
        if layout.uniform is not None:
            x = x.unflatten(1, (copies * layout.num_entities, layout.uniform))
            spread = None
        else:  # scales: every token gets its own copy of its entity's modulation
            x = x[:, None]
            number = layout.number.to(x.device)
            spread = torch.cat([number + copy * layout.num_entities for copy in range(copies)])
        x = self._run(self.encoder_blocks, x, activated, spread, clean is not None)
        table = self.decoder_pos_embed_learned.repeat(1, copies, 1)
        x = self.decoder_embed(self.encoder_norm(x)) + table.view(1, *x.shape[1:])
        x = self._run(self.decoder_blocks, x, activated, spread, clean is not None)
        x = x.flatten(1, 2)[:, -layout.length :]
        return self.pred(self.decoder_norm(x))

    def _run(
        self, blocks: nn.ModuleList, x: Tensor, activated: Tensor, spread: Tensor | None, clean_context: bool
    ) -> Tensor:
        """The blocks of one half, on tokens [B, G, T, D]."""
        rotation = self.rotation(blocks[0].attn.head_dim).repeat(1 + clean_context, 1)
        attend = self.training_attention(blocks[0].attention_dropout, clean_context)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in blocks:
            if recompute:
                x = self._gradient_checkpointing_func(block, x, activated, spread, rotation, attend)
            else:
                x = block(x, activated, spread, rotation, attend)
        return x

    def training_attention(self, dropout: float, clean_context: bool) -> Attend:
        """Attention of all entities at once.

        On GPUs a few entities attend one by one, each to a prefix: no mask, so that the fast kernels apply, and no work
        for what it would hide. On CPUs one masked call is as fast, and rounds as the authors' code does.
        """
        layout, dropout = self.layout, dropout if self.training else 0.0

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if not clean_context and layout.uniform == 1:
                return attention(query, key, value, dropout_p=dropout, is_causal=True)
            if clean_context or not query.is_cuda or layout.num_entities > MOST_CALLS:
                mask = attention_mask(*self._entities, clean_context, query.device)
                return attention(query, key, value, mask, dropout_p=dropout)
            return attend_to_prefixes(query, key, value, layout.starts, dropout)

        return attend

    # ------------------------------------------------------------------------------------------------------ training
    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Squared error of the velocity, each entity at its own logit-normal time (section 3.3).

        Without a training mode (`eval()`) classes are never dropped: with a seeded generator, a validation loss.

        Args:
            batch: `latents` [B, latent_channels, rows p, cols p], scaled as for sampling; `labels` int64 [B].
            generator: draws dropped classes, times and noise, in this order.
        """
        labels, clean = self._batch(batch)
        if self.training and self.condition_dropout > 0.0:
            drop = sampling.uniform((len(labels),), generator, labels.device) < self.condition_dropout
            labels = torch.where(drop, self.num_classes, labels)
        layout = self.layout
        times = flow.logit_normal_times((layout.num_entities * len(labels),), generator, clean.device)
        times = times.view(layout.num_entities, -1).T  # [B, E]
        noise = diffusion.gaussian_noise(clean.shape, generator, clean.device)
        spread = times.index_select(1, layout.number.to(clean.device))[..., None]
        noisy = flow.interpolate(clean, noise, spread)
        velocity = self(noisy, flow.time_index(times), labels, clean=clean if self.context == "clean" else None)
        return {"loss": functional.mse_loss(velocity.float(), flow.velocity_target(clean, noise))}

    def _batch(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(labels [B], tokens float32 [B, N, C] in entity order) of a training batch."""
        for key in ("latents", "labels"):
            if key not in batch:
                given = ", ".join(sorted(batch)) or "none"
                raise InvalidInputError(f"this XAR trains on batches with {key!r}; got {given}")
        latents = batch["latents"]
        shape = (self.latent_channels, *(side * self.patch_size for side in self.grid))
        if latents.ndim != 4 or tuple(latents.shape[1:]) != shape:
            raise InvalidInputError(
                f"latents must be [B, {shape[0]}, {shape[1]}, {shape[2]}] for this XAR; got {list(latents.shape)}: was "
                "another tokenizer or image size used?"
            )
        if not bool(torch.isfinite(latents).all()):
            raise InvalidInputError("latents contain NaN or infinity: check the tokenizer and the cached files")
        tokens = patchify(latents.float(), self.patch_size)
        return self.check_condition(batch["labels"]), self.layout.to_sequence(tokens)

    # ------------------------------------------------------------------------------------------------------ sampling
    def check_condition(self, condition: Tensor) -> Tensor:
        """Class labels int64 [B] on the model's device, or an InvalidInputError that says what was expected."""
        return check_labels(condition, self.num_classes, "XAR").to(self.device)

    def check_settings(self, generator: Generators, batch: int, **settings: Any) -> None:
        """Raise InvalidInputError, saying what is allowed, if a setting of `sample` for `batch` images is out of range.

        Names that are None stand for their default and pass.
        """
        if isinstance(generator, Sequence) and len(generator) != batch:
            raise InvalidInputError(f"{len(generator)} generators for {batch} images; give one, or one an image")
        given = {**self.sampling_defaults, **{key: value for key, value in settings.items() if value is not None}}
        if not 0.0 <= given["guidance_scale"] < float("inf"):
            raise InvalidInputError(
                f"guidance_scale must be a number >= 0 (up to 1 is no guidance); got {given['guidance_scale']}"
            )
        if given["guidance_schedule"] not in GUIDANCE_SCHEDULES:
            raise InvalidInputError(
                f"guidance_schedule must be one of {', '.join(GUIDANCE_SCHEDULES)}; got {given['guidance_schedule']!r}"
            )
        if given["guidance_scale"] > 1.0 and self.condition_dropout == 0.0:
            raise InvalidInputError(
                "this model was trained without condition dropout and has no null class; use guidance_scale=1"
            )
        self._schedules(given["num_inference_steps"], given["solver"])

    def _schedules(self, num_inference_steps: int | Sequence[int], solver: str) -> list[FlowSchedule]:
        """One schedule an entity."""
        count = self.layout.num_entities
        steps = num_inference_steps
        if isinstance(steps, Sequence) and len(steps) != count:
            raise InvalidInputError(
                f"num_inference_steps must be one number, or one for each of {count} entities; got {len(steps)}"
            )
        listed = list(steps) if isinstance(steps, Sequence) else [steps] * count
        return [flow.flow_schedule(number, solver) for number in listed]

    def guidance_scales(self, guidance_scale: float, guidance_schedule: str = "linear") -> list[float]:
        """Scale of each entity: from 1 for the first to the full scale for the last, or the same for all."""
        count = self.layout.num_entities
        if guidance_schedule == "constant" or count == 1:
            return [float(guidance_scale)] * count
        return [1.0 + (guidance_scale - 1.0) * entity / (count - 1) for entity in range(count)]

    def sample(
        self,
        condition: Tensor | None = None,
        *,
        num_images: int | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: str = "linear",
        num_inference_steps: int | Sequence[int] = 50,
        solver: str = "euler_maruyama",
        generator: Generators = None,
        grid: tuple[int, int] | None = None,
        prefix: VisualTokens | None = None,
    ) -> Iterator[Step]:
        """Make entity after entity, each from noise by a few calls of the network.

        Finished entities are read once, at time 0; their keys and values are kept, so no call has a mask. Modulations
        are computed once for each distinct class and time. Unconditional rows are run only for entities with guidance.

        Args:
            condition: class labels int64 [B].
            num_images: B, instead of a condition: images without a class.
            guidance_scale: u + s (c - u) on velocities; up to 1 is no guidance.
            guidance_schedule: `"linear"`: the scale rises from 1 at the first entity to `guidance_scale` at the last
                (published; a single entity gets the full scale); `"constant"`.
            num_inference_steps: network calls an entity; or one number for each entity (see `annealed_steps`).
            solver: `"euler_maruyama"` (published) or `"euler"`, the ODE, whose only random draw is its start.
            generator: one for all images, or one an image (each image then does not depend on the others).
            grid: the training grid, or None.
            prefix: known tokens (those of its mask), which are kept and serve as context of later entities; they must
                make up whole entities, the same in every image.

        Yields:
            A `Step` for every network call. Its tokens show the present entity as the call predicts it at the end of
            the flow; they count as decided, in `changed` and in the mask, when the entity is finished.

        Raises:
            InvalidInputError: at once, if an argument is out of range.
            InvalidOutputError: NaN or infinite tokens (with CUDA, after the last step).
        """
        if self.training:
            raise InvalidInputError("this XAR is in training mode, where dropout spoils the samples: call eval() first")
        if (condition is None) == (num_images is None):
            raise InvalidInputError("give a condition, or num_images for images without one, but not both")
        if num_images is not None and num_images < 1:
            raise InvalidInputError(f"num_images must be at least 1; got {num_images}")
        if grid is not None and tuple(grid) != self.grid:
            raise InvalidInputError(
                f"XAR has learned the positions of a {self.grid[0]}x{self.grid[1]} grid; it cannot write {tuple(grid)}"
            )
        null = torch.full((num_images or 0,), self.num_classes, dtype=torch.int64, device=self.device)
        labels = null if condition is None else self.check_condition(condition)
        if condition is None and guidance_scale > 1.0:
            raise InvalidInputError("guidance needs a condition; without one use guidance_scale=1")
        self.check_settings(
            generator,
            len(labels),
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            num_inference_steps=num_inference_steps,
            solver=solver,
        )
        features, known = self.known_tokens(prefix, len(labels), self.grid)
        schedules = self._schedules(num_inference_steps, solver)
        scales = self.guidance_scales(guidance_scale, guidance_schedule)
        return self._grow(labels, features, known, schedules, scales, generator)

    @torch.no_grad()
    def _grow(
        self,
        labels: Tensor,
        features: Tensor,
        known: Tensor,
        schedules: list[FlowSchedule],
        scales: list[float],
        generator: Generators,
    ) -> Iterator[Step]:
        layout, batch, device = self.layout, len(labels), labels.device
        spans = list(pairwise(layout.starts))
        if layout.scales is None:
            done = [bool(known[layout.places[start:stop]].all()) for start, stop in spans]
        else:
            done = [bool(known.all())] * len(spans)
        unknown = [entity for entity in range(len(spans)) if not done[entity]]
        if not unknown:
            return
        run = EntityRun(
            self,
            labels,
            guided=any(scales[entity] > 1.0 for entity in unknown),
            indices=[index for entity in unknown for index in schedules[entity].indices],
            context=unknown[-1] > 0,
        )
        sequence = layout.to_sequence(features)
        check = FiniteCheck(device)
        places, decided = layout.places.to(device), known.to(device)
        index, total = 0, sum(len(schedules[entity]) for entity in unknown)
        for entity in range(unknown[-1] + 1):
            start, stop = spans[entity]
            x = sequence[:, start:stop]
            if not done[entity]:
                noise = diffusion.gaussian_noise((batch, stop - start, self.token_size), generator, device)
                schedule = schedules[entity]
                for state in flow.flow_steps(
                    run.velocity_of(entity, schedule, scales[entity]), noise, schedule, generator
                ):
                    last = state.index + 1 == len(schedule)
                    x = state.x.float()
                    changed = torch.empty(0, dtype=torch.int64)
                    if last:
                        check(x, last=index + 1 == total)
                        if layout.scales is None or entity + 1 == len(spans):
                            changed = layout.places[start:stop].clone()
                            decided = decided.index_fill(0, places[start:stop], True)
                    features = self._shown(features, x if last else state.clean.float(), entity, places[start:stop])
                    tokens = VisualTokens(features=features, grid=self.grid, mask=decided.expand(batch, -1))
                    yield Step(index, total, tokens, changed)
                    index += 1
            if entity < unknown[-1]:
                run.remember(x, entity)

    def _shown(self, features: Tensor, values: Tensor, entity: int, places: Tensor) -> Tensor:
        """Raster tokens [B, rows * cols, C] with those of an entity [B, T, C] in their places [T]."""
        scales = self.layout.scales
        if scales is None:
            return features.index_copy(1, places, values)
        image = values.transpose(1, 2).unflatten(2, scales[entity])
        return functional.interpolate(image, size=self.grid).flatten(2).transpose(1, 2)

    def generate(self, condition: Tensor | None = None, **settings: Any) -> VisualTokens:
        """All tokens at once: the last step of `sample`, which documents the settings."""
        tokens = settings.get("prefix")  # nothing is left to write if it is complete
        for step in self.sample(condition, **settings):
            tokens = step.tokens
        assert tokens is not None
        return VisualTokens(features=tokens.features, grid=tokens.grid)

    def known_tokens(self, prefix: VisualTokens | None, batch: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What a continuation starts from.

        Args:
            prefix: tokens with features on the grid, or on a smaller one which is placed in the top left corner; its
                mask is True at the known tokens (without a mask, all are).
            batch: images to write.
            grid: (rows, cols) to write.

        Returns:
            features float32 [B, rows * cols, C] on the model's device, 0 where unknown, and known bool [rows * cols] on
            the CPU.

        Raises:
            InvalidInputError: if the prefix does not fit, or its known tokens are no whole entities.
        """
        features, known = known_values(prefix, batch, grid, self.token_size, self.device)
        flat = known[0]
        if not bool((known == flat).all()):
            raise InvalidInputError("the known tokens of a prefix must be the same in every image of the batch")
        layout = self.layout
        if layout.scales is not None:
            if bool(flat.any()) and not bool(flat.all()):
                raise InvalidInputError("scales cover the whole image: a prefix must be complete, or absent")
            return features, flat
        for start, stop in pairwise(layout.starts):
            held = flat[layout.places[start:stop]]
            if bool(held.any()) and not bool(held.all()):
                raise InvalidInputError(
                    f"the known tokens must make up whole entities (here: {self.config.entity}, {stop - start} tokens "
                    "each); part of one is known"
                )
        return features, flat
