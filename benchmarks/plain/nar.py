"""NAR's sampler as described by its authors (arXiv 2503.10696, section 3), on the weights of our model.

Letters: B images, R rows (2 B with guidance), T condition tokens, N image tokens, Q tokens of a diagonal, V codes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.plain.blocks import Slots, choose, condition_rows, guide
from vistok.generators.nar import NAR
from vistok.nn.sampling import Generators
from vistok.nn.text import TextCondition

__all__ = ["generate"]


def proximity_order(grid: tuple[int, int], total: int, device: torch.device) -> Tensor:
    """bool [L, L] in raster order: image tokens see the condition and all that is no farther from the corner."""
    rows, cols = grid
    cell = torch.arange(rows * cols, device=device)
    distance = cell // cols + cell % cols
    order = torch.ones(total + len(cell), total + len(cell), dtype=torch.bool, device=device).tril()
    order[total:, total:] = distance[None] <= distance[:, None]
    return order


def mixed_logits(
    model: NAR, horizontal: Tensor, vertical: Tensor, cells: list[tuple[int, int]], previous: list[tuple[int, int]]
) -> Tensor:
    """Logits [R, Q, V] of `cells`: both heads on all that was fed (`previous`), then averaged where both exist."""
    right = functional.linear(horizontal.float(), model.output.weight.float())
    below = functional.linear(vertical.float(), model.vertical_output.weight.float())
    if not previous:
        return (right + below) / 2
    place = {cell: index for index, cell in enumerate(previous)}
    logits = []
    for row, col in cells:
        left, above = place.get((row, col - 1)), place.get((row - 1, col))
        if left is None:
            logits.append(below[:, above])
        elif above is None:
            logits.append(right[:, left])
        else:
            logits.append((right[:, left] + below[:, above]) / 2)
    return torch.stack(logits, dim=1)


def mixed_features(
    horizontal: Tensor, vertical: Tensor, cells: list[tuple[int, int]], previous: list[tuple[int, int]]
) -> Tensor:
    """The same mix [R, Q, 2 D] on the inputs of the heads."""
    if not previous:
        return torch.cat([horizontal, vertical], dim=-1) / 2
    place = {cell: index for index, cell in enumerate(previous)}
    left = [place.get((row, col - 1)) for row, col in cells]
    above = [place.get((row - 1, col)) for row, col in cells]
    shares = [[1.0, 0.0] if up is None else [0.0, 1.0] if side is None else [0.5, 0.5] for side, up in zip(left, above)]
    weights = horizontal.new_tensor(shares)
    sides = [horizontal[:, [index or 0 for index in left]], vertical[:, [index or 0 for index in above]]]
    return torch.cat([side * weights[:, index, None] for index, side in enumerate(sides)], dim=-1)


@torch.no_grad()
def generate(
    model: NAR,
    condition: Tensor | TextCondition,
    *,
    guidance_scale: float = 1.0,
    guidance_interval: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: Generators = None,
    grid: tuple[int, int] | None = None,
    savings: Collection[str] = (),
) -> Tensor:
    """Tokens int64 [B, N] in raster order; arguments as in `NAR.sample`, and the `SAVINGS` to make."""
    grid = model.grid if grid is None else grid
    (rows, cols), batch, total = grid, len(condition), model.num_condition_tokens
    guided = guidance_scale > 1
    device = model.tok_embeddings.weight.device
    diagonals = [
        [(row, distance - row) for row in range(rows) if 0 <= distance - row < cols]
        for distance in range(rows + cols - 1)
    ]
    raster = torch.tensor([row * cols + col for cells in diagonals for row, col in cells])
    slot_of = torch.arange(total + rows * cols)
    order, rotation = proximity_order(grid, total, device), model.rotation_table(grid)
    if "prefix" in savings:  # slots in decoding order
        sequence = torch.cat([torch.arange(total), raster + total])
        order, rotation = order[sequence][:, sequence], rotation[sequence]
        slot_of[sequence] = torch.arange(len(sequence))
    x = condition_rows(model, condition, guided)
    slots = Slots(model, condition, len(x), order, rotation, prefix="prefix" in savings)
    outputs = slots.run(x, torch.arange(total))
    ids = torch.zeros(batch, rows * cols, dtype=torch.int64, device=device)
    weight = torch.cat([model.output.weight, model.vertical_output.weight], dim=1).float()
    previous: list[tuple[int, int]] = []
    for distance, cells in enumerate(diagonals):
        written = sum(len(earlier) for earlier in diagonals[:distance])
        on = guided and (distance == 0 or guidance_interval is None or written <= guidance_interval)
        if "null" in savings and not on and len(outputs[0]) > batch:
            outputs = [output[:batch] for output in outputs]
            slots.keep(batch)
        fed = len(previous) or 1
        horizontal = model.norm(outputs[model.num_backbone_layers - 1])[:, -fed:]
        vertical = model.vertical_norm(outputs[-1])[:, -fed:]
        if "heads" in savings:
            features = mixed_features(horizontal.float(), vertical.float(), cells, previous)
            logits = functional.linear(guide(features, batch, guidance_scale, on), weight)
        else:
            every = mixed_logits(model, horizontal, vertical, cells, previous)
            logits = guide(every, batch, guidance_scale, on)
        chosen = choose(logits, savings, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        places = torch.tensor([row * cols + col for row, col in cells])
        ids[:, places] = chosen
        if distance + 1 < len(diagonals):
            x = model.tok_embeddings(chosen.repeat(len(outputs[0]) // batch, 1))
            outputs = slots.run(x, slot_of[places + total])
        previous = cells
    return ids
