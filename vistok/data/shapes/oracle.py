"""The oracle: reads the objects of a lab scene back from an image, by analysis through synthesis and without learning.

1. Fit the planar background to the frame of the image, then to every pixel that lies near that plane.
2. Objects are the connected regions that differ from it; colours that touch are split.
3. Of each region, the share of object colour in every pixel (its coverage) is compared with a bank of all shapes at all
   rotations, in a frame normalised by area and centroid.
4. The best shapes are rendered and refined (centre, radius, rotation, blur) by Gauss-Newton; least error wins.
5. Solving for the colour that explains the pixels best under that coverage gives colour and tone.

Blur is part of the fit and the expected energy of noise is taken off the error, so that blur, noise, a lossy codec or a
tokenizer cost confidence before they cost the answer.

Letters: B images, H, W image height and width, h, w height and width of a window around one object, S the working size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from vistok.data.shapes.render import SIGNED_DISTANCES
from vistok.data.shapes.scene import (
    COLOURS,
    MAX_ROTATION,
    RADIUS_RANGES,
    SHAPES,
    object_rgb,
    outline_extent,
    relation_between,
    shade_name,
    size_name,
)
from vistok.errors import InvalidInputError
from vistok.files import open_image

Array = np.ndarray
ImageLike: TypeAlias = Array | torch.Tensor | Image.Image | str | Path

WORKING_SIZE = 64
_FAINTEST = 22.0  # least RGB distance from the background that counts as an object; sampled scenes keep 46
_LEAST_CONTRAST = 32.0  # the same for the colour of a whole object
_SMALLEST_AREA = 24  # pixels at the working size; the smallest sampled object covers 83
_RADII = (0.06, 0.32)  # what may pass for an object, fraction of the side
_GOOD_ERROR = 0.06  # below this a region is not split
_ACCEPT_ERROR = 0.22  # share of coverage energy left unexplained above which a region is not an object
_LEAST_CONFIDENCE = 0.02  # readings below this are nothing
_LEAST_LIKENESS = 0.85  # correlation with the best template; rendered scenes reach 0.97
_TURNS = tuple(range(-30, 31, 5))
_BLURS = (0.02, 0.1, 0.2)  # of the bank, in the same unit as its frame
_NOISY = 4.0  # noise from which detection smooths first, with a Gaussian of one pixel
_SMOOTHED = 0.3  # share of the noise that survives that
_BANK_SIDE, _BANK_REACH = 24, 1.15  # the bank's frame, in units of the square root of the object's area


@dataclass(frozen=True)
class SeenObject:
    """One object that the oracle found; attributes as in `SceneObject`, measured.

    `confidence` in [0, 1] falls with the coverage that the shape leaves unexplained, with how well a second shape
    would do, and with the distance of the colour from the palette.
    """

    shape: str
    colour: str
    size: str
    shade: str
    radius: float
    tone: float
    rotation: float
    centre: tuple[float, float]
    rgb: tuple[float, float, float]
    confidence: float

    @property
    def label(self) -> int:
        """Class index in [0, 64), the index into `CLASS_NAMES`."""
        return COLOURS.index(self.colour) * len(SHAPES) + SHAPES.index(self.shape)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Tight box (x0, y0, x1, y1), fractions of the image side."""
        left, top, right, bottom = outline_extent(self.shape, self.rotation)
        x, y = self.centre
        return (x + left * self.radius, y + top * self.radius, x + right * self.radius, y + bottom * self.radius)


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in one image: `objects` from the largest to the smallest.

    `confidence` in [0, 1] is the least confidence of an object, lowered by regions that are no object. It is 0 where
    nothing was found.
    """

    objects: tuple[SeenObject, ...]
    confidence: float

    @property
    def label(self) -> int | None:
        """Class index of the first object, or None without objects."""
        return self.objects[0].label if self.objects else None

    def relation(self, first: int, second: int) -> str | None:
        """How object `first` lies relative to object `second`, or None if they lie diagonally."""
        return relation_between(self.objects[first].centre, self.objects[second].centre)


@dataclass(frozen=True)
class _Layers:
    """An image taken apart.

    Attributes:
        ground: fitted background [S, S, 3].
        difference: what the image adds to it [S, S, 3].
        smooth: the same, smoothed where the image is noisy; detection looks at this.
        noise: standard deviation of one channel of the background.
    """

    ground: Array
    difference: Array
    smooth: Array
    noise: float


# ------------------------------------------------------------------------------------------------------- the entry
def read_scene(image: ImageLike) -> Reading:
    """Read the objects of one image.

    Args:
        image: a PIL image or a path; uint8 [H, W, 3] or [3, H, W]; or float [3, H, W] in [-1, 1] (values outside are
            clipped), array or tensor. Any size from 16 pixels; images that are not square are read as if stretched.

    Raises:
        InvalidInputError: for another shape or type, NaN, or fewer than 16 pixels a side.
    """
    return _read(_pixels(image))


def read_scenes(images: torch.Tensor | Array | Iterable[ImageLike]) -> list[Reading]:
    """Read many images: a batch [B, 3, H, W] or [B, H, W, 3], or any iterable of what `read_scene` takes."""
    if isinstance(images, torch.Tensor | Array) and images.ndim != 4:
        raise InvalidInputError(f"a batch of images has 4 dimensions, got shape {list(images.shape)}")
    return [read_scene(image) for image in images]


def _pixels(image: ImageLike) -> Array:
    """float32 [S, S, 3] in [0, 255]."""
    if isinstance(image, str | Path | Image.Image):
        array = np.asarray(open_image(image))
    elif isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        array = (image.float() if image.is_floating_point() else image).numpy()
    elif isinstance(image, Array):
        array = image
    else:
        raise InvalidInputError(f"expected an image (PIL, path, array or tensor), got {type(image).__name__}")
    if array.ndim != 3 or 3 not in (array.shape[0], array.shape[-1]):
        raise InvalidInputError(f"expected an image [3, H, W] or [H, W, 3], got shape {list(array.shape)}")
    if array.dtype.kind == "f":
        if array.shape[0] != 3:
            raise InvalidInputError(f"float images are [3, H, W] in [-1, 1], got shape {list(array.shape)}")
        if not np.isfinite(array).all():
            raise InvalidInputError("the image contains NaN or infinite values")
        array = np.rint((np.clip(array, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InvalidInputError(f"images are uint8 in [0, 255] or float in [-1, 1], got {array.dtype}")
    if array.shape[-1] != 3:
        array = array.transpose(1, 2, 0)
    if min(array.shape[:2]) < 16:
        raise InvalidInputError(f"the oracle needs at least 16x16 pixels, got {array.shape[1]}x{array.shape[0]}")
    if array.shape[:2] != (WORKING_SIZE, WORKING_SIZE):
        picture = Image.fromarray(np.ascontiguousarray(array))
        shrinks = min(array.shape[:2]) >= WORKING_SIZE
        method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
        array = np.asarray(picture.resize((WORKING_SIZE, WORKING_SIZE), method))
    return array.astype(np.float32)


def _read(pixels: Array) -> Reading:
    layers = _take_apart(pixels)
    distance = np.sqrt(np.einsum("hwc,hwc->hw", layers.smooth, layers.smooth))
    threshold = max(_FAINTEST, 4.5 * layers.noise * (_SMOOTHED if layers.noise > _NOISY else 1.0))
    # Half the contrast of the strongest pixel nearby is where an object's edge lies.
    regions = (distance > threshold) & (distance > 0.45 * ndimage.maximum_filter(distance, 5))
    labels, count = ndimage.label(regions)
    if count == 0:
        return Reading((), 0.0)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    found: list[SeenObject] = []
    stray = 0.0
    for number in range(1, count + 1):
        if areas[number] < _SMALLEST_AREA:
            stray += areas[number]
            continue
        own = labels == number
        seen = _best_reading(layers, own, regions & ~own)
        if not seen:
            stray += areas[number]
        found += seen
    found = sorted(_without_artefacts(found), key=lambda item: -item.radius)
    explained = 1.0 - float(stray) / float(areas[1:].sum())
    confidence = min((item.confidence for item in found), default=0.0) * max(0.0, 2.0 * explained - 1.0)
    return Reading(tuple(found), confidence) if confidence >= _LEAST_CONFIDENCE else Reading((), 0.0)


def _without_artefacts(found: list[SeenObject]) -> list[SeenObject]:
    """Drop what is far less sure than the surest object, and what lies within a surer one, as in the hole of a ring."""
    kept: list[SeenObject] = []
    for item in sorted(found, key=lambda item: -item.confidence):
        within = any(math.dist(item.centre, other.centre) < max(item.radius, other.radius) for other in kept)
        if not within and item.confidence >= 0.12 * max(other.confidence for other in found):
            kept.append(item)
    return kept


# -------------------------------------------------------------------------------------------------- the background
@lru_cache(maxsize=1)
def _plane() -> tuple[Array, Array]:
    """The plane's basis [S * S, 3] and the mask [S * S] of the frame of the image."""
    ramp = (np.arange(WORKING_SIZE, dtype=np.float32) + 0.5) / WORKING_SIZE - 0.5
    x, y = np.meshgrid(ramp, ramp)
    frame = np.ones((WORKING_SIZE, WORKING_SIZE), dtype=bool)
    frame[3:-3, 3:-3] = False
    return np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3), frame.ravel()


