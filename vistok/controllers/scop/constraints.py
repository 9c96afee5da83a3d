"""Which pairs of boxes are unambiguous, and how they lie to each other (CoMPaSS, section 3.2 and 3.3).

Letters: n boxes of an image, P unordered pairs.

Every rule is elementwise on the table of pairs, so all pairs of many images are judged in one numpy pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from vistok.errors import InvalidInputError

__all__ = ["BEST_GENEVAL", "CONSTRAINTS", "PairTable", "Thresholds", "judge", "pair_indices", "relations"]

CONSTRAINTS = ("visual_significance", "semantic_distinction", "spatial_clarity", "minimal_overlap", "size_balance")


@dataclass(frozen=True)
class Thresholds:
    """When a pair counts as unambiguous; the defaults are the authors'.

    Attributes:
        min_area: boxes of fewer square pixels are left out first.
        visual_significance: both areas together are at least this part of the image.
        spatial_clarity: the centres are at most this many times the smaller box's diagonal apart.
        minimal_overlap: the intersection is less than this part of the smaller box (or there is none).
        size_balance: the smaller area is at least this part of the larger one.
    """

    min_area: float = 1024
    visual_significance: float = 0.2
    spatial_clarity: float = 2.0
    minimal_overlap: float = 0.3
    size_balance: float = 0.5

    def __post_init__(self) -> None:
        values = (
            self.min_area,
            self.visual_significance,
            self.spatial_clarity,
            self.minimal_overlap,
            self.size_balance,
        )
        if any(not np.isfinite(value) or value < 0 for value in values):
            raise InvalidInputError(f"thresholds are finite numbers of at least 0, got {self}")


# The authors' second set, found by black-box search on GenEval.
BEST_GENEVAL = Thresholds(
    visual_significance=0.40087064191445176,
    spatial_clarity=1.077654397636866,
    minimal_overlap=0.23206626338746755,
    size_balance=0.4823213426319574,
)


@dataclass(frozen=True)
class PairTable:
    """The verdicts on P pairs.

    Attributes:
        first: int64 [P], index of the earlier box.
        second: int64 [P].
        verdicts: bool [P, 5], one column a rule, in the order of `CONSTRAINTS`.
    """

    first: np.ndarray
    second: np.ndarray
    verdicts: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """bool [P]: pairs that pass every rule."""
        return np.asarray(self.verdicts.all(axis=1))


@cache
def _triangle(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(count, 1)


def pair_indices(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, second, image), each int64 [P]: all pairs inside each image, the earlier box first.

    Args:
        counts: boxes of each image; boxes of all images are numbered through.
    """
    firsts, seconds, images, start = [], [], [], 0
    for image, count in enumerate(counts):
        one, two = _triangle(count)
        firsts.append(one + start)
        seconds.append(two + start)
        images.append(np.full(len(one), image))
        start += count
    if not firsts:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty
    return np.concatenate(firsts), np.concatenate(seconds), np.concatenate(images)


def judge(
    boxes: np.ndarray,
    categories: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    image_areas: np.ndarray,
    thresholds: Thresholds,
) -> PairTable:
    """Apply the five rules to pairs of boxes.

    Args:
        boxes: float64 [n, 4], (x, y, width, height).
        categories: int64 [n].
        first: int64 [P].
        second: int64 [P].
        image_areas: float64 [P], width times height of each pair's image.
        thresholds: see there.
    """
    x, y, w, h = boxes.T
    area = w * h
    small, large = np.minimum(area[first], area[second]), np.maximum(area[first], area[second])
    diagonal = np.sqrt(w**2 + h**2)
    cx, cy = x + w / 2, y + h / 2
    distance = np.sqrt((cx[first] - cx[second]) ** 2 + (cy[first] - cy[second]) ** 2)
    left, right = np.maximum(x[first], x[second]), np.minimum((x + w)[first], (x + w)[second])
    top, bottom = np.maximum(y[first], y[second]), np.minimum((y + h)[first], (y + h)[second])
    apart = (right < left) | (bottom < top)
    intersection = (right - left) * (bottom - top)
    verdicts = np.stack(
        [
            area[first] + area[second] >= thresholds.visual_significance * image_areas,
            categories[first] != categories[second],
            distance <= thresholds.spatial_clarity * np.minimum(diagonal[first], diagonal[second]),
            apart | (intersection < thresholds.minimal_overlap * small),
            small >= thresholds.size_balance * large,
        ],
        axis=1,
    )
    return PairTable(first, second, verdicts)


def relations(a: Sequence[float], b: Sequence[float]) -> tuple[list[str], list[str]]:
    """(how a lies to b, how b lies to a): one phrase each, or two where the pair is diagonal.

    Horizontal wins where the boxes overlap less along x than along y; ties go to "right" and "below", and equal overlap
    to vertical.

    Args:
        a: (x, y, width, height).
        b: the same.
    """
    ax, ay, aw, ah = a
    bx, by, bw, bh = b
    to_left = ax + aw / 2 < bx + bw / 2
    above = ay + ah / 2 < by + bh / 2
    horizontal = ("to the left of", "to the right of") if to_left else ("to the right of", "to the left of")
    vertical = ("above", "below") if above else ("below", "above")
    over_x = max(0.0, min(ax + aw, bx + bw) - max(ax, bx)) / min(aw, bw)
    over_y = max(0.0, min(ay + ah, by + bh) - max(ay, by)) / min(ah, bh)
    if over_x < 1 / 3 and over_y < 1 / 3:
        return (
            [f"{horizontal[0]} and {vertical[0]}", f"{vertical[0]} and {horizontal[0]}"],
            [f"{horizontal[1]} and {vertical[1]}", f"{vertical[1]} and {horizontal[1]}"],
        )
    if over_x < over_y:
        return [horizontal[0]], [horizontal[1]]
    return [vertical[0]], [vertical[1]]
