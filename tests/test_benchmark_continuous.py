"""The benchmark of continuous tokens runs, and what it compares draws the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import continuous
from vistok.generators import MAR, XAR, HiMAR


def test_samplers_of_continuous_tokens_draw_what_the_plain_ones_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"mar": MAR.tiny(num_diffusion_steps="4"), "xar": XAR.tiny()}
    tiny["himar"] = HiMAR.tiny(num_diffusion_steps="4", num_dense_diffusion_steps="4")
    monkeypatch.setattr(continuous, "build", lambda system, size: tiny[system])
    monkeypatch.setitem(continuous.SETTINGS["lab"]["xar"], "num_inference_steps", 3)
    monkeypatch.setitem(continuous.SETTINGS["lab"]["mar"], "num_inference_steps", 3)
    continuous.main(["--batch", "2", "--repeats", "1", "--output", str(tmp_path / "found")])
    saved = json.loads((tmp_path / "found.json").read_text())
    assert [one["system"] for one in saved["measurements"]] == ["xar", "himar", "mar"]
    for one in saved["measurements"]:
        assert {"plain", "vistok"} <= set(one["rows"])
        assert all(row["largest_difference"] < 1e-4 * one["largest_token"] for row in one["rows"].values())
    assert (tmp_path / "found.png").stat().st_size > 1000


@pytest.mark.parametrize("system", ["mar", "himar", "xar"])
def test_no_weight_of_a_timed_network_is_zero(system: str) -> None:
    model = continuous.build(system, "lab")
    assert all(bool(value.any()) for value in model.parameters() if value.ndim > 1)
