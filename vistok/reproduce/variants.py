"""Small generators of continuous tokens, trained alike and judged alike: what the claims about them share.

A claim that names a design choice ("cells beat tokens") needs networks that differ in nothing else. No such set ships,
so a reproduction trains one by the package's own trainer, a minute or two each, in folders that an interrupted run
continues from.

Letters: B pictures, H, W pixels.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vistok.data.shapes import CLASS_NAMES, image_to_tensor
from vistok.data.shapes.oracle import read_scenes
from vistok.generators import GenerationPipeline
from vistok.metrics.accuracy import Accuracy, class_accuracy
from vistok.metrics.evaluate import class_requests, reference_images, sample_images
from vistok.metrics.frechet import FrechetDistance
from vistok.training.recipe import Recipe, parse_recipe
from vistok.training.trainer import Trainer

from .drawing import show_strip
from .report import Finding, Gap, Report, share_gap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Judged",
    "Lab",
    "Ratio",
    "Variant",
    "distance_gap",
    "interleaved_ms",
    "judge",
    "judge_variants",
    "lab_distance",
    "quality_finding",
    "show_bars",
    "show_rows",
    "show_shares",
    "strip",
    "training_flops",
]

PARTS = 5  # disjoint parts of the samples, whose distances say how noisy a distance is
T_95 = 2.776  # Student's t at 95 %, PARTS - 1 degrees of freedom
BATCH = 100
FLOP_DRAWS = 8  # masks differ between steps

Progress = Callable[[str, int, int], None]


# ------------------------------------------------------------------------------------------------------------ training
@dataclass(frozen=True)
class Variant:
    """A network that differs from its siblings in one thing.

    Attributes:
        name: in figures and folders.
        system: `xar`, `mar` or `himar`.
        config: its constructor's arguments.
    """

    name: str
    system: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Lab:
    """What all variants of a reproduction have in common.

    Attributes:
        tokenizer: KL checkpoint that they write for: a shipped name or a folder.
        folder: of the runs and of the encoded scenes; an interrupted reproduction continues from it.
        steps: optimiser steps.
        scenes: distinct scenes.
        image_size: side in pixels.
        seed: of weights, data order and draws.
        batch_size: scenes a step.
    """

    tokenizer: str
    folder: Path
    steps: int
    scenes: int
    image_size: int = 64
    seed: int = 0
    batch_size: int = 32

    def recipe(self, variant: Variant, steps: int | None = None) -> Recipe:
        """The training of a variant: one object a scene, told its class."""
        steps = self.steps if steps is None else steps
        return parse_recipe(
            {
                "name": variant.name.replace(" ", "-"),
                "model": {"system": variant.system, "config": dict(variant.config)},
                "data": {
                    "source": "shapes-tokens",
                    "image_size": self.image_size,
                    "scenes": self.scenes,
                    "condition": "class",
                    "pivot_size": self.image_size // 2,
                },
                "tokenizer": self.tokenizer,
                "seed": self.seed,
                "steps": steps,
                "batch_size": self.batch_size,
                "optimizer": {"name": "muon", "lr": 8e-3, "betas": [0.9, 0.95], "weight_decay": 0.02},
                "schedule": {"name": "cosine", "warmup_steps": min(50, steps), "final_ratio": 0.02},
                "precision": "bf16",
                "ema_decay": 0.99,
                "checkpoint_every": 200,
            }
        )

    def train(self, variant: Variant, progress: Progress, steps: int | None = None) -> nn.Module:
        """The trained network with its averaged weights, in eval mode.

        Raises:
            KeyboardInterrupt: after saving a checkpoint that the next call continues from.
        """
        from vistok.hub import load

        recipe = self.recipe(variant, steps)
        run = self.folder / f"{recipe.name}-{recipe.steps}"
        trainer = Trainer(
            recipe,
            run,
            device="cpu",
            tensorboard=False,
            on_progress=lambda what, done, total: progress(f"training {variant.name}: {what}", done, total),
        )
        if trainer.fit().status != "finished":
            raise KeyboardInterrupt
        return load(str(run / "model")).eval()


def training_flops(model: Any, image_size: int, factor: int, batch_size: int = 32) -> float:
    """Floating point operations of the matrix products in one training step, the mean of a few draws.

    Args:
        model: `MAR`, `HiMAR` or `XAR`.
        image_size: side in pixels.
        factor: pixels a token covers in each direction.
        batch_size: pictures a step.
    """
    side = image_size // factor
    channels = int(model.config.latent_channels)
    model = model.train()
    batch = {
        "latents": torch.zeros(batch_size, channels, side, side),
        "pivot_latents": torch.zeros(batch_size, channels, side // 2, side // 2),
        "labels": torch.zeros(batch_size, dtype=torch.int64),
    }
    with FlopCounterMode(display=False) as counter:
        for number in range(FLOP_DRAWS):
            model.training_loss(batch, generator=torch.Generator().manual_seed(number))["loss"].backward()
    model.zero_grad()
    return counter.get_total_flops() / FLOP_DRAWS


# ------------------------------------------------------------------------------------------------------------- judging
@dataclass(frozen=True)
class Judged:
    """Pictures of one variant, and what oracle and extractor say of them.

    Attributes:
        images: [B, 3, H, W] in [-1, 1], the classes in turn.
        shares: see `class_accuracy`.
        fid: Frechet distance of all pictures to held-out scenes.
        parts: the same of disjoint parts.
        part: pictures in each of these.
    """

    images: Tensor
    shares: Mapping[str, Accuracy]
    fid: float
    parts: tuple[float, ...]
    part: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shares = {name: share.to_dict() for name, share in self.shares.items()}
        return {**shares, "fid": self.fid, "fid_of_parts": list(self.parts), "part": self.part}

    def __str__(self) -> str:
        share = self.shares["class"]
        return f"FID {self.fid:.2f}, class right {share}"


def judge(
    pipeline: GenerationPipeline,
    count: int,
    distance: FrechetDistance,
    *,
    seed: int,
    sampling: Mapping[str, Any],
    progress: Progress,
    what: str,
) -> Judged:
    """Draw pictures of all classes in turn and judge them.

    Args:
        pipeline: class-conditional generator of lab scenes.
        count: pictures.
        distance: holds the reference.
        seed: of the draws.
        sampling: settings of the sampler.
        progress: called with what is done, units done, units in all.
        what: name of the variant.
    """
    labels = class_requests(count)
    images = sample_images(
        pipeline,
        labels,
        seed=seed,
        batch_size=BATCH,
        sampling=sampling,
        on_progress=progress,
        what=f"sampling {what}",
    )
    size = count // PARTS
    parts = [images[part * size : (part + 1) * size] for part in range(PARTS)] if size > 1 else []
    distances = []
    for chosen in (images, *parts):
        distance.reset_samples()
        distance.add_samples(chosen)
        distances.append(distance.compute().value)
    return Judged(images, class_accuracy(read_scenes(images), labels), distances[0], tuple(distances[1:]), size)


def judge_variants(
    lab: Lab,
    variants: Sequence[Variant],
    decoder: Any,
    distance: FrechetDistance,
    report: Report,
    output: str | os.PathLike[str],
    progress: Progress,
    *,
    count: int,
    sampling: Mapping[str, Mapping[str, Any]],
    steps: Mapping[str, int] | None = None,
) -> dict[str, Judged]:
    """Train and judge every variant, writing each into the report as it is done.

    Args:
        lab: what they share.
        variants: networks to train.
        decoder: the tokenizer of `lab`, loaded.
        distance: holds the reference.
        report: gets the figures.
        output: its folder.
        progress: called with what is done, units done, units in all.
        count: pictures of each.
        sampling: settings of the sampler, by system.
        steps: optimiser steps by variant; None takes the lab's for all.
    """
    judged = {}
    for variant in variants:
        model = lab.train(variant, progress, None if steps is None else steps[variant.name])
        judged[variant.name] = judge(
            GenerationPipeline(model, decoder),
            count,
            distance,
            seed=lab.seed,
            sampling=sampling[variant.system],
            progress=progress,
            what=variant.name,
        )
        report.figures[variant.name] = judged[variant.name].to_dict()
        report.save(output)
    report.notes.append(
        f"FID: evaluator {distance.evaluator}; reference {distance.reference}, n={count}; samples n={count}; "
        f"resize {distance.resize}"
    )
    return judged


def quality_finding(one: Judged, other: Judged, claim: str, paper: str) -> Finding:
    """Whether the first has the lower distance; the shares of right pictures are given beside it."""
    gap, points = distance_gap(one, other), share_gap(one.shares["class"], other.shares["class"])
    return Finding(
        claim,
        paper,
        f"{one} against {other}; FID difference over {len(one.parts)} parts of {one.part}: {gap.value:+.2f} "
        f"[{gap.low:+.2f}, {gap.high:+.2f}]; share difference {100 * points.value:+.1f} points "
        f"[{100 * points.low:+.1f}, {100 * points.high:+.1f}]",
        gap.lower(),
    )


def lab_distance(extractor: str | nn.Module, count: int, image_size: int) -> FrechetDistance:
    """A Frechet distance to `count` held-out scenes of one object, the classes in turn."""
    distance = FrechetDistance(extractor, reference="held-out scenes, one object of each class in turn")
    distance.add_reference(reference_images(count, image_size))
    return distance


def distance_gap(one: Judged, other: Judged) -> Gap:
    """How much higher the first distance is, over the parts pair by pair; distances of equal counts compare."""
    gaps = [first - second for first, second in zip(one.parts, other.parts, strict=True)]
    if len(gaps) < 2:
        return Gap(one.fid - other.fid, -math.inf, math.inf)
    middle = statistics.mean(gaps)
    half = T_95 * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Gap(middle, middle - half, middle + half)


# ---------------------------------------------------------------------------------------------------------------- time
def interleaved_ms(runs: Mapping[str, Callable[[], Any]], repeats: int, progress: Progress) -> dict[str, list[float]]:
    """Milliseconds of each run, `repeats` times in turn after a first round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat:
                found[name].append(1000 * (time.perf_counter() - started))
        progress("timing", repeat + 1, repeats + 1)
    return found


