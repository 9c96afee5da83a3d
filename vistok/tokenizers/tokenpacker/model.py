"""TokenPacker: a projector that gives a language model one visual token for every s x s patches of its vision tower.

A coarse map, interpolated from the last level, asks; the patches of each cell, seen at several depths of the tower,
answer (region-to-point attention); an MLP brings the answers to the width of the language model. 576 patches become
144, 64 or 36 tokens for s = 2, 3, 4.

Paper: "TokenPacker: Efficient Visual Projector for Multimodal LLM", arXiv 2407.02392, section 3.
Origin of the weights: CircleRadon/TokenPacker (on LLaVA-1.5, Apache-2.0; weights under the Llama 2 licence).

Top to bottom: configuration and network; the fast path of inference; objective; attaching; the authors' files.
Pictures, splicing into prompts and the training stages are the neighbours of this file.

Shape letters: B pictures or crops, g side of the patch grid, N = g^2 patches, s scale factor, G = g / s,
M = G^2 tokens, R = s^2 patches of a cell, C channels of the tower, L levels, E attention width, h heads, d = E / h,
D language width.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from vistok.attach import Attachable, Handle
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.files import read_state_dict
from vistok.nn.model import VistokModel
from vistok.registry import Published
from vistok.tokens import VisualTokens

from .llava import attach_to_llava, attach_to_processor, language_model_of, multi_level_features, parts_of_llava

__all__ = ["TokenPacker"]

INDEX_FILE = "pytorch_model.bin.index.json"
PARAMETERS = {4096: 36_722_688, 5120: 47_210_496}
# name -> (Hub id, width of the language model, scale factor, most crops of a picture, tokens of a picture)
CHECKPOINTS: dict[str, tuple[str, int, int, int | None, int]] = {
    "tokenpacker-7b.144tokens": ("sunshine-lwt/TokenPacker-7b-144token", 4096, 2, None, 144),
    "tokenpacker-13b.144tokens": ("sunshine-lwt/TokenPacker-13b-144token", 5120, 2, None, 144),
    "tokenpacker-hd-7b.9crops-144tokens": ("sunshine-lwt/TokenPacker-HD-7b-9patch-144token", 4096, 2, 9, 954),
    "tokenpacker-hd-13b.9crops-144tokens": ("sunshine-lwt/TokenPacker-HD-13b-9patch-144token", 5120, 2, 9, 954),
    "tokenpacker-hd-13b.16crops-144tokens": ("sunshine-lwt/TokenPacker-HD-13b-16patch-144token", 5120, 2, 16, 1393),
    "tokenpacker-hd-13b.16crops-64tokens": ("sunshine-lwt/TokenPacker-HD-13b-16patch-64token", 5120, 3, 16, 619),
    "tokenpacker-hd-13b.16crops-36tokens": ("sunshine-lwt/TokenPacker-HD-13b-16patch-36token", 5120, 4, 16, 347),
}
OFFICIAL_ARGUMENTS = {"raw_grid": "grid_size", "kv_dim": "feature_dim", "multi_dim": "multi_level_dim"}
OFFICIAL_TO_OURS = (
    (r"^q_proj_1\.", "query_proj."),
    (r"^k_proj_1\.2\.", "key_proj."),
    (r"^v_proj_1\.2\.", "value_proj."),
    (r"^ln_q_1\.", "query_norm."),
    (r"^ln_k_1\.", "key_norm."),
    (r"^ln_v_1\.", "value_norm."),
    (r"^clip_attn\.in_proj_", "attention_in."),
    (r"^clip_attn\.out_proj\.", "attention_out."),
    (r"^mlp\.0\.", "mlp_in."),
    (r"^mlp\.2\.", "mlp_out."),
)


def _published() -> dict[str, Published]:
    entries = {}
    for name, (hub_id, width, scale, crops, tokens) in CHECKPOINTS.items():
        slicing = "padded to a square with the mean colour" if crops is None else f"sliced into up to {crops} crops"
        entries[name] = Published(
            name=name,
            system="tokenpacker",
            config={"hidden_size": width, "scale_factor": scale},
            hub_id=hub_id,
            hub_file=INDEX_FILE,
            licence="llama2",
            paper="2407.02392",
            origin="https://github.com/CircleRadon/TokenPacker",
            image_size=336,
            num_tokens=tokens,
            preprocessing=f"{slicing}, 336 x 336, CLIP mean and deviation",
            parameters=PARAMETERS[width],
        )
    return entries


@dataclass(frozen=True)
class _Folded:
    """The weights of inference, and which weights they were made of (held, so that no tensor takes their address).

    Attributes:
        query: [E, E] and [E], LayerNorm scale, in-projection and 1 / sqrt(d) in one.
        key, value: [h, d, E] in-projections with the LayerNorm scales; applied to queries and to answers.
        mlp: [D, E] and [D], out-projection and first MLP layer in one.
    """

    stamp: list[tuple[Any, ...]]
    query_weight: Tensor
    query_bias: Tensor
    key: Tensor
    value: Tensor
    mlp_weight: Tensor
    mlp_bias: Tensor
    sources: list[Tensor]


class TokenPacker(VistokModel, Attachable):
    """Coarse-to-fine projector: N patches in, N / s^2 visual tokens out.

    Args:
        hidden_size: width D of the language model.
        scale_factor: patches a token stands for in each direction, s; a divisor of the grid's sides.
        grid_size: side of the patch grid that is assumed where none is given.
        feature_dim: channels C of the vision tower.
        feature_levels: which hidden states of the tower are read: 0 is the embeddings, l the output of block l. The
            last one is also the source of the coarse queries.
        embed_dim: width E of the attention.
        num_heads: attention heads h.
        multi_level_dim: channels of all levels together; None is C times the number of levels.
        norm_eps: inside the root of the LayerNorms.

    Raises:
        InvalidInputError: if the arguments do not fit each other.
    """

    system: ClassVar[str] = "tokenpacker"
    published: ClassVar[dict[str, Published]] = _published()

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 4096,
        scale_factor: int = 2,
        grid_size: int = 24,
        feature_dim: int = 1024,
        feature_levels: Sequence[int] = (12, 16, 22, 23),
        embed_dim: int = 1024,
        num_heads: int = 8,
        multi_level_dim: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise InvalidInputError(f"embed_dim must be a multiple of num_heads ({num_heads}); got {embed_dim}")
        if not feature_levels or min(feature_levels) < 0:
            raise InvalidInputError(
                f"feature_levels must name at least one hidden state by its number from 0; got {list(feature_levels)}"
            )
        self.scale_factor = scale_factor
        self.num_heads = num_heads
        total = feature_dim * len(feature_levels) if multi_level_dim is None else multi_level_dim
        self.query_proj = nn.Linear(feature_dim, embed_dim, bias=False)
        # The first layers of the key and of the value MLP read the same input: one matrix for both.
        self.key_value_in = nn.Linear(total, 2 * embed_dim)
        self.key_proj = nn.Linear(embed_dim, embed_dim)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.query_norm = nn.LayerNorm(embed_dim, norm_eps)
        self.key_norm = nn.LayerNorm(embed_dim, norm_eps)
        self.value_norm = nn.LayerNorm(embed_dim, norm_eps)
        self.attention_in = nn.Linear(embed_dim, 3 * embed_dim)
        self.attention_out = nn.Linear(embed_dim, embed_dim)
        self.mlp_in = nn.Linear(embed_dim, hidden_size)
        self.mlp_out = nn.Linear(hidden_size, hidden_size)
        self._check_scale((grid_size, grid_size), scale_factor)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.attention_in.weight)
        self._folded: _Folded | None = None

    @classmethod
    def tiny(cls, **overrides: Any) -> TokenPacker:
        """Random weights for a grid of 4 x 4 patches of 16 channels and a language model of 32."""
        arguments = {
            "hidden_size": 32,
            "scale_factor": 2,
            "grid_size": 4,
            "feature_dim": 16,
            "feature_levels": (1, 2, 3),
            "embed_dim": 16,
            "num_heads": 2,
        }
        return cls(**{**arguments, **overrides})

    @classmethod
    def for_llava(cls, model: nn.Module, *, scale_factor: int = 2, **overrides: Any) -> TokenPacker:
        """A fresh projector with the sizes of a transformers LLaVA, on its device and in its floating point type.

        Levels are taken at the depths of the paper: one half, two thirds, and the last two before the last block.

        Args:
            model: `LlavaForConditionalGeneration` or `LlavaModel`, with any tower and language model.
            scale_factor: s.
            overrides: other arguments of the constructor.

        Raises:
            InvalidInputError: if it is no LLaVA, naming what it lacks.
        """
        core, _ = parts_of_llava(model)
        vision, text = core.config.vision_config, core.config.text_config
        depth = vision.num_hidden_layers
        levels = sorted({max(1, depth // 2), max(1, round(depth * 2 / 3)), max(1, depth - 2), max(1, depth - 1)})
        arguments = {
            "hidden_size": text.hidden_size,
            "scale_factor": scale_factor,
            "grid_size": vision.image_size // vision.patch_size,
            "feature_dim": vision.hidden_size,
            "feature_levels": tuple(levels),
        }
        packer = cls(**{**arguments, **overrides})
        reference = next(core.language_model.parameters())
        return packer.to(device=reference.device, dtype=reference.dtype)

    def num_tokens(self, grid: tuple[int, int] | None = None) -> int:
        """Tokens M of a crop with a grid of (rows, cols) patches; None is the configured grid."""
        rows, cols = (self.config.grid_size, self.config.grid_size) if grid is None else grid
        self._check_scale((rows, cols), self.scale_factor)
        return (rows // self.scale_factor) * (cols // self.scale_factor)

    @staticmethod
    def _check_scale(grid: tuple[int, int], scale_factor: int) -> None:
        if scale_factor < 1 or grid[0] % scale_factor or grid[1] % scale_factor:
            raise InvalidInputError(
                f"scale_factor must divide both sides of the patch grid {grid[0]}x{grid[1]}; got {scale_factor}"
            )

    # ---- network

    def forward(
        self,
        multi_level: Tensor | Sequence[Tensor],
        features: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        scale_factor: int | None = None,
    ) -> Tensor:
        """Patches to visual tokens.

        Args:
            multi_level: [B, N, L C], the levels side by side, in raster order and without the class token; or the
                levels one by one, each [B, N, C], which saves joining them.
            features: [B, N, C], the level that the queries come from; None is the last level.
            grid: (rows, cols) of the patches; None is a square.
            scale_factor: another s than the configured one (the weights do not depend on it).

        Returns:
            [B, M, D], tokens in raster order.

        Raises:
            InvalidInputError: wrong channels, a grid that does not hold N patches, or sides not divisible by s.
        """
        scale = self.scale_factor if scale_factor is None else scale_factor
        multi_level, features = self._inputs(multi_level, features)
        grid = self._grid(features, grid)
        self._check_scale(grid, scale)
        points = self.query_proj(self.point_query(features, grid, scale))
        key, value = self.key_value(multi_level)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return self._attend(points, key, value, grid, scale)
        return self._attend_folded(points, key, value, grid, scale)

    def _inputs(
        self, multi_level: Tensor | Sequence[Tensor], features: Tensor | None
    ) -> tuple[Tensor | list[Tensor], Tensor]:
        """Both inputs in the type of the weights, checked."""
        dtype, width, total = self.dtype, self.config.feature_dim, self.key_value_in.in_features
        parts = [multi_level] if isinstance(multi_level, Tensor) else list(multi_level)
        channels = sum(part.shape[-1] for part in parts)
        if channels != total or any(part.ndim != 3 or part.shape[:2] != parts[0].shape[:2] for part in parts):
            raise InvalidInputError(
                f"expected levels [B, N, ...] with {total} channels together ({len(self.config.feature_levels)} levels "
                f"of {width}); got {[list(part.shape) for part in parts]}"
            )
        if features is None:
            features = parts[-1][..., -width:]
        if features.shape != (*parts[0].shape[:2], width):
            raise InvalidInputError(
                f"features must be [B, N, {width}] for the same patches; got {list(features.shape)} beside "
                f"{list(parts[0].shape)}"
            )
        parts = [part.to(dtype) for part in parts]
        return (parts[0] if len(parts) == 1 else parts), features.to(dtype)

    def _grid(self, features: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        patches = features.shape[1]
        if grid is None:
            side = round(patches**0.5)
            grid = (side, side)
        if grid[0] * grid[1] != patches:
            raise InvalidInputError(
                f"{patches} patches form no {grid[0]}x{grid[1]} grid: leave the class token out, or give grid="
            )
        return grid

    @staticmethod
    def point_query(features: Tensor, grid: tuple[int, int], scale_factor: int) -> Tensor:
        """The coarse map [B, M, C]: bilinear interpolation (no antialias) in closed form.

        It reads the centre patch of each cell if s is odd, and the mean of the four central ones if s is even.
        """
        batch, _, width = features.shape
        s, (rows, cols) = scale_factor, (grid[0] // scale_factor, grid[1] // scale_factor)
        cells = features.reshape(batch, rows, s, cols, s, width)
        first = (s - 1) // 2
        if s % 2:
            return cells[:, :, first, :, first].reshape(batch, rows * cols, width)
        middle = cells[:, :, first : first + 2, :, first : first + 2]
        return middle.float().mean((2, 4)).to(features.dtype).reshape(batch, rows * cols, width)

    def key_value(self, multi_level: Tensor | list[Tensor]) -> tuple[Tensor, Tensor]:
        """Key and value MLPs of every patch, before their LayerNorms: two [B, N, E]."""
        layer = self.key_value_in
        if isinstance(multi_level, Tensor):
            hidden = layer(multi_level)
        else:  # level by level, so that they are never joined
            weights = layer.weight.split([part.shape[-1] for part in multi_level], dim=1)
            hidden = functional.linear(multi_level[0], weights[0], layer.bias)
            for part, weight in zip(multi_level[1:], weights[1:]):
                hidden = hidden + functional.linear(part, weight)
        key, value = functional.gelu(hidden).chunk(2, dim=-1)
        return self.key_proj(key), self.value_proj(value)

    @staticmethod
    def cells(patches: Tensor, grid: tuple[int, int], scale_factor: int) -> Tensor:
        """[B, N, E] as [B M, R, E]: the patches of each cell, cells and patches in raster order."""
        batch, _, width = patches.shape
        s, (rows, cols) = scale_factor, (grid[0] // scale_factor, grid[1] // scale_factor)
        cells = patches.reshape(batch, rows, s, cols, s, width).transpose(2, 3)
        return cells.reshape(batch * rows * cols, s * s, width)

    def region_attention(
        self, points: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], scale_factor: int
    ) -> Tensor:
        """Attention of each point to its own cell, with the out-projection: [B, M, E].

        Args:
            points: [B, M, E] projected queries; `key`, `value`: [B, N, E] of `key_value`.
            grid: (rows, cols) of the patches.
            scale_factor: s.
        """
        width, heads = self.config.embed_dim, self.num_heads
        weights, biases = self.attention_in.weight.chunk(3), self.attention_in.bias.chunk(3)
        query = functional.linear(self.query_norm(points), weights[0], biases[0])
        key = self.cells(functional.linear(self.key_norm(key), weights[1], biases[1]), grid, scale_factor)
        value = self.cells(functional.linear(self.value_norm(value), weights[2], biases[2]), grid, scale_factor)
        split = (heads, width // heads)
        answers = functional.scaled_dot_product_attention(
            query.reshape(-1, 1, *split).transpose(1, 2),
            key.unflatten(-1, split).transpose(1, 2),
            value.unflatten(-1, split).transpose(1, 2),
        )
        return self.attention_out(answers.reshape(points.shape))

    def _attend(self, points: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
        attended = self.region_attention(points, key, value, grid, scale)
        return self.mlp_out(functional.gelu(self.mlp_in(attended)))

    # ---- inference

    def _attend_folded(self, points: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
        """The same with fewer products: exact up to rounding.

        A key's bias adds the same to all scores of a cell and drops out of the softmax; a value's bias passes through
        it. So the in-projections need not run over the N patches: the key's goes over to the M queries, the value's to
        the M answers.
        """
        folded, heads = self._fold(), self.num_heads
        (batch, number, width), eps = points.shape, self.config.norm_eps

        def normed(x: Tensor) -> Tensor:
            return functional.layer_norm(x, (width,), eps=eps)

        query = functional.linear(normed(points), folded.query_weight, folded.query_bias)
        query = query.reshape(batch * number, heads, -1).transpose(0, 1)
        query = torch.bmm(query, folded.key).transpose(0, 1)  # [B M, h, E]
        keys, values = self.cells(normed(key), grid, scale), self.cells(normed(value), grid, scale)
        weights = torch.bmm(query, keys.transpose(1, 2)).float().softmax(-1).to(query.dtype)
        answers = torch.bmm(weights, values).transpose(0, 1)
        answers = torch.bmm(answers, folded.value.transpose(1, 2)).transpose(0, 1)  # [B M, h, d]
        hidden = functional.linear(answers.reshape(batch, number, width), folded.mlp_weight, folded.mlp_bias)
        return self.mlp_out(functional.gelu(hidden))

    def _fold(self) -> _Folded:
        """The folded weights, kept until a weight changes."""
        sources = [
            *self.query_norm.parameters(),
            *self.key_norm.parameters(),
            *self.value_norm.parameters(),
            *self.attention_in.parameters(),
            *self.attention_out.parameters(),
            *self.mlp_in.parameters(),
        ]
        inference = any(source.is_inference() for source in sources)  # such tensors count no versions
        stamp = [
            (source.data_ptr(), 0 if inference else source._version, source.dtype, source.device) for source in sources
        ]
        if self._folded is not None and not inference and self._folded.stamp == stamp:
            return self._folded
        dtype, heads = self.dtype, self.num_heads
        width = self.config.embed_dim
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            exact = torch.float64 if dtype == torch.float64 else torch.float32
            query, key, value = self.attention_in.weight.to(exact).chunk(3)
            query_bias, _, value_bias = self.attention_in.bias.to(exact).chunk(3)
            scale = (width // heads) ** -0.5
            out = self.mlp_in.weight.to(exact) @ self.attention_out.weight.to(exact)
            constant = value @ self.value_norm.bias.to(exact) + value_bias
            through = self.mlp_in.weight.to(exact) @ self.attention_out.bias.to(exact) + self.mlp_in.bias.to(exact)
            key = (key * self.key_norm.weight.to(exact)).unflatten(0, (heads, -1))
            value = (value * self.value_norm.weight.to(exact)).unflatten(0, (heads, -1))
            self._folded = _Folded(
                stamp=stamp,
                query_weight=(scale * query * self.query_norm.weight.to(exact)).to(dtype),
                query_bias=(scale * (query @ self.query_norm.bias.to(exact) + query_bias)).to(dtype),
                key=key.to(dtype),
                value=value.to(dtype),
                mlp_weight=out.to(dtype),
                mlp_bias=(out @ constant + through).to(dtype),
                sources=sources,
            )
        return self._folded

    @torch.no_grad()
    def encode(self, images: Tensor, vision_tower: nn.Module) -> VisualTokens:
        """Pictures to visual tokens through a vision tower.

        Args:
            images: float [B, 3, H, W] as the tower expects them (see `preprocess` for CLIP).
            vision_tower: a transformers vision model with hidden states, e.g. `CLIPVisionModel`.

        Returns:
            features [B, M, D] with `grid` = (G, G).

        Raises:
            InvalidInputError: images of another shape, or NaN or infinite pixels.
            InvalidOutputError: if the tower or the projector produce NaN.
        """
        if images.ndim != 4 or not images.is_floating_point() or images.shape[0] == 0:
            raise InvalidInputError(f"expected float images [B, 3, H, W]; got {images.dtype} {list(images.shape)}")
        if not bool(torch.isfinite(images).all()):
            raise InvalidInputError("the images contain NaN or infinite pixels")
        tokens = self(multi_level_features(vision_tower, images, self.config.feature_levels))
        if not bool(torch.isfinite(tokens).all()):
            raise InvalidOutputError(
                "the visual tokens contain NaN or infinity: check the weights of tower and projector"
            )
        side = round(tokens.shape[1] ** 0.5)
        return VisualTokens(features=tokens, grid=(side, side))

    # ---- objective

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Next-token cross entropy of the LLaVA that this projector is attached to (section 3.3 of the paper).

        Args:
            batch: what the model's forward takes: `input_ids`, `pixel_values`, `attention_mask`, `labels` (-100 where
                nothing is to be learnt), with as many image tokens as there are visual tokens.
            generator: accepted for symmetry; nothing is drawn.

        Raises:
            InvalidInputError: if it is attached to no model or to several, or the batch has no labels.
        """
        models = [model for model in self._targets() if isinstance(model, nn.Module)]
        if len(models) != 1:
            raise InvalidInputError(
                f"a projector learns through a language model: attach it to one LLaVA first (it has {len(models)})"
            )
        if batch.get("labels") is None:
            raise InvalidInputError("the batch holds no labels; give int64 [B, L] with -100 where nothing is learnt")
        return {"loss": language_model_of(models[0])(**batch).loss}

    # ---- attaching

    def _attach(self, model: Any, handle: Handle) -> None:
        """Take the place of a LLaVA's projector, or tell its processor how many tokens a picture has."""
        if isinstance(model, nn.Module):
            attach_to_llava(self, model, handle)
        else:
            attach_to_processor(self, model, handle)

    # ---- the authors' files

    @classmethod
    def from_official(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], config: str | Mapping[str, Any]
    ) -> TokenPacker:
        """Load a projector of the authors (see `VistokModel.from_official`).

        Args:
            source: `mm_projector.bin`; a whole LLaVA state dict or one of its files, of which the projector is taken;
                the index file of a sharded checkpoint or the folder that holds it, of which only the needed shards are
                read (shards that are not there are fetched from the Hub if `config` is a published name).
            config: published name, or constructor arguments (the authors' names or ours).
        """
        if isinstance(source, Mapping):
            return super().from_official(source, config)
        path = Path(source)
        if path.is_dir():
            path = path / INDEX_FILE
        if path.name.endswith(".index.json"):
            hub_id = cls.published[config].hub_id if isinstance(config, str) and config in cls.published else None
            return super().from_official(_projector_of_shards(path, hub_id), config)
        return super().from_official(path, config)

    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our constructor arguments from the authors'."""
        arguments = {OFFICIAL_ARGUMENTS.get(name, name): value for name, value in config.items()}
        width = arguments.get("feature_dim", 1024)
        total = arguments.get("multi_level_dim")
        if total is not None and "feature_levels" not in arguments and total == 4 * width:
            arguments.pop("multi_level_dim")
        return arguments

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The projector's part of a LLaVA state dict, without wrapper prefixes."""
        found = {}
        for key, value in state.items():
            match = re.search(r"(?:^|\.)mm_projector\.(.*)$", key)
            if match:
                found[match.group(1)] = value
        return found or dict(state)

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official names to ours; the first layers of the key and the value MLP are joined."""
        state = dict(state)
        for part in ("weight", "bias"):
            pair = [f"{kind}_proj_1.0.{part}" for kind in "kv"]
            if all(key in state for key in pair):
                state[f"key_value_in.{part}"] = torch.cat([state.pop(key) for key in pair])
        renamed = {}
        for key, value in state.items():
            for pattern, replacement in OFFICIAL_TO_OURS:
                key = re.sub(pattern, replacement, key)
            renamed[key] = value
        return renamed

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names (without `model.mm_projector.`)."""
        return _to_official(self.state_dict())

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise LLaVA's own projector."""
        if {"0.weight", "2.weight"} <= set(unexpected) or any("linear_1" in key for key in unexpected):
            return "This is LLaVA's MLP projector, not a TokenPacker."
        if "rotary_emb" in "".join(unexpected) or any(key.startswith("model.layers.") for key in unexpected):
            return "These are weights of a language model without a TokenPacker."
        return None