def _take_apart(pixels: Array) -> _Layers:
    """Fit the background; `noise` is its standard deviation in one channel."""
    basis, frame = _plane()
    flat = pixels.reshape(-1, 3)
    border, values = basis[frame], flat[frame]
    weight = np.ones(len(border), dtype=np.float32)
    plane = np.zeros((3, 3), dtype=np.float32)
    for _ in range(4):  # Tukey's weights: objects that reach the frame drop out
        weighted = border * weight[:, None]
        plane = np.linalg.solve(border.T @ weighted + 1e-4 * np.eye(3, dtype=np.float32), weighted.T @ values)
        error = np.sqrt(((values - border @ plane) ** 2).sum(1))
        cut = 4.0 * max(2.0, float(np.median(error)))
        weight = np.where(error < cut, (1.0 - (error / cut) ** 2) ** 2, 0.0).astype(np.float32)
    residual = flat - basis @ plane
    spread = max(2.0, float(np.median(np.sqrt((residual[frame] ** 2).sum(1)))))
    for _ in range(2):
        near = (residual * residual).sum(1) < (2.5 * spread) ** 2
        if near.sum() < 0.15 * len(near):
            break
        inside = basis[near]
        plane = np.linalg.solve(inside.T @ inside + 1e-4 * np.eye(3, dtype=np.float32), inside.T @ flat[near])
        residual = flat - basis @ plane
    error = (residual[frame] ** 2).sum(1)
    noise = math.sqrt(float(np.median(error)) / 2.37)  # median of a chi-square with three degrees of freedom
    difference = residual.reshape(pixels.shape)
    smooth = ndimage.gaussian_filter(difference, (1.0, 1.0, 0.0)) if noise > _NOISY else difference
    return _Layers(pixels - difference, difference, smooth, noise)


