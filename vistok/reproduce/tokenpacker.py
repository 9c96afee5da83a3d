"""TokenPacker against plain ways to fewer visual tokens: equal tokens, equal training, the same tower and decoder.

Li et al., "TokenPacker: Efficient Visual Projector for Multimodal LLM" (arXiv:2407.02392), tables 1 to 4: on LLaVA-1.5
7B, averages over six benchmarks are 62.0 for LLaVA's own 576 tokens, 62.8, 61.9 and 60.6 for TokenPacker's 144, 64 and
36, and 60.9 and 59.1 for average pooling at 144 and 64.

Three projectors are trained here by the paper's two stages (projector alone, then projector and decoder) from the lab's
finished LLaVA, whose own projector is thrown away: TokenPacker, LLaVA's MLP on average-pooled cells, and LLaVA's MLP on
the interpolated grid (TokenPacker's query without what is injected into it). The trainings are kept in the output
folder: a run that was stopped goes on, and a second one only measures.

Shape letters: B pictures, T text tokens.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.shapes import QUESTION_KINDS
from vistok.errors import InvalidInputError, UnknownNameError, require
from vistok.files import atomic_path
from vistok.metrics.accuracy import Accuracy
from vistok.training.lvlm import HELD_OUT_STREAM, Answered, LabLlava, ShapesQuestions, answers
from vistok.training.recipe import Recipe, ShapesQuestionsRecipe, parse_recipe
from vistok.training.trainer import Trainer, read_weights

from . import CLAIMS
from .report import Finding, Report, environment

__all__ = ["ARMS", "arm_recipes", "run"]

BASE, SHIPPED = "llava-shapes", "llava-shapes-tokenpacker"
ALL_TOKENS = "all tokens"
ARMS = {"TokenPacker": "tokenpacker", "average pooling": "pooling", "interpolated grid": "points"}
SCALE = 4
STEPS = (80, 170)  # of the two stages
BATCHES = (1, 16)
TOLERATED = 0.03  # loss of accuracy against all tokens
RESAMPLES = 2000
# The paper trains the second stage at a smaller rate than the first; the schedule is its own.
RATES = (6e-3, 4e-3)

Progress = Callable[[str, int, int], None]


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    base: str | os.PathLike[str] = BASE,
    shipped: str | os.PathLike[str] | None = SHIPPED,
    scale_factor: int = SCALE,
    steps: tuple[int, int] | None = None,
    scenes: int | None = None,
    repeats: int | None = None,
    batch_size: int = 16,
    projector_size: int = 96,
) -> Report:
    """Train the three projectors, and compare answers, operations and time.

    Args:
        output: folder for `tokenpacker.json`, `tokenpacker.png` and `runs/` with the trainings.
        quick: a few steps and 24 scenes instead of 250 steps and 256 scenes.
        seed: of the trainings and the held-out scenes.
        on_progress: called with what is done, units done, units in all.
        base: the LLaVA to start from: a shipped name or a folder.
        shipped: a LLaVA with a TokenPacker that was trained for longer, measured beside the others if it is there.
        scale_factor: patches that a token stands for in each direction.
        steps, scenes, repeats: override what `quick` decides.
        batch_size, projector_size: pictures a step and width of the TokenPacker.

    Raises:
        CheckpointError, UnknownNameError: there is no such base.
        InvalidInputError: it is no LLaVA.
        KeyboardInterrupt: after saving the stages that finished.
    """
    from vistok import hub

    steps = steps or ((2, 2) if quick else STEPS)
    scenes = scenes or (24 if quick else 256)
    repeats = repeats or (2 if quick else 7)
    progress = on_progress or (lambda what, done, total: None)
    claim = CLAIMS["tokenpacker"]
    report = Report("tokenpacker", claim.title, claim.paper)
    loaded = hub.load(base)
    if not hasattr(getattr(loaded, "model", None), "multi_modal_projector"):
        raise InvalidInputError(f"base must be a LLaVA of the lab such as {BASE}; {base} is a {type(loaded).__name__}")
    models: dict[str, LabLlava] = {ALL_TOKENS: LabLlava.around(loaded)}
    arguments = LabLlava.arguments_of(loaded)
    side = arguments["image_size"] // arguments["patch_size"]
    report.settings = {
        "quick": quick,
        "seed": seed,
        "base": str(base),
        "scale_factor": scale_factor,
        "tokens": (side // scale_factor) ** 2,
        "all_tokens": side**2,
        "steps": list(steps),
        "batch_size": batch_size,
        "scenes": scenes,
        "repeats": repeats,
        "environment": environment(),
    }
    runs = Path(output) / "runs"
    done, total = 0, 2 * len(ARMS)
    for arm in ARMS:
        recipes = arm_recipes(arm, loaded, base, runs, scale_factor, steps, seed, batch_size, projector_size)
        for recipe in recipes:
            result = Trainer(recipe, runs / recipe.name, tensorboard=False).fit()
            if result.status == "interrupted":
                report.save(output)
                raise KeyboardInterrupt
            done += 1
            progress("training", done, total)
        models[arm] = _finished(recipes[-1], runs)
    if shipped is not None:
        try:
            models[f"{SHIPPED}, shipped"] = LabLlava.around(hub.load(shipped))
            report.notes.append(
                f"{shipped}: its decoder learnt for longer than those of {ALL_TOKENS} and the arms, which favours it; "
                "no verdict rests on it"
            )
        except UnknownNameError:
            report.notes.append(f"{shipped} is not there: the TokenPacker of this run stands alone")
    report.notes += _notes(report, models, steps, batch_size)
    if quick:
        report.notes.append("quick run: too little training and too few questions to quote any figure of it")

    listed = _measure_answers(models, scenes, seed, report, progress)
    report.save(output)
    _measure_cost(models, repeats, report, progress)
    report.save(output)
    _judge(listed, report)
    report.picture = "tokenpacker.png"
    _draw(report, Path(output) / report.picture)
    report.complete = True
    report.save(output)
    return report


# ------------------------------------------------------------------------------------------------------------ training
def arm_recipes(
    arm: str,
    llava: Any,
    base: str | os.PathLike[str],
    runs: Path,
    scale_factor: int,
    steps: Sequence[int],
    seed: int,
    batch_size: int,
    projector_size: int,
) -> list[Recipe]:
    """The two stages of one projector; they differ between the arms in the projector alone."""
    sizes = LabLlava.arguments_of(llava)
    projector = ARMS[arm]
    depth = sizes["vision_layers"]
    recipes = []
    for number, stage in enumerate(("projector", "language")):
        config = {
            **sizes,
            "stage": stage,
            "projector": projector,
            "scale_factor": scale_factor,
            "feature_levels": [max(1, depth - 2), max(1, depth - 1), depth],
            "projector_size": projector_size,
        }
        start = str(base) if number == 0 else str(runs / f"{projector}-projector")
        recipes.append(
            parse_recipe(
                {
                    "name": f"{projector}-{stage}",
                    "model": {"system": "lab-llava", "config": config, "init_from": start},
                    "data": {
                        "source": "shapes-questions",
                        "image_size": sizes["image_size"],
                        "patch_size": sizes["patch_size"],
                        "text_tokens": 96,
                    },
                    "seed": seed + number,
                    "steps": steps[number],
                    "batch_size": batch_size,
                    "optimizer": {"name": "muon", "lr": RATES[number], "weight_decay": 0.0},
                    "schedule": {"name": "cosine", "warmup_steps": max(1, round(0.03 * steps[number]))},
                    "precision": "bf16",
                    "ema_decay": 0.0,
                    "log_every": max(1, steps[number] // 5),
                    "checkpoint_every": max(1, steps[number] // 2),
                    "keep_checkpoints": 1,
                }
            )
        )
    return recipes


def _finished(recipe: Recipe, runs: Path) -> LabLlava:
    model = LabLlava(**recipe.model.config)
    model.load_state_dict(read_weights(str(runs / recipe.name)))
    return model.eval()


def _notes(report: Report, models: Mapping[str, LabLlava], steps: Sequence[int], batch_size: int) -> list[str]:
    notes = [
        f"every arm: {steps[0]} steps of the projector alone, {steps[1]} of projector and decoder, {batch_size} "
        "pictures a step, the same pictures and questions in the same order, frozen tower",
        f"{ALL_TOKENS}: {report.settings['base']} as it ships, without the arms' further steps of its decoder",
    ]
    for arm, model in models.items():
        weights = sum(value.numel() for value in model.llava.model.multi_modal_projector.parameters())
        notes.append(f"{arm}: {weights:,} parameters in the projector")
    return notes


# ------------------------------------------------------------------------------------------------------------- answers
def _measure_answers(
    models: Mapping[str, LabLlava], scenes: int, seed: int, report: Report, progress: Progress
) -> dict[str, list[Answered]]:
    config = next(iter(models.values())).config
    data = ShapesQuestionsRecipe(
        "shapes-questions", image_size=config.image_size, patch_size=config.patch_size, text_tokens=144
    )
    source = ShapesQuestions(data, seed + HELD_OUT_STREAM + 1)
    listed = {}
    for arm, model in models.items():
        found = answers(model, source, scenes, model.device, partial(progress, f"asking {arm}"))
        listed[arm] = found
        kinds = {kind: Accuracy.of(one.right for one in found if one.kind == kind) for kind in QUESTION_KINDS}
        report.figures[arm] = {
            "visual_tokens": (config.image_size // config.patch_size // model.config.scale_factor) ** 2,
            "accuracy": Accuracy.of(one.right for one in found).to_dict(),
            "by_kind": {kind: share.to_dict() for kind, share in kinds.items() if share.total},
        }
    return listed


def difference(first: Sequence[Answered], second: Sequence[Answered], seed: int = 0) -> tuple[float, float, float]:
    """How much more often the first is right on the same questions, and its 95 % interval over resampled scenes.

    Questions about one scene are not independent of each other; scenes are.

    Returns:
        (difference, low, high) as fractions.
    """
    if [(one.scene, one.kind) for one in first] != [(one.scene, one.kind) for one in second]:
        raise InvalidInputError("both lists must answer the same questions in the same order")
    count = max(one.scene for one in first) + 1
    gain, asked = np.zeros(count), np.zeros(count)
    for one, other in zip(first, second, strict=True):
        gain[one.scene] += one.right - other.right
        asked[one.scene] += 1
    picked = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    low, high = np.percentile(gain[picked].sum(1) / asked[picked].sum(1), (2.5, 97.5))
    return float(gain.sum() / asked.sum()), float(low), float(high)


# ---------------------------------------------------------------------------------------------------------------- cost
def _prompt(model: LabLlava, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures with one question of twelve words each."""
    size = model.config.image_size
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return images, torch.full((batch, 12), 8), torch.zeros(batch, 12, dtype=torch.int64)


