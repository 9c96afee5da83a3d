"""FlexTok: what an image keeps in 1, 2, 4, ... N ordered tokens, which images need many, and what the order is for.

Bachmann, Allardice, Mizrahi et al., "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length"
(arXiv:2502.13967): one tokenizer serves every length from 1 to 256 tokens, coarse to fine; class-conditional generation
on ImageNet stays below FID 2 from 8 to 128 tokens.

Letters: B images, H, W pixels, N tokens, k tokens of a prefix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.data.shapes import sample_scene
from vistok.data.shapes.oracle import Reading, read_scenes
from vistok.errors import InvalidInputError, UnknownNameError
from vistok.metrics.accuracy import Accuracy, class_accuracy, oracle_agreement
from vistok.metrics.evaluate import (
    HELD_OUT_SEED,
    class_requests,
    describe_sampling,
    held_out_images,
    image_generators,
    reference_images,
    sample_images,
    sampler_settings,
)
from vistok.metrics.frechet import LAB_EXTRACTOR, FrechetDistance

from . import CLAIMS
from .drawing import mean_interval, new_figure, save_figure, show_strip
from .report import Finding, Report, environment

__all__ = ["run"]

ORDERED, UNORDERED, GENERATOR = "flextok-shapes", "flextok-shapes-unordered", "flextok-ar-shapes"
SIMPLE, COMPLEX = 1, 3  # objects in a scene
FEW = 4  # tokens of a "short" prefix
BATCH = 50
SHOWN = 6

Progress = Callable[[str, int, int], None]


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    tokenizer: Any | None = None,
    unordered: Any | None = None,
    pipeline: Any | None = None,
    extractor: str | torch.nn.Module = LAB_EXTRACTOR,
    num_scenes: int | None = None,
    num_samples: int | None = None,
) -> Report:
    """Measure reconstruction and generation against the number of tokens.

    Args:
        output: folder for `flextok.json` and `flextok.png`.
        quick: 16 scenes of each kind and 16 samples instead of 128 and 192.
        seed: of all draws.
        on_progress: called with what is done, units done, units in all.
        tokenizer: the ordered tokenizer; None loads the shipped one.
        unordered: one trained without nested dropout; None loads the shipped one, if there is one.
        pipeline: class-conditional pipeline that writes the tokens; None loads the shipped one, if there is one.
        extractor: for the Frechet distance.
        num_scenes, num_samples: override what `quick` decides.

    Raises:
        InvalidInputError: the two tokenizers make different numbers of tokens.
        KeyboardInterrupt: after saving the stages that finished.
    """
    scenes = num_scenes or (16 if quick else 128)
    samples = num_samples or (16 if quick else 192)
    progress = on_progress or (lambda what, done, total: None)
    claim = CLAIMS["flextok"]
    report = Report("flextok", claim.title, claim.paper)
    from vistok.hub import load

    tokenizer = load(ORDERED) if tokenizer is None else tokenizer
    unordered = _shipped(UNORDERED, load) if unordered is None else unordered
    if unordered is not None and unordered.num_registers != tokenizer.num_registers:
        raise InvalidInputError(
            f"both tokenizers must make as many tokens; got {tokenizer.num_registers} and {unordered.num_registers}"
        )
    lengths = _lengths(int(tokenizer.num_registers))
    decoding = {name: tokenizer.config[name] for name in ("num_inference_steps", "guidance_scale", "guidance")}
    report.settings = {
        "quick": quick,
        "seed": seed,
        "num_scenes": scenes,
        "num_samples": samples,
        "lengths": lengths,
        "decoding": decoding,
        "environment": environment(),
    }
    report.notes = [
        f"tokenizer: {ORDERED}, {tokenizer.num_registers} tokens of {tokenizer.codebook_size} codes, "
        f"{describe_sampling(decoding)}; all lengths of an image start from the same noise",
    ]
    if quick:
        report.notes.append("quick run: too few samples to quote any figure of it")

    side = tokenizer.image_size[0]
    worlds = {count: _World(count, scenes, side) for count in (SIMPLE, COMPLEX)}
    drawn = {
        count: _prefixes(tokenizer, world.images, lengths, seed, progress, f"{count}-object scenes")
        for count, world in worlds.items()
    }
    errors = {count: _errors(drawn[count], world.images) for count, world in worlds.items()}
    _error_falls(errors, lengths, report)
    report.save(output)
    _objects_survive(worlds, drawn, lengths, report, progress)
    report.save(output)
    _distances(worlds[SIMPLE].images, drawn[SIMPLE], lengths, extractor, report)
    report.save(output)
    _complex_needs_more(errors, lengths, report)
    report.save(output)
    _order_matters(unordered, worlds[SIMPLE], errors[SIMPLE], lengths, seed, report, progress)
    report.save(output)
    written = _generation(pipeline, samples, seed, lengths, extractor, report, progress)
    report.picture = "flextok.png"
    _draw(worlds, drawn, written, lengths, report, Path(output) / report.picture)
    report.complete = True
    report.save(output)
    return report


def _shipped(name: str, load: Callable[[str], Any]) -> Any | None:
    try:
        return load(name)
    except UnknownNameError:
        return None


def _lengths(total: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({1 << power for power in range(total.bit_length())} | {total})


class _World:
    """Held-out scenes of one number of objects, and what the oracle reads in them."""

    def __init__(self, objects: int, count: int, side: int) -> None:
        self.images = held_out_images([sample_scene(HELD_OUT_SEED, index, objects) for index in range(count)], side)
        self._readings: list[Reading] = []

    @property
    def readings(self) -> list[Reading]:
        """Of the originals."""
        if not self._readings:
            self._readings = list(read_scenes(self.images))
        return self._readings


# ------------------------------------------------------------------------------------------------------ reconstruction
@torch.no_grad()
def _prefixes(
    tokenizer: Any, images: Tensor, lengths: Sequence[int], seed: int, progress: Progress, what: str
) -> Tensor:
    """Images drawn from the first tokens, [B, lengths, 3, H, W]."""
    parts = []
    batch = max(1, BATCH // len(lengths))
    size = (images.shape[-2], images.shape[-1])
    for first in range(0, len(images), batch):
        part = images[first : first + batch].to(tokenizer.device)
        draws = image_generators(seed, first, first + len(part))
        tokens = tokenizer.encode(part)
        parts.append(tokenizer.decode_prefixes(tokens, lengths, generator=draws, image_size=size).float().cpu())
        progress(f"drawing {what}", min(first + batch, len(images)), len(images))
    return torch.cat(parts).clamp(-1, 1)


def _errors(drawn: Tensor, images: Tensor) -> Tensor:
    """Mean squared error of pixels in [0, 1], float64 [B, lengths]."""
    return ((drawn - images[:, None]).double() / 2).square().flatten(2).mean(2)


def _series(values: Sequence[Any], lengths: Sequence[int]) -> str:
    return ", ".join(f"{length}: {value}" for length, value in zip(lengths, values, strict=True))


def _error_falls(errors: Mapping[int, Tensor], lengths: Sequence[int], report: Report) -> None:
    every = torch.cat(list(errors.values()))
    means = [mean_interval(column) for column in every.T.tolist()]
    changes = [mean_interval((every[:, at + 1] - every[:, at]).tolist()) for at in range(len(lengths) - 1)]
    whole = mean_interval((every[:, -1] - every[:, 0]).tolist())
    report.figures["error"] = {
        "all": dict(zip(map(str, lengths), [mean.to_dict() for mean in means])),
        **{
            f"{count}_objects": dict(zip(map(str, lengths), [mean_interval(c).to_dict() for c in table.T.tolist()]))
            for count, table in errors.items()
        },
        "change_at_each_step": [change.to_dict() for change in changes],
    }
    decibels = [f"{-10 * torch.tensor(mean.value).log10().item():.1f}" for mean in means]
    rises = any(change.low > 0 for change in changes)
    report.findings.append(
        Finding(
            "every doubling of the tokens lowers the reconstruction error",
            "abstract: any length from 1 to 256 tokens, compressing hierarchically (no single figure)",
            f"PSNR of the mean error in dB by tokens: {_series(decibels, lengths)}; "
            f"{sum(change.high < 0 for change in changes)} of {len(changes)} steps lower it beyond chance (95 %), "
            f"{sum(change.low > 0 for change in changes)} raise it",
            False if rises or whole.low > 0 else True if whole.high < 0 else None,
        )
    )


def _objects_survive(
    worlds: Mapping[int, _World],
    drawn: Mapping[int, Tensor],
    lengths: Sequence[int],
    report: Report,
    progress: Progress,
) -> None:
    """Whether the oracle still reads shapes and colours."""
    shares: dict[int, list[Accuracy]] = {}
    for count, world in worlds.items():
        shares[count] = []
        for at in range(len(lengths)):
            shares[count].append(oracle_agreement(world.readings, drawn[count][:, at])["scene"])
            progress(f"reading {count}-object scenes", at + 1, len(lengths))
    report.figures["agreement"] = {
        f"{count}_objects": dict(zip(map(str, lengths), [share.to_dict() for share in row]))
        for count, row in shares.items()
    }
    few = max(at for at, length in enumerate(lengths) if length <= FEW)
    simple = shares[SIMPLE]
    report.findings.append(
        Finding(
            f"the first tokens say what matters: {lengths[few]} of {lengths[-1]} keep an object's shape and colour",
            "abstract: tokens go from coarse to fine, and compress by meaning (no single figure)",
            f"one-object scenes whose shape and colour the oracle reads again, by tokens: {_series(simple, lengths)}; "
            f"three objects: {_series([f'{100 * share.value:.1f} %' for share in shares[COMPLEX]], lengths)}",
            # Where not even all tokens keep them, a short prefix tells nothing.
            None
            if simple[-1].value < 0.5
            else True
            if simple[few].interval[0] > 0.5
            else False
            if simple[few].interval[1] < 0.5
            else None,
        )
    )


def _distances(
    images: Tensor, drawn: Tensor, lengths: Sequence[int], extractor: str | torch.nn.Module, report: Report
) -> None:
    """Whether pictures from any number of tokens look like pictures of the lab world."""
    side = images.shape[-1]
    distance = FrechetDistance(extractor, reference=f"the same held-out scenes before the tokenizer, {side}x{side}")
    distance.add_reference(images)
    found = []
    for at, length in enumerate(lengths):
        distance.reset_samples()
        distance.add_samples(drawn[:, at])
        found.append(distance.compute(sampler=f"decoded from {length} tokens"))
    distance.reset_samples()
    distance.add_samples(reference_images(len(images), side))
    real = distance.compute(sampler="renderer")
    report.figures["fid"] = {str(length): one.to_dict() for length, one in zip(lengths, found)}
    report.figures["fid_of_other_real_scenes"] = real.to_dict()
    report.notes.append(
        f"FID: evaluator {real.evaluator}; reference {found[0].reference}, n={found[0].reference_samples}; samples "
        f"n={found[0].samples}; resize {found[0].resize}; other real scenes reach {real.value:.2f}"
    )
    report.findings.append(
        Finding(
            "a picture drawn from any number of tokens is a plausible one",
            "abstract: plausible reconstructions whatever the length (no single figure)",
            f"FID by tokens: {_series([f'{one.value:.2f}' for one in found], lengths)}; other real scenes: "
            f"{real.value:.2f}",
            # No interval here: only a clear difference counts. Twice the distance of other real scenes is far.
            True if max(one.value for one in found) <= 2 * real.value else None,
        )
    )


def _complex_needs_more(errors: Mapping[int, Tensor], lengths: Sequence[int], report: Report) -> None:
    half = len(lengths) - 2 if len(lengths) > 1 else 0
    bound = float(torch.cat([table[:, half] for table in errors.values()]).median())
    needed = {count: tokens_needed(table, lengths, bound) for count, table in errors.items()}
    means = {count: mean_interval(values.tolist()) for count, values in needed.items()}
    pairs = min(len(values) for values in needed.values())
    gap = mean_interval((needed[COMPLEX][:pairs] - needed[SIMPLE][:pairs]).tolist())
    report.figures["tokens_needed"] = {
        "max_error": bound,
        **{f"{count}_objects": mean.to_dict() for count, mean in means.items()},
        "difference": gap.to_dict(),
    }
    report.findings.append(
        Finding(
            "complex images need more tokens than simple ones",
            "abstract: a fixed number of tokens cannot adapt to an image's complexity (no single figure)",
            f"tokens until the error is at most {bound:.2g} (the median after {lengths[half]}; never counts as "
            f"{2 * lengths[-1]}): {means[SIMPLE].value:.1f} with one object, {means[COMPLEX].value:.1f} with three; "
            f"difference {gap}",
            True if gap.low > 0 else False if gap.high < 0 else None,
        )
    )


def tokens_needed(errors: Tensor, lengths: Sequence[int], bound: float) -> Tensor:
    """The shortest length [B] whose error [B, lengths] is within the bound, twice the longest where none is."""
    within = errors <= bound
    first = within.double().argmax(1)
    table = torch.tensor(lengths, dtype=torch.float64)
    return torch.where(within.any(1), table[first], 2 * table[-1])


def _order_matters(
    unordered: Any | None,
    world: _World,
    ordered_errors: Tensor,
    lengths: Sequence[int],
    seed: int,
    report: Report,
    progress: Progress,
) -> None:
    claim = "without nested dropout the tokens have no order: a prefix of them is worth less"
    paper = "abstract: nested dropout is what gives plausible pictures at every length (no single figure)"
    if unordered is None:
        missing = f"recipes/{UNORDERED}.yaml is not trained here"
        report.findings.append(Finding(claim, paper, missing, None))
        return
    drawn = _prefixes(unordered, world.images, lengths, seed, progress, "unordered tokens")
    errors = _errors(drawn, world.images)
    shares = [oracle_agreement(world.readings, drawn[:, at])["scene"] for at in range(len(lengths))]
    gaps = [mean_interval((errors[:, at] - ordered_errors[:, at]).tolist()) for at in range(len(lengths))]
    report.figures["unordered"] = {
        "error": dict(zip(map(str, lengths), [mean_interval(column).to_dict() for column in errors.T.tolist()])),
        "agreement": dict(zip(map(str, lengths), [share.to_dict() for share in shares])),
        "error_more_than_ordered": dict(zip(map(str, lengths), [gap.to_dict() for gap in gaps])),
    }
    report.notes.append(
        f"{UNORDERED} is trained as long as {ORDERED}, by the same recipe without nested dropout; it has never seen a "
        "missing token"
    )
    short = gaps[:-1] or gaps
    agreement = [f"{100 * share.value:.1f} %" for share in shares]
    report.findings.append(
        Finding(
            claim,
            paper,
            f"its error is greater by, by tokens: {_series(gaps, lengths)}; its one-object scenes keep shape and "
            f"colour: {_series(agreement, lengths)}",
            True if all(gap.low > 0 for gap in short) else False if any(gap.high < 0 for gap in short) else None,
        )
    )


# ---------------------------------------------------------------------------------------------------------- generation
def _generation(
    pipeline: Any | None,
    count: int,
    seed: int,
    lengths: Sequence[int],
    extractor: str | torch.nn.Module,
    report: Report,
    progress: Progress,
) -> dict[int, Tensor]:
    """Pictures of classes written in k tokens, by k."""
    claim = "a generator may stop after a few tokens: the picture already shows the class"
    paper = "abstract: FID below 2 from 8 to 128 tokens, class-conditional (ImageNet, Inception: another scale)"
    if pipeline is None:
        from vistok.hub import load_pipeline

        pipeline = _shipped(GENERATOR, load_pipeline)
    if pipeline is None:
        report.findings.append(Finding(claim, paper, f"recipes/{GENERATOR}.yaml is not trained here", None))
        return {}
    settings = sampler_settings(pipeline)
    report.settings["sampling"] = settings
    labels = class_requests(count)
    shown = [length for length in lengths if length in (1, FEW, lengths[-1])]
    written: dict[int, Tensor] = {}
    shares: list[Accuracy] = []
    distances = []
    side = pipeline.tokenizer.image_size[0]
    distance = FrechetDistance(extractor, reference=f"held-out scenes of one object, {side}x{side}")
    distance.add_reference(reference_images(count, side))
    for length in shown:
        images = sample_images(
            pipeline,
            labels,
            seed=seed,
            sampling={**settings, "num_tokens": length},
            on_progress=progress,
            what=f"writing {length} tokens",
        )
        written[length] = images
        shares.append(class_accuracy(images, labels)["class"])
        distance.reset_samples()
        distance.add_samples(images)
        distances.append(distance.compute(sampler=f"{length} tokens, {describe_sampling(settings)}"))
    report.figures["generation"] = {
        str(length): {"class": share.to_dict(), "fid": one.to_dict()}
        for length, share, one in zip(shown, shares, distances)
    }
    report.notes.append(f"generator: {GENERATOR}, {describe_sampling(settings)}, n={count}")
    few = shares[-2] if len(shares) > 1 else shares[-1]
    report.findings.append(
        Finding(
            claim,
            paper,
            f"pictures of the asked shape and colour (oracle), by tokens: {_series(shares, shown)}; FID: "
            f"{_series([f'{one.value:.2f}' for one in distances], shown)}",
            # Where not even all tokens show the class, a short prefix tells nothing.
            None
            if shares[-1].value < 0.5
            else True
            if few.interval[0] > 0.5
            else False
            if few.interval[1] < 0.5
            else None,
        )
    )
    return written


# ------------------------------------------------------------------------------------------------------------- picture
def _bounds(entries: Mapping[str, Mapping[str, Any]], scale: float = 1.0) -> tuple[list[float], list[list[float]]]:
    """Values and their distances to the ends of their intervals, as matplotlib draws error bars."""
    values = [scale * entry["value"] for entry in entries.values()]
    low = [max(0.0, value - scale * entry["low"]) for value, entry in zip(values, entries.values())]
    high = [max(0.0, scale * entry["high"] - value) for value, entry in zip(values, entries.values())]
    return values, [low, high]


def _draw(
    worlds: Mapping[int, _World],
    drawn: Mapping[int, Tensor],
    written: Mapping[int, Tensor],
    lengths: Sequence[int],
    report: Report,
    path: Path,
) -> None:
    """Strips of prefixes, error and agreement against the number of tokens, and written pictures."""
    figure = new_figure(11, 7.5)
    grid = figure.add_gridspec(4, 2, height_ratios=[1, 1, 3, 1.3])
    titles = ["original", *(f"{length} token{'s' if length > 1 else ''}" for length in lengths)]
    for row, (count, world) in enumerate(worlds.items()):
        for column in range(2):
            index = column % len(world.images)
            axes = figure.add_subplot(grid[row, column])
            label = f"{count} object{'s' if count > 1 else ''}" if column == 0 else ""
            show_strip(axes, [world.images[index], *drawn[count][index]], titles if row == 0 else [], label)
    figures = report.figures
    ticks = list(map(str, lengths))
    axes = figure.add_subplot(grid[2, 0])
    lines = {"1 object": "1_objects", "3 objects": "3_objects"}
    colours = {"1 object": "#0b7a75", "3 objects": "#c8553d", "1 object, no order": "#8a8a8a"}
    for label, key in lines.items():
        values, bars = _bounds(figures["error"][key])
        axes.errorbar(ticks, values, bars, label=label, color=colours[label], marker="o", capsize=3)
    if "unordered" in figures:
        values, bars = _bounds(figures["unordered"]["error"])
        label = "1 object, no order"
        axes.errorbar(ticks, values, bars, label=label, color=colours[label], marker="o", capsize=3, linestyle="--")
    axes.set_yscale("log")
    axes.set_title("mean squared error", fontsize=10)
    axes.set_xlabel("tokens", fontsize=9)
    axes.legend(fontsize=8)
    axes = figure.add_subplot(grid[2, 1])
    for label, key in lines.items():
        values, bars = _bounds(figures["agreement"][key], 100)
        axes.errorbar(ticks, values, bars, label=label, color=colours[label], marker="o", capsize=3)
    if "unordered" in figures:
        values, bars = _bounds(figures["unordered"]["agreement"], 100)
        label = "1 object, no order"
        axes.errorbar(ticks, values, bars, label=label, color=colours[label], marker="o", capsize=3, linestyle="--")
    axes.set_ylim(0, 103)
    axes.set_title("scenes whose shapes and colours are read again, %", fontsize=10)
    axes.set_xlabel("tokens", fontsize=9)
    axes.legend(fontsize=8)
    labels = class_requests(max((len(images) for images in written.values()), default=0))
    for column, (length, images) in enumerate(list(written.items())[-2:]):
        axes = figure.add_subplot(grid[3, column])
        chosen = [index * 9 % len(images) for index in range(min(SHOWN, len(images)))]
        share = figures["generation"][str(length)]["class"]["value"]
        show_strip(axes, [images[index] for index in chosen], _names(labels, chosen), f"written: {length}")
        axes.set_xlabel(f"{100 * share:.0f} % show shape and colour", fontsize=8)
    figure.supxlabel(
        f"{report.settings['num_scenes']} held-out scenes of each kind; "
        f"{describe_sampling(report.settings['decoding'])}; error bars at 95 %",
        fontsize=8,
    )
    save_figure(figure, path)


def _names(labels: Sequence[int], chosen: Sequence[int]) -> list[str]:
    from vistok.data.shapes import CLASS_NAMES

    return [CLASS_NAMES[labels[index]].replace(" ", "\n") for index in chosen]
