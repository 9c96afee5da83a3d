"""NAR's video sampler as described by its authors (arXiv 2503.10696, section 3), on the weights of our model.

Every step runs the whole sequence in raster order under the dense mask; heads are mixed and guidance acts on logits,
token by token. Letters: B videos, R rows (2 B with guidance), L positions, Q tokens of a plane, V codes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.plain.blocks import choose, guide
from vistok.generators.nar_video import NARVideo
from vistok.nn.sampling import Generators

__all__ = ["generate"]

Cell = tuple[int, int, int]


def visible(cells: list[Cell], total: int) -> Tensor:
    """bool [L, L]: all see the condition; tokens of the grid see what is no farther from the corner."""
    distance = torch.tensor([sum(cell) for cell in cells])
    mask = torch.zeros(total + len(cells), total + len(cells), dtype=torch.bool)
    mask[:total, :total] = torch.ones(total, total, dtype=torch.bool).tril()
    mask[total:, :total] = True
    mask[total:, total:] = distance[None] <= distance[:, None]
    return mask


def mixed_logits(model: NARVideo, states: list[Tensor], cells: list[Cell], place: dict[Cell, int]) -> Tensor:
    """Logits [R, Q, V] of `cells`: the mean of the heads at those neighbours that exist."""
    norms = (model.norm, model.vertical_norm, model.temporal_norm)
    logits = [
        functional.linear(norm(state).float(), head.weight.float())
        for norm, state, head in zip(norms, states, model.heads, strict=True)
    ]
    mixed = []
    for frame, row, col in cells:
        neighbours = ((frame, row, col - 1), (frame, row - 1, col), (frame - 1, row, col))
        heard = [part[:, place[cell]] for part, cell in zip(logits, neighbours, strict=True) if cell in place]
        if not heard:  # the first token: all heads at the last condition position
            heard = [part[:, model.num_condition_tokens - 1] for part in logits]
        mixed.append(torch.stack(heard).mean(0))
    return torch.stack(mixed, dim=1)


@torch.no_grad()
def generate(
    model: NARVideo,
    condition: Tensor,
    *,
    guidance_scale: float = 1.0,
    guidance_interval: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: Generators = None,
) -> Tensor:
    """Tokens int64 [B, N] in raster order; arguments as in `NARVideo.sample`."""
    frames, rows, cols = model.grid
    cells = list(itertools.product(range(frames), range(rows), range(cols)))
    total, batch, guided = model.num_condition_tokens, len(condition), guidance_scale > 1
    place = {cell: total + index for index, cell in enumerate(cells)}
    mask = visible(cells, total)
    if guided:
        condition = torch.cat([condition, torch.full_like(condition, -1)])
    ids = torch.zeros(batch, len(cells), dtype=torch.int64)
    written = 0
    for distance in range(frames + rows + cols - 2):
        plane = [cell for cell in cells if sum(cell) == distance]
        x = torch.cat([model.embed_condition(condition), model.tok_embeddings(ids.repeat(1 + guided, 1))], dim=1)
        x = x + model.position_embedding[:, : x.shape[1]]
        outputs = []
        for layer in model.layers:
            x = layer(x, None, mask)
            outputs.append(x)
        on = guided and (distance == 0 or guidance_interval is None or written <= guidance_interval)
        logits = guide(mixed_logits(model, outputs[-3:], plane, place), batch, guidance_scale, on)
        chosen = choose(logits, (), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        for index, cell in enumerate(plane):
            ids[:, place[cell] - total] = chosen[:, index]
        written += len(plane)
    return ids
