"""`vistok prune` and `vistok eval pruners` as users type them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.cli.lvlm import save_lvlm, save_questions
from vistok.cli import main
from vistok.cli.prune import as_seen


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_lvlm(tmp_path_factory.mktemp("lvlm")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return save_questions(tmp_path / "data")


def test_a_question_with_and_without_pruning(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "kept.png"
    arguments = ["prune", model, str(data / "0.png"), "what colour is it", "--max-new-tokens", "3"]
    arguments += ["--method", "fopru+transprune", "--keep-ratio", "0.25", "--repeats", "2", "--output", str(drawn)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["unpruned"]["kept_tokens"] == 16
    assert found["pruned"]["kept_tokens"] == 4
    assert found["pruned"]["flops"] < found["unpruned"]["flops"]
    assert found["pruned"]["kv_bytes"] < found["unpruned"]["kv_bytes"]
    assert found["pruned"]["prefill_seconds"] > 0
    assert [stage["place"] for stage in found["pruned"]["stages"]] == ["tower", *["decoder"] * 3]
    assert found["same_answer"] == (found["unpruned"]["answer"] == found["pruned"]["answer"])
    with Image.open(drawn) as picture:  # the cropped picture and four stages, enlarged from 30 pixels
        assert picture.size == (5 * 330 + 4 * 8, 330)
        first, last = picture.crop((0, 0, 330, 330)), picture.crop((4 * 338, 0, 4 * 338 + 330, 330))
        same = sum(one == two for one, two in zip(first.get_flattened_data(), last.get_flattened_data()))
        assert same / 330**2 == pytest.approx(4 / 16, abs=0.05), "the kept quarter is as bright as before"


def test_the_default_method_is_shown_as_a_table(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prune", model, str(data / "0.png"), "what colour is it", "--max-new-tokens", "2"]
    assert main([*arguments, "--output", str(tmp_path / "kept.png")]) == 0
    printed = capsys.readouterr().out
    assert "transprune" in printed
    assert "TransPrune (decoder layer 3): 2 of 16 tokens" in printed


def test_pruning_errors_are_one_line(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(data / "0.png")
    for arguments, said in (
        ([model, image, "what", "--method", "nonsense"], "no pruning method is called 'nonsense'"),
        ([model, image, "what", "--keep-ratio", "0"], "(0, 1]"),
        ([model, image, " "], "question is empty"),
        ([model, str(tmp_path / "none.png"), "what"], "no image file"),
        ([str(tmp_path), image, "what"], "is no transformers model"),
        ([model, image, "what", "--method", "pooling", "--keep-ratio", "0.5"], "whole cells"),
        ([model, image, "what", "--output", str(tmp_path / "kept")], "--output is a PNG"),
    ):
        assert main(["prune", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert error.count("vistok: ") == 1
        assert said in error.splitlines()[-1], arguments


def test_an_evaluation_writes_table_json_and_plot(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["eval", "pruners", "--model", model, "--data", str(data), "--max-new-tokens", "2", "-o", str(out)]
    arguments += ["--keep-ratio", "0.25", "--keep-ratio", "0.5"]
    assert main([*arguments, "--method", "random", "--method", "fopru+transprune", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["parts"]) == 5
    assert json.loads((out / "report.json").read_text()) == report
    with Image.open(out / "pareto.png") as picture:
        assert picture.width > 500
    assert main([*arguments, "--method", "random", "--method", "pooling"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "at 0.25: " in printed
    assert "skipped pooling at 0.5: pooling averages whole cells" in printed


def test_an_interruption_keeps_what_is_finished(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vistok.metrics.pruning import UNPRUNED, Asker

    original = Asker.ask_all

    def ask(self: Asker, asked: list, method: str = UNPRUNED, *rest: float) -> object:
        if method == "random":
            raise KeyboardInterrupt
        return original(self, asked, method, *rest)

    arguments = ["eval", "pruners", "--model", model, "--data", str(data), "--max-new-tokens", "2", "--json"]
    arguments += ["--method", "fopru", "--method", "random", "--keep-ratio", "0.5", "-o", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(Asker, "ask_all", ask)
        assert main(arguments) == 130
    printed = capsys.readouterr()
    first = json.loads(printed.out)
    assert [row["method"] for row in first["parts"]] == ["unpruned", "fopru"]
    assert "the same command goes on" in printed.err
    assert main(arguments) == 0
    second = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in second["parts"]] == ["unpruned", "fopru", "random"]
    assert second["parts"][1]["prefill_seconds"] == first["parts"][1]["prefill_seconds"], "not measured again"


def test_the_lab_world_needs_no_folder(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "pruners", "--model", model, "--data", "shapes", "--num-samples", "3", "--max-new-tokens", "1"]
    arguments += ["--method", "random", "--keep-ratio", "0.5", "--batch-size", "2", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["questions"] == 3
    assert set(report["parts"][1]["by_kind"]) == {"colour", "shape", "size"}
    assert report["parts"][1]["kept_tokens"] == 8
    assert main(arguments) == 0
    assert "at 0.5: best random" in capsys.readouterr().out


def test_evaluation_errors_are_one_line(model: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--data", str(data / "none")], "is no folder"),
        (["--data", str(data), "--questions", str(data / "none")], "no questions at"),
        (["--data", str(data), "--method", "nonsense"], "no pruning method"),
        (["--data", str(data), "--keep-ratio", "1.5"], "(0, 1]"),
        (["--data", str(data), "--match", "nearly"], "exact or contains"),
    ):
        assert main(["eval", "pruners", "--model", model, *arguments]) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1, error
        assert said in error[0], arguments


def test_the_picture_is_drawn_as_the_tower_saw_it() -> None:
    wide = Image.new("RGB", (80, 40))
    crop = SimpleNamespace(do_center_crop=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    assert as_seen(wide, SimpleNamespace(image_processor=crop)).size == (40, 40)
    tiles = SimpleNamespace(**vars(crop), image_grid_pinpoints=[[28, 56]])
    assert as_seen(wide, SimpleNamespace(image_processor=tiles)).size == (80, 40)
    padded = type("LlavaImageProcessor", (), {"do_pad": True})()
    assert as_seen(wide, SimpleNamespace(image_processor=padded)).size == (80, 80)
