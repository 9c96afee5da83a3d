"""Random pruning: the baseline that every method has to beat, and that public benchmarks find surprisingly strong."""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.pruners.pruner import Pruner
from vistok.pruners.stages import Context, Positions, Stage, check_ratio

__all__ = ["RandomPruner", "random_tokens"]


def random_tokens(count: int, kept: int, seed: int) -> Tensor:
    """int64 [kept], ascending: the start of a seeded permutation of `count` tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:kept].sort().values


class RandomPruner(Pruner):
    """Keep `round(N * keep_ratio)` random tokens of every image.

    Args:
        keep_ratio: in (0, 1].
        seed: the k-th image of a sample always gets the same draw, so beams agree and runs repeat.
        layer: prune before this decoder layer; None: before the language model.

    Raises:
        InvalidInputError: for a ratio outside (0, 1].
    """

    def __init__(
        self, keep_ratio: float = 0.25, *, seed: int = 0, layer: int | None = None, positions: Positions = "auto"
    ) -> None:
        check_ratio("keep_ratio", keep_ratio)

        def count(now: int, first: int) -> int:
            return max(1, now - round(now * (1 - keep_ratio)))

        def select(scores: list[Tensor], context: Context) -> list[Tensor]:
            kept, seen = [], dict.fromkeys((span.sample for span in context.spans), 0)
            for span in context.spans:
                number = seen[span.sample]
                seen[span.sample] += 1
                chosen = random_tokens(len(span), count(len(span), len(span)), seed + 7919 * number)
                kept.append(chosen.to(span.index.device))
            return kept

        place = "embeddings" if layer is None else "decoder"
        super().__init__(
            [Stage(place, select, layer=layer, positions=positions, name="random", count=count)]  # type: ignore[arg-type]
        )
