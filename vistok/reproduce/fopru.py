"""FoPru, as far as it is known, against random pruning and the other methods that prune before the language model.

"FoPru: Focal Pruning for Efficient Large Vision-Language Models" (arXiv:2411.14164). There is no official code, and the
full paper was not at hand: **what is measured here is `vistok.pruners.FoPru` with its assumptions, not the paper's
numbers.** Claims carry the marks of that class: [P] stated by the abstract or a public summary, [A] our assumption.
"""

from __future__ import annotations

import os
from typing import Any

from vistok.metrics.pruning import KEEP_RATIOS, Target
from vistok.pruners import FoPru, Pruner

from . import CLAIMS
from .pruning import Lab, Progress, accuracy, better, guessing, points
from .report import Finding, Report

__all__ = ["run"]

OTHERS = ("fastervlm", "visionzip", "divprune", "pooling", "random")
ROW = "fopru rows"
QUARTER = 0.25


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    loaded: tuple[Any, Any] | None = None,
    num_questions: int | None = None,
) -> Report:
    """Accuracy by rank and by rows at four shares of tokens, and with a single token left.

    Args:
        output: folder for `fopru.json`, `fopru.png` and the answers.
        quick, seed, on_progress: see `vistok.reproduce.reproduce`.
        loaded: (model, processor); None loads the shipped one.
        num_questions: overrides what `quick` decides.

    Raises:
        InvalidInputError: if there is no such model.
        KeyboardInterrupt: after saving what was measured.
    """
    claim = CLAIMS["fopru"]
    report = Report("fopru", claim.title, claim.paper)
    report.notes.append(
        "not a reproduction of the paper's numbers: there is no official code and the full paper was not at hand. [P] "
        "is stated by its abstract or a public summary, [A] is assumed here (which layer, which query rows, how rows "
        "are scored)"
    )
    lab = Lab(
        report,
        output,
        quick=quick,
        seed=seed,
        on_progress=on_progress,
        loaded=loaded,
        num_questions=num_questions,
    )
    lab.measure(["fopru", *OTHERS], {ROW: _rows})
    single = 1 / int(lab.unpruned["visual_tokens"])
    lab.measure(["fopru", "random"], keep_ratios=[single])
    report.findings = [
        _quarter(lab, "fopru", "rank"),
        _quarter(lab, ROW, "row"),
        _single(lab, single),
        *(_against(lab, name) for name in OTHERS),
        _strategies(lab),
    ]
    lab.finish("FoPru [with assumptions] and what it is compared with")
    return report


def _rows(target: Target) -> Pruner:
    assert target.keep_ratio is not None
    return FoPru(target.keep_ratio, "row")


def _quarter(lab: Lab, name: str, strategy: str) -> Finding:
    row = lab.row(name, QUARTER)
    gap = lab.gap([(name, QUARTER)], [("unpruned", None)])
    assert row is not None
    assert gap is not None
    return Finding(
        f"[P] a quarter of the tokens answers within 1 % of all of them ({strategy} strategy; significance [A])",
        "[P] abstract: within 1 % on several datasets at 25 %",
        f"{accuracy(row)} with {row['kept_tokens']:.0f} tokens against {accuracy(lab.unpruned)} with "
        f"{row['visual_tokens']:.0f}: {points(gap)}",
        lab.not_worse(gap, 0.01),
    )


def _single(lab: Lab, ratio: float) -> Finding:
    row, chance = lab.row("fopru", ratio), lab.row("random", ratio)
    blind = guessing(lab.questions)
    lab.report.figures["guessing"] = blind.to_dict()
    assert row is not None
    assert chance is not None
    share, reached = row["accuracy"], 0.6
    return Finding(
        "[P] a single token left still answers 60 % of the questions",
        "[P] summary: about 60 % on Ai2D and ScienceQA with 0.2 % of the tokens (one of 576)",
        f"{accuracy(row)} with one of {row['visual_tokens']:.0f} tokens; a random one gives {accuracy(chance)}, the "
        f"commonest answer of each kind of question {100 * blind.value:.1f} %",
        True if share["low"] > reached else False if share["high"] < reached else None,
    )


def _against(lab: Lab, name: str) -> Finding:
    gap = lab.gap([("fopru", ratio) for ratio in KEEP_RATIOS], [(name, ratio) for ratio in KEEP_RATIOS])
    return Finding(
        f"at equal shares of tokens (50, 25, 11, 5 %): attention received in the tower [A] is better than {name}",
        "no figure at hand",
        "not measured" if gap is None else f"{points(gap)} on average",
        better(gap),
    )


def _strategies(lab: Lab) -> Finding:
    # At 11 and 5 % whole rows are few; at a half and a quarter both strategies keep the same number.
    ratios = (0.5, QUARTER)
    gap = lab.gap([("fopru", ratio) for ratio in ratios], [(ROW, ratio) for ratio in ratios])
    return Finding(
        "[A] ranking single tokens is better than keeping whole rows (the paper offers both)",
        "no figure at hand",
        "not measured" if gap is None else f"{points(gap)} on average over 50 and 25 %",
        better(gap),
    )
