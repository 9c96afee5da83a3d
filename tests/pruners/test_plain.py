"""The plain way of pruning gives the same tokens and logits, and the benchmark runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import pruning as benchmark
from benchmarks.plain.pruners import received_attention, transprune
from tests.pruners.models import build, prompt
from vistok.metrics.pruning import METHODS
from vistok.pruners import TransPrune
from vistok.pruners.hosts.base import TowerAttention


@torch.no_grad()
def test_transprune_equals_the_plain_way() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    schedule = {"accumulate": (1, 2, 3), "prune": (2, 3), "ratios": (0.6, 0.3)}
    logits, kept = transprune(model, inputs, **schedule)
    pruner = TransPrune(**schedule)
    with pruner.attached(model):
        ours = model(**inputs, logits_to_keep=1).logits[:, -1]
    assert torch.allclose(ours, logits, rtol=1e-4, atol=1e-5)
    for number, one in enumerate(kept):
        assert torch.equal(pruner.last_report.kept(number)[0], one)


def test_received_attention_equals_the_plain_way() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 50, 8), torch.randn(2, 3, 50, 8)
    assert torch.allclose(TowerAttention(query, key, 0.3).received(), received_attention(query, key, 0.3), atol=1e-6)


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    shape = {"decoder": tiny, "tower": {**tiny, "patch_size": 4}, "layers": 6, "side": 6, "text": 8}
    monkeypatch.setitem(benchmark.SIZES, "lab", shape)
    arguments = ["--size", "lab", "--repeats", "1", "--ratios", "0.25", "--dtype", "float32", "--batch", "2"]
    benchmark.main([*arguments, "--output", str(tmp_path / "pruning")])
    saved = json.loads((tmp_path / "pruning.json").read_text())
    rows = {row["name"]: row for row in saved["rows"]}
    assert set(rows) == {"unpruned", *(f"{method} 0.25" for method in METHODS)}
    assert rows["unpruned"]["kv_bytes"] == 2 * 2 * 6 * (36 + 8) * 32 * 4
    for name, row in rows.items():
        if name != "unpruned":
            assert 0 < row["flops_share"] < 1, name
            assert row["kv_bytes"] < rows["unpruned"]["kv_bytes"], name
            assert row["selection"] > 0, name
    assert [one["rows"] for one in saved["attention"]] == [1, 4, 1, 37]
    assert (tmp_path / "pruning.png").stat().st_size > 1000


def test_time_inside_hooks_is_counted_once_and_hooks_leave_no_trace() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    ticks = iter(range(100))
    watch = benchmark.Stopwatch(lambda: next(ticks))
    original = torch.nn.Module.register_forward_hook

    def outer(layer: torch.nn.Module, given: tuple) -> None:
        module[1](torch.zeros(2))  # its hook runs inside this one

    with watch.listening():
        handles = [module[0].register_forward_pre_hook(outer), module[1].register_forward_hook(lambda *_: None)]
    assert torch.nn.Module.register_forward_hook is original
    module(torch.zeros(2))
    assert next(ticks) == 0, "nothing is timed until it is asked for"
    assert watch.of(lambda: module(torch.zeros(2))) == 2, "two outermost hooks, a tick each"
    for handle in handles:
        handle.remove()
    assert watch.of(lambda: module(torch.zeros(2))) == 0
