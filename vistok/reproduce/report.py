"""What a reproduction reports: claim, the paper's figure, ours, and whether the direction holds."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vistok.files import write_text_atomic
from vistok.metrics.accuracy import Accuracy

__all__ = ["Finding", "Gap", "Report", "environment", "share_gap"]


@dataclass(frozen=True)
class Finding:
    """One claim and what became of it.

    Attributes:
        claim: what the paper says, in words.
        paper: its figure and where it stands.
        measured: our figure.
        holds: whether the direction holds here; None where the figures cannot tell.
    """

    claim: str
    paper: str
    measured: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        """`holds`, `does not hold` or `cannot tell`."""
        return {True: "holds", False: "does not hold", None: "cannot tell"}[self.holds]


@dataclass
class Report:
    """The state of one reproduction; saved after every stage.

    Attributes:
        name: of the claim.
        title: the claim in one line.
        paper: its source.
        settings: everything that the figures depend on.
        figures: the measurements.
        findings: claims with their verdicts.
        notes: what a reader should know before quoting a figure.
        complete: False while stages are missing.
        picture: the plot, once it is drawn.
    """

    name: str
    title: str
    paper: str
    settings: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False
    picture: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["findings"] = [{**asdict(finding), "verdict": finding.verdict} for finding in self.findings]
        return values

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """A section for a page: the findings as a table, then the picture and the notes."""
        lines = [f"## {self.name}", "", f"{self.title[:1].upper()}{self.title[1:]}. {self.paper}.", ""]
        if not self.complete:
            lines += ["**Incomplete: the run was interrupted; these are the stages that finished.**", ""]
        lines += ["| claim | paper | measured | verdict |", "|---|---|---|---|"]
        for finding in self.findings:
            cells = (finding.claim, finding.paper, finding.measured, f"**{finding.verdict}**")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if self.picture is not None:
            lines += ["", f"![{self.name}]({self.picture})"]
        lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines).rstrip() + "\n"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `NAME.json` and `NAME.md` (each atomically); the path of the first."""
        path = Path(folder) / f"{self.name}.json"
        write_text_atomic(path, self.to_json() + "\n")
        write_text_atomic(path.with_suffix(".md"), self.to_markdown())
        return path

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title}", f"  {self.paper}"]
        if not self.complete:
            lines.append("  INCOMPLETE: the run was interrupted; these are the stages that finished")
        for finding in self.findings:
            lines += [
                "",
                f"  claim     {finding.claim}",
                f"  paper     {finding.paper}",
                f"  measured  {finding.measured}",
                f"  verdict   {finding.verdict}",
            ]
        lines += ["", *(f"  note: {note}" for note in self.notes)]
        return "\n".join(lines).rstrip()


@dataclass(frozen=True)
class Gap:
    """How much higher one figure is than another, and the 95 % interval of that."""

    value: float
    low: float
    high: float

    def lower(self) -> bool | None:
        """Whether the first is lower; None if the interval holds 0."""
        return True if self.high < 0 else False if self.low > 0 else None


def share_gap(one: Accuracy, other: Accuracy) -> Gap:
    """How much higher the first share is, with Newcombe's interval (1998) from their Wilson intervals."""
    (one_low, one_high), (other_low, other_high) = one.interval, other.interval
    gap = one.value - other.value
    low = gap - math.hypot(one.value - one_low, other_high - other.value)
    high = gap + math.hypot(one_high - one.value, other.value - other_low)
    return Gap(gap, low, high)


def environment() -> dict[str, Any]:
    """The machine, as far as timings depend on it."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "allocator": Path(os.environ.get("LD_PRELOAD", "")).name or "default",
    }
