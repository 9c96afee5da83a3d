"""Near-to-far decoding: a grid grows from its first corner, and a step writes all tokens at the same distance from it.

The grid has any number of axes: diagonals of an image, planes of a video. Each token is predicted by its neighbours one
step nearer to the corner, every axis through a head of its own; logits of several neighbours are averaged.

Source: He et al., "Neighboring Autoregressive Modeling for Efficient Visual Generation" (arXiv 2503.10696), section 3.
Letters: B samples, T condition tokens, A axes, N tokens of the grid, L = T + N positions, S tokens of a step,
D channels, V codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.nn import sampling
from vistok.nn.llama import LlamaNetwork, SamplingRun
from vistok.nn.sampling import Step, TokenChecks
from vistok.nn.text import TextCondition
from vistok.tokens import VisualTokens

__all__ = [
    "ProximityOrder",
    "grow",
    "grows_from_corner",
    "mixed_features",
    "proximity_mask",
    "proximity_order",
]

Order = TypeVar("Order", bound="ProximityOrder")


@dataclass(frozen=True)
class ProximityOrder:
    """The decoding order of a grid: by distance from the corner, raster order among equals. See `proximity_order`.

    Axes are listed from the last to the first (left, above, before), which is the order of the heads.

    Attributes:
        order: int64 [N], raster position of each decoding position.
        starts: decoding position at which each distance starts, and N at the end.
        neighbours: int64 [A, N], for each decoding position the decoding position of its neighbour nearer to the corner
            along each axis; -1 (the last condition position) where there is none.
        shares: float [A, N, 1], share of each neighbour's head: equal among those that exist; the first token is the
            mean of all heads at the condition.
        number: int64 [N], distance of each decoding position from the corner.
    """

    order: Tensor
    starts: tuple[int, ...]
    neighbours: Tensor
    shares: Tensor
    number: Tensor

    @classmethod
    def build(cls: type[Order], grid: Sequence[int], device: torch.device) -> Order:
        """The order of a grid, e.g. (rows, cols) or (frames, rows, cols)."""
        axes, size = len(grid), prod(grid)
        ranges = [torch.arange(side, device="cpu") for side in grid]
        cells = torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).view(size, axes)
        number = cells.sum(1)
        order = torch.argsort(number * size + torch.arange(size, device="cpu"))
        place = torch.argsort(order)
        cells, number = cells[order], number[order]
        neighbours = []
        for axis in reversed(range(axes)):
            nearer = place[(order - prod(grid[axis + 1 :])).clamp_min(0)]
            neighbours.append(torch.where(cells[:, axis] > 0, nearer, -1))
        stacked = torch.stack(neighbours)
        exist = (stacked >= 0).float()
        # Where no neighbour exists, in the corner, all heads speak.
        exist = torch.where(exist.sum(0) == 0, 1.0, exist)
        starts = tuple(int((number < distance).sum()) for distance in range(sum(grid) - axes + 2))
        shares = (exist / exist.sum(0))[..., None]
        return cls(order.to(device), starts, stacked.to(device), shares.to(device), number.to(device))

    def mask(self, num_condition_tokens: int = 0) -> Tensor:
        """Proximity-aware causal mask in decoding order, bool [L, L]: True where a query may see a key.

        Tokens of the grid see the whole condition and every token that is no farther from the corner; condition tokens
        are causal.
        """
        condition = torch.arange(-num_condition_tokens, 0, device=self.number.device)
        rank = torch.cat([condition, self.number])
        return rank[:, None] >= rank


@lru_cache(maxsize=16)
def proximity_order(grid: tuple[int, ...], device: torch.device) -> ProximityOrder:
    """The decoding order of a grid; the last few are kept."""
    with torch.inference_mode(False):  # what is made while sampling must serve training, too
        return ProximityOrder.build(grid, device)


@lru_cache(maxsize=16)
def proximity_mask(grid: tuple[int, ...], num_condition_tokens: int, device: torch.device) -> Tensor:
    """`ProximityOrder.mask` of a grid; the last few are kept."""
    with torch.inference_mode(False):
        return proximity_order(grid, device).mask(num_condition_tokens)


def grows_from_corner(known: Tensor, grid: Sequence[int]) -> bool:
    """Whether known cells (bool [N], raster order) contain the nearer neighbours of each of their cells."""
    cells = known.view(*grid)
    for axis, side in enumerate(grid):
        nearer, farther = cells.narrow(axis, 0, side - 1), cells.narrow(axis, 1, side - 1)
        if bool((farther & ~nearer).any()):
            return False
    return True


def mixed_features(states: Sequence[Tensor], order: ProximityOrder, start: int, stop: int, offset: int) -> Tensor:
    """What all heads, side by side, make the mixed logits of some tokens of: [B, S, A D].

    The heads are linear, so mixing their inputs equals mixing their logits: one product, over the rows that are needed.

    Args:
        states: input [B, L', D] of each head.
        order: the decoding order.
        start, stop: decoding positions of the tokens.
        offset: place in the states of decoding position 0.
    """
    parts = []
    for state, neighbour, share in zip(states, order.neighbours, order.shares, strict=True):
        rows = (neighbour[start:stop] + offset).clamp_min(0)
        parts.append(state.index_select(1, rows) * share[start:stop].to(state.dtype))
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def grow(
    model: LlamaNetwork,
    heads: Sequence[nn.Linear],
    condition: Tensor | TextCondition,
    ids: Tensor,
    known: Tensor,
    grid: tuple[int, ...],
    positions: Tensor,
    guidance_scale: float,
    guidance_interval: int | None,
    choice: Mapping[str, Any],
) -> Iterator[Step]:
    """Write a grid step by step. What is cached in decoding order is exactly what may be seen, so no mask exists.

    Args:
        model: its `hidden_states` give the input of each head.
        heads: output heads, from the last axis to the first.
        condition: checked condition of B samples.
        ids: int64 [B, N] in raster order, 0 where unknown; written in place.
        known: bool [N] on the CPU, a region that `grows_from_corner`.
        grid: sides of the grid.
        positions: [N, ...] in raster order, what `hidden_states` takes.
        guidance_scale: up to 1 is no guidance.
        guidance_interval: guidance ends before the first step that more than this many tokens precede.
        choice: settings of `sampling.choose_tokens`.

    Yields:
        A `Step` for every distance that had tokens to be written.
    """
    if bool(known.all()):
        return
    (batch, size), device = ids.shape, ids.device
    order, on_host = proximity_order(grid, device), proximity_order(grid, known.device)
    starts, last = order.starts, len(order.starts) - 2
    # From the first distance with an unknown token on, every one has one.
    first = int(on_host.number[~known[on_host.order]].min())
    run = SamplingRun(model, condition, size, guidance_scale)
    checks = TokenChecks(device)
    positions = positions[order.order]
    head = torch.cat([layer.weight for layer in heads], dim=1).float()
    ends = size if guidance_interval is None else guidance_interval + 1  # no guidance for a start from here on
    layout = (grid[0], grid[1]) if len(grid) == 2 else None
    if first:
        stop = starts[first]
        if stop >= ends:
            run.end_guidance()
        run.feed(ids[:, order.order[:stop]], positions[:stop], order.mask()[:stop, :stop])
        run.hidden = tuple(state[:, starts[first - 1] :] for state in run.hidden)
    decided = known.to(device)
    for distance, (start, stop) in enumerate(pairwise(starts[first:]), first):
        # The neighbours lie one step back, which is all that the hidden states hold (or the condition).
        offset = -starts[distance - 1] if distance else 1
        features = mixed_features([run.guide(state) for state in run.hidden], order, start, stop, offset)
        logits = functional.linear(features, head)
        chosen = checks(sampling.choose_tokens(logits, **choice), last=distance == last)
        places, on_host_places = order.order[start:stop], on_host.order[start:stop]
        chosen = torch.where(decided[places], ids[:, places], chosen)
        ids[:, places] = chosen
        decided = decided.index_fill(0, places, True)
        tokens = VisualTokens(ids=ids.clone(), grid=layout, mask=decided.repeat(batch, 1))
        yield Step(distance - first, last + 1 - first, tokens, on_host_places[~known[on_host_places]])
        if distance < last:
            if stop >= ends:
                run.end_guidance()
            run.feed(chosen, positions[start:stop])
