"""Attribute directions: one subject's size or shade, turned up and down by one vector in the text encoder's output.

Baumann et al., "Continuous, Subject-Specific Attribute Control in T2I Models by Identifying Semantic Directions"
(arXiv:2403.17064). The paper shows its control in pictures; here the lab's oracle measures it: the subject's radius or
tone in pictures that share prompt and noise and differ in the scale alone, the same of the object beside it, and both
against the obvious baseline, writing the adjective into the prompt.

Letters: K prompts, M scales.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.controllers.attribute_directions import (
    AttributeDelta,
    AttributeDirections,
    AttributeEdit,
    ContrastivePrompts,
    DirectionLearner,
    LearningSettings,
    PromptPair,
    contrast_delta,
)
from vistok.data.shapes import COLOURS, SHAPES, Description, Phrase, Reading, SeenObject, read_scenes
from vistok.errors import InvalidInputError
from vistok.hub import load, recommended_sampling
from vistok.metrics.accuracy import Accuracy
from vistok.metrics.spatial import AttributeResponse, attribute_response
from vistok.nn.prompts import describe_pipeline

from . import CLAIMS
from .drawing import (
    MODEL,
    PAIRS,
    MeanInterval,
    draw,
    find_object,
    mean_interval,
    new_figure,
    save_figure,
    show_strip,
    two_objects,
)
from .report import Finding, Report, environment

__all__ = ["lab_prompts", "run"]

NAME = "attribute-directions"
WORDS = {"size": ("small", "large"), "shade": ("light", "dark")}  # for less, for more
UNITS = {"size": "radius in pixels of 64", "shade": "darkness, -1 palest to 1 darkest"}
METHODS = {"contrast": "from contrastive prompts", "learned": "learned from the denoiser"}
BASELINE = "adjective"
SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0)
DELAY = 0.2  # of the steps, the authors' default
STEPS = 15  # of the sampler, fewer than the checkpoint recommends: thousands of pictures in minutes
LEARNING = LearningSettings(
    steps=80,
    micro_steps=4,
    scales=4,
    scale_range=(0.1, 1.5),
    learning_rate=0.03,
    num_inference_steps=20,
    trajectory_pairs=10,
    size=None,
)
LEAST_RHO, MOST_SPILL = 0.9, 0.15
CANDIDATES = 15  # prompts that are drawn, at most, for each one wanted
SHOWN = 2  # prompts whose pictures are kept for the plot
PAPER = "continuous, smooth control of one subject in both directions (shown in pictures, without a figure)"

Progress = Callable[[str, int, int], None]


@dataclass
class Arm:
    """What one way of changing an attribute did.

    Attributes:
        scales: M, ascending; the baseline's words for less, none, more count as the lowest scale, 0, the highest.
        subject: M lists of K measured values; NaN where it was not found.
        other: the same of the other object.
        moved: M lists of K distances, in pixels, of the other object from where the plain picture has it.
        shown: the pictures of the first prompts, M a prompt.
    """

    scales: tuple[float, ...]
    subject: list[list[float]] = field(default_factory=list)
    other: list[list[float]] = field(default_factory=list)
    moved: list[list[float]] = field(default_factory=list)
    shown: list[list[Tensor]] = field(default_factory=list)

    @cached_property
    def response(self) -> AttributeResponse | None:
        """The curve; None where too little was found to have one."""
        try:
            return attribute_response(self.scales, self.subject, self.other)
        except InvalidInputError:
            return None

    def rhos(self) -> list[float]:
        """K rank correlations, each inside one prompt; NaN where fewer than three values were measured."""
        found = []
        for column in zip(*self.subject, strict=True):
            enough = sum(not math.isnan(value) for value in column) >= 3
            curve = attribute_response(self.scales, [[value] for value in column], resamples=1) if enough else None
            found.append(math.nan if curve is None else curve.within)
        return found

    def shifts(self) -> list[float]:
        """K mean distances of the other object at the two outermost scales."""
        return [(low + high) / 2 for low, high in zip(self.moved[0], self.moved[-1], strict=True)]


@dataclass(frozen=True)
class Sweep:
    """The prompts and what is the same for every arm.

    Attributes:
        pairs: K pairs (subject, other).
        texts: K prompts.
        seeds: K seeds.
        plain: pictures [K, 3, H, W] in [-1, 1] of the prompts as they are.
        readings: what the oracle sees in them.
        sampling: keyword arguments of the pipeline.
        delay: part of the steps before a direction acts.
    """

    pairs: list[tuple[Phrase, Phrase]]
    texts: list[str]
    seeds: list[int]
    plain: Tensor
    readings: list[Reading]
    sampling: dict[str, Any]
    delay: float


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    pipeline: Any = None,
    sampling: Mapping[str, Any] | None = None,
    num_prompts: int | None = None,
    scales: Sequence[float] = SCALES,
    learning: LearningSettings | None = None,
) -> Report:
    """Sweep the scale of both attributes with both kinds of directions, and edit the adjective for comparison.

    Args:
        output: folder for `attribute-directions.json`, its picture, and the directions as safetensors.
        quick: 12 prompts and a tenth of the learning, instead of 200 prompts.
        seed: of prompts and noise.
        on_progress: called with what is done, units done, units in all.
        pipeline: a diffusers text-to-image pipeline; None loads the shipped one.
        sampling: its keyword arguments; None takes what the shipped checkpoint recommends, with fewer steps.
        num_prompts: overrides what `quick` decides.
        scales: of the sweep, 0 among them.
        learning: settings of the learned directions.

    Raises:
        InvalidInputError: for scales without 0 or on one side of it only.
        KeyboardInterrupt: after saving the stages that finished.
    """
    ordered = tuple(sorted(scales))
    if 0.0 not in ordered or not ordered[0] < 0 < ordered[-1]:
        raise InvalidInputError(f"the scales of the sweep need 0 and numbers on both sides of it, got {list(scales)}")
    count = num_prompts or (12 if quick else 200)
    progress = on_progress or (lambda what, done, total: None)
    claim = CLAIMS[NAME]
    report = Report(NAME, claim.title, claim.paper)
    pipe: Any = load(MODEL) if pipeline is None else pipeline
    settings = dict(sampling) if sampling is not None else recommended_sampling(MODEL) | {"num_inference_steps": STEPS}
    if learning is None:
        learning = LEARNING if not quick else replace(LEARNING, steps=LEARNING.steps // 10)
    report.settings = {
        "quick": quick,
        "seed": seed,
        "model": MODEL if pipeline is None else type(pipe).__name__,
        "num_prompts": count,
        "scales": list(ordered),
        "delay": DELAY,
        "sampling": settings,
        "learning": {key: list(value) if isinstance(value, tuple) else value for key, value in vars(learning).items()},
        "environment": environment(),
    }
    if quick:
        report.notes.append("quick run: too few prompts and too little learning to quote any figure of it")
    directions = _directions(pipe, learning, seed, Path(output), progress)
    report.figures["directions"] = {
        attribute: {method: delta.norms() for method, delta in found.items()} for attribute, found in directions.items()
    }
    report.save(output)
    sweep = _screen(pipe, count, seed, settings, report, progress)
    arms: dict[str, dict[str, Arm]] = {}
    for attribute, found in directions.items():
        arms[attribute] = {}
        for method, delta in found.items():
            what = f"{attribute}: {method}"
            arms[attribute][method] = _steered(pipe, sweep, delta, ordered, attribute, partial(progress, what))
        what = f"{attribute}: {BASELINE}"
        arms[attribute][BASELINE] = _edited(pipe, sweep, ordered, attribute, partial(progress, what))
        _judge(attribute, arms[attribute], report)
        report.save(output)
    report.picture = f"{NAME}.png"
    _draw(arms, sweep, report, Path(output) / report.picture)
    report.complete = True
    report.save(output)
    return report


# ---------------------------------------------------------------------------------------------------------- directions
def lab_prompts(attribute: str) -> ContrastivePrompts:
    """Contrastive prompts of `size` or `shade` in the lab's grammar: every shape in two colours, alone and second."""
    less, more = WORDS[attribute]
    pairs = []
    for number, shape in enumerate(SHAPES):
        for colour in (COLOURS[number], COLOURS[(number + 3) % len(COLOURS)]):
            pairs.append(
                PromptPair(
                    str(Phrase(shape, colour)),
                    # Sizes stand before shades, and both before colours.
                    f"a {more} {colour} {shape}",
                    f"a {less} {colour} {shape}",
                    rf"\b{shape}\b",
                )
            )
    return ContrastivePrompts(pairs, ["", "a green ring and", "a purple square and", "a yellow heart and"])


