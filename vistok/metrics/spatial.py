"""Does the picture show what the prompt asks, where it asks: spatial accuracy, attribute response, leakage.

Letters: B pictures, K pictures a prompt, M scales.

Scores read detections, so any detector works: the lab's oracle, a transformers zero-shot detector, or your own function
from pictures to `Detection`s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.data.shapes.oracle import read_scenes
from vistok.errors import InvalidInputError
from vistok.metrics.accuracy import Accuracy

__all__ = [
    "AttributeResponse",
    "Detection",
    "SpatialPrompt",
    "VisorScore",
    "ZeroShotDetector",
    "attribute_response",
    "compbench_spatial",
    "geneval_position",
    "holds",
    "leakage_rate",
    "oracle_detector",
    "visor",
]

RELATIONS = ("left of", "right of", "above", "below")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Detection:
    """One detected object: `name`, `box` (left, top, right, bottom; any unit, y downwards), `score` in [0, 1]."""

    name: str
    box: tuple[float, float, float, float]
    score: float = 1.0

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y)."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def size(self) -> tuple[float, float]:
        """(width, height)."""
        return self.box[2] - self.box[0], self.box[3] - self.box[1]


@dataclass(frozen=True)
class SpatialPrompt:
    """`first` stands in `relation` to `second`: one of `left of`, `right of`, `above`, `below`."""

    first: str
    relation: str
    second: str

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise InvalidInputError(f"unknown relation {self.relation!r}; expected {', '.join(RELATIONS)}")

    @property
    def text(self) -> str:
        """A prompt as VISOR writes it."""
        side = {"left of": "to the left of", "right of": "to the right of"}.get(self.relation, self.relation)
        return f"{_with_article(self.first)} {side} {_with_article(self.second)}"


def _with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


Detector = Callable[[Sequence[Any], Sequence[str]], Sequence[Sequence[Detection]]]


def _best(detections: Sequence[Detection], name: str, threshold: float) -> Detection | None:
    """The most certain detection of a name above a score."""
    found = [one for one in detections if one.name == name and one.score >= threshold]
    return max(found, key=lambda one: one.score) if found else None


def holds(first: Detection, relation: str, second: Detection, *, margin: float = 0.0) -> bool:
    """Whether the centres stand in a relation.

    Args:
        first: the object that the sentence is about.
        relation: see `SpatialPrompt`.
        second: the other one.
        margin: how far the centres must be apart along the axis, as a part of both sizes' sum there (GenEval: 0.1).
    """
    if relation not in RELATIONS:
        raise InvalidInputError(f"unknown relation {relation!r}; expected {', '.join(RELATIONS)}")
    axis = 0 if relation in ("left of", "right of") else 1
    apart = second.centre[axis] - first.centre[axis]
    apart = apart if relation in ("left of", "above") else -apart
    return apart > margin * (first.size[axis] + second.size[axis])


@dataclass(frozen=True)
class VisorScore:
    """VISOR (Gokhale et al., arXiv 2212.10015).

    Attributes:
        object_accuracy: OA, pictures with both objects.
        unconditional: pictures with both objects in the right relation.
        conditional: the same among the pictures with both objects.
        at_least: VISOR_n for n = 1..K: prompts with at least n right pictures.
    """

    object_accuracy: Accuracy
    unconditional: Accuracy
    conditional: Accuracy
    at_least: tuple[Accuracy, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "OA": self.object_accuracy.to_dict(),
            "VISOR_uncond": self.unconditional.to_dict(),
            "VISOR_cond": self.conditional.to_dict(),
            **{f"VISOR_{n}": score.to_dict() for n, score in enumerate(self.at_least, start=1)},
        }

    def __str__(self) -> str:
        lines = [
            f"OA           {self.object_accuracy}",
            f"VISOR uncond {self.unconditional}",
            f"VISOR cond   {self.conditional}",
        ]
        return "\n".join(lines + [f"VISOR_{n}      {score}" for n, score in enumerate(self.at_least, start=1)])


def _checked(prompts: Sequence[Any], detections: Sequence[Any]) -> None:
    if not prompts or len(prompts) != len(detections):
        raise InvalidInputError(f"{len(prompts)} prompts and detections of {len(detections)} were given")


def visor(
    prompts: Sequence[SpatialPrompt], detections: Sequence[Sequence[Sequence[Detection]]], *, threshold: float = 0.1
) -> VisorScore:
    """VISOR over prompts with K pictures each (the paper: 4; box centres; OWL-ViT above 0.1).

    Args:
        prompts: what was asked.
        detections: prompt -> picture -> detections; the same number of pictures for each prompt.
        threshold: detections with a lower score do not count.
    """
    _checked(prompts, detections)
    counts = {len(pictures) for pictures in detections}
    if len(counts) != 1 or counts == {0}:
        raise InvalidInputError(f"VISOR needs the same number of pictures for each prompt, got {sorted(counts)}")
    pictures = counts.pop()
    both, right, per_prompt = [], [], []
    for prompt, group in zip(prompts, detections, strict=True):
        hits = 0
        for seen in group:
            first, second = _best(seen, prompt.first, threshold), _best(seen, prompt.second, threshold)
            there = first is not None and second is not None
            correct = first is not None and second is not None and holds(first, prompt.relation, second)
            both.append(there)
            right.append(correct)
            hits += correct
        per_prompt.append(hits)
    return VisorScore(
        Accuracy.of(both),
        Accuracy.of(right),
        Accuracy.of(correct for correct, there in zip(right, both, strict=True) if there),
        tuple(Accuracy.of(hits >= n for hits in per_prompt) for n in range(1, pictures + 1)),
    )


def _overlap(first: Detection, second: Detection) -> float:
    """Intersection over union."""
    width = min(first.box[2], second.box[2]) - max(first.box[0], second.box[0])
    height = min(first.box[3], second.box[3]) - max(first.box[1], second.box[1])
    shared = max(0.0, width) * max(0.0, height)
    union = first.size[0] * first.size[1] + second.size[0] * second.size[1] - shared
    return shared / union if union > 0 else 0.0


def compbench_spatial(
    prompts: Sequence[SpatialPrompt],
    detections: Sequence[Sequence[Detection]],
    *,
    iou_threshold: float = 0.1,
    threshold: float = 0.0,
) -> float:
    """A score in the manner of T2I-CompBench's 2-D spatial one (Huang et al., arXiv 2307.06350), in [0, 1].

    Half of it asks for the objects (a quarter of the mean certainty each), half for the relation, which counts where
    the centres are further apart along the asked axis than along the other; that half falls with their overlap
    beyond a threshold. With another detector than the benchmark's, figures compare models, not papers.

    Args:
        prompts: one a picture.
        detections: of each picture.
        iou_threshold: overlap that costs nothing.
        threshold: detections with a lower score do not count.
    """
    _checked(prompts, detections)
    total = 0.0
    for prompt, seen in zip(prompts, detections, strict=True):
        first, second = _best(seen, prompt.first, threshold), _best(seen, prompt.second, threshold)
        total += 0.25 * ((first.score if first else 0.0) + (second.score if second else 0.0))
        if first is None or second is None:
            continue
        across = abs(first.centre[0] - second.centre[0])
        down = abs(first.centre[1] - second.centre[1])
        along = across > down if prompt.relation in ("left of", "right of") else down > across
        if along and holds(first, prompt.relation, second):
            overlap = _overlap(first, second)
            total += 0.5 if overlap < iou_threshold else 0.5 * iou_threshold / overlap
    return total / len(prompts)


def geneval_position(
    prompts: Sequence[SpatialPrompt],
    detections: Sequence[Sequence[Detection]],
    *,
    threshold: float = 0.3,
    margin: float = 0.1,
) -> Accuracy:
    """GenEval's position task (Ghosh et al., arXiv 2310.11513): both objects, and the relation beyond a margin.

    GenEval shifts each axis of the offset of centres towards zero by `margin` times the sum of both sizes, scales what
    is left to length one and asks for more than one half along the relation; diagonal pairs satisfy two relations.

    Args:
        prompts: one a picture.
        detections: of each picture.
        threshold: detections with a lower score do not count.
        margin: see above.
    """
    _checked(prompts, detections)
    hits = []
    for prompt, seen in zip(prompts, detections, strict=True):
        first, second = _best(seen, prompt.first, threshold), _best(seen, prompt.second, threshold)
        if first is None or second is None:
            hits.append(False)
            continue
        offset = []
        for axis in (0, 1):
            apart = first.centre[axis] - second.centre[axis]
            free = max(abs(apart) - margin * (first.size[axis] + second.size[axis]), 0.0)
            offset.append(math.copysign(free, apart))
        length = math.hypot(*offset)
        if length == 0:
            hits.append(False)
            continue
        x, y = offset[0] / length, offset[1] / length
        seen_relations = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
        hits.append(seen_relations[prompt.relation])
    return Accuracy.of(hits)


@dataclass(frozen=True)
class AttributeResponse:
    """How a measured attribute follows the scale.

    Attributes:
        scales: M scales, ascending.
        subject: mean measured value of the subject at each scale.
        others: mean measured value of the other subjects; NaN where there is none.
        spearman: rank correlation of scale and measured value of the subject over all pictures.
        rising: part of neighbouring scales between which the subject's mean grows.
        spill: change of the others over the whole range, as a part of the subject's change.
        pictures: pictures that entered.
    """

    scales: tuple[float, ...]
    subject: tuple[float, ...]
    others: tuple[float, ...]
    spearman: float
    rising: float
    spill: float
    pictures: int


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties averaged."""
    order = values.argsort(stable=True)
    ranks = torch.empty_like(values)
    ranks[order] = torch.arange(len(values), dtype=values.dtype)
    for value in values.unique():
        same = values == value
        ranks[same] = ranks[same].mean()
    return ranks


