"""The oracle reads rendered scenes exactly, imperfect ones nearly so, and nothing out of noise."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from vistok.data import shapes
from vistok.errors import InvalidInputError


def agrees(scene: shapes.Scene, reading: shapes.Reading, attributes=("shape", "colour", "size", "shade")) -> bool:
    """Whether the reading holds the scene's objects, each where it is, with these attributes."""
    if len(scene.objects) != len(reading.objects):
        return False
    for item in scene.objects:
        seen = min(reading.objects, key=lambda other: math.dist(other.centre, item.centre))
        if math.dist(seen.centre, item.centre) > 0.03:
            return False
        if any(getattr(seen, name) != getattr(item, name) for name in attributes):
            return False
    return True


def test_rendered_scenes_are_read_exactly():
    for index in range(60):
        scene = shapes.sample_scene(21, index)
        reading = shapes.read_scene(shapes.render(scene))
        assert agrees(scene, reading), index
        assert reading.confidence > 0.8
        for item in scene.objects:
            seen = min(reading.objects, key=lambda other: math.dist(other.centre, item.centre))
            assert seen.radius == pytest.approx(item.radius, rel=0.03)
            assert seen.tone == pytest.approx(item.tone, abs=0.05)
            assert seen.centre == pytest.approx(item.centre, abs=0.004)
            assert seen.box == pytest.approx(item.box, abs=0.02)
            assert seen.label == item.label
            if item.shape not in ("circle", "ring"):
                assert seen.rotation == pytest.approx(item.rotation, abs=4)


@pytest.mark.parametrize("image_size", [32, 48, 96, 256])
def test_other_sizes_are_read(image_size):
    scenes = [shapes.sample_scene(22, index) for index in range(15)]
    right = sum(agrees(scene, shapes.read_scene(shapes.render(scene, image_size))) for scene in scenes)
    assert right == 15


def _jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=50)
    return np.asarray(Image.open(buffer))


def _noisy(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(int(image.sum())).normal(0.0, 12.0, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "spoil",
    [lambda image: ndimage.gaussian_filter(image, (1.0, 1.0, 0.0)), _jpeg, _noisy],
    ids=["blur", "jpeg", "noise"],
)
def test_imperfect_images_are_read(spoil):
    scenes = [shapes.sample_scene(23, index) for index in range(30)]
    right = [agrees(scene, shapes.read_scene(spoil(shapes.render(scene))), ("shape", "colour")) for scene in scenes]
    assert sum(right) >= 29


def test_confidence_falls_with_quality():
    scene = shapes.scene_for("a large red star", seed=4)
    image = shapes.render(scene)
    noise = np.random.default_rng(0).normal(size=image.shape)
    spoilt = [np.clip(image + deviation * noise, 0, 255).astype(np.uint8) for deviation in (0, 20, 60)]
    confidences = [shapes.read_scene(item).confidence for item in spoilt]
    assert confidences[0] > 0.95
    assert confidences[0] > confidences[1] > confidences[2]


def _nothing() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 64)[:, None, None]
    return {
        "white noise": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        "grey noise": np.clip(rng.normal(128, 40, (64, 64, 3)), 0, 255).astype(np.uint8),
        "faint noise": np.clip(rng.normal(180, 8, (64, 64, 3)), 0, 255).astype(np.uint8),
        "black": np.zeros((64, 64, 3), np.uint8),
        "white": np.full((64, 64, 3), 255, np.uint8),
        "gradient": np.broadcast_to(ramp, (64, 64, 3)).astype(np.uint8),
    }


@pytest.mark.parametrize("name", list(_nothing()))
def test_nothing_is_read_out_of_nothing(name):
    reading = shapes.read_scene(_nothing()[name])
    assert reading.objects == ()
    assert reading.confidence == 0.0
    assert reading.label is None


def test_smooth_noise_earns_no_confidence():
    rng = np.random.default_rng(1)
    confidences = []
    for _ in range(8):
        noise = ndimage.gaussian_filter(rng.normal(size=(64, 64, 3)), (4, 4, 0), mode="wrap")
        image = np.clip(128 + 60 * noise / noise.std(), 0, 255).astype(np.uint8)
        confidences.append(shapes.read_scene(image).confidence)
    assert max(confidences) < 0.5


def test_touching_objects_are_told_apart():
    background = np.full((64, 64, 3), 190.0)
    rows, columns = np.mgrid[:64, :64] + 0.5
    red, blue = (np.hypot(columns - x, rows - 32) < 10 for x in (21, 41))
    image = background.copy()
    image[red], image[blue] = (222, 32, 38), (38, 78, 224)
    reading = shapes.read_scene(image.astype(np.uint8))
    assert sorted((item.colour, item.shape) for item in reading.objects) == [("blue", "circle"), ("red", "circle")]


def test_a_stain_in_the_hole_of_a_ring_is_no_object():
    scene = shapes.scene_for("a large blue ring", seed=2)
    item = scene.objects[0]
    rows, columns = (np.mgrid[:64, :64] + 0.5) / 64
    hole = np.hypot(columns - item.centre[0], rows - item.centre[1]) < 0.4 * item.radius
    image = shapes.render(scene)
    image[hole] = np.clip(image[hole] + np.array([-40.0, 30.0, -40.0]), 0, 255).astype(np.uint8)
    assert [(seen.colour, seen.shape) for seen in shapes.read_scene(image).objects] == [("blue", "ring")]


def test_every_kind_of_image_gives_the_same_reading(tmp_path):
    scene = shapes.scene_for("a large red circle to the left of a small blue star", seed=0)
    image = shapes.render(scene)
    Image.fromarray(image).save(tmp_path / "scene.png")
    expected = shapes.read_scene(image)
    channels_first = np.ascontiguousarray(image.transpose(2, 0, 1))
    tensor = shapes.image_to_tensor(image)
    same = [
        Image.fromarray(image),
        tmp_path / "scene.png",
        channels_first,
        torch.from_numpy(image),
        tensor,
        tensor.numpy(),
    ]
    assert all(shapes.read_scene(item) == expected for item in same)
    assert shapes.read_scenes(torch.stack([tensor, tensor])) == [expected, expected]
    assert shapes.read_scenes([image, tensor]) == [expected, expected]
    assert expected.relation(0, 1) == "left of"
    assert shapes.satisfies("a large red circle to the left of a small blue star", expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64), np.uint8), r"\[3, H, W\]"),
        (np.zeros((3, 8, 8), np.uint8), "at least 16x16"),
        (np.zeros((64, 64, 3), np.float32), r"float images are \[3, H, W\]"),
        (np.zeros((64, 64, 3), np.int64), "uint8"),
        (torch.full((3, 64, 64), float("nan")), "NaN"),
        (object(), "got object"),
    ],
)
def test_bad_images_are_refused(image, message):
    with pytest.raises(InvalidInputError, match=message):
        shapes.read_scene(image)


def test_a_single_image_is_no_batch():
    with pytest.raises(InvalidInputError, match="4 dimensions"):
        shapes.read_scenes(torch.zeros(3, 64, 64))
