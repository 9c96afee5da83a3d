from __future__ import annotations

import json
from pathlib import Path

from benchmarks import seed


def test_both_ways_agree_and_every_task_is_timed(tmp_path: Path) -> None:
    seed.main(
        ["--size", "tiny", "--batch", "2", "--repeats", "1", "--clock", "cpu", "--output", str(tmp_path / "seed")]
    )
    saved = json.loads((tmp_path / "seed.json").read_text())
    (measured,) = saved["measurements"]
    assert set(measured["rows"]) == {
        "pictures to codes",
        "features to queries",
        "codes to embedding",
        f"painting, {seed.STEPS} steps",
    }
    for task, row in measured["rows"].items():
        assert row["speedup"] > 0, task
        assert row["difference"] < 1e-3, task
    assert (tmp_path / "seed.png").is_file()
