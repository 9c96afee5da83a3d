"""The benchmarks run, and what they compare computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import sampling, timing, tokenpacker, training


def test_sampling_variants_write_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "multiple_of": 16, "grid": (3, 4)}
    monkeypatch.setitem(sampling.SIZES, "lab", tiny)
    sampling.main(["--batch", "2", "--repeats", "1", "--output", str(tmp_path / "sampling")])
    saved = json.loads((tmp_path / "sampling.json").read_text())
    assert [(one["system"], one["tokens"]) for one in saved["measurements"]] == [("nar", 12), ("llamagen", 12)]
    for one in saved["measurements"]:
        assert set(one["rows"]) == {"plain", *(f"plain + {name}" for name in [*saved["savings"], "all"]), "vistok"}
        assert all(row["same_tokens"] == 1.0 for row in one["rows"].values())
    assert saved["environment"]["threads"] == torch.get_num_threads()
    assert (tmp_path / "sampling.png").stat().st_size > 1000


@pytest.mark.parametrize("system", ["nar", "llamagen"])
def test_training_variants_have_the_same_loss(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"vocab_size": 64, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "multiple_of": 16, "grid": (3, 5)}
    monkeypatch.setitem(sampling.SIZES, "lab", tiny)
    losses = [run() for run in training.variants_of(system, "lab", 3).values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_projector_variants_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {
        "hidden_size": 32,
        "grid_size": 4,
        "feature_dim": 16,
        "feature_levels": (1, 2),
        "embed_dim": 16,
        "num_heads": 2,
    }
    monkeypatch.setitem(tokenpacker.SIZES, "lab", tiny)
    tokenpacker.main(["--size", "lab", "--batch", "2", "--repeats", "1", "--output", str(tmp_path / "projector")])
    saved = json.loads((tmp_path / "projector.json").read_text())
    assert [(one["scale_factor"], one["tokens"]) for one in saved["measurements"]] == [(2, 4), (4, 1)]
    for one in saved["measurements"]:
        assert set(one["rows"]) == {"plain", "vistok, training", "vistok"}
        assert all(row["relative_difference"] < 1e-4 for row in one["rows"].values())
    assert (tmp_path / "projector.png").stat().st_size > 1000


def test_variants_take_turns_and_warm_up() -> None:
    called: list[str] = []
    seconds = timing.interleaved({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, repeats=2)
    assert called == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}
    assert timing.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}
