"""Data order is a function of (seed, number): any batch can be drawn again, by any process, in any worker."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.photographs import PHOTOGRAPHS, open_photograph
from vistok.data.shapes import render, sample_scene
from vistok.data.shards import write_shards
from vistok.errors import InvalidInputError
from vistok.tokens import VisualTokens
from vistok.training.recipe import FolderRecipe, ShapesImagesRecipe, ShapesTokensRecipe, ShardsRecipe
from vistok.training.sources import (
    Epochs,
    FolderImages,
    ShapesImages,
    ShapesTokens,
    ShardImages,
    StepBatches,
    encode_scenes,
)


def numbers(first: int, last: int) -> np.ndarray:
    return np.arange(first, last, dtype=np.int64)


def shapes(**changes) -> ShapesImagesRecipe:
    return ShapesImagesRecipe(**{"source": "shapes-images", "image_size": 16, **changes})


def test_epochs_are_permutations_and_differ():
    order = Epochs(7, seed=3)
    drawn = order(numbers(0, 21)).reshape(3, 7)
    assert all(sorted(row) == list(range(7)) for row in drawn)
    assert not (drawn[0] == drawn[1]).all()
    # Drawn again out of order, across an epoch's end, by another object.
    assert (Epochs(7, seed=3)(numbers(5, 9)) == drawn.reshape(-1)[5:9]).all()
    assert not (Epochs(7, seed=4)(numbers(0, 21)).reshape(3, 7) == drawn).all()


def test_scenes_and_crops_depend_on_their_number_alone():
    source = ShapesImages(shapes(photo_ratio=0.5), seed=1)
    whole = source.batch(numbers(0, 12))["images"]
    assert whole.dtype == torch.uint8
    assert whole.shape == (12, 3, 16, 16)
    again = pickle.loads(pickle.dumps(source)).batch(numbers(4, 9))["images"]
    assert torch.equal(again, whole[4:9])
    assert not torch.equal(ShapesImages(shapes(photo_ratio=0.5), seed=2).batch(numbers(0, 12))["images"], whole)


def test_a_pool_repeats_its_scenes_in_new_order():
    source = ShapesImages(shapes(scenes=5), seed=1)
    first, second = (source.batch(numbers(5 * k, 5 * k + 5))["images"] for k in range(2))
    assert sorted(picture.sum().item() for picture in first) == sorted(picture.sum().item() for picture in second)
    assert torch.from_numpy(render(sample_scene(1, 0, (1, 3)), 16)).permute(2, 0, 1).tolist() in first.tolist()


def test_annotations_describe_the_same_scenes():
    from vistok.metrics.features import scene_targets

    batch = ShapesImages(shapes(annotations=True), seed=1).batch(numbers(3, 6))
    expected = scene_targets([sample_scene(1, number, (1, 3)) for number in range(3, 6)])
    assert torch.equal(batch["objects"], expected)


def test_held_out_photographs_are_not_opened(monkeypatch):
    opened = []
    monkeypatch.setattr(
        "vistok.training.sources.open_photograph", lambda name: opened.append(name) or open_photograph("coffee")
    )
    ShapesImages(shapes(photo_ratio=1.0, held_out_photos=("coffee", "chelsea")), seed=0)
    assert set(opened) == set(PHOTOGRAPHS) - {"coffee", "chelsea"}
    with pytest.raises(InvalidInputError, match="coffe'"):
        ShapesImages(shapes(held_out_photos=("coffe",)), seed=0)
    with pytest.raises(InvalidInputError, match="no photograph to train on"):
        ShapesImages(shapes(photo_ratio=1.0, held_out_photos=PHOTOGRAPHS), seed=0)


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_processes_and_accumulation_only_divide_the_step(accumulation, processes):
    class Numbers:
        def batch(self, given):
            return {"numbers": given}

    for step in range(3):
        seen = [
            StepBatches(Numbers(), 8, accumulation, rank, processes)[step * accumulation + part]["numbers"]
            for part in range(accumulation)
            for rank in range(processes)
        ]
        assert np.concatenate(seen).tolist() == list(range(step * 8, step * 8 + 8))


class FakeTokenizer(torch.nn.Module):
    """Ids that tell the mean brightness of the quarters of an image."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.calls = 0

    def encode(self, images: torch.Tensor) -> VisualTokens:
        self.calls += 1
        means = torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)
        return VisualTokens(ids=((means + 1) * 50).long(), grid=(2, 2))


