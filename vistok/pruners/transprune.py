"""TransPrune: prune visual tokens inside the language model by how much its modules change them.

"TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", arXiv 2507.20630. The
defaults follow the authors' released code where it differs from the paper (direction `1 - cos` instead of `1 - |cos|`,
both terms normalised to sum 1 and added).

A token's *transition value* in a module (attention or MLP) is the ratio of the norms of its output and its normed
input, times the softmax over all tokens of one minus their cosine. It is accumulated over layers. At a pruning layer
the attention that the question pays to each token, by the next layer's weights, is added.

Shape letters: B batch, S tokens now, D width, n tokens of a visual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vistok.errors import InvalidInputError
from vistok.pruners.pruner import Pruner
from vistok.pruners.stages import (
    Context,
    Positions,
    Scorer,
    Stage,
    TopK,
    check_layer,
    check_ratio,
    placed_layers,
    truncated_keep,
)

__all__ = ["SCHEDULES", "Schedule", "TransPrune", "transition"]

Direction = Literal["signed", "abs"]


@dataclass(frozen=True)
class Schedule:
    """Layer numbers (counting from 1: after so many layers) and kept shares of the original tokens.

    Attributes:
        accumulate: layers whose transition values are summed.
        prune: layers after which tokens are dropped.
        ratios: share kept after each of them.
    """

    accumulate: tuple[int, ...]
    prune: tuple[int, ...]
    ratios: tuple[float, ...]

    def scaled(self, depth: int, of: int = 32) -> Schedule:
        """The same schedule for a decoder of another depth: layer numbers keep their place relative to the depth.

        Where several fall together they move on, so that a shallow decoder prunes later in it.

        Raises:
            InvalidInputError: if it has fewer layers to prune before than the schedule prunings.
        """

        def scale(layer: int) -> int:
            return max(1, round(layer * depth / of))

        prune = placed_layers([scale(layer) for layer in self.prune], depth)
        last = scale(self.accumulate[-1]) if self.accumulate else 0
        if self.accumulate and self.accumulate[-1] >= self.prune[-1]:
            last = max(last, prune[-1])
        first = scale(self.accumulate[0]) if self.accumulate else 1
        return Schedule(tuple(range(first, last + 1)), prune, self.ratios)

    @classmethod
    def for_budget(cls, average: float, depth: int, of: Schedule | None = None) -> Schedule:
        """A schedule that a layer of a `depth`-layer decoder sees so large a share of the tokens with on average.

        Layers and shape are those of another schedule (default High, moved with the depth); all its ratios are raised
        to one power.

        Args:
            average: share in (0, 1); the layers before the first pruning see all tokens, which bounds it from below.

        Raises:
            InvalidInputError: if it cannot be met.
        """
        base = (of or SCHEDULES["high"]).scaled(depth)
        least = base.prune[0] / depth
        if not least < average < 1:
            raise InvalidInputError(
                f"the first pruning is after layer {base.prune[0]} of {depth}, so the average share lies in "
                f"({least:.3f}, 1), got {average}"
            )
        low, high = 0.0, 64.0
        for _ in range(60):
            middle = (low + high) / 2
            found = cls(base.accumulate, base.prune, tuple(ratio**middle for ratio in base.ratios))
            low, high = (middle, high) if found.average_kept(depth) > average else (low, middle)
        return found

    def average_kept(self, depth: int) -> float:
        """Share of visual tokens that a layer sees on average."""
        bounds = [0, *self.prune, depth]
        shares = (1.0, *self.ratios)
        return sum(share * (stop - start) for share, start, stop in zip(shares, bounds, bounds[1:])) / depth


SCHEDULES = {
    "high": Schedule((7, 8, 9, 10, 11, 12), (7, 9, 12), (0.875, 0.625, 0.125)),
    # The ratios of Low are not published; this is the only triple of sixteenths that gives the printed TFLOPs.
    "low": Schedule((7, 8, 9, 10, 11, 12), (7, 9, 12), (0.625, 0.1875, 0.0625)),
}


def transition(before: Tensor, after: Tensor, valid: Tensor | None = None, direction: Direction = "signed") -> Tensor:
    """Transition value float32 [B, S] of every token in one module (paper equations 1 to 3).

    Args:
        before: the module's input after its norm, [B, S, D].
        after: the module's output before the residual sum, [B, S, D].
        valid: bool [B, S]; padding gets 0 and no part of the softmax. Each sample has a softmax of its own.
        direction: `"signed"` is the released code's `1 - cos`, `"abs"` the paper's `1 - |cos|`.
    """
    before, after = before.float(), after.float()
    norm_before, norm_after = before.norm(dim=-1), after.norm(dim=-1)
    # cosine_similarity bounds each norm from below; the norms are needed anyway, so they are read once.
    cosine = (before * after).sum(dim=-1) / (norm_before.clamp_min(1e-8) * norm_after.clamp_min(1e-8))
    turned = 1 - (cosine.abs() if direction == "abs" else cosine)
    if valid is None:
        return norm_after / norm_before * turned.softmax(dim=-1)
    weights = turned.masked_fill(~valid, float("-inf")).softmax(dim=-1)
    return torch.where(valid, norm_after / norm_before.clamp_min(torch.finfo(torch.float32).tiny) * weights, 0.0)


class TransitionScorer(Scorer):
    """Accumulated transition values plus the attention of the question, each normalised over a visual's tokens.

    Args:
        accumulate: layer numbers (from 1) that contribute.
        instruction: add the attention of the tokens after the last image.
        transitions: add the transition values.
        direction: see `transition`.
    """

    def __init__(
        self,
        accumulate: Sequence[int],
        instruction: bool = True,
        transitions: bool = True,
        direction: Direction = "signed",
        weight: float = 0.5,
    ) -> None:
        self.accumulate = tuple(accumulate)
        self.instruction, self.transitions, self.direction, self.weight = instruction, transitions, direction, weight

    def watch(self, host: Any, handle: Any, engine: Any) -> None:
        if not self.transitions:
            return
        depth = len(host.layers)
        # Layers after the last pruning would gather values that nobody reads.
        last = max(engine.late, default=0)
        for number in self.accumulate:
            if number > depth:
                raise InvalidInputError(f"accumulation layer {number} is past the decoder's {depth} layers")
            if number > last:
                continue
            layer = host.layers[number - 1]
            self._watch_module(layer.input_layernorm, layer.self_attn, handle, engine)
            self._watch_module(layer.post_attention_layernorm, layer.mlp, handle, engine)

    def _watch_module(self, norm: nn.Module, module: nn.Module, handle: Any, engine: Any) -> None:
        held: list[Tensor] = []

        def keep(_: nn.Module, __: tuple, output: Tensor) -> None:
            if engine.flow is not None and engine.flow.pruning:
                held[:] = [output]  # the last one counts: scoring calls the norm of the next layer, too

        def gather(_: nn.Module, __: tuple, output: Any) -> None:
            flow = engine.flow
            if flow is None or not flow.pruning or not held:
                held.clear()
                return
            output = output[0] if isinstance(output, tuple) else output
            with torch.no_grad():
                valid = None if max(flow.lengths) == min(flow.lengths) == output.shape[1] else flow.valid
                value = transition(held.pop(), output, valid, self.direction)
            total = flow.carried.get("transition")
            flow.carried["transition"] = value if total is None else total + value

        handle.hook(norm.register_forward_hook(keep))
        handle.hook(module.register_forward_hook(gather))

    def score(self, context: Context) -> list[Tensor]:
        empty = [torch.zeros(len(span), device=context.hidden.device) for span in context.spans]
        moved, asked = empty, empty
        if self.transitions and "transition" in context.carried:
            moved = [_normalised(value) for value in context.pick(context.carried["transition"])]
        if self.instruction:
            rows, weights = context.engine.text_rows(context)
            asked = [_normalised(value) for value in context.pick(context.engine.received(context, rows, weights))]
        context.terms |= {"transition": moved, "instruction": asked}
        return [2 * (self.weight * first + (1 - self.weight) * second) for first, second in zip(moved, asked)]


def _normalised(values: Tensor) -> Tensor:
    return values / (values.sum() + 1e-8)


class TransPrune(Pruner):
    """TransPrune on any supported model.

    Args:
        schedule: `"high"` or `"low"` (the paper's two settings on 32 layers), or a `Schedule`.
        accumulate, prune, ratios: single parts of the schedule to replace; layer numbers count from 1.
        scale_to_depth: move the layer numbers with the depth, instead of taking them as they are. The paper uses the
            same numbers for 28 and 32 layers.
        weight: the paper's alpha, share of the transition term in the score, in [0, 1].
        instruction, transitions: switch one of the two terms off.
        direction: `"signed"` (released code) or `"abs"` (paper).
        scope: `"per_image"`, or `"global"`: the images of a sample share one budget.
        positions: `"auto"` closes rotary gaps as the authors do (models with several axes keep theirs).

    Raises:
        InvalidInputError: for ratios outside (0, 1] or growing, or layers out of order.
    """

    def __init__(
        self,
        schedule: Literal["high", "low"] | Schedule = "high",
        *,
        accumulate: Sequence[int] | None = None,
        prune: Sequence[int] | None = None,
        ratios: Sequence[float] | None = None,
        scale_to_depth: bool = False,
        weight: float = 0.5,
        instruction: bool = True,
        transitions: bool = True,
        direction: Direction = "signed",
        scope: Literal["per_image", "global"] = "per_image",
        positions: Positions = "auto",
    ) -> None:
        if isinstance(schedule, str):
            if schedule not in SCHEDULES:
                raise InvalidInputError(f"schedule is 'high', 'low' or a Schedule, got {schedule!r}")
            schedule = SCHEDULES[schedule]
        self.schedule = Schedule(
            tuple(accumulate if accumulate is not None else schedule.accumulate),
            tuple(prune if prune is not None else schedule.prune),
            tuple(ratios if ratios is not None else schedule.ratios),
        )
        if not (instruction or transitions):
            raise InvalidInputError("TransPrune needs at least one of its two terms")
        if not 0 <= weight <= 1:
            raise InvalidInputError(f"weight is the share of the transition term in [0, 1], got {weight!r}")
        if direction not in ("signed", "abs"):
            raise InvalidInputError(f"direction is 'signed' or 'abs', got {direction!r}")
        self.scale_to_depth, self.weight, self.direction = scale_to_depth, weight, direction
        self.instruction, self.transitions = instruction, transitions
        self.scope, self.positions = scope, positions
        super().__init__(self._stages(self.schedule))

    def stages_for(self, host: Any) -> list[Stage]:
        return self._stages(self.schedule.scaled(len(host.layers))) if self.scale_to_depth else self.stages

    def _stages(self, schedule: Schedule) -> list[Stage]:
        if len(schedule.prune) != len(schedule.ratios):
            raise InvalidInputError(
                f"{len(schedule.prune)} pruning layers need as many ratios, got {len(schedule.ratios)}"
            )
        for layer in (*schedule.prune, *schedule.accumulate):
            check_layer("a layer number of TransPrune", layer)
        for ratio in schedule.ratios:
            check_ratio("a ratio of TransPrune", ratio)
        if list(schedule.prune) != sorted(set(schedule.prune)) or list(schedule.ratios) != sorted(
            schedule.ratios, reverse=True
        ):
            raise InvalidInputError(
                f"pruning layers must ascend and ratios must not grow, got {schedule.prune} and {schedule.ratios}"
            )
        stages = []
        for number, (layer, ratio) in enumerate(zip(schedule.prune, schedule.ratios)):
            # Only the first scorer watches the layers; all read the same sum.
            scorer = TransitionScorer(
                schedule.accumulate if number == 0 else (),
                self.instruction,
                self.transitions,
                self.direction,
                self.weight,
            )
            stages.append(
                Stage(
                    "decoder",
                    TopK(truncated_keep(ratio), self.scope),
                    scorer,
                    layer=layer,
                    positions=self.positions,
                    name="TransPrune",
                )
            )
        return stages