def _directions(
    pipe: Any, learning: LearningSettings, seed: int, folder: Path, progress: Progress
) -> dict[str, dict[str, AttributeDelta]]:
    text = describe_pipeline(pipe)
    found: dict[str, dict[str, AttributeDelta]] = {}
    for attribute in WORDS:
        prompts = lab_prompts(attribute)
        learner = DirectionLearner(pipe, prompts, replace(learning, seed=seed))
        told = partial(_tell, progress, f"learning {attribute}", learning.steps)
        learned = learner.learn(on_step=told, progress=False)
        found[attribute] = {"contrast": contrast_delta(text, prompts), "learned": learned}
        for method, delta in found[attribute].items():
            folder.mkdir(parents=True, exist_ok=True)
            delta.save(folder / f"{attribute}-{method}.safetensors")
    return found


def _tell(progress: Progress, what: str, total: int, step: int, loss: float) -> None:
    progress(what, step, total)


# ------------------------------------------------------------------------------------------------------------- drawing
def _screen(pipe: Any, count: int, seed: int, sampling: dict[str, Any], report: Report, progress: Progress) -> Sweep:
    """The first prompts of which the pipeline draws both shapes: a subject that is not there cannot be steered."""
    pairs = two_objects(min(CANDIDATES * count, PAIRS), seed)
    texts = [str(Description(pair)) for pair in pairs]
    seeds = [seed * 1_000_003 + number for number in range(len(pairs))]
    right: list[int] = []
    pictures: list[Tensor] = []
    seen: list[Reading] = []
    tried = 0
    while tried < len(pairs) and len(right) < count:
        rows = range(tried, min(tried + 50, len(pairs)))
        drawn = draw(pipe, [texts[row] for row in rows], [seeds[row] for row in rows], sampling=sampling)
        readings = read_scenes(drawn)
        right += [
            row
            for row, reading in zip(rows, readings, strict=True)
            if len(reading.objects) == 2 and all(find_object(reading, phrase) for phrase in pairs[row])
        ]
        pictures.append(drawn)
        seen += readings
        tried = rows.stop
        progress("prompts with both objects", min(len(right), count), count)
    shown = Accuracy(len(right), tried)
    report.figures["prompts_with_both_objects"] = shown.to_dict()
    report.notes.append(
        f"prompts: two objects of different shape and colour, 'a red circle and a blue star'; steered are the first "
        f"{min(count, len(right))} of which {report.settings['model']} draws both shapes, and nothing else, without "
        f"steering ({shown}); subject is the first object in about one half of them and the second in the other"
    )
    if len(right) < count:
        report.notes.append(f"only {len(right)} of the {count} prompts wanted show both objects")
    chosen = right[:count] or list(range(min(count, tried)))
    ordered = [pairs[row] if row % 2 == 0 else pairs[row][::-1] for row in chosen]
    return Sweep(
        ordered,
        [texts[row] for row in chosen],
        [seeds[row] for row in chosen],
        torch.cat(pictures)[chosen],
        [seen[row] for row in chosen],
        sampling,
        DELAY,
    )


