"""SCOP: rules, captions, reading bad annotations, resumable sharded output, training items."""

from __future__ import annotations

import gzip
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.plain.controllers import select_pairs_plainly
from tests.controllers.conftest import FOLDER
from tests.parity.pipelines import clip_tokenizer
from vistok.controllers.scop import (
    BEST_GENEVAL,
    CONSTRAINTS,
    AnnotationFile,
    ItemDraws,
    ScopDataset,
    ScopEngine,
    Thresholds,
    article,
    caption_of,
    iterate_json_arrays,
    object_positions,
    relations,
    select_pairs,
    square_crop,
    write_masks,
)
from vistok.errors import InvalidInputError

NAMES = ["dog", "cat", "zebra", "umbrella"]


def coco(images: int = 30, seed: int = 0) -> dict[str, Any]:
    draw = random.Random(seed)
    annotations = [
        {
            "id": number,
            "image_id": draw.randrange(images) + 1,
            "category_id": draw.randrange(4) + 1,
            "bbox": [draw.uniform(0, 60), draw.uniform(0, 60), draw.uniform(20, 60), draw.uniform(20, 60)],
            "area": 1.0,
            "iscrowd": 0,
            "segmentation": [[1.0] * 20],
        }
        for number in range(4 * images)
    ]
    return {
        "info": {"year": 2017, "note": 'a "quoted" note, with [brackets] and é'},
        "licenses": [],
        "images": [
            {"id": number + 1, "width": 128, "height": 120, "file_name": f"{number + 1:012d}.png"}
            for number in range(images)
        ],
        "annotations": annotations,
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(NAMES)],
    }


LOOSE = Thresholds(min_area=500, visual_significance=0.1)


def write(folder: Path, content: dict[str, Any], pictures: bool = True) -> tuple[Path, Path]:
    path, images = folder / "instances.json", folder / "pictures"
    path.write_text(json.dumps(content), encoding="utf-8")
    images.mkdir(exist_ok=True)
    for entry in content["images"] if pictures else []:
        Image.new("RGB", (entry["width"], entry["height"]), (entry["id"] % 255, 0, 0)).save(images / entry["file_name"])
    return path, images


def test_the_table_of_pairs_equals_the_plain_rules(tmp_path: Path) -> None:
    path, _ = write(tmp_path, coco(60), pictures=False)
    for thresholds in (Thresholds(), LOOSE, BEST_GENEVAL):
        file = AnnotationFile(path)
        images = file.images()
        records, report = select_pairs(images, file.categories, thresholds)
        plain = [
            (image.boxes[one].number, image.boxes[two].number)
            for image in images
            for one, two in select_pairs_plainly(
                [box.bbox for box in image.boxes],
                [box.category for box in image.boxes],
                image.width,
                image.height,
                thresholds,
            )
        ]
        assert [record.numbers for record in records] == plain
        assert report.kept == len(plain)
        assert report.pairs - sum(report.failed_first.values()) == report.kept
        assert set(report.failed) == set(CONSTRAINTS)
        assert all(
            report.failed_alone[name] <= report.failed_first[name] <= report.failed[name] for name in CONSTRAINTS
        )


def test_relations() -> None:
    assert relations((0, 0, 10, 10), (20, 0, 10, 10)) == (["to the left of"], ["to the right of"])
    assert relations((0, 0, 10, 10), (0, 20, 10, 10)) == (["above"], ["below"])
    assert relations((0, 0, 10, 10), (20, 20, 10, 10)) == (
        ["to the left of and above", "above and to the left of"],
        ["to the right of and below", "below and to the right of"],
    )
    # Ties go to right and below, and equal overlap to the vertical.
    assert relations((0, 0, 10, 10), (0, 0, 10, 10)) == (["below"], ["above"])


