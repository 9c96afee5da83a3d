"""All methods at all keep ratios on one set of questions: accuracy, operations, cache, time; a table and a plot."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vistok.errors import InvalidInputError, require
from vistok.files import atomic_path, write_text_atomic
from vistok.metrics.accuracy import Accuracy
from vistok.metrics.pruning.asking import UNPRUNED, Answer, Asker
from vistok.metrics.pruning.methods import METHODS, Method, check_method
from vistok.metrics.pruning.questions import Match, Question, answers_agree
from vistok.pruners import encode_pictures
from vistok.pruners.stages import check_ratio

__all__ = ["KEEP_RATIOS", "Winner", "evaluate_pruners", "paired_difference", "pareto", "plot_pareto", "winners"]

KEEP_RATIOS = (0.5, 0.25, 0.11, 0.05)


def evaluate_pruners(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    folder: str | Path | None = None,
    methods: Sequence[str] = tuple(METHODS),
    keep_ratios: Sequence[float | None] = KEEP_RATIOS,
    own: Mapping[str, Method] | None = None,
    batch_size: int = 1,
    reuse_tower: bool = False,
    max_new_tokens: int = 16,
    instruction: str = "",
    match: Match = "exact",
    model_name: str = "",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask every question without pruning and with every method at every keep ratio.

    Each answer is written to `folder/answers/` as soon as it is there, so a run that was interrupted goes on where it
    stopped; answers of other settings, questions or models are asked anew.

    Args:
        model, processor: as `load_lvlm` returns them.
        questions: as `load_questions` returns them.
        folder: of the answers; None keeps none. The report is yours to write.
        methods: names of `METHODS`, or several joined by `+`.
        keep_ratios: shares in (0, 1]; None is each method's published setting.
        own: methods of your own: a name, and what makes the pruner from a `Target`. They come after `methods`, and
            are always asked anew.
        batch_size: questions asked at once, padded on the left. Answers and operations are those of single questions;
            times are a question's share of its batch.
        reuse_tower: encode each picture once for all methods, which takes memory for the features and the tower's
            queries and keys of all pictures; prefill times then leave the tower out.
        match: see `answers_agree`.
        model_name: tells models apart when a run goes on.
        on_progress: called with a label, answers so far, and their total.

    Returns:
        `{"model", "questions", "parts": [row ...], "interrupted"}`. Each row has `method`, `keep_ratio`, `accuracy`
        (with its 95 % interval), `by_kind` (the same by kind of question), `hits` (a 1 for each right answer and a 0
        for each wrong one, in the order of the questions), means of `flops`, `kv_bytes`, `average_kept`, medians of the
        times, shares of the unpruned figures, and `pareto`; or `skipped`, the reason why a method cannot do this.
        Ctrl-C ends the run and returns the rows of the parts that are whole.

    Raises:
        InvalidInputError: for no questions, unknown methods, or a ratio outside (0, 1].
    """
    if not questions:
        raise InvalidInputError("there are no questions")
    if match not in ("exact", "contains"):
        raise InvalidInputError(f"match is 'exact' or 'contains', got {match!r}")
    own = dict(own or {})
    if not (methods or own) or not keep_ratios:
        raise InvalidInputError("give at least one method and one keep ratio")
    if batch_size < 1:
        raise InvalidInputError(f"batch_size is a number from 1 on, got {batch_size}")
    for name in own:
        if name in METHODS or name == UNPRUNED or "+" in name or "/" in name:
            raise InvalidInputError(f"call your own method something else than {name!r}: no known name, no + and no /")
    for method in methods:
        check_method(method)
    for share in keep_ratios:
        if share is not None:
            check_ratio("keep_ratio", share)
    asker = Asker(model, processor, max_new_tokens=max_new_tokens, instruction=instruction, own=own)
    settings = {
        "model": model_name or model.config.name_or_path,
        "dtype": str(model.dtype),
        "device": str(model.device.type),
        "max_new_tokens": max_new_tokens,
        "instruction": instruction,
        "batch_size": batch_size,
        "reuse_tower": reuse_tower,
        "questions": _fingerprint(questions),
    }
    kinds = [
        (UNPRUNED, None),
        *((method, ratio) for method in [*methods, *own] for ratio in dict.fromkeys(keep_ratios)),
    ]
    rows: list[dict[str, Any]] = []
    interrupted = False
    prompts: dict[int, dict[str, Any]] | None = {} if reuse_tower else None
    for method, ratio in dict.fromkeys(kinds):
        kept_in = None if folder is None or method in own else Path(folder) / "answers"
        part = _Part(kept_in, method, ratio, settings)
        try:
            for done in part.run(asker, questions, batch_size, prompts):
                if on_progress is not None:
                    on_progress(part.label, done, len(questions))
        except InvalidInputError as error:
            if method == UNPRUNED:
                raise
            rows.append({"method": method, "keep_ratio": ratio, "skipped": str(error)})
            continue
        except KeyboardInterrupt:
            interrupted = True
            break
        rows.append(_row(method, ratio, part.answers, questions, match))
    _compare(rows)
    return {
        **settings,
        "questions": len(questions),
        "match": match,
        "interrupted": interrupted,
        "parts": rows,
    }


