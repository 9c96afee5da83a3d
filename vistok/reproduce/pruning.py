"""What the claims about pruners share: the lab's LLaVA, held-out questions, one evaluation, paired comparisons, a plot.

The evaluation itself is `vistok.metrics.evaluate_pruners`; nothing is measured in a way of its own here.
"""

from __future__ import annotations

import hashlib
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vistok.errors import InvalidInputError
from vistok.metrics.accuracy import Accuracy
from vistok.metrics.pruning import (
    KEEP_RATIOS,
    METHODS,
    UNPRUNED,
    Question,
    Target,
    evaluate_pruners,
    held_out_questions,
    load_lvlm,
    paired_difference,
    plot_pareto,
    winners,
)
from vistok.metrics.pruning.methods import Method
from vistok.pruners import Pruner

from .report import Gap, Report, environment

__all__ = ["MODEL", "Lab", "TOLERATED", "guessing", "matched", "not_worse"]

MODEL = "llava-shapes"
TOLERATED = 0.02  # two points are the least that matters
BATCH = 25
MAX_NEW_TOKENS = 2  # every answer is one word, and then the end

Progress = Callable[[str, int, int], None]
Row = Mapping[str, Any]


class Lab:
    """A model, its questions, and the rows measured so far, all of them written into one report.

    Args:
        report: gets settings, figures and notes.
        output: folder of the report and of the answers; a second run goes on from these.
        quick: 40 questions instead of 1,000.
        seed: of the questions; 0 is the stream that no recipe draws from.
        loaded: (model, processor); None loads the shipped one.
        num_questions: overrides what `quick` decides.

    Raises:
        InvalidInputError: if there is no such model.
    """

    def __init__(
        self,
        report: Report,
        output: str | os.PathLike[str],
        *,
        quick: bool,
        seed: int,
        on_progress: Progress | None,
        loaded: tuple[Any, Any] | None = None,
        num_questions: int | None = None,
    ) -> None:
        self.report, self.output, self.progress = report, Path(output), on_progress
        self.model, self.processor = load_lvlm(MODEL) if loaded is None else loaded
        self.image_size = int(self.model.config.vision_config.image_size)
        count = num_questions or (40 if quick else 1000)
        stream = None if seed == 0 else 2**41 + seed
        self.questions: list[Question] = held_out_questions(count, self.image_size, seed=stream)
        self.name = f"{MODEL} {_fingerprint(self.model)}"
        self.parts: list[dict[str, Any]] = []
        report.settings = {
            "quick": quick,
            "seed": seed,
            "model": self.name,
            "questions": count,
            "batch_size": BATCH,
            "max_new_tokens": MAX_NEW_TOKENS,
            "environment": environment(),
        }
        report.notes.append(
            f"{count} held-out questions about as many scenes, kinds in turn, answered greedily; an answer is right if "
            "it is the true word and nothing else"
        )
        if quick:
            report.notes.append("quick run: too few questions to quote any figure of it")

    def measure(
        self,
        methods: Sequence[str],
        own: Mapping[str, Method] | None = None,
        keep_ratios: Sequence[float | None] = KEEP_RATIOS,
    ) -> None:
        """Ask all questions; the rows join `parts`, each once."""
        found = evaluate_pruners(
            self.model,
            self.processor,
            self.questions,
            folder=self.output,
            methods=methods,
            own=own,
            keep_ratios=keep_ratios,
            batch_size=BATCH,
            reuse_tower=True,
            max_new_tokens=MAX_NEW_TOKENS,
            model_name=self.name,
            on_progress=self.progress,
        )
        known = {(row["method"], row["keep_ratio"]) for row in self.parts}
        self.parts += [row for row in found["parts"] if (row["method"], row["keep_ratio"]) not in known]
        self.report.figures["parts"] = self.parts
        self.report.save(self.output)
        if found["interrupted"]:
            raise KeyboardInterrupt

    # ---- rows

    @property
    def unpruned(self) -> Row:
        return self.parts[0]

    def row(self, method: str, keep_ratio: float | None) -> Row | None:
        """A measured row, None where the method could not do this."""
        for row in self.parts:
            if (row["method"], row["keep_ratio"]) == (method, keep_ratio):
                return None if "skipped" in row else row
        return None

    def gap(self, one: Sequence[tuple[str, float | None]], other: Sequence[tuple[str, float | None]]) -> Gap | None:
        """How much more often the first answers right, on the same questions, averaged over pairs of rows.

        Pairs of which one could not be measured are left out; None if none is left. The interval counts each question
        once, however many pairs there are.
        """
        pairs = [(self.row(*first), self.row(*second)) for first, second in zip(one, other, strict=True)]
        both = [(first, second) for first, second in pairs if first is not None and second is not None]
        if not both:
            return None
        means = [
            [statistics.fmean(float(row["hits"][number]) for row in rows) for number in range(len(self.questions))]
            for rows in zip(*both)
        ]
        return Gap(*paired_difference(*means))

    def not_worse(self, gap: Gap | None, tolerated: float = TOLERATED) -> bool | None:
        """Whether the unpruned model loses less than `tolerated`; where it fails itself, equal shares say nothing."""
        return None if self.unpruned["accuracy"]["value"] < 0.5 else not_worse(gap, tolerated)

    # ---- words and pictures

    def finish(self, title: str) -> None:
        """The table, who wins where, and the plot."""
        self.report.notes += self.table()
        self.report.notes += [f"kept {one}" for one in winners({"parts": self.parts})]
        self.report.notes += [
            f"skipped {row['method']} at {row['keep_ratio']:g}: {row['skipped']}"
            for row in self.parts
            if "skipped" in row
        ]
        picture = f"{self.report.name}.png"
        base = self.unpruned
        front = [{**row, "flops_share": row["flops"] / base["flops"]} for row in self.parts if "skipped" not in row]
        plot_pareto({"parts": front, "model": title, "questions": len(self.questions)}, self.output / picture)
        self.report.picture = picture
        self.report.complete = True
        self.report.save(self.output)

    def table(self) -> list[str]:
        """One line a method: accuracy and the share of operations at each keep ratio."""
        lines = [f"unpruned: {accuracy(self.unpruned)}"]
        for method in dict.fromkeys(row["method"] for row in self.parts if row["method"] != UNPRUNED):
            cells = []
            for row in self.parts:
                if row["method"] == method and "skipped" not in row:
                    kept = "published setting" if row["keep_ratio"] is None else f"{100 * row['keep_ratio']:g} %"
                    cells.append(f"{kept}: {accuracy(row)}, {100 * self.cost(row):.0f} % FLOPs")
            lines.append(f"{method}: {'; '.join(cells)}")
        return lines

    def cost(self, row: Row) -> float:
        """Share of the unpruned prefill's operations."""
        return row["flops"] / self.unpruned["flops"]


