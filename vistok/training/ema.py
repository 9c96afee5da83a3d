"""Exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vistok.errors import CheckpointError

__all__ = ["EMA"]


class EMA:
    """A float32 moving average of the parameters; buffers are copied as they are.

    The decay rises as (1 + t) / (10 + t) until it reaches `decay`, so that a short training is not an average with the
    random initial weights.

    Args:
        model: the network to follow.
        decay: weight of the past, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.parameters = {name: value.detach().float().clone() for name, value in model.named_parameters()}
        self.buffers = {name: value.detach().clone() for name, value in _saved_buffers(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [value.detach().float() for _, value in model.named_parameters()]
        torch._foreach_lerp_(list(self.parameters.values()), current, 1.0 - decay)
        for name, value in _saved_buffers(model).items():
            self.buffers[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the network's own names."""
        return {**self.parameters, **self.buffers}

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Continue from saved averages.

        Raises:
            CheckpointError: if the names differ from the network's.
        """
        own = self.state_dict()
        if set(own) != set(state):
            raise CheckpointError(
                f"the saved moving average holds other tensors than the network: {sorted(set(own) ^ set(state))[:8]}"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(state[name])
        self.updates = updates

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block, `model` carries the averaged weights; afterwards its own again, bit for bit."""
        backup = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.state_dict(), strict=True)
        try:
            yield
        finally:
            model.load_state_dict(backup, strict=True)


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state dict."""
    skipped = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: value for name, value in model.named_buffers() if name not in skipped}
