"""NAR alone: diagonals."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.generators.models import build, condition_for, seeds
from vistok.errors import InvalidInputError
from vistok.generators.nar import NAR, diagonals_of
from vistok.tokens import VisualTokens

CPU = torch.device("cpu")


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 5), (5, 3), (4, 4)])
def test_the_decoding_order_against_its_definition(grid: tuple[int, int]) -> None:
    rows, cols = grid
    cells = sorted(itertools.product(range(rows), range(cols)), key=lambda cell: (sum(cell), cell[0]))
    diagonals = diagonals_of(grid, CPU)
    assert diagonals.order.tolist() == [row * cols + col for row, col in cells]
    for place, (row, col) in enumerate(cells):
        left, above = int(diagonals.left[place]), int(diagonals.above[place])
        assert (cells[left] == (row, col - 1)) if col else left == -1
        assert (cells[above] == (row - 1, col)) if row else above == -1
        shares = float(diagonals.left_weight[place]), float(diagonals.above_weight[place])
        assert shares == ((0.5, 0.5) if (row > 0) == (col > 0) else (0.0, 1.0) if row else (1.0, 0.0))
        assert diagonals.starts[row + col] <= place < diagonals.starts[row + col + 1]
    mask = diagonals.mask(2)
    assert mask[:2].tolist() == [[True, False, *[False] * len(cells)], [True, True, *[False] * len(cells)]]
    for query, key in itertools.product(range(len(cells)), repeat=2):
        assert bool(mask[2 + query, 2 + key]) == (sum(cells[key]) <= sum(cells[query]))


def test_steps_are_diagonals_rows_ascending() -> None:
    steps = list(build(NAR).sample(torch.tensor([1]), grid=(2, 3), generator=seeds(0)))
    assert [step.changed.tolist() for step in steps] == [[0], [1, 3], [2, 4], [5]]


def test_logits_see_nearer_diagonals_alone() -> None:
    model = build(NAR)
    ids = torch.randint(0, 64, (1, 16))
    other = ids.clone()
    other[0, 4 * 1 + 2] = (ids[0, 6] + 1) % 64  # row 1, column 2: diagonal 3
    before, after = (model(tokens, torch.tensor([1])) for tokens in (ids, other))
    distance = torch.arange(16) // 4 + torch.arange(16) % 4
    torch.testing.assert_close(before[0, distance <= 3], after[0, distance <= 3])
    assert not torch.isclose(before[0, distance > 3], after[0, distance > 3]).all(-1).any()


def test_borders_hear_one_head() -> None:
    model = build(NAR)
    ids = torch.randint(0, 64, (1, 16))
    before = model(ids, torch.tensor([1]))
    model.vertical_output.weight.data.zero_()
    after = model(ids, torch.tensor([1]))
    same = torch.isclose(before, after).all(-1)[0]
    assert same.nonzero().flatten().tolist() == [1, 2, 3]  # the first row, but for the corner
    assert (after[0, [4, 8, 12]] == 0).all()


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(
    "heights", [(1, 0, 0, 0), (2, 2, 0, 0), (4, 1, 1, 0), (3, 3, 3, 3), (4, 4, 4, 3), (1, 1, 1, 1)]
)
def test_a_known_corner_is_kept_and_continued(text: bool, heights: tuple[int, ...]) -> None:
    """`heights` are the known cells of each row."""
    model = build(NAR, text=text)
    condition = condition_for(model)
    whole = model.generate(condition, temperature=0.0, guidance_scale=2.0)
    mask = (torch.arange(4) < torch.tensor(heights)[:, None]).flatten().expand(3, -1)
    prefix = VisualTokens(torch.where(mask, whole.ids, 999), grid=(4, 4), mask=mask)
    steps = list(model.sample(condition, temperature=0.0, guidance_scale=2.0, prefix=prefix))
    unknown = (~mask[0]).nonzero().flatten().tolist()
    assert len(steps) == steps[0].total == len({position // 4 + position % 4 for position in unknown})
    assert sorted(torch.cat([step.changed for step in steps]).tolist()) == unknown
    assert torch.equal(steps[-1].tokens.ids, whole.ids)


def test_pictures_grow_out_of_a_rectangle() -> None:
    model = build(NAR)
    corner = VisualTokens(torch.randint(0, 64, (2, 6)), grid=(2, 3))
    for grid in ((2, 6), (5, 3), (4, 5)):
        tokens = model.generate(torch.tensor([1, 2]), prefix=corner, grid=grid, generator=seeds(0, 1))
        assert tokens.grid == grid
        assert torch.equal(tokens.ids.view(2, *grid)[:, :2, :3].flatten(1), corner.ids)
    narrow = VisualTokens(torch.randint(0, 64, (2, 10)), grid=(2, 5))
    with pytest.raises(InvalidInputError, match="2x5 tokens, which is more than the grid 4x4"):
        model.sample(torch.tensor([1, 2]), prefix=narrow)


def test_regions_that_cannot_grow_are_refused() -> None:
    model = build(NAR)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [0, 1, 5]] = True  # (1, 1) is known, but not its left neighbour
    with pytest.raises(InvalidInputError, match="left and the upper"):
        model.sample(
            torch.tensor([1]), prefix=VisualTokens(torch.zeros_like(mask, dtype=torch.int64), None, (4, 4), mask)
        )
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 0] = True
    ids = torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(InvalidInputError, match="same cells"):
        model.sample(torch.tensor([1, 2]), prefix=VisualTokens(ids, None, (4, 4), mask))


def test_guidance_ends_before_the_diagonal_that_enough_tokens_precede() -> None:
    model = build(NAR)
    rows: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    model.generate(torch.tensor([1, 2]), guidance_scale=2.0, guidance_interval=3)
    # 1 and 3 tokens precede diagonals 1 and 2, 6 precede diagonal 3: diagonals 0 and 1 are fed guided.
    assert rows == [3, 4, 4, 2, 2, 2, 2]


def test_more_vertical_layers() -> None:
    model = build(NAR, num_vertical_layers=2)
    assert len(model.layers) == 4
    assert model.generate(torch.tensor([1])).ids.shape == (1, 16)
    with pytest.raises(InvalidInputError, match="num_vertical_layers"):
        NAR.tiny(num_vertical_layers=0)
