"""The fused ops against what one would write without them.

    python -m benchmarks.kernels [--op nearest_code guided_sampling] [--repeats 7] [--compile] [--quick]

Nearest code: `cdist` + argmin, and the three-term distance of most tokenizers' code. Guided sampling: guidance, top-k,
sorted top-p, softmax and the race, step by step. All rows of a case run on the same data in turn; the share of ids that
agrees with the first row is part of the result. Printed is the least of the wall-clock times, median and most in
brackets: on a busy machine only the least says something about the code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import bars, interleaved, save, summary
from vistok import kernels

RESULTS = Path(__file__).parent / "results"
CODES = {"VQ-16, 4 images": (1024, 16384, 8), "8192 x 32": (1024, 8192, 32), "16384 x 256": (256, 16384, 256)}
SAMPLES = {
    "top-k 2000": {"top_k": 2000},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 2000, top-p 0.9": {"top_k": 2000, "top_p": 0.9},
    "no filter": {},
}


def under(backend: str, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` with another kernel backend."""

    def wrapped() -> Tensor:
        with kernels.use(backend):
            return run()

    return wrapped


def three_terms(x: Tensor, codebook: Tensor) -> Tensor:
    """`|x|^2 + |c|^2 - 2 x . c` `[N, K]`, then the argmin."""
    distances = x.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1) - 2 * x @ codebook.t()
    return distances.argmin(dim=1)


def nearest_variants(shape: tuple[int, int, int], device: str, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Ways to find the nearest of K codes for N features of D channels."""
    rows, codes, channels = shape
    x, codebook = torch.randn(rows, channels, device=device), torch.randn(codes, channels, device=device)
    found: dict[str, Callable[[], Tensor]] = {
        "cdist + argmin": lambda: torch.cdist(x, codebook).argmin(dim=1),
        "three terms": lambda: three_terms(x, codebook),
        "vistok": lambda: kernels.nearest_code(x, codebook),
    }
    if compiled and channels <= 32:
        found["vistok, compile"] = under("compile", found["vistok"])
    return found


def sampling_variants(
    shape: tuple[int, int], options: dict[str, Any], device: str, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """Ways to sample one token for each of R rows of V logits."""
    logits, uncond = 2 * torch.randn(2, *shape, device=device)
    noise = torch.empty(shape, device=device).exponential_()
    settings = {"uncond_logits": uncond, "guidance_scale": 2.0, **options}
    found: dict[str, Callable[[], Tensor]] = {"vistok": lambda: kernels.guided_sampling(logits, noise, **settings)}
    found = {"plain, sorted": under("reference", found["vistok"]), **found}
    if compiled:
        found["vistok, compile"] = under("compile", found["vistok"])
    return found


def measure(variants: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of every variant, and the share of its ids that equal the first one's."""
    expected = next(iter(variants.values()))()
    found = {}
    for name, seconds in interleaved(variants, repeats).items():
        found[name] = {key: 1000 * value for key, value in summary(seconds).items()}
        found[name]["same_ids"] = float((variants[name]() == expected).float().mean())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=["nearest_code", "guided_sampling"])
    parser.add_argument("--rows", type=int, default=16, help="rows of logits")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--compile", action="store_true", help="also the compile backend (needs a C++ compiler on a CPU)"
    )
    parser.add_argument("--quick", action="store_true", help="shapes 16 times smaller")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shrink = 16 if given.quick else 1
    found: dict[str, dict[str, dict[str, float]]] = {}
    for op in given.op or ["nearest_code", "guided_sampling"]:
        if op == "nearest_code":
            for title, (rows, codes, channels) in CODES.items():
                shape = (rows // shrink, codes // shrink, channels)
                found[f"{op}: {title}"] = measure(nearest_variants(shape, device, given.compile), given.repeats)
        else:
            for title, options in SAMPLES.items():
                variants = sampling_variants((given.rows, 16384 // shrink), options, device, given.compile)
                found[f"{op}: {title}"] = measure(variants, given.repeats)
    for title, rows_of in found.items():
        print(f"\n{title}")
        first = next(iter(rows_of.values()))["least"]
        for name, row in rows_of.items():
            print(
                f"  {name:<18} {row['least']:>9.2f} ms  {first / row['least']:>5.2f}x  "
                f"[{row['median']:.2f}, {row['most']:.2f}] ms  {100 * row['same_ids']:.1f} % same ids"
            )
    save(given.output.with_suffix(".json"), {"unit": "ms", "measurements": found})
    least = {title: {name: row["least"] for name, row in rows.items()} for title, rows in found.items()}
    bars(given.output.with_suffix(".png"), least, "ms", "fused ops, the least of interleaved runs")


if __name__ == "__main__":
    main()
