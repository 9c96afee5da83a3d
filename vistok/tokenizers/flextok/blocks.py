"""What FlexTok's encoder and decoder are made of: positions, time, attention, feed-forward, blocks, heads.

Letters: B images, L positions, M positions that are seen, D channels, H heads, C channels of a head, S moments in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.nn.attention import attention

__all__ = [
    "Attend",
    "Attention",
    "Block",
    "CrossBlock",
    "FeedForward",
    "Modulate",
    "Norm",
    "PatchEmbedding",
    "PositionTable",
    "ProjectionHead",
    "TimeEmbedding",
    "masked_attention",
    "merge_block_keys",
    "sinusoids",
    "split_block_keys",
    "unpatchify",
]

NORM_EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": functional.silu, "gelu": functional.gelu}

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(query, key, value [..., H, C], scale) -> [..., H, C]: who sees whom is the caller's business, not the block's."""


# --------------------------------------------------------------------------------------------- positions, time, patches


class PositionTable(nn.Module):
    """Position embeddings of a grid or a sequence.

    Args:
        size: channels D.
        shape: longest extent of each axis that the table covers.
        kind: `"sincos"`, `"learnable_sum"` or `"learnable_prod"` (one vector an axis and place, summed or multiplied).
        scaling: `"absolute"` takes the first places of each axis, `"interpolate"` stretches the whole table.
    """

    def __init__(self, size: int, shape: Sequence[int], kind: str = "sincos", scaling: str = "absolute") -> None:
        super().__init__()
        if kind not in ("sincos", "learnable_sum", "learnable_prod") or scaling not in ("absolute", "interpolate"):
            raise InvalidInputError(
                "positions must be 'sincos', 'learnable_sum' or 'learnable_prod', scaled 'absolute' or 'interpolate'; "
                f"got {kind!r} and {scaling!r}"
            )
        self.shape, self.kind, self.scaling = tuple(int(side) for side in shape), kind, scaling
        if kind == "sincos":
            if len(self.shape) != 2 or size % 4:
                raise InvalidInputError(
                    f"sincos positions need two axes and channels divisible by 4; got {self.shape} and {size}"
                )
            self.register_buffer("table", sincos_table(size, self.shape[0], self.shape[1]))
        else:
            longest = max(self.shape)
            self.table = nn.Parameter(torch.empty(len(self.shape), 1, size, longest))
            nn.init.trunc_normal_(self.table, std=0.02)

    def full(self) -> Tensor:
        """The whole table, [1, D, *shape]."""
        if self.kind == "sincos":
            return self.table
        combined: Tensor | None = None
        for axis, extent in enumerate(self.shape):
            sides = [1] * len(self.shape)
            sides[axis] = extent
            part = self.table[axis, :, :, :extent].reshape(1, -1, *sides)
            if combined is None:
                combined = part
            else:
                combined = combined + part if self.kind == "learnable_sum" else combined * part
        assert combined is not None
        return combined

    def forward(self, shape: Sequence[int]) -> Tensor:
        """Embeddings [1, D, *shape].

        Raises:
            InvalidInputError: if the table does not reach that far and may not be stretched.
        """
        table, given = self.full(), tuple(int(side) for side in shape)
        if len(given) != len(self.shape):
            raise InvalidInputError(f"the position table has the axes {self.shape}; got the shape {given}")
        if given == self.shape:
            return table
        if self.scaling == "interpolate":
            mode = "bilinear" if len(given) == 2 else "linear"
            return functional.interpolate(table, given, mode=mode, align_corners=True)
        if any(side > limit for side, limit in zip(given, self.shape)):
            raise InvalidInputError(
                f"{'x'.join(map(str, given))} places exceed the position table of {'x'.join(map(str, self.shape))}: "
                "crop or resize the image, or build the model with position_scaling='interpolate'"
            )
        return table[(slice(None), slice(None), *(slice(side) for side in given))]


