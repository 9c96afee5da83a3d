"""The TokenPacker projector: milliseconds a picture against the algorithm without savings.

    python -m benchmarks.tokenpacker [--size published lab] [--batch 1 4] [--repeats 5] [--dtype float32]

`plain` joins the four levels, runs separate key and value MLPs, interpolates the whole map and gives every cell to
PyTorch's multi-head attention (`benchmarks/plain/tokenpacker.py`). `vistok, training` is our forward with gradients,
`vistok` the folded one of inference. All three give the same tokens up to rounding; the largest difference is part of
the result. Random weights and features: the time does not depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain.tokenpacker import project
from benchmarks.sampling import RESULTS
from benchmarks.timing import bars, interleaved, save, summary
from vistok.tokenizers.tokenpacker import TokenPacker

# Sizes: of TokenPacker-7B, and of the lab's model.
SIZES: dict[str, dict[str, Any]] = {
    "published": {},
    "lab": {
        "hidden_size": 128,
        "grid_size": 16,
        "feature_dim": 128,
        "feature_levels": (2, 3, 4),
        "embed_dim": 96,
        "num_heads": 4,
    },
}
SCALES = {"published": (2, 3, 4), "lab": (2, 4)}


def levels_of(packer: TokenPacker, batch: int) -> list[Tensor]:
    """Random hidden states [B, N, C], one a level."""
    config = packer.config
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config.grid_size**2, config.feature_dim)
    return [torch.randn(shape, generator=generator).to(packer.dtype) for _ in config.feature_levels]


def measure(packer: TokenPacker, batch: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds a picture of every variant, and how far its tokens are from the plain ones."""
    levels = levels_of(packer, batch)

    @torch.no_grad()
    def plain() -> Tensor:
        return project(packer, levels[-1], torch.cat(levels, dim=-1))

    @torch.no_grad()
    def ours() -> Tensor:
        return packer(levels)

    def training() -> Tensor:
        return packer(levels).detach()

    variants = {"plain": plain, "vistok, training": training, "vistok": ours}
    expected = plain().float()
    found = {}
    for name, seconds in interleaved(variants, repeats).items():
        times = {key: 1000 * value / batch for key, value in summary(seconds).items()}
        largest = float((variants[name]().float() - expected).abs().max() / expected.abs().max())
        found[name] = {**times, "relative_difference": largest}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, default=RESULTS / "tokenpacker")
    given = parser.parse_args(arguments)
    dtype = getattr(torch, given.dtype)
    rows = []
    for size in given.size:
        for scale in SCALES[size]:
            torch.manual_seed(0)
            packer = TokenPacker(**SIZES[size], scale_factor=scale).to(dtype).eval()
            for batch in given.batch:
                found = measure(packer, batch, given.repeats)
                tokens = packer.num_tokens()
                rows.append({"size": size, "scale_factor": scale, "tokens": tokens, "batch": batch, "rows": found})
                print(f"\n{size} size, s = {scale} ({tokens} tokens), batch {batch}, {given.dtype}")
                for name, row in found.items():
                    print(
                        f"  {name:<18} {row['median']:>9.2f} ms a picture [{row['least']:.2f}, {row['most']:.2f}]  "
                        f"{found['plain']['median'] / row['median']:.2f}x  largest difference "
                        f"{row['relative_difference']:.1e}"
                    )
    save(given.output.with_suffix(".json"), {"dtype": given.dtype, "measurements": rows})
    bars(
        given.output.with_suffix(".png"),
        {
            f"{one['size']}, s = {one['scale_factor']}, batch {one['batch']}": {
                name: row["median"] for name, row in one["rows"].items()
            }
            for one in rows
            if one["batch"] == max(given.batch)
        },
        "ms a picture",
        f"TokenPacker projector, {given.dtype}",
    )


if __name__ == "__main__":
    main()
