"""Training steps (forward, backward, AdamW) of NAR, LlamaGen and the VQ tokenizer: samples/s.

    python -m benchmarks.training [--system nar llamagen vq] [--batch 32] [--repeats 5]

NAR is compared with the plain objective: raster order under a dense mask, both heads on every position, logits
averaged. vistok sorts the tokens by diagonal, and mixes the inputs of the heads before one product over the rows that
are needed. Both give the same loss, which is part of the result. LlamaGen is compared with an explicit causal mask, the
tokenizer with contiguous instead of channels-last convolutions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.plain.nar import proximity_order
from benchmarks.sampling import RESULTS, build
from benchmarks.timing import bars, interleaved, save, summary
from vistok.generators import NAR, LlamaGen
from vistok.tokenizers import VQModel
from vistok.training import load_recipe

Loss = Callable[[], Tensor]
VQ_RECIPE = Path(__file__).parent.parent / "recipes" / "vq-shapes.yaml"


def plain_nar_loss(model: NAR, ids: Tensor, labels: Tensor) -> Tensor:
    """NAR's objective as its authors describe it: `ids` int64 [B, N] in raster order, `labels` int64 [B]."""
    (rows, cols), total = model.grid, model.num_condition_tokens
    x = torch.cat([model.cls_embedding(labels, None), model.tok_embeddings(ids)], dim=1)
    order = proximity_order(model.grid, total, ids.device)
    horizontal, vertical = model.hidden_states(x, model.rotation_table(model.grid), order, False, None)
    right = functional.linear(horizontal, model.output.weight).float()
    below = functional.linear(vertical, model.vertical_output.weight).float()
    first = (right[:, total - 1] + below[:, total - 1]) / 2
    right = right[:, total:].unflatten(1, (rows, cols))
    below = below[:, total:].unflatten(1, (rows, cols))
    mixed = torch.empty_like(right)
    mixed[:, 0, 0] = first
    mixed[:, 0, 1:] = right[:, 0, :-1]
    mixed[:, 1:, 0] = below[:, :-1, 0]
    mixed[:, 1:, 1:] = (right[:, 1:, :-1] + below[:, :-1, 1:]) / 2
    return functional.cross_entropy(mixed.flatten(0, 2), ids.flatten())


def plain_llamagen_loss(model: LlamaGen, ids: Tensor, labels: Tensor) -> Tensor:
    """LlamaGen's objective with its mask written out."""
    x = torch.cat([model.cls_embedding(labels, None), model.tok_embeddings(ids[:, :-1])], dim=1)
    order = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=ids.device).tril()
    (hidden,) = model.hidden_states(x, model.rotation_table(model.grid)[: x.shape[1]], order, False, None)
    logits = functional.linear(hidden[:, model.num_condition_tokens - 1 :], model.output.weight).float()
    return functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


def step(model: nn.Module, loss: Loss) -> Callable[[], float]:
    """One optimiser step on fixed data; returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def run() -> float:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.item()

    return run


def variants_of(system: str, size: str, batch: int) -> dict[str, Callable[[], float]]:
    """The steps to compare."""
    torch.manual_seed(0)
    if system == "vq":
        recipe = load_recipe(VQ_RECIPE)
        images = torch.rand(batch, 3, 64, 64) * 2 - 1
        steps = {}
        for name, layout in (("plain", torch.contiguous_format), ("vistok", torch.channels_last)):
            torch.manual_seed(0)
            model = VQModel(**recipe.model.config).train().to(memory_format=layout)
            data = {"images": images.contiguous(memory_format=layout)}
            steps[name] = step(model, lambda model=model, data=data: model.training_loss(data)["loss"])
        return steps
    model = build(system, size)  # in eval mode, so that no dropout tells the two apart
    ids = torch.randint(model.vocab_size, (batch, model.grid[0] * model.grid[1]))
    labels = torch.arange(batch) % model.num_classes
    plain = plain_nar_loss if system == "nar" else plain_llamagen_loss
    return {
        "plain": step(model, lambda: plain(model, ids, labels)),
        "vistok": step(model, lambda: model.training_loss({"ids": ids, "labels": labels})["loss"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", nargs="+", choices=("nar", "llamagen", "vq"), default=["nar", "llamagen", "vq"])
    parser.add_argument("--size", choices=("lab", "b"), default="lab")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "training")
    given = parser.parse_args(arguments)
    found: dict[str, dict[str, Any]] = {}
    for system in given.system:
        variants = variants_of(system, given.size, given.batch)
        losses = {name: run() for name, run in variants.items()}
        seconds = interleaved(variants, given.repeats)
        found[system] = {
            name: {**summary(times), "samples_per_second": given.batch / summary(times)["median"], "loss": losses[name]}
            for name, times in seconds.items()
        }
        print(f"\n{system}, batch {given.batch}")
        for name, row in found[system].items():
            print(
                f"  {name:<8} {1000 * row['median']:>8.1f} ms a step [{1000 * row['least']:.1f}, "
                f"{1000 * row['most']:.1f}]  {row['samples_per_second']:>7.1f} samples/s  loss {row['loss']:.6f}"
            )
    save(given.output.with_suffix(".json"), {"size": given.size, "batch": given.batch, "measurements": found})
    bars(
        given.output.with_suffix(".png"),
        {system: {name: row["samples_per_second"] for name, row in rows.items()} for system, rows in found.items()},
        "samples/s",
        f"training step: forward, backward, AdamW; {given.size} size, batch {given.batch}",
    )


if __name__ == "__main__":
    main()
