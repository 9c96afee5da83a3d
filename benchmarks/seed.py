"""SEED: pictures to codes, codes to image embeddings and painting, against the plain way.

    python -m benchmarks.seed [--size published] [--layers 2] [--batch 1 8] [--repeats 3] [--clock cpu]

Random weights. `published` is SEED-2's width everywhere; `--layers` cuts the vision transformer short, which is the
same work in both ways but for its attention. Painting goes through a small unCLIP pipeline: what is measured is the
work around the denoiser that need not be done at every step. All variants give the same codes, embeddings and pictures
up to rounding; the greatest difference is part of the result. `--clock cpu` counts processor seconds (busy machines).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain import seed as plain
from benchmarks.sampling import RESULTS
from benchmarks.timing import bars, interleaved, save, summary
from vistok.tokenizers import KLModel
from vistok.tokenizers.seed import SEED, UnCLIPDecoder, UnCLIPDenoiser

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
STEPS = 10


def build(size: str, layers: int) -> SEED:
    """A SEED with random weights whose codebook lies among its features."""
    torch.manual_seed(0)
    model = SEED(vision_layers=layers) if size == "published" else SEED.tiny()
    model.eval()
    with torch.no_grad():
        side = model.config.image_size
        z = model.project(model.causal_embeddings(model.normalize(torch.rand(4, 3, side, side) * 2 - 1)))
        model.codebook.copy_(z.flatten(0, 1).mean(0) + torch.randn_like(model.codebook) * z.flatten(0, 1).std(0))
    return model


def difference(one: Tensor, other: Tensor) -> float:
    """Greatest difference, or the share of codes that differ."""
    if one.is_floating_point():
        return float((one - other).abs().max())
    return float((one != other).float().mean())


@torch.no_grad()
def measure(model: SEED, batch: int, repeats: int, clock: str) -> dict[str, dict[str, Any]]:
    """Seconds of both ways for each task."""
    side = model.config.image_size
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels, features = model.normalize(images), model.vision_features(model.normalize(images))
    queries = model.query_tokens.expand(batch, -1, -1)
    ids = model.encode(images).ids
    pipeline = UnCLIPDenoiser.tiny().eval().pipeline(KLModel.tiny())
    decoder = UnCLIPDecoder(pipeline)
    embeds, latents = torch.randn(1, 16), torch.randn(1, 4, 4, 4)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0}

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    tasks: dict[str, dict[str, Callable[[], Tensor]]] = {
        "pictures to codes": {
            "plain": lambda: plain.encode(model, pixels),
            "vistok": lambda: model.encode(images).ids,
        },
        "features to queries": {
            "plain": lambda: plain.qformer(model.qformer, queries, features, model.config.causal),
            "vistok": lambda: model.queried(features),
        },
        "codes to embedding": {
            "plain": lambda: plain.decode_embeddings(model, ids),
            "vistok": lambda: model.decode_embeddings(ids),
        },
        f"painting, {STEPS} steps": {
            "plain": lambda: plain.paint(pipeline, embeds, latents, seeded(), **settings),
            "vistok": lambda: decoder(embeds, latents=latents, generator=seeded(), **settings),
        },
    }
    found: dict[str, dict[str, Any]] = {}
    for task, variants in tasks.items():
        seconds = interleaved(variants, repeats, clock=CLOCKS[clock])
        found[task] = {name: summary(times) for name, times in seconds.items()}
        found[task]["speedup"] = found[task]["plain"]["median"] / found[task]["vistok"]["median"]
        found[task]["difference"] = difference(variants["plain"](), variants["vistok"]())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["published", "tiny"], default="published")
    parser.add_argument("--layers", type=int, default=2, help="of the vision transformer; the published one has 39")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, default=RESULTS / "seed")
    given = parser.parse_args(arguments)
    model = build(given.size, given.layers)
    found = []
    for batch in given.batch:
        rows = measure(model, batch, given.repeats, given.clock)
        found.append({"batch": batch, "rows": rows})
        print(f"\n{given.size}, batch {batch}, {given.clock} seconds")
        for task, row in rows.items():
            plainly, ours = (1000 * row[name]["median"] for name in ("plain", "vistok"))
            print(
                f"  {task:<22} plain {plainly:>9.1f} ms, vistok {ours:>9.1f} ms: {row['speedup']:.2f} times; greatest "
                f"difference {row['difference']:.1e}"
            )
    facts = {"size": given.size, "vision_layers": given.layers, "clock": given.clock, "measurements": found}
    save(given.output.with_suffix(".json"), facts)
    bars(
        given.output.with_suffix(".png"),
        {
            f"{task}, batch {one['batch']}": {name: 1000 * row[name]["median"] for name in ("plain", "vistok")}
            for one in found
            if one["batch"] == max(given.batch)
            for task, row in one["rows"].items()
        },
        f"ms ({given.clock})",
        f"SEED, {given.size} width, {given.layers} layers of the vision transformer, random weights",
    )


if __name__ == "__main__":
    main()
