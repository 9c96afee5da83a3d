"""FlexTok's two transformers: registers that read an image, and a flow decoder that is conditioned on them.

Two facts make both cheaper than a sequence of all patches and all registers under a mask. In the encoder patches never
see registers and a register sees only earlier ones, so the first k registers need nothing of the others. In the decoder
all dropped registers of a sample are one and the same vector without a position, so they stay identical through every
block: one of them stands for all, with the logarithm of their number added to its attention scores.

Letters: B samples, N registers, k kept registers, R register rows of a group, P patches, D channels, Z latent channels,
h, w sides of the latents, C code channels, S moments, E segments with a modulation of their own, T all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.nn.attention import attention

from .blocks import Attend, Block, Modulate, Norm, PatchEmbedding, PositionTable, TimeEmbedding, unpatchify

__all__ = ["FlowDecoder", "RegisterEncoder", "Registers", "plan_groups"]

MAX_GROUPS = 4


@lru_cache(maxsize=16)
def _register_mask(patches: int, registers: int, device: torch.device) -> Tensor:
    """bool [k, P + k]: register r sees all patches and the registers up to itself."""
    with torch.inference_mode(False):  # what is made while encoding must serve training, too
        return torch.ones(registers, patches + registers, dtype=torch.bool, device=device).tril(patches)


class RegisterEncoder(nn.Module):
    """Latents and registers through a transformer; the registers become codes before quantisation.

    Args:
        latent_channels: Z.
        patch_size: side of a patch.
        grid: (rows, columns) of patches that the position table covers.
        size: channels D.
        depth: blocks.
        head_dim: channels of a head.
        num_registers: N.
        code_channels: C.
        positions, position_scaling: see `PositionTable`.
        register_order: `"nested"` takes the first k registers, `"avg_pool"` pools all of them to k.
        block: further arguments of `Block`.
    """

    def __init__(
        self,
        latent_channels: int,
        patch_size: int,
        grid: tuple[int, int],
        size: int,
        depth: int,
        head_dim: int,
        num_registers: int,
        code_channels: int,
        *,
        positions: str,
        position_scaling: str,
        register_order: str,
        **block: Any,
    ) -> None:
        super().__init__()
        self.register_order, self.gradient_checkpointing = register_order, False
        self.patch_embedding = PatchEmbedding(latent_channels, patch_size, size)
        self.positions = PositionTable(size, grid, positions, position_scaling)
        self.registers = nn.Parameter(torch.empty(num_registers, size))
        nn.init.trunc_normal_(self.registers, std=0.02)
        self.blocks = nn.ModuleList(Block(size, head_dim, **block) for _ in range(depth))
        self.norm = Norm(size)
        self.head = nn.Linear(size, code_channels)

    def initial_registers(self, count: int) -> Tensor:
        """[count, D]."""
        if self.register_order == "nested" or count == len(self.registers):
            return self.registers[:count]
        return functional.adaptive_avg_pool1d(self.registers.t(), count).t()

    def embed(self, latents: Tensor) -> Tensor:
        """Latents [B, Z, h, w] as patches with positions [B, h / p, w / p, D].

        Under autocast the sum is in the positions' type, float32, and so is the residual stream that begins here.
        """
        patches = self.patch_embedding(latents)
        return patches + self.positions(patches.shape[1:3]).permute(0, 2, 3, 1)

    def features(self, latents: Tensor, count: int) -> Tensor:
        """The first `count` registers after the last block, [B, count, D]."""
        patches = self.embed(latents).flatten(1, 2)
        total = patches.shape[1]
        registers = self.initial_registers(count).to(patches.dtype)
        x = torch.cat([patches, registers.expand(len(patches), -1, -1)], dim=1)
        mask = _register_mask(total, count, x.device)

        def attend_registers(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            query, key, value = (part.transpose(1, 2) for part in (query[:, total:], key, value))
            return attention(query, key, value, mask, scale=scale).transpose(1, 2)

        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            own_query, own_key, own_value = (part[:, :total].transpose(1, 2) for part in (query, key, value))
            seen = attention(own_query, own_key, own_value, scale=scale).transpose(1, 2)
            return torch.cat([seen, attend_registers(query, key, value, scale)], dim=1)

        for block in self.blocks[:-1]:
            x = _run(self, block, x, attend)
        # Of the last block only the registers are read.
        return _run(self, self.blocks[-1], x, attend_registers, None, None, (slice(None), slice(total, None)))

    def forward(self, latents: Tensor, count: int) -> Tensor:
        """Codes before quantisation [B, count, C] of the first `count` registers."""
        return self.head(self.norm(self.features(latents, count)))


def _run(owner: Any, block: Block, *arguments: Any) -> Tensor:
    """A block, recomputed in the backward pass if gradient checkpointing is on."""
    if owner.gradient_checkpointing and owner.training and torch.is_grad_enabled():
        return owner._gradient_checkpointing_func(block, *arguments)
    return block(*arguments)


def plan_groups(lengths: Sequence[int], max_groups: int = MAX_GROUPS) -> list[list[int]]:
    """Samples of equal or similar length together: at most `max_groups` lists of indices, shortest samples first.

    Neighbouring groups whose union wastes the fewest padded rows are joined.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    groups: list[list[int]] = []
    for index in order:
        if groups and lengths[groups[-1][0]] == lengths[index]:
            groups[-1].append(index)
        else:
            groups.append([index])
    while len(groups) > max_groups:
        waste = [len(low) * (lengths[high[-1]] - lengths[low[-1]]) for low, high in pairwise(groups)]
        at = waste.index(min(waste))
        groups[at : at + 2] = [groups[at] + groups[at + 1]]
    return groups