@dataclass(frozen=True)
class Ratio:
    """How many times longer one run took than another: median, least and most of runs side by side."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, longer: Sequence[float], shorter: Sequence[float]) -> Ratio:
        """From times measured in turn."""
        ratios = [one / other for one, other in zip(longer, shorter, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def above_one(self) -> bool | None:
        """Whether it took longer; None if not all runs agree."""
        return True if self.low > 1 else False if self.high < 1 else None

    def __str__(self) -> str:
        return f"{self.value:.1f} times (from {self.low:.1f} to {self.high:.1f})"


# ------------------------------------------------------------------------------------------------------------ pictures
def show_rows(figure: Figure, grid: Any, judged: Mapping[str, Judged], first: int, columns: int) -> None:
    """Samples of each variant, a row each from row `first` of a grid on, of the same classes."""
    for row, (name, one) in enumerate(judged.items(), start=first):
        chosen = [number * 9 % len(one.images) for number in range(min(columns, len(one.images)))]
        titles = [CLASS_NAMES[index % len(CLASS_NAMES)] for index in chosen] if row == first else []
        show_strip(figure.add_subplot(grid[row, :]), [one.images[index] for index in chosen], titles, name)


def show_bars(axes: Any, title: str, values: Mapping[str, float], errors: Any = None, *, named: bool = True) -> None:
    """Horizontal bars, the first one on top."""
    axes.barh(list(values), list(values.values()), xerr=errors, color="#0b7a75", ecolor="#303030")
    axes.set_title(title, fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if not named:
        axes.set_yticks([])


def show_shares(axes: Any, judged: Mapping[str, Judged]) -> None:
    """Bars of the share of right pictures with 95 % intervals, in percent."""
    shares = {name: one.shares["class"] for name, one in judged.items()}
    errors = [
        [100 * (share.value - share.interval[0]) for share in shares.values()],
        [100 * (share.interval[1] - share.value) for share in shares.values()],
    ]
    values = {name: 100 * share.value for name, share in shares.items()}
    show_bars(axes, "class right by the oracle, %", values, errors, named=False)


def evenly(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of some indices, spread evenly and with the last one."""
    count = min(count, len(indices))
    return [indices[round((number + 1) * len(indices) / count) - 1] for number in range(count)]


@torch.no_grad()
def strip(
    pipeline: GenerationPipeline, label: int, sampling: Mapping[str, Any], seed: int, columns: int
) -> tuple[list[Tensor], list[str]]:
    """How one picture grows: pictures [3, H, W] in [-1, 1] after some of its steps, and their titles.

    Unwritten places are grey. Steps of a smaller grid (Hi-MAR's pivots) come first, scaled up.
    """
    generator: Any = pipeline.generator
    labels = torch.tensor([label], device=generator.device)
    steps = list(generator.sample(labels, generator=[torch.Generator().manual_seed(seed)], **sampling))
    coarse = [step.index for step in steps if step.tokens.grid != generator.grid]
    fine = [step.index for step in steps if step.tokens.grid == generator.grid]
    late = evenly(fine, columns // 2 if coarse else columns)
    chosen = [*(evenly(coarse, columns - len(late)) if coarse else []), *late]
    side = generator.grid[0] * pipeline.tokenizer.downsample_factor
    frames = []
    for index in chosen:
        image = pipeline.preview(steps[index].tokens)[0].resize((side, side), resample=0)
        frames.append(image_to_tensor(np.array(image)))
    return frames, [f"step {index + 1}" for index in chosen]
