"""Scenes of the lab world: what is in a picture, sampled from a seed, with exact annotations.

A scene holds one to three objects that never touch, on a soft planar background. Scene `index` of seed `seed` is a pure
function of these two numbers (a counter-based Philox stream keyed by both), whatever the order, the worker or the rank
that asks for it.

Coordinates are fractions of the image side: x grows to the right, y grows downwards, (0, 0) is the top left corner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vistok.errors import InvalidInputError

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES: tuple[str, ...] = ("small", "large")
SHADES: tuple[str, ...] = ("light", "plain", "dark")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
INVERSE_RELATIONS: dict[str, str] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}

CLASS_NAMES: tuple[str, ...] = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

MAX_OBJECTS = 3
MAX_ROTATION = 20.0
"""Objects turn by at most this many degrees either way, so that a square never passes for a diamond."""

RADIUS_RANGES: dict[str, tuple[float, float]] = {"small": (0.13, 0.155), "large": (0.19, 0.215)}
"""Radius of the circle around an object, as a fraction of the image side."""
SIZE_BOUNDARY = 0.1725

TONE_RANGES: dict[str, tuple[float, float]] = {"light": (0.6, 0.9), "plain": (-0.12, 0.12), "dark": (-0.9, -0.6)}
"""Tone: +1 is the palest, 0 the pure colour, -1 the darkest."""
TONE_BOUNDARY = 0.36

GAP = 0.05
"""Least distance between the circles around two objects."""
MARGIN = 0.03
"""Least distance between the circle around an object and the image border."""
RELATION_DOMINANCE = 1.5
"""A relation holds along an axis when the centres lie this many times further apart on it than on the other axis."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 38),
    "orange": (248, 136, 16),
    "yellow": (246, 222, 26),
    "green": (40, 168, 58),
    "cyan": (16, 192, 208),
    "blue": (38, 78, 224),
    "purple": (128, 44, 198),
    "pink": (244, 62, 160),
}
_LIGHTEST = 0.5  # share of white at tone +1
_DARKEST = 0.55  # share of black at tone -1


def object_rgb(colour: str, tone: float) -> tuple[float, float, float]:
    """RGB in [0, 255] of a colour at a tone in [-1, 1]."""
    red, green, blue = PALETTE[colour]
    if tone >= 0.0:
        share = _LIGHTEST * tone
        return red + (255 - red) * share, green + (255 - green) * share, blue + (255 - blue) * share
    share = 1.0 + _DARKEST * tone
    return red * share, green * share, blue * share


def size_name(radius: float) -> str:
    """`"small"` or `"large"` for a radius given as a fraction of the image side."""
    return "large" if radius >= SIZE_BOUNDARY else "small"


def shade_name(tone: float) -> str:
    """`"light"`, `"plain"` or `"dark"` for a tone in [-1, 1]."""
    if tone >= TONE_BOUNDARY:
        return "light"
    return "dark" if tone <= -TONE_BOUNDARY else "plain"


# --------------------------------------------------------------------------------------------------------- outlines
# Each shape lies in the unit circle, y upwards. Polygons are listed by their corners, the heart as a bottom corner and
# two discs; the renderer uses the same numbers.
SQUARE_HALF = math.sqrt(0.5)
DIAMOND_HALF = (0.6, 1.0)
STAR_INNER = 0.44
CROSS_HALF_WIDTH = 0.32
CROSS_HALF_LENGTH = math.sqrt(1.0 - CROSS_HALF_WIDTH**2)
RING_INNER = 0.5
# A square standing on its corner with half diagonal k and two half discs on its upper sides, lowered by `HEART_DROP`
# so that the circle around it is centred: k + t = |(k/2, k/2 - t)| + k / sqrt(2) solved for t.
HEART_HALF = 0.7929
HEART_DROP = 0.2071


@lru_cache(maxsize=1)
def _corners() -> dict[str, np.ndarray]:
    def polar(degrees: float, length: float = 1.0) -> tuple[float, float]:
        return length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))

    long, wide = CROSS_HALF_LENGTH, CROSS_HALF_WIDTH
    points = {
        "square": [(x, y) for x in (-SQUARE_HALF, SQUARE_HALF) for y in (-SQUARE_HALF, SQUARE_HALF)],
        "triangle": [polar(90 + 120 * k) for k in range(3)],
        "star": [polar(90 + 72 * k) for k in range(5)],
        "diamond": [(DIAMOND_HALF[0], 0.0), (-DIAMOND_HALF[0], 0.0), (0.0, 1.0), (0.0, -1.0)],
        "cross": [(s * a, t * b) for s in (-1, 1) for t in (-1, 1) for a, b in ((long, wide), (wide, long))],
    }
    return {name: np.array(corners, dtype=np.float64) for name, corners in points.items()}