def sincos_table(size: int, rows: int, columns: int) -> Tensor:
    """[1, D, rows, columns]: sine and cosine of the row, then of the column, with D / 4 frequencies each.

    Where the sides differ, places are numbered down the columns and laid out along the rows, as in the authors' tables.
    """
    omega = 10000.0 ** (-torch.arange(size // 4, dtype=torch.float64) / (size / 4))
    place = torch.arange(rows * columns, dtype=torch.float64)
    angles = [torch.outer(place // rows, omega), torch.outer(place % rows, omega)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return table.float().t().reshape(1, size, rows, columns)


def sinusoids(t: Tensor, size: int, max_timestep: float = 1.0) -> Tensor:
    """Features [S, size] of moments t [S] in 0..max_timestep: cosines, then sines, at frequencies from 1000 to 4."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(256.0) * steps / half) * (1000.0 / max_timestep)
    angles = t.float()[:, None] * frequencies
    return functional.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, size % 2))


class TimeEmbedding(nn.Module):
    """Moments [S] -> [S, D]: sinusoids through Linear, SiLU, Linear.

    Args:
        size: channels D.
        frequency_size: sinusoidal features.
        max_timestep: largest moment; the flow's own time ends at 1.
    """

    def __init__(self, size: int, frequency_size: int = 256, max_timestep: float = 1.0) -> None:
        super().__init__()
        self.frequency_size, self.max_timestep = frequency_size, max_timestep
        self.mlp = nn.Sequential(nn.Linear(frequency_size, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        """[S] -> [S, D]."""
        features = sinusoids(t, self.frequency_size, self.max_timestep)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class PatchEmbedding(nn.Linear):
    """A feature map [B, Z, h, w] as patches [B, h / p, w / p, D]."""

    def __init__(self, channels: int, patch_size: int, size: int) -> None:
        super().__init__(channels * patch_size**2, size)
        self.patch_size = patch_size

    def forward(self, input: Tensor) -> Tensor:
        """Row by row inside a patch, channels last."""
        patches = functional.pixel_unshuffle(input, self.patch_size)  # channels, then rows, then columns of a patch
        inner = patches.unflatten(1, (-1, self.patch_size**2)).transpose(1, 2).flatten(1, 2)
        return super().forward(inner.permute(0, 2, 3, 1).to(self.weight.dtype))


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """[B, h, w, p * p * Z] to a map [B, Z, h p, w p], the inverse of the layout of `PatchEmbedding`."""
    inner = patches.permute(0, 3, 1, 2).unflatten(1, (patch_size**2, -1)).transpose(1, 2).flatten(1, 2)
    return functional.pixel_shuffle(inner, patch_size)


# ----------------------------------------------------------------------------------------------------------- the layers


class Norm(nn.Module):
    """LayerNorm computed in float32 and cast back; the published models have neither weight nor bias."""

    def __init__(self, size: int, affine: bool = False) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return functional.layer_norm(x.float(), (self.size,), weight, bias, NORM_EPS).to(x.dtype)


def masked_attention(mask: Tensor) -> Attend:
    """Attention of batches [B, L, H, C] under a bool mask, broadcastable to [B, H, L, M].

    A query that sees nothing gets exactly 0.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = attention(query, key, value, mask, scale=scale)
        return torch.where(mask.any(-1, keepdim=True), attended, 0.0).transpose(1, 2)

    return attend


class Attention(nn.Module):
    """Multi-head attention with one product for queries, keys and values, and LayerNorm on queries and keys.

    The scale is 8 / C (muP), which is the usual C^-1/2 for the published C = 64 alone.

    Args:
        size: channels D.
        head_dim: C.
        qk_norm: normalise queries and keys over C.
        qkv_bias, proj_bias: biases.
        mup_scale: 8 / C instead of C^-1/2.
        affine_norm: weights and biases in the norms.
        cross: queries of one sequence, keys and values of another.
    """

    def __init__(
        self,
        size: int,
        head_dim: int,
        *,
        qk_norm: bool = True,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        mup_scale: bool = True,
        affine_norm: bool = False,
        cross: bool = False,
    ) -> None:
        super().__init__()
        if size % head_dim:
            raise InvalidInputError(f"the channels must be a multiple of head_dim; got {size} and {head_dim}")
        self.head_dim, self.scale = head_dim, 8 / head_dim if mup_scale else head_dim**-0.5
        if cross:
            self.q = nn.Linear(size, size, bias=qkv_bias)
            self.kv = nn.Linear(size, 2 * size, bias=qkv_bias)
        else:
            self.qkv = nn.Linear(size, 3 * size, bias=qkv_bias)
        self.q_norm = Norm(head_dim, affine_norm) if qk_norm else nn.Identity()
        self.k_norm = Norm(head_dim, affine_norm) if qk_norm else nn.Identity()
        self.proj = nn.Linear(size, size, bias=proj_bias)

    def forward(self, x: Tensor, attend: Attend, context: Tensor | None = None) -> Tensor:
        """[..., D] -> [..., D], for the rows that `attend` returns."""
        if context is None:
            query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)
        else:
            query = self.q(x).unflatten(-1, (-1, self.head_dim))
            key, value = self.kv(context).unflatten(-1, (2, -1, self.head_dim)).unbind(-3)
        return self.proj(attend(self.q_norm(query), self.k_norm(key), value, self.scale).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU, fc2( act(gate x) * (up x) ), with gate and up in one product; or fc2( act(fc1 x) ).

    Args:
        size: channels D.
        ratio: hidden width over D; a gated layer takes two thirds of it.
        gated: SwiGLU.
        activation: `"silu"` or `"gelu"`.
        bias: biases.
    """

    def __init__(
        self, size: int, ratio: float = 4.0, *, gated: bool = True, activation: str = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InvalidInputError(f"the activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        hidden = int(2 * int(ratio * size) / 3) if gated else int(ratio * size)
        self.gated, self.activation = gated, activation
        self.fc1 = nn.Linear(size, 2 * hidden if gated else hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        activate = ACTIVATIONS[self.activation]
        if not self.gated:
            return self.fc2(activate(self.fc1(x)))
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(activate(gate) * up)


class Modulate:
    """How a block's modulation meets its rows; this one has a single segment with one modulation a row or for all.

    `scale` computes x * (1 + scale) + shift, `add` computes x + gate * branch; shift, scale and gate come as the block
    got them, with the segments as their second axis ([S, E, D]).
    """

    def scale(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Modulated rows."""
        return torch.addcmul(shift[:, 0], x, 1 + scale[:, 0])

    def add(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        """The residual sum."""
        return torch.addcmul(x, branch, gate[:, 0])


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); adaLN-zero with `expansion`.

    Args:
        size: channels D.
        head_dim: channels of a head.
        mlp_ratio: hidden width of the feed-forward layer over D.
        expansion: modulations E a sample, one for each of its segments (patches, registers); None has none.
        gated_mlp, activation, mlp_bias: of the feed-forward layer.
        affine_norm: weights and biases in the norms.
        attention: further arguments of `Attention`.
    """

    def __init__(
        self,
        size: int,
        head_dim: int,
        mlp_ratio: float = 4.0,
        *,
        expansion: int | None = None,
        gated_mlp: bool = True,
        activation: str = "silu",
        mlp_bias: bool = False,
        affine_norm: bool = False,
        **attention: bool,
    ) -> None:
        super().__init__()
        self.expansion = expansion
        self.norm1 = Norm(size, affine_norm)
        self.attention = Attention(size, head_dim, affine_norm=affine_norm, **attention)
        self.norm2 = Norm(size, affine_norm)
        self.feed_forward = FeedForward(size, mlp_ratio, gated=gated_mlp, activation=activation, bias=mlp_bias)
        if expansion is not None:
            self.modulation = nn.Linear(size, expansion * 6 * size)

    def modulations(self, activated: Tensor) -> Tensor:
        """silu(time embedding) [S, D] -> [S, E, 6, D]: gates of attention and MLP, then shift and scale of each."""
        assert self.expansion is not None
        return self.modulation(activated).unflatten(1, (self.expansion, 6, -1))

    def forward(
        self,
        x: Tensor,
        attend: Attend,
        modulation: Tensor | None = None,
        modulate: Modulate | None = None,
        rows: tuple[slice, ...] = (),
    ) -> Tensor:
        """One block.

        Args:
            x: [..., D].
            attend: see `Attend`; it may return fewer rows, which `rows` then picks from `x`, too.
            modulation: [S, E, 6, D] of `modulations`; None without adaLN.
            modulate: how that meets the rows.
            rows: index of the rows whose output is needed; () is all.
        """
        if modulation is None or modulate is None:
            x = (x[rows] if rows else x) + self.attention(self.norm1(x), attend)
            return x + self.feed_forward(self.norm2(x))
        gate_attention, gate_mlp, shift_attention, scale_attention, shift_mlp, scale_mlp = modulation.unbind(2)
        attended = self.attention(modulate.scale(self.norm1(x), shift_attention, scale_attention), attend)
        x = modulate.add(x[rows] if rows else x, attended, gate_attention)
        return modulate.add(x, self.feed_forward(modulate.scale(self.norm2(x), shift_mlp, scale_mlp)), gate_mlp)


class CrossBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each on normed input with a residual sum; adaLN with `expansion`.

    No published model uses it; it is the variant for decoders that read a separate context. Arguments as in `Block`.
    """

    def __init__(
        self,
        size: int,
        head_dim: int,
        mlp_ratio: float = 4.0,
        *,
        expansion: int | None = None,
        gated_mlp: bool = True,
        activation: str = "silu",
        mlp_bias: bool = False,
        affine_norm: bool = False,
        **attention: bool,
    ) -> None:
        super().__init__()
        self.expansion = expansion
        if expansion is not None:
            self.modulation = nn.Linear(size, expansion * 11 * size)
        self.norm1 = Norm(size, affine_norm)
        self.self_attention = Attention(size, head_dim, affine_norm=affine_norm, **attention)
        self.query_norm, self.context_norm = Norm(size, affine_norm), Norm(size, affine_norm)
        self.cross_attention = Attention(size, head_dim, affine_norm=affine_norm, cross=True, **attention)
        self.norm2 = Norm(size, affine_norm)
        self.feed_forward = FeedForward(size, mlp_ratio, gated=gated_mlp, activation=activation, bias=mlp_bias)

    def modulations(self, activated: Tensor) -> Tensor:
        """silu(time embedding) [S, D] -> [S, E, 11, D]: three gates, then shift and scale four times.

        Those are of self-attention, of query and context of cross-attention, and of the feed-forward layer.
        """
        assert self.expansion is not None
        return self.modulation(activated).unflatten(1, (self.expansion, 11, -1))

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        attend: Attend,
        attend_context: Attend,
        modulation: Tensor | None = None,
        modulate: Modulate | None = None,
    ) -> Tensor:
        """x [B, L, D] and context [B, M, D] -> [B, L, D].

        With a modulation [S, E, 11, D], M must be L, because the context is modulated as the rows of x are.
        """
        if modulation is None or modulate is None:
            x = x + self.self_attention(self.norm1(x), attend)
            x = x + self.cross_attention(self.query_norm(x), attend_context, self.context_norm(context))
            return x + self.feed_forward(self.norm2(x))
        if context.shape[1] != x.shape[1]:
            raise InvalidInputError(
                f"a modulated context must have as many rows as x, {x.shape[1]}; it has {context.shape[1]}"
            )
        gates, rest = modulation[:, :, :3].unbind(2), modulation[:, :, 3:].unbind(2)
        x = modulate.add(x, self.self_attention(modulate.scale(self.norm1(x), rest[0], rest[1]), attend), gates[0])
        query = modulate.scale(self.query_norm(x), rest[2], rest[3])
        context = modulate.scale(self.context_norm(context), rest[4], rest[5])
        x = modulate.add(x, self.cross_attention(query, attend_context, context), gates[1])
        return modulate.add(x, self.feed_forward(modulate.scale(self.norm2(x), rest[6], rest[7])), gates[2])


class ProjectionHead(nn.Module):
    """LayerNorm, then Linear and SiLU for each hidden layer, then Linear: maps features to those of a REPA teacher.

    Args:
        size: channels in.
        hidden: channels of the hidden layers.
        out: channels out.
        num_hidden: hidden layers.
    """

    def __init__(self, size: int, hidden: int, out: int, num_hidden: int = 2) -> None:
        super().__init__()
        self.norm = Norm(size)
        self.layers = nn.ModuleList(nn.Linear(hidden if index else size, hidden) for index in range(num_hidden))
        self.out = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., out]."""
        x = self.norm(x)
        for layer in self.layers:
            x = functional.silu(layer(x))
        return self.out(x)


# ----------------------------------------------------------------------------------------------- the authors' key names

_MERGED = {
    "attn": ("attention.qkv", ("attn.wq", "attn.wk", "attn.wv")),
    "self_attn": ("self_attention.qkv", ("self_attn.wq", "self_attn.wk", "self_attn.wv")),
    "cross_attn": ("cross_attention.kv", ("cross_attn.wk", "cross_attn.wv")),
    "mlp": ("feed_forward.fc1", ("mlp.fc1", "mlp.fc3")),
}
_RENAMED = {
    "attn.proj": "attention.proj",
    "attn.q_norm": "attention.q_norm",
    "attn.k_norm": "attention.k_norm",
    "self_attn.proj": "self_attention.proj",
    "self_attn.q_norm": "self_attention.q_norm",
    "self_attn.k_norm": "self_attention.k_norm",
    "cross_attn.wq": "cross_attention.q",
    "cross_attn.proj": "cross_attention.proj",
    "cross_attn.q_norm": "cross_attention.q_norm",
    "cross_attn.k_norm": "cross_attention.k_norm",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
    "adaLN_modulation.1": "modulation",
}
_ENDINGS = ("weight", "bias")


def merge_block_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names of blocks to ours: queries, keys and values are joined, and so are the two halves of SwiGLU.

    An incomplete set of parts is left as it is, so that strict loading names what is missing.
    """
    merged: dict[str, Tensor] = {}
    used: set[str] = set()
    for ours, parts in _MERGED.values():
        for ending in _ENDINGS:
            first = f"{parts[0]}.{ending}"
            for key in state:
                if not (key == first or key.endswith("." + first)):
                    continue
                owner = key[: len(key) - len(first)]
                names = [f"{owner}{part}.{ending}" for part in parts]
                if all(name in state for name in names):
                    merged[f"{owner}{ours}.{ending}"] = torch.cat([state[name] for name in names])
                    used.update(names)
    for key, value in state.items():
        if key in used:
            continue
        stem, _, ending = key.rpartition(".")
        for theirs, ours in _RENAMED.items():
            if stem == theirs or stem.endswith("." + theirs):
                stem = stem[: len(stem) - len(theirs)] + ours
                break
        merged[f"{stem}.{ending}" if stem else ending] = value
    return merged


def split_block_keys(state: Mapping[str, Tensor], gated: bool = True) -> dict[str, Tensor]:
    """The inverse of `merge_block_keys`; `gated` says whether `fc1` holds two halves."""
    split: dict[str, Tensor] = {}
    backwards = {ours: theirs for theirs, ours in _RENAMED.items()}
    for key, value in state.items():
        stem, _, ending = key.rpartition(".")
        for ours, parts in _MERGED.values():
            whole = ours == "feed_forward.fc1" and not gated
            if not whole and (stem == ours or stem.endswith("." + ours)):
                owner = stem[: len(stem) - len(ours)]
                for part, piece in zip(parts, value.chunk(len(parts))):
                    split[f"{owner}{part}.{ending}"] = piece
                break
        else:
            for ours, theirs in backwards.items():
                if stem == ours or stem.endswith("." + ours):
                    stem = stem[: len(stem) - len(ours)] + theirs
                    break
            split[f"{stem}.{ending}" if stem else ending] = value
    return split