def test_tokens_are_encoded_once_and_belong_to_their_scenes(tmp_path):
    recipe = ShapesTokensRecipe(source="shapes-tokens", image_size=16, scenes=10, condition="class")
    device, tokenizer, progress = torch.device("cpu"), FakeTokenizer(), []
    folder = encode_scenes(
        recipe, tokenizer, 5, tmp_path, device=device, batch_size=4, on_progress=lambda *state: progress.append(state)
    )
    assert progress == [(4, 10), (8, 10), (10, 10)]
    calls = tokenizer.calls
    captions = ShapesTokensRecipe(source="shapes-tokens", image_size=16, scenes=10, condition="caption")
    assert encode_scenes(captions, tokenizer, 5, tmp_path, device=device) == folder
    assert tokenizer.calls == calls
    assert encode_scenes(recipe, FakeTokenizer(0.5), 5, tmp_path, device=device) != folder
    assert encode_scenes(recipe, tokenizer, 6, tmp_path, device=device) != folder

    source = ShapesTokens(folder, recipe, seed=0)
    chosen = source.order(numbers(3, 8))
    batch = pickle.loads(pickle.dumps(source)).batch(numbers(3, 8))
    scenes = [sample_scene(5, number, (1, 1)) for number in chosen.tolist()]
    assert batch["labels"].tolist() == [scene.label for scene in scenes]
    images = torch.stack([torch.from_numpy(render(scene, 16)).permute(2, 0, 1).float() / 127.5 - 1 for scene in scenes])
    assert torch.equal(batch["ids"], tokenizer.encode(images).ids)
    texts = ShapesTokens(folder, captions, seed=0).batch(numbers(3, 8))["captions"]
    assert all(scene.objects[0].shape in text for scene, text in zip(scenes, texts))
    later = ShapesTokens(folder, captions, seed=0).batch(numbers(0, 40))["captions"]
    assert len(set(later)) > 10  # other words for the same scenes in other epochs


def write_folder(root: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(6):
        path = root / ("cats" if number % 2 else "dogs") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 30 + number, 3), dtype=np.uint8)).save(path)


def test_folders_give_crops_with_classes(tmp_path):
    write_folder(tmp_path)
    source = FolderImages(FolderRecipe(source="folder", path=str(tmp_path), image_size=16), seed=0)
    assert source.class_names == ("cats", "dogs")
    batch = source.batch(numbers(0, 6))
    assert batch["images"].shape == (6, 3, 16, 16)
    assert sorted(batch["labels"].tolist()) == [0, 0, 0, 1, 1, 1]
    again = source.batch(numbers(2, 4))
    assert torch.equal(again["images"], batch["images"][2:4])
    assert torch.equal(again["labels"], batch["labels"][2:4])
    # The same pictures in the next epoch are cropped anew.
    assert not torch.equal(source.batch(numbers(6, 12))["images"].sum(), batch["images"].sum())


def test_shards_are_read_at_any_position(tmp_path):
    samples = [
        {"image": Image.new("RGB", (24, 20), (number * 20, 0, 0)), "caption": f"shade {number}"} for number in range(5)
    ]
    write_shards(samples, tmp_path / "part-%02d.tar", samples_per_shard=3)
    recipe = ShardsRecipe(source="shards", pattern=str(tmp_path / "part-{00..01}.tar"), image_size=8)
    source = ShardImages(recipe, seed=0)
    batch = source.batch(numbers(0, 5))
    assert sorted(batch["captions"]) == [f"shade {number}" for number in range(5)]
    assert batch["valid"].tolist() == [1.0] * 5
    for text, picture in zip(batch["captions"], batch["images"]):
        assert picture[0].float().mean() == int(text.split()[1]) * 20
    assert torch.equal(pickle.loads(pickle.dumps(source)).batch(numbers(3, 4))["images"], batch["images"][3:4])


def test_damaged_shards(tmp_path):
    (tmp_path / "a.txt").write_text("a picture")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
        archive.add(tmp_path / "a.txt", "a.txt")
    source = ShardImages(ShardsRecipe(source="shards", pattern=str(tmp_path / "bad.tar"), image_size=8), seed=0)
    batch = source.batch(numbers(0, 2))
    assert batch["valid"].tolist() == [0.0, 0.0]
    assert batch["images"].shape == (2, 3, 8, 8)
    (tmp_path / "torn.tar").write_bytes(b"\1" * 700)
    with pytest.raises(InvalidInputError, match=r"torn\.tar cannot be read"):
        ShardImages(ShardsRecipe(source="shards", pattern=str(tmp_path / "torn.tar"), image_size=8), seed=0)
