"""Near-to-far order on grids of any number of axes, against its definition."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch

from vistok.nn.proximity import grows_from_corner, mixed_features, proximity_mask, proximity_order

CPU = torch.device("cpu")
GRIDS = [(1, 1, 1), (1, 3, 2), (3, 1, 1), (2, 3, 4), (4, 2, 3), (3, 5), (5,)]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_decoding_order_against_its_definition(grid: tuple[int, ...]) -> None:
    axes = len(grid)
    raster = list(itertools.product(*map(range, grid)))
    cells = sorted(raster, key=lambda cell: (sum(cell), cell))
    order = proximity_order(grid, CPU)
    assert order.order.tolist() == [raster.index(cell) for cell in cells]
    for place, cell in enumerate(cells):
        existing = sum(side > 0 for side in cell)
        for head, axis in enumerate(reversed(range(axes))):
            neighbour = int(order.neighbours[head, place])
            nearer = tuple(side - (index == axis) for index, side in enumerate(cell))
            assert (cells[neighbour] == nearer) if cell[axis] else neighbour == -1
            share = 1 / axes if existing == 0 else (cell[axis] > 0) / existing
            assert float(order.shares[head, place]) == pytest.approx(share)
        assert order.starts[sum(cell)] <= place < order.starts[sum(cell) + 1]
    assert order.starts[-1] == len(cells)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_mask_against_its_definition(grid: tuple[int, ...]) -> None:
    cells = sorted(itertools.product(*map(range, grid)), key=lambda cell: (sum(cell), cell))
    mask = proximity_mask(grid, 2, CPU)
    assert mask[:2].tolist() == [[True, False, *[False] * len(cells)], [True, True, *[False] * len(cells)]]
    assert bool(mask[2:, :2].all())
    for query, key in itertools.product(range(len(cells)), repeat=2):
        assert bool(mask[2 + query, 2 + key]) == (sum(cells[key]) <= sum(cells[query]))


@pytest.mark.parametrize("grid", GRIDS)
def test_regions_that_grow_from_the_corner(grid: tuple[int, ...]) -> None:
    cells = list(itertools.product(*map(range, grid)))
    generator = torch.Generator().manual_seed(0)
    verdicts = set()
    for _ in range(40):
        # Closed regions are unions of boxes at the corner; flipping one cell opens most of them.
        peaks = [cells[int(index)] for index in torch.randint(len(cells), (2,), generator=generator)]
        known = {cell for cell in cells if any(all(a <= b for a, b in zip(cell, peak)) for peak in peaks)}
        known ^= {cells[int(torch.randint(len(cells), (1,), generator=generator))]}
        closed = all(
            tuple(side - (index == axis) for index, side in enumerate(cell)) in known
            for cell in known
            for axis in range(len(grid))
            if cell[axis]
        )
        assert grows_from_corner(torch.tensor([cell in known for cell in cells]), grid) == closed
        verdicts.add(closed)
    assert verdicts == ({True} if prod(grid) == 1 else {True, False})


def test_mixed_features_give_mixed_logits() -> None:
    grid, size = (2, 3, 4), 24
    order = proximity_order(grid, CPU)
    states = [torch.randn(2, 1 + size, 8) for _ in grid]
    weights = [torch.randn(5, 8) for _ in grid]
    for plane, (start, stop) in enumerate(itertools.pairwise(order.starts)):
        logits = mixed_features(states, order, start, stop, 1) @ torch.cat(weights, dim=1).T
        assert logits.shape == (2, stop - start, 5)
        for place in range(start, stop):
            heard = [
                state[:, 1 + int(neighbour[place])] @ weight.T
                for state, neighbour, weight in zip(states, order.neighbours, weights)
                if plane == 0 or int(neighbour[place]) >= 0
            ]
            torch.testing.assert_close(logits[:, place - start], torch.stack(heard).mean(0))