def _fingerprint(questions: Sequence[Question]) -> str:
    """Of the questions and the bytes of their pictures."""
    digest = hashlib.sha256()
    pictures: dict[Any, str] = {}
    for one in questions:
        name = one.image if isinstance(one.image, Path) else id(one.image)
        if name not in pictures:
            pictures[name] = hashlib.sha256(one.picture_bytes()).hexdigest()
        digest.update(json.dumps([pictures[name], one.question]).encode())
    return digest.hexdigest()[:16]


class _Part:
    """The answers of one method at one keep ratio, one JSON line each, after a line with the settings."""

    def __init__(self, folder: Path | None, method: str, ratio: float | None, settings: Mapping[str, Any]) -> None:
        self.method, self.ratio = method, ratio
        self.label = method if ratio is None else f"{method} {ratio:g}"
        self.path = None if folder is None else folder / f"{self.label.replace(' ', '-')}.jsonl"
        self.settings = {**settings, "method": method, "keep_ratio": ratio}
        self.answers: list[Answer] = self._read()

    def _read(self) -> list[Answer]:
        if self.path is None or not self.path.is_file():
            return []
        found: list[Answer] = []
        try:
            first, *lines = self.path.read_text(encoding="utf-8").splitlines() or [""]
            if json.loads(first) != self.settings:
                return []
            for line in lines:
                fields = json.loads(line)
                found.append(Answer(**{**fields, "notes": tuple(fields["notes"])}))
        except (ValueError, TypeError, KeyError):  # a line that was cut off ends what can be used
            pass
        return found

    def run(
        self,
        asker: Asker,
        questions: Sequence[Question],
        batch_size: int,
        prompts: dict[int, dict[str, Any]] | None,
    ) -> Iterator[int]:
        """Ask what is missing; yields how many answers there are. `prompts` are encoded batches by their start."""
        yield len(self.answers)
        if len(self.answers) >= len(questions):
            return

        def ask(start: int, stop: int) -> list[Answer]:
            some = questions[start:stop]
            if prompts is None:
                return asker.ask_all([(one.picture(), one.question) for one in some], self.method, self.ratio)
            if start not in prompts or len(prompts[start]["input_ids"]) != len(some):
                inputs = asker.batch([(one.picture(), one.question) for one in some])
                prompts[start] = encode_pictures(asker.model, inputs)
            return asker.answers(prompts[start], self.method, self.ratio)

        if prompts is None:
            # The first pass of a method is slower than the others; it is not counted.
            ask(len(self.answers), len(self.answers) + 1)
        if self.path is not None:
            lines = [json.dumps(self.settings), *(json.dumps(asdict(one)) for one in self.answers)]
            write_text_atomic(self.path, "\n".join(lines) + "\n")
        with nullcontext() if self.path is None else self.path.open("a", encoding="utf-8") as file:
            for start in range(len(self.answers), len(questions), batch_size):
                answers = ask(start, start + batch_size)
                if file is not None:
                    file.write("".join(json.dumps(asdict(one)) + "\n" for one in answers))
                    file.flush()
                self.answers += answers
                yield len(self.answers)


def _row(
    method: str, ratio: float | None, answers: Sequence[Answer], questions: Sequence[Question], match: Match
) -> dict[str, Any]:
    right = [answers_agree(answer.text, one.answers, match) for answer, one in zip(answers, questions, strict=True)]
    by_kind: dict[str, list[bool]] = {}
    for hit, one in zip(right, questions, strict=True):
        by_kind.setdefault(one.kind, []).append(hit)
    decoded = [one.decode_seconds / (one.new_tokens - 1) for one in answers if one.new_tokens > 1]
    return {
        "method": method,
        "keep_ratio": ratio,
        "accuracy": Accuracy.of(right).to_dict(),
        "by_kind": {kind: Accuracy.of(hits).to_dict() for kind, hits in sorted(by_kind.items()) if kind},
        "hits": "".join("01"[hit] for hit in right),
        "kept_tokens": statistics.fmean(one.kept_tokens for one in answers),
        "visual_tokens": statistics.fmean(one.visual_tokens for one in answers),
        "average_kept": statistics.fmean(one.average_kept for one in answers),
        "flops": statistics.fmean(one.flops for one in answers),
        "kv_bytes": statistics.fmean(one.kv_bytes for one in answers),
        "prefill_seconds": statistics.median(one.prefill_seconds for one in answers),
        "decode_seconds_per_token": statistics.median(decoded) if decoded else None,
        "notes": sorted({note for one in answers for note in one.notes}),
    }


