"""The benchmark of the data engine keeps the same pairs in every variant."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import scop


def test_variants_keep_the_same_pairs(tmp_path: Path) -> None:
    scop.main(["--images", "60", "--repeats", "1", "--output", str(tmp_path / "scop")])
    saved = json.loads((tmp_path / "scop.json").read_text())
    assert set(saved["rows"]) == {"plain", "vistok, 1 process", "vistok, 2 processes"}
    kept = {row["kept"] for row in saved["rows"].values()}
    assert len(kept) == 1
    assert kept.pop() > 0
    assert saved["settings"]["annotations"] > 200
    assert (tmp_path / "scop.png").stat().st_size > 1000
