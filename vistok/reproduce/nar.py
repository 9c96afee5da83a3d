"""NAR against raster order: the same tokenizer, classes and size of network, only the decoding order differs.

He et al., "Neighboring Autoregressive Modeling for Efficient Visual Generation" (arXiv:2503.10696), table 1: on
ImageNet 256x256, NAR-B needs 31 model calls where LlamaGen-B needs 256, makes 419.7 against 117.9 images a second
(A100) and reaches FID 4.65 against 5.46.

Shape letters: B images, N tokens an image.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.data.shapes import CLASS_NAMES
from vistok.errors import InvalidInputError, require
from vistok.files import atomic_path
from vistok.metrics.accuracy import Accuracy
from vistok.metrics.evaluate import (
    class_requests,
    describe_sampling,
    evaluate_generator,
    image_generators,
    reference_images,
    sampler_settings,
)
from vistok.metrics.frechet import LAB_EXTRACTOR, FrechetDistance
from vistok.tokens import VisualTokens

from . import CLAIMS
from .report import Finding, Report, environment, share_gap

__all__ = ["run"]

MODELS = {"NAR": "nar-shapes-class", "raster": "llamagen-shapes-class"}
BATCHES = (1, 16)
PAPER = "table 1, NAR-B against LlamaGen-B:"
PARTS = 5  # disjoint parts of the samples, whose distances say how noisy a distance is
T_95 = {4: 2.776}  # Student's t at 95 % by degrees of freedom

Progress = Callable[[str, int, int], None]


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    pipelines: Mapping[str, Any] | None = None,
    extractor: str | torch.nn.Module = LAB_EXTRACTOR,
    num_samples: int | None = None,
    repeats: int | None = None,
) -> Report:
    """Compare steps, time, oracle accuracy and Frechet distance of the two decoding orders.

    Args:
        output: folder for `nar.json` and `nar.png`.
        quick: 64 pictures and 2 timings instead of 1,000 and 9.
        seed: of all draws.
        on_progress: called with what is done, units done, units in all.
        pipelines: class-conditional pipelines by `"NAR"` and `"raster"`; None loads the shipped ones.
        extractor: for the Frechet distance.
        num_samples, repeats: override what `quick` decides.

    Raises:
        InvalidInputError: if the two pipelines write different grids.
        KeyboardInterrupt: after saving the stages that finished.
    """
    count = num_samples or (64 if quick else 1000)
    repeats = repeats or (2 if quick else 9)
    progress = on_progress or (lambda what, done, total: None)
    claim = CLAIMS["nar"]
    report = Report("nar", claim.title, claim.paper)
    if pipelines is None:
        from vistok.hub import load_pipeline

        pipelines = {arm: load_pipeline(name) for arm, name in MODELS.items()}
    arms = {arm: pipelines[arm] for arm in MODELS}
    grids = {arm: tuple(pipeline.generator.config.grid) for arm, pipeline in arms.items()}
    if len(set(grids.values())) > 1:
        raise InvalidInputError(f"both models must write the same grid; got {grids}")
    settings = {arm: sampler_settings(pipeline) for arm, pipeline in arms.items()}
    report.settings = {
        "quick": quick,
        "seed": seed,
        "num_samples": count,
        "repeats": repeats,
        "sampling": settings,
        "grid": list(grids["NAR"]),
        "environment": environment(),
    }
    report.figures = {
        arm: {
            "model": MODELS[arm],
            "parameters": sum(parameter.numel() for parameter in pipeline.generator.parameters()),
        }
        for arm, pipeline in arms.items()
    }
    report.notes = [
        f"{arm}: {MODELS[arm]}, {report.figures[arm]['parameters']:,} parameters, {describe_sampling(settings[arm])}"
        for arm in arms
    ]
    if quick:
        report.notes.append("quick run: too few samples to quote any figure of it")

    _measure_steps(arms, settings, report)
    report.save(output)
    _measure_time(arms, settings, repeats, seed, report, progress)
    report.save(output)
    pictures = _measure_quality(arms, settings, count, seed, extractor, report, progress, output)
    strips = {arm: film_strip(pipeline, settings[arm], seed) for arm, pipeline in arms.items()}
    report.picture = "nar.png"
    _draw(strips, pictures, report, Path(output) / report.picture)
    report.complete = True
    report.save(output)
    return report


# --------------------------------------------------------------------------------------------------------------- steps
def _labels(count: int, pipeline: Any) -> Tensor:
    return torch.tensor([label * 9 % len(CLASS_NAMES) for label in range(count)], device=pipeline.generator.device)


def _measure_steps(arms: Mapping[str, Any], settings: Mapping[str, Any], report: Report) -> None:
    rows, columns = report.settings["grid"]
    for arm, pipeline in arms.items():
        steps = pipeline.generator.sample(_labels(1, pipeline), generator=image_generators(0, 0, 1), **settings[arm])
        report.figures[arm]["steps"] = sum(1 for _ in steps)
    near, raster = (report.figures[arm]["steps"] for arm in ("NAR", "raster"))
    report.findings.append(
        Finding(
            "near to far needs rows + columns - 1 model calls, raster order rows x columns",
            f"{PAPER} 31 against 256 calls (8.3 times fewer) on 16x16 tokens",
            f"{near} against {raster} calls ({raster / near:.1f} times fewer) on {rows}x{columns} tokens",
            near == rows + columns - 1 and raster == rows * columns,
        )
    )


# ---------------------------------------------------------------------------------------------------------------- time
def _seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


@torch.no_grad()
def _measure_time(
    arms: Mapping[str, Any],
    settings: Mapping[str, Any],
    repeats: int,
    seed: int,
    report: Report,
    progress: Progress,
) -> None:
    """Milliseconds an image. The arms take turns, so that whatever else the machine does hits both."""
    done, total = 0, len(BATCHES) * (repeats + 1)
    for batch in BATCHES:
        tokens: dict[str, list[float]] = {arm: [] for arm in arms}
        whole: dict[str, list[float]] = {arm: [] for arm in arms}
        for repeat in range(repeats + 1):
            for arm, pipeline in arms.items():
                device = pipeline.generator.device
                labels = _labels(batch, pipeline)
                draws = image_generators(seed + repeat, 0, batch)
                generating, written = _seconds(
                    partial(pipeline.generator.generate, labels, generator=draws, **settings[arm]), device
                )
                decoding, _ = _seconds(partial(pipeline.tokenizer.decode, written), device)
                if repeat:  # the first one warms up
                    tokens[arm].append(1000 * generating / batch)
                    whole[arm].append(1000 * (generating + decoding) / batch)
            done += 1
            progress("timing", done, total)
        for arm in arms:
            report.figures[arm][f"batch_{batch}"] = {
                "tokens_ms_per_image": statistics.median(tokens[arm]),
                "picture_ms_per_image": statistics.median(whole[arm]),
                "all_picture_ms_per_image": whole[arm],
            }
        ratios = [raster / near for near, raster in zip(whole["NAR"], whole["raster"])]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        near, raster = (report.figures[arm][f"batch_{batch}"]["picture_ms_per_image"] for arm in ("NAR", "raster"))
        report.figures[f"speedup_batch_{batch}"] = {"median": middle, "least": low, "most": high}
        paper = "3.6 times the images a second on an A100 at the largest batch" if batch > 1 else "no figure at batch 1"
        report.findings.append(
            Finding(
                f"near to far is faster, batch {batch}",
                f"{PAPER} {paper}",
                f"{near:.1f} against {raster:.1f} ms an image, decoder included: {middle:.1f} times faster "
                f"(from {low:.1f} to {high:.1f} in {repeats} runs)",
                True if low > 1 else False if high < 1 else None,
            )
        )


# ------------------------------------------------------------------------------------------------------------- quality
def _measure_quality(
    arms: Mapping[str, Any],
    settings: Mapping[str, Any],
    count: int,
    seed: int,
    extractor: str | torch.nn.Module,
    report: Report,
    progress: Progress,
    output: str | os.PathLike[str],
) -> dict[str, Tensor]:
    """Accuracy and Frechet distance of each arm; returns its pictures [B, 3, H, W] in [-1, 1]."""
    pictures: dict[str, Tensor] = {}
    for arm, pipeline in arms.items():
        batches: list[Tensor] = []
        evaluation = evaluate_generator(
            pipeline,
            num_samples=count,
            seed=seed,
            sampling=settings[arm],
            extractor=extractor,
            on_progress=partial(_tell, progress, arm),
            on_images=partial(_keep, batches),
        )
        report.figures[arm].update(evaluation["class"])
        pictures[arm] = torch.cat(batches)
        report.save(output)
    report.findings += [_accuracy_finding(report), _distance_finding(pictures, count, extractor, report)]
    report.save(output)
    return pictures


def _tell(progress: Progress, arm: str, what: str, done: int, total: int) -> None:
    progress(f"{arm}: {what}", done, total)


def _keep(batches: list[Tensor], what: str, images: Tensor) -> None:
    batches.append(images)


def _accuracy_finding(report: Report) -> Finding:
    near, raster = (
        Accuracy(report.figures[arm]["class"]["correct"], report.figures[arm]["class"]["total"])
        for arm in ("NAR", "raster")
    )
    gap = share_gap(near, raster)
    report.figures["accuracy_difference"] = {"value": gap.value, "low": gap.low, "high": gap.high}
    return Finding(
        "quality does not suffer: as many pictures show the asked shape and colour (oracle)",
        f"{PAPER} Inception score 212.3 against 193.6",
        f"{near} against {raster}; difference {100 * gap.value:+.1f} points [{100 * gap.low:+.1f}, "
        f"{100 * gap.high:+.1f}]",
        # Two points are the least that matters; where the baseline itself fails, equal shares say nothing.
        None if raster.value < 0.5 else True if gap.low > -0.02 else False if gap.high < 0 else None,
    )


def _distance_finding(
    pictures: Mapping[str, Tensor], count: int, extractor: str | torch.nn.Module, report: Report
) -> Finding:
    near, raster = (report.figures[arm]["fid"] for arm in ("NAR", "raster"))
    claim = "quality does not suffer: the Frechet distance to held-out scenes is not higher"
    paper = f"{PAPER} FID 4.65 against 5.46 (ImageNet, Inception, 50,000 samples: another scale)"
    measured = (
        f"{near['value']:.3f} against {raster['value']:.3f}; other real scenes reach "
        f"{report.figures['NAR']['fid_of_real_scenes']['value']:.3f}, the tokenizer "
        f"{report.figures['NAR']['fid_of_the_tokenizer']['value']:.3f}"
    )
    report.notes.append(
        f"FID: evaluator {near['evaluator']}; reference {near['reference']}, n={near['reference_samples']}; "
        f"samples n={near['samples']}; resize {near['resize']}"
    )
    # Distances grow as samples get fewer, in both arms alike; parts of one size can be compared pair by pair.
    size = count // PARTS
    if size < 2:
        return Finding(claim, paper, measured, None)
    distance = FrechetDistance(extractor, reference="parts")
    distance.add_reference(reference_images(count, pictures["NAR"].shape[-1]))
    values: dict[str, list[float]] = {}
    for arm, images in pictures.items():
        values[arm] = []
        for part in range(PARTS):
            distance.reset_samples()
            distance.add_samples(images[part * size : (part + 1) * size])
            values[arm].append(distance.compute().value)
    gaps = [one - other for one, other in zip(values["NAR"], values["raster"])]
    middle = statistics.mean(gaps)
    half = T_95[PARTS - 1] * statistics.stdev(gaps) / math.sqrt(PARTS)
    report.figures["fid_difference"] = {"value": middle, "low": middle - half, "high": middle + half, "part": size}
    holds = True if middle + half < 0 else False if middle - half > 0 else None
    measured += f"; difference over {PARTS} parts of {size}: {middle:+.3f} [{middle - half:+.3f}, {middle + half:+.3f}]"
    # Equal within noise is "not higher" where the noise is small against the distance itself.
    if holds is None and middle + half < 0.1 * raster["value"]:
        holds = True
    return Finding(claim, paper, measured, holds)


# ------------------------------------------------------------------------------------------------------------- picture
@torch.no_grad()
def film_strip(pipeline: Any, settings: Mapping[str, Any], seed: int, label: int = 0) -> list[Tensor]:
    """How one picture grows: after each model call, the picture [3, H, W] in [-1, 1] with unwritten cells in grey."""
    labels = torch.tensor([label], device=pipeline.generator.device)
    frames = []
    for step in pipeline.generator.sample(labels, generator=image_generators(seed, 0, 1), **settings):
        grid = step.tokens.grid
        complete = VisualTokens(ids=step.tokens.ids, grid=grid)
        image = pipeline.tokenizer.decode(complete).float().cpu()[0].clamp(-1, 1)
        if step.tokens.mask is not None:
            known = step.tokens.mask[0].view(grid).cpu()
            cell = image.shape[-2] // grid[0], image.shape[-1] // grid[1]
            shown = known.repeat_interleave(cell[0], 0).repeat_interleave(cell[1], 1)
            image = image.where(shown, torch.tensor(-0.6))
        frames.append(image)
    return frames


def _show(axes: Any, images: Sequence[Tensor], titles: Sequence[str], label: str) -> None:
    """A row of pictures in one axes, each under its title."""
    gap = 3
    width = images[0].shape[-1]
    row = torch.ones(3, images[0].shape[-2], len(images) * (width + gap) - gap)
    for column, image in enumerate(images):
        row[..., column * (width + gap) : column * (width + gap) + width] = image
    axes.imshow(((row.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy(), interpolation="nearest")
    axes.xaxis.tick_top()
    axes.set_xticks([column * (width + gap) + width / 2 for column in range(len(images))][: len(titles)], titles)
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=9)
    axes.set_ylabel(label, fontsize=10)
    axes.spines[:].set_visible(False)


def _draw(strips: Mapping[str, list[Tensor]], pictures: Mapping[str, Tensor], report: Report, path: Path) -> None:
    """Film strips over equal numbers of model calls, samples, and bars of the figures."""
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"NAR": "#0b7a75", "raster": "#c8553d"}
    columns = 8
    near, raster = len(strips["NAR"]), len(strips["raster"])
    # Six moments while NAR grows, then two more while the raster catches up.
    calls = [max(1, round(near * (number + 1) / (columns - 2))) for number in range(columns - 2)]
    calls += [round((near + raster) / 2), raster]
    figure = Figure(figsize=(11, 9))
    canvas = FigureCanvasAgg(figure)
    rows = figure.add_gridspec(4, 1, left=0.04, right=0.99, bottom=0.37, top=0.97, hspace=0.22)
    for row, (arm, frames) in enumerate(strips.items()):
        titles = [f"{call} calls" for call in calls] if row == 0 else []
        _show(figure.add_subplot(rows[row]), [frames[min(call, len(frames)) - 1] for call in calls], titles, arm)
    for row, (arm, images) in enumerate(pictures.items(), start=2):
        chosen = [column * 9 % len(images) for column in range(min(columns, len(images)))]
        labels = class_requests(len(images))
        titles = [CLASS_NAMES[labels[number]] for number in chosen] if row == 2 else []
        _show(figure.add_subplot(rows[row]), [images[number] for number in chosen], titles, f"{arm} samples")
    figures = report.figures
    bars = {
        "model calls an image": {arm: figures[arm]["steps"] for arm in strips},
        "ms an image, batch 1": {arm: figures[arm]["batch_1"]["picture_ms_per_image"] for arm in strips},
        "ms an image, batch 16": {arm: figures[arm]["batch_16"]["picture_ms_per_image"] for arm in strips},
        "shape and colour right, %": {arm: 100 * figures[arm]["class"]["value"] for arm in strips},
        "FID (lower is better)": {
            **{arm: figures[arm]["fid"]["value"] for arm in strips},
            "VQ only": figures["NAR"]["fid_of_the_tokenizer"]["value"],
            "real": figures["NAR"]["fid_of_real_scenes"]["value"],
        },
    }
    lower = figure.add_gridspec(1, len(bars), left=0.04, right=0.99, bottom=0.07, top=0.32, wspace=0.3)
    for column, (title, values) in enumerate(bars.items()):
        axes = figure.add_subplot(lower[0, column])
        drawn = axes.bar(list(values), list(values.values()), color=[colours.get(arm, "#8a8a8a") for arm in values])
        axes.bar_label(drawn, labels=[f"{value:.3g}" for value in values.values()], fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        if "right" in title:
            low_high = [figures[arm]["class"] for arm in values]
            errors = [
                [100 * (entry["value"] - entry["low"]) for entry in low_high],
                [100 * (entry["high"] - entry["value"]) for entry in low_high],
            ]
            axes.errorbar(list(values), list(values.values()), errors, fmt="none", ecolor="black", capsize=4)
            axes.set_ylim(0, 109)
    fid = figures["NAR"]["fid"]
    figure.text(
        0.5,
        0.015,
        f"{report.settings['num_samples']} samples; FID evaluator {fid['evaluator']}, {fid['reference_samples']} "
        f"{fid['reference']}; error bars at 95 %",
        fontsize=8,
        ha="center",
    )
    with atomic_path(path) as temporary:
        canvas.print_png(str(temporary))