# ------------------------------------------------------------------------------------------------------ the regions
def _best_reading(layers: _Layers, own: Array, others: Array) -> list[SeenObject]:
    """The object of a region, or the objects of its parts if these explain it better."""
    whole = _fit(layers, own, others)
    if whole is not None and whole[1] < _GOOD_ERROR:
        return [whole[0]]
    readings = [] if whole is None else [whole]
    for parts in (_by_colour(layers.difference, own), _by_necks(own)):
        if len(parts) < 2:
            continue
        found = [_fit(layers, part, others | (own & ~part)) for part in parts]
        kept = [item for item in found if item is not None]
        if len(kept) == len(parts) and (
            not readings or max(error for _, error in kept) < 0.6 * max(error for _, error in readings)
        ):
            readings = kept
        if readings and max(error for _, error in readings) < _GOOD_ERROR:
            break
    return [item for item, error in readings if error < _ACCEPT_ERROR]


def _by_colour(difference: Array, own: Array) -> list[Array]:
    """Parts of a region whose pixels differ from the background in clearly different directions."""
    values = difference[own]
    length = np.sqrt((values * values).sum(1, keepdims=True)) + 1e-6
    directions = values / length
    weights = length[:, 0]
    # Two-means on the sphere, started at the pixel furthest from the mean direction.
    first = directions[int(np.argmin(directions @ directions.mean(0)))]
    second = directions[int(np.argmin(directions @ first))]
    belongs = np.zeros(len(values), dtype=bool)
    for _ in range(6):
        belongs = directions @ first > directions @ second
        if belongs.all() or not belongs.any():
            return []
        first, second = (
            (directions[side] * weights[side, None]).sum(0) / weights[side].sum() for side in (belongs, ~belongs)
        )
        first, second = first / (np.linalg.norm(first) + 1e-6), second / (np.linalg.norm(second) + 1e-6)
    if float(first @ second) > 0.93:
        return []
    mask = np.zeros_like(own)
    mask[own] = belongs
    return _large_parts(mask) + _large_parts(own & ~mask)