def _steered(
    pipe: Any,
    sweep: Sweep,
    delta: AttributeDelta,
    scales: tuple[float, ...],
    attribute: str,
    progress: Callable[[int, int], None],
) -> Arm:
    """Every prompt at every scale; scale 0 is the plain picture."""
    wanted = [scale for scale in scales if scale != 0.0]
    rows = [(number, scale) for number in range(len(sweep.texts)) for scale in wanted]
    subjects = {text: pair[0].shape for text, pair in zip(sweep.texts, sweep.pairs, strict=True)}

    def steer(chosen: range) -> AttributeDirections:
        edit = AttributeEdit(delta, subjects, [rows[row][1] for row in chosen])
        return AttributeDirections(edit, delay=sweep.delay)

    done = 0

    def count(finished: int) -> None:
        nonlocal done
        done += finished
        progress(done, len(rows))

    drawn = draw(
        pipe,
        [sweep.texts[number] for number, _ in rows],
        [sweep.seeds[number] for number, _ in rows],
        steer,
        sampling=sweep.sampling,
        on_batch=count,
    )
    by_scale = {scale: drawn[index :: len(wanted)] for index, scale in enumerate(wanted)} | {0.0: sweep.plain}
    return _measured(sweep, {scale: by_scale[scale] for scale in scales}, attribute)


