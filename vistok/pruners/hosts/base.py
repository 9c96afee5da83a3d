"""What a pruner must know about a model family: where its parts are, and how image tokens lie on the image.

A host reads a stock transformers model; it changes nothing. Subclasses fill in the paths of `Host` and `visuals`.

Shape letters: V views (tiles, frames) in one call of the tower, P patches of a view (class token included where the
tower has one), N tokens of a view after merging, H heads, d channels of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vistok.errors import InvalidInputError
from vistok.kernels.attention_rows import attention_received

__all__ = ["Block", "Host", "TowerAttention", "Visual", "rotate"]

Rows = Literal["all", "patch", "cls"]


@dataclass(frozen=True)
class Block:
    """A rectangle of tokens in raster order: rows x columns from `start` on, the last column newlines if `newline`."""

    start: int
    rows: int
    columns: int
    newline: bool = False

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass
class Visual:
    """One image, video or tile of a prompt.

    Attributes:
        kind: `"image"` or `"video"`.
        tokens: placeholders that it fills in the prompt.
        views: which views of the tower's call it consists of.
        grid: rows and columns of tokens in one view.
        pack: values [N, C] of each view -> [tokens, C] in the order of the prompt; newline tokens get the number given.
        single: whether the tokens are exactly those of the views, one after the other (no newline, no resize).
        capture: the tower call that made it.
        packed_grid: rows and columns of a view in the prompt, where the packing resizes views.
    """

    kind: str
    tokens: int
    views: range
    grid: tuple[int, int]
    pack: Callable[[list[Tensor], float], Tensor]
    single: bool = True
    capture: Any = field(default=None, repr=False)
    packed_grid: tuple[int, int] | None = None

    def blocks(self) -> list[Block]:
        """The rectangles that the tokens form, in the order of the prompt: views, then joined tiles with newlines."""
        rows, columns = self.packed_grid or self.grid
        size = rows * columns
        if self.single or self.packed_grid is not None:
            blocks = [Block(view * size, rows, columns) for view in range(len(self.views))] or [Block(0, rows, columns)]
            rest = self.tokens - size * len(blocks)
            return [*blocks, Block(self.tokens - rest, rest, 1, newline=True)] if rest else blocks
        base = Block(0, rows, columns)
        ends = self.newlines().nonzero()[:, 0]
        if self.tokens == size:
            return [base]
        if not len(ends):
            return [base, Block(size, 1, self.tokens - size)]
        width = int(ends[0]) - size + 1
        return [base, Block(size, (self.tokens - size) // width, width, newline=True)]

    def sources(self) -> Tensor:
        """int64 [tokens]: number of the view's token (view * N + token) of every packed token, -1 for newlines.

        Raises:
            InvalidInputError: if the packing resizes the image, so that tokens are mixtures.
        """
        size = self.grid[0] * self.grid[1]
        numbers = torch.arange(len(self.views) * size, dtype=torch.float64).view(len(self.views), size, 1)
        packed = self.pack(list(numbers), -1.0)[:, 0]
        sources = packed.round().long()
        if not torch.equal(sources.double(), packed.double().cpu()):
            raise InvalidInputError(
                "this image was resized after its tiles were joined, so its tokens belong to no single patch; "
                "choose a method that packs scores instead of indices (scope='global')"
            )
        return sources

    def newlines(self) -> Tensor:
        """bool [tokens], True for the learned tokens that end the rows of an image."""
        size = self.grid[0] * self.grid[1]
        return self.pack([torch.zeros(size, 1) for _ in self.views], 1.0)[:, 0] > 0.5


@dataclass
class TowerAttention:
    """Queries and keys of one attention layer of the tower; the attention matrix is never made.

    Attributes:
        query, key: [V, H, P, d].
        scale: factor of the dot products.
        class_tokens: leading tokens that are no patches (0 or 1).
        valid: bool [V, P], or None where all patches are real.
    """

    query: Tensor
    key: Tensor
    scale: float
    class_tokens: int = 0
    valid: Tensor | None = None

    def received(self, queries: Rows = "all", weights: Tensor | None = None) -> Tensor:
        """Mean attention float32 [V, patches] that each patch receives.

        Args:
            queries: rows of the mean: all tokens (class token included), patches only, or the class token only.
            weights: [V, P] weights of the rows instead.

        Raises:
            InvalidInputError: if the class token is asked for and the tower has none.
        """
        views, count = self.key.shape[0], self.key.shape[2]
        skip = self.class_tokens
        query = self.query
        if weights is None:
            if queries == "cls":
                if not skip:
                    raise InvalidInputError(
                        "this vision tower has no class token; ask for the attention of all tokens (queries='all')"
                    )
                query, weights = query[:, :, :1], query.new_ones(views, 1)
            elif queries in ("all", "patch"):
                rows = torch.ones(views, count, dtype=torch.float32, device=query.device)
                if self.valid is not None:
                    rows = rows * self.valid
                if queries == "patch":
                    rows[:, :skip] = 0
                weights = rows / rows.sum(dim=1, keepdim=True)
            else:
                raise InvalidInputError(f"queries are 'all', 'patch' or 'cls', got {queries!r}")
        return attention_received(query, self.key, weights, scale=self.scale, valid=self.valid)[:, skip:]


@dataclass
class Capture:
    """One call of the tower.

    Attributes:
        kind: `"image"` or `"video"`.
        arguments: of the call, by name.
        readings: what the stages read of it, by their number.
        visuals: in the order of the call.
        features: outputs of the tower layers that stages asked for, by their number.
        attention: queries and keys kept for pruners that come later, by tower layer.
        outputs: of these layers.
    """

    kind: str
    arguments: dict[str, Any]
    readings: dict[int, list[Any]] = field(default_factory=dict)
    visuals: list[Visual] = field(default_factory=list)
    features: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, list[TowerAttention]] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, H, S, d] by tables [B or 1, S, r]; channels beyond r are left alone."""
    cos, sin = cos[:, None], sin[:, None]
    size = cos.shape[-1]
    turned, rest = states[..., :size], states[..., size:]
    left, right = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class Host:
    """A model family. `Host(model)` raises unless the parts it needs are there."""

    model_types: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = ""
    language_path: ClassVar[str] = "language_model"
    several_axes: ClassVar[bool] = False
    """Whether rotary positions have several axes, so that gaps are never closed."""
    kinds: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.core = model.model
        self.config = model.config
        self.language_model = getattr(self.core, self.language_path)
        self.layers = self.language_model.layers
        self.text_config = self.config.get_text_config()

    # ----------------------------------------------------------------------------------------------------- the decoder

    @property
    def first_decoder_layer(self) -> int:
        """The first decoder layer before which tokens may be dropped."""
        return 1

    def token_ids(self, kind: str) -> int:
        """Id of the placeholder of images or videos."""
        for attribute in (f"{kind}_token_id", f"{kind}_token_index"):
            value = getattr(self.config, attribute, None)
            if value is not None:
                return int(value)
        raise InvalidInputError(f"the configuration of {type(self.model).__name__} names no {kind} placeholder")

    def queries_and_keys(
        self, layer: nn.Module, hidden: Tensor, tables: tuple[Tensor, Tensor], rows: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, H, T, d] of some rows and keys [B, G, S, d] of all, by a decoder layer's own weights.

        Args:
            hidden: [B, S, D], input of the layer.
            tables: rotary cosines and sines, [B or 1, S, d].
            rows: int64 [B, T].
            key: the rotated keys, where they are known already.
        """
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        batch, _length = hidden.shape[:2]
        cos, sin = tables
        picked = normed.gather(1, rows[..., None].expand(-1, -1, normed.shape[-1]))
        query = self._heads(attention.q_proj(picked), attention, "q_norm")
        turn = [
            table.expand(batch, -1, -1).gather(1, rows[..., None].expand(-1, -1, table.shape[-1])) for table in tables
        ]
        query = rotate(query, turn[0], turn[1])
        if key is None:
            key = rotate(self._heads(attention.k_proj(normed), attention, "k_norm"), cos, sin)
        return query, key

    @staticmethod
    def _heads(states: Tensor, attention: nn.Module, norm: str) -> Tensor:
        """[B, S, H d] -> [B, H, S, d], with the layer's norm of queries or keys where it has one."""
        norm_module = getattr(attention, norm, None)
        batch, length = states.shape[:2]
        if norm_module is not None and norm_module.weight.shape[-1] != attention.head_dim:
            states, norm_module = norm_module(states), None
        states = states.view(batch, length, -1, attention.head_dim)
        if norm_module is not None:
            states = norm_module(states)
        return states.transpose(1, 2)

    def rotary_tables(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, S, d] of rotary positions [B, S]."""
        return self.language_model.rotary_emb(hidden, position_ids=positions)

    # ------------------------------------------------------------------------------------------------------- the tower

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.core.vision_tower

    def tower_layers(self) -> Any:
        """Its transformer layers."""
        return self.tower.encoder.layers

    def tower_attention(self, layer: int) -> nn.Module:
        """The attention module of one of them; its input is already normed."""
        return self.tower_layers()[layer].self_attn

    def tower_layer(self, layer: int | None) -> int:
        """Index of a tower layer; None is the layer whose output the model uses.

        Raises:
            InvalidInputError: if there is no such layer.
        """
        depth = len(self.tower_layers())
        index = self.feature_layer() if layer is None else layer + depth if layer < 0 else layer
        if not 0 <= index < depth:
            raise InvalidInputError(f"the vision tower has layers 0..{depth - 1}, got {layer}")
        return index

    def feature_layer(self) -> int:
        """The layer that makes the features the model uses."""
        depth = len(self.tower_layers())
        layer = getattr(self.config, "vision_feature_layer", -1)
        layer = layer[-1] if isinstance(layer, (list, tuple)) else layer
        return depth + layer if layer < 0 else layer - 1

    def class_tokens(self, count: int) -> int:
        """Leading tokens of the tower that are no patches, of `count` tokens in all."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return max(0, count - side * side)

    def read_attention(self, module: nn.Module, arguments: dict[str, Any]) -> list[TowerAttention]:
        """Queries and keys from the input of an attention module of the tower."""
        hidden = arguments["hidden_states"]
        views, count = hidden.shape[:2]

        def heads(states: Tensor) -> Tensor:
            return states.view(views, count, -1, module.head_dim).transpose(1, 2)

        return [
            TowerAttention(
                heads(module.q_proj(hidden)), heads(module.k_proj(hidden)), module.scale, self.class_tokens(count)
            )
        ]

    def merge_patches(self, values: list[Tensor], capture: Capture) -> list[Tensor]:
        """Values [V, patches, ...] of each attention call -> [N, ...] of each view: patches that share a token are
        averaged, and window orders undone."""
        return [view for call in values for view in call]

    def project(self, features: Tensor) -> Tensor | None:
        """The projector on single tokens [K, D_vision] -> [K, D], or None where tokens are merged before it."""
        return None

    # ------------------------------------------------------------------------------------------------------ the images

    def visuals(self, capture: Capture, output: Any) -> list[Visual]:
        """The images or videos of one tower call, in the order in which their tokens fill the prompt."""
        raise TypeError(f"{type(self).__name__} does not define visuals(capture, output)")

    def pixels(self, capture: Capture) -> Tensor:
        """Pixels [V, 3, H, W] of the views, as given to the tower."""
        name = "pixel_values_videos" if capture.kind == "video" else "pixel_values"
        values = capture.arguments[name]
        return values.flatten(0, -4) if values.ndim > 4 else values

    def arguments_of(self, function: Callable, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a processor's outputs that a features call takes."""
        known = inspect.signature(function).parameters
        return {name: value for name, value in inputs.items() if name in known}

    def bind(self, function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a features call by name."""
        try:
            bound = inspect.signature(function).bind(*args, **kwargs)
        except TypeError:
            return dict(kwargs)
        arguments = dict(bound.arguments)
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        return arguments


def concatenated(views: list[Tensor], newline: float) -> Tensor:
    """The packing of models without newlines: one view after the other."""
    return torch.cat(list(views), dim=0)
