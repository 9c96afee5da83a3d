"""Fixed position vectors of sines and cosines, on a line or on a video's grid. Letters: N places, D channels."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.errors import InvalidInputError

__all__ = ["plane_sinusoids", "sinusoids", "video_sinusoids"]


def sinusoids(places: Tensor, size: int, base: float = 10000.0) -> Tensor:
    """Sines, then cosines, of p * base^(-2 k / D), k = 0 .. D/2 - 1.

    Args:
        places: p, any real numbers, [N].
        size: D, even.
        base: the longest wavelength is 2 pi times this, about.

    Returns:
        float32 [N, D], computed in float64.
    """
    if size % 2:
        raise InvalidInputError(f"sines and cosines need an even number of channels; got {size}")
    channel = torch.arange(size // 2, dtype=torch.float64, device=places.device)
    angles = places.double()[:, None] * base ** (-2.0 * channel / size)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def plane_sinusoids(places: Tensor, size: int) -> Tensor:
    """A vector for each place on a plane, whose halves stand for its column and its row.

    Args:
        places: (row, column), any real numbers, [N, 2].
        size: D, divisible by 4.

    Returns:
        float32 [N, D].
    """
    if size % 4:
        raise InvalidInputError(f"sines and cosines of rows and columns need channels divisible by 4; got {size}")
    return torch.cat([sinusoids(places[:, 1], size // 2), sinusoids(places[:, 0], size // 2)], dim=1)


def video_sinusoids(grid: tuple[int, int, int], size: int) -> Tensor:
    """Sum of a vector for the frame and one for the cell, whose halves stand for its column and its row.

    Args:
        grid: (frames, rows, cols).
        size: D, divisible by 4.

    Returns:
        float32 [N, D] in raster order (frame, row, column).
    """
    frames, rows, cols = grid
    time = sinusoids(torch.arange(frames), size)[:, None, None]
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    return (time + plane_sinusoids(places, size).view(rows, cols, -1)).flatten(0, 2)
