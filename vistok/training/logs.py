"""What a training leaves to read: a JSON line a logged step, TensorBoard events, and a progress bar."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vistok.errors import require
from vistok.files import write_text_atomic

__all__ = ["MetricsLog", "ProgressBar", "read_metrics"]


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The logged lines of a run, oldest first; a last line cut off by a crash is dropped."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class MetricsLog:
    """Writes `metrics.jsonl` and, if asked, TensorBoard event files under `tensorboard/`.

    Args:
        run_dir: the run's folder.
        step: step that the run continues from; later lines, written before a crash, are dropped.
        tensorboard: also write event files.

    Raises:
        MissingExtraError: TensorBoard is asked for but not installed (extra `train`).
    """

    def __init__(self, run_dir: Path, step: int, tensorboard: bool) -> None:
        self.path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(run_dir) if line["step"] <= step]
        write_text_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.writer: Any = None
        if tensorboard:
            module = require("torch.utils.tensorboard", "train")
            self.writer = module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures of a step."""
        line = {"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """Log a picture, uint8 [H, W, 3]."""
        if self.writer is not None:
            self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        if self.writer is not None:
            self.writer.close()


class ProgressBar:
    """A rich progress bar with rate and time left on standard error; shows nothing unless that is a terminal."""

    def __init__(self, description: str, total: int, shown: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not (shown and console.is_terminal),
            transient=True,
        )
        self.task = self.progress.add_task(description, total=total, rate="", note="")

    def __enter__(self) -> ProgressBar:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def update(self, completed: int, *, total: int | None = None, note: str = "") -> None:
        """Set how much is done, and the total if it was not known before."""
        speed = self.progress.tasks[0].speed
        rate = f"{speed:.2f}/s" if speed else ""
        self.progress.update(self.task, completed=completed, total=total, rate=rate, note=note)
