"""The renderer: scenes to pixels, anti-aliased by signed distances that are computed in each object's box only.

Letters: H, W image height and width, h, w height and width of an object's box in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from vistok.data.shapes import scene as world
from vistok.data.shapes.scene import Scene, SceneObject
from vistok.errors import InvalidInputError

Array = np.ndarray


def _circle(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y) - 1.0


def _ring(x: Array, y: Array) -> Array:
    middle, half = (1.0 + world.RING_INNER) / 2, (1.0 - world.RING_INNER) / 2
    return np.abs(np.sqrt(x * x + y * y) - middle) - half


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - world.SQUARE_HALF


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x) * (math.sqrt(3.0) / 2.0) + y * 0.5, -y) - 0.5


def _diamond(x: Array, y: Array) -> Array:
    a, b = world.DIAMOND_HALF
    steep = 1.0 / math.hypot(1.0 / a, 1.0 / b)
    return np.abs(x) * (steep / a) + np.abs(y) * (steep / b) - steep


def _star(x: Array, y: Array) -> Array:
    # Fold the plane into one half point: angle from the nearest tip, in [0, 36] degrees.
    sector = 2.0 * math.pi / 5.0
    angle = np.arctan2(x, y) / sector
    angle = np.abs(angle - np.rint(angle)) * sector
    length = np.sqrt(x * x + y * y)
    # The edge runs from the tip (0, 1) to the notch; its outward normal gives the signed distance.
    notch_x, notch_y = world.STAR_INNER * math.sin(sector / 2), world.STAR_INNER * math.cos(sector / 2)
    normal_x, normal_y = 1.0 - notch_y, notch_x
    norm = math.hypot(normal_x, normal_y)
    # normal . (length sin(angle), length cos(angle)) = length * norm * cos(angle - phase)
    return length * np.cos(angle - math.atan2(normal_x, normal_y)) - normal_y / norm


def _heart(x: Array, y: Array) -> Array:
    half = world.HEART_HALF
    x, y = np.abs(x), y + world.HEART_DROP
    corner = (x + np.abs(y) - half) * math.sqrt(0.5)
    disc = np.sqrt((x - half / 2) ** 2 + (y - half / 2) ** 2) - half * math.sqrt(0.5)
    return np.minimum(corner, disc)


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - world.CROSS_HALF_WIDTH, np.maximum(x, y) - world.CROSS_HALF_LENGTH)


SIGNED_DISTANCES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}
"""Signed distance of each unit shape, y upwards; negative inside. Exact along edges, which is where pixels blend."""


@lru_cache(maxsize=16)
def _pixel_centres(image_size: int) -> Array:
    return (np.arange(image_size, dtype=np.float32) + 0.5) / image_size


def coverage(item: SceneObject, image_size: int) -> tuple[slice, slice, Array]:
    """Rows, columns and [h, w] float32 share of each pixel that the object covers, in its box."""
    x0, y0, x1, y1 = item.box
    rows = slice(max(0, int(y0 * image_size) - 1), min(image_size, int(y1 * image_size) + 2))
    columns = slice(max(0, int(x0 * image_size) - 1), min(image_size, int(x1 * image_size) + 2))
    centres = _pixel_centres(image_size)
    across = (centres[columns] - np.float32(item.centre[0])) * np.float32(1.0 / item.radius)
    up = (np.float32(item.centre[1]) - centres[rows]) * np.float32(1.0 / item.radius)
    cos, sin = math.cos(math.radians(item.rotation)), math.sin(math.radians(item.rotation))
    x = across * np.float32(cos) + (up * np.float32(sin))[:, None]
    y = across * np.float32(-sin) + (up * np.float32(cos))[:, None]
    share = SIGNED_DISTANCES[item.shape](x, y)
    share *= np.float32(-item.radius * image_size)
    share += np.float32(0.5)
    np.clip(share, 0.0, 1.0, out=share)
    return rows, columns, share


def render(scene: Scene, image_size: int = 64) -> Array:
    """Pixels of a scene.

    Args:
        scene: what to draw.
        image_size: side of the square image in pixels, at least 8.

    Returns:
        uint8 [H, W, 3].
    """
    if image_size < 8:
        raise InvalidInputError(f"image_size must be at least 8 pixels, got {image_size}")
    offsets = _pixel_centres(image_size) - np.float32(0.5)
    ground = scene.background
    base = np.array([ground.base, ground.slope_x, ground.slope_y], dtype=np.float32)
    across = base[0] + offsets[:, None] * base[1]
    down = offsets[:, None] * base[2]
    # + 0.5: the final cast to uint8 truncates. Flat rows [H, 3W] keep numpy's inner loop long.
    image = (np.tile(down + np.float32(0.5), (1, image_size)) + across.reshape(1, -1)).reshape(
        image_size, image_size, 3
    )
    for item in scene.objects:
        rows, columns, share = coverage(item, image_size)
        patch = image[rows, columns]
        colour = np.array(item.rgb, dtype=np.float32) + np.float32(0.5)
        patch += share[:, :, None] * (colour - patch)
    return image.astype(np.uint8)
