"""xAR: which entity, noisy or clean context, and the time against a diffusion transformer of equal size.

Ren et al., "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation" (arXiv:2502.20388): of tokens,
cells, subsamples, scales and whole images as the unit X, 8x8 cells of 16x16 tokens draw best; noisy context (Noisy
Context Learning) beats clean one (teacher forcing); xAR-B makes 9.8 images a second on an A100 where DiT-XL/2 makes
0.5, at FID 1.72 against 2.27.

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
from torch import Tensor

from vistok.data.shapes import CLASS_NAMES
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
    judge_variants,
    lab_distance,
    quality_finding,
    show_bars,
    show_rows,
    show_shares,
    strip,
)

__all__ = ["entity_variants", "equal_transformer", "run"]

MODEL, TOKENIZER = "xar-shapes", "kl-shapes"
CELL, CLEAN = "cells", "cells, clean context"
SAMPLING: dict[str, Any] = {"guidance_scale": 2.0, "guidance_schedule": "constant", "num_inference_steps": 16}
DIT_STEPS = 250  # of DiT's published figures
PAPER = "ablation of X (xAR-B, ImageNet 256):"
COLUMNS = 8


def entity_variants(grid: int, channels: int, width: int) -> list[Variant]:
    """A network for each kind of entity, and one of cells with clean context; all else is equal.

    Args:
        grid: tokens a side.
        channels: of the latents.
        width: of the networks.
    """
    shared = {
        "latent_channels": channels,
        "grid": [grid, grid],
        "hidden_size": width,
        "encoder_layers": 2,
        "encoder_heads": 4,
        "decoder_layers": 2,
        "decoder_heads": 4,
        "num_classes": len(CLASS_NAMES),
        "attention_dropout": 0.0,
        "projection_dropout": 0.0,
    }
    chosen: dict[str, dict[str, Any]] = {
        CELL: {"entity": "cell", "entity_size": grid // 2},
        "tokens": {"entity": "token"},
        "subsamples": {"entity": "subsample", "entity_size": 2},
        "scales": {"entity": "scale"},
        "whole image": {"entity": "image"},
        CLEAN: {"entity": "cell", "entity_size": grid // 2, "context": "clean"},
    }
    return [Variant(name, "xar", {**shared, **config}) for name, config in chosen.items()]


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    pipeline: Any | None = None,
    tokenizer: str = TOKENIZER,
    extractor: str | torch.nn.Module = LAB_EXTRACTOR,
    num_samples: int | None = None,
    steps: int | None = None,
    repeats: int | None = None,
    image_size: int = 64,
    width: int = 64,
) -> Report:
    """Train six small networks alike, judge them, and time the shipped one against a diffusion transformer.

    Args:
        output: folder for `xar.json` and `xar.png`; the small networks are trained in `runs` there, where an
            interrupted run continues.
        quick: 20 training steps, 20 pictures and 1 timing instead of 800, 500 and 5.
        seed: of all draws.
        on_progress: called with what is done, units done, units in all.
        pipeline: class-conditional xAR pipeline to time; None loads the shipped one.
        tokenizer: KL checkpoint of the small networks: a shipped name or a folder.
        extractor: for the Frechet distance.
        num_samples, steps, repeats: override what `quick` decides.
        image_size: side of the scenes in pixels.
        width: of the small networks.

    Raises:
        KeyboardInterrupt: after saving the stages that finished.
    """
    from vistok.hub import load, load_pipeline

    count = num_samples or (20 if quick else 500)
    steps = steps or (20 if quick else 800)
    repeats = repeats or (1 if quick else 5)
    progress = on_progress or (lambda what, done, total: None)
    report = Report("xar", CLAIMS["xar"].title, CLAIMS["xar"].paper)
    pipeline = load_pipeline(MODEL) if pipeline is None else pipeline
    decoder = load(tokenizer).eval()
    lab = Lab(tokenizer, Path(output) / "runs", steps, 1000 if quick else 12000, image_size, seed)
    variants = entity_variants(image_size // decoder.downsample_factor, decoder.token_size, width)
    report.settings = {
        "quick": quick,
        "seed": seed,
        "num_samples": count,
        "steps": steps,
        "scenes": lab.scenes,
        "batch_size": lab.batch_size,
        "width": width,
        "repeats": repeats,
        "sampling": SAMPLING,
        "environment": environment(),
    }
    report.notes = [
        f"each small network (width {width}, 4 blocks): {steps} steps of {lab.batch_size} scenes, one training run; "
        "intervals are those of the pictures and leave out the chance of a training",
        f"sampling of all of them: {describe_sampling(SAMPLING)}, so that every token passes the network equally often",
    ]
    if quick:
        report.notes.append("quick run: too few steps and samples to quote any figure of it")

    _measure_time(pipeline, repeats, seed, report, progress)
    report.save(output)
    distance = lab_distance(extractor, count, image_size)
    judged = judge_variants(
        lab, variants, decoder, distance, report, output, progress, count=count, sampling={"xar": SAMPLING}
    )
    for name in list(judged)[1:]:
        report.findings.append(_finding(judged, name))
    report.picture = "xar.png"
    _draw(pipeline, judged, seed, report, Path(output) / report.picture)
    report.complete = True
    report.save(output)
    return report


def _finding(judged: Mapping[str, Judged], other: str) -> Finding:
    """Cells with noisy context against another variant."""
    claim, paper = f"cells draw better than {other} as entities", f"{PAPER} 8x8 cells have the lowest FID"
    if other == CLEAN:
        claim = "noisy context (Noisy Context Learning) draws better than clean context (teacher forcing)"
        paper = "section 3.3: without it, errors of earlier entities add up"
    return quality_finding(judged[CELL], judged[other], claim, paper)


# ---------------------------------------------------------------------------------------------------------------- time
def equal_transformer(model: Any) -> Any:
    """diffusers' diffusion transformer for the same latents and classes, as wide, with as many blocks as bring it
    nearest to the model's number of parameters; random weights."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    config = model.config

    def build(layers: int) -> Any:
        return DiTTransformer2DModel(
            num_attention_heads=config.encoder_heads,
            attention_head_dim=config.hidden_size // config.encoder_heads,
            in_channels=model.token_size,
            out_channels=model.token_size,
            num_layers=layers,
            sample_size=model.grid[0],
            patch_size=1,
            num_embeds_ada_norm=model.num_classes,
        )

    def size(network: Any) -> int:
        return sum(value.numel() for value in network.parameters())

    wanted, layers = size(model), 1
    with torch.device("meta"):
        one, two = size(build(1)), size(build(2))
    layers = max(1, round(1 + (wanted - one) / (two - one)))
    return build(layers).eval()