def _edited(
    pipe: Any, sweep: Sweep, scales: tuple[float, ...], attribute: str, progress: Callable[[int, int], None]
) -> Arm:
    """The baseline: the adjective for less or more is written before the subject."""
    pictures = {}
    for side, (scale, word) in enumerate(zip((scales[0], scales[-1]), WORDS[attribute], strict=True)):
        texts = []
        for text, (subject, _) in zip(sweep.texts, sweep.pairs, strict=True):
            described = replace(subject, **{attribute: word})
            texts.append(text.replace(str(subject), str(described)))
        pictures[scale] = draw(pipe, texts, sweep.seeds, sampling=sweep.sampling)
        progress(side + 1, 2)
    return _measured(
        sweep, {scales[0]: pictures[scales[0]], 0.0: sweep.plain, scales[-1]: pictures[scales[-1]]}, attribute
    )


def _value(item: SeenObject | None, attribute: str) -> float:
    if item is None:
        return math.nan
    return item.radius * 64 if attribute == "size" else -item.tone


def _measured(sweep: Sweep, pictures: Mapping[float, Tensor], attribute: str) -> Arm:
    """Read the pictures [K, 3, H, W] of every scale; those of scale 0 are read already."""
    arm = Arm(tuple(pictures))
    at_rest = [find_object(reading, pair[1]) for reading, pair in zip(sweep.readings, sweep.pairs, strict=True)]
    for scale, images in pictures.items():
        subjects, others, moved = [], [], []
        readings = sweep.readings if scale == 0.0 else read_scenes(images)
        for reading, (subject, other), before in zip(readings, sweep.pairs, at_rest, strict=True):
            beside = find_object(reading, other)
            subjects.append(_value(find_object(reading, subject), attribute))
            others.append(_value(beside, attribute))
            known = beside is not None and before is not None
            moved.append(64 * math.dist(beside.centre, before.centre) if known else math.nan)  # type: ignore[union-attr]
        arm.subject.append(subjects)
        arm.other.append(others)
        arm.moved.append(moved)
    arm.shown = [[images[number] for images in pictures.values()] for number in range(min(SHOWN, len(sweep.texts)))]
    return arm


# ------------------------------------------------------------------------------------------------------------ verdicts
def _above(interval: tuple[float, float], bound: float) -> bool | None:
    """Whether an interval lies above a bound; None where it contains the bound or is unknown."""
    low, high = interval
    return True if low >= bound else False if high < bound else None


