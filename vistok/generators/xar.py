"""xAR: next-X prediction; an image grows entity by entity, and each entity flows from noise to data.

X, the entity, is a token, a square cell of tokens, a subsample (tokens at a stride), a scale, or the whole image. One
transformer reads the finished entities and predicts the velocity of the one that is being made. In training every
entity has its own noise level and sees noisy earlier ones (Noisy Context Learning), so no clean copy is fed.

Source: Ren et al., "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv 2502.20388).
The published models write four 8x8 cells of KL-16 tokens. The paper describes the other entities and releases no code
for them; their layout here is our reading of it.

Top to bottom: entities; network; the model (configuration, official files, objective, sampling); a sampling run.

Letters: B images, E entities, T tokens of an entity, N tokens of the sequence, C channels of a token, D width, H heads,
L blocks, R rows fed at once (2 B with guidance), U distinct conditions, S solver steps of an entity.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.nn import diffusion, flow, sampling
from vistok.nn.diffusion_head import TimestepEmbedding
from vistok.nn.flow import FlowSchedule
from vistok.nn.masked import patchify
from vistok.nn.model import VistokModel
from vistok.nn.norms import RMSNorm
from vistok.nn.rope import apply_rotation
from vistok.nn.sampling import Generators, Step
from vistok.registry import Published
from vistok.tokens import VisualTokens

__all__ = ["XAR", "EntityLayout", "annealed_steps", "entity_layout"]

ENTITIES = ("token", "cell", "subsample", "scale", "image")
CONTEXTS = ("noisy", "clean")
GUIDANCE_SCHEDULES = ("linear", "constant")
NORM_EPS = 1e-6
# Up to so many entities, training attends entity by entity, each to a prefix; beyond, a mask is cheaper than the calls.
MOST_CALLS = 8
# A modulation table larger than this (bytes) is computed step by step: at such batches it costs next to nothing.
TABLE_BYTES = 1 << 29

# name -> (width, blocks of each half, heads)
SIZES = {"b": (768, 8, 12), "l": (1024, 16, 16), "h": (1280, 20, 16)}
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
OFFICIAL_ONLY = (OFFICIAL_NAMES.keys() | OFFICIAL_IGNORED | {"img_size", "vae_stride", "clusters"}) - {"encoder_layers"}

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Modulation: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _published() -> dict[str, Published]:
    entries = {}
    for size, (width, layers, heads) in SIZES.items():
        name = f"xar-{size}.imagenet256"
        entries[name] = Published(
            name=name,
            system="xar",
            config={
                "hidden_size": width,
                "encoder_layers": layers,
                "encoder_heads": heads,
                "decoder_layers": layers,
                "decoder_heads": heads,
                "scaling_factor": 0.2325,
            },
            hub_id="OliverRen/xAR",
            hub_file=f"xAR-{size.upper()}.pth",
            licence="none declared",
            paper="arXiv:2502.20388",
            origin="OliverRensu/xAR",
            image_size=256,
            num_tokens=256,
            preprocessing="ADM centre crop, [-1, 1]",
            tokenizer="kl16.mar",
            parameters=PARAMETERS[size],
        )
    return entries


# ------------------------------------------------------------------------------------------------------------- entities
@dataclass(frozen=True)
class EntityLayout:
    """How the tokens of a grid become a sequence of entities. Get one from `entity_layout`.

    Attributes:
        grid: (rows, cols) of the image.
        starts: sequence position at which each entity starts, and N at the end.
        places: int64 [N], raster position of each sequence position; of a coarse scale, in the raster of that scale.
        coordinates: float64 [N, 2], row and column of each sequence position in units of tokens of the grid.
        scales: (rows, cols) of each entity's own raster for scale entities, else None.
    """

    grid: tuple[int, int]
    starts: tuple[int, ...]
    places: Tensor
    coordinates: Tensor
    scales: tuple[tuple[int, int], ...] | None

    @property
    def num_entities(self) -> int:
        """E."""
        return len(self.starts) - 1

    @property
    def length(self) -> int:
        """Tokens of the sequence, N (more than the grid has for scale entities)."""
        return self.starts[-1]

    @property
    def uniform(self) -> int | None:
        """T, if all entities have as many tokens; else None."""
        sizes = {stop - start for start, stop in pairwise(self.starts)}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def number(self) -> Tensor:
        """int64 [N], entity of each sequence position."""
        sizes = torch.tensor([stop - start for start, stop in pairwise(self.starts)], device="cpu")
        return torch.arange(self.num_entities, device="cpu").repeat_interleave(sizes)

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """Raster tokens [B, rows * cols, C] in entity order [B, N, C]; coarse scales are area averages."""
        if self.scales is None:
            return tokens.index_select(1, self.places.to(tokens.device))
        image = tokens.transpose(1, 2).unflatten(2, self.grid)
        coarse = [functional.adaptive_avg_pool2d(image, size) for size in self.scales[:-1]]
        return torch.cat([*(part.flatten(2).transpose(1, 2) for part in coarse), tokens], dim=1)

    def to_raster(self, sequence: Tensor) -> Tensor:
        """The inverse of `to_sequence`; of scales, the finest."""
        if self.scales is not None:
            return sequence[:, self.starts[-2] :]
        return sequence.index_select(1, torch.argsort(self.places).to(sequence.device))

    def mask(self, *, clean_context: bool = False) -> Tensor:
        """Which position may see which, bool: [N, N], or [2N, 2N] with a clean copy in front.

        An entity sees itself and all earlier ones. With a clean copy, noisy entities see themselves and earlier clean
        ones.
        """
        number = self.number
        causal = number[:, None] >= number
        if not clean_context:
            return causal
        earlier, same = number[:, None] > number, number[:, None] == number
        return torch.cat([torch.cat([causal, torch.zeros_like(causal)], 1), torch.cat([earlier, same], 1)])


def _default_scales(rows: int) -> tuple[int, ...]:
    scales = [rows]
    while scales[-1] % 2 == 0:
        scales.append(scales[-1] // 2)
    return tuple(reversed(scales))


@lru_cache(maxsize=16)
def entity_layout(
    grid: tuple[int, int], entity: str, entity_size: int = 8, scales: tuple[int, ...] | None = None
) -> EntityLayout:
    """Divide a grid into entities.

    Args:
        grid: (rows, cols).
        entity: `"token"`, `"cell"` (squares, in raster order), `"subsample"` (tokens at a stride; entity k starts at
            row k div stride, column k mod stride), `"scale"` (the image averaged to coarser grids, coarse to fine, then
            itself) or `"image"`.
        entity_size: side of a cell, or the stride of a subsample; others ignore it.
        scales: rows of each scale, ascending, ending with the grid's; None halves while it can.

    Raises:
        InvalidInputError: unknown entity, or sizes that do not divide the grid.
    """
    rows, cols = grid
    if entity not in ENTITIES:
        raise InvalidInputError(f"entity must be one of {', '.join(ENTITIES)}; got {entity!r}")
    if min(grid) < 1:
        raise InvalidInputError(f"grid must be (rows, cols), both at least 1; got {grid}")
    if entity == "scale":
        with torch.inference_mode(False):
            return _scale_layout(grid, _default_scales(rows) if scales is None else scales)
    if entity in ("cell", "subsample") and (entity_size < 1 or rows % entity_size or cols % entity_size):
        divisors = [side for side in range(1, min(grid) + 1) if rows % side == cols % side == 0]
        raise InvalidInputError(
            f"{entity} entities of size {entity_size} do not divide a {rows}x{cols} grid; possible sizes: {divisors}"
        )
    side = {"token": 1, "image": 1, "cell": entity_size, "subsample": entity_size}[entity]
    with torch.inference_mode(False):  # what is made while sampling must serve training, too
        blocks = torch.arange(rows * cols, device="cpu").view(rows // side, side, cols // side, side)
        # A cell holds neighbours, a subsample the tokens at the same place of every cell.
        cells, count = blocks.permute(0, 2, 1, 3), side**2
        if entity == "subsample":
            cells, count = blocks.permute(1, 3, 0, 2), rows * cols // side**2
        elif entity == "image":
            count = rows * cols
        places = cells.flatten()
        coordinates = torch.stack([places // cols, places % cols], dim=1).double()
    return EntityLayout(grid, tuple(range(0, rows * cols + 1, count)), places, coordinates, None)


def _scale_layout(grid: tuple[int, int], scales: Sequence[int]) -> EntityLayout:
    rows, cols = grid
    if not scales or list(scales) != sorted(set(scales)) or scales[0] < 1 or scales[-1] != rows:
        raise InvalidInputError(
            f"scales must be ascending numbers of rows that end with the grid's ({rows}); got {tuple(scales)}"
        )
    if any(scale * cols % rows for scale in scales):
        raise InvalidInputError(
            f"every scale must keep the proportions of the {rows}x{cols} grid with whole columns; got {tuple(scales)}"
        )
    sizes = tuple((scale, scale * cols // rows) for scale in scales)
    starts, places, coordinates = [0], [], []
    for high, wide in sizes:
        place = torch.arange(high * wide, device="cpu")
        centre = torch.stack([place // wide, place % wide], dim=1).double() + 0.5
        # Where the centre of a coarse token lies on the fine grid.
        coordinates.append(centre * centre.new_tensor([rows / high, cols / wide]) - 0.5)
        places.append(place)
        starts.append(starts[-1] + high * wide)
    return EntityLayout(grid, tuple(starts), torch.cat(places), torch.cat(coordinates), sizes)


@lru_cache(maxsize=16)
def _attention_mask(
    grid: tuple[int, int],
    entity: str,
    entity_size: int,
    scales: tuple[int, ...] | None,
    clean_context: bool,
    device: torch.device,
) -> Tensor:
    with torch.inference_mode(False):  # what is made while sampling must serve training, too
        return entity_layout(grid, entity, entity_size, scales).mask(clean_context=clean_context).to(device)


def axial_rotation(coordinates: Tensor, head_dim: int, device: torch.device, theta: float = 10000.0) -> Tensor:
    """Rotary factors complex64 [N, C / 2]: the first half of the channels turns with the row, the second with the
    column; rates theta^(-2j / (C / 2)), j = 0..C/4-1. Positions may lie between tokens.
    """
    half = head_dim // 2
    rates = 1.0 / theta ** (torch.arange(0, half, 2, device="cpu")[: half // 2].float() / half)
    positions = coordinates.float()
    angles = torch.cat([positions[:, :1] * rates, positions[:, 1:] * rates], dim=1)
    return torch.polar(torch.ones_like(angles), angles).to(device)


def annealed_steps(num_entities: int, first: int = 50, last: int = 15) -> tuple[int, ...]:
    """Fewer solver steps for later entities, linear and rounded down: 50, 38, 26, 15 for four (DiSA, arXiv 2505.20297,
    a training-free saving that changes the samples).
    """
    if num_entities == 1:
        return (first,)
    share = [(num_entities - 1 - entity) / (num_entities - 1) for entity in range(num_entities)]
    return tuple(int(rest * (first - last) + last) for rest in share)


# -------------------------------------------------------------------------------------------------------------- network
def padded_width(hidden: int) -> int:
    """A width that matrix kernels like: 2730 and 3413 are no multiples of 8, and miss the fast paths of GPUs."""
    multiple = 64 if hidden >= 512 else 8
    return -(-hidden // multiple) * multiple


def normalise(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """RMS norm without a weight, then modulation: norm(x) * scale + shift. Statistics in float32."""
    normed = functional.rms_norm(x.float(), (x.shape[-1],), None, NORM_EPS).to(x.dtype)
    return torch.addcmul(shift, normed, scale)


class Attention(nn.Module):
    """Self-attention with 2-D rotary positions."""

    def __init__(self, size: int, num_heads: int, projection_dropout: float) -> None:
        super().__init__()
        self.num_heads, self.projection_dropout = num_heads, projection_dropout
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)

    def project(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[R, T, D] -> turned queries and keys, and values, each [R, H, T, D / H]."""
        heads = self.num_heads
        projected = self.qkv(x).unflatten(-1, (3 * heads, -1))
        turned = apply_rotation(projected[:, :, : 2 * heads], rotation).transpose(1, 2)
        return turned[:, :heads], turned[:, heads:], projected[:, :, 2 * heads :].transpose(1, 2)

    def forward(self, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        """x [R, T, D]; `attend` is what the caller wants of queries, keys and values."""
        attended = attend(*self.project(x, rotation)).transpose(1, 2).flatten(2)
        return functional.dropout(self.proj(attended), self.projection_dropout, self.training)


class FeedForward(nn.Module):
    """fc2( GELU(gate) * value ), gate and value from one product, of a width rounded up with zeros.

    GELU(0) * 0 is 0 and passes no gradient to what makes it, so the padding neither contributes nor learns.
    """

    def __init__(self, size: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.dropout = hidden, dropout
        self.fc1 = nn.Linear(size, 2 * padded_width(hidden))
        self.fc2 = nn.Linear(padded_width(hidden), size)

    def initialise(self) -> None:
        """Xavier for both halves of fc1 and for fc2, zero padding and biases."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for half in self.fc1.weight.chunk(2):
                nn.init.xavier_uniform_(half[: self.hidden])
            nn.init.xavier_uniform_(self.fc2.weight[:, : self.hidden])

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        hidden = functional.dropout(functional.gelu(gate) * value, self.dropout, self.training)
        return functional.dropout(self.fc2(hidden), self.dropout, self.training)


class Block(nn.Module):
    """x + g1 attention(norm(x) s1 + b1), then x + g2 mlp(norm(x) s2 + b2); all six come from the condition."""

    def __init__(
        self, size: int, num_heads: int, hidden: int, *, attention_dropout: float, projection_dropout: float
    ) -> None:
        super().__init__()
        self.attention_dropout = attention_dropout
        self.attn = Attention(size, num_heads, projection_dropout)
        self.mlp = FeedForward(size, hidden, projection_dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def modulation(self, activated: Tensor) -> Tensor:
        """SiLU(condition) [..., D] -> [..., 6, D]: gates, scales (with the 1 that they are added to) and shifts, of
        attention and mlp each.
        """
        values = self.ada_lin[1](activated).unflatten(-1, (6, -1))
        gates, scales, shifts = values.split(2, dim=-2)
        return torch.cat([gates, scales + 1, shifts], dim=-2)

    def forward(self, x: Tensor, modulation: Modulation, rotation: Tensor, attend: Attend) -> Tensor:
        """One block.

        Args:
            x: [R, G, T, D]: G groups of tokens with one condition each.
            modulation: six tensors that broadcast to x.
            rotation: complex [G T, D / H / 2].
            attend: attention of all G T tokens.
        """
        gate_attention, gate_mlp, scale_attention, scale_mlp, shift_attention, shift_mlp = modulation
        normed = normalise(x, scale_attention, shift_attention).flatten(1, 2)
        x = torch.addcmul(x, gate_attention, self.attn(normed, rotation, attend).view_as(x))
        return torch.addcmul(x, gate_mlp, self.mlp(normalise(x, scale_mlp, shift_mlp)))


def _six(values: Tensor) -> Modulation:
    """[..., 6, D] apart."""
    first, second, third, fourth, fifth, sixth = values.unbind(-2)
    return first, second, third, fourth, fifth, sixth


# ---------------------------------------------------------------------------------------------------------------- model
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
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.initialise()
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
        """Drop the tables that follow from the configuration; join and pad the matrices of the MLPs."""
        renamed = {key: value for key, value in state.items() if key != "mask" and ".attn.rope." not in key}
        for key in [key for key in renamed if re.search(r"\.mlp\.fc1_g\.(weight|bias)$", key)]:
            other = key.replace(".fc1_g.", ".fc1_x.")
            if other in renamed and renamed[other].shape == renamed[key].shape:
                pair = [_pad(renamed.pop(name), 0) for name in (key, other)]
                renamed[key.replace(".fc1_g.", ".fc1.")] = torch.cat(pair)
        for key in [key for key in renamed if key.endswith(".mlp.fc2.weight")]:
            if renamed[key].ndim == 2:
                renamed[key] = _pad(renamed[key], 1)
        return renamed

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names, tables included, which `from_official` reads back."""
        layout, device = self.layout, self.device
        official = self.split_official(self.state_dict())
        blocked = torch.zeros(layout.length, layout.length).masked_fill(~layout.mask(), float("-inf"))
        official["mask"] = blocked[None, None].to(device)
        for stack in ("encoder", "decoder"):
            for index, block in enumerate(getattr(self, f"{stack}_blocks")):
                width = self.config.hidden_size // block.attn.num_heads
                prefix = f"{stack}_blocks.{index}.attn.rope"
                turns = torch.view_as_real(self._rotation(width)).repeat_interleave(2, dim=1)
                official[f"{prefix}.freqs"] = (
                    1.0 / 10000.0 ** (torch.arange(0, width // 2, 2)[: width // 4].float() / (width // 2))
                ).to(device)
                official[f"{prefix}.freqs_cos"] = turns[..., 0].clone()
                official[f"{prefix}.freqs_sin"] = turns[..., 1].clone()
        return official

    def split_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters (or gradients of theirs) with the MLPs' matrices apart and without padding."""
        hidden = self.encoder_blocks[0].mlp.hidden
        official = {}
        for key, value in state.items():
            if re.search(r"\.mlp\.fc1\.(weight|bias)$", key):
                gate, other = value.chunk(2)
                official[key.replace(".fc1.", ".fc1_g.")] = gate[:hidden]
                official[key.replace(".fc1.", ".fc1_x.")] = other[:hidden]
            else:
                official[key] = value[:, :hidden] if key.endswith(".mlp.fc2.weight") else value
        return official

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise MAR's files."""
        if any(key.startswith("diffloss.") for key in unexpected):
            return "this is a MAR or Hi-MAR checkpoint (it has a diffusion head); load it with MAR or HiMAR."
        return None

    # ------------------------------------------------------------------------------------------------------- network
    def _rotation(self, head_dim: int) -> Tensor:
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
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for stack in (self.encoder_blocks, self.decoder_blocks):
            if stack is self.decoder_blocks:
                table = self.decoder_pos_embed_learned.repeat(1, copies, 1)
                x = self.decoder_embed(self.encoder_norm(x)) + table.view(1, *x.shape[1:])
            for block in stack:
                attend = self._training_attention(block, clean is not None)
                rotation = self._rotation(self.config.hidden_size // block.attn.num_heads).repeat(copies, 1)
                if recompute:
                    x = self._gradient_checkpointing_func(_run_block, block, x, activated, spread, rotation, attend)
                else:
                    x = _run_block(block, x, activated, spread, rotation, attend)
        x = x.flatten(1, 2)[:, -layout.length :]
        return self.pred(self.decoder_norm(x))

    def _training_attention(self, block: Block, clean_context: bool) -> Attend:
        """Attention of all entities at once."""
        layout, dropout = self.layout, block.attention_dropout if self.training else 0.0

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            attention = functional.scaled_dot_product_attention
            if clean_context:
                mask = _attention_mask(*self._entities, True, query.device)
                return attention(query, key, value, attn_mask=mask, dropout_p=dropout)
            if layout.uniform == 1:
                return attention(query, key, value, dropout_p=dropout, is_causal=True)
            if layout.num_entities <= MOST_CALLS:  # each entity to a prefix: no mask, and no work for what it hides
                parts = [
                    attention(query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], dropout_p=dropout)
                    for start, stop in pairwise(layout.starts)
                ]
                return torch.cat(parts, dim=2)
            mask = _attention_mask(*self._entities, False, query.device)
            return attention(query, key, value, attn_mask=mask, dropout_p=dropout)

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
        return self.check_condition(batch["labels"]), self.layout.to_sequence(patchify(latents.float(), self.patch_size))

    # ------------------------------------------------------------------------------------------------------ sampling
    def check_condition(self, condition: Tensor) -> Tensor:
        """Class labels int64 [B] on the model's device, or an InvalidInputError that says what was expected."""
        if not isinstance(condition, Tensor) or condition.dtype != torch.int64 or condition.ndim != 1:
            is_tensor = isinstance(condition, Tensor)
            given = f"{condition.dtype} {list(condition.shape)}" if is_tensor else type(condition).__name__
            raise InvalidInputError(f"XAR is class-conditional: give class labels as int64 [B], not {given}")
        if not len(condition):
            raise InvalidInputError("no class labels were given; expected at least one")
        low, high = int(condition.min()), int(condition.max())
        if low < 0 or high >= self.num_classes:
            raise InvalidInputError(f"class labels must lie in 0..{self.num_classes - 1}; got {low}..{high}")
        return condition.to(self.device)

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
            raise InvalidInputError(
                "this XAR is in training mode, where dropout spoils the samples: call eval() first"
            )
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
        damaged = torch.zeros((), dtype=torch.bool, device=device)
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
                        damaged |= ~torch.isfinite(x).all()
                        finished = index + 1 == total
                        if (finished or not x.is_cuda) and bool(damaged):
                            raise InvalidOutputError(
                                "the model produced NaN or infinite tokens; its weights are damaged or its floating "
                                "point type is too narrow: reload the checkpoint, or load it with dtype=torch.float32"
                            )
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
        rows, cols = grid
        features = torch.zeros(batch, rows, cols, self.token_size, device=self.device)
        known = torch.zeros(rows, cols, dtype=torch.bool)
        if prefix is None:
            return features.flatten(1, 2), known.flatten()
        if prefix.features is None or prefix.grid is None or len(prefix) != batch:
            raise InvalidInputError(
                f"prefix must hold features of {batch} images with a grid; got {len(prefix)} images, features "
                f"{'missing' if prefix.features is None else 'given'}, grid {prefix.grid}"
            )
        high, wide = prefix.grid
        if high > rows or wide > cols or prefix.features.shape[2] != self.token_size:
            raise InvalidInputError(
                f"the prefix has {high}x{wide} tokens of {prefix.features.shape[2]} channels; expected at most "
                f"{rows}x{cols} tokens of {self.token_size}"
            )
        given = torch.ones(high * wide, dtype=torch.bool)
        if prefix.mask is not None:
            given = prefix.mask[0].cpu()
            if not bool((prefix.mask.cpu() == given).all()):
                raise InvalidInputError("the known tokens of a prefix must be the same in every image of the batch")
        values = torch.where(given[:, None].to(self.device), prefix.features.to(self.device).float(), 0.0)
        if not bool(torch.isfinite(values).all()):
            raise InvalidInputError("the prefix contains NaN or infinity")
        known[:high, :wide] = given.view(high, wide)
        features[:, :high, :wide] = values.view(batch, high, wide, -1)
        layout, flat = self.layout, known.flatten()
        if layout.scales is not None:
            if bool(flat.any()) and not bool(flat.all()):
                raise InvalidInputError("scales cover the whole image: a prefix must be complete, or absent")
            return features.flatten(1, 2), flat
        for start, stop in pairwise(layout.starts):
            held = flat[layout.places[start:stop]]
            if bool(held.any()) and not bool(held.all()):
                raise InvalidInputError(
                    f"the known tokens must make up whole entities (here: {self.config.entity}, {stop - start} tokens "
                    "each); part of one is known"
                )
        return features.flatten(1, 2), flat


def _pad(value: Tensor, dim: int) -> Tensor:
    """Zeros up to `padded_width` along a dimension."""
    missing = padded_width(value.shape[dim]) - value.shape[dim]
    return functional.pad(value, (*[0, 0] * (value.ndim - 1 - dim), 0, missing))


def _run_block(
    block: Block, x: Tensor, activated: Tensor, spread: Tensor | None, rotation: Tensor, attend: Attend
) -> Tensor:
    """A block on x [B, G, T, D] with conditions SiLU'd [B, G', D]; `spread` says which of the G' each token has."""
    values = block.modulation(activated)  # [B, G', 6, D]
    values = values[:, :, None] if spread is None else values.index_select(1, spread)[:, None]
    return block(x, _six(values), rotation, attend)


# --------------------------------------------------------------------------------------------------------- sampling run
class EntityRun:
    """What a sampler keeps: keys and values of the finished entities, and the modulations of every class and time.

    Rows of the condition come first; with guidance, as many unconditional rows follow.

    Args:
        model: the generator.
        labels: int64 [B]; may hold the null class.
        guided: whether unconditional rows will be needed.
        indices: every time index that will be asked for.
        context: whether entities will be remembered.

    Attributes:
        keys, values: of each block [R, H, N, D / H] in entity order; those of remembered entities are filled.
    """

    def __init__(self, model: XAR, labels: Tensor, *, guided: bool, indices: Sequence[int], context: bool) -> None:
        self.model, self.batch, self.layout = model, len(labels), model.layout
        self.blocks: list[Block] = [*model.encoder_blocks, *model.decoder_blocks]
        labels, rows = torch.unique(labels, return_inverse=True)
        if guided:
            rows = torch.cat([rows, torch.full_like(rows, len(labels))])
            labels = torch.cat([labels, labels.new_tensor([model.num_classes])])
        self.rows = rows
        self.place = {index: place for place, index in enumerate(sorted({*indices, *([0] if context else [])}))}
        times = torch.tensor(list(self.place), device=labels.device)
        condition = model.time_embed(times)[:, None] + model.class_emb(labels)
        self.activated = functional.silu(condition)  # [times, U, D]
        size = self.activated.numel() * len(self.blocks) * 6 * self.activated.element_size()
        self.table = self._modulations(self.activated) if size <= TABLE_BYTES else None  # [L, times, U, 6, D]
        weight = model.z_proj.weight
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        if context:
            for block in self.blocks:
                heads = block.attn.num_heads
                shape = (len(rows), heads, self.layout.length, model.config.hidden_size // heads)
                self.keys.append(weight.new_empty(shape))
                self.values.append(weight.new_empty(shape))

    def _modulations(self, activated: Tensor) -> Tensor:
        return torch.stack([block.modulation(activated) for block in self.blocks])

    def _modulation(self, index: int, rows: int) -> Tensor:
        """[L, rows, 1, 1, 6, D]; of a single distinct condition [L, 1, 1, 1, 6, D]."""
        place = self.place[index]
        if self.table is None:
            values = self._modulations(self.activated[place])
        else:
            values = self.table[:, place]
        if values.shape[1] > 1:
            values = values.index_select(1, self.rows[:rows])
        return values[:, :, None, None]

    def _run(self, x: Tensor, entity: int, index: int, remember: bool) -> Tensor:
        """Tokens [R, T, C] of an entity through all blocks; outputs of the last [R, 1, T, D]."""
        model, (start, stop) = self.model, self.layout.starts[entity : entity + 2]
        modulations = self._modulation(index, len(x))
        x = model.embed(x, start, stop)[:, None]
        encoder_layers = len(model.encoder_blocks)
        for number, block in enumerate(self.blocks):
            if number == encoder_layers:
                x = model.cross(x, start, stop)
            rotation = model._rotation(model.config.hidden_size // block.attn.num_heads)[start:stop]
            six = _six(modulations[number])
            if remember and number + 1 == len(self.blocks):  # nobody reads its output
                _, key, value = block.attn.project(normalise(x, six[2], six[4])[:, 0], rotation)
                self._store(number, key, value, start, stop)
                return x
            x = block(x, six, rotation, self._attention(number, start, stop, remember))
        return x

    def _store(self, number: int, key: Tensor, value: Tensor, start: int, stop: int) -> None:
        self.keys[number][: len(key), :, start:stop] = key
        self.values[number][: len(value), :, start:stop] = value

    def _attention(self, number: int, start: int, stop: int, remember: bool) -> Attend:
        """To all remembered entities before `start` and to the entity itself: always a prefix, so never masked."""

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if self.keys and (start or remember):
                self._store(number, key, value, start, stop)
                rows = len(key)
                key, value = self.keys[number][:rows, :, :stop], self.values[number][:rows, :, :stop]
            return functional.scaled_dot_product_attention(query, key, value)

        return attend

    def velocity(self, x: Tensor, entity: int, index: int, *, guided: bool = False) -> Tensor:
        """Velocities [R, T, C] of an entity's tokens [B, T, C]: conditional, and with guidance unconditional ones."""
        model = self.model
        if guided:
            x = x.repeat(2, 1, 1)
        return model.pred(model.decoder_norm(self._run(x, entity, index, False)[:, 0]))

    def velocity_of(self, entity: int, schedule: FlowSchedule, guidance_scale: float) -> Callable[[Tensor, int], Tensor]:
        """The guided velocity of an entity as `flow_steps` asks for it."""
        guided = guidance_scale > 1.0

        def velocity(x: Tensor, call: int) -> Tensor:
            found = self.velocity(x, entity, schedule.indices[call], guided=guided).float()
            if not guided:
                return found
            conditional, unconditional = found.chunk(2)
            return torch.lerp(unconditional, conditional, guidance_scale)

        return velocity

    def remember(self, x: Tensor, entity: int) -> None:
        """Keep keys and values of a finished entity [B, T, C], for all rows, at time 0."""
        self._run(x.repeat(len(self.rows) // self.batch, 1, 1), entity, 0, True)