def test_captions() -> None:
    assert caption_of("dog", "to the left of and above", "umbrella") == "a photo of a dog left of and above an umbrella"
    assert [
        article(name) for name in ("hourglass", "unicycle", "oven", "x-ray", "TV", "umbrella", "european plate")
    ] == [
        "an hourglass",
        "a unicycle",
        "an oven",
        "an x-ray",
        "a TV",
        "an umbrella",
        "a european plate",
    ]
    assert caption_of("dog", "above", "cat", "{second} under {first} ({relation})") == "a cat under a dog (above)"
    with pytest.raises(InvalidInputError, match=r"no \{relation\}"):
        caption_of("dog", "above", "cat", "{first} {second}")
    with pytest.raises(InvalidInputError, match="without a name"):
        article(" ")


def test_object_positions_skip_the_other_object() -> None:
    ids = [1, 20, 30, 9, 20, 2]  # a teddy bear and a bear: 30 is teddy, 20 is bear
    assert object_positions([1, 30, 20, 9, 20, 2], [[30, 20], [20]], first_match=True) == [[1, 2], [2]]
    assert object_positions([1, 30, 20, 9, 20, 2], [[30, 20], [20]]) == [[1, 2], [4]]
    with pytest.raises(InvalidInputError, match="do not occur"):
        object_positions(ids, [[77]])


def test_streaming_reads_what_json_reads() -> None:
    content = coco(5)
    text = json.dumps(content, indent=1)
    found: dict[str, Any] = {}
    for key, item in iterate_json_arrays(io.StringIO(text)):
        if isinstance(content[key], list):
            found.setdefault(key, []).append(item)
        else:
            found[key] = item
    assert found == {key: value for key, value in content.items() if value != []}
    assert list(iterate_json_arrays(io.StringIO("{}"))) == []
    for broken in (text[: len(text) // 2], "[1, 2]", '{"a": [1,, 2]}', ""):
        with pytest.raises(InvalidInputError):
            list(iterate_json_arrays(io.StringIO(broken)))


def test_pieces_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from vistok.controllers.scop import annotations

    text = '{"a": [1234567, {"b": "x\\"]"}, -1.5e3], "c": 98765}'
    wanted = list(iterate_json_arrays(io.StringIO(text)))
    assert wanted == [("a", 1234567), ("a", {"b": 'x"]'}), ("a", -1500.0), ("c", 98765)]
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(annotations, "_CHUNK", size)
        assert list(iterate_json_arrays(io.StringIO(text))) == wanted


def test_bad_annotations_are_counted_and_skipped(tmp_path: Path) -> None:
    content = coco(3)
    good = len(content["annotations"])
    base = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 30, 30], "id": 999}
    content["annotations"] += [
        {**base, "bbox": [1, 2, 3]},
        {**base, "bbox": [1, 2, float("nan"), 3]},
        {**base, "bbox": "box"},
        {**base, "bbox": [1, 1, 0, 5]},
        {**base, "image_id": 77},
        {**base, "category_id": 88},
        {**base, "bbox": [500, 500, 20, 20]},
        {**base, "bbox": [100, 100, 90, 90]},
        {"id": 5},
        "text",
        None,
    ]
    content["categories"].append({"id": 9, "name": "  "})
    content["images"].append({"id": 50, "width": 0, "height": 3})
    path, _ = write(tmp_path, content, pictures=False)
    file = AnnotationFile(path)
    images = file.images()
    assert sum(len(image.boxes) for image in images) == good + 1
    assert file.problems["box without four finite numbers"] == 2
    assert file.problems["malformed annotation"] == 4
    assert file.problems["box without area"] == 1
    assert file.problems["annotation of an unknown image"] == 1
    assert file.problems["annotation of an unknown category"] == 1
    assert file.problems["box outside of its image"] == 1
    assert file.problems["box beyond the edge of its image (kept)"] >= 1
    assert file.problems["category without a name"] == file.problems["malformed image entry"] == 1
    report = ScopEngine(path, thresholds=LOOSE).run(tmp_path / "out", progress=False)
    assert "malformed annotation" in str(report)


def test_no_annotation_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no annotations at"):
        AnnotationFile(tmp_path / "none.json")
    (tmp_path / "odd.json").write_text('{"images": [{"id": 1}]}')
    with pytest.raises(InvalidInputError, match="no COCO instances file"):
        AnnotationFile(tmp_path / "odd.json").images()
    with pytest.raises(InvalidInputError, match="another split"):
        AnnotationFile(tmp_path)


