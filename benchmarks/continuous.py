"""Sampling with MAR, Hi-MAR and xAR: seconds an image of vistok's samplers against plain ones.

    python -m benchmarks.continuous [--system xar himar mar] [--size lab|b] [--batch 1 4] [--repeats 3]

Every variant draws the same noise from the same weights; how far its tokens are from the plain ones is part of the
result. The variants take turns, so that a busy machine slows all alike, and the clock counts this process's CPU time:
run it with OMP_NUM_THREADS=1 on a shared machine. Timings do not depend on what the weights are: they are random. The
published size takes minutes an image on a CPU, so its steps are cut for both alike; `SETTINGS` says to what.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain import himar as plain_himar
from benchmarks.plain import mar as plain_mar
from benchmarks.plain import xar as plain_xar
from benchmarks.timing import bars, interleaved, save, summary
from vistok.generators import MAR, XAR, HiMAR
from vistok.training.recipe import load_recipe

ROOT = Path(__file__).parent
CLASSES: dict[str, Any] = {"xar": XAR, "himar": HiMAR, "mar": MAR}
# How each is sampled: at lab size as shipped, at the published size with fewer steps.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "lab": {
        "xar": {"guidance_scale": 2.0, "num_inference_steps": 25},
        "himar": {"guidance_scale": 2.0, "pivot_guidance_scale": 2.0, "num_inference_steps": 4},
        "mar": {"guidance_scale": 2.0, "num_inference_steps": 64},
    },
    "b": {
        "xar": {"guidance_scale": 2.7, "num_inference_steps": 4},
        "himar": {
            "guidance_scale": 2.5,
            "pivot_guidance_scale": 2.7,
            "num_inference_steps": 2,
            "num_pivot_steps": 4,
        },
        "mar": {"guidance_scale": 2.9, "num_inference_steps": 6},
    },
}
# Steps of the diffusion heads at the published size (100 and 250 are the published ones).
HEAD_STEPS = {
    "mar": {"num_diffusion_steps": "10"},
    "himar": {"num_diffusion_steps": "10", "num_dense_diffusion_steps": "25"},
}


def build(system: str, size: str) -> Any:
    """A network in eval mode with random weights, those that start at zero included."""
    config = (
        dict(CLASSES[system].published[f"{system}-b.imagenet256"].config) | HEAD_STEPS.get(system, {})
        if size == "b"
        else load_recipe(ROOT.parent / "recipes" / f"{system}-shapes.yaml").model.config
    )
    torch.manual_seed(0)
    model = CLASSES[system](**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not bool(parameter.any()):
                parameter.normal_(std=0.02)
    return model


def variants_of(system: str, model: Any, batch: int, settings: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name; each returns tokens [B, N, C]."""
    labels = torch.arange(batch) % model.num_classes

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    def ours() -> Tensor:
        tokens = model.generate(labels, generator=draws(), **settings)
        assert tokens.features is not None
        return tokens.features

    def plain(*savings: str) -> Tensor:
        if system == "mar":
            return plain_mar.generate(model, labels, generator=draws(), **settings)
        if system == "himar":
            return plain_himar.generate(model, labels, generator=draws(), **settings)[1]
        return plain_xar.generate(model, labels, generator=draws(), savings=savings, **settings)

    found: dict[str, Callable[[], Tensor]] = {"plain": plain}
    if system == "xar":  # "cache" is what the authors' code saves already
        for name in plain_xar.SAVINGS:
            found[f"plain + {name}"] = lambda name=name: plain(name)
    return {**found, "vistok": ours}


def measure(system: str, size: str, batch: int, repeats: int) -> dict[str, Any]:
    """CPU seconds (on a GPU: seconds) of every variant of one system, each image of another class."""
    settings = SETTINGS[size][system]
    model = build(system, size)
    variants = variants_of(system, model, batch, settings)
    tokens = {name: run() for name, run in variants.items()}
    apart = {name: float((found - tokens["plain"]).abs().max()) for name, found in tokens.items()}
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds = interleaved(variants, repeats, warmup=0, clock=clock)
    rows = {}
    for name, times in seconds.items():
        ratios = [plain / own for plain, own in zip(seconds["plain"], times)]
        rows[name] = {
            **{key: value / batch for key, value in summary(times).items()},
            "times_plain": statistics.median(ratios),
            "largest_difference": apart[name],
        }
    return {
        "system": system,
        "size": size,
        "batch": batch,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "largest_token": float(tokens["plain"].abs().max()),
        "settings": settings,
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", nargs="+", choices=list(CLASSES), default=list(CLASSES))
    parser.add_argument("--size", choices=list(SETTINGS), default="lab")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/continuous-SIZE")
    given = parser.parse_args(arguments)
    found = []
    for system in given.system:
        for batch in given.batch:
            found.append(measure(system, given.size, batch, given.repeats))
            print(f"\n{system}, {found[-1]['parameters']:,} parameters, batch {batch}, {found[-1]['settings']}")
            for name, row in found[-1]["rows"].items():
                print(
                    f"  {name:<14} {1000 * row['median']:>9.0f} ms an image  {row['times_plain']:>5.2f}x plain  "
                    f"[{1000 * row['least']:.0f}, {1000 * row['most']:.0f}]  largest difference "
                    f"{row['largest_difference']:.1e} of {found[-1]['largest_token']:.1e}"
                )
    output = given.output or ROOT / "results" / f"continuous-{given.size}"
    save(output.with_suffix(".json"), {"head_steps": HEAD_STEPS, "measurements": found})
    bars(
        output.with_suffix(".png"),
        {
            f"{one['system']}, batch {one['batch']}": {name: 1000 * row["median"] for name, row in one["rows"].items()}
            for one in found
        },
        "ms an image",
        f"{given.size} size, CPU time",
    )


if __name__ == "__main__":
    main()
