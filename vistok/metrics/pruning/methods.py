"""Every pruning method at one keep ratio: the share of visual tokens that is left after its last stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.pruners import (
    DivPrune,
    FasterVLM,
    FastV,
    FoPru,
    Pruner,
    PyramidDrop,
    RandomPruner,
    Schedule,
    Settings,
    SparseVLM,
    Stage,
    TransPrune,
    UniformPooling,
    VFlowOpt,
    VisionZip,
)
from vistok.pruners.sparsevlm import SETTINGS
from vistok.pruners.stages import Context, check_ratio, placed_layers
from vistok.pruners.transprune import SCHEDULES
from vistok.pruners.vflowopt import PUBLISHED

__all__ = ["METHODS", "Method", "Target", "check_method", "make_pruner"]


@dataclass(frozen=True)
class Target:
    """What a method is built for.

    Attributes:
        keep_ratio: share of visual tokens after its last stage; None: the authors' own setting.
        depth: decoder layers.
        first: decoder stages act before this layer or later.
        visual: visual tokens of the image.
        view: tokens of one view (tile) of it.
    """

    keep_ratio: float | None
    depth: int
    first: int
    visual: int
    view: int

    def layers(self, wanted: Sequence[int], of: int = 32) -> tuple[int, ...]:
        """Layer numbers of a decoder of `of` layers, moved into this one: distinct, ascending, inside.

        Without a keep ratio they stay as published where the decoder is deep enough.

        Raises:
            InvalidInputError: if there are fewer layers to prune before than stages.
        """
        published = self.keep_ratio is None and wanted[-1] < self.depth
        moved = [layer if published else round(layer * self.depth / of) for layer in wanted]
        return placed_layers(moved, self.depth, self.first)

    def powers(self, ratios: Sequence[float]) -> tuple[float, ...]:
        """Shares of the first tokens, raised to one power so that the last is the keep ratio."""
        if self.keep_ratio is None:
            return tuple(ratios)
        power = math.log(self.keep_ratio) / math.log(ratios[-1])
        return (*(min(1.0, ratio**power) for ratio in ratios[:-1]), self.keep_ratio)


def _transprune(target: Target) -> Pruner:
    high = SCHEDULES["high"]
    prune = target.layers(high.prune)
    begin = min(prune[0], target.layers(high.accumulate[:1])[0])
    return TransPrune(Schedule(tuple(range(begin, prune[-1] + 1)), prune, target.powers(high.ratios)))


def _vflowopt(target: Target) -> Pruner:
    wanted = 0.25 if target.keep_ratio is None else target.keep_ratio
    settings = PUBLISHED[min(PUBLISHED, key=lambda budget: abs(math.log(budget / wanted)))]
    ratios = settings.ratios
    if target.keep_ratio is not None:
        power = math.log(target.keep_ratio) / math.log(math.prod(ratios))
        ratios = tuple(ratio**power for ratio in ratios)
    settings = Settings(ratios, settings.threshold, settings.cell_size, settings.entropy_weight)
    return VFlowOpt(settings, layers=target.layers((9, 18), of=28))


def _fastv(target: Target) -> Pruner:
    return FastV(*_given(target, 0.5), layer=target.layers((2,))[0])


def _pyramiddrop(target: Target) -> Pruner:
    return PyramidDrop(target.layers((8, 16, 24)), target.powers((0.5, 0.25, 0.125)))


def _sparsevlm(target: Target) -> Pruner:
    layers = [layer - 1 for layer in target.layers((3, 7, 16))]  # its own count: layers that have run
    if target.keep_ratio is None:
        return SparseVLM(192, layers=layers)
    counts, now = [], target.visual
    for share in target.powers([count / 576 for count in SETTINGS[128]]):
        # A tenth of the best 30 % of the dropped tokens comes back as clusters, which are part of the share.
        number = round((share * target.visual - 0.03 * now - 1) / 0.97)
        counts.append(max(1, min(number, now - 1)))
        now = max(counts[-1], round(share * target.visual))
    return SparseVLM(counts=counts, layers=layers)


def _visionzip(target: Target) -> Pruner:
    if target.keep_ratio is None and target.view > 64:
        return VisionZip()
    total = min(target.view, max(2, round((target.keep_ratio or 1 / 9) * target.view)))
    contextual = max(1, round(total * 10 / 64))
    return VisionZip(total - contextual, contextual)


def _pooling(target: Target) -> Pruner:
    if target.keep_ratio is None:
        return UniformPooling()
    side = max(2, round(target.view**0.5))
    shares = {stride: (-(-side // stride)) ** 2 / side**2 for stride in range(2, side + 1)}
    stride = min(shares, key=lambda one: abs(math.log(shares[one] / target.keep_ratio)))
    if not 1 / 1.5 <= shares[stride] / target.keep_ratio <= 1.5:
        kept = ", ".join(f"{share:.3g}" for share in dict.fromkeys(shares.values()))
        raise InvalidInputError(
            f"pooling averages whole cells: of {target.view} tokens it can keep the shares {kept}, none of them near "
            f"{target.keep_ratio:g}"
        )
    return UniformPooling(stride)


def _given(target: Target, default: float) -> tuple[float]:
    return (default if target.keep_ratio is None else target.keep_ratio,)


Method = Callable[[Target], Pruner]

METHODS: dict[str, Method] = {
    "transprune": _transprune,
    "fopru": lambda target: FoPru(*_given(target, 0.25)),
    "vflowopt": _vflowopt,
    "fastv": _fastv,
    "pyramiddrop": _pyramiddrop,
    "sparsevlm": _sparsevlm,
    "fastervlm": lambda target: FasterVLM(*_given(target, 0.25)),
    "visionzip": _visionzip,
    "divprune": lambda target: DivPrune(*_given(target, 0.25)),
    "pooling": _pooling,
    "random": lambda target: RandomPruner(*_given(target, 0.25)),
}
"""The methods by name; `make_pruner` joins several with `+`."""

_INSIDE = {"transprune", "fastv", "pyramiddrop", "sparsevlm"}


def _everything(scores: list[Tensor], context: Context) -> list[Tensor]:
    return [torch.arange(len(span), device=span.index.device) for span in context.spans]


def check_method(method: str, own: Mapping[str, Method] | None = None) -> list[str]:
    """The names that a method is made of.

    Raises:
        InvalidInputError: for an unknown name.
    """
    if own and method in own:
        return [method]
    names = [name.strip().lower() for name in method.split("+")]
    for name in names:
        if name not in METHODS:
            known = ", ".join([*METHODS, *(own or ())])
            raise InvalidInputError(f"no pruning method is called {name!r}; there are: {known}")
    return names


def make_pruner(method: str, target: Target, own: Mapping[str, Method] | None = None) -> Pruner:
    """A method, or several joined by `+`, at a keep ratio.

    Of joined methods, those before the language model and those inside the decoder get equal shares of the work: with
    one of each, either keeps the square root of the ratio. At a keep ratio of 1 every method is the unpruned model.

    Args:
        method: `"transprune"` or `"fopru+transprune"`.
        target: keep ratio and sizes of model and image.
        own: pruners by names of one's own, beside `METHODS`; they are not joined.

    Raises:
        InvalidInputError: for an unknown method, a ratio outside (0, 1], one that the method cannot keep, or two
            methods that act at the same place.
    """
    names = check_method(method, own)
    if target.keep_ratio is not None:
        check_ratio("keep_ratio", target.keep_ratio)
    if own and method in own:
        return own[method](target)
    if target.keep_ratio == 1:
        # Methods that merge or pool would change tokens even then; a comparison starts from the unpruned model.
        return Pruner([Stage("embeddings", _everything, name=method, count=lambda now, first: now)])
    before = [name for name in names if name not in _INSIDE]
    groups = len(before) + (len(before) < len(names))
    share = None if target.keep_ratio is None else target.keep_ratio ** (1 / groups)
    visual = target.visual if share is None else max(1, round(target.visual * share ** len(before)))
    parts = []
    for name in names:
        entering = visual if name in _INSIDE else target.visual
        parts.append(METHODS[name](Target(share, target.depth, target.first, entering, target.view)))
    pruner = parts[0]
    for part in parts[1:]:
        pruner = pruner + part
    return pruner
