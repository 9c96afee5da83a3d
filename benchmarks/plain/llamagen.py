"""LlamaGen's sampler as described by its authors (arXiv 2406.06525, section 2), on the weights of our model.

Letters: B images, R rows (2 B with guidance), T condition tokens, N image tokens, V codes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.plain.blocks import Slots, choose, condition_rows, guide
from vistok.generators.llamagen import LlamaGen
from vistok.nn.sampling import Generators
from vistok.nn.text import TextCondition

__all__ = ["generate"]


@torch.no_grad()
def generate(
    model: LlamaGen,
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
    """Tokens int64 [B, N] in raster order; arguments as in `LlamaGen.sample`, and the `SAVINGS` to make."""
    grid = model.grid if grid is None else grid
    batch, size, total = len(condition), grid[0] * grid[1], model.num_condition_tokens
    guided = guidance_scale > 1
    device = model.tok_embeddings.weight.device
    x = condition_rows(model, condition, guided)
    order = torch.ones(total + size, total + size, dtype=torch.bool, device=device).tril()
    slots = Slots(model, condition, len(x), order, model.rotation_table(grid), prefix="prefix" in savings)
    hidden = model.norm(slots.run(x, torch.arange(total, device=device))[-1])[:, -1:]
    ids = []
    for position in range(size):
        on = guided and (guidance_interval is None or position - 1 <= guidance_interval)
        if "null" in savings and not on and len(hidden) > batch:
            hidden = hidden[:batch]
            slots.keep(batch)
        if "heads" in savings:
            logits = functional.linear(guide(hidden.float(), batch, guidance_scale, on), model.output.weight.float())
        else:
            every = functional.linear(hidden.float(), model.output.weight.float())
            logits = guide(every, batch, guidance_scale, on)
        ids.append(choose(logits, savings, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator))
        if position + 1 < size:
            x = model.tok_embeddings(ids[-1].repeat(len(hidden) // batch, 1))
            hidden = model.norm(slots.run(x, torch.tensor([total + position], device=device))[-1])
    return torch.cat(ids, dim=1)
