"""VFlowOpt: its search on the lab's own model and pictures, against other methods at equal *average* shares of tokens.

"VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization" (ICCV 2025,
arXiv:2508.05211): LLaVA-OneVision-7B keeps 99.9, 96.3 and 85.5 % of its scores with 50, 25 and 10 % of the tokens on
average over the depth; with VisionZip it is 98.9, 94.3 and 82.1 %, with FastV 96.5, 86.4 and 69.7 %.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vistok.errors import InvalidInputError
from vistok.metrics.pruning import KEEP_RATIOS, Target, held_out_questions
from vistok.metrics.pruning.asking import Asker
from vistok.pruners import Pruner, Settings, VFlowOpt, search
from vistok.pruners.vflowopt import last_ratio
from vistok.pruners.vflowopt_search import SearchResult, box_for

from . import CLAIMS
from .pruning import Lab, Progress, accuracy, better, matched, points
from .report import Finding, Report

__all__ = ["run"]

SEARCHED, CENTRE, NO_RECYCLING, ONE_STAGE = "vflowopt searched", "not searched", "no recycling", "one stage"
MATCHED = {"fastv": "fastv matched", "sparsevlm": "sparsevlm matched"}
PAPER = {
    "fastv": "99.9, 96.3, 85.5 % against 96.5, 86.4, 69.7 % with 50, 25, 10 %",
    "sparsevlm": "99.9 % against 97.1 % with 50 %",
    "visionzip": "99.9, 96.3, 85.5 % against 98.9, 94.3, 82.1 % with 50, 25, 10 %",
    "random": "not compared",
}
SAMPLE_STREAM = 2**41 + 2**20  # pictures of the search: neither trained on nor asked about
GRID = 27  # tokens along a side of the paper's views, which the box of cell sizes is made for


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    loaded: tuple[Any, Any] | None = None,
    num_questions: int | None = None,
    trials: int | None = None,
    samples: int | None = None,
) -> Report:
    """Search settings for four budgets, then compare answers.

    Args:
        output: folder for `vflowopt.json`, `vflowopt.png`, the answers, and the journal of the searches, from which a
            second run goes on.
        quick, seed, on_progress: see `vistok.reproduce.reproduce`.
        loaded: (model, processor); None loads the shipped one.
        num_questions, trials, samples: override what `quick` decides: 1,000 questions, 50 trials, 30 samples (the
            paper's numbers).

    Raises:
        InvalidInputError: if there is no such model.
        MissingExtraError: if optuna is not installed.
        KeyboardInterrupt: after saving what was measured.
    """
    claim = CLAIMS["vflowopt"]
    report = Report("vflowopt", claim.title, claim.paper)
    lab = Lab(
        report,
        output,
        quick=quick,
        seed=seed,
        on_progress=on_progress,
        loaded=loaded,
        num_questions=num_questions,
    )
    trials, samples = trials or (3 if quick else 50), samples or (4 if quick else 30)
    found = _search(lab, trials, samples, seed)
    report.settings |= {"trials": trials, "samples": samples}
    report.notes.append(
        f"searched on {samples} pictures with a question each, without their answers: {trials} points a budget, of "
        "which the first 27 are random (or all, if there are fewer)"
    )
    report.notes.append(
        "keep ratios are here the share of visual tokens on average over the depth, for every method; `matched` "
        "methods have their later stages moved so that it comes out"
    )
    own: dict[str, Any] = {
        SEARCHED: lambda target: _pruner(found, target),
        CENTRE: lambda target: _centre(found, target),
        NO_RECYCLING: lambda target: _pruner(found, target, recycling=False),
        ONE_STAGE: lambda target: _one_stage(found, target),
        **{label: matched(method) for method, label in MATCHED.items()},
    }
    lab.measure(["visionzip", "random"], own)
    report.findings = [
        *(_against(lab, name) for name in PAPER),
        _tenth(lab),
        _part(
            lab,
            CENTRE,
            "the search pays: better than the middle of its box",
            "57.8, 79.9, 92.3 against 56.2, 79.4, 91.8 (MMStar, MMB, SQA)",
        ),
        _part(lab, NO_RECYCLING, "recycling dropped tokens pays", "57.8, 79.9, 92.3 against 57.6, 79.8, 91.9"),
        _part(lab, ONE_STAGE, "three stages are better than one", "57.8, 79.9, 92.3 against 56.0, 79.1, 91.0"),
    ]
    lab.finish("VFlowOpt and what it is compared with, by average share kept")
    return report


# -------------------------------------------------------------------------------------------------------------- search
def _search(lab: Lab, trials: int, samples: int, seed: int) -> dict[float, SearchResult]:
    asker = Asker(lab.model, lab.processor)
    asked = held_out_questions(samples, lab.image_size, seed=SAMPLE_STREAM + seed)
    batch = asker.batch([(one.picture(), one.question) for one in asked])
    side = max(2.0, asker.visual_tokens(batch)[0] ** 0.5)
    found: dict[float, SearchResult] = {}
    for target in KEEP_RATIOS:
        low, high = box_for(target)["cell_size"]
        box = {"cell_size": (max(1.0, low * side / GRID), max(1.0, high * side / GRID))}

        def tell(done: int, total: int, trial: Any, target: float = target) -> None:
            if lab.progress is not None:
                lab.progress(f"search {target:g}", done, total)

        with warnings.catch_warnings():  # points whose threshold no token reaches fall back, and say so each time
            warnings.simplefilter("ignore", UserWarning)
            try:
                found[target] = search(
                    lab.model,
                    [batch],
                    target=target,
                    trials=trials,
                    box=box,
                    seed=42 + seed,
                    storage=Path(lab.output) / "search.journal",
                    study_name=f"{lab.name} {target:g} {samples} {seed}",
                    on_trial=tell,
                )
            except InvalidInputError as error:
                lab.report.notes.append(f"search at {target:g}: {error}")
                continue
        lab.report.figures.setdefault("search", {})[f"{target:g}"] = {
            "settings": asdict(found[target].settings),
            "layers": list(found[target].layers),
            "cosine": found[target].objective,
            "first_cosine": found[target].trials[0].objective,
            "box": {**box_for(target), **box},
        }
        lab.report.notes.append(f"search at {target:g}: {found[target]}")
        lab.report.save(lab.output)
    return found


def _found(found: Mapping[float, SearchResult], target: Target) -> SearchResult:
    assert target.keep_ratio is not None
    if target.keep_ratio not in found:
        raise InvalidInputError("the search found no settings that keep so few tokens")
    return found[target.keep_ratio]


def _pruner(found: Mapping[float, SearchResult], target: Target, **options: Any) -> Pruner:
    result = _found(found, target)
    return VFlowOpt(result.settings, layers=result.layers, **options)


def _centre(found: Mapping[float, SearchResult], target: Target) -> Pruner:
    """Every variable in the middle of the box, the last ratio solved for the budget."""
    assert target.keep_ratio is not None
    layers = _found(found, target).layers
    middle = {name: (low + high) / 2 for name, (low, high) in box_for(target.keep_ratio).items()}
    counts = (layers[0], layers[1] - layers[0], target.depth - layers[1])
    last = last_ratio(target.keep_ratio, middle["first"], middle["second"], counts)
    cell = middle["cell_size"] * target.visual**0.5 / GRID
    ratios = (middle["first"], middle["second"], min(1.0, max(last, 1 / target.visual)))
    return VFlowOpt(Settings(ratios, middle["threshold"], max(1.0, cell), middle["entropy_weight"]), layers=layers)


def _one_stage(found: Mapping[float, SearchResult], target: Target) -> Pruner:
    """The searched importance and cells, everything pruned before the language model."""
    assert target.keep_ratio is not None
    one = _found(found, target).settings
    settings = Settings((target.keep_ratio,), one.threshold, one.cell_size, one.entropy_weight)
    return VFlowOpt(settings, layers=())


# ------------------------------------------------------------------------------------------------------------ findings
def _against(lab: Lab, name: str) -> Finding:
    label = MATCHED.get(name, name)
    gap = lab.gap([(SEARCHED, ratio) for ratio in KEEP_RATIOS], [(label, ratio) for ratio in KEEP_RATIOS])
    able = [f"{100 * ratio:g} %" for ratio in KEEP_RATIOS if lab.row(label, ratio) is not None]
    return Finding(
        f"at equal average shares of tokens: better than {name}",
        f"LLaVA-OneVision-7B: {PAPER[name]}",
        "could not be measured at any share"
        if gap is None
        else f"{points(gap)} over {', '.join(able)}, at {_costs(lab, SEARCHED, label)}",
        better(gap),
    )


def _costs(lab: Lab, one: str, other: str) -> str:
    """Shares of the operations where both were measured: recycling keeps a few tokens more than the ratios say."""
    pairs = [(lab.row(one, ratio), lab.row(other, ratio)) for ratio in KEEP_RATIOS]
    both = [(lab.cost(first), lab.cost(second)) for first, second in pairs if first is not None and second is not None]
    ours, theirs = (100 * sum(costs) / len(both) for costs in zip(*both))
    return f"{ours:.0f} against {theirs:.0f} % of the operations"


def _tenth(lab: Lab) -> Finding:
    row = lab.row(SEARCHED, 0.11)
    whole = lab.unpruned["accuracy"]["value"]
    claim, paper = (
        "a tenth of the tokens keeps 90 % of the score",
        "abstract: 90 % with 10 % (the table of results gives 85.5 %)",
    )
    if row is None or not whole:
        return Finding(claim, paper, "could not be measured", None)
    low, high = row["accuracy"]["low"] / whole, row["accuracy"]["high"] / whole
    return Finding(
        claim,
        paper,
        f"{100 * row['accuracy']['value'] / whole:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of the unpruned accuracy "
        f"with 11 %: {accuracy(row)}",
        True if low > 0.9 else False if high < 0.9 else None,
    )


def _part(lab: Lab, name: str, claim: str, paper: str) -> Finding:
    gap = lab.gap([(SEARCHED, ratio) for ratio in KEEP_RATIOS], [(name, ratio) for ratio in KEEP_RATIOS])
    return Finding(
        claim,
        f"ablation at 25 %, LLaVA-OneVision-7B: {paper}",
        "not measured" if gap is None else f"{points(gap)} on average, at {_costs(lab, SEARCHED, name)}",
        better(gap),
    )
