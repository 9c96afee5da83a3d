"""The snippets of the pages on pruning methods, and of the how-to, run as they stand."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from vistok.metrics.pruning import METHODS
from vistok.pruners import Pruner

DOCS = Path(__file__).resolve().parents[2] / "docs"
CLASSES = {
    "transprune": "TransPrune",
    "fopru": "FoPru",
    "vflowopt": "VFlowOpt",
    "fastv": "FastV",
    "pyramiddrop": "PyramidDrop",
    "sparsevlm": "SparseVLM",
    "fastervlm": "FasterVLM",
    "visionzip": "VisionZip",
    "divprune": "DivPrune",
    "pooling": "UniformPooling",
    "random": "RandomPruner",
}


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def run(page: str, some: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run snippets one after the other, on a smaller model than the page's."""
    from vistok.training import lvlm

    class Small(lvlm.LabLlava):
        def __init__(self) -> None:
            super().__init__(hidden_size=16, ffn_size=16, vision_hidden_size=16, vision_ffn_size=16, vision_layers=2)

    monkeypatch.setattr(lvlm, "LabLlava", Small)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for snippet in some:
            exec(compile(snippet, page, "exec"), names)
    return names


def test_every_method_has_a_section_whose_snippet_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "pruning-methods.md").read_text(encoding="utf-8")
    assert set(CLASSES) == set(METHODS)
    for name in CLASSES.values():
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert re.search(rf"answer\({name}\(", section), name
    pytest.importorskip("optuna")
    found = run("pruning-methods.md", snippets("pruning-methods.md"), monkeypatch)
    report = found["answer"](found["FoPru"](0.25))
    assert [len(one) for one in report.kept()] == [64]


def test_the_how_to_gives_a_pruner_of_at_most_thirty_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = snippets("write-a-pruner.md")
    lines = [line for line in first.splitlines() if line.strip()]
    assert len(lines) <= 30
    names = run("write-a-pruner.md", [first, *rest], monkeypatch)
    pruner = names["pruner"]
    assert isinstance(pruner, Pruner)
    assert pruner.last_report.visual_per_layer == [[256, 256, *[64] * 6]]
    rows = {row["method"]: row for row in names["report"]["parts"]}
    assert rows["surprising"]["kept_tokens"] == rows["random"]["kept_tokens"] == 64