def outline_extent(shape: str, rotation: float) -> tuple[float, float, float, float]:
    """Tight box (left, top, right, bottom) of a unit shape turned by `rotation` degrees, y downwards, centred at 0."""
    if shape in ("circle", "ring"):
        return -1.0, -1.0, 1.0, 1.0
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    if shape == "heart":
        disc = HEART_HALF / math.sqrt(2.0)
        parts = [(0.0, -HEART_HALF - HEART_DROP, 0.0)]
        parts += [(side * HEART_HALF / 2, HEART_HALF / 2 - HEART_DROP, disc) for side in (-1, 1)]
        turned = [(cos * x - sin * y, -(sin * x + cos * y), r) for x, y, r in parts]
        return (
            min(x - r for x, _, r in turned),
            min(y - r for _, y, r in turned),
            max(x + r for x, _, r in turned),
            max(y + r for _, y, r in turned),
        )
    x, y = _corners()[shape].T
    across, down = cos * x - sin * y, -(sin * x + cos * y)
    return float(across.min()), float(down.min()), float(across.max()), float(down.max())


# ---------------------------------------------------------------------------------------------------------- scenes
@dataclass(frozen=True)
class SceneObject:
    """One object.

    Attributes:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        size: `"small"` or `"large"`, the name of `radius`.
        shade: `"light"`, `"plain"` or `"dark"`, the name of `tone`.
        radius: radius of the circle around the object, fraction of the image side.
        tone: -1 (darkest) to 1 (palest).
        rotation: degrees, counter-clockwise as seen.
        centre: (x, y) of the circle around the object, fractions of the image side.
    """

    shape: str
    colour: str
    size: str
    shade: str
    radius: float
    tone: float
    rotation: float
    centre: tuple[float, float]

    @property
    def label(self) -> int:
        """Class index in [0, 64): colour * 8 + shape, the index into `CLASS_NAMES`."""
        return COLOURS.index(self.colour) * len(SHAPES) + SHAPES.index(self.shape)

    @property
    def rgb(self) -> tuple[float, float, float]:
        """Colour in [0, 255]."""
        return object_rgb(self.colour, self.tone)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Tight box (x0, y0, x1, y1), fractions of the image side."""
        left, top, right, bottom = outline_extent(self.shape, self.rotation)
        x, y = self.centre
        return (x + left * self.radius, y + top * self.radius, x + right * self.radius, y + bottom * self.radius)


@dataclass(frozen=True)
class Background:
    """A planar gradient: `base` RGB at the image centre, `slope_x` and `slope_y` RGB change over the whole side."""

    base: tuple[float, float, float]
    slope_x: tuple[float, float, float]
    slope_y: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """What one picture shows: `objects` in the order in which captions name them, on a `background`."""

    objects: tuple[SceneObject, ...]
    background: Background

    @property
    def label(self) -> int:
        """Class index of the first object."""
        return self.objects[0].label

    def relation(self, first: int, second: int) -> str | None:
        """How object `first` lies relative to object `second`, or None if they lie diagonally."""
        return relation_between(self.objects[first].centre, self.objects[second].centre)

    def relations(self) -> list[tuple[int, str, int]]:
        """All true (first, relation, second) triples, each pair in both directions."""
        found = []
        for first in range(len(self.objects)):
            for second in range(len(self.objects)):
                if first != second and (name := self.relation(first, second)) is not None:
                    found.append((first, name, second))
        return found

    def annotation(self, image_size: int = 64, image_id: int = 0) -> dict[str, Any]:
        """COCO-style dictionary: image, annotations with pixel boxes `[x, y, width, height]`, categories, relations."""
        annotations = []
        for number, item in enumerate(self.objects):
            x0, y0, x1, y1 = (value * image_size for value in item.box)
            annotations.append(
                {
                    "id": image_id * MAX_OBJECTS + number,
                    "image_id": image_id,
                    "category_id": item.label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "attributes": {
                        "shape": item.shape,
                        "colour": item.colour,
                        "size": item.size,
                        "shade": item.shade,
                        "rotation": item.rotation,
                        "radius": item.radius * image_size,
                        "tone": item.tone,
                    },
                }
            )
        return {
            "images": [{"id": image_id, "width": image_size, "height": image_size}],
            "annotations": annotations,
            "categories": [
                {"id": number, "name": name, "supercategory": name.split()[1]}
                for number, name in enumerate(CLASS_NAMES)
            ],
            "relations": [
                {
                    "image_id": image_id,
                    "subject": image_id * MAX_OBJECTS + first,
                    "relation": name,
                    "object": image_id * MAX_OBJECTS + second,
                }
                for first, name, second in self.relations()
            ],
        }


def relation_between(first: tuple[float, float], second: tuple[float, float]) -> str | None:
    """How centre `first` lies relative to centre `second`: one of `RELATIONS`, or None if neither axis dominates."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) >= RELATION_DOMINANCE * abs(dy) and dx != 0.0:
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= RELATION_DOMINANCE * abs(dx) and dy != 0.0:
        return "above" if dy < 0 else "below"
    return None


