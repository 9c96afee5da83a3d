"""The convolutional auto-encoder that VQGAN-style and KL tokenizers share (Esser et al., arXiv 2012.09841).

Blocks: residual block, single-head pixel attention, strided downsampling, nearest upsampling; then an encoder and a
decoder made of them. All of it works in channels-last memory, which is what fast convolutions want on CPUs and GPUs.

Shape letters: B images, C channels, H, W pixels of the feature map, N = H * W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "AttentionBlock",
    "ConvDecoder",
    "ConvEncoder",
    "Downsample",
    "ResnetBlock",
    "Upsample",
    "group_norm",
    "merge_attention_keys",
    "run_tiled",
    "split_attention_keys",
]

NORM_GROUPS = 32
QKV = ("q", "k", "v")


class _GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, which refuses a single value a group only for batches of one; here it is just the bias."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(channels: int, groups: int = NORM_GROUPS) -> nn.GroupNorm:
    """Group normalisation with eps 1e-6; `channels` must be a multiple of `groups`."""
    return _GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, plus a skip that goes through a 1x1 convolution where the width changes.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        dropout: probability before the second convolution.
        groups: groups of the normalisation.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, groups: int = NORM_GROUPS) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels, with a residual connection; quadratic in their number."""

    def __init__(self, channels: int, groups: int = NORM_GROUPS) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        rows, cols = x.shape[-2:]
        # In channels-last memory this is a view: [B, 1, N, 3C].
        pixels = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = pixels.chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.squeeze(1).transpose(1, 2).unflatten(2, (rows, cols)))


