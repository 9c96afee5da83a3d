"""The VQ tokenizer: encoded and decoded images/s.

    python -m benchmarks.tokenizer [--model vq-shapes] [--image-size 64 256] [--batch 1 16] [--repeats 5]

Compared are the reference kernels (the whole distance matrix), the automatic ones, channels-last convolutions and
bfloat16. All should give the same ids up to rounding; the share that agrees is part of the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.sampling import RESULTS
from benchmarks.timing import bars, interleaved, save, summary
from vistok import kernels
from vistok.data.shapes import sample_scene
from vistok.hub import load
from vistok.metrics.evaluate import held_out_images
from vistok.tokens import VisualTokens


def under(backend: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with another kernel backend."""

    def wrapped() -> Any:
        with kernels.use(backend):
            return run()

    return wrapped


@torch.no_grad()
def measure(model: Any, images: Tensor, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of every variant of encoding and decoding."""
    last = torch.channels_last
    half = type(model).from_config(model.config)
    half.load_state_dict(model.state_dict())
    half = half.eval().to(torch.bfloat16)
    layout = type(model).from_config(model.config)
    layout.load_state_dict(model.state_dict())
    layout = layout.eval().to(memory_format=last)
    tokens: VisualTokens = model.encode(images)
    arranged, narrow = images.contiguous(memory_format=last), images.bfloat16()
    encoders = {
        "reference": under("reference", lambda: model.encode(images)),
        "vistok": lambda: model.encode(images),
        "vistok, channels last": lambda: layout.encode(arranged),
        "vistok, bfloat16": lambda: half.encode(narrow),
    }
    decoders = {
        "vistok": lambda: model.decode(tokens),
        "vistok, channels last": lambda: layout.decode(tokens),
        "vistok, bfloat16": lambda: half.decode(tokens),
    }
    found: dict[str, dict[str, Any]] = {}
    for task, variants in (("encode", encoders), ("decode", decoders)):
        found[task] = {}
        for name, times in interleaved(variants, repeats).items():
            row = {**summary(times), "images_per_second": len(images) / summary(times)["median"]}
            if task == "encode":
                row["same_ids"] = float((variants[name]().ids == tokens.ids).float().mean())
            found[task][name] = row
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vq-shapes", help="shipped name, folder or vq.tiny")
    parser.add_argument("--image-size", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "tokenizer")
    given = parser.parse_args(arguments)
    model = load(given.model)
    found = []
    for size in given.image_size:
        for batch in given.batch:
            images = held_out_images([sample_scene(0, index) for index in range(batch)], size)
            rows = measure(model, images, given.repeats)
            found.append({"image_size": size, "batch": batch, "rows": rows})
            print(f"\n{given.model}, {size}x{size}, batch {batch}")
            for task, variants in rows.items():
                for name, row in variants.items():
                    same = f"  {100 * row['same_ids']:.1f} % same ids" if "same_ids" in row else ""
                    print(
                        f"  {task} {name:<22} {row['images_per_second']:>8.1f} images/s "
                        f"[{1000 * row['least']:.1f}, {1000 * row['most']:.1f}] ms{same}"
                    )
    save(given.output.with_suffix(".json"), {"model": given.model, "measurements": found})
    bars(
        given.output.with_suffix(".png"),
        {
            f"{task}, {one['image_size']}x{one['image_size']}, batch {one['batch']}": {
                name: row["images_per_second"] for name, row in one["rows"][task].items()
            }
            for task in ("encode", "decode")
            for one in found
            if one["batch"] == max(given.batch)
        },
        "images/s",
        f"{given.model}",
    )


if __name__ == "__main__":
    main()
