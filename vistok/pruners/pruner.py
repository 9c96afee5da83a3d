"""The public face of every pruner: a list of stages that attaches to a model. `engine.py` runs them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from vistok.attach import Attachable, Handle
from vistok.errors import InvalidInputError
from vistok.pruners.engine import Engine
from vistok.pruners.hosts import Host, find_host
from vistok.pruners.report import Report
from vistok.pruners.stages import Stage

__all__ = ["Pruner"]

_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class Pruner(Attachable):
    """A list of stages that can be attached to a model.

        with pruner.attached(model):
            model.generate(**inputs)
        print(pruner.last_report)

    Pruners add up: `FoPru(0.5) + TransPrune()` prunes before the language model and again inside it.

    Args:
        stages: in the order of the places: tower, embeddings, decoder layers ascending.

    Raises:
        InvalidInputError: for two stages at one place, or none.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = self.ordered(stages)
        self.last_report: Report | None = None

    @staticmethod
    def ordered(stages: Sequence[Stage]) -> list[Stage]:
        """Stages in the order in which they act."""
        places = {"tower": 0, "embeddings": 1, "decoder": 2}
        stages = sorted(stages, key=lambda one: (places[one.place], one.layer if one.place == "decoder" else 0))
        for first, second in pairwise(stages):
            if (first.place, first.layer if first.place == "decoder" else 0) == (
                second.place,
                second.layer if second.place == "decoder" else 0,
            ):
                where = f"decoder layer {first.layer}" if first.place == "decoder" else f"place {first.place!r}"
                raise InvalidInputError(
                    f"two stages act at the {where}: {first.name or 'one'} and {second.name or 'another'}; "
                    "move one of them"
                )
        if not stages:
            raise InvalidInputError("a pruner needs at least one stage")
        return stages

    def stages_for(self, host: Host) -> list[Stage]:
        """The stages on a given model; methods whose stages depend on it override this."""
        return self.stages

    def plan(self, depth: int, visual: int) -> list[int]:
        """Visual tokens that each of `depth` decoder layers sees, for an image of so many tokens.

        Raises:
            InvalidInputError: if a stage acts past the depth, or keeps a number that depends on the picture.
        """
        now, first, bounds = visual, visual, []
        for stage in self.stages:
            start = stage.layer if stage.place == "decoder" else 0
            assert start is not None
            if start >= depth:
                raise InvalidInputError(f"a stage acts before layer {start} and the decoder has layers 0..{depth - 1}")
            now = stage.planned(now, first)
            first = now if stage.place != "decoder" else first
            bounds.append((start, now))
        tokens = [visual] * depth
        for start, count in bounds:
            tokens[start:] = [count] * (depth - start)
        return tokens

    def __add__(self, other: Pruner) -> Pruner:
        if not isinstance(other, Pruner):
            return NotImplemented
        return _Sum(self, other)

    def _attach(self, model: Any, handle: Handle) -> None:
        host = find_host(model)
        if model in _ATTACHED:
            raise InvalidInputError(
                f"{type(_ATTACHED[model]).__name__} prunes this model already; add pruners instead "
                "(first + second) and attach the sum"
            )
        engine = Engine(self, host, self.ordered(self.stages_for(host)))
        _ATTACHED[model] = self
        handle.undo_with(_ATTACHED.pop, model, None)
        engine.install(handle)


class _Sum(Pruner):
    """Two pruners as one."""

    def __init__(self, first: Pruner, second: Pruner) -> None:
        self.parts = (first, second)
        super().__init__([*first.stages, *second.stages])

    def stages_for(self, host: Host) -> list[Stage]:
        return [stage for part in self.parts for stage in part.stages_for(host)]
