"""`vistok scop` as users type it."""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.controllers.test_scop import coco, write
from vistok.cli import main
from vistok.cli.scop import parse_shard
from vistok.controllers.scop import BEST_GENEVAL, CONSTRAINTS, ScopEngine, Thresholds
from vistok.errors import InvalidInputError

LOOSE = ["--min-area", "500", "--visual-significance", "0.1"]
THRESHOLDS = Thresholds(min_area=500, visual_significance=0.1)


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, str]:
    path, images = write(tmp_path, coco(30))
    return str(path), str(images)


def scop(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["scop", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[int], str]:
    def message(code: int) -> str:
        captured = capsys.readouterr()
        assert code == 2
        assert captured.err.startswith("vistok: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return message


def test_a_folder_as_the_engine_writes_it(
    data: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = scop(capsys, data[0], str(tmp_path / "out"), "--images", data[1], *LOOSE, "--images-per-part", "7")
    expected = ScopEngine(*data, thresholds=THRESHOLDS, images_per_part=7).run(tmp_path / "expected")
    assert {name: report[name] for name in expected.to_dict()} == expected.to_dict()
    assert report["thresholds"] == asdict(THRESHOLDS)
    assert report["complete"] is True
    assert report["parts_written"] == report["parts"] == -(-report["images"] // 7)
    assert report["pairs"] - sum(report["failed_first"].values()) == report["kept"] > 0
    written = (tmp_path / "out" / "metadata.jsonl").read_text()
    assert written == (tmp_path / "expected" / "metadata.jsonl").read_text()
    names = {json.loads(line)["file_name"] for line in written.splitlines()}
    assert all((tmp_path / "out" / name).is_file() for name in names)


def test_the_statistics_are_printed_as_a_table(
    data: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scop", data[0], str(tmp_path / "out"), *LOOSE]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\d+ +\d+ +\d+$", printed, re.MULTILINE) for name in CONSTRAINTS)
    assert "no pictures were looked for" in printed
    assert re.search(r"out: \d+ pairs in \d+ images, complete", printed)
    assert not (tmp_path / "out" / "images").exists()


def test_defaults_are_the_specified_thresholds(
    data: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scop(capsys, data[0], str(tmp_path / "a"))["thresholds"] == asdict(Thresholds())
    best = scop(capsys, data[0], str(tmp_path / "b"), "--preset", "best-geneval", "--size-balance", "0.25")
    assert best["thresholds"] == {**asdict(BEST_GENEVAL), "size_balance": 0.25}
    assert main(["scop", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for value in asdict(Thresholds()).values():
        assert f"[default: ({value})]" in shown


def test_shards_together_make_the_whole(
    data: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [data[0], str(tmp_path / "out"), "--images", data[1], *LOOSE, "--images-per-part", "4"]
    partial = [scop(capsys, *options, "--shard", f"{index}/3") for index in (2, 0, 1)]
    assert [part["complete"] for part in partial] == [False, False, True]
    assert partial[0]["parts_written"] < partial[1]["parts_written"] < partial[2]["parts_written"]
    whole = scop(capsys, data[0], str(tmp_path / "whole"), "--images", data[1], *LOOSE, "--images-per-part", "4")
    assert (tmp_path / "out/metadata.jsonl").read_bytes() == (tmp_path / "whole/metadata.jsonl").read_bytes()
    assert partial[2]["failed"] == whole["failed"]


def test_webdataset_shards(data: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = scop(capsys, data[0], str(tmp_path / "out"), "--images", data[1], "--layout", "webdataset", *LOOSE)
    with tarfile.open(tmp_path / "out" / "pairs-00000.tar") as tar:
        names = tar.getnames()
    assert len(names) == 3 * report["kept"]
    assert {name.rsplit(".", 1)[1] for name in names} == {"png", "json", "txt"}


def test_a_coco_folder_brings_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, images = write(tmp_path, coco(10))
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    path.rename(tmp_path / "coco" / "annotations" / "instances_val.json")
    images.rename(tmp_path / "coco" / "val")
    report = scop(capsys, str(tmp_path / "coco"), str(tmp_path / "out"), "--split", "val", *LOOSE)
    assert report["images_from"] == str(tmp_path / "coco" / "val")
    assert list((tmp_path / "out" / "images").iterdir())
    bare = scop(capsys, str(tmp_path / "coco"), str(tmp_path / "bare"), "--split", "val", "--picture", "none", *LOOSE)
    assert bare["images_from"] is None
    assert bare["kept"] == report["kept"]
    assert not (tmp_path / "bare" / "images").exists()


def test_an_interrupted_run_continues(
    data: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [data[0], str(tmp_path / "out"), "--images", data[1], *LOOSE, "--images-per-part", "5"]
    original = ScopEngine._write_part
    seen: list[int] = []

    def write_part(self: Any, out: Path, index: int, *rest: Any) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(index)
        original(self, out, index, *rest)

    monkeypatch.setattr(ScopEngine, "_write_part", write_part)
    assert main(["scop", *options]) == 130
    error = capsys.readouterr().err
    assert re.search(r"2 of \d parts are written", error)
    assert "Traceback" not in error
    monkeypatch.setattr(ScopEngine, "_write_part", original)
    report = scop(capsys, *options)
    assert report["complete"] is True
    ScopEngine(*data, thresholds=THRESHOLDS, images_per_part=5).run(tmp_path / "expected")
    assert (tmp_path / "out/metadata.jsonl").read_bytes() == (tmp_path / "expected/metadata.jsonl").read_bytes()


def test_shard() -> None:
    assert parse_shard("0/4") == (0, 4)
    assert parse_shard("3/4") == (3, 4)
    for wrong in ("", "4/4", "0/0", "-1/4", "1", "1/2/3", "a/b"):
        with pytest.raises(InvalidInputError, match="INDEX/COUNT"):
            parse_shard(wrong)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shard", "4/4"], "INDEX/COUNT"),
        (["--layout", "parquet"], "webdataset"),
        (["--layout", "webdataset"], "pictures"),
        (["--picture", "paint"], "copy"),
        (["--preset", "mine"], "best-geneval"),
        (["--outside", "crop"], "skip"),
        (["--size-balance", "-1"], "thresholds"),
        (["--size-balance", "nan"], "thresholds"),
        (["--images", "absent"], "absent"),
        (["--images-per-part", "0"], "images-per-part"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(
    options: list[str], said: str, data: tuple[str, str], tmp_path: Path, refused: Callable[[int], str]
) -> None:
    assert said in refused(main(["scop", data[0], str(tmp_path / "out"), *options]))
    assert not (tmp_path / "out").exists()


def _zip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations/instances_train2017.json", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.json", None, "no annotations"),
        ("empty.json", b"", "truncated"),
        ("list.json", b"[]", "no annotation file"),
        ("cut.json", json.dumps(coco(3)).encode()[:900], "truncated"),
        ("other.json", b'{"images": [], "annotations": []}', "categories"),
        ("latin.jsonl", b"\xff\xfe\n", "UTF-8"),
        ("damaged.json.gz", b"\x1f\x8b\x08\x00\x00", "damaged"),
        ("cut.zip", _zip(json.dumps(coco(3)).encode())[:200], "damaged"),
        ("strange.zip", _zip(b"[]").replace(b"instances_train", b"instances_xrain"), "instances_train2017"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_bad_annotations_are_one_line(
    name: str, content: bytes | None, said: str, tmp_path: Path, refused: Callable[[int], str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in refused(main(["scop", str(tmp_path / name), str(tmp_path / "out")]))


def test_malformed_entries_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = coco(10)
    content["annotations"] += [{"id": 1}, {"image_id": 1, "category_id": 1, "bbox": [0, 0, -5, 5]}]
    content["annotations"].append({"image_id": 1, "category_id": 99, "bbox": [0, 0, 50, 50]})
    path, _ = write(tmp_path, content, pictures=False)
    problems = scop(capsys, str(path), str(tmp_path / "out"), *LOOSE)["problems"]
    assert problems["malformed annotation"] == 1
    assert problems["box without area"] == 1
    assert problems["annotation of an unknown category"] == 1


def test_other_settings_need_another_folder(
    data: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[int], str]
) -> None:
    scop(capsys, data[0], str(tmp_path / "out"))
    assert "other thresholds" in refused(main(["scop", data[0], str(tmp_path / "out"), *LOOSE]))
    assert "is a file" in refused(main(["scop", data[0], data[0]]))
    (tmp_path / "out" / "settings.json").write_text("{")
    assert "damaged" in refused(main(["scop", data[0], str(tmp_path / "out")]))