def _to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    official = {}
    for key, value in state.items():
        if key.startswith("key_value_in."):
            part = key.removeprefix("key_value_in.")
            official[f"k_proj_1.0.{part}"], official[f"v_proj_1.0.{part}"] = value.chunk(2)
            continue
        for pattern, ours in OFFICIAL_TO_OURS:
            if key.startswith(ours):
                theirs = pattern.removeprefix("^").replace("\\", "")
                key = theirs + key.removeprefix(ours)
                break
        official[key] = value
    return official


def _projector_of_shards(index: Path, hub_id: str | None) -> dict[str, Tensor]:
    """The projector's tensors of a sharded LLaVA checkpoint."""
    if not index.is_file():
        raise CheckpointError(f"no checkpoint index at {index}; give mm_projector.bin or the folder of the checkpoint")
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of a sharded checkpoint ({error!r})") from error
    wanted = {key: shard for key, shard in places.items() if "mm_projector." in key}
    if not wanted:
        raise CheckpointError(f"{index} lists no mm_projector weights: this checkpoint holds no TokenPacker")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(wanted.values())):
        path = index.parent / Path(shard).name
        if not path.is_file() and hub_id is not None:
            path = _fetch(hub_id, shard)
        content = read_state_dict(path)
        state.update({key: content[key] for key, place in wanted.items() if place == shard and key in content})
    return state


def _fetch(hub_id: str, shard: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(hub_id, shard))
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{shard} could not be downloaded from {hub_id} ({type(error).__name__})") from error
