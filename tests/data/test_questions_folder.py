"""Questions about lab scenes as a folder that `vistok eval pruners --data` reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vistok.cli import main
from vistok.data.shapes import QUESTION_KINDS, questions, render, sample_scene, write_questions
from vistok.errors import InvalidInputError
from vistok.metrics.pruning import load_questions


def test_pictures_and_questions_belong_together(tmp_path: Path) -> None:
    file = write_questions(tmp_path / "asked", 28, seed=7)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert Counter(line["kind"] for line in lines) == dict.fromkeys(QUESTION_KINDS, 4)
    for line in lines:
        scene = sample_scene(7, int(Path(line["image"]).stem))
        true = {item.text: item for item in questions(scene)}[line["question"]]
        assert (line["answer"], tuple(line["choices"])) == (true.answer, true.choices)
        with Image.open(file.parent / line["image"]) as picture:
            assert np.array_equal(np.asarray(picture), render(scene, 64))
    read = load_questions(file.parent)
    assert [item.answers[0] for item in read] == [line["answer"] for line in lines]
    again = write_questions(tmp_path / "again", 28, seed=7)
    assert again.read_text() == file.read_text()


def test_several_questions_share_a_picture(tmp_path: Path) -> None:
    file = write_questions(tmp_path, 12, per_image=4, num_objects=3, kinds=("colour", "count"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 12
    assert {line["kind"] for line in lines} == {"colour", "count"}
    assert len(list(tmp_path.glob("*.png"))) == len({line["image"] for line in lines}) < 12
    assert len({(line["image"], line["question"]) for line in lines}) == 12


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="weight"):
        write_questions(tmp_path / "a", 3, kinds=("weight",))
    with pytest.raises(InvalidInputError, match="from 1 on"):
        write_questions(tmp_path / "a", 0)
    with pytest.raises(InvalidInputError, match="no question of the kind relation"):
        write_questions(tmp_path / "a", 3, num_objects=1, kinds=("relation",))
    assert not (tmp_path / "a" / "questions.jsonl").exists()
    write_questions(tmp_path / "b", 1)
    with pytest.raises(InvalidInputError, match="exists"):
        write_questions(tmp_path / "b", 1)


def test_the_command_writes_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "asked"
    assert main(["data", "questions", str(folder), "--num", "5", "--seed", "3", "--kind", "where"]) == 0
    assert "5 questions" in capsys.readouterr().out
    assert len(load_questions(folder)) == 5
    assert main(["data", "questions", str(folder), "--num", "5", "--json"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["data", "questions", str(tmp_path / "more"), "--num", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 2
