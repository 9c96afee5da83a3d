"""Does the picture show what the prompt asks, where it asks: spatial accuracy, attribute response, leakage.

Letters: B pictures, K pictures a prompt, M scales.

Scores read detections, so any detector works: the lab's oracle, a transformers zero-shot detector, or your own function
from pictures to `Detection`s.
"""

from __future__ import annotations

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
    """How a measured attribute follows the scale. Intervals are at 95 %, by resampling pictures (percentiles).

    Attributes:
        scales: M scales, ascending.
        subject: mean measured value of the subject at each scale.
        others: mean measured value of the other subjects; NaN where there is none.
        spearman: rank correlation of scale and measured value of the subject over all pictures together. Pictures that
            differ before they are steered keep it below 1 even if each of them responds perfectly.
        spearman_interval: of it.
        within: mean over the pictures of the rank correlation inside each, where only the scale differs; NaN where
            fewer than three values of every picture were measured.
        within_interval: of it.
        rising: part of neighbouring scales between which the subject's mean grows.
        spill: change of the others' mean over the whole range, as a part of the subject's.
        spill_interval: of it.
        absolute_spill: mean absolute change of the others, as a part of the subject's mean absolute change; unlike
            `spill` it also counts changes that point either way and cancel in the mean.
        absolute_spill_interval: of it.
        pictures: measured values that entered.
    """

    scales: tuple[float, ...]
    subject: tuple[float, ...]
    others: tuple[float, ...]
    spearman: float
    spearman_interval: tuple[float, float]
    within: float
    within_interval: tuple[float, float]
    rising: float
    spill: float
    spill_interval: tuple[float, float]
    absolute_spill: float
    absolute_spill_interval: tuple[float, float]
    pictures: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which knows no NaN: None stands for it."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return [plain(one) for one in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {name: plain(value) for name, value in vars(self).items()}


def _spearman(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """[R] rank correlations of two vectors [n] whose entries count `weights` [R, n] times; 0 where one is constant."""

    def ranks(values: Tensor) -> Tensor:
        _, places = values.unique(return_inverse=True)
        places = places.expand(len(weights), -1)
        counts = weights.new_zeros(len(weights), int(places.max()) + 1).scatter_add_(1, places, weights)
        found = (counts.cumsum(1) - counts / 2).gather(1, places)  # ties share the mean of their ranks
        return found - (weights * found).sum(1, keepdim=True) / weights.sum(1, keepdim=True)

    one, two = ranks(first), ranks(second)
    size = ((weights * one.square()).sum(1) * (weights * two.square()).sum(1)).sqrt()
    return torch.where(size > 0, (weights * one * two).sum(1) / size, 0.0)


def _columns(lists: Sequence[Sequence[float]], width: int) -> Tensor:
    """float64 [M, width], short lists filled up with NaN."""
    return torch.tensor([[*values, *[math.nan] * (width - len(values))] for values in lists], dtype=torch.float64)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """|part| / |whole|, NaN where the whole is 0."""
    return torch.where(whole == 0, math.nan, part.abs() / whole.abs())


def _interval(samples: Tensor) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = torch.nanquantile(samples, torch.tensor([0.025, 0.975], dtype=samples.dtype)).tolist()
    return low, high


def attribute_response(
    scales: Sequence[float],
    subject: Sequence[Sequence[float]],
    others: Sequence[Sequence[float]] | None = None,
    *,
    resamples: int = 1000,
) -> AttributeResponse:
    """The response curve of one attribute.

    Args:
        scales: M different scales.
        subject: M lists of the subject's measured values, one a picture in the same order of seeds; NaN where the
            subject was not found.
        others: the same of the other subjects.
        resamples: draws behind the intervals (the same ones in every call).

    Raises:
        InvalidInputError: for fewer than two scales, uneven lists, or too few measured values.
    """
    if len(scales) < 2 or len(set(scales)) != len(scales):
        raise InvalidInputError(f"a response needs at least two different scales, got {list(scales)}")
    if len(subject) != len(scales) or (others is not None and len(others) != len(scales)):
        raise InvalidInputError(f"{len(scales)} scales need as many lists of values")
    if resamples < 1:
        raise InvalidInputError(f"an interval needs at least one resample, got {resamples}")
    order = sorted(range(len(scales)), key=lambda index: scales[index])
    ordered = torch.tensor([scales[index] for index in order], dtype=torch.float64)
    width = max(len(values) for values in [*subject, *(others or [])])
    values = _columns([subject[index] for index in order], width)
    beside = _columns([others[index] if others is not None else () for index in order], width)
    measured = ~values.isnan()
    if int(measured.sum()) < 3:
        raise InvalidInputError(f"a rank correlation needs at least three measured values, got {int(measured.sum())}")

    inside = torch.full((width,), math.nan, dtype=torch.float64)
    for column in torch.nonzero(measured.sum(0) >= 3).flatten().tolist():
        there = measured[:, column]
        inside[column] = _spearman(ordered[there], values[there, column], torch.ones(1, int(there.sum())).double())[0]
    moved, spilled = values[-1] - values[0], beside[-1] - beside[0]
    both = ~(moved.isnan() | spilled.isnan())

    def spill(rows: Tensor) -> Tensor:
        """[...] for pictures [..., K]."""
        means = [table[rows].nanmean(-1) for table in (beside[-1], beside[0], values[-1], values[0])]
        return _share(means[0] - means[1], means[2] - means[3])

    def absolute(rows: Tensor) -> Tensor:
        there = both[rows]
        return _share(
            torch.where(there, spilled[rows].abs(), 0.0).sum(-1), torch.where(there, moved[rows].abs(), 0.0).sum(-1)
        )

    everything = torch.arange(width)
    drawn = torch.randint(width, (resamples, width), generator=torch.Generator().manual_seed(0))
    # How often each picture was drawn; the first row is the sample itself.
    times = torch.stack([rows.bincount(minlength=width) for rows in [everything, *drawn]]).double()
    places, pictures = measured.nonzero(as_tuple=True)
    together = _spearman(ordered[places], values[measured], times[:, pictures])
    means = values.nanmean(1)
    rising = means[1:] > means[:-1]
    return AttributeResponse(
        tuple(ordered.tolist()),
        tuple(means.tolist()),
        tuple(beside.nanmean(1).tolist()),
        float(together[0]),
        _interval(together[1:]),
        float(inside.nanmean()),
        _interval(inside[drawn].nanmean(1)),
        float(rising.double().mean()),
        float(spill(everything)),
        _interval(spill(drawn)),
        float(absolute(everything)),
        _interval(absolute(drawn)),
        int(measured.sum()),
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
