"""Fixed position vectors, against their definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vistok.errors import InvalidInputError
from vistok.nn.positions import sinusoids, video_sinusoids


def waves(place: int, size: int, base: float = 10000.0) -> list[float]:
    angles = [place * base ** (-2 * index / size) for index in range(size // 2)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def test_a_line() -> None:
    for base in (10000.0, 50.0):
        table = sinusoids(torch.arange(1500), 12, base)
        assert table.dtype == torch.float32
        for place in (0, 1, 7, 1499):
            assert table[place].tolist() == pytest.approx(waves(place, 12, base), abs=1e-6)


def test_a_video() -> None:
    table = video_sinusoids((2, 3, 4), 8)
    assert table.shape == (24, 8)
    for index, (frame, row, col) in enumerate(itertools.product(range(2), range(3), range(4))):
        cell = waves(col, 4) + waves(row, 4)
        expected = [time + place for time, place in zip(waves(frame, 8), cell)]
        assert table[index].tolist() == pytest.approx(expected, abs=1e-6)


def test_odd_widths_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="even"):
        sinusoids(torch.arange(3), 7)
    with pytest.raises(InvalidInputError, match="divisible by 4"):
        video_sinusoids((1, 1, 1), 6)
