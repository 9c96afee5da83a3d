"""A sampling run of xAR: what is computed once, and one call of the network.

Letters: B images, R rows fed at once (2 B with guidance), U distinct conditions, T tokens of an entity, N tokens of the
sequence, C channels of a token, D width, H heads, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from vistok.nn.flow import FlowSchedule

from .network import Block, Modulation, PackedFeedForward, norm_step, residual_step, split_modulation

if TYPE_CHECKING:
    from .model import XAR

__all__ = ["EntityRun"]

# A modulation table larger than this (bytes) is computed step by step: at such batches it costs next to nothing.
TABLE_BYTES = 1 << 29


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
        # GPUs want padded widths; on CPUs one product instead of two saves time at small widths.
        self.packed = [PackedFeedForward(block.mlp, 64 if weight.is_cuda else 1) for block in self.blocks]
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
        """[L, rows, 1, 6, D]; of a single distinct condition [L, 1, 1, 6, D]."""
        place = self.place[index]
        values = self._modulations(self.activated[place]) if self.table is None else self.table[:, place]
        if values.shape[1] > 1:
            values = values.index_select(1, self.rows[:rows])
        return values[:, :, None]

    def _run(self, x: Tensor, entity: int, index: int, *, remember: bool) -> Tensor:
        """Tokens [R, T, C] of an entity through both halves; outputs of the last block [R, T, D]."""
        model, (start, stop) = self.model, self.layout.starts[entity : entity + 2]
        modulations = [split_modulation(values) for values in self._modulation(index, len(x))]
        count = len(model.encoder_blocks)
        x = self._half(model.embed(x, start, stop), range(count), modulations, start, stop, remember)
        rest = range(count, len(self.blocks))
        return self._half(model.cross(x, start, stop), rest, modulations, start, stop, remember)

    def _half(
        self, x: Tensor, numbers: range, modulations: list[Modulation], start: int, stop: int, remember: bool
    ) -> Tensor:
        """The blocks of one half [R, T, D]; each residual sum is fused with the norm that follows it."""
        first = modulations[numbers[0]]
        normed = norm_step(x, first[2], first[4])
        for number in numbers:
            block, modulation = self.blocks[number], modulations[number]
            gate_attention, gate_mlp, _, scale_mlp, _, shift_mlp = modulation
            rotation = self.model.rotation(block.attn.head_dim)[start:stop]
            query, key, value = block.attn.project(normed, rotation)
            if remember and number + 1 == len(self.blocks):  # nobody reads what follows
                self._store(number, key, value, start, stop)
                return x
            attended = block.attn.merge(self._attend(number, query, key, value, start, stop, remember))
            x, normed = residual_step(x, attended, gate_attention, scale_mlp, shift_mlp)
            branch = self.packed[number](normed)
            if number == numbers[-1]:
                return torch.addcmul(x, gate_mlp, branch)
            following = modulations[number + 1]
            x, normed = residual_step(x, branch, gate_mlp, following[2], following[4])
        return x

    def _store(self, number: int, key: Tensor, value: Tensor, start: int, stop: int) -> None:
        self.keys[number][: len(key), :, start:stop] = key
        self.values[number][: len(value), :, start:stop] = value

    def _attend(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, start: int, stop: int, remember: bool
    ) -> Tensor:
        """To all remembered entities before `start` and to the entity itself: always a prefix, so never masked."""
        if self.keys and (start or remember):
            self._store(number, key, value, start, stop)
            rows = len(key)
            key, value = self.keys[number][:rows, :, :stop], self.values[number][:rows, :, :stop]
        return functional.scaled_dot_product_attention(query, key, value)

    def velocity(self, x: Tensor, entity: int, index: int, *, guided: bool = False) -> Tensor:
        """Velocities [R, T, C] of an entity's tokens [B, T, C]: conditional, and with guidance unconditional ones."""
        model = self.model
        if guided:
            x = x.repeat(2, 1, 1)
        return model.pred(model.decoder_norm(self._run(x, entity, index, remember=False)))

    def velocity_of(
        self, entity: int, schedule: FlowSchedule, guidance_scale: float
    ) -> Callable[[Tensor, int], Tensor]:
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
        self._run(x.repeat(len(self.rows) // self.batch, 1, 1), entity, 0, remember=True)