def _by_necks(own: Array) -> list[Array]:
    """Parts of a region that hang together by a neck of a few pixels."""
    depth = ndimage.distance_transform_edt(own)
    for cut in (1.5, 2.5, 3.5):
        cores, count = ndimage.label(depth > cut)
        sizes = np.bincount(cores.ravel(), minlength=count + 1)[1:]
        large = [number + 1 for number in range(count) if sizes[number] >= 8]
        if len(large) >= 2:
            nearest = ndimage.distance_transform_edt(
                ~np.isin(cores, large), return_distances=False, return_indices=True
            )
            owner = cores[nearest[0], nearest[1]]
            return [own & (owner == number) for number in large]
    return []


def _large_parts(mask: Array) -> list[Array]:
    labels, count = ndimage.label(ndimage.binary_opening(mask))
    parts = [labels == number for number in range(1, count + 1)]
    return [part for part in parts if part.sum() >= _SMALLEST_AREA]


# ---------------------------------------------------------------------------------------------------------- the fit
def _cover(shape: str, x: Array, y: Array, parameters: Array) -> Array:
    """Coverage [h, w] under parameters (centre x, centre y, log radius, rotation in radians, log blur)."""
    centre_x, centre_y, log_radius, angle, log_blur = parameters.tolist()
    radius = math.exp(log_radius)
    cos, sin = math.cos(angle) / radius, math.sin(angle) / radius
    across, up = x - np.float32(centre_x), np.float32(centre_y) - y
    turned_x = across * np.float32(cos) + (up * np.float32(sin))[:, None]
    turned_y = (up * np.float32(cos))[:, None] - across * np.float32(sin)
    step = float(x[1] - x[0])
    sharp = np.clip(0.5 - SIGNED_DISTANCES[shape](turned_x, turned_y) * np.float32(radius / step), 0.0, 1.0)
    blur = math.exp(log_blur)
    if blur < 0.25 * step:
        return sharp
    return _gaussian(y, blur) @ sharp @ _gaussian(x, blur)


