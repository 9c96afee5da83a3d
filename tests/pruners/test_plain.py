"""The plain way of pruning gives the same tokens and logits, and the benchmark runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import pruners as benchmark
from benchmarks.plain.pruners import received_attention, transprune
from tests.pruners.models import build, prompt
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
    monkeypatch.setitem(benchmark.SIZES, "lab", {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4})
    monkeypatch.setattr(benchmark, "TOWER", {**benchmark.TOWER, "hidden_size": 32, "intermediate_size": 48})
    arguments = [
        "--size",
        "lab",
        "--layers",
        "14",
        "--side",
        "6",
        "--repeats",
        "1",
        "--ratios",
        "0.25",
        "--dtype",
        "float32",
    ]
    benchmark.main([*arguments, "--output", str(tmp_path / "pruners")])
    saved = json.loads((tmp_path / "pruners.json").read_text())
    rows = {row["name"]: row for row in saved["rows"]}
    assert rows["unpruned"]["flops_share"] == 1.0
    assert all(0 < row["flops_share"] < 1 for name, row in rows.items() if name != "unpruned")
    assert all(row["kv_bytes"] < rows["unpruned"]["kv_bytes"] for name, row in rows.items() if name != "unpruned")
    assert (tmp_path / "pruners.png").stat().st_size > 1000