def test_all_sources_give_the_same_pairs(tmp_path: Path) -> None:
    content = coco(12)
    path, _ = write(tmp_path, content, pictures=False)
    wanted = [record.relations for record in ScopEngine(path, thresholds=LOOSE).records()]
    assert wanted
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "set" / "annotations").mkdir(parents=True)
    (tmp_path / "set" / "annotations" / "instances_val.json").write_bytes(path.read_bytes())
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(path, "annotations/instances_val.json")
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    order = list(dict.fromkeys(entry["image_id"] for entry in content["annotations"]))
    with open(tmp_path / "c.jsonl", "w") as file:
        for image in order:
            boxes = [
                {"name": names[entry["category_id"]], "bbox": entry["bbox"]}
                for entry in content["annotations"]
                if entry["image_id"] == image
            ]
            file.write(json.dumps({"file_name": f"{image}.png", "width": 128, "height": 120, "boxes": boxes}) + "\n")
    for source in ("a.json.gz", "set", "b.zip", "c.jsonl"):
        engine = ScopEngine(tmp_path / source, thresholds=LOOSE, split="val")
        assert [record.relations for record in engine.records()] == wanted, source


def test_a_malformed_line_moves_no_later_annotation(tmp_path: Path) -> None:
    good = {
        "file_name": "b.png",
        "width": 100,
        "height": 100,
        "boxes": [{"name": "cat", "bbox": [0, 0, 10, 10]}, {"name": "dog", "bbox": [50, 50, 20, 20]}],
    }
    bad = {"file_name": "a.png", "boxes": [{"name": "cow", "bbox": [0, 0, 9, 9]}]}  # no size
    (tmp_path / "x.jsonl").write_text("\n".join([json.dumps(bad), "no JSON", json.dumps(good)]) + "\n")
    annotations = AnnotationFile(tmp_path / "x.jsonl")
    (image,) = annotations.images()
    texts = annotations.full({box.number for box in image.boxes})
    assert [texts[box.number] for box in image.boxes] == good["boxes"]
    assert annotations.problems["malformed image entry"] == 2


def test_output_is_resumable_and_shared_among_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pictures = write(tmp_path, coco(20))
    whole = ScopEngine(path, pictures, thresholds=LOOSE, images_per_part=4)
    report = whole.run(tmp_path / "whole", progress=False)
    assert report.kept > 5
    metadata = (tmp_path / "whole" / "metadata.jsonl").read_bytes()
    assert len(metadata.splitlines()) == report.kept
    line = json.loads(metadata.splitlines()[0])
    assert list(line) == ["seq", "file_name", "oros", "annots"]
    assert line["annots"][0]["segmentation"]
    assert (tmp_path / "whole" / line["file_name"]).is_symlink()

    shared = [ScopEngine(path, pictures, thresholds=LOOSE, images_per_part=4, picture="copy") for _ in range(2)]
    shared[1].run(tmp_path / "shared", process=1, processes=2, progress=False)
    assert not (tmp_path / "shared" / "metadata.jsonl").exists()
    total = shared[0].run(tmp_path / "shared", process=0, processes=2, progress=False)
    assert (tmp_path / "shared" / "metadata.jsonl").read_bytes() == metadata
    assert total.to_dict() == report.to_dict()

    original = ScopEngine._write_part

    def stops(self: ScopEngine, out: Path, index: int, *rest: Any) -> None:
        if index == 2:
            raise KeyboardInterrupt
        original(self, out, index, *rest)

    monkeypatch.setattr(ScopEngine, "_write_part", stops)
    with pytest.raises(KeyboardInterrupt):
        whole.run(tmp_path / "stopped", progress=False)
    written: list[int] = []
    monkeypatch.setattr(
        ScopEngine,
        "_write_part",
        lambda self, out, index, *rest: (written.append(index), original(self, out, index, *rest)),
    )
    again = whole.run(tmp_path / "stopped", progress=False)
    assert written == [2, 3, 4]
    assert again.to_dict() == report.to_dict()
    assert (tmp_path / "stopped" / "metadata.jsonl").read_bytes() == metadata
    with pytest.raises(InvalidInputError, match="other thresholds"):
        ScopEngine(path, pictures, images_per_part=4).run(tmp_path / "stopped", progress=False)