# -------------------------------------------------------------------------------------------------------- sampling
class _Draws:
    """Uniform numbers of one scene's Philox stream as plain floats (numpy scalars would cost more than the draw)."""

    def __init__(self, seed: int, index: int) -> None:
        self.generator = np.random.Generator(np.random.Philox(key=seed | (index << 64)))
        self._numbers = iter(self.generator.random(40).tolist())

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        number = next(self._numbers, None)
        if number is None:
            self._numbers = iter(self.generator.random(40).tolist())
            number = next(self._numbers)
        return low + (high - low) * number

    def choice(self, options: Sequence[Any]) -> Any:
        return options[int(self.uniform() * len(options))]


_SHADE_DRAW = ("plain", "plain", "light", "dark")
_Fixed = str | Sequence[str | None] | None


def sample_scene(
    seed: int,
    index: int = 0,
    num_objects: int | tuple[int, int] | None = None,
    *,
    shape: _Fixed = None,
    colour: _Fixed = None,
    size: _Fixed = None,
    shade: _Fixed = None,
    relation: str | None = None,
) -> Scene:
    """Scene `index` of the stream `seed`.

    No two objects of a scene share both shape and colour unless the arguments ask for it. Two objects always lie
    clearly beside or above each other; of three objects, pairs may lie diagonally (then `Scene.relation` is None).

    Args:
        seed: stream of scenes, 0 <= seed < 2**64.
        index: number of the scene in the stream, 0 <= index < 2**64.
        num_objects: how many objects, or an inclusive range; None draws 1 to 3.
        shape, colour, size, shade: fixes an attribute of the first object, or, given a sequence, of each object in turn
            (None leaves it free).
        relation: where the first object lies relative to the second; needs two or three objects.

    Raises:
        InvalidInputError: for unknown names, numbers out of range, or three large objects (they do not fit).
    """
    low, high = _object_range(num_objects)
    if not (0 <= seed < 2**64 and 0 <= index < 2**64):
        raise InvalidInputError(f"seed and index must lie in [0, 2**64), got seed={seed}, index={index}")
    draws = _Draws(seed, index)
    count = low + int(draws.uniform() * (high - low + 1))
    if relation is not None:
        if relation not in RELATIONS:
            raise InvalidInputError(f"unknown relation {relation!r}; known: {', '.join(RELATIONS)}")
        if low < 2:
            raise InvalidInputError(f"relation={relation!r} needs at least two objects, got num_objects={num_objects}")
    shapes = _fixed("shape", shape, SHAPES, count)
    colours = _fixed("colour", colour, COLOURS, count)
    sizes = _fixed("size", size, SIZES, count)
    shades = _fixed("shade", shade, SHADES, count)
    kinds: list[tuple[str, str]] = []
    for number in range(count):
        kind = (shapes[number] or draws.choice(SHAPES), colours[number] or draws.choice(COLOURS))
        while kind in kinds and not (shapes[number] and colours[number]):
            kind = (shapes[number] or draws.choice(SHAPES), colours[number] or draws.choice(COLOURS))
        kinds.append(kind)
    names = [given or draws.choice(SIZES) for given in sizes]
    if count == 3 and names.count("large") == 3:
        free = [number for number in range(3) if sizes[number] is None]
        if not free:
            raise InvalidInputError("three large objects do not fit into one scene; make at least one of them small")
        names[free[-1]] = "small"
    radii = [draws.uniform(*RADIUS_RANGES[name]) for name in names]
    centres = _place(draws, radii, relation)
    objects = []
    for number in range(count):
        shade_now = shades[number] or draws.choice(_SHADE_DRAW)
        objects.append(
            SceneObject(
                shape=kinds[number][0],
                colour=kinds[number][1],
                size=names[number],
                shade=shade_now,
                radius=radii[number],
                tone=draws.uniform(*TONE_RANGES[shade_now]),
                rotation=draws.uniform(-MAX_ROTATION, MAX_ROTATION),
                centre=centres[number],
            )
        )
    return Scene(tuple(objects), _background(draws))


