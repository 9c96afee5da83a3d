"""FlexTok's benchmark runs, and what it compares computes the same."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import flextok


def test_both_ways_agree(tmp_path: Path) -> None:
    output = tmp_path / "flextok"
    flextok.main(["--size", "tiny", "--lengths", "1", "16", "--tokens", "5", "--repeats", "1", "--output", str(output)])
    saved = json.loads(output.with_suffix(".json").read_text())
    assert [one["tokens"] for one in saved["decoding"]] == [1, 16]
    assert all(one["difference"] < 1e-4 for one in saved["decoding"])
    assert saved["writing"]["same_tokens"] == 1.0
    assert output.with_suffix(".png").stat().st_size > 1000
