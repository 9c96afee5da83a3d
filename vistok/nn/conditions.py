"""What a generator is told: classes or text features, checked before any work.

Letters: B images, T text tokens, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.nn.text import TextCondition

__all__ = ["check_labels", "check_text"]


def check_labels(labels: Any, num_classes: int, model: str) -> Tensor:
    """The class labels int64 [B], as given.

    Args:
        labels: what was given.
        num_classes: labels lie below.
        model: name of the generator, for the message.

    Raises:
        InvalidInputError: not int64 [B], none, or outside 0..num_classes - 1.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        is_tensor = isinstance(labels, Tensor)
        given = f"{labels.dtype} {list(labels.shape)}" if is_tensor else type(labels).__name__
        raise InvalidInputError(f"this {model} is class-conditional: give class labels as int64 [B], not {given}")
    if not len(labels):
        raise InvalidInputError("no class labels were given; expected at least one")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InvalidInputError(f"class labels must lie in 0..{num_classes - 1}; got {low}..{high}")
    return labels


def check_text(condition: Any, num_tokens: int, channels: int, model: str) -> TextCondition:
    """The text features [B, T, D], as given.

    Args:
        condition: what was given.
        num_tokens: T.
        channels: D.
        model: name of the generator, for the message.

    Raises:
        InvalidInputError: no `TextCondition`, another shape, no caption, NaN or infinity.
    """
    if not isinstance(condition, TextCondition):
        raise InvalidInputError(
            f"this {model} is text-conditional: give a TextCondition (see TextEncoder), not {type(condition).__name__}"
        )
    if tuple(condition.features.shape[1:]) != (num_tokens, channels):
        raise InvalidInputError(
            f"text features must be [B, {num_tokens}, {channels}] for this model; got "
            f"{list(condition.features.shape)}: was another text encoder used?"
        )
    if not len(condition) or not bool(torch.isfinite(condition.features).all()):
        raise InvalidInputError("text features must hold at least one caption and no NaN or infinity")
    return condition
