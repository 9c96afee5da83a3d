"""The maths of the methods: selectors, merges, budgets, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vistok.errors import InvalidInputError
from vistok.pruners import (
    DivPrune,
    FasterVLM,
    FastV,
    FoPru,
    PyramidDrop,
    RandomPruner,
    Schedule,
    Settings,
    SparseVLM,
    Stage,
    TransPrune,
    UniformPooling,
    VFlowOpt,
    VisionZip,
    divprune,
)
from vistok.pruners.divprune import diverse_tokens
from vistok.pruners.fopru import select_rank, select_rows
from vistok.pruners.hosts.base import Block, TowerAttention
from vistok.pruners.hosts.qwen import window_order
from vistok.pruners.pooling import pool_grid
from vistok.pruners.random import random_tokens
from vistok.pruners.sparsevlm import cluster_and_merge
from vistok.pruners.stages import best, rounded_drop, truncated_keep
from vistok.pruners.transprune import SCHEDULES, transition
from vistok.pruners.vflowopt import average_kept, cells_of, global_attention, last_ratio, patch_entropy, recycle
from vistok.pruners.visionzip import contextual_tokens


def test_best_is_ascending_and_takes_the_lower_of_equals() -> None:
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0])
    assert best(scores, 2).tolist() == [1, 2]
    assert best(scores, 4).tolist() == [0, 1, 2, 4]


def test_counting_rules_round_as_the_papers_do() -> None:
    assert [truncated_keep(ratio)(10**6, 576) for ratio in (0.875, 0.625, 0.125)] == [504, 360, 72]
    assert truncated_keep(0.002, least=1)(576, 576) == 1
    assert truncated_keep(0.9)(5, 576) == 5, "never more than there are"
    assert rounded_drop(0.5)(25, 99) == 25 - 12, "half to even"


def test_transition_values_ignore_padding_and_other_samples() -> None:
    torch.manual_seed(0)
    before, after = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, :3] = False
    before[0, :3] = 0
    values = transition(before, after, valid)
    assert (values[0, :3] == 0).all()
    assert torch.allclose(values[0, 3:], transition(before[:1, 3:], after[:1, 3:])[0])
    assert torch.allclose(values[1], transition(before[1:], after[1:])[0])
    assert not torch.allclose(transition(before[1:], after[1:], direction="abs"), values[1:])


def test_schedules() -> None:
    high = SCHEDULES["high"]
    assert high.average_kept(32) == pytest.approx((7 + 2 * 0.875 + 3 * 0.625 + 20 * 0.125) / 32)
    assert high.scaled(40).prune == (9, 11, 15)
    assert Schedule.for_budget(0.3, 32).average_kept(32) == pytest.approx(0.3)
    with pytest.raises(InvalidInputError, match="average share lies in"):
        Schedule.for_budget(0.1, 32)
    assert high.scaled(8) == Schedule((2, 3, 4), (2, 3, 4), high.ratios), "7, 9 and 12 of 32 would be 2, 2 and 3"
    assert Schedule.for_budget(0.5, 8).average_kept(8) == pytest.approx(0.5)
    with pytest.raises(InvalidInputError, match="3 pruning layers do not fit a decoder of 3 layers"):
        high.scaled(3)


def test_rows_and_ranks_of_a_grid() -> None:
    significance = torch.tensor([5.0, 0, 0, 2, 2, 2, 0, 0, 1])
    assert select_rank(significance, 0.34).tolist() == [0, 3, 4]
    assert select_rows(significance, (3, 3), 0.34).tolist() == [1]
    assert select_rank(significance, 0.001).tolist() == [0], "at least one"


def test_diverse_tokens_equal_the_plain_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    features = torch.randn(50, 8)
    unit = torch.nn.functional.normalize(features, dim=-1)
    distance = 1 - unit @ unit.T
    order = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(order) < 12:
        least = distance[order].amin(dim=0)
        least[order] = -1
        order.append(int(least.argmax()))
    assert diverse_tokens(features, 12).tolist() == order
    monkeypatch.setattr(divprune, "_DISTANCES_AT_ONCE", 200)  # rows are then computed as they are needed
    assert diverse_tokens(features, 12).tolist() == order
    assert diverse_tokens(features[:1], 1).tolist() == [0]


def test_random_tokens_repeat_with_their_seed() -> None:
    assert torch.equal(random_tokens(50, 9, 3), random_tokens(50, 9, 3))
    assert not torch.equal(random_tokens(50, 9, 3), random_tokens(50, 9, 4))
    assert (random_tokens(50, 9, 3).diff() > 0).all()


def test_pooling_averages_cells_and_their_edges() -> None:
    grid = torch.arange(9.0).view(3, 3, 1)
    assert pool_grid(grid, 2)[..., 0].tolist() == [[2.0, 3.5], [6.5, 8.0]]
    assert pool_grid(grid, 2, "bilinear").shape == (2, 2, 1)


def test_contextual_tokens_add_the_mean_of_their_own() -> None:
    metric = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [0.1, 0.9], [0.8, 0.2]])
    features = torch.arange(5.0)[:, None]
    targets, merged = contextual_tokens(torch.arange(5), metric, features, 2)
    assert targets.tolist() == [0, 2]  # every second token of the rest
    assert merged[:, 0].tolist() == pytest.approx([0.0, 2 + (1 + 3 + 4) / 3])


def test_clusters_average_their_members() -> None:
    tokens = torch.cat([torch.zeros(4, 3), torch.ones(4, 3) * 10]) + torch.arange(8)[:, None] * 1e-3
    merged = cluster_and_merge(tokens, 2, torch.arange(8) / 8)
    assert sorted(merged.mean(dim=1).round().tolist()) == [0.0, 10.0]


def attention(views: int = 2, tokens: int = 20, class_tokens: int = 0) -> TowerAttention:
    torch.manual_seed(1)
    return TowerAttention(torch.randn(views, 3, tokens, 4) * 3, torch.randn(views, 3, tokens, 4), 0.5, class_tokens)


def test_global_attention_needs_no_matrix_and_survives_an_empty_set() -> None:
    given = attention()
    matrix = (given.query @ given.key.transpose(2, 3) * given.scale).softmax(dim=-1).mean(dim=1)
    received = matrix.mean(dim=1)
    expected = torch.stack([rows[one > 1.2 * one.mean()].mean(dim=0) for rows, one in zip(matrix, received)])
    assert torch.allclose(global_attention(given, 1.2), expected, atol=1e-6)
    with pytest.warns(UserWarning, match="smaller threshold"):
        assert torch.allclose(global_attention(given, 50.0), received, atol=1e-6)
    assert global_attention(attention(class_tokens=1), 1.1).shape == (2, 19)


def test_entropy_is_zero_on_flat_patches_and_bounded() -> None:
    torch.manual_seed(0)
    pixels = torch.cat([torch.full((1, 3, 14, 14), 0.5), torch.rand(1, 3, 14, 14)], dim=3)
    flat, busy = patch_entropy(pixels, 14)[0, 0].tolist()
    assert flat == pytest.approx(0.0, abs=1e-6)
    assert 6 < busy <= 7.62


def test_recycling_merges_every_cell_once() -> None:
    torch.manual_seed(0)
    blocks = [Block(0, 4, 4), Block(16, 2, 5, newline=True)]
    features, importance = torch.rand(26, 3), torch.rand(26)
    importance[torch.tensor([20, 25])] = 9.0  # newlines
    kept, values, low, cell = recycle(features, importance, blocks, 0.4, 2.0)
    dropped, merged = round(26 * 0.6), int(26 / 4)
    assert len(low) == dropped + merged
    assert len(kept) == 26 - len(low) + len(cell.unique())
    assert {20, 25} <= set(kept.tolist())
    for number in cell.unique():
        members = low[cell == number]
        strongest = members[importance[members].argmax()]
        expected = (features[members] * importance[members, None]).sum(dim=0) / importance[members].sum()
        assert torch.allclose(values[kept.tolist().index(int(strongest))], expected, atol=1e-6)
    corners = cells_of(torch.tensor([0, 3, 12, 15, 16, 25]), blocks, 2.0).tolist()
    assert corners == [0, 1, 2, 3, 4, 6]


def test_budgets() -> None:
    third = last_ratio(0.25, 0.3, 0.9)
    assert average_kept((0.3, 0.9, third), (9, 9, 10)) == pytest.approx(0.25)
    assert last_ratio(0.05, 0.3, 0.9) < 0, "infeasible points are not hidden"


def test_window_order_visits_every_token_once() -> None:
    order = window_order([[1, 10, 6], [2, 4, 4]], 2, 2)
    assert sorted(order.tolist()) == list(range(15 + 8))
    assert order[:4].tolist() == [0, 1, 3, 4]


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (FoPru, {"keep_ratio": 0.0}, r"\(0, 1\]"),
    (FoPru, {"keep_ratio": 1.5}, r"\(0, 1\]"),
    (FoPru, {"strategy": "columns"}, "'rank' or 'row'"),
    (FoPru, {"scope": "global", "strategy": "row"}, "scope"),
    (FoPru, {"queries": "none"}, "queries"),
    (FastV, {"layer": 0}, "from 1 on"),
    (FastV, {"keep_ratio": True}, r"\(0, 1\]"),
    (FasterVLM, {"tokens_per_view": 0}, "positive"),
    (PyramidDrop, {"layers": (8,), "ratios": (0.5, 0.2)}, "as many"),
    (DivPrune, {"keep_ratio": -1}, r"\(0, 1\]"),
    (RandomPruner, {"keep_ratio": 2}, r"\(0, 1\]"),
    (UniformPooling, {"stride": 1}, "from 2 on"),
    (UniformPooling, {"mode": "max"}, "'average' or 'bilinear'"),
    (VisionZip, {"dominant": 0}, "from 1 on"),
    (SparseVLM, {"tokens": 100}, "one of"),
    (SparseVLM, {"counts": (3,)}, "as many counts"),
    (TransPrune, {"schedule": "middle"}, "'high', 'low'"),
    (TransPrune, {"ratios": (0.2, 0.5, 0.1)}, "must not grow"),
    (TransPrune, {"prune": (9, 7, 12)}, "ascend"),
    (TransPrune, {"instruction": False, "transitions": False}, "at least one"),
    (TransPrune, {"schedule": Schedule((1,), (2,), (0.5, 0.2))}, "as many ratios"),
    (VFlowOpt, {"settings": 0.3}, "published budgets"),
    (VFlowOpt, {"settings": Settings((0.5, 0.0), 1.0, 2.0)}, r"\(0, 1\]"),
    (VFlowOpt, {"settings": Settings((0.5, 0.5), 1.0, 0.0)}, "cell_size"),
    (VFlowOpt, {"settings": Settings((0.5, 0.5), 1.0, 2.0), "layers": (1, 2)}, "as many layers"),
    (Stage, {"place": "somewhere", "selector": None}, "place"),
    (Stage, {"place": "decoder", "selector": None, "layer": 0}, "'embeddings'"),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_bad_settings_are_refused_when_they_are_given(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        method(**options)