def sample_scenes(seed: int, count: int, start: int = 0, **fixed: Any) -> Iterator[Scene]:
    """Scenes `start` to `start + count - 1` of the stream `seed`; `fixed` are the arguments of `sample_scene`."""
    for index in range(start, start + count):
        yield sample_scene(seed, index, **fixed)


def _object_range(num_objects: int | tuple[int, int] | None) -> tuple[int, int]:
    if num_objects is None:
        return 1, MAX_OBJECTS
    low, high = (num_objects, num_objects) if isinstance(num_objects, int) else tuple(num_objects)
    if not 1 <= low <= high <= MAX_OBJECTS:
        raise InvalidInputError(
            f"num_objects must be a number from 1 to {MAX_OBJECTS} or a range (low, high) of such, got {num_objects!r}"
        )
    return low, high


def _fixed(name: str, given: _Fixed, known: tuple[str, ...], count: int) -> tuple[str | None, ...]:
    if given is None:
        return (None,) * count
    values = (given,) if isinstance(given, str) else tuple(given)
    for value in values:
        if value is not None and value not in known:
            raise InvalidInputError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    return (*values, *(None,) * count)[:count]


def _place(draws: _Draws, radii: list[float], relation: str | None) -> list[tuple[float, float]]:
    """Centres at which objects of these radii keep `MARGIN` to the border, `GAP` to each other and the relation."""
    if len(radii) == 1:
        edge = radii[0] + MARGIN
        return [(draws.uniform(edge, 1.0 - edge), draws.uniform(edge, 1.0 - edge))]
    if len(radii) == 2:
        return _place_two(draws, radii, relation or draws.choice(RELATIONS))
    radius = np.array(radii)
    lowest = (radius + MARGIN)[:, None]
    least = np.array([radii[a] + radii[b] + GAP for a, b in _PAIRS]) ** 2
    while True:
        centres = lowest + (1.0 - 2.0 * lowest) * draws.generator.random((64, 3, 2))
        apart = centres[:, _PAIR_FIRST] - centres[:, _PAIR_SECOND]
        fits = ((apart * apart).sum(-1) >= least).all(-1)
        for candidate in np.flatnonzero(fits):
            chosen = [(x, y) for x, y in centres[candidate].tolist()]
            if relation is None or relation_between(chosen[0], chosen[1]) == relation:
                return chosen


_PAIRS = ((0, 1), (0, 2), (1, 2))
_PAIR_FIRST = np.array([0, 0, 1])
_PAIR_SECOND = np.array([1, 2, 2])


def _place_two(draws: _Draws, radii: list[float], relation: str) -> list[tuple[float, float]]:
    ahead, behind = (0, 1) if relation in ("left of", "above") else (1, 0)  # ahead: the smaller coordinate
    low = [radius + MARGIN for radius in radii]
    distance = draws.uniform(radii[0] + radii[1] + GAP, 1.0 - low[0] - low[1])
    along_ahead = draws.uniform(low[ahead], 1.0 - low[behind] - distance)
    along = [0.0, 0.0]
    along[ahead], along[behind] = along_ahead, along_ahead + distance
    across_ahead = draws.uniform(low[ahead], 1.0 - low[ahead])
    # Half the distance along the axis at most: the relation then holds with room to spare (`RELATION_DOMINANCE`).
    across_behind = draws.uniform(
        max(low[behind], across_ahead - 0.5 * distance), min(1.0 - low[behind], across_ahead + 0.5 * distance)
    )
    across = [0.0, 0.0]
    across[ahead], across[behind] = across_ahead, across_behind
    if relation in ("left of", "right of"):
        return [(along[0], across[0]), (along[1], across[1])]
    return [(across[0], along[0]), (across[1], along[1])]


def _background(draws: _Draws) -> Background:
    grey = draws.uniform(158.0, 214.0)
    base = (
        grey + draws.uniform(-9.0, 9.0),
        grey + draws.uniform(-9.0, 9.0),
        grey + draws.uniform(-9.0, 9.0),
    )
    angle, strength = draws.uniform(0.0, 2.0 * math.pi), draws.uniform(4.0, 26.0)
    across, down = strength * math.cos(angle), strength * math.sin(angle)
    tint = (draws.uniform(0.8, 1.2), draws.uniform(0.8, 1.2), draws.uniform(0.8, 1.2))
    return Background(
        base,
        (across * tint[0], across * tint[1], across * tint[2]),
        (down * tint[0], down * tint[1], down * tint[2]),
    )