def _compare(rows: list[dict[str, Any]]) -> None:
    """Add shares of the unpruned figures, and who is on the Pareto front of accuracy and operations."""
    measured = [row for row in rows if "skipped" not in row]
    if not measured:
        return
    base = measured[0]
    for row in measured:
        for name in ("flops", "kv_bytes", "prefill_seconds"):
            row[f"{name}_share"] = row[name] / base[name]
    front = pareto([(row["flops"], row["accuracy"]["value"]) for row in measured])
    for row, best in zip(measured, front, strict=True):
        row["pareto"] = best


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (cost, value) no other point beats: none costs at most as much and is worth at least as much."""
    return [
        not any((c <= cost and v >= value) and (c < cost or v > value) for c, v in points) for cost, value in points
    ]


@dataclass(frozen=True)
class Winner:
    """Who answers best at one keep ratio.

    Attributes:
        keep_ratio: share of tokens left.
        best: the methods of highest accuracy.
        accuracy: theirs, as a dictionary.
        level: methods that these questions cannot tell from the best (the paired 95 % interval of the difference holds
            zero).
        behind: how many methods are behind.
    """

    keep_ratio: float
    best: tuple[str, ...]
    accuracy: dict[str, Any]
    level: tuple[str, ...]
    behind: int

    def __str__(self) -> str:
        said = f"at {self.keep_ratio:g}: best {', '.join(self.best)} ({100 * self.accuracy['value']:.1f} %)"
        if self.level:
            return f"{said}; not told from {', '.join(self.level)}"
        return f"{said}; ahead of all others" if self.behind else said


def winners(report: Mapping[str, Any]) -> list[Winner]:
    """The best methods at each keep ratio of an evaluation's report."""
    measured = [row for row in report["parts"] if "skipped" not in row and row["keep_ratio"] is not None]
    found = []
    for ratio in dict.fromkeys(row["keep_ratio"] for row in measured):
        rows = sorted(
            (row for row in measured if row["keep_ratio"] == ratio), key=lambda row: -row["accuracy"]["value"]
        )
        first = [row for row in rows if row["accuracy"]["value"] == rows[0]["accuracy"]["value"]]
        best_hits = [int(hit) for hit in first[0]["hits"]]
        level = [
            row["method"]
            for row in rows[len(first) :]
            if paired_difference([int(hit) for hit in row["hits"]], best_hits)[2] >= 0
        ]
        best = tuple(row["method"] for row in first)
        behind = len(rows) - len(first) - len(level)
        found.append(Winner(ratio, best, first[0]["accuracy"], tuple(level), behind))
    return found


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Difference of two accuracies on the same questions, and its 95 % interval (normal, from the paired differences).

    Args:
        first, second: a figure for each question, in the same order: 1 for right and 0 for wrong.

    Raises:
        InvalidInputError: for differing numbers of questions, or none.
    """
    if len(first) != len(second) or not first:
        raise InvalidInputError(f"paired answers must be as many, and at least one; got {len(first)} and {len(second)}")
    gaps = [one - other for one, other in zip(first, second)]
    mean = statistics.fmean(gaps)
    half = 1.959964 * statistics.pstdev(gaps) / len(gaps) ** 0.5
    return mean, mean - half, mean + half


def plot_pareto(report: Mapping[str, Any], path: str | Path) -> None:
    """Write accuracy against the share of operations, a line a method, and the Pareto front, as a picture.

    Raises:
        MissingExtraError: without matplotlib.
        InvalidInputError: if nothing was measured.
    """
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in report["parts"] if "skipped" not in row]
    if not rows:
        raise InvalidInputError("there is nothing to plot: no method was measured")
    figure = Figure(figsize=(8, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    markers = "osD^v<>Pphd*X"
    names = list(dict.fromkeys(row["method"] for row in rows))
    for number, name in enumerate(names):
        own = sorted((row for row in rows if row["method"] == name), key=lambda row: row["flops"])
        across = [100 * row["flops_share"] for row in own]
        up = [100 * row["accuracy"]["value"] for row in own]
        below = [value - 100 * row["accuracy"]["low"] for value, row in zip(up, own)]
        above = [100 * row["accuracy"]["high"] - value for value, row in zip(up, own)]
        axes.errorbar(
            across,
            up,
            yerr=[[max(0.0, one) for one in below], [max(0.0, one) for one in above]],
            label=name,
            color={UNPRUNED: "black", "random": "dimgrey"}.get(name, f"C{(number - 1) % 10}"),
            linestyle="--" if name == "random" else "-",
            marker=markers[number % len(markers)],
            markersize=5,
            linewidth=1.2,
            elinewidth=0.6,
        )
    front = sorted((100 * row["flops_share"], 100 * row["accuracy"]["value"]) for row in rows if row["pareto"])
    axes.step(*zip(*front), where="post", color="grey", linewidth=5, alpha=0.25, label="Pareto front")
    axes.set_xlabel("operations of the prefill, % of unpruned")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"{report['model']}: {report['questions']} questions, bars: 95 % intervals", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    with atomic_path(path) as temporary:
        canvas.print_figure(temporary, dpi=130)