def _gaussian(positions: Array, blur: float) -> Array:
    """The matrix [n, n] that blurs a signal sampled at these positions; for windows of 30 pixels it beats a filter."""
    apart = positions[:, None] - positions[None, :]
    kernel = np.exp(apart * apart * np.float32(-0.5 / blur**2))
    return kernel / kernel[len(kernel) // 2].sum()


@dataclass(frozen=True)
class _Bank:
    """Normalised coverages [T, side * side] of every shape at every turn and blur; area and centroid of each shape."""

    templates: Array
    names: tuple[str, ...]
    turns: tuple[float, ...]
    area: dict[str, float]
    centroid: dict[str, tuple[float, float]]


@lru_cache(maxsize=1)
def _bank() -> _Bank:
    fine = np.linspace(-1.0, 1.0, 401, dtype=np.float32)
    cell = float(fine[1] - fine[0])
    area: dict[str, float] = {}
    centroid: dict[str, tuple[float, float]] = {}
    for shape in SHAPES:
        inside = SIGNED_DISTANCES[shape](fine[None, :] + 0.0 * fine[:, None], fine[:, None] + 0.0 * fine[None, :]) < 0
        area[shape] = float(inside.sum()) * cell * cell
        rows, columns = np.nonzero(inside)
        centroid[shape] = float(fine[columns].mean()), float(fine[rows].mean())
    frame = np.linspace(-_BANK_REACH, _BANK_REACH, _BANK_SIDE, dtype=np.float32)
    templates, names, turns = [], [], []
    for shape in SHAPES:
        radius = 1.0 / math.sqrt(area[shape])
        for turn in (0,) if shape in ("circle", "ring") else _TURNS:
            angle = math.radians(turn)
            shift_x, shift_y = _turned(centroid[shape], angle, radius)
            for blur in _BLURS:
                parameters = np.array([-shift_x, -shift_y, math.log(radius), angle, math.log(blur)])
                template = _cover(shape, frame, frame, parameters).ravel()
                templates.append(template / np.linalg.norm(template))
                names.append(shape)
                turns.append(angle)
    return _Bank(np.stack(templates), tuple(names), tuple(turns), area, centroid)


def _turned(point: tuple[float, float], angle: float, radius: float) -> tuple[float, float]:
    """Image offset (x right, y down) of a point given in a unit shape's frame (y up)."""
    cos, sin = math.cos(angle), math.sin(angle)
    return radius * (cos * point[0] - sin * point[1]), -radius * (sin * point[0] + cos * point[1])


def _fit(layers: _Layers, own: Array, others: Array) -> tuple[SeenObject, float] | None:
    """The object that explains a region best and the share of coverage energy that it leaves unexplained."""
    rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
    top, bottom = max(0, rows[0] - 4), min(WORKING_SIZE, rows[-1] + 5)
    left, right = max(0, columns[0] - 4), min(WORKING_SIZE, columns[-1] + 5)
    window, smooth, ground = (
        layer[top:bottom, left:right] for layer in (layers.difference, layers.smooth, layers.ground)
    )
    own, others = own[top:bottom, left:right], others[top:bottom, left:right]
    values = smooth[own]
    length = np.sqrt((values * values).sum(1))
    # The object's colour, first guess: its strongest half, which excludes blended edges.
    colour = np.median((values + ground[own])[length >= np.median(length)], axis=0)
    contrast = colour - ground
    strength = np.einsum("hwc,hwc->hw", contrast, contrast)
    if float(strength.min()) < (0.5 * _FAINTEST) ** 2:
        return None
    alpha = np.einsum("hwc,hwc->hw", window, contrast) / strength
    weight = np.ones_like(alpha)
    if others.any():
        weight = np.where(ndimage.binary_dilation(others, iterations=2) & ~own, 0.0, 1.0).astype(np.float32)
    # What belongs to the region, with its blended rim; other regions and background noise do not bias the moments.
    part = np.einsum("hwc,hwc->hw", smooth, contrast) / strength
    part = np.clip(np.where(ndimage.binary_dilation(own, iterations=2), part, 0.0), 0.0, 1.0) * weight
    area = float(part.sum())
    if area < _SMALLEST_AREA / 2:
        return None
    x = np.arange(left, right, dtype=np.float32) + np.float32(0.5)
    y = np.arange(top, bottom, dtype=np.float32) + np.float32(0.5)
    centre_x, centre_y = float(part.sum(0) @ x) / area, float(part.sum(1) @ y) / area

    bank = _bank()
    unit = math.sqrt(area)
    frame = np.linspace(-_BANK_REACH, _BANK_REACH, _BANK_SIDE, dtype=np.float32) * np.float32(unit)
    sample_rows = np.repeat(centre_y + frame - top - 0.5, _BANK_SIDE)
    sample_columns = np.tile(centre_x + frame - left - 0.5, _BANK_SIDE)
    canonical = ndimage.map_coordinates(part, np.stack([sample_rows, sample_columns]), order=1, mode="constant")
    likeness = bank.templates @ (canonical / (np.linalg.norm(canonical) + 1e-6))
    best: dict[str, int] = {}
    for number in np.argsort(-likeness):
        best.setdefault(bank.names[number], int(number))
    order = sorted(best, key=lambda shape: -likeness[best[shape]])
    if likeness[best[order[0]]] < _LEAST_LIKENESS:
        return None

    noise = layers.noise**2 * float((weight / strength).sum())  # energy that noise adds to the coverage
    fits: list[tuple[float, float, str, Array]] = []
    for shape in order[:4]:
        if likeness[best[shape]] < likeness[best[order[0]]] - 0.12:
            break
        angle = bank.turns[best[shape]]
        radius = unit / math.sqrt(bank.area[shape])
        shift_x, shift_y = _turned(bank.centroid[shape], angle, radius)
        start = np.array([centre_x - shift_x, centre_y - shift_y, math.log(radius), angle, math.log(0.5)])
        error, parameters = _refine(shape, x, y, alpha, weight, start, noise)
        fits.append(((error + 0.002) * _unusual(parameters), error, shape, parameters))
        if fits[0][0] < 0.005:
            break  # a clean render: no other shape comes near
    second = 1.0 - float(likeness[best[order[len(fits)]]]) ** 2 if len(fits) < len(order) else 1.0
    fits.sort(key=lambda fit: fit[0])
    _, error, shape, parameters = fits[0]
    runner_up = min([second, *(fit[0] for fit in fits[1:])])

    radius = math.exp(parameters[2]) / WORKING_SIZE
    if not _RADII[0] <= radius <= _RADII[1]:
        return None
    cover = (_cover(shape, x, y, parameters) * weight)[..., None]
    # Coverage along one colour cannot see a neighbour of another colour: pixels of the region left bare count as error.
    error += max(0.0, float((cover[..., 0][own] < 0.25).mean()) - 0.08)
    rgb = (cover * (window + cover * ground)).sum((0, 1)) / float((cover * cover).sum() + 1e-6)
    if float(np.linalg.norm(rgb - ground.mean((0, 1)))) < _LEAST_CONTRAST:
        return None
    name, tone, far = _nearest_colour(rgb)
    turn = 0.0 if shape in ("circle", "ring") else math.degrees(parameters[3])
    clear = 1.0 - fits[0][0] / max(runner_up, fits[0][0])
    grain = layers.noise**2 / float(strength.mean())
    fitting = max(0.0, 1.0 - error / _ACCEPT_ERROR)
    confidence = fitting * (0.4 + 0.6 * min(1.0, 1.5 * clear)) * math.exp(-((far / 60.0) ** 2)) / (1.0 + 4.0 * grain)
    seen = SeenObject(
        shape=shape,
        colour=name,
        size=size_name(radius),
        shade=shade_name(tone),
        radius=radius,
        tone=tone,
        rotation=turn,
        centre=(float(parameters[0]) / WORKING_SIZE, float(parameters[1]) / WORKING_SIZE),
        rgb=(float(rgb[0]), float(rgb[1]), float(rgb[2])),
        confidence=float(confidence),
    )
    return seen, error


@lru_cache(maxsize=1)
def _palette() -> tuple[Array, tuple[str, ...], Array]:
    """RGB [P, 3] of every colour at every tone, with their names and tones [P]."""
    tones = np.linspace(-1.0, 1.0, 81)
    names = tuple(colour for colour in COLOURS for _ in tones)
    colours = np.array([object_rgb(colour, float(tone)) for colour in COLOURS for tone in tones])
    return colours, names, np.tile(tones, len(COLOURS))


def _nearest_colour(rgb: Array) -> tuple[str, float, float]:
    """Name, tone and RGB distance of the nearest colour that an object can have."""
    colours, names, tones = _palette()
    distance = np.sqrt(((colours - rgb) ** 2).sum(1))
    nearest = int(np.argmin(distance))
    return names[nearest], float(tones[nearest]), float(distance[nearest])


def _unusual(parameters: Array) -> float:
    """Factor on the error, from 1, for sizes and rotations that no sampled object has."""
    radius = math.exp(parameters[2]) / WORKING_SIZE
    smallest, largest = RADIUS_RANGES["small"][0], RADIUS_RANGES["large"][1]
    beyond = max(0.0, smallest - radius, radius - largest) / 0.03
    beyond += max(0.0, abs(math.degrees(parameters[3])) - MAX_ROTATION) / 12.0
    return 1.0 + beyond


def _refine(
    shape: str, x: Array, y: Array, alpha: Array, weight: Array, start: Array, noise: float
) -> tuple[float, Array]:
    """Damped Gauss-Newton on the parameters of `_cover`, the amplitude of the coverage solved in closed form.

    Returns the share of coverage energy left unexplained, beyond what noise explains, and the parameters.
    """
    free = [0, 1, 2, 4] if shape in ("circle", "ring") else [0, 1, 2, 3, 4]
    steps = np.array([0.05, 0.05, 0.005, 0.01, 0.05])
    energy = float((weight * alpha * alpha).sum()) + 1e-6
    target = weight * alpha

    def residual(parameters: Array) -> Array:
        cover = _cover(shape, x, y, parameters) * weight
        amplitude = float((cover * alpha).sum()) / (float((cover * cover).sum()) + 1e-6)
        return (target - np.float32(min(max(amplitude, 0.5), 1.6)) * cover).ravel()

    parameters = start.copy()
    now = residual(parameters)
    error = float(now @ now)
    damping = 1e-3
    for _ in range(10):
        columns = []
        for number in free:
            moved = parameters.copy()
            moved[number] += steps[number]
            columns.append((residual(moved) - now) / np.float32(steps[number]))
        jacobian = np.stack(columns, axis=1)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ now
        moved = parameters.copy()
        moved[free] -= np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-3), gradient)
        moved = np.clip(moved, _LOWEST, _HIGHEST)
        after = residual(moved)
        error_after = float(after @ after)
        if error_after < error:
            gain = 1.0 - error_after / error
            parameters, now, error = moved, after, error_after
            damping *= 0.3
            if gain < 0.01 or error < 1e-3 * energy:
                break
        else:
            damping *= 10.0
            if damping > 10.0:
                break
    return max(0.0, error - noise) / max(energy - noise, 0.2 * energy), parameters


# Bounds of the parameters of `_cover` during refinement: pixels, log pixels, radians, log pixels.
_LOWEST = np.array([0.0, 0.0, math.log(0.05 * WORKING_SIZE), math.radians(-40), math.log(0.2)])
_HIGHEST = np.array([WORKING_SIZE, WORKING_SIZE, math.log(0.4 * WORKING_SIZE), math.radians(40), math.log(3.0)])
