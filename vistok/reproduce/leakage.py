"""Leakage: one object's colour or shade in another, before and after its words are encoded without their context.

Kaplan et al., "Follow the Flow: On Information Flow Across Textual Tokens in Text-to-Image Models"
(arXiv:2504.01137). The paper replaces a leaked item's token states by those of the item alone, and finds that most
tokens of an item are redundant. Here the prompts are built to leak, both arms share their noise, and the lab's oracle
judges, where the paper asks people and a vision-language model.

Letters: K prompts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vistok.controllers.leakage import LeakageFix
from vistok.data.shapes import COLOURS, SHAPES, Description, Phrase, Reading, read_scenes, satisfies
from vistok.hub import load, recommended_sampling
from vistok.metrics.accuracy import Accuracy, oracle_agreement
from vistok.metrics.spatial import leakage_rate
from vistok.nn.prompts import describe_pipeline
from vistok.nn.spans import covered_tokens, find_subject, token_spans

from . import CLAIMS
from .drawing import (
    MODEL,
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

__all__ = ["LeakPrompt", "leak_prompts", "run"]

NAME = "leakage"
PAPER = "version 1: 85 % fewer leakage errors (images judged by a vision-language model and people)"
REDUNDANCY_PAPER = "version 1: 21 % fewer errors without redundant tokens; 30 to 68 % of an item's tokens are redundant"
SHOWN = 6
SAME = 0.9  # agreement of pictures that counts as "the same object"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LeakPrompt:
    """A prompt built to leak.

    Attributes:
        kind: what leaks: key of `KINDS`.
        source: the object whose attribute may leak.
        target: the object that it may leak into.
        source_first: whether the source stands first in the prompt.
    """

    kind: str
    source: Phrase
    target: Phrase
    source_first: bool = True

    @property
    def description(self) -> Description:
        """What the prompt says."""
        pair = (self.source, self.target)
        return Description(pair if self.source_first else pair[::-1])

    @property
    def text(self) -> str:
        """The prompt."""
        return str(self.description)

    @property
    def items(self) -> list[str]:
        """Both objects' words, without their articles."""
        return [str(phrase).split(maxsplit=1)[1] for phrase in self.description.objects]

    def leaked(self, reading: Reading) -> bool | None:
        """Whether the target shows the source's attribute; None where the target is not in the picture."""
        seen = find_object(reading, self.target)
        if seen is None:
            return None
        return seen.shade == self.source.shade if self.kind == "shade" else seen.colour == self.source.colour


@dataclass(frozen=True)
class Kind:
    """A way of leaking.

    Attributes:
        title: in words.
        chance: rate at which training scenes show the same without any leak.
    """

    title: str
    chance: float


KINDS = {
    "open colour": Kind("the first object's colour in a second one whose colour is left open", 1 / 8),
    "said colour": Kind("the first object's colour in a second one of another colour", 0.0),
    "backwards": Kind("the second object's colour in a first one whose colour is left open", 1 / 8),
    "shade": Kind("the first object's shade (light, dark) in a second one whose shade is left open", 1 / 4),
}


