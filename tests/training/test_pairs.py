"""Pairs of lab objects, captioned by the data engine, with its filters and without."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vistok
from vistok.data.shapes import sample_scene
from vistok.errors import InvalidInputError
from vistok.training.pairs import ShapesPairs, annotated, open_pairs, scaled_thresholds, scene_pairs
from vistok.training.recipe import ShapesPairsRecipe, parse_recipe

CPU = torch.device("cpu")


def pairs_recipe(**changes: Any) -> ShapesPairsRecipe:
    values: dict[str, Any] = {"filtered": True, "scenes": 40, "image_size": 16}
    return ShapesPairsRecipe("shapes-pairs", **{**values, **changes})


def test_every_pair_without_filters_and_fewer_with_them() -> None:
    scenes, triples, report = scene_pairs(pairs_recipe(filtered=False, image_size=64), 3)
    counts = [len(sample_scene(3, number, (2, 3)).objects) for number in range(40)]
    assert len(triples) == len(scenes) == sum(count * (count - 1) // 2 for count in counts) == report.pairs
    kept = scene_pairs(pairs_recipe(image_size=64), 3)
    assert 0 < len(kept[1]) < len(triples)
    assert {(scene, tuple(found)) for scene, found in zip(kept[0], kept[1])} <= {
        (scene, tuple(found)) for scene, found in zip(scenes, triples)
    }


def test_the_size_of_pictures_does_not_change_the_choice() -> None:
    assert scene_pairs(pairs_recipe(image_size=64), 5)[1] == scene_pairs(pairs_recipe(image_size=256), 5)[1]
    assert scaled_thresholds(512).min_area == 1024


def test_what_is_said_is_true() -> None:
    scenes, triples, _ = scene_pairs(pairs_recipe(filtered=False, image_size=64), 0)
    for scene, found in zip(scenes, triples, strict=True):
        objects = {f"{item.colour} {item.shape}": item.centre for item in sample_scene(0, scene, (2, 3)).objects}
        for first, relation, second in found:
            (ax, ay), (bx, by) = objects[first], objects[second]
            assert ("left" not in relation) or ax < bx
            assert ("right" not in relation) or ax >= bx
            assert ("above" not in relation) or ay < by
            assert ("below" not in relation) or ay >= by


def test_boxes_are_the_scenes_own() -> None:
    scene = sample_scene(0, 1, 2)
    image = annotated(scene, 64, 1)
    assert [box.category for box in image.boxes] == [item.label for item in scene.objects]
    left, top, width, height = image.boxes[0].bbox
    assert (left / 64, top / 64, (left + width) / 64, (top + height) / 64) == pytest.approx(scene.objects[0].box)


def test_batches_are_a_function_of_their_numbers(tmp_path: Path) -> None:
    tokenizer = vistok.load("kl.tiny")
    filtered = open_pairs(pairs_recipe(), tokenizer, 0, tmp_path, device=CPU)
    every = open_pairs(pairs_recipe(filtered=False), tokenizer, 0, tmp_path, device=CPU)
    assert len(list(tmp_path.iterdir())) == 1  # both read the same encoded scenes
    assert len(filtered.scenes) < len(every.scenes)
    numbers = np.arange(6, dtype=np.int64)
    first, again = filtered.batch(numbers), pickle.loads(pickle.dumps(filtered)).batch(numbers)
    assert first["captions"] == again["captions"]
    assert torch.equal(first["moments"], again["moments"])
    assert first["moments"].shape == (6, 8, 8, 8)
    assert all(text.startswith("a photo of a") and "to the" not in text for text in first["captions"])
    later = filtered.batch(numbers + 50 * len(filtered.scenes))
    assert first["captions"] != later["captions"]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="KL tokenizer"):
        open_pairs(pairs_recipe(), vistok.load("vq.tiny"), 0, tmp_path, device=CPU)
    unclear = next(seed for seed in range(99) if not scene_pairs(pairs_recipe(scenes=1), seed)[1])
    with pytest.raises(InvalidInputError, match="no pair"):
        ShapesPairs(tmp_path, pairs_recipe(scenes=1), unclear)
    values = {"name": "x", "model": {"system": "text-to-image"}, "steps": 1, "batch_size": 1}
    with pytest.raises(InvalidInputError, match="needs the field tokenizer"):
        parse_recipe({**values, "data": {"source": "shapes-pairs", "filtered": True, "scenes": 4}})
    with pytest.raises(InvalidInputError, match="between 2 and 3"):
        parse_recipe({**values, "data": {"source": "shapes-pairs", "filtered": True, "scenes": 4, "objects": [1, 2]}})
