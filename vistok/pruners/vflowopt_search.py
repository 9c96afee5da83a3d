"""Search of VFlowOpt's settings on one's own model and pictures (paper section 3.4).

    result = search(model, samples, target=0.25, storage="vflowopt.journal")
    pruner = VFlowOpt(result.settings, layers=result.layers)

The search keeps the state of the last prompt token after the final norm close to that of the unpruned model; it needs
no labels. Optuna proposes settings (a Gaussian process with expected improvement, random points first); with
`storage` the trials are written to a file as they end, and a search that was interrupted goes on from there.

Work that does not change between trials is done once: unpruned states, tower features, queries and keys of the tower's
attention. A trial then costs one pruned prefill a sample, without tower and without output head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistok.errors import CheckpointError, InvalidInputError, require
from vistok.files import write_text_atomic
from vistok.pruners.encoding import PIXELS, encode_pictures
from vistok.pruners.hosts import Host, find_host
from vistok.pruners.vflowopt import Settings, VFlowOpt, last_ratio

__all__ = ["SearchResult", "Trial", "box_for", "search"]

OVERSHOOT = 1.1  # the authors' own settings keep up to 1 % more than their budget


@dataclass(frozen=True)
class Trial:
    """One point: its settings, and the mean cosine of the final states; 0 where it misses the budget or gives NaN."""

    settings: Settings
    objective: float


@dataclass(frozen=True)
class SearchResult:
    """The best point seen.

    Attributes:
        settings: for `VFlowOpt`.
        layers: decoder layers before which it prunes.
        objective: mean cosine with the unpruned states, at most 1.
        target: average share kept that was asked for.
        trials: all points, in order.
    """

    settings: Settings
    layers: tuple[int, ...]
    objective: float
    target: float
    trials: tuple[Trial, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `SearchResult.load` reads."""
        write_text_atomic(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file holds something else.
        """
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                _settings(given["settings"]),
                tuple(given["layers"]),
                float(given["objective"]),
                float(given["target"]),
                tuple(Trial(_settings(one["settings"]), float(one["objective"])) for one in given["trials"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no result of a VFlowOpt search: {error}") from error

    def __str__(self) -> str:
        ratios = ", ".join(f"{ratio:.3f}" for ratio in self.settings.ratios)
        return (
            f"ratios {ratios} before layers 0, {', '.join(map(str, self.layers))}; threshold "
            f"{self.settings.threshold:.3g}, cell {self.settings.cell_size:.3g}, entropy weight "
            f"{self.settings.entropy_weight:.3g}: cosine {self.objective:.4f} over {len(self.trials)} trials"
        )


def box_for(target: float) -> dict[str, tuple[float, float]]:
    """The paper's search box, stated for a share of 0.25 and scaled to others.

    Raises:
        InvalidInputError: for a target outside (0, 1).
    """
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < 1:
        raise InvalidInputError(f"target is the average share of tokens to keep in (0, 1), got {target!r}")
    highest = min(1.0, 1.5 * target)
    return {
        "first": (min(target, highest), highest),
        "second": (0.2 / 0.375, 1.0),
        "threshold": (0.0, 50.0),
        "cell_size": (3.0, 24.0),
        "entropy_weight": (-1.0, 1.0),
    }


@dataclass
class _Sample:
    """What does not change between trials: the encoded prompt, and the unpruned states float32 [B, D]."""

    prompt: dict[str, Any]
    unpruned: Tensor


class _Objective:
    """Mean cosine between final states with and without pruning."""

    def __init__(self, model: Any, host: Host, samples: Sequence[Mapping[str, Any]], tower_layer: int | None) -> None:
        self.model, self.host, self.tower_layer = model, host, tower_layer
        self.samples = [self.prepare(dict(sample), number) for number, sample in enumerate(samples)]

    def prepare(self, inputs: dict[str, Any], number: int) -> _Sample:
        if all(inputs.get(name) is None for name in PIXELS.values()):
            raise InvalidInputError(
                f"sample {number} has no pictures; give what the processor returns for image and text"
            )
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise InvalidInputError(f"sample {number} is padded on the right; pad on the left, or give single samples")
        inputs.pop("labels", None)
        prompt = encode_pictures(self.model, inputs, self.tower_layer)
        state = self.final_state(prompt)
        if not bool(state.isfinite().all()):
            raise InvalidInputError(f"the unpruned model gives NaN or infinity on sample {number}")
        return _Sample(prompt, state)

    def final_state(self, prompt: Mapping[str, Any]) -> Tensor:
        """float32 [B, D] of the last prompt token, after the final norm."""
        return self.host.core(**prompt, use_cache=False).last_hidden_state[:, -1].float()

    @torch.no_grad()
    def __call__(self, settings: Settings, layers: Sequence[int]) -> tuple[float, float]:
        """The mean cosine, and the share of visual tokens that a layer really saw on average."""
        pruner = VFlowOpt(settings, layers=layers, tower_layer=self.tower_layer)
        total, share, count = 0.0, 0.0, 0
        with pruner.attached(self.model):
            for sample in self.samples:
                cosine = torch.cosine_similarity(sample.unpruned, self.final_state(sample.prompt), dim=-1)
                total += float(torch.nan_to_num(cosine, nan=0.0).sum())
                assert pruner.last_report is not None
                share += pruner.last_report.average_kept * len(cosine)
                count += len(cosine)
        return total / count, share / count


def search(
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    *,
    target: float = 0.25,
    trials: int = 50,
    random_trials: int = 27,
    layers: Sequence[int] | None = None,
    box: Mapping[str, tuple[float, float]] | None = None,
    tower_layer: int | None = None,
    storage: str | Path | None = None,
    study_name: str = "vflowopt",
    seed: int = 42,
    on_trial: Callable[[int, int, Trial], None] | None = None,
) -> SearchResult:
    """Look for the settings that change the model's answers least at a given budget.

    Args:
        model: a supported transformers LVLM in eval mode.
        samples: what the processor returns for one picture and its question each; the paper uses 30 of the instruction
            data.
        target: average share of visual tokens over the depth. A point that really keeps over a tenth more, because
            recycling leaves one token in every cell, counts as 0.
        trials: points in all, those of an earlier run in `storage` included.
        random_trials: of these, random ones at first.
        layers: the two decoder layers; default a third and two thirds of the depth.
        box: ranges to replace, by the names of `box_for`. A range of one value fixes it.
        tower_layer: whose attention map counts.
        storage: journal file of the trials; an existing one is continued.
        study_name: name inside that file; another name starts afresh.
        seed: of the proposals.
        on_trial: called with (trials done, trials in all, the trial).

    Raises:
        InvalidInputError: for bad ranges, no samples, or samples without pictures.
        MissingExtraError: if optuna is not installed.
    """
    optuna = require("optuna", "search")
    limits = {**box_for(target), **(box or {})}
    unknown = set(limits) - set(box_for(target))
    if unknown:
        raise InvalidInputError(f"unknown ranges {sorted(unknown)}; there are: {', '.join(box_for(target))}")
    for name, (low, high) in limits.items():
        if not low <= high or not math.isfinite(low + high):
            raise InvalidInputError(f"the range of {name} must be (low, high), got {(low, high)}")
    if not samples:
        raise InvalidInputError("the search needs at least one sample; the paper takes 30")
    if trials < 1:
        raise InvalidInputError(f"trials is a positive number, got {trials}")
    host = find_host(model)
    depth = len(host.layers)
    chosen = tuple(layers) if layers is not None else (max(1, depth // 3), max(2, 2 * depth // 3))
    if len(chosen) != 2:
        raise InvalidInputError(f"the search prunes before two decoder layers, got {chosen}")
    counts = (chosen[0], chosen[1] - chosen[0], depth - chosen[1])
    if min(counts) < 1:
        raise InvalidInputError(f"layers must ascend inside 1..{depth - 1}, got {chosen}")
    with torch.no_grad():
        objective = _Objective(model, host, samples, tower_layer)

    def settings_of(values: Mapping[str, float]) -> Settings | None:
        third = last_ratio(target, values["first"], values["second"], counts)
        if third <= 0:
            return None
        ratios = (values["first"], values["second"], third)
        return Settings(ratios, values["threshold"], values["cell_size"], values["entropy_weight"])

    def run(trial: Any) -> float:
        values = {
            name: low if low == high else trial.suggest_float(name, low, high) for name, (low, high) in limits.items()
        }
        settings = settings_of(values)
        value, kept = (0.0, 1.0) if settings is None else objective(settings, chosen)
        # Small cells leave far more tokens than the ratios say: keeping too many must not pay.
        if kept > OVERSHOOT * target:
            value = 0.0
            trial.set_user_attr("missed", kept)
        trial.set_user_attr("settings", None if settings is None else asdict(settings))
        return value

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        store = None
        if storage is not None:
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            store = JournalStorage(JournalFileBackend(str(storage)))
        study = optuna.create_study(study_name=study_name, storage=store, direction="maximize", load_if_exists=True)
        done = len([one for one in study.trials if one.state.name == "COMPLETE"])
        startup = max(1, min(random_trials, trials))
        study.sampler = optuna.samplers.GPSampler(seed=seed + done, n_startup_trials=startup)
        for number in range(done, trials):
            study.optimize(run, n_trials=1)
            if on_trial is not None:
                last = study.trials[-1]
                settings = last.user_attrs.get("settings")
                found = Settings((0.0,), 0.0, 0.0) if settings is None else _settings(settings)
                on_trial(number + 1, trials, Trial(found, float(last.value)))
    finally:
        optuna.logging.set_verbosity(verbosity)
    complete = [one for one in study.trials if one.state.name == "COMPLETE" and one.user_attrs.get("settings")]
    if not any("missed" not in one.user_attrs for one in complete):
        raise InvalidInputError(
            f"no point of the box meets the target {target}: keep less in the first stages, e.g. "
            f"box={{'first': ({target / 2:.3g}, {target:.3g})}}, or recycle into fewer and larger cells (cell_size), "
            "or try more points"
        )
    best = max(complete, key=lambda one: one.value)
    return SearchResult(
        _settings(best.user_attrs["settings"]),
        chosen,
        float(best.value),
        target,
        tuple(Trial(_settings(one.user_attrs["settings"]), float(one.value)) for one in complete),
    )


def _settings(given: Mapping[str, Any]) -> Settings:
    return Settings(**{**given, "ratios": tuple(given["ratios"])})