def accuracy(row: Row) -> str:
    """`97.2 % [96.0, 98.1]`."""
    given = row["accuracy"]
    return f"{100 * given['value']:.1f} % [{100 * given['low']:.1f}, {100 * given['high']:.1f}]"


def points(gap: Gap) -> str:
    """`+1.2 points [0.3, 2.1]`."""
    return f"{100 * gap.value:+.1f} points [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def better(gap: Gap | None) -> bool | None:
    """Whether the first answers more often right; None where the interval holds zero or nothing was measured."""
    return None if gap is None else True if gap.low > 0 else False if gap.high < 0 else None


def not_worse(gap: Gap | None, tolerated: float = TOLERATED) -> bool | None:
    """Whether the first loses less than `tolerated`; None where the interval reaches to both sides."""
    return None if gap is None else True if gap.low > -tolerated else False if gap.high < -tolerated else None


def guessing(questions: Sequence[Question]) -> Accuracy:
    """The commonest answer of every kind of question, said each time: what a model reaches that sees nothing."""
    by_kind: dict[str, list[str]] = {}
    for one in questions:
        by_kind.setdefault(one.kind, []).append(one.answers[0])
    common = {kind: statistics.mode(answers) for kind, answers in by_kind.items()}
    return Accuracy.of(one.answers[0] == common[one.kind] for one in questions)


def matched(method: str) -> Method:
    """A method whose *average* share of visual tokens over the depth is the keep ratio that is asked for.

    What it returns raises InvalidInputError where even the smallest last stage keeps more.
    """

    def make(target: Target) -> Pruner:
        assert target.keep_ratio is not None

        def at(share: float) -> tuple[Pruner, float]:
            pruner = METHODS[method](Target(share, target.depth, target.first, target.visual, target.view))
            return pruner, statistics.fmean(pruner.plan(target.depth, target.visual)) / target.visual

        low, high = 1 / target.visual, 1.0
        if at(low)[1] > target.keep_ratio * 1.05:
            raise InvalidInputError(
                f"{method} shows its first layers all tokens, and so keeps {100 * at(low)[1]:.0f} % on average at least"
            )
        for _ in range(30):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if at(middle)[1] <= target.keep_ratio else (low, middle)
        return at(low)[0]

    return make


def _fingerprint(model: torch.nn.Module) -> str:
    """Of the weights: answers of other weights must not be taken for this model's."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