class Downsample(nn.Module):
    """Halve both sides: zeros on the right and at the bottom only, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides: nearest neighbour, then a 3x3 convolution.

    On the CPU both become one transposed convolution with a 4x4 kernel: 16 instead of 36 multiplications a result, and
    no enlarged copy of the input (1.1 to 1.9 times faster at the sizes of the VQ decoders). Folding the kernel costs as
    much as a small convolution, so few pixels go the plain way.
    """

    FOLD_FROM = 256  # pixels of the batch

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        if x.device.type == "cpu" and x.numel() // x.shape[1] >= self.FOLD_FROM:
            return F.conv_transpose2d(x, self.folded_weight(), self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def folded_weight(self) -> Tensor:
        """Kernel [C_in, C_out, 4, 4] of the transposed convolution: the flipped kernel widened by a 2x2 box."""
        padded = F.pad(self.conv.weight.float().flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
        rows = padded[:, :, 1:] + padded[:, :, :-1]
        return (rows[..., 1:] + rows[..., :-1]).to(self.conv.weight.dtype)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if asked, then an optional change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        *,
        attention: bool,
        dropout: float,
        groups: int,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.blocks = nn.ModuleList(ResnetBlock(a, b, dropout, groups) for a, b in pairwise(widths))
        self.attentions = nn.ModuleList(
            AttentionBlock(out_channels, groups) for _ in range(num_blocks if attention else 0)
        )
        self.resample = resample

    def stages(self) -> Iterable[nn.Module]:
        """The modules in the order in which they run."""
        for index, block in enumerate(self.blocks):
            yield block
            if len(self.attentions):
                yield self.attentions[index]
        if self.resample is not None:
            yield self.resample


class _Stack(nn.Module):
    """What encoder and decoder have in common: running their stages, with gradient checkpointing if enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # switched by diffusers' enable_gradient_checkpointing()

    def run(self, stages: Iterable[nn.Module], x: Tensor) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for stage in stages:
            x = self._gradient_checkpointing_func(stage, x) if recompute else stage(x)
        return x


def _middle(channels: int, dropout: float, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResnetBlock(channels, channels, dropout, groups),
            AttentionBlock(channels, groups),
            ResnetBlock(channels, channels, dropout, groups),
        ]
    )


class ConvEncoder(_Stack):
    """Images to a feature map 2^(levels - 1) times smaller.

    Args:
        in_channels: channels of the images.
        base_channels: width that the multipliers refer to; a multiple of `norm_groups`.
        multipliers: width of each level, finest first.
        num_res_blocks: residual blocks a level.
        out_channels: channels of the result.
        attention_levels: levels whose residual blocks are followed by attention.
        dropout: dropout of the residual blocks.
        norm_groups: groups of the normalisations.
    """

    def __init__(
        self,
        in_channels: int,
        base_channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        out_channels: int,
        *,
        attention_levels: Iterable[int] = (),
        dropout: float = 0.0,
        norm_groups: int = NORM_GROUPS,
    ) -> None:
        super().__init__()
        attention, last = set(attention_levels), len(multipliers) - 1
        widths = [base_channels * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                widths[i - 1] if i else base_channels,
                widths[i],
                num_res_blocks,
                attention=i in attention,
                dropout=dropout,
                groups=norm_groups,
                resample=Downsample(widths[i]) if i != last else None,
            )
            for i in range(len(widths))
        )
        self.middle = _middle(widths[-1], dropout, norm_groups)
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, out_channels, H / f, W / f]."""
        h = self.conv_in(images.contiguous(memory_format=torch.channels_last))
        for level in self.levels:
            h = self.run(level.stages(), h)
        h = self.run(self.middle, h)
        return self.conv_out(F.silu(self.norm_out(h)))


class ConvDecoder(_Stack):
    """A feature map back to images; each level has one residual block more than the encoder's.

    Args:
        in_channels: channels of the feature map.
        base_channels: width that the multipliers refer to; a multiple of `norm_groups`.
        multipliers: width of each level, finest first (the decoder starts at the last).
        num_res_blocks: residual blocks a level, to which one is added.
        out_channels: channels of the images.
        attention_levels: levels (numbered as in `multipliers`) whose residual blocks are followed by attention.
        dropout: dropout of the residual blocks.
        norm_groups: groups of the normalisations.
    """

    def __init__(
        self,
        in_channels: int,
        base_channels: int,
        multipliers: Sequence[int],
        num_res_blocks: int,
        out_channels: int,
        *,
        attention_levels: Iterable[int] = (),
        dropout: float = 0.0,
        norm_groups: int = NORM_GROUPS,
    ) -> None:
        super().__init__()
        attention, last = set(attention_levels), len(multipliers) - 1
        widths = [base_channels * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(in_channels, widths[-1], 3, padding=1)
        self.middle = _middle(widths[-1], dropout, norm_groups)
        # Coarsest first, as they run.
        self.levels = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                widths[i],
                num_res_blocks + 1,
                attention=i in attention,
                dropout=dropout,
                groups=norm_groups,
                resample=Upsample(widths[i]) if i else None,
            )
            for i in reversed(range(len(widths)))
        )
        self.norm_out = group_norm(widths[0], norm_groups)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, out_channels, h * f, w * f]."""
        h = self.conv_in(features.contiguous(memory_format=torch.channels_last))
        h = self.run(self.middle, h)
        for level in self.levels:
            h = self.run(level.stages(), h)
        return self.conv_out(F.silu(self.norm_out(h)))


def run_tiled(
    run: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, factor: int, *, enlarge: bool
) -> Tensor:
    """Apply `run` to overlapping square tiles of x [B, C, H, W] and blend the results.

    Args:
        run: enlarges or shrinks both sides by `factor`.
        x: input.
        tile: side of a tile in pixels of x.
        overlap: pixels of x that neighbours share.
        factor: ratio of sides.
        enlarge: whether `run` enlarges.
    """

    def starts(length: int) -> list[int]:
        if length <= tile:
            return [0]
        return [*range(0, length - tile, tile - overlap), length - tile]

    def scaled(length: int) -> int:
        return length * factor if enlarge else length // factor

    def ramp(length: int) -> Tensor:
        position = torch.arange(length, device=x.device, dtype=torch.float32)
        return torch.minimum(position, length - 1 - position).add(1).clamp(max=scaled(overlap) + 1)

    height, width = x.shape[-2:]
    total: Tensor | None = None
    weights = torch.zeros(scaled(height), scaled(width), device=x.device)
    for top in starts(height):
        for left in starts(width):
            part = run(x[..., top : top + tile, left : left + tile])
            weight = ramp(part.shape[-2])[:, None] * ramp(part.shape[-1])
            if total is None:
                total = torch.zeros(*part.shape[:2], *weights.shape, device=x.device)
            y, z = scaled(top), scaled(left)
            total[..., y : y + part.shape[-2], z : z + part.shape[-1]] += part * weight
            weights[y : y + part.shape[-2], z : z + part.shape[-1]] += weight
            dtype = part.dtype
    assert total is not None
    return (total / weights).to(dtype)


def merge_attention_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    """Join separate `X.q`, `X.k`, `X.v` convolutions of `AttentionBlock`s into `X.qkv`; other keys pass unchanged.

    An incomplete triple is left as it is, so that strict loading names what is missing.
    """
    merged: dict[str, Any] = {}
    for key, value in state.items():
        owner, _, ending = key.rpartition(".q.")
        parts = [f"{owner}.{name}.{ending}" for name in QKV]
        if owner and all(part in state for part in parts):
            merged[f"{owner}.qkv.{ending}"] = torch.cat([state[part] for part in parts])
        elif not _belongs_to_triple(key, state):
            merged[key] = value
    return merged


def _belongs_to_triple(key: str, state: Mapping[str, Any]) -> bool:
    for name in QKV:
        owner, found, ending = key.rpartition(f".{name}.")
        if found:
            return all(f"{owner}.{other}.{ending}" in state for other in QKV)
    return False


def split_attention_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `merge_attention_keys`."""
    split: dict[str, Tensor] = {}
    for key, value in state.items():
        owner, found, ending = key.rpartition(".qkv.")
        if not found:
            split[key] = value
            continue
        for name, part in zip(QKV, value.chunk(3)):
            split[f"{owner}.{name}.{ending}"] = part
    return split
