from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.errors import InvalidInputError
from vistok.tokenizers.transforms import center_crop, random_crop, ten_crop, to_tensor, to_uint8


def picture(height: int, width: int) -> Image.Image:
    rows, cols = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 / max(height - 1, 1), cols * 255 / max(width - 1, 1), np.zeros_like(rows)], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.mark.parametrize("size", [(150, 211), (48, 48), (10, 7), (300, 40)])
def test_center_crop_has_the_asked_size_and_keeps_the_centre(size: tuple[int, int]) -> None:
    crop = center_crop(picture(*size), 32)
    assert crop.size == (32, 32)
    pixels = np.asarray(crop).astype(float)
    assert abs(pixels[15:17, 15:17, 0].mean() - 127.5) < 12
    assert abs(pixels[15:17, 15:17, 1].mean() - 127.5) < 12


def test_center_crop_of_a_rectangle() -> None:
    crop = center_crop(picture(100, 100), (16, 48))
    assert crop.size == (48, 16)
    pixels = np.asarray(crop).astype(float)
    assert pixels[:, 0, 1].mean() < 10  # the whole width
    assert pixels[0, :, 0].mean() > 70  # the middle third of the height
    with pytest.raises(InvalidInputError, match="at least 1x1"):
        center_crop(picture(8, 8), 0)


def test_random_crops_stay_inside_and_repeat_with_the_seed() -> None:
    image = picture(90, 120)
    crops = [random_crop(image, 32, rng=random.Random(seed)) for seed in range(20)]
    assert {crop.size for crop in crops} == {(32, 32)}
    assert len({crop.tobytes() for crop in crops}) > 10
    assert random_crop(image, 32, rng=random.Random(3)).tobytes() == crops[3].tobytes()
    with pytest.raises(InvalidInputError, match="min_fraction"):
        random_crop(image, 32, min_fraction=0.0)


def test_ten_crop_is_five_views_and_their_mirrors() -> None:
    views = [np.asarray(view) for view in ten_crop(picture(100, 100), 40)]
    assert len(views) == 10
    assert {view.shape for view in views} == {(40, 40, 3)}
    # The mirror's top left is the mirrored top right.
    assert np.array_equal(views[5], views[1][:, ::-1])
    assert np.array_equal(views[6], views[0][:, ::-1])
    assert np.array_equal(views[9], views[4][:, ::-1])
    with pytest.raises(InvalidInputError, match="crop_range"):
        ten_crop(picture(100, 100), 40, crop_range=0.9)


def test_every_pixel_value_survives_the_round_trip() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    tensor = to_tensor(Image.fromarray(values))
    assert tensor.shape == (3, 16, 16)
    assert float(tensor.min()) == -1.0
    assert float(tensor.max()) == 1.0
    assert np.array_equal(to_uint8(tensor[None])[0].numpy(), values)


def test_uint8_conversion_clamps_and_rounds_like_the_published_evaluation() -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 0.0039, 1.0, 7.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
