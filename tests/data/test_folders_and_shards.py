"""Folders and shards of images: labels, captions, and what happens to damaged files."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vistok.data import ImageFolder, ShardDataset, shapes, write_shards
from vistok.errors import InvalidInputError


def _picture(path, colour, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def classes(tmp_path):
    for number in range(3):
        _picture(tmp_path / "cat" / f"{number}.png", (250, 0, 0))
        _picture(tmp_path / "dog" / "deep" / f"{number}.jpg", (0, 0, 250))
    return tmp_path


def test_subfolders_are_classes(classes):
    dataset = ImageFolder(classes, 16)
    assert dataset.class_names == ("cat", "dog")
    assert [dataset[index]["label"] for index in range(6)] == [0, 0, 0, 1, 1, 1]
    image = dataset[0]["image"]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert image[0].mean() == pytest.approx(250 / 127.5 - 1, abs=0.01)
    assert image[1].mean() == pytest.approx(-1)
    batch = next(iter(DataLoader(dataset, 6, num_workers=1)))
    assert batch["image"].shape == (6, 3, 16, 16)
    with pytest.raises(IndexError):
        dataset[6]


def test_the_centre_is_cropped_and_small_images_grow(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = ImageFolder(tmp_path, 20)[0]["image"]
    assert image.shape == (3, 20, 20)
    assert image[:, :, 3:-3].min() > 0.9


def test_captions_beside_images_and_in_metadata(tmp_path):
    _picture(tmp_path / "a.png", (1, 2, 3))
    _picture(tmp_path / "sub" / "b.png", (1, 2, 3))
    _picture(tmp_path / "c.png", (1, 2, 3))
    (tmp_path / "a.txt").write_text("a red\n circle\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "sub/b.png", "text": "a blue star"}\n')
    with pytest.warns(UserWarning, match="1 of 3 images .* no caption"):
        dataset = ImageFolder(tmp_path, 16)
    assert [dataset[index]["caption"] for index in range(2)] == ["a red circle", "a blue star"]
    assert set(ImageFolder(tmp_path, 16, labels="none")[0]) == {"image"}


@pytest.mark.parametrize("line", ['{"text": "x"}', "not json", '{"file_name": "gone.png", "text": "x"}'])
def test_bad_metadata_names_the_line(tmp_path, line):
    _picture(tmp_path / "a.png", (1, 2, 3))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    with pytest.raises(InvalidInputError, match="line 2"):
        ImageFolder(tmp_path, 16)


def test_unreadable_images_are_skipped_and_counted(classes):
    (classes / "cat" / "1.png").write_bytes(b"")
    (classes / "cat" / "3.png").write_bytes(b"no image at all")
    dataset = ImageFolder(classes, 16)
    with pytest.warns(UserWarning, match=r"skipped an image \(1 so far\).*empty"):
        item = dataset[1]
    assert item["label"] == 0
    assert list(dataset.unreadable) == [classes / "cat" / "1.png"]
    with pytest.warns(UserWarning, match="2 so far"):
        assert dataset.check() == 2
    assert len(dataset) == 5


def test_a_folder_of_ruins_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(InvalidInputError, match="none of the 1 images"):
        ImageFolder(tmp_path, 16)[0]
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(InvalidInputError, match="none of the 1 images"):
        ImageFolder(tmp_path, 16).check()


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="no folder"):
        ImageFolder(tmp_path / "gone")
    with pytest.raises(InvalidInputError, match="holds no images"):
        ImageFolder(tmp_path)
    _picture(tmp_path / "a.png", (1, 2, 3))
    with pytest.raises(InvalidInputError, match="lies in no class folder"):
        ImageFolder(tmp_path, labels="classes")
    with pytest.raises(InvalidInputError, match="holds no captions"):
        ImageFolder(tmp_path, labels="captions")
    with pytest.raises(InvalidInputError, match="labels must be"):
        ImageFolder(tmp_path, labels="both")


# ---------------------------------------------------------------------------------------------------------- shards
def _write(tmp_path, count=10, **options):
    dataset = shapes.ShapesDataset(count, seed=1, image_size=32)
    samples = ({**dataset[index], "json": {"index": index}} for index in range(count))
    return dataset, write_shards(samples, tmp_path / "train-%03d.tar", samples_per_shard=4, **options)


def test_shards_give_back_what_was_written(tmp_path):
    dataset, paths = _write(tmp_path)
    assert [path.name for path in paths] == ["train-000.tar", "train-001.tar", "train-002.tar"]
    for pattern in (tmp_path / "train-*.tar", str(tmp_path / "train-{000..002}.tar"), paths):
        items = list(ShardDataset(pattern, 32))
        assert [item["json"]["index"] for item in items] == list(range(10))
    for index, item in enumerate(items):
        assert torch.equal(item["image"], dataset[index]["image"])
        assert item["label"] == dataset[index]["label"]
        assert item["caption"] == dataset[index]["caption"]


@pytest.mark.parametrize("image_format", ["webp", "jpg"])
def test_other_image_formats(tmp_path, image_format):
    dataset, paths = _write(tmp_path, 3, image_format=image_format)
    items = list(ShardDataset(paths, 32))
    error = (items[2]["image"] - dataset[2]["image"]).abs().mean()
    assert error == 0 if image_format == "webp" else error < 0.05


def test_each_worker_reads_its_own_shards(tmp_path):
    _, paths = _write(tmp_path)
    loader = DataLoader(ShardDataset(paths, 32), batch_size=None, num_workers=2)
    assert sorted(item["json"]["index"] for item in loader) == list(range(10))


def test_shuffling_is_reproducible(tmp_path):
    _, paths = _write(tmp_path)
    orders = [
        [item["json"]["index"] for item in ShardDataset(paths, 32, shuffle_buffer=8, seed=seed)] for seed in (0, 0, 1)
    ]
    assert sorted(orders[0]) == list(range(10))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_damaged_samples_are_skipped(tmp_path):
    path = tmp_path / "bad.tar"
    picture = tmp_path / "good.png"
    _picture(picture, (10, 200, 10))
    (tmp_path / "bad.png").write_bytes(b"broken")
    (tmp_path / "words.txt").write_text("no image here")
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "bad.png", "0.png")
        archive.add(tmp_path / "words.txt", "1.txt")
        archive.add(picture, "2.png")
    dataset = ShardDataset(path, 16)
    with pytest.warns(UserWarning, match="skipped a sample"):
        items = list(dataset)
    assert len(items) == 1
    assert dataset.unreadable == 2


def test_truncated_shards_yield_what_they_hold(tmp_path):
    _, paths = _write(tmp_path, 4)
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="skipped a sample"):
        items = list(ShardDataset(paths, 32))
    assert 0 < len(items) < 4


def test_a_failing_writer_leaves_no_half_shard(tmp_path):
    def samples():
        yield {"image": Image.new("RGB", (8, 8))}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(samples(), tmp_path / "x-%d.tar")
    assert list(tmp_path.iterdir()) == []


def test_bad_shard_arguments_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="no shard at"):
        ShardDataset(tmp_path / "gone.tar")
    with pytest.raises(InvalidInputError, match="no shard at"):
        ShardDataset(tmp_path / "*.tar")
    with pytest.raises(InvalidInputError, match="pattern needs a number"):
        write_shards([], tmp_path / "x.tar")
    with pytest.raises(InvalidInputError, match="no samples"):
        write_shards([], tmp_path / "x-%d.tar")
    with pytest.raises(InvalidInputError, match="has no image"):
        write_shards([{"label": 1}], tmp_path / "x-%d.tar")
    with pytest.raises(InvalidInputError, match=r"\[3, H, W\]"):
        write_shards([{"image": torch.zeros(1, 8, 8)}], tmp_path / "x-%d.tar")
    with pytest.raises(InvalidInputError, match="image_format"):
        write_shards([], tmp_path / "x-%d.tar", image_format="bmp")


def test_metadata_is_json_of_one_line_each(tmp_path):
    _picture(tmp_path / "a.png", (1, 2, 3))
    rows = [{"file_name": "a.png", "caption": "a star"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert ImageFolder(tmp_path, 16)[0]["caption"] == "a star"
