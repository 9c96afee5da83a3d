"""Training checkpoints: written whole or not at all, and enough to continue bit for bit.

A run folder:

    recipe.yaml                 the recipe with every default spelled out
    metrics.jsonl               one line a logged step
    samples/                    picture grids
    checkpoints/step-00001000/
        model.safetensors       weights being trained
        ema.safetensors         their moving average (what is exported)
        config.json             constructor arguments of the network
        optimizer.pt            optimisers, loss scaling, codebook counters, second network
        progress.json           step and moving-average updates, written last

Data order and every random draw are functions of (seed, step), so the step alone restores them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.errors import CheckpointError
from vistok.files import read_state_dict, save_tensors

__all__ = ["Checkpoint", "latest_checkpoint", "list_checkpoints", "load_checkpoint", "save_checkpoint"]

PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run continues from.

    Attributes:
        step: optimiser steps done.
        model: weights under the network's names.
        ema: averaged weights, or None.
        ema_updates: how often the average was updated.
        extra: optimisers' and other states (tensors, numbers, lists and dictionaries only).
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    ema_updates: int
    extra: dict[str, Any]


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / "progress.json").is_file()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = list_checkpoints(run_dir)
    return found[-1] if found else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    run_dir: str | os.PathLike[str], checkpoint: Checkpoint, config: Mapping[str, Any], keep: int
) -> Path:
    """Write a checkpoint into a temporary folder, rename it, and delete all but the newest `keep`.

    A crash at any moment leaves the older checkpoints whole, and at most a temporary folder that the next save removes.

    Args:
        run_dir: the run's folder.
        checkpoint: what to write.
        config: the network's constructor arguments, as `config.json`.
        keep: how many checkpoints stay.

    Returns:
        The folder written.
    """
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    target = folder / f"{PREFIX}{checkpoint.step:08d}"
    temporary = folder / f".{target.name}.partial"
    temporary.mkdir()
    try:
        save_tensors(temporary / "model.safetensors", checkpoint.model)
        if checkpoint.ema is not None:
            save_tensors(temporary / "ema.safetensors", checkpoint.ema)
        torch.save(checkpoint.extra, temporary / "optimizer.pt")
        (temporary / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        progress = {"step": checkpoint.step, "ema_updates": checkpoint.ema_updates}
        (temporary / "progress.json").write_text(json.dumps(progress) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            _sync(path)
        if target.exists():  # the same step again, from an interrupted run
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint folder.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = Path(path)
    try:
        progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        step, updates = int(progress["step"]), int(progress["ema_updates"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no training checkpoint: progress.json cannot be read ({error})") from error
    ema = path / "ema.safetensors"
    return Checkpoint(
        step=step,
        model=read_state_dict(path / "model.safetensors"),
        ema=read_state_dict(ema) if ema.is_file() else None,
        ema_updates=updates,
        extra=read_state_dict(path / "optimizer.pt"),
    )