def _positive(mean: MeanInterval) -> bool | None:
    """Whether a mean is above 0 for sure; None where it may be either."""
    return True if mean.low > 0 else False if mean.high < 0 else None


def _judge(attribute: str, arms: Mapping[str, Arm], report: Report) -> None:
    curves = {name: arm.response for name, arm in arms.items()}
    shifts = {name: mean_interval(arm.shifts()) for name, arm in arms.items()}
    report.figures[attribute] = {
        name: {
            "response": None if curve is None else curve.to_dict(),
            "other_moved_pixels": shifts[name].to_dict(),
            "subject_found": [sum(not math.isnan(value) for value in values) for values in arms[name].subject],
        }
        for name, curve in curves.items()
    }
    for method, words in METHODS.items():
        curve = curves[method]
        claim = f"{attribute} follows the scale (rank correlation of at least {LEAST_RHO}), direction {words}"
        alone = f"no other object changes (at most {MOST_SPILL:.0%} of the subject's change), direction {words}"
        if curve is None:
            report.findings += [Finding(one, PAPER, "the subject was not found", None) for one in (claim, alone)]
            continue
        ends = ", ".join(
            f"{value:.2f} at {scale:+g}" for scale, value in zip(curve.scales, curve.subject) if not math.isnan(value)
        )
        report.findings.append(
            Finding(
                claim,
                PAPER,
                f"rho {curve.within:.3f} [{curve.within_interval[0]:.3f}, {curve.within_interval[1]:.3f}] inside a "
                f"prompt, mean of {len(arms[method].subject[0])}; {curve.spearman:.3f} over all pictures together; "
                f"{UNITS[attribute]}: {ends}",
                _above(curve.within_interval, LEAST_RHO),
            )
        )
        low, high = curve.absolute_spill_interval
        inside = _above((low, high), MOST_SPILL)
        report.findings.append(
            Finding(
                alone,
                "the attribute of one subject changes, others of the same class stay (shown in pictures)",
                f"the other object's mean absolute change is {100 * curve.absolute_spill:.1f} % "
                f"[{100 * low:.1f}, {100 * high:.1f}] of the subject's; change of its mean {100 * curve.spill:.1f} %",
                None if inside is None or math.isnan(low) else not inside,
            )
        )
    report.findings += [_against_adjective(attribute, arms, curves, shifts), _against_contrast(attribute, arms)]


def _against_adjective(
    attribute: str, arms: Mapping[str, Arm], curves: Mapping[str, AttributeResponse | None], shifts: Mapping[str, Any]
) -> Finding:
    # Of both methods the one that moves more, prompt by prompt: a direction without effect would leave all in place.
    steered = [max(pair) for pair in zip(*(arms[method].shifts() for method in METHODS), strict=True)]
    gaps = mean_interval([other - one for one, other in zip(steered, arms[BASELINE].shifts(), strict=True)])
    parts = []
    for name, curve in curves.items():
        if curve is not None:
            parts.append(
                f"{name}: other object moves {shifts[name].value:.2f} px, changes {100 * curve.absolute_spill:.0f} % "
                f"of the subject's change, rho {curve.within:.2f}"
            )
    parts.append(f"the adjective moves the other object {gaps} px more than the worse of both directions")
    return Finding(
        f"steering {attribute} leaves the rest of the picture where it is, editing the prompt's adjective does not",
        "directions keep the layout, other prompts draw other pictures (shown in pictures)",
        "; ".join(parts),
        _positive(gaps),
    )


def _against_contrast(attribute: str, arms: Mapping[str, Arm]) -> Finding:
    gaps = mean_interval(
        [one - other for one, other in zip(arms["learned"].rhos(), arms["contrast"].rhos(), strict=True)]
    )
    return Finding(
        f"learned directions of {attribute} work better than differences of encodings",
        "learned directions are clearly better (shown in pictures)",
        f"rank correlation inside a prompt: learned minus contrast {gaps}",
        _positive(gaps),
    )