def test_missing_pictures_are_counted(tmp_path: Path) -> None:
    path, pictures = write(tmp_path, coco(6))
    complete = ScopEngine(path, pictures, thresholds=LOOSE).run(tmp_path / "all", progress=False)
    first = json.loads((tmp_path / "all" / "metadata.jsonl").read_text().splitlines()[0])["file_name"]
    (pictures / Path(first).name).unlink()
    report = ScopEngine(path, pictures, thresholds=LOOSE).run(tmp_path / "some", progress=False)
    assert report.missing_images >= 1
    assert report.kept + report.missing_images == complete.kept


def test_webdataset_shards(tmp_path: Path) -> None:
    from vistok.data.shards import ShardDataset

    path, pictures = write(tmp_path, coco(6))
    engine = ScopEngine(path, pictures, thresholds=LOOSE, layout="webdataset", images_per_part=3)
    report = engine.run(tmp_path / "shards", progress=False)
    samples = list(ShardDataset(str(tmp_path / "shards" / "pairs-*.tar"), image_size=32))
    assert len(samples) == report.kept
    assert samples[0]["caption"] == caption_of(*samples[0]["json"]["oros"][0])
    with pytest.raises(InvalidInputError, match="say where"):
        ScopEngine(path, layout="webdataset")


def test_crops() -> None:
    left, top, right, bottom = square_crop((30, 40, 10, 10), (60, 40, 10, 10), 100, 100, 1.0)
    assert right - left == bottom - top == 40
    left, top, right, bottom = square_crop((0, 0, 300, 20), (10, 30, 20, 10), 300, 50, 1.1)
    assert 0 <= left < right <= 300
    assert (top, bottom) == (0, 47.5)  # grown after clamping, and clamped again


def test_training_items(tmp_path: Path) -> None:
    path, pictures = write(tmp_path, coco(10))
    out = tmp_path / "out"
    ScopEngine(path, pictures, thresholds=LOOSE).run(out, progress=False)

    def segment(image: Image.Image, bbox: Any) -> np.ndarray:
        mask = np.zeros((image.height, image.width), dtype=bool)
        x, y, w, h = (int(value) for value in bbox)
        mask[y : y + h, x : x + w] = True
        return mask

    data = ScopDataset(out, 32, tokenizer=clip_tokenizer(FOLDER), masks=True, seed=3)
    assert write_masks(out, segment, progress=False) > 0
    assert write_masks(out, segment, progress=False) == 0
    item = data[0]
    again = ScopDataset(out, 32, tokenizer=clip_tokenizer(FOLDER), masks=True, seed=3)[0]
    assert torch.equal(item["pixel_values"], again["pixel_values"])
    assert item["text"] == again["text"]
    assert item["masks"].shape == (2, 32, 32)
    assert item["pixel_values"].shape == (3, 32, 32)
    record = data.records[0]
    image = Image.open(out / record["file_name"]).convert("RGB")
    masks = [Image.new("L", image.size, value) for value in (0, 255)]
    forward = data.item(record, image, masks, ItemDraws(1.0, 0, 1.0))
    backward = data.item(record, image, masks, ItemDraws(1.0, len(record["oros"]) - 1, 1.0))
    assert float(forward["masks"][0].max()) == float(backward["masks"][1].max()) == 0.0
    assert forward["objects"] == backward["objects"][::-1]
    assert len(forward["token_positions"]) == 2
    dropped = data.item(record, image, masks, ItemDraws(1.0, 0, 0.0))
    assert dropped["text"] == ""
    assert dropped["token_positions"] == []
    with pytest.raises(InvalidInputError, match=r"no metadata\.jsonl"):
        ScopDataset(tmp_path)