def _mean(values: Iterable[float]) -> float:
    listed = [value for value in values if not math.isnan(value)]
    return sum(listed) / len(listed) if listed else math.nan


def attribute_response(
    scales: Sequence[float], subject: Sequence[Sequence[float]], others: Sequence[Sequence[float]] | None = None
) -> AttributeResponse:
    """The response curve of one attribute.

    Args:
        scales: M different scales.
        subject: M lists of the subject's measured values, one a picture in the same order of seeds; NaN where the
            subject was not found.
        others: the same of the other subjects.

    Raises:
        InvalidInputError: for fewer than two scales, uneven lists, or too few measured values.
    """
    if len(scales) < 2 or len(set(scales)) != len(scales):
        raise InvalidInputError(f"a response needs at least two different scales, got {list(scales)}")
    if len(subject) != len(scales) or (others is not None and len(others) != len(scales)):
        raise InvalidInputError(f"{len(scales)} scales need as many lists of values")
    order = sorted(range(len(scales)), key=lambda index: scales[index])
    pairs = [(scales[index], value) for index in order for value in subject[index] if not math.isnan(value)]
    if len(pairs) < 3:
        raise InvalidInputError(f"a rank correlation needs at least three measured values, got {len(pairs)}")
    table = torch.tensor(pairs, dtype=torch.float64)
    first, second = _ranks(table[:, 0]), _ranks(table[:, 1])
    first, second = first - first.mean(), second - second.mean()
    size = float(first.norm() * second.norm())
    spearman = float((first * second).sum()) / size if size > 0 else 0.0
    means = [_mean(subject[index]) for index in order]
    other_means = [_mean(others[index]) if others is not None else math.nan for index in order]
    rising = [later > earlier for earlier, later in itertools.pairwise(means)]
    change, spilled = means[-1] - means[0], other_means[-1] - other_means[0]
    spill = abs(spilled) / abs(change) if change and not math.isnan(change) else math.nan
    return AttributeResponse(
        tuple(scales[index] for index in order),
        tuple(means),
        tuple(other_means),
        spearman,
        sum(rising) / len(rising),
        spill,
        len(pairs),
    )


