"""CoMPaSS in the lab: do filtered pairs (SCOP) and a code of word order (TENOR) put objects where the prompt says?

Zhang et al., "CoMPaSS: Enhancing Spatial Understanding in Text-to-Image Diffusion Models" (arXiv:2412.13195). Four
fine-tunings of one pipeline, equally long, differ in these two things alone; VISOR (arXiv:2212.10015), GenEval's
position task and T2I-CompBench's spatial score are read by the oracle. All arms draw the same prompts from the same
noise, so differences are taken prompt by prompt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vistok.metrics.accuracy import Accuracy
from vistok.metrics.spatial import (
    RELATIONS,
    Detection,
    SpatialPrompt,
    compbench_spatial,
    geneval_position,
    holds,
    oracle_detector,
    visor,
)

from . import CLAIMS
from .drawing import (
    MeanInterval,
    draw,
    mean_interval,
    new_figure,
    save_figure,
    show_strip,
    two_objects,
)
from .report import Finding, Report, environment

__all__ = ["ARMS", "run", "spatial_prompts"]

BASE, FULL = "base", "SCOP + TENOR"
ARMS = {
    BASE: "t2i-shapes",
    "unfiltered": "t2i-shapes-unfiltered",
    "TENOR": "t2i-shapes-unfiltered-tenor",
    "SCOP": "t2i-shapes-scop",
    FULL: "t2i-shapes-tenor",
}
PICTURES = 4  # a prompt, as VISOR draws them
CERTAINTY = 0.0  # the oracle names only what it sees
PAPER = "VISOR uncond, SD 1.4: 18.8 % -> 57.4 %; SD 2.1: 30.3 % -> 62.1 %; FLUX.1-dev: 38.0 % -> 75.2 %"
FILTER_SCENES = 2000

Progress = Callable[[str, int, int], None]


def spatial_prompts(count: int, seed: int) -> list[SpatialPrompt]:
    """Different pairs of coloured objects; the four relations in turn."""
    return [
        SpatialPrompt(f"{one.colour} {one.shape}", RELATIONS[number % len(RELATIONS)], f"{two.colour} {two.shape}")
        for number, (one, two) in enumerate(two_objects(count, seed))
    ]


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    pipelines: Mapping[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
    num_prompts: int | None = None,
) -> Report:
    """Draw spatial prompts with the base and the four arms, and compare where the objects lie.

    Args:
        output: folder for `compass.json` and `compass.png`.
        quick: 8 prompts instead of 80.
        seed: of prompts and noise.
        on_progress: called with what is done, units done, units in all.
        pipelines: text-to-image pipelines by the keys of `ARMS`; None loads the shipped ones.
        sampling: keyword arguments of the pipelines; None takes what the base's checkpoint recommends.
        num_prompts: overrides what `quick` decides.

    Raises:
        KeyboardInterrupt: after saving the arms that finished.
    """
    count = num_prompts or (8 if quick else 80)
    progress = on_progress or (lambda what, done, total: None)
    claim = CLAIMS["compass"]
    report = Report("compass", claim.title, claim.paper)
    if pipelines is None:
        from vistok.hub import load_pipeline, recommended_sampling

        pipelines = {arm: load_pipeline(name) for arm, name in ARMS.items()}
        sampling = recommended_sampling(ARMS[BASE]) if sampling is None else sampling
    settings = dict(sampling or {})
    prompts = spatial_prompts(count, seed)
    report.settings = {
        "quick": quick,
        "seed": seed,
        "num_prompts": count,
        "pictures_a_prompt": PICTURES,
        "sampling": settings,
        "models": ARMS,
        "environment": environment(),
    }
    report.notes = [
        f"{count} prompts, {PICTURES} pictures each, the same noise in every arm; read by the oracle; intervals at "
        "95 %, those of differences over prompts",
        "the arms are fine-tuned equally long on captions of pairs by the same rule; the attention terms of the "
        "authors' UNet training are left out in all of them",
    ]
    if quick:
        report.notes.append("quick run: too few samples to quote any figure of it")
    _describe_filter(report)
    _ask_text_encoder(pipelines[BASE], prompts, report)
    report.save(output)

    seeds = [seed * 1_000_003 + number for number in range(count * PICTURES)]
    texts = [prompt.text for prompt in prompts for _ in range(PICTURES)]
    names = sorted({name for prompt in prompts for name in (prompt.first, prompt.second)})
    right: dict[str, Tensor] = {}
    there: dict[str, Tensor] = {}
    pictures: dict[str, Tensor] = {}
    report.figures["arms"] = {}
    for arm in ARMS:
        done = 0

        def tell(finished: int, arm: str = arm) -> None:
            nonlocal done
            done += finished
            progress(f"{arm}: drawing", done, len(texts))

        pictures[arm] = draw(pipelines[arm], texts, seeds, sampling=settings, on_batch=tell)
        seen = oracle_detector(list(pictures[arm]), names)
        report.figures["arms"][arm] = _scores(prompts, seen)
        right[arm], there[arm] = _verdicts(prompts, seen)
        report.save(output)
    _judge(report, right, there)
    report.picture = "compass.png"
    _draw(report, prompts, pictures, Path(output) / report.picture)
    report.complete = True
    report.save(output)
    return report


# ------------------------------------------------------------------------------------------------------------- scores
def _scores(prompts: Sequence[SpatialPrompt], seen: Sequence[Sequence[Detection]]) -> dict[str, Any]:
    """VISOR, GenEval's position and T2I-CompBench's spatial score of one arm."""
    groups = [seen[first : first + PICTURES] for first in range(0, len(seen), PICTURES)]
    repeated = [prompt for prompt in prompts for _ in range(PICTURES)]
    return {
        **visor(prompts, groups, threshold=CERTAINTY).to_dict(),
        "position": geneval_position(repeated, seen, threshold=CERTAINTY).to_dict(),
        "compbench_spatial": compbench_spatial(repeated, seen, threshold=CERTAINTY),
    }


def _verdicts(prompts: Sequence[SpatialPrompt], seen: Sequence[Sequence[Detection]]) -> tuple[Tensor, Tensor]:
    """float [prompts] each: the share of a prompt's pictures with the relation, and with both objects."""
    right, there = [], []
    for number, found in enumerate(seen):
        prompt = prompts[number // PICTURES]
        first, second = (
            max((one for one in found if one.name == name), key=lambda one: one.score, default=None)
            for name in (prompt.first, prompt.second)
        )
        there.append(first is not None and second is not None)
        right.append(first is not None and second is not None and holds(first, prompt.relation, second))
    parts = [torch.tensor(values).float().view(-1, PICTURES).mean(1) for values in (right, there)]
    return parts[0], parts[1]


def _difference(values: Mapping[str, Tensor], arm: str, other: str) -> MeanInterval:
    return mean_interval((values[arm] - values[other]).tolist())


def _points(gap: MeanInterval) -> str:
    return f"{100 * gap.value:+.1f} points [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def _verdict(gap: MeanInterval) -> bool | None:
    return True if gap.low > 0 else False if gap.high < 0 else None


def _share(report: Report, arm: str, key: str) -> str:
    entry = report.figures["arms"][arm][key]
    return str(Accuracy(entry["correct"], entry["total"]))


def _judge(report: Report, right: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> None:
    """The findings, from differences prompt by prompt."""
    comparisons = (
        ("SCOP and TENOR together put more objects where the prompt says than the base model", PAPER, FULL, BASE),
        (
            "and more than training as long on unfiltered pairs without TENOR",
            "no figure at hand: the paper compares with the base models",
            FULL,
            "unfiltered",
        ),
        ("SCOP alone helps", "the paper's ablation: both parts help, together most", "SCOP", "unfiltered"),
        ("TENOR alone helps", "the paper's ablation: both parts help, together most", "TENOR", "unfiltered"),
        ("TENOR helps beside SCOP", "the paper's ablation: both parts help, together most", FULL, "SCOP"),
    )
    report.figures["differences"] = {}
    for claim, paper, arm, other in comparisons:
        gap = _difference(right, arm, other)
        report.figures["differences"][f"{arm} - {other}"] = gap.to_dict()
        report.findings.append(
            Finding(
                claim,
                paper,
                f"VISOR uncond {_share(report, arm, 'VISOR_uncond')} against {_share(report, other, 'VISOR_uncond')}; "
                f"difference {_points(gap)}; position {_share(report, arm, 'position')} against "
                f"{_share(report, other, 'position')}",
                _verdict(gap),
            )
        )
    gap = _difference(there, FULL, BASE)
    report.figures["differences"]["objects"] = gap.to_dict()
    report.findings.append(
        Finding(
            "the objects themselves do not suffer",
            "FID and CMMD equal or better than the base",
            f"both objects seen in {_share(report, FULL, 'OA')} against {_share(report, BASE, 'OA')}; difference "
            f"{_points(gap)}",
            # Two points are the least that matters; where the base draws no objects, equal shares say nothing.
            None if not there[BASE].any() else True if gap.low > -0.02 else False if gap.high < 0 else None,
        )
    )


def _describe_filter(report: Report) -> None:
    """What SCOP keeps of the lab's pairs."""
    from vistok.training.pairs import scene_pairs
    from vistok.training.recipe import ShapesPairsRecipe

    found = scene_pairs(ShapesPairsRecipe("shapes-pairs", filtered=True, scenes=FILTER_SCENES), report.settings["seed"])
    report.figures["filter"] = found[2].to_dict()
    report.notes.append(
        f"SCOP keeps {found[2].kept} of {found[2].pairs} pairs of {FILTER_SCENES} lab scenes (rejected first by: "
        + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in found[2].failed_first.items() if count)
        + ")"
    )


@torch.no_grad()
def _ask_text_encoder(pipe: Any, prompts: Sequence[SpatialPrompt], report: Report) -> None:
    """How often two phrasings of one relation lie closer than a contradictory one, by the text at its end mark."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    wordings = [
        [
            prompt.text,
            SpatialPrompt(prompt.second, opposite[prompt.relation], prompt.first).text,
            SpatialPrompt(prompt.second, prompt.relation, prompt.first).text,
        ]
        for prompt in prompts
    ]
    flat = [text for row in wordings for text in row]
    ids = pipe.tokenizer(flat, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    pooled = pipe.text_encoder(ids.to(pipe.text_encoder.device)).pooler_output.float().unflatten(0, (len(prompts), 3))
    same = functional.cosine_similarity(pooled[:, 0], pooled[:, 1], dim=-1)
    contradiction = functional.cosine_similarity(pooled[:, 0], pooled[:, 2], dim=-1)
    share = Accuracy.of((same > contradiction).tolist())
    report.figures["text_encoder"] = share.to_dict()
    report.findings.append(
        Finding(
            "the text encoder hardly tells relations apart: two wordings of one are seldom closer than a contradiction",
            "T5-XXL 4.84 %, CLIP near 0 %",
            f"{share} (the lab's CLIP learned on captions whose relations are always true, with heads that read them)",
            share.interval[1] < 0.5 if share.interval[1] < 0.5 or share.interval[0] > 0.5 else None,
        )
    )


# -------------------------------------------------------------------------------------------------------------- plot
def _draw(report: Report, prompts: Sequence[SpatialPrompt], pictures: Mapping[str, Tensor], path: Path) -> None:
    """Bars of every score with intervals, and pictures of the first prompts from the same noise."""
    columns = min(8, len(prompts))
    figure = new_figure(13, 10)
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    upper, lower = parts
    axes = upper.subplots()
    keys = ["OA", "VISOR_uncond", "VISOR_cond", "position", *(f"VISOR_{number + 1}" for number in range(PICTURES))]
    colours = ("#8a8a8a", "#c8553d", "#e0a458", "#588157", "#0b7a75")
    width = 0.8 / len(ARMS)
    for row, (arm, colour) in enumerate(zip(ARMS, colours, strict=True)):
        found = [report.figures["arms"][arm][key] for key in keys]
        values = [100 * (entry["value"] or 0.0) for entry in found]
        errors = [
            [max(0.0, value - 100 * entry["low"]) for value, entry in zip(values, found, strict=True)],
            [max(0.0, 100 * entry["high"] - value) for value, entry in zip(values, found, strict=True)],
        ]
        places = [place + (row - (len(ARMS) - 1) / 2) * width for place in range(len(keys))]
        axes.bar(places, values, width, yerr=errors, color=colour, label=arm, error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(keys)), [key.replace("_", " ") for key in keys])
    axes.set_ylabel("% of pictures (VISOR 1 to 4: of prompts)")
    axes.legend(ncols=len(ARMS), fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 1.15), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    rows = lower.subplots(len(ARMS), 1)
    for number, (arm, place) in enumerate(zip(ARMS, rows, strict=True)):
        titles = [_broken(prompts[column].text) for column in range(columns)] if number == 0 else []
        show_strip(place, [pictures[arm][column * PICTURES] for column in range(columns)], titles, arm)
    save_figure(figure, path)


def _broken(text: str) -> str:
    """A prompt in three lines: object, relation, object."""
    words = text.split()
    return "\n".join(" ".join(part) for part in (words[:3], words[3:-3], words[-3:]))
