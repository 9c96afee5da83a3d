"""Measuring: variants that take turns, the machine's description, JSON and bars."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vistok.errors import require
from vistok.files import atomic_path, write_text_atomic
from vistok.reproduce.report import environment

__all__ = ["bars", "interleaved", "save", "summary"]


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each variant, `repeats` times in turn, after `warmup` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(warmup + repeats):
        for name, run in variants.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_number >= warmup:
                seconds[name].append(clock() - started)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, least and most of some timings."""
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write results with the machine that they were measured on."""
    write_text_atomic(path, json.dumps({"environment": environment(), **results}, indent=2) + "\n")
    print(f"\nwritten: {path}")


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], unit: str, caption: str) -> None:
    """One panel of horizontal bars for each group."""
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(groups), 1.2 + 0.42 * max(map(len, groups.values()))), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (title, values) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items()):
        names = list(values)[::-1]
        colours = ["#0b7a75" if name.startswith("vistok") else "#b9b9b9" for name in names]
        drawn = axes.barh(names, [values[name] for name in names], color=colours)
        axes.bar_label(drawn, fmt="%.3g", fontsize=8, padding=2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(unit, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    machine = environment()
    figure.supxlabel(
        f"{caption}\n{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"allocator {machine['allocator']}",
        fontsize=8,
    )
    with atomic_path(path) as temporary:
        canvas.print_png(str(temporary))
