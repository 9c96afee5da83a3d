"""TransPrune against the other methods that prune inside the language model, on the lab's LLaVA.

"TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model" (arXiv:2507.20630): on
LLaVA-1.5-7B the High schedule keeps 100.0 % of the unpruned scores at 40.8 % of the visual multiply-adds, where FastV
(97.8 %), PyramidDrop (98.8 %) and SparseVLM (98.8 %) cost more.
"""

from __future__ import annotations

import os
from typing import Any

from vistok.metrics.pruning import KEEP_RATIOS, METHODS, Target
from vistok.pruners import Pruner, TransPrune

from . import CLAIMS
from .pruning import Lab, Progress, accuracy, better, points
from .report import Finding, Report

__all__ = ["run"]

BASELINES = {"fastv": "97.8 % at 2.01 TFLOPs", "pyramiddrop": "98.8 % at 1.78", "sparsevlm": "98.8 % at 1.57"}
ABLATED = (0.25, 0.11)
QUESTION_ONLY, TRANSITION_ONLY = "question only", "transition only"


def run(
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
    loaded: tuple[Any, Any] | None = None,
    num_questions: int | None = None,
) -> Report:
    """Accuracy at equal shares of tokens and at the published settings, and without each of the two terms.

    Args:
        output: folder for `transprune.json`, `transprune.png` and the answers.
        quick, seed, on_progress: see `vistok.reproduce.reproduce`.
        loaded: (model, processor); None loads the shipped one.
        num_questions: overrides what `quick` decides.

    Raises:
        InvalidInputError: if there is no such model.
        KeyboardInterrupt: after saving what was measured.
    """
    claim = CLAIMS["transprune"]
    report = Report("transprune", claim.title, claim.paper)
    lab = Lab(
        report,
        output,
        quick=quick,
        seed=seed,
        on_progress=on_progress,
        loaded=loaded,
        num_questions=num_questions,
    )
    lab.measure(["transprune", *BASELINES], keep_ratios=[None])
    lab.measure(["transprune", *BASELINES, "random"])
    terms = {QUESTION_ONLY: _variant(transitions=False), TRANSITION_ONLY: _variant(instruction=False)}
    lab.measure([], terms, ABLATED)
    report.findings = [_published(lab), *(_against(lab, name) for name in BASELINES), *_sweep(lab), *_terms(lab)]
    report.notes.append(
        "published settings: layers in proportion to the depth; a decoder of few layers prunes later in it than the "
        "paper's does, so the share of operations is higher"
    )
    lab.finish("TransPrune and what it is compared with")
    return report


def _variant(**terms: Any) -> Any:
    """TransPrune at the same layers and ratios, without a term."""

    def make(target: Target) -> Pruner:
        whole = METHODS["transprune"](target)
        assert isinstance(whole, TransPrune)
        return TransPrune(whole.schedule, **terms)

    return make


def _published(lab: Lab) -> Finding:
    row = lab.row("transprune", None)
    gap = lab.gap([("transprune", None)], [("unpruned", None)])
    assert row is not None
    assert gap is not None
    return Finding(
        "the High schedule loses nothing that matters",
        "LLaVA-1.5-7B: 100.0 % of the unpruned scores at 40.8 % of the visual multiply-adds",
        f"{accuracy(row)} against {accuracy(lab.unpruned)} unpruned at {100 * lab.cost(row):.0f} % of all operations: "
        f"{points(gap)}",
        lab.not_worse(gap),
    )


def _against(lab: Lab, name: str) -> Finding:
    ours, theirs = lab.row("transprune", None), lab.row(name, None)
    gap = lab.gap([("transprune", None)], [(name, None)])
    claim = f"published settings: better than {name}, at no more cost"
    paper = f"LLaVA-1.5-7B: 100.0 % at 1.56 TFLOPs against {BASELINES[name]}"
    if ours is None or theirs is None or gap is None:
        return Finding(claim, paper, "could not be measured", None)
    cheaper = lab.cost(ours) <= 1.02 * lab.cost(theirs)
    verdict = better(gap)
    return Finding(
        claim,
        paper,
        f"{accuracy(ours)} at {100 * lab.cost(ours):.0f} % of the operations against {accuracy(theirs)} at "
        f"{100 * lab.cost(theirs):.0f} %: {points(gap)}",
        False if verdict and not cheaper else verdict,
    )


def _sweep(lab: Lab) -> list[Finding]:
    findings = []
    for name in (*BASELINES, "random"):
        gap = lab.gap([("transprune", ratio) for ratio in KEEP_RATIOS], [(name, ratio) for ratio in KEEP_RATIOS])
        ours = [lab.cost(row) for ratio in KEEP_RATIOS if (row := lab.row("transprune", ratio)) is not None]
        theirs = [lab.cost(row) for ratio in KEEP_RATIOS if (row := lab.row(name, ratio)) is not None]
        costs = f"{100 * sum(ours) / len(ours):.0f} against {100 * sum(theirs) / len(theirs):.0f} % of the operations"
        where = "before the language model" if name == "random" else "inside it, too"
        findings.append(
            Finding(
                f"at equal shares of tokens left (50, 25, 11, 5 %): better than {name}, which prunes {where}",
                "no figure at these shares",
                "not measured" if gap is None else f"{points(gap)} on average, at {costs}",
                better(gap),
            )
        )
    return findings


def _terms(lab: Lab) -> list[Finding]:
    both = [("transprune", ratio) for ratio in ABLATED]
    question, transition = ([(name, ratio) for ratio in ABLATED] for name in (QUESTION_ONLY, TRANSITION_ONLY))
    findings = []
    for claim, paper, one, other in (
        (
            "transitions add to the attention of the question",
            "ablation, GQA: 61.4 with both, 61.1 with the question's attention alone",
            both,
            question,
        ),
        (
            "the attention of the question adds to transitions",
            "ablation, GQA: 61.4 with both, 58.4 with transitions alone",
            both,
            transition,
        ),
    ):
        gap = lab.gap(one, other)
        measured = "not measured" if gap is None else f"{points(gap)} on average over 25 and 11 % kept"
        findings.append(Finding(claim, paper, measured, better(gap)))
    return findings
