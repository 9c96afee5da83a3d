"""Every pruning method at one keep ratio, questions and answers, and a run that goes on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.lvlm import save_lvlm, save_questions
from vistok.errors import InvalidInputError
from vistok.files import open_image
from vistok.metrics.pruning import (
    METHODS,
    UNPRUNED,
    Asker,
    Target,
    answers_agree,
    evaluate_pruners,
    load_lvlm,
    load_questions,
    make_pruner,
    pareto,
    plot_pareto,
)
from vistok.pruners import SparseVLM, TransPrune, VFlowOpt


@pytest.fixture(scope="module")
def lvlm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_lvlm(str(save_lvlm(tmp_path_factory.mktemp("lvlm"))))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_questions(tmp_path / "data")


def last_kept(method: str, ratio: float, visual: int = 576, depth: int = 32) -> int:
    return make_pruner(method, Target(ratio, depth, 1, visual, visual)).plan(depth, visual)[-1]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pooling"])
@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.11, 0.05])
@pytest.mark.parametrize("depth", [8, 28, 32])
def test_every_method_ends_at_the_keep_ratio(method: str, ratio: float, depth: int) -> None:
    assert last_kept(method, ratio, depth=depth) == pytest.approx(ratio * 576, abs=2 if method != "vflowopt" else 4)


@pytest.mark.parametrize("method", ["fopru+transprune", "fastervlm+fastv", "divprune+pyramiddrop", "fopru+sparsevlm"])
def test_joined_methods_end_at_the_keep_ratio_together(method: str) -> None:
    assert last_kept(method, 0.25) == pytest.approx(144, abs=3)
    early = make_pruner(method, Target(0.25, 32, 1, 576, 576)).plan(32, 576)[0]
    assert early == pytest.approx(288, abs=2), "half before the language model"


def test_without_a_ratio_the_published_setting_is_taken() -> None:
    pruner = make_pruner("transprune", Target(None, 32, 1, 576, 576))
    assert isinstance(pruner, TransPrune)
    assert pruner.schedule == TransPrune("high").schedule
    assert make_pruner("sparsevlm", Target(None, 32, 1, 576, 576)).plan(32, 576) == SparseVLM(192).plan(32, 576)
    published = make_pruner("vflowopt", Target(None, 28, 1, 729, 729))
    assert isinstance(published, VFlowOpt)
    assert published.settings == VFlowOpt(0.25).settings
    assert published.layers == (9, 18)


def test_layers_stay_behind_those_that_may_not_be_pruned() -> None:
    pruner = make_pruner("transprune", Target(0.25, 8, 3, 64, 64))
    assert [stage.layer for stage in pruner.stages] == [3, 4, 5]
    with pytest.raises(InvalidInputError, match="3 pruning layers do not fit a decoder of 3 layers"):
        make_pruner("transprune", Target(0.25, 3, 1, 64, 64))


@pytest.mark.parametrize(
    ("method", "ratio", "said"),
    [
        ("nonsense", 0.5, "no pruning method is called 'nonsense'; there are: transprune"),
        ("transprune+", 0.5, "no pruning method is called ''"),
        ("fopru", 0.0, r"in \(0, 1\], got 0.0"),
        ("fopru", 1.5, r"in \(0, 1\], got 1.5"),
        ("fopru+fastervlm", 0.5, "two stages act at the place 'tower'"),
        ("pooling", 0.5, "pooling averages whole cells"),
    ],
)
def test_what_cannot_be_built_is_refused(method: str, ratio: float, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        make_pruner(method, Target(ratio, 32, 1, 576, 576))


def test_answers_are_compared_without_case_and_articles() -> None:
    assert answers_agree(" A Red.", ("red",))
    assert not answers_agree("It is red", ("red",))
    assert answers_agree("It is red", ("blue", "red"), "contains")
    assert not answers_agree("It is reddish", ("red",), "contains")
    assert answers_agree("a", ("A",)), "an answer that is only an article stays"
    assert not answers_agree("", ("red",))


def test_the_front_holds_what_nothing_beats() -> None:
    assert pareto([(10, 0.9), (5, 0.8), (6, 0.7), (1, 0.1), (10, 0.8)]) == [True, True, False, True, False]
    assert pareto([(1, 0.5), (1, 0.5)]) == [True, True]


def test_questions_are_read(data: Path) -> None:
    found = load_questions(data)
    assert len(found) == 3
    assert found[1].image == data / "1.png"
    assert found[1].answers == ("red", "word3")
    assert len(load_questions(data, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: expected an object"),
        ('{"image": "0.png", "answer": "x"}', "'question' must be a text"),
        ('{"image": "0.png", "question": "x"}', "'answer' must be a text"),
        ('{"image": "0.png", "question": "x", "answer": []}', "'answer' must be a text"),
        ('{"image": "no.png", "question": "x", "answer": "y"}', "line 1: no picture at"),
        ("", "holds no questions"),
    ],
)
def test_bad_questions_are_named_by_line(data: Path, line: str, said: str) -> None:
    (data / "questions.jsonl").write_text(line + "\n")
    with pytest.raises(InvalidInputError, match=said):
        load_questions(data)


def test_missing_questions_show_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is no folder"):
        load_questions(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match="expected JSON lines such as"):
        load_questions(tmp_path)


def test_asking_leaves_the_model_as_it_was_and_reports_true_costs(lvlm: tuple[Any, Any], data: Path) -> None:
    asker = Asker(*lvlm, max_new_tokens=3)
    picture = open_image(data / "0.png")
    plain = asker.ask(picture, "what colour is it")
    assert plain.visual_tokens == plain.kept_tokens == 16
    assert plain.new_tokens == 3
    everything = asker.ask(picture, "what colour is it", "fopru+transprune", 1.0)
    assert (everything.text, everything.flops, everything.kv_bytes) == (plain.text, plain.flops, plain.kv_bytes)
    few = asker.ask(picture, "what colour is it", "fastv", 0.25)
    assert few.kept_tokens == 4
    assert few.average_kept == (16 + 3 * 4) / (4 * 16)
    layers = [21, 9, 9, 9]
    assert few.kv_bytes == 2 * sum(layers) * 2 * 8 * 4
    assert asker.ask(picture, "what colour is it").text == plain.text
    assert asker.last_report is None


def test_tokens_of_a_view_are_found_for_methods_that_count_them(lvlm: tuple[Any, Any], data: Path) -> None:
    asker = Asker(*lvlm, max_new_tokens=1)
    answer = asker.ask(open_image(data / "0.png"), "what", "visionzip", 0.5)
    assert answer.kept_tokens == 8
    assert asker.ask(open_image(data / "0.png"), "what", "pooling", 0.25).kept_tokens == 4


def test_a_model_without_a_template_and_an_empty_question(tmp_path: Path) -> None:
    asker = Asker(*load_lvlm(str(save_lvlm(tmp_path, template=False))), max_new_tokens=1)
    picture = Image.new("RGB", (28, 28))
    assert asker.ask(picture, "what colour is it").prompt_tokens == 16 + 4
    with pytest.raises(InvalidInputError, match="the question is empty"):
        asker.ask(picture, " ")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is no transformers model for pictures and text"):
        load_lvlm(str(tmp_path))
    with pytest.raises(InvalidInputError, match="dtype is float32"):
        load_lvlm(str(tmp_path), dtype="int8")
    with pytest.raises(InvalidInputError, match="cannot be used here"):
        load_lvlm(str(tmp_path), device="nonsense")


def evaluated(lvlm: tuple[Any, Any], data: Path, folder: Path, **options: Any) -> dict[str, Any]:
    methods = options.pop("methods", ["fopru", "random", "pooling"])
    settings = {"keep_ratios": [0.5, 0.25], "max_new_tokens": 2, "model_name": "tiny", **options}
    return evaluate_pruners(*lvlm, load_questions(data), folder=folder, methods=methods, **settings)


def test_an_evaluation_covers_every_method_and_ratio(lvlm: tuple[Any, Any], data: Path, tmp_path: Path) -> None:
    report = evaluated(lvlm, data, tmp_path / "out")
    assert [(row["method"], row["keep_ratio"]) for row in report["parts"]] == [
        (UNPRUNED, None),
        ("fopru", 0.5),
        ("fopru", 0.25),
        ("random", 0.5),
        ("random", 0.25),
        ("pooling", 0.5),
        ("pooling", 0.25),
    ]
    skipped = [row for row in report["parts"] if "skipped" in row]
    assert [row["method"] for row in skipped] == ["pooling"]
    assert "whole cells" in skipped[0]["skipped"]
    half = report["parts"][1]
    assert half["kept_tokens"] == 8
    assert half["flops_share"] < 1
    assert half["accuracy"]["total"] == 3
    assert any(row.get("pareto") for row in report["parts"])
    json.dumps(report)
    plot_pareto(report, tmp_path / "pareto.png")
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.width > 500
    with pytest.raises(InvalidInputError, match="nothing to plot"):
        plot_pareto({**report, "parts": skipped}, tmp_path / "none.png")


def test_answers_decide_the_accuracy(lvlm: tuple[Any, Any], data: Path, tmp_path: Path) -> None:
    asker = Asker(*lvlm, max_new_tokens=2)
    said = asker.ask(open_image(data / "0.png"), "what colour is it").text
    lines = [{"image": f"{n}.png", "question": "what colour is it", "answer": said if n == 0 else "no"} for n in (0, 1)]
    (data / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = evaluated(lvlm, data, tmp_path / "out", methods=["random"], keep_ratios=[1.0])
    assert [row["accuracy"]["correct"] for row in report["parts"]] == [1, 1]


def test_an_interrupted_run_goes_on(
    lvlm: tuple[Any, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = Asker.ask

    def counted(self: Asker, picture: Any, question: str, method: str = UNPRUNED, *rest: Any) -> Any:
        asked.append(method)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return original(self, picture, question, method, *rest)

    monkeypatch.setattr(Asker, "ask", counted)
    stop = 7  # warm-up and three answers unpruned; warm-up and one answer of fopru
    report = evaluated(lvlm, data, tmp_path / "out", methods=["fopru"])
    assert report["interrupted"]
    assert [row["method"] for row in report["parts"]] == [UNPRUNED]
    path = tmp_path / "out" / "answers" / "fopru-0.5.jsonl"
    assert len(path.read_text().splitlines()) == 2
    path.write_text(path.read_text() + '{"text": "cut of')

    asked.clear()
    stop = 0
    report = evaluated(lvlm, data, tmp_path / "out", methods=["fopru"])
    assert not report["interrupted"]
    assert asked == ["fopru"] * (1 + 2) + ["fopru"] * (1 + 3), "one answer of the first part was there"
    asked.clear()
    assert evaluated(lvlm, data, tmp_path / "out", methods=["fopru"]) == report
    assert not asked, "nothing is asked twice"
    # Other settings are other answers.
    evaluated(lvlm, data, tmp_path / "out", methods=["fopru"], max_new_tokens=1)
    assert len(asked) == 3 * (1 + 3)


def test_settings_of_an_evaluation_are_checked(lvlm: tuple[Any, Any], data: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"methods": ["nonsense"]}, "no pruning method"),
        ({"keep_ratios": [2.0]}, r"in \(0, 1\]"),
        ({"keep_ratios": []}, "at least one"),
        ({"match": "nearly"}, "match is"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            evaluated(lvlm, data, tmp_path / "out", **options)
