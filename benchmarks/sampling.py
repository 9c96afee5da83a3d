"""Token sampling of NAR and LlamaGen: tokens/s of vistok's samplers against plain ones, and what each saving is worth.

    python -m benchmarks.sampling [--system nar llamagen] [--size lab|b] [--batch 1 16] [--repeats 5]

Every variant draws the same noise from the same weights, so the tokens must agree (up to ties of rounding); the share
that does is part of the result. The variants take turns, so that a busy machine slows all alike. Timings do not depend
on what the weights are: they are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain import llamagen as plain_llamagen
from benchmarks.plain import nar as plain_nar
from benchmarks.plain.blocks import SAVINGS
from benchmarks.timing import bars, interleaved, save, summary
from vistok.generators import NAR, LlamaGen

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, dict[str, Any]] = {
    "lab": {"vocab_size": 1024, "hidden_size": 144, "num_layers": 6, "num_heads": 4, "multiple_of": 32, "grid": (8, 8)},
    "b": {"vocab_size": 16384, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "grid": (16, 16)},
}
PLAIN: dict[str, Callable[..., Tensor]] = {"nar": plain_nar.generate, "llamagen": plain_llamagen.generate}


def build(system: str, size: str) -> Any:
    """A random network in eval mode; NAR counts its extra block as one of the layers of the lab size."""
    shape = dict(SIZES[size], num_classes=64 if size == "lab" else 1000)
    if system == "nar" and size == "lab":
        shape["num_layers"] -= 1
    torch.manual_seed(0)
    model = (NAR if system == "nar" else LlamaGen)(**shape).eval()
    with torch.no_grad():  # the heads start at zero, which would make every token a tie
        for name, parameter in model.named_parameters():
            if name.endswith("output.weight"):
                parameter.normal_(std=0.05)
    return model


def measure(system: str, size: str, batch: int, repeats: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every variant of one system at one batch size."""
    model = build(system, size)
    labels = torch.arange(batch) % model.num_classes
    tokens = model.grid[0] * model.grid[1]

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    def plain(savings: Sequence[str]) -> Tensor:
        return PLAIN[system](model, labels, generator=draws(), savings=savings, **settings)

    variants: dict[str, Callable[[], Tensor]] = {"plain": lambda: plain(())}
    for name in SAVINGS:
        variants[f"plain + {name}"] = lambda name=name: plain((name,))
    variants["plain + all"] = lambda: plain(tuple(SAVINGS))
    variants["vistok"] = lambda: model.generate(labels, generator=draws(), **settings).ids
    expected = variants["plain"]()
    agreement = {name: float((run() == expected).float().mean()) for name, run in variants.items()}
    seconds = interleaved(variants, repeats)
    rows = {
        name: {**summary(times), "tokens_per_second": batch * tokens / summary(times)["median"], "same_tokens": same}
        for (name, times), same in zip(seconds.items(), agreement.values())
    }
    for row in rows.values():
        row["times_plain"] = rows["plain"]["median"] / row["median"]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"system": system, "size": size, "batch": batch, "tokens": tokens, "parameters": parameters, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", nargs="+", choices=list(PLAIN), default=list(PLAIN))
    parser.add_argument("--size", choices=list(SIZES), default="lab")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--guidance-interval", type=int, help="default: half of the tokens, so that guidance ends")
    parser.add_argument("--top-k", type=int, help="default: an eighth of the codebook, the published demos' share")
    parser.add_argument("--output", type=Path, default=RESULTS / "sampling")
    given = parser.parse_args(arguments)
    rows, cols = SIZES[given.size]["grid"]
    settings = {
        "guidance_scale": given.guidance_scale,
        "guidance_interval": rows * cols // 2 if given.guidance_interval is None else given.guidance_interval,
        "top_k": SIZES[given.size]["vocab_size"] // 8 if given.top_k is None else given.top_k,
    }
    found = []
    for system in given.system:
        for batch in given.batch:
            found.append(measure(system, given.size, batch, given.repeats, settings))
            title = f"{system}, {found[-1]['parameters']:,} parameters, batch {batch}"
            print(f"\n{title}")
            for name, row in found[-1]["rows"].items():
                print(
                    f"  {name:<16} {row['tokens_per_second']:>9.0f} tokens/s  {row['times_plain']:>5.2f}x plain  "
                    f"[{1000 * row['least']:.0f}, {1000 * row['most']:.0f}] ms  "
                    f"{100 * row['same_tokens']:.1f} % same tokens"
                )
    save(given.output.with_suffix(".json"), {"settings": settings, "savings": SAVINGS, "measurements": found})
    bars(
        given.output.with_suffix(".png"),
        {
            f"{one['system']}, batch {one['batch']}": {
                name: row["tokens_per_second"] for name, row in one["rows"].items()
            }
            for one in found
        },
        "tokens/s",
        f"{given.size} size, guidance {settings['guidance_scale']} for the first {settings['guidance_interval']} "
        f"tokens, top-k {settings['top_k']}",
    )


if __name__ == "__main__":
    main()
