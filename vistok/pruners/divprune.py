"""DivPrune: keep the most diverse visual tokens, by greedy max-min distance.

Saeed Ranjbar Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv
2503.02175. Distances are one minus the cosine of the projected tokens. The first pick is the token farthest from its
nearest neighbour; each further pick is the one farthest from those picked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vistok.pruners.pruner import Pruner
from vistok.pruners.stages import Context, Positions, Stage, check_ratio

__all__ = ["DivPrune", "diverse_tokens"]

_DISTANCES_AT_ONCE = 1 << 22  # 16 MiB of float32


def diverse_tokens(features: Tensor, count: int) -> Tensor:
    """int64 [count]: tokens in the order of picking (paper algorithm 1).

    One vector of distances to the picked set is kept up to date. The first pick needs all distances; where they fit (up
    to 2,048 tokens), they are kept, and a pick reads one row of them. Otherwise a pick computes its row anew, O(N D).

    Args:
        features: [N, D].
        count: from 1 to N.
    """
    unit = functional.normalize(features.float(), dim=-1)
    total = unit.shape[0]
    count = min(count, total)
    if total == 1:
        return torch.zeros(count, dtype=torch.int64, device=features.device)
    nearest, kept = [], None
    for rows in unit.split(max(1, _DISTANCES_AT_ONCE // total)):
        distances = 1 - rows @ unit.T
        nearest.append(distances.topk(2, dim=1, largest=False).values[:, 1])
        kept = distances if len(distances) == total else None
    order = [torch.cat(nearest).argmax()]
    distance = torch.full((total,), float("inf"), device=features.device)
    for _ in range(count - 1):
        picked = order[-1]
        row = kept.index_select(0, picked[None])[0] if kept is not None else 1 - unit @ unit[picked]
        distance = torch.minimum(distance, row)
        distance[picked] = float("-inf")
        order.append(distance.argmax())
    return torch.stack(order)


class DivPrune(Pruner):
    """DivPrune on any supported model.

    Args:
        keep_ratio: `int(round(keep_ratio * N))` tokens of every image stay, at least one.

    Raises:
        InvalidInputError: for a ratio outside (0, 1].
    """

    def __init__(self, keep_ratio: float = 0.25, *, positions: Positions = "auto") -> None:
        check_ratio("keep_ratio", keep_ratio)

        def count(now: int, first: int) -> int:
            return max(1, round(keep_ratio * now))

        def select(scores: list[Tensor], context: Context) -> list[Tensor]:
            return [
                diverse_tokens(context.features(span), count(len(span), len(span))).sort().values
                for span in context.spans
            ]

        super().__init__([Stage("embeddings", select, positions=positions, name="DivPrune", count=count)])
