"""The benchmark of controllers runs, and counts what it says."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from benchmarks import controllers

TINY: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (8, 16),
    "attention_heads": 2,
    "norm_num_groups": 4,
    "time_embedding_dim": 16,
    "text_hidden_size": 16,
    "text_layers": 1,
    "text_heads": 2,
    "text_ffn_size": 16,
}


def test_every_controller_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(controllers.SIZES, "lab", TINY)
    output = tmp_path / "controllers"
    controllers.main(["--size", "lab", "--steps", "3", "--repeats", "1", "--output", str(output)])
    saved = json.loads(output.with_suffix(".json").read_text())
    rows = saved["measurements"][0]["rows"]
    assert list(rows) == ["none", controllers.AGAIN, *controllers.CONTROLLERS]
    assert rows["none"]["step_overhead"] == rows["none"]["call_overhead"] == 0
    assert all(0 < row["step"] < row["call"] for row in rows.values())
    assert output.with_suffix(".png").stat().st_size > 1000


def test_overheads_are_ratios_of_least_rounds() -> None:
    pipe = controllers.build("lab", **TINY)
    ticks = count()
    # A clock that counts how often it is read: a call reads it twice, and once a step.
    rows = controllers.measure(pipe, ["leakage fix"], batch=2, steps=4, repeats=2, clock=lambda: float(next(ticks)))
    assert set(rows) == {"none", controllers.AGAIN, "leakage fix"}
    assert (
        rows["none"]
        == rows[controllers.AGAIN]
        == rows["leakage fix"]
        == {"step": 1.0, "call": 5.0, "step_overhead": 0.0, "call_overhead": 0.0}
    )
    assert not pipe.unet._forward_pre_hooks
