"""Reports as JSON, as text and as a section of a page."""

from __future__ import annotations

import json
from pathlib import Path

from vistok.reproduce.report import Finding, Report


def test_a_report_is_written_as_json_and_as_a_page(tmp_path: Path) -> None:
    report = Report("claim", "fewer tokens", "A paper (arXiv:0)", notes=["a note"], picture="claim.png")
    report.findings.append(Finding("it is |fast|", "2x", "1.5x", None))
    path = report.save(tmp_path)
    assert json.loads(path.read_text(encoding="utf-8"))["findings"][0]["verdict"] == "cannot tell"
    page = (tmp_path / "claim.md").read_text(encoding="utf-8")
    assert r"| it is \|fast\| | 2x | 1.5x | **cannot tell** |" in page
    assert "![claim](claim.png)" in page
    assert "Incomplete" in page
    report.complete = True
    assert "Incomplete" not in report.to_markdown()
