"""Sampling with xAR: images/s of vistok's sampler against the plain one, and what each saving is worth.

    python -m benchmarks.xar [--size lab|b] [--batch 1 4] [--steps 20] [--repeats 3]

Every variant draws the same noise from the same weights; how far its tokens are from the plain ones is part of the
result. The variants take turns, so that a busy machine slows all alike. Timings do not depend on what the weights are:
they are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain import xar as plain
from benchmarks.timing import bars, interleaved, save, summary
from vistok.generators import XAR

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, dict[str, Any]] = {
    "lab": {
        "latent_channels": 8,
        "grid": (8, 8),
        "entity_size": 4,
        "hidden_size": 128,
        "encoder_layers": 3,
        "encoder_heads": 4,
        "decoder_layers": 3,
        "decoder_heads": 4,
        "num_classes": 64,
    },
    "b": dict(XAR.published["xar-b.imagenet256"].config),
}


def measure(size: str, batch: int, repeats: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every variant at one batch size, each image of another class."""
    torch.manual_seed(0)
    model = XAR(**SIZES[size]).eval()
    labels = torch.arange(batch) % model.num_classes

    def run_plain(*savings: str) -> Tensor:
        return plain.generate(model, labels, generator=torch.Generator().manual_seed(1), savings=savings, **settings)

    def run_ours() -> Tensor:
        tokens = model.generate(labels, generator=torch.Generator().manual_seed(1), **settings)
        assert tokens.features is not None
        return tokens.features

    variants: dict[str, Callable[[], Tensor]] = {"plain": run_plain}
    for name in plain.SAVINGS:
        variants[f"plain + {name}"] = lambda name=name: run_plain(name)
    variants["plain + all"] = lambda: run_plain(*plain.SAVINGS)
    variants["vistok"] = run_ours
    expected = run_plain()
    apart = {name: float((run() - expected).abs().max()) for name, run in variants.items()}
    rows = {}
    for name, times in interleaved(variants, repeats, warmup=0).items():
        found = summary(times)
        rows[name] = {**found, "images_per_second": batch / found["median"], "largest_difference": apart[name]}
    for row in rows.values():
        row["times_plain"] = rows["plain"]["median"] / row["median"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"size": size, "batch": batch, "parameters": parameters, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="lab")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=20, help="network calls an entity")
    parser.add_argument("--guidance-scale", type=float, default=2.7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "xar")
    given = parser.parse_args(arguments)
    settings = {"guidance_scale": given.guidance_scale, "num_inference_steps": given.steps}
    found = []
    for batch in given.batch:
        found.append(measure(given.size, batch, given.repeats, settings))
        print(f"\nxar, {found[-1]['parameters']:,} parameters, batch {batch}")
        for name, row in found[-1]["rows"].items():
            print(
                f"  {name:<22} {row['images_per_second']:>8.3f} images/s  {row['times_plain']:>5.2f}x plain  "
                f"[{row['least']:.2f}, {row['most']:.2f}] s  largest difference {row['largest_difference']:.1e}"
            )
    save(given.output.with_suffix(".json"), {"settings": settings, "savings": plain.SAVINGS, "measurements": found})
    bars(
        given.output.with_suffix(".png"),
        {
            f"batch {one['batch']}": {name: row["images_per_second"] for name, row in one["rows"].items()}
            for one in found
        },
        "images/s",
        f"xAR, {given.size} size, {given.steps} steps an entity, guidance {given.guidance_scale}",
    )


if __name__ == "__main__":
    main()
