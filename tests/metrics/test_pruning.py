"""Every pruning method at one keep ratio, questions and answers, and a run that goes on after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.cli.lvlm import save_lvlm, save_questions
from vistok.data.shapes import QUESTION_KINDS
from vistok.errors import InvalidInputError
from vistok.files import open_image
from vistok.metrics.accuracy import Accuracy
from vistok.metrics.pruning import (
    METHODS,
    UNPRUNED,
    Asker,
    Target,
    answers_agree,
    evaluate_pruners,
    held_out_questions,
    load_lvlm,
    load_questions,
    make_pruner,
    paired_difference,
    pareto,
    plot_pareto,
    winners,
)
from vistok.pruners import FoPru, Pruner, SparseVLM, TransPrune, VFlowOpt


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


def test_a_ratio_of_one_is_the_unpruned_model_bit_for_bit(lvlm: tuple[Any, Any], data: Path) -> None:
    model, processor = lvlm
    inputs = Asker(model, processor).inputs(open_image(data / "0.png"), "what colour is it")
    with torch.no_grad():
        before = model(**inputs).logits
        for method in (*METHODS, "fopru+transprune"):
            pruner = make_pruner(method, Target(1.0, 4, 1, 16, 16))
            assert pruner.plan(4, 16) == [16] * 4
            with pruner.attached(model):
                assert torch.equal(model(**inputs).logits, before), method
            assert pruner.last_report is not None
            assert pruner.last_report.average_kept == 1.0


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
    assert half["hits"] in {f"{number:03b}" for number in range(8)}
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
    original = Asker.ask_all

    def counted(self: Asker, some: Any, method: str = UNPRUNED, *rest: Any) -> Any:
        asked.append(method)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return original(self, some, method, *rest)

    monkeypatch.setattr(Asker, "ask_all", counted)
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


def test_a_batch_gives_the_answers_and_costs_of_single_questions(
    lvlm: tuple[Any, Any], data: Path, tmp_path: Path
) -> None:
    lines = [(0, "what"), (1, "what colour is it"), (2, "is it red")]
    records = [{"image": f"{number}.png", "question": text, "answer": "x"} for number, text in lines]
    (data / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    asker = Asker(*lvlm, max_new_tokens=3)
    pairs = [(open_image(data / f"{number}.png"), text) for number, text in lines]
    for method, ratio in (
        (UNPRUNED, None),
        ("fopru", 0.5),
        ("transprune", 0.25),
        ("sparsevlm", 0.5),
        ("visionzip", 0.5),
    ):
        single = [asker.ask(*pair, method, ratio) for pair in pairs]
        together = asker.ask_all(pairs, method, ratio)
        for one, other in zip(single, together, strict=True):
            for name in ("text", "prompt_tokens", "visual_tokens", "kept_tokens", "average_kept", "flops", "kv_bytes"):
                assert getattr(one, name) == getattr(other, name), (method, name)
    report = evaluated(lvlm, data, tmp_path / "one", methods=["fopru", "random"])
    batched = evaluated(lvlm, data, tmp_path / "two", methods=["fopru", "random"], batch_size=2)
    for one, other in zip(report["parts"], batched["parts"], strict=True):
        assert (one["hits"], one["flops"], one["kv_bytes"]) == (other["hits"], other["flops"], other["kv_bytes"])
    with pytest.raises(InvalidInputError, match="batch_size"):
        evaluated(lvlm, data, tmp_path / "three", batch_size=0)
    calls: list[int] = []
    hook = lvlm[0].model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    methods = ["fopru", "random", "vflowopt", "visionzip", "fastv"]
    once = evaluated(lvlm, data, tmp_path / "four", methods=methods, batch_size=2, reuse_tower=True)
    hook.remove()
    assert len(calls) == 2, "each picture goes through the tower once, in two batches"
    anew = evaluated(lvlm, data, tmp_path / "five", methods=methods, batch_size=2)
    assert [row["hits"] for row in once["parts"]] == [row["hits"] for row in anew["parts"]]
    answers = [
        (tmp_path / name / "answers" / "vflowopt-0.25.jsonl").read_text().splitlines()[1:] for name in ("four", "five")
    ]
    texts = [[json.loads(line)["text"] for line in lines] for lines in answers]
    assert texts[0] == texts[1]


def test_published_settings_stand_where_no_ratio_is_given(lvlm: tuple[Any, Any], data: Path) -> None:
    report = evaluate_pruners(
        *lvlm, load_questions(data), methods=["fastv", "random"], keep_ratios=[None], max_new_tokens=1
    )
    assert [(row["method"], row["keep_ratio"], row["kept_tokens"]) for row in report["parts"]] == [
        (UNPRUNED, None, 16),
        ("fastv", None, 8),
        ("random", None, 4),
    ]
    assert winners(report) == []


def test_a_method_of_ones_own_stands_beside_the_others(lvlm: tuple[Any, Any], data: Path) -> None:
    seen: list[Target] = []

    def first_tokens(target: Target) -> Pruner:
        seen.append(target)
        return FoPru(target.keep_ratio or 1.0, queries="cls")

    questions = load_questions(data)
    own = {"own": first_tokens}
    report = evaluate_pruners(
        *lvlm, questions, methods=["fastervlm"], own=own, keep_ratios=[0.5, 0.25], max_new_tokens=2
    )
    rows = {(row["method"], row["keep_ratio"]): row for row in report["parts"]}
    assert seen == [Target(ratio, 4, 1, 16, 16) for ratio in (0.5, 0.25)]
    assert rows["own", 0.25]["hits"] == rows["fastervlm", 0.25]["hits"]
    assert rows["own", 0.25]["kept_tokens"] == 4
    for name in ("fopru", "unpruned", "a+b"):
        with pytest.raises(InvalidInputError, match="something else"):
            evaluate_pruners(*lvlm, questions, own={name: first_tokens})


def test_winners_compare_the_same_questions() -> None:
    def row(method: str, hits: str) -> dict[str, Any]:
        return {"method": method, "keep_ratio": 0.25, "hits": hits, "accuracy": Accuracy.of(map(int, hits)).to_dict()}

    best = row("best", "1" * 40)
    close, worse = row("close", "1" * 39 + "0"), row("worse", "1" * 20 + "0" * 20)
    (found,) = winners({"parts": [worse, close, best]})
    assert (found.best, found.level) == (("best",), ("close",))
    assert str(found) == "at 0.25: best best (100.0 %); not told from close"
    (found,) = winners({"parts": [worse, best]})
    assert str(found) == "at 0.25: best best (100.0 %); ahead of all others"
    (found,) = winners({"parts": [best, {**best, "method": "twin"}]})
    assert str(found) == "at 0.25: best best, twin (100.0 %)"
    assert paired_difference([1, 1, 0, 0], [1, 0, 1, 0])[0] == 0
    low, high = paired_difference([1] * 90 + [0] * 10, [0] * 100)[1:]
    assert 0.8 < low < 0.9 < high < 1
    with pytest.raises(InvalidInputError, match="as many"):
        paired_difference([1], [1, 0])


def test_lab_questions_are_held_out_balanced_and_repeat() -> None:
    found = held_out_questions(14, 32)
    assert {one.kind for one in found} == set(QUESTION_KINDS)
    assert all(one.picture().size == (32, 32) and len(one.answers) == 1 for one in found)
    again = held_out_questions(14, 32)
    assert [one.picture_bytes() for one in found] == [one.picture_bytes() for one in again]
    assert [one.question for one in found] == [one.question for one in again]
    assert [one.question for one in held_out_questions(14, 32, seed=1)] != [one.question for one in found]
    with pytest.raises(InvalidInputError, match="from 1 on"):
        held_out_questions(0, 32)


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
