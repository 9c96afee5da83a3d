"""Shares of lab pictures that show what was asked, read by the oracle, with confidence intervals.

Shape letters: B images, H rows and W columns of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from torch import Tensor

from vistok.data.shapes import CLASS_NAMES
from vistok.data.shapes.captions import parse_caption, satisfies
from vistok.data.shapes.oracle import Reading, SeenObject, read_scenes
from vistok.errors import InvalidInputError

__all__ = ["Accuracy", "caption_accuracy", "class_accuracy", "oracle_agreement", "wilson_interval"]


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share: inside [0, 1], and right near both ends where the normal one fails.

    Args:
        correct: hits, 0 <= correct <= total.
        total: tries, at least 1.
        confidence: of the interval, in (0, 1).

    Raises:
        InvalidInputError: for numbers out of range.
    """
    if not (0 <= correct <= total and total >= 1 and 0 < confidence < 1):
        raise InvalidInputError(
            "expected 0 <= correct <= total, total >= 1 and a confidence in (0, 1); "
            f"got {correct}, {total}, {confidence}"
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    # The ends are exactly 0 and 1 for no and for all hits; rounding would leave 1e-17.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


@dataclass(frozen=True)
class Accuracy:
    """A share of hits. `str()` gives "97.2 % [96.0, 98.1], 972/1000"."""

    correct: int
    total: int

    @classmethod
    def of(cls, hits: Iterable[bool]) -> Accuracy:
        """Count hits."""
        listed = [bool(hit) for hit in hits]
        return cls(sum(listed), len(listed))

    @property
    def value(self) -> float:
        """The share in [0, 1]; NaN without tries."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval at 95 %."""
        return wilson_interval(self.correct, self.total) if self.total else (0.0, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}], {self.correct}/{self.total}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `value` is None without tries (JSON knows no NaN)."""
        low, high = self.interval
        return {
            "value": self.value if self.total else None,
            "low": low,
            "high": high,
            "correct": self.correct,
            "total": self.total,
        }


def _read(images: Tensor | Sequence[Reading]) -> Sequence[Reading]:
    return read_scenes(images.float().cpu()) if isinstance(images, Tensor) else images


def _check_lengths(images: int, asked: int, what: str) -> None:
    if images != asked or not images:
        raise InvalidInputError(f"expected one {what} for each image and at least one image; got {asked} for {images}")


def class_accuracy(images: Tensor | Sequence[Reading], labels: Sequence[int] | Tensor) -> dict[str, Accuracy]:
    """Share of pictures that show one object of the asked class.

    Args:
        images: [B, 3, H, W] in [-1, 1], or what the oracle read in them.
        labels: asked class of each, numbers in `CLASS_NAMES`.

    Returns:
        `class`: exactly one object, of the asked shape and the asked colour; and of which `shape` alone, `colour` alone
        (of the largest object) and `one_object`.

    Raises:
        InvalidInputError: for differing lengths or numbers outside the classes.
    """
    numbers = [int(label) for label in labels]
    readings = _read(images)
    _check_lengths(len(readings), len(numbers), "class")
    if not all(0 <= number < len(CLASS_NAMES) for number in numbers):
        raise InvalidInputError(
            f"classes of the lab world are 0..{len(CLASS_NAMES) - 1}; got {min(numbers)}..{max(numbers)}"
        )
    asked = [CLASS_NAMES[number].split() for number in numbers]
    one = [len(reading.objects) == 1 for reading in readings]
    colour = [bool(seen.objects) and seen.objects[0].colour == want[0] for seen, want in zip(readings, asked)]
    shape = [bool(seen.objects) and seen.objects[0].shape == want[1] for seen, want in zip(readings, asked)]
    return {
        "class": Accuracy.of(all(parts) for parts in zip(one, colour, shape)),
        "shape": Accuracy.of(shape),
        "colour": Accuracy.of(colour),
        "one_object": Accuracy.of(one),
    }


def caption_accuracy(images: Tensor | Sequence[Reading], captions: Sequence[str]) -> dict[str, Accuracy]:
    """Share of pictures that show what their caption says.

    Args:
        images: [B, 3, H, W] in [-1, 1], or what the oracle read in them.
        captions: one each, in the lab world's grammar.

    Returns:
        `caption`: everything said holds, with no object missing or extra; `objects`: the same without sizes and shades
        (number, shapes, colours, relation); `relation`: the relation holds (of the captions that say one); `count`.

    Raises:
        InvalidInputError: for differing lengths or captions outside the grammar.
    """
    readings = _read(images)
    _check_lengths(len(readings), len(captions), "caption")
    matches = [satisfies(parse_caption(text), reading) for text, reading in zip(captions, readings)]
    return {
        "caption": Accuracy.of(match.satisfied for match in matches),
        "objects": Accuracy.of(
            match.count and match.shape == 1.0 and match.colour in (None, 1.0) and match.relation is not False
            for match in matches
        ),
        "relation": Accuracy.of(bool(match.relation) for match in matches if match.relation is not None),
        "count": Accuracy.of(match.count for match in matches),
    }


def _paired(first: Sequence[SeenObject], second: Sequence[SeenObject]) -> list[tuple[SeenObject, SeenObject]]:
    """Objects of two readings, matched greedily by the distance of their centres."""
    distances = sorted(
        (math.dist(one.centre, other.centre), i, j) for i, one in enumerate(first) for j, other in enumerate(second)
    )
    taken_first: set[int] = set()
    taken_second: set[int] = set()
    pairs = []
    for _, i, j in distances:
        if i not in taken_first and j not in taken_second:
            taken_first.add(i)
            taken_second.add(j)
            pairs.append((first[i], second[j]))
    return pairs


def oracle_agreement(originals: Tensor | Sequence[Reading], others: Tensor | Sequence[Reading]) -> dict[str, Accuracy]:
    """Whether the oracle reads the same objects in two versions of pictures, such as before and after a tokenizer.

    Objects are paired by position; an object that one version lacks counts as a disagreement.

    Args:
        originals: [B, 3, H, W] in [-1, 1], or what the oracle read in them.
        others: the same of the other version.

    Returns:
        Shares of objects: `object` (shape and colour agree), `shape`, `colour`; and `scene`, the share of pictures
        whose objects all agree.

    Raises:
        InvalidInputError: for differing lengths.
    """
    before, after = _read(originals), _read(others)
    _check_lengths(len(before), len(after), "other version")
    hits: dict[str, int] = {"object": 0, "shape": 0, "colour": 0}
    total = 0
    scenes = []
    for first, second in zip(before, after):
        expected = max(len(first.objects), len(second.objects))
        same_shape = same_colour = same = 0
        for one, other in _paired(first.objects, second.objects):
            same_shape += one.shape == other.shape
            same_colour += one.colour == other.colour
            same += one.shape == other.shape and one.colour == other.colour
        hits["object"] += same
        hits["shape"] += same_shape
        hits["colour"] += same_colour
        total += expected
        scenes.append(same == expected)
    return {**{name: Accuracy(count, total) for name, count in hits.items()}, "scene": Accuracy.of(scenes)}