def leakage_rate(leaked: Iterable[bool]) -> Accuracy:
    """Part of items (or pictures) that leaked, with its confidence interval; fewer is better."""
    return Accuracy.of(leaked)


def oracle_detector(pictures: Sequence[Any], names: Sequence[str]) -> list[list[Detection]]:
    """Detections of the lab world's oracle.

    Args:
        pictures: float images [3, H, W] in [-1, 1], or PIL images.
        names: what is looked for: a shape (`circle`), or a colour and a shape (`red circle`).
    """
    found: list[list[Detection]] = []
    for reading in read_scenes(list(pictures)):
        seen = []
        for entry in reading.objects:
            for name in (entry.shape, f"{entry.colour} {entry.shape}"):
                if name in names:
                    seen.append(Detection(name, entry.box, entry.confidence))
        found.append(seen)
    return found


class ZeroShotDetector:
    """Any zero-shot object detector of transformers (OWL-ViT, OWLv2, Grounding DINO).

    Args:
        model: Hub id or folder.
        threshold: detections with a lower score are left out.
        device: where it runs.
    """

    def __init__(
        self, model: str = "google/owlvit-base-patch32", *, threshold: float = 0.1, device: str = "cpu"
    ) -> None:
        from transformers import pipeline

        self.threshold = threshold
        self.pipeline = pipeline("zero-shot-object-detection", model=model, device=device)

    def __call__(self, pictures: Sequence[Any], names: Sequence[str]) -> list[list[Detection]]:
        """Detections of each PIL picture."""
        labels = {f"a photo of {_with_article(name)}": name for name in names}
        found = []
        for picture in pictures:
            results = self.pipeline(picture, candidate_labels=list(labels), threshold=self.threshold)
            found.append(
                [
                    Detection(
                        labels.get(entry["label"], entry["label"]),
                        tuple(float(entry["box"][side]) for side in ("xmin", "ymin", "xmax", "ymax")),  # type: ignore[arg-type]
                        float(entry["score"]),
                    )
                    for entry in results
                ]
            )
        return found