@torch.no_grad()
def _measure_cost(models: Mapping[str, LabLlava], repeats: int, report: Report, progress: Progress) -> None:
    """Operations of one picture with one question, part by part, and milliseconds. The arms take turns."""
    from torch.utils.flop_counter import FlopCounterMode

    for arm, model in models.items():
        images, text, segments = _prompt(model, 1)
        operations = {}
        with FlopCounterMode(display=False) as counter:
            states = model.tower(images)
        operations["tower"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            prefix = model.prefix(states)
        operations["projector"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            model.text_states(prefix, text, segments)
        operations["decoder"] = counter.get_total_flops()
        report.figures[arm]["flops"] = {**operations, "total": sum(operations.values())}
    for batch in BATCHES:
        seconds: dict[str, list[float]] = {arm: [] for arm in models}
        for repeat in range(repeats + 1):
            for arm, model in models.items():
                inputs = _prompt(model, batch)
                started = time.perf_counter()
                model.answer_logits(*inputs)
                if repeat:  # the first one warms up
                    seconds[arm].append(1000 * (time.perf_counter() - started) / batch)
            progress(f"timing, batch {batch}", repeat + 1, repeats + 1)
        for arm, values in seconds.items():
            report.figures[arm][f"ms_batch_{batch}"] = {
                "median": statistics.median(values),
                "least": min(values),
                "most": max(values),
            }


# ------------------------------------------------------------------------------------------------------------ verdicts
def _percent(entry: Mapping[str, Any]) -> str:
    return f"{100 * entry['value']:.1f} % [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def _judge(listed: Mapping[str, Sequence[Answered]], report: Report) -> None:
    figures, ours = report.figures, "TokenPacker"
    gain, low, high = difference(listed[ours], listed[ALL_TOKENS])
    all_tokens = figures[ALL_TOKENS]["visual_tokens"]
    report.figures["against_all_tokens"] = {"difference": gain, "low": low, "high": high}
    # Short trainings cannot show that the method fails.
    holds = True if low >= -TOLERATED else None
    report.findings.append(
        Finding(
            f"one token for {report.settings['scale_factor']} x {report.settings['scale_factor']} patches costs few "
            f"right answers (here: at most {100 * TOLERATED:.0f} points)",
            "table 1, 7B: 60.6 at 36 tokens (s = 4) against 62.0 at 576 tokens of LLaVA's own projector",
            f"{ours}: {_percent(figures[ours]['accuracy'])} at {figures[ours]['visual_tokens']} tokens, "
            f"{ALL_TOKENS}: {_percent(figures[ALL_TOKENS]['accuracy'])} at {all_tokens}; difference "
            f"{100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]",
            holds,
        )
    )
    papers = {
        "average pooling": "table 3, 7B: 61.9 against 59.1 at 64 tokens, 62.8 against 60.9 at 144",
        "interpolated grid": "table 5, 7B, GQA: 61.9 against 60.3 for the interpolated query with an MLP",
    }
    for arm, paper in papers.items():
        gain, low, high = difference(listed[ours], listed[arm])
        report.figures[f"against_{arm.replace(' ', '_')}"] = {"difference": gain, "low": low, "high": high}
        report.findings.append(
            Finding(
                f"at equal tokens and equal training it answers better than LLaVA's MLP on the {arm}"
                if arm != "average pooling"
                else "at equal tokens and equal training it answers better than average pooling with LLaVA's MLP",
                paper,
                f"{_percent(figures[ours]['accuracy'])} against {_percent(figures[arm]['accuracy'])}; difference "
                f"{100 * gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] over scenes",
                None if low <= 0 <= high else gain > 0,
            )
        )
    whole, few = figures[ALL_TOKENS], figures[ours]
    times = {batch: whole[f"ms_batch_{batch}"]["median"] / few[f"ms_batch_{batch}"]["median"] for batch in BATCHES}
    report.findings.append(
        Finding(
            "fewer visual tokens make answers cheaper",
            "table 1, 7B: 27.1 tokens a second at 64 visual tokens against 4.9 at 576 (setting not described)",
            f"decoder {whole['flops']['decoder'] / few['flops']['decoder']:.1f} times fewer operations, projector "
            f"{few['flops']['projector'] / whole['flops']['projector']:.2f} times as many, in all "
            f"{whole['flops']['total'] / few['flops']['total']:.1f} times fewer; a first word takes "
            + ", ".join(
                f"{few[f'ms_batch_{batch}']['median']:.1f} against {whole[f'ms_batch_{batch}']['median']:.1f} ms a "
                f"picture at batch {batch} ({times[batch]:.1f}x)"
                for batch in BATCHES
            ),
            all(ratio > 1 for ratio in times.values()),
        )
    )


# ------------------------------------------------------------------------------------------------------------- picture
def _draw(report: Report, path: Path) -> None:
    """Accuracy by kind of question, and accuracy against operations."""
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = [arm for arm, entry in report.figures.items() if "by_kind" in entry]
    palette = ("#4a4a4a", "#0b7a75", "#e0a458", "#b9b9b9", "#7b2d8b")
    colours = {arm: palette[number % len(palette)] for number, arm in enumerate(arms)}
    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    kinds = [kind for kind in QUESTION_KINDS if kind in report.figures[arms[0]]["by_kind"]]
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        entries = [report.figures[arm]["by_kind"][kind] for kind in kinds]
        values = [100 * entry["value"] for entry in entries]
        errors = [
            [max(0.0, 100 * (entry["value"] - entry["low"])) for entry in entries],
            [max(0.0, 100 * (entry["high"] - entry["value"])) for entry in entries],
        ]
        places = [place + (number - (len(arms) - 1) / 2) * width for place in range(len(kinds))]
        tokens = report.figures[arm]["visual_tokens"]
        left.bar(places, values, width, color=colours[arm], label=f"{arm}, {tokens} tokens")
        left.errorbar(places, values, errors, fmt="none", ecolor="black", elinewidth=0.8)
        overall = report.figures[arm]["accuracy"]
        share = 100 * overall["value"]
        right.errorbar(
            report.figures[arm]["flops"]["total"] / 1e6,
            share,
            [[share - 100 * overall["low"]], [100 * overall["high"] - share]],
            fmt="o",
            color=colours[arm],
            capsize=4,
            label=arm,
        )
    left.set_xticks(range(len(kinds)), kinds)
    left.set_ylabel("right answers, %")
    left.set_ylim(0, 145)  # room for the legend above the bars
    left.set_yticks(range(0, 101, 20))
    left.legend(fontsize=8, loc="upper left", ncols=2)
    left.set_title("by kind of question (Wilson intervals at 95 %)", fontsize=10)
    right.set_xscale("log")
    right.set_xlabel("million operations up to the first word")
    right.set_ylabel("right answers, %")
    right.set_title("accuracy against cost", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    settings = report.settings
    figure.supxlabel(
        f"{settings['scenes']} held-out scenes; {settings['steps'][0]} + {settings['steps'][1]} training steps of "
        f"{settings['batch_size']} pictures",
        fontsize=8,
    )
    with atomic_path(path) as temporary:
        canvas.print_png(str(temporary))
