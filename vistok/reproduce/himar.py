"""Hi-MAR: low-resolution pivots against plain masked autoregression, and a transformer head against an MLP.

Zheng et al., "Hierarchical Masked Autoregressive Models with Low-Resolution Token Pivots" (arXiv:2505.20288): on
ImageNet 256, MAR-B reaches FID 2.31; with hidden states of pivots 2.07; with a diffusion transformer as dense head
1.98; with scale vectors 1.93, at 0.286 s an image where MAR-B takes 0.526 s (H100, batch 128).

Letters: B pictures, H, W pixels.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vistok.data.shapes import CLASS_NAMES
from vistok.generators import MAR, HiMAR
from vistok.metrics.evaluate import describe_sampling, image_generators, sampler_settings
from vistok.metrics.frechet import LAB_EXTRACTOR

from . import CLAIMS
from .drawing import new_figure, save_figure, show_strip
from .report import Finding, Report, environment
from .variants import (
    Judged,
    Lab,
    Progress,
    Ratio,
    Variant,
    interleaved_ms,
    judge,
    judge_variants,
    lab_distance,
    quality_finding,
    show_bars,
    show_rows,
    show_shares,
    strip,
    training_flops,
)

__all__ = ["head_variants", "run"]

MODELS = {"Hi-MAR": "himar-shapes", "MAR": "mar-shapes"}
TOKENIZER = "kl-shapes"
PLAIN, MLP, TRANSFORMER = "MAR", "pivots, MLP head", "pivots, transformer head"
SAMPLING: dict[str, dict[str, Any]] = {
    "mar": {"guidance_scale": 2.0, "num_inference_steps": 64, "num_diffusion_steps": "ddim25"},
    "himar": {
        "guidance_scale": 2.0,
        "num_inference_steps": 4,
        "num_diffusion_steps": "ddim25",
        "num_dense_diffusion_steps": "ddim25",
    },
}
PAPER = "ablation (B, FID, equal epochs):"
COLUMNS = 8


def head_variants(grid: int, channels: int, width: int) -> list[Variant]:
    """MAR, and Hi-MAR with each dense head, as wide and as deep as each other.

    Args:
        grid: tokens a side.
        channels: of the latents.
        width: of stacks and heads.
    """
    shared = {
        "latent_channels": channels,
        "grid": [grid, grid],
        "encoder_layers": 2,
        "encoder_heads": 4,
        "decoder_layers": 2,
        "decoder_heads": 4,
        "num_classes": len(CLASS_NAMES),
        "num_condition_tokens": 4,
        "attention_dropout": 0.0,
        "projection_dropout": 0.0,
        "head_layers": 2,
        "head_width": width,
        "num_diffusion_steps": "ddim25",
        "diffusion_repeats": 1,
    }
    pivots = {
        **shared,
        "hidden_size": width,
        "pivot_grid": [grid // 2, grid // 2],
        "dense_head_layers": 2,
        "dense_head_width": width,
        "dense_head_heads": 4,
        "num_dense_diffusion_steps": "ddim25",
        "pivot_rate": 0.5,
        "pivot_warmup_epochs": 0,
    }
    return [
        Variant(PLAIN, "mar", {**shared, "encoder_hidden_size": width, "decoder_hidden_size": width}),
        Variant(MLP, "himar", {**pivots, "dense_head": "mlp"}),
        Variant(TRANSFORMER, "himar", {**pivots, "dense_head": "transformer"}),
    ]


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    pipelines: Mapping[str, Any] | None = None,
    tokenizer: str = TOKENIZER,
    extractor: str | torch.nn.Module = LAB_EXTRACTOR,
    num_samples: int | None = None,
    steps: int | None = None,
    repeats: int | None = None,
    image_size: int = 64,
    width: int = 64,
) -> Report:
    """Train three small networks with equal compute, judge them, and compare the two shipped ones.

    Args:
        output: folder for `himar.json` and `himar.png`; the small networks are trained in `runs` there, where an
            interrupted run continues.
        quick: 20 training steps, 20 pictures and 1 timing instead of 1,000, 400 and 5.
        seed: of all draws.
        on_progress: called with what is done, units done, units in all.
        pipelines: class-conditional pipelines by `"Hi-MAR"` and `"MAR"`; None loads the shipped ones.
        tokenizer: KL checkpoint of the small networks: a shipped name or a folder.
        extractor: for the Frechet distance.
        num_samples, steps, repeats: override what `quick` decides; `steps` are MAR's.
        image_size: side of the scenes in pixels.
        width: of the small networks.

    Raises:
        KeyboardInterrupt: after saving the stages that finished.
    """
    from vistok.hub import load, load_pipeline

    count = num_samples or (20 if quick else 400)
    steps = steps or (20 if quick else 1000)
    repeats = repeats or (1 if quick else 5)
    progress = on_progress or (lambda what, done, total: None)
    report = Report("himar", CLAIMS["himar"].title, CLAIMS["himar"].paper)
    if pipelines is None:
        pipelines = {arm: load_pipeline(name) for arm, name in MODELS.items()}
    shipped = {arm: pipelines[arm] for arm in MODELS}
    decoder = load(tokenizer).eval()
    factor = int(decoder.downsample_factor)
    lab = Lab(tokenizer, Path(output) / "runs", steps, 1000 if quick else 12000, image_size, seed)
    variants = head_variants(image_size // factor, decoder.token_size, width)
    classes: dict[str, Any] = {"mar": MAR, "himar": HiMAR}
    flops = {
        variant.name: training_flops(classes[variant.system](**variant.config), image_size, factor, lab.batch_size)
        for variant in variants
    }
    budget = {name: max(1, round(steps * flops[PLAIN] / one)) for name, one in flops.items()}
    report.settings = {
        "quick": quick,
        "seed": seed,
        "num_samples": count,
        "steps": budget,
        "scenes": lab.scenes,
        "batch_size": lab.batch_size,
        "width": width,
        "repeats": repeats,
        "sampling": SAMPLING,
        "environment": environment(),
    }
    report.figures["training_flops_a_step"] = flops
    report.notes = [
        f"small networks (width {width}, 2 + 2 blocks) get equal compute: "
        + ", ".join(f"{name} {number} steps" for name, number in budget.items())
        + f" of {lab.batch_size} scenes, by the operations of their matrix products; one training run each, so "
        "intervals leave out the chance of a training",
        *(f"sampling of {system}: {describe_sampling(settings)}" for system, settings in SAMPLING.items()),
        *(f"shipped {arm}: {MODELS[arm]}, {describe_sampling(sampler_settings(one))}" for arm, one in shipped.items()),
    ]
    if quick:
        report.notes.append("quick run: too few steps and samples to quote any figure of it")

    _measure_time(shipped, repeats, seed, report, progress)
    report.save(output)
    distance = lab_distance(extractor, count, image_size)
    judged = judge_variants(
        lab, variants, decoder, distance, report, output, progress, count=count, sampling=SAMPLING, steps=budget
    )
    report.findings += [
        quality_finding(
            judged[MLP],
            judged[PLAIN],
            "hidden states of pivots improve on plain masked autoregression at equal training compute",
            f"{PAPER} 2.07 with pivots (MLP head) against 2.31 of MAR",
        ),
        quality_finding(
            judged[TRANSFORMER],
            judged[MLP],
            "a diffusion transformer as dense head improves on an MLP at equal training compute",
            f"{PAPER} 1.98 against 2.07",
        ),
        quality_finding(
            judged[TRANSFORMER],
            judged[PLAIN],
            "both together improve on plain masked autoregression at equal training compute",
            f"{PAPER} 1.98 against 2.31",
        ),
    ]
    report.save(output)
    for arm, pipeline in shipped.items():
        judged[f"shipped {arm}"] = judge(
            pipeline,
            count,
            distance,
            seed=seed,
            sampling=sampler_settings(pipeline),
            progress=progress,
            what=f"shipped {arm}",
        )
        report.figures[f"shipped {arm}"] = judged[f"shipped {arm}"].to_dict()
        report.save(output)
    report.findings.append(
        quality_finding(
            judged["shipped Hi-MAR"],
            judged["shipped MAR"],
            "the shipped Hi-MAR draws better than the shipped MAR",
            "main table: FID 1.93 of Hi-MAR-B against 2.31 of MAR-B",
        )
    )
    report.picture = "himar.png"
    _draw(shipped, judged, seed, report, Path(output) / report.picture)
    report.complete = True
    report.save(output)
    return report


def _measure_time(shipped: Mapping[str, Any], repeats: int, seed: int, report: Report, progress: Progress) -> None:
    labels = torch.tensor([3])
    runs = {
        arm: partial(
            pipeline.generator.generate, labels, generator=image_generators(seed, 0, 1), **sampler_settings(pipeline)
        )
        for arm, pipeline in shipped.items()
    }
    with torch.no_grad():
        found = interleaved_ms(runs, repeats, progress)
    report.figures["milliseconds"] = found
    ratio = Ratio.of(found["MAR"], found["Hi-MAR"])
    pivots, plain = (statistics.median(found[arm]) for arm in ("Hi-MAR", "MAR"))
    report.findings.append(
        Finding(
            "the shipped Hi-MAR takes less time than the shipped MAR, batch 1, decoder not included",
            "figure: 0.286 s an image of Hi-MAR-B against 0.526 s of MAR-B (H100, batch 128), 54 %",
            f"{pivots:.0f} against {plain:.0f} ms an image: MAR takes {ratio} as long",
            ratio.above_one(),
        )
    )


# ------------------------------------------------------------------------------------------------------------- picture
def _draw(shipped: Mapping[str, Any], judged: Mapping[str, Judged], seed: int, report: Report, path: Path) -> None:
    """How both shipped models grow a picture, samples of each, and bars of distance, share and time."""
    figure = new_figure(11, 2.2 + 1.1 * (len(judged) + len(shipped)))
    rows = len(judged) + len(shipped)
    grid = figure.add_gridspec(rows + 1, 3, height_ratios=[*[1.0] * rows, 2.0])
    for row, (arm, pipeline) in enumerate(shipped.items()):
        frames, titles = strip(pipeline, 3, sampler_settings(pipeline), seed, COLUMNS)
        show_strip(figure.add_subplot(grid[row, :]), frames, titles, arm)
    show_rows(figure, grid, judged, len(shipped), COLUMNS)
    show_bars(figure.add_subplot(grid[-1, 0]), "FID (lower is better)", {name: one.fid for name, one in judged.items()})
    show_shares(figure.add_subplot(grid[-1, 1]), judged)
    times = {arm: statistics.median(found) for arm, found in report.figures["milliseconds"].items()}
    show_bars(figure.add_subplot(grid[-1, 2]), "ms an image, batch 1 (shipped)", times)
    figure.supxlabel(f"{report.settings['num_samples']} samples each; error bars at 95 %", fontsize=8)
    save_figure(figure, path)