def leak_prompts(count: int, seed: int) -> list[LeakPrompt]:
    """`count` prompts in turn of every kind, all different."""
    kinds = list(KINDS)
    prompts: dict[str, LeakPrompt] = {}
    # Some pairs of objects become the same prompt when a colour is left out.
    for first, second in two_objects(2 * count, seed):
        number = len(prompts)
        kind = kinds[number % len(kinds)]
        if kind == "shade":
            shade = ("light", "dark")[number // len(kinds) % 2]
            prompt = LeakPrompt(kind, replace(first, shade=shade), second)
        else:
            target = second if kind == "said colour" else Phrase(second.shape)
            prompt = LeakPrompt(kind, first, target, source_first=kind != "backwards")
        if len(prompts) < count:
            prompts.setdefault(prompt.text, prompt)
    return list(prompts.values())


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    pipeline: Any = None,
    sampling: Mapping[str, Any] | None = None,
    num_prompts: int | None = None,
) -> Report:
    """Draw prompts that leak, as they are and fixed, and long items with fewer tokens.

    Args:
        output: folder for `leakage.json` and `leakage.png`.
        quick: 24 prompts of each part instead of 400 and 200.
        seed: of prompts and noise.
        on_progress: called with what is done, units done, units in all.
        pipeline: a diffusers text-to-image pipeline; None loads the shipped one.
        sampling: its keyword arguments; None takes what the shipped checkpoint recommends.
        num_prompts: overrides what `quick` decides (half of it for the second part).

    Raises:
        KeyboardInterrupt: after saving the stages that finished.
    """
    count = num_prompts or (24 if quick else 400)
    progress = on_progress or (lambda what, done, total: None)
    claim = CLAIMS[NAME]
    report = Report(NAME, claim.title, claim.paper)
    pipe: Any = load(MODEL) if pipeline is None else pipeline
    settings = dict(sampling) if sampling is not None else recommended_sampling(MODEL)
    report.settings = {
        "quick": quick,
        "seed": seed,
        "model": MODEL if pipeline is None else type(pipe).__name__,
        "num_prompts": count,
        "sampling": settings,
        "environment": environment(),
    }
    if quick:
        report.notes.append("quick run: too few prompts to quote any figure of it")
    examples = _leakage(pipe, count, seed, settings, report, progress)
    report.save(output)
    examples |= _redundancy(pipe, max(count // 2, 2), seed, settings, report, progress)
    report.save(output)
    report.picture = f"{NAME}.png"
    _draw(examples, report, Path(output) / report.picture)
    report.complete = True
    report.save(output)
    return report


def _counter(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    done = 0

    def count(finished: int) -> None:
        nonlocal done
        done += finished
        progress(what, done, total)

    return count


# ------------------------------------------------------------------------------------------------------------- leakage
def _leakage(
    pipe: Any, count: int, seed: int, sampling: dict[str, Any], report: Report, progress: Progress
) -> dict[str, Any]:
    prompts = leak_prompts(count, seed)
    texts = [prompt.text for prompt in prompts]
    seeds = [seed * 1_000_003 + number for number in range(count)]
    fix = LeakageFix({prompt.text: prompt.items for prompt in prompts})
    pictures, readings = {}, {}
    for arm, steer in (("before", None), ("after", partial(_constant, fix))):
        on_batch = _counter(progress, f"{arm} the fix", count)
        pictures[arm] = draw(pipe, texts, seeds, steer, sampling=sampling, on_batch=on_batch)
        readings[arm] = read_scenes(pictures[arm])
    report.notes.append(
        "leakage: a picture counts where the oracle finds the object that may be tainted before and after the fix; "
        "the rate without any leak is that of the training scenes (1 in 8 for an open colour)"
    )
    if all(slot.kind == "clip" for slot in describe_pipeline(pipe).encoders if slot.tokens):
        report.notes.append(
            "a CLIP text encoder is causal: the states of the first object have not seen the second one, so what leaks "
            "backwards arises in the denoiser's attention, where no change of the text states is expected to stop it"
        )
    report.figures["leakage"] = {}
    every_change: list[float] = []
    for kind in KINDS:
        rows = [row for row, prompt in enumerate(prompts) if prompt.kind == kind]
        report.findings.append(_rate_finding(kind, prompts, readings, rows, report, every_change))
    report.findings.append(_binding_finding(prompts, readings, report))
    changed = mean_interval(every_change)
    report.figures["leakage"]["all"] = {"change": changed.to_dict()}
    chosen = _tainted_first(prompts, readings)[:SHOWN]
    return {
        "before": [pictures["before"][row] for row in chosen],
        "after": [pictures["after"][row] for row in chosen],
        "titles": [texts[row].replace(" and ", " and\n") for row in chosen],
    }


def _tainted_first(prompts: Sequence[LeakPrompt], readings: Mapping[str, Sequence[Reading]]) -> list[int]:
    """Prompts that leak before and not after, then those that leak before, then the rest."""

    def rank(row: int) -> tuple[bool, bool]:
        before, after = (prompts[row].leaked(readings[arm][row]) for arm in ("before", "after"))
        return before is not True, after is not False

    return sorted(range(len(prompts)), key=rank)


def _rate_finding(
    kind: str,
    prompts: Sequence[LeakPrompt],
    readings: Mapping[str, Sequence[Reading]],
    rows: Sequence[int],
    report: Report,
    every_change: list[float],
) -> Finding:
    verdicts = {arm: {row: prompts[row].leaked(readings[arm][row]) for row in rows} for arm in readings}
    shared = [row for row in rows if None not in (verdicts["before"][row], verdicts["after"][row])]
    rates = {arm: leakage_rate(bool(verdicts[arm][row]) for row in shared) for arm in readings}
    changes = [float(bool(verdicts["after"][row])) - float(bool(verdicts["before"][row])) for row in shared]
    change = mean_interval(changes)
    every_change += changes
    found = {arm: Accuracy.of(verdict is not None for verdict in verdicts[arm].values()) for arm in readings}
    chance = KINDS[kind].chance
    report.figures["leakage"][kind] = {
        **{arm: rates[arm].to_dict() for arm in rates},
        "change": change.to_dict(),
        "chance": chance,
        "target_found": {arm: found[arm].to_dict() for arm in found},
    }
    # Without a leak to begin with there is nothing to stop.
    leaks = bool(shared) and rates["before"].interval[0] > chance
    measured = (
        f"{rates['before']} before, {rates['after']} after; change {100 * change.value:+.1f} points "
        f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]; without any leak about {100 * chance:.0f} %"
        if shared
        else "the object was not found"
    )
    if shared and not leaks:
        measured += "; this model hardly leaks here"
    holds = None if not leaks else True if change.high < 0 else False if change.low >= 0 else None
    return Finding(f"encoding items without their context stops {KINDS[kind].title}", PAPER, measured, holds)


def _binding_finding(
    prompts: Sequence[LeakPrompt], readings: Mapping[str, Sequence[Reading]], report: Report
) -> Finding:
    """What the prompts do say must not suffer."""
    right = {
        arm: [satisfies(prompt.description, reading).satisfied for prompt, reading in zip(prompts, read, strict=True)]
        for arm, read in readings.items()
    }
    shares = {arm: Accuracy.of(hits) for arm, hits in right.items()}
    change = mean_interval(
        [float(after) - before for before, after in zip(right["before"], right["after"], strict=True)]
    )
    report.figures["prompt_shown"] = {
        **{arm: share.to_dict() for arm, share in shares.items()},
        "change": change.to_dict(),
    }
    return Finding(
        "the fix does not cost what the prompt does say (both objects, with the colours and shades it names)",
        "fixed pictures show the item that was missing (shown in pictures)",
        f"{shares['before']} before, {shares['after']} after; change {100 * change.value:+.1f} points "
        f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]",
        # Where hardly a prompt is drawn right there is nothing to lose.
        None if shares["before"].value < 0.2 else True if change.low > -0.05 else False if change.high < 0 else None,
    )


# ---------------------------------------------------------------------------------------------------------- redundancy
def _long_items(count: int, seed: int) -> list[Phrase]:
    """Objects described by three or four words ("large dark red circle")."""
    rng = np.random.default_rng(seed + 1)
    found: dict[Phrase, None] = {}
    while len(found) < count:
        shape, colour = SHAPES[int(rng.integers(len(SHAPES)))], COLOURS[int(rng.integers(len(COLOURS)))]
        shade = (None, "light", "dark")[int(rng.integers(3))]
        found[Phrase(shape, colour, ("small", "large")[int(rng.integers(2))], shade)] = None
    return list(found)


def _tokens(pipe: Any, text: str, item: str) -> int:
    """How many tokens an item takes in the first encoder whose tokens reach the denoiser."""
    slot = next(slot for slot in describe_pipeline(pipe).encoders if slot.tokens)
    return len(covered_tokens(token_spans(text, slot.tokenizer), find_subject(text, item), slot.length))


def _redundancy(
    pipe: Any, count: int, seed: int, sampling: dict[str, Any], report: Report, progress: Progress
) -> dict[str, Any]:
    phrases = _long_items(count, seed)
    texts = [str(phrase) for phrase in phrases]
    items = {text: [text.split(maxsplit=1)[1]] for text in texts}
    seeds = [seed * 1_000_003 + 500_000 + number for number in range(count)]
    arms = {
        "all tokens": None,
        "last token": LeakageFix(items, replace=False, drop="redundant", representative="last"),
        "first token": LeakageFix(items, replace=False, drop="redundant", representative="first"),
    }
    pictures, readings = {}, {}
    for arm, fix in arms.items():
        steer = None if fix is None else partial(_constant, fix)
        on_batch = _counter(progress, f"long items, {arm}", count)
        pictures[arm] = draw(pipe, texts, seeds, steer, sampling=sampling, on_batch=on_batch)
        readings[arm] = read_scenes(pictures[arm])
    sizes = [_tokens(pipe, text, items[text][0]) for text in texts]
    dropped = 1 - len(sizes) / sum(sizes)
    agreement = {arm: oracle_agreement(readings["all tokens"], readings[arm]) for arm in arms if arm != "all tokens"}
    right = {
        arm: Accuracy.of(
            satisfies(Description((phrase,)), reading).satisfied for phrase, reading in zip(phrases, read, strict=True)
        )
        for arm, read in readings.items()
    }
    pixels = {arm: float((pictures[arm] - pictures["all tokens"]).abs().mean()) * 127.5 for arm in agreement}
    report.figures["redundancy"] = {
        "tokens_per_item": sum(sizes) / len(sizes),
        "share_dropped": dropped,
        "agreement": {
            arm: {name: share.to_dict() for name, share in found.items()} for arm, found in agreement.items()
        },
        "prompt_shown": {arm: share.to_dict() for arm, share in right.items()},
        "mean_pixel_change": pixels,
    }
    last, first = agreement["last token"]["object"], agreement["first token"]["object"]
    low, high = last.interval
    seen = any(reading.objects for reading in readings["all tokens"])
    report.findings.append(
        Finding(
            f"most tokens of an item are redundant: pictures keep their object without them ({SAME:.0%} at least)",
            REDUNDANCY_PAPER,
            f"{100 * dropped:.0f} % of {sum(sizes)} tokens dropped; object the same (shape and colour) in {last}, "
            f"keeping the first token instead in {first}; everything that the prompt says is shown by "
            f"{right['all tokens']} with all tokens, {right['last token']} with the last one",
            None if not seen or last.total == 0 else True if low >= SAME else False if high < SAME else None,
        )
    )
    change = mean_interval(
        [
            float(satisfies(Description((phrase,)), one).satisfied) - satisfies(Description((phrase,)), other).satisfied
            for phrase, one, other in zip(phrases, readings["last token"], readings["all tokens"], strict=True)
        ]
    )
    report.figures["redundancy"]["prompt_shown_change"] = change.to_dict()
    report.findings.append(
        Finding(
            "pictures are no worse without redundant tokens",
            REDUNDANCY_PAPER,
            f"prompts shown: change {100 * change.value:+.1f} points "
            f"[{100 * change.low:+.1f}, {100 * change.high:+.1f}]",
            None if not right["all tokens"].correct else _not_worse(change),
        )
    )
    shown = slice(0, SHOWN)
    return {**{arm: list(images[shown]) for arm, images in pictures.items()}, "items": texts[shown]}


def _constant(fix: LeakageFix, rows: range) -> LeakageFix:
    return fix


def _not_worse(change: MeanInterval, margin: float = 0.05) -> bool | None:
    return True if change.low > -margin else False if change.high < 0 else None


# ---------------------------------------------------------------------------------------------------------------- plot
def _draw(examples: Mapping[str, Any], report: Report, path: Path) -> None:
    """Pictures before and after, rates with intervals, and agreement with fewer tokens."""
    figure = new_figure(11.5, 9.5)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.6, 1.0])
    upper, lower = halves
    left, right = upper.subfigures(1, 2)
    for axes, arm in zip(left.subplots(2, 1), ("before", "after"), strict=True):
        show_strip(axes, examples[arm], examples["titles"] if arm == "before" else [], arm)
        axes.tick_params(labelsize=5)
    left.suptitle("prompts built to leak, same noise", fontsize=9)
    arms = ("all tokens", "last token", "first token")
    for axes, arm in zip(right.subplots(3, 1), arms, strict=True):
        titles = [text.replace(" ", "\n") for text in examples["items"]] if arm == arms[0] else []
        show_strip(axes, examples[arm], titles, arm)
        axes.tick_params(labelsize=5)
    right.suptitle("items with all tokens, and with one", fontsize=9)
    rates, agreement = lower.subplots(1, 2)
    for place, kind in enumerate(KINDS):
        found = report.figures["leakage"][kind]
        for side, (arm, colour) in enumerate((("before", "#c8553d"), ("after", "#0b7a75"))):
            _bar(rates, place + 0.36 * (side - 0.5), found[arm], colour, arm if place == 0 else None)
        rates.hlines(100 * found["chance"], place - 0.45, place + 0.45, colors="black", linestyles="--", linewidth=0.8)
    rates.set_xticks(range(len(KINDS)), list(KINDS))
    rates.set_title("pictures in which it leaks, % (dashed: without any leak)", fontsize=9)
    if rates.containers:
        rates.legend(fontsize=8, frameon=False)
    names = ("object", "shape", "colour")
    for place, name in enumerate(names):
        for side, (arm, colour) in enumerate((("last token", "#0b7a75"), ("first token", "#b9b9b9"))):
            found = report.figures["redundancy"]["agreement"][arm][name]
            _bar(agreement, place + 0.36 * (side - 0.5), found, colour, f"{arm} only" if place == 0 else None)
    agreement.set_xticks(range(len(names)), ["shape and colour", "shape", "colour"])
    agreement.set_ylim(0, 109)
    dropped = 100 * report.figures["redundancy"]["share_dropped"]
    agreement.set_title(f"same object as with all tokens, % ({dropped:.0f} % of the tokens dropped)", fontsize=9)
    if agreement.containers:
        agreement.legend(fontsize=8, frameon=False)
    for axes in (rates, agreement):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"{report.settings['model']}, {report.settings['num_prompts']} prompts, read by the oracle; error bars at 95 %",
        fontsize=8,
    )
    save_figure(figure, path)


def _bar(axes: Any, where: float, share: Mapping[str, Any], colour: str, label: str | None) -> None:
    if share["value"] is None:
        return
    height = 100 * share["value"]
    error = [[max(0.0, height - 100 * share["low"])], [max(0.0, 100 * share["high"] - height)]]
    axes.bar(where, height, 0.34, color=colour, label=label, yerr=error, capsize=3, error_kw={"linewidth": 0.8})
