"""The claims about pruners, on a tiny random LLaVA: they run, resume, and say what they did not measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.lvlm import save_lvlm
from vistok.errors import InvalidInputError
from vistok.metrics.pruning import METHODS, Question, Target, load_lvlm
from vistok.reproduce import fopru, transprune, vflowopt
from vistok.reproduce.pruning import guessing, matched, not_worse
from vistok.reproduce.report import Gap, Report

RATIOS = (0.5, 0.25, 0.11, 0.05)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_lvlm(str(save_lvlm(tmp_path_factory.mktemp("lvlm"))))


def checked(folder: Path, report: Report, methods: set[str]) -> dict[tuple[str, float | None], dict[str, Any]]:
    assert report.complete
    saved = json.loads((folder / f"{report.name}.json").read_text())
    assert [one["verdict"] for one in saved["findings"]] == [one.verdict for one in report.findings]
    with Image.open(folder / f"{report.name}.png") as picture:
        assert picture.width > 500
    rows = {(row["method"], row["keep_ratio"]): row for row in report.figures["parts"]}
    assert len(rows) == len(report.figures["parts"]), "each row once"
    assert {method for method, _ in rows} == {"unpruned", *methods}
    for ratio in RATIOS:
        assert rows["random", ratio]["accuracy"]["total"] == 7, "random is always in the table"
    text = str(report)
    for method in methods:
        assert f"note: {method}: " in text or f"note: skipped {method} at" in text
    assert "note: kept at 0.25: best" in text
    assert "quick run" in text
    return rows


def test_transprune(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    report = transprune.run(tmp_path, quick=True, loaded=loaded, num_questions=7)
    methods = {"transprune", "fastv", "pyramiddrop", "sparsevlm", "random", "question only", "transition only"}
    rows = checked(tmp_path, report, methods)
    assert len(report.findings) == 1 + 3 + 4 + 2
    assert rows["transprune", None]["kept_tokens"] == 2
    assert rows["question only", 0.25]["kept_tokens"] == rows["transprune", 0.25]["kept_tokens"] == 4
    # A second run asks only methods of one's own again.
    asked: list[str] = []
    again = transprune.run(
        tmp_path,
        quick=True,
        loaded=loaded,
        num_questions=7,
        on_progress=lambda label, done, total: asked.append(label) if done == 0 else None,
    )
    assert {label.rsplit(" ", 1)[0] for label in asked} == {"question only", "transition only"}
    assert [one.measured for one in again.findings] == [one.measured for one in report.findings]


def test_fopru_never_passes_for_the_papers_numbers(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    report = fopru.run(tmp_path, quick=True, loaded=loaded, num_questions=7)
    methods = {"fopru", "fopru rows", "fastervlm", "visionzip", "divprune", "pooling", "random"}
    rows = checked(tmp_path, report, methods)
    assert rows["fopru", 1 / 16]["kept_tokens"] == rows["random", 1 / 16]["kept_tokens"] == 1
    assert rows["fopru rows", 0.25]["kept_tokens"] == 4
    text = str(report)
    assert "not a reproduction of the paper's numbers" in text
    assert all("[P]" in one.claim or "[A]" in one.claim for one in report.findings)
    assert "skipped pooling at 0.5" in text
    assert 0 < report.figures["guessing"]["value"] <= 1


def test_vflowopt_searches_and_goes_on(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    options: dict[str, Any] = {"quick": True, "loaded": loaded, "num_questions": 7, "trials": 2, "samples": 2}
    report = vflowopt.run(tmp_path, **options)
    methods = {"vflowopt searched", "not searched", "no recycling", "one stage", "fastv matched", "sparsevlm matched"}
    rows = checked(tmp_path, report, methods | {"visionzip", "random"})
    met = [float(name) for name in report.figures.get("search", {})]
    for ratio in RATIOS:
        row = rows["vflowopt searched", ratio]
        if ratio in met:
            assert row["average_kept"] <= 1.1 * ratio + 0.07, (
                "the budget is met on other pictures, too (16 tokens each)"
            )
        else:
            assert "no settings that keep so few" in row["skipped"]
            assert f"search at {ratio:g}: no point of the box" in str(report)
    assert "skipped" in rows["fastv matched", 0.05], "it shows its first layer all tokens"
    seen: list[str] = []
    vflowopt.run(tmp_path, **options, on_progress=lambda what, done, total: seen.append(what))
    assert not [what for what in seen if what.startswith("search")], "finished searches are not run again"


def test_an_interrupted_run_keeps_what_was_measured(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("random"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transprune.run(tmp_path, quick=True, loaded=loaded, num_questions=7, on_progress=interrupt)
    saved = json.loads((tmp_path / "transprune.json").read_text())
    assert saved["complete"] is False
    assert {row["method"] for row in saved["figures"]["parts"]} >= {"unpruned", "transprune", "fastv"}


def test_matched_methods_keep_the_share_on_average() -> None:
    for method in ("fastv", "sparsevlm", "transprune"):
        plan = matched(method)(Target(0.6, 8, 1, 256, 256)).plan(8, 256)
        assert sum(plan) / (8 * 256) == pytest.approx(0.6, abs=0.02), method
    with pytest.raises(InvalidInputError, match="shows its first layers all tokens"):
        matched("transprune")(Target(0.1, 8, 1, 256, 256))
    assert set(METHODS) >= set(vflowopt.MATCHED)


def test_verdicts_and_the_floor() -> None:
    assert not_worse(Gap(0.0, -0.01, 0.01)) is True
    assert not_worse(Gap(-0.05, -0.06, -0.04)) is False
    assert not_worse(Gap(-0.02, -0.04, 0.01)) is None
    picture = Image.new("RGB", (8, 8))
    answers = ["red", "red", "blue", "yes", "no"]
    asked = [
        Question(picture, "?", (one,), "colour" if number < 3 else "relation") for number, one in enumerate(answers)
    ]
    assert str(guessing(asked)).startswith("60.0 %")