@torch.no_grad()
def diffuse(network: Any, labels: Tensor, num_steps: int, guidance_scale: float, seed: int) -> Tensor:
    """Latents [B, C, h, w] by DDIM with guidance in one batch, as diffusers' DiT pipeline does."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(num_steps)
    side, channels = network.config.sample_size, network.config.in_channels
    x = torch.randn(len(labels), channels, side, side, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, network.config.num_embeds_ada_norm)])
    for timestep in scheduler.timesteps:
        predicted = network(torch.cat([x, x]), timestep=timestep.expand(len(both)), class_labels=both).sample
        conditional, unconditional = predicted.chunk(2)
        guided = unconditional + guidance_scale * (conditional - unconditional)
        x = scheduler.step(guided, int(timestep), x).prev_sample
    return x


def _measure_time(pipeline: Any, repeats: int, seed: int, report: Report, progress: Progress) -> None:
    model = pipeline.generator
    settings = sampler_settings(pipeline)
    entity_steps = int(settings["num_inference_steps"])
    network = equal_transformer(model)
    labels = torch.tensor([3])
    scale = float(settings["guidance_scale"])
    runs = {
        "xAR": partial(model.generate, labels, generator=image_generators(seed, 0, 1), **settings),
        f"DiT, {entity_steps} steps": partial(diffuse, network, labels, entity_steps, scale, seed),
        f"DiT, {DIT_STEPS} steps": partial(diffuse, network, labels, DIT_STEPS, scale, seed),
    }
    found = interleaved_ms(runs, repeats, progress)
    sizes = [sum(value.numel() for value in one.parameters()) for one in (model, network)]
    report.figures["time"] = {
        "parameters": {"xAR": sizes[0], "DiT": sizes[1]},
        "sampling": settings,
        "milliseconds": found,
    }
    own, equal, published = found.values()
    longer, equally = Ratio.of(published, own), Ratio.of(equal, own)
    report.findings.append(
        Finding(
            f"faster than a diffusion transformer of equal size at its published {DIT_STEPS} steps, batch 1",
            "table 2: xAR-B 9.8 images/s against 0.5 of DiT-XL/2 (A100, batch 128): 19.6 times, of another size at "
            "a like FID",
            f"{statistics.median(own):.0f} ms an image ({model.layout.num_entities} entities of {entity_steps} steps, "
            f"{sizes[0]:,} parameters) against {statistics.median(published):.0f} ms of diffusers' DiT "
            f"({sizes[1]:,}), which takes {longer} as long; with {entity_steps} steps it takes "
            f"{statistics.median(equal):.0f} ms, {equally}",
            longer.above_one(),
        )
    )
    report.notes.append("the DiT has random weights: only its time is measured; decoder not included on either side")


# ------------------------------------------------------------------------------------------------------------- picture
def _draw(pipeline: Any, judged: Mapping[str, Judged], seed: int, report: Report, path: Path) -> None:
    """How the shipped model grows a picture, samples of each variant, and bars of distance, share and time."""
    figure = new_figure(11, 3.2 + 1.1 * len(judged))
    grid = figure.add_gridspec(len(judged) + 2, 3, height_ratios=[*[1.0] * (len(judged) + 1), 2.0])
    frames, titles = strip(pipeline, 3, sampler_settings(pipeline), seed, COLUMNS)
    show_strip(figure.add_subplot(grid[0, :]), frames, titles, "shipped")
    show_rows(figure, grid, judged, 1, COLUMNS)
    show_bars(figure.add_subplot(grid[-1, 0]), "FID (lower is better)", {name: one.fid for name, one in judged.items()})
    show_shares(figure.add_subplot(grid[-1, 1]), judged)
    times = {name: statistics.median(found) for name, found in report.figures["time"]["milliseconds"].items()}
    show_bars(figure.add_subplot(grid[-1, 2]), "ms an image, batch 1", times)
    figure.supxlabel(f"{report.settings['num_samples']} samples each; error bars at 95 %", fontsize=8)
    save_figure(figure, path)
