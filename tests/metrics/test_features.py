from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vistok.data.shapes import COLOURS, SHAPES, sample_scene
from vistok.errors import InvalidInputError
from vistok.metrics.evaluate import held_out_images
from vistok.metrics.features import ShapesFeatures, scene_targets


def test_targets_list_the_objects_from_left_to_right() -> None:
    scenes = [sample_scene(0, index) for index in range(30)]
    targets = scene_targets(scenes)
    assert targets.shape == (30, 3, 6)
    for scene, rows in zip(scenes, targets):
        count = len(scene.objects)
        assert (rows[count:] == -1).all()
        across = rows[:count, 4]
        assert torch.equal(across, across.sort().values)
        told = {(int(row[0]), int(row[1])) for row in rows[:count]}
        assert told == {(SHAPES.index(item.shape), COLOURS.index(item.colour)) for item in scene.objects}


def test_shipped_size_is_small_and_any_image_size_is_read() -> None:
    model = ShapesFeatures()
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    tiny = ShapesFeatures.tiny()
    for size in (32, 64, 96):
        assert tiny(torch.zeros(2, 3, size, size)).shape == (2, 16)
    seen = tiny.read(torch.zeros(2, 3, 64, 64))
    assert {kind: tuple(value.shape) for kind, value in seen.items()} == {
        "shape": (2, 3, 9),
        "colour": (2, 3, 8),
        "size": (2, 3, 2),
        "shade": (2, 3, 3),
        "position": (2, 3, 2),
        "count": (2, 3),
    }


def test_features_do_not_depend_on_the_batch() -> None:
    model = ShapesFeatures.tiny()
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    assert torch.allclose(model(images)[1:2], model(images[1:2]), atol=1e-5)


def test_training_learns_scenes() -> None:
    torch.manual_seed(0)
    model = ShapesFeatures.tiny().train()
    scenes = [sample_scene(0, index) for index in range(24)]
    batch = {"images": held_out_images(scenes, 64), "objects": scene_targets(scenes)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        found = model.training_loss(batch)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append({name: float(value.detach()) for name, value in found.items()})
    assert losses[-1]["loss"] < 0.6 * losses[0]["loss"]
    assert losses[-1]["position"] < 0.5 * losses[0]["position"]
    for kind in ("shape", "colour", "size", "shade", "count"):
        assert losses[-1][kind] < losses[0][kind], kind


def test_saving_and_loading_keeps_the_features(tmp_path: Path) -> None:
    model = ShapesFeatures.tiny()
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(ShapesFeatures.from_pretrained(tmp_path).eval()(images), model(images))


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"\[B, 3, H, W\]"):
        ShapesFeatures.tiny()(torch.zeros(2, 1, 64, 64))
    with pytest.raises(InvalidInputError, match="multiple of 8"):
        ShapesFeatures(base_channels=12)