# ---------------------------------------------------------------------------------------------------------------- plot
COLOUR = {"contrast": "#c8553d", "learned": "#0b7a75", BASELINE: "#8a8a8a"}


def _draw(arms: Mapping[str, Mapping[str, Arm]], sweep: Sweep, report: Report, path: Path) -> None:
    """Strips of pictures, response curves, and bars of correlation and spill."""
    figure = new_figure(11.5, 10.5)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.5, 1.0])
    upper, lower = halves
    grid = upper.subplots(SHOWN * len(METHODS) + 1, len(arms), squeeze=False)
    for column, (attribute, found) in enumerate(arms.items()):
        row = 0
        for number in range(SHOWN):
            for method in METHODS:
                axes = grid[row, column]
                row += 1
                if number >= len(found[method].shown):
                    axes.axis("off")
                    continue
                titles = [f"{scale:+g}" if scale else "0" for scale in found[method].scales] if row == 1 else []
                show_strip(axes, found[method].shown[number], titles, method)
                subject = sweep.pairs[number][0]
                axes.set_xlabel(f"{attribute} of the {subject.shape}: {sweep.texts[number]}", fontsize=8)
        less, more = WORDS[attribute]
        if found[BASELINE].shown:
            show_strip(grid[row, column], found[BASELINE].shown[0], [less, "plain", more], BASELINE)
    axes_below = lower.subplots(1, 2 * len(arms), squeeze=False)[0]
    for column, (attribute, found) in enumerate(arms.items()):
        curve_axes, bar_axes = axes_below[2 * column : 2 * column + 2]
        bars: dict[str, AttributeResponse] = {}
        for name, arm in found.items():
            curve = arm.response
            if curve is None:
                continue
            bars[name] = curve
            style = {"linestyle": "none", "marker": "s"} if name == BASELINE else {"marker": "o"}
            curve_axes.plot(curve.scales, curve.subject, color=COLOUR[name], label=name, markersize=4, **style)
            if name != BASELINE:
                curve_axes.plot(curve.scales, curve.others, color=COLOUR[name], linestyle=":", linewidth=1.2)
        curve_axes.set_title(f"{attribute}: subject (dotted: other object)", fontsize=9)
        curve_axes.set_xlabel("scale", fontsize=8)
        curve_axes.set_ylabel(UNITS[attribute], fontsize=8)
        if bars:
            curve_axes.legend(fontsize=7, frameon=False)
        _bars(bar_axes, bars)
        for axes in (curve_axes, bar_axes):
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    settings = report.settings
    figure.supxlabel(
        f"{settings['model']}, {len(sweep.texts)} prompts, {len(settings['scales'])} scales, same noise; "
        "error bars at 95 %",
        fontsize=8,
    )
    save_figure(figure, path)


def _bars(axes: Any, curves: Mapping[str, AttributeResponse]) -> None:
    """Rank correlation and spill of each arm, side by side."""
    for group, (value, interval, bound) in enumerate(
        (("within", "within_interval", LEAST_RHO), ("absolute_spill", "absolute_spill_interval", MOST_SPILL))
    ):
        for place, (name, curve) in enumerate(curves.items()):
            height = getattr(curve, value)
            low, high = getattr(curve, interval)
            if math.isnan(height):
                continue
            error = [[max(0.0, height - low)], [max(0.0, high - height)]]
            where = group + 0.26 * (place - 1)
            axes.bar(where, height, 0.24, color=COLOUR[name], yerr=error, capsize=2, error_kw={"linewidth": 0.8})
        axes.hlines(bound, group - 0.45, group + 0.45, colors="black", linestyles="--", linewidth=0.8)
    axes.set_xticks([0, 1], ["rank correlation\n(at least)", "other's change /\nsubject's (at most)"])
    axes.set_title("goals: dashed", fontsize=9)