@dataclass(frozen=True)
class _Group:
    """Register rows [Bg, R, D] of some samples, and what is added to their attention scores, [Bg or 1, R] or None."""

    tokens: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Registers:
    """What conditions a decoder: the registers of a batch, grouped by length. It does not change between steps.

    Attributes:
        groups: groups of samples.
        order: int64 [B], the sample of each row of the groups, one after the other.
    """

    groups: tuple[_Group, ...]
    order: Tensor

    def __len__(self) -> int:
        """Samples, B."""
        return len(self.order)

    def __add__(self, other: Registers) -> Registers:
        """Both in one batch; the samples of `other` come second."""
        return Registers(self.groups + other.groups, torch.cat([self.order, other.order + len(self)]))


class _Rows(Modulate):
    """All rows [T, D] of a batch: the patches of every sample in group order, then the registers of each group.

    Knows where each segment lies, which modulation is its own, and which rows attend to which.
    """

    def __init__(self, registers: Registers, patches: int, shared: bool, expansion: int) -> None:
        self.batch, self.patches = len(registers), patches
        self.split = self.batch * patches
        self.groups = registers.groups
        self.biases = [
            None if group.bias is None else functional.pad(group.bias, (patches, 0))[:, None, None]
            for group in registers.groups
        ]
        # (rows, view of them, segment, samples): one time for all samples needs no view by sample.
        last = expansion - 1
        total = sum(group.tokens.shape[0] * group.tokens.shape[1] for group in self.groups)
        self.segments: list[tuple[slice, tuple[int, ...], int, slice]] = []
        if shared:
            self.segments = [(slice(0, self.split), (-1,), 0, slice(None))]
            if last == 0:
                self.segments = [(slice(0, self.split + total), (-1,), 0, slice(None))]
            else:
                self.segments.append((slice(self.split, self.split + total), (-1,), last, slice(None)))
            return
        self.segments = [(slice(0, self.split), (self.batch, patches), 0, slice(None))]
        for samples, rows, group in self._places():
            self.segments.append((rows, (len(group.tokens), group.tokens.shape[1]), last, samples))

    def _places(self) -> Iterator[tuple[slice, slice, _Group]]:
        """(samples in group order, register rows, group) of each group."""
        sample, row = 0, self.split
        for group in self.groups:
            count, registers = group.tokens.shape[:2]
            yield slice(sample, sample + count), slice(row, row + count * registers), group
            sample, row = sample + count, row + count * registers

    def _parts(self, x: Tensor, values: Sequence[Tensor]) -> Iterator[tuple[slice, tuple[int, ...], list[Tensor]]]:
        for rows, view, segment, samples in self.segments:
            if rows.start >= len(x):  # only the patches are left
                break
            picked = [value[samples, segment] for value in values]
            yield rows, view, [value[:, None] for value in picked] if len(view) == 2 else picked

    def scale(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x * (1 + scale) + shift, each segment with its own."""
        parts = [
            torch.addcmul(own[0], x[rows].unflatten(0, view), 1 + own[1]).flatten(0, -2)
            for rows, view, own in self._parts(x, (shift, scale))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def add(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        """x + gate * branch, each segment with its own."""
        parts = [
            torch.addcmul(x[rows].unflatten(0, view), branch[rows].unflatten(0, view), own[0]).flatten(0, -2)
            for rows, view, own in self._parts(x, (gate,))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def attention(self, patches_only: bool) -> Attend:
        """Each sample attends to its own patches and registers; with `patches_only` the registers ask nothing."""

        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            of_patches, of_registers = [], []
            for (samples, rows, group), bias in zip(self._places(), self.biases, strict=True):
                own = slice(samples.start * self.patches, samples.stop * self.patches)
                count = len(group.tokens)

                def joined(x: Tensor, own: slice = own, rows: slice = rows, count: int = count) -> Tensor:
                    pieces = [x[own].unflatten(0, (count, -1)), x[rows].unflatten(0, (count, -1))]
                    return torch.cat(pieces, dim=1).transpose(1, 2)

                asked = query[own].unflatten(0, (count, -1)).transpose(1, 2) if patches_only else joined(query)
                attended = attention(
                    asked,
                    joined(key),
                    joined(value),
                    None if bias is None else bias.to(asked.dtype),
                    scale=scale,
                ).transpose(1, 2)
                of_patches.append(attended[:, : self.patches].flatten(0, 1))
                if not patches_only:
                    of_registers.append(attended[:, self.patches :].flatten(0, 1))
            return torch.cat(of_patches + of_registers)

        return attend


class FlowDecoder(nn.Module):
    """Velocity of noisy latents, conditioned on registers.

    Args:
        latent_channels: Z.
        patch_size: side of a patch.
        grid: (rows, columns) of patches that the position table covers.
        size: channels D.
        depth: blocks.
        head_dim: channels of a head.
        num_registers: N.
        code_channels: C.
        expansion: E; 2 modulates patches and registers separately, 1 alike.
        frequency_size, max_timestep: see `TimeEmbedding`.
        positions, register_positions, position_scaling: see `PositionTable`.
        block: further arguments of `Block`.
    """

    def __init__(
        self,
        latent_channels: int,
        patch_size: int,
        grid: tuple[int, int],
        size: int,
        depth: int,
        head_dim: int,
        num_registers: int,
        code_channels: int,
        *,
        expansion: int,
        frequency_size: int,
        max_timestep: float,
        positions: str,
        register_positions: str,
        position_scaling: str,
        **block: Any,
    ) -> None:
        super().__init__()
        self.num_registers, self.patch_size, self.expansion = num_registers, patch_size, expansion
        self.gradient_checkpointing = False
        self.code_embedding = nn.Linear(code_channels, size)
        self.register_positions = PositionTable(size, (num_registers,), register_positions)
        self.mask_token, self.null_token = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        for token in (self.mask_token, self.null_token):
            nn.init.trunc_normal_(token, std=0.02)
        self.patch_embedding = PatchEmbedding(latent_channels, patch_size, size)
        self.positions = PositionTable(size, grid, positions, position_scaling)
        self.time_embedding = TimeEmbedding(size, frequency_size, max_timestep)
        self.blocks = nn.ModuleList(Block(size, head_dim, expansion=expansion, **block) for _ in range(depth))
        self.norm = Norm(size)
        self.head_modulation = nn.Linear(size, 2 * size)
        self.head = nn.Linear(size, latent_channels * patch_size**2)
        self._schedule: tuple[Any, list[Tensor], tuple[list[Tensor], Tensor]] | None = None

    # ------------------------------------------------------------------------------------------------- the condition
    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes [B, k, C] of the first k registers as rows with positions [B, k, D]."""
        rows = self.code_embedding(codes.to(self.code_embedding.weight.dtype))
        return rows + self.register_positions.full()[:, :, : rows.shape[1]].transpose(1, 2)

    def registers(self, codes: Tensor, lengths: Sequence[int], dropped: Sequence[bool] | None = None) -> Registers:
        """The condition of B samples.

        Args:
            codes: float [B, k, C] with k at least the greatest length that counts.
            lengths: how many registers each sample keeps; the others become the mask token.
            dropped: samples whose registers all become the null token.
        """
        total, device = self.num_registers, codes.device
        gone = [False] * len(lengths) if dropped is None else [bool(one) for one in dropped]
        kept = [0 if null else min(int(length), total) for length, null in zip(lengths, gone, strict=True)]
        rows = self.embed_codes(codes[:, : max(kept, default=0)])
        groups, order = [], []
        for members in plan_groups(kept):
            longest = max(kept[member] for member in members)
            index = torch.tensor(members, device=device)
            tokens = rows[:, :longest].index_select(0, index)
            bias = None
            if min(kept[member] for member in members) < total:
                null = torch.tensor([gone[member] for member in members], device=device)
                filler = torch.where(null[:, None, None], self.null_token, self.mask_token)
                tokens = torch.cat([filler, tokens], dim=1)
                bias = _group_bias([kept[member] for member in members], longest, total)
                bias = None if bias is None else bias.to(device)
            groups.append(_Group(tokens, bias))
            order += members
        return Registers(tuple(groups), torch.tensor(order, device=device))

    def null_registers(self, batch: int) -> Registers:
        """The unconditional condition: one row that stands for all N null tokens."""
        token = self.null_token.expand(batch, 1, -1)
        bias = _group_bias([0], 0, self.num_registers)
        order = torch.arange(batch, device=token.device)
        return Registers((_Group(token, None if bias is None else bias.to(token.device)),), order)

    # ---------------------------------------------------------------------------------------------------- the network
    def modulations(self, t: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of moments t [S]: for each block [S, E, 6, D], and for the head [S, 2, D]."""
        activated = functional.silu(self.time_embedding(t))
        head = self.head_modulation(activated).unflatten(1, (2, -1))
        return [block.modulations(activated) for block in self.blocks], head

    def schedule(self, steps: int) -> tuple[list[Tensor], Tensor]:
        """Modulations of every block at the T moments of a run; kept until a weight or the number of steps changes."""
        device = self.mask_token.device
        parts = [self.time_embedding, self.head_modulation]
        parts += [block.modulation for block in self.blocks]
        sources = [parameter for part in parts for parameter in part.parameters()]
        moments = torch.tensor([(steps - step) / steps for step in range(steps)], device=device)
        if any(one.is_inference() for one in sources):  # such weights do not tell when they change
            return self.modulations(moments)
        stamp: list[Any] = [(one.data_ptr(), one._version, one.dtype, one.device) for one in sources]
        key = (steps, torch.is_autocast_enabled(device.type), stamp)
        if self._schedule is not None and self._schedule[0] == key:
            return self._schedule[2]
        found = self.modulations(moments)
        # The weights are held, so that no others can take their addresses and pass for them.
        self._schedule = (key, [one.detach() for one in sources], found)
        return found

    def embed(self, x_t: Tensor) -> Tensor:
        """Noisy latents [B, Z, h, w] as patches with positions [B, h / p, w / p, D]."""
        patches = self.patch_embedding(x_t)
        return patches + self.positions(patches.shape[1:3]).permute(0, 2, 3, 1)

    def forward(
        self,
        x_t: Tensor,
        registers: Registers,
        modulations: tuple[list[Tensor], Tensor],
        observe: Callable[[int, Tensor, _Rows], None] | None = None,
    ) -> Tensor:
        """Velocity float32 [B, Z, h, w] of each sample of the condition.

        Args:
            x_t: noisy latents [B', Z, h, w]; B is a multiple of B', and samples share them in turn (guidance).
            registers: the condition of B samples.
            modulations: of `modulations`, of one moment or of one a sample.
            observe: is given the index of each block, the rows after it and their layout (for REPA and tests). Without
                it, the last block leaves the registers out, because nothing reads them.
        """
        blocks, head = modulations
        shared = len(head) == 1
        if not shared:
            blocks = [block.index_select(0, registers.order) for block in blocks]
        embedded = self.embed(x_t)
        height, width = embedded.shape[1:3]
        rows = _Rows(registers, height * width, shared, self.expansion)
        patches = embedded.flatten(1, 2).index_select(0, registers.order % len(x_t)).flatten(0, 1)
        x = torch.cat([patches, *(group.tokens.to(patches.dtype).flatten(0, 1) for group in registers.groups)])
        attend = rows.attention(patches_only=False)
        for index, (block, modulation) in enumerate(zip(self.blocks, blocks, strict=True)):
            if index + 1 == len(self.blocks) and observe is None:
                only = (slice(0, rows.split),)
                x = _run(self, block, x, rows.attention(patches_only=True), modulation, rows, only)
            else:
                x = _run(self, block, x, attend, modulation, rows)
            if observe is not None:
                observe(index, x, rows)
        inverse = torch.argsort(registers.order)
        patches = x[: rows.split].unflatten(0, (rows.batch, -1)).index_select(0, inverse)
        shift, scale = head.unbind(1)
        patches = torch.addcmul(shift[:, None], self.norm(patches), 1 + scale[:, None])
        return unpatchify(self.head(patches).float().unflatten(1, (height, width)), self.patch_size)


def _group_bias(kept: Sequence[int], longest: int, total: int) -> Tensor | None:
    """Score biases [Bg or 1, 1 + longest]: the filler stands for all dropped registers, padding is never seen."""
    never = -math.inf
    distinct = [kept[0]] if len(set(kept)) == 1 else kept
    rows = []
    for count in distinct:
        filler = math.log(total - count) if count < total else never
        rows.append([filler] + [0.0] * count + [never] * (longest - count))
    if all(value == 0.0 for row in rows for value in row):
        return None
    return torch.tensor(rows, dtype=torch.float32)
