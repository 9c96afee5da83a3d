"""Attaching leaves no trace after detaching, whatever happens in between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vistok.attach import Attachable, Handle
from vistok.errors import InvalidInputError


class Doubler(Attachable):
    """Doubles every output and replaces `forward` by a version that adds one."""

    def __init__(self, fail: bool = False) -> None:
        self.fail = fail

    def _attach(self, model: nn.Module, handle: Handle) -> None:
        handle.hook(model.register_forward_hook(lambda module, inputs, output: output * 2))
        forward = model.forward
        handle.replace(model, "forward", lambda x: forward(x) + 1)
        if self.fail:
            raise RuntimeError("half-way")


def trace(model: nn.Module) -> tuple:
    return sorted(vars(model)), dict(model._forward_hooks), dict(model._forward_pre_hooks)


def test_attached_changes_and_detached_is_bit_equal() -> None:
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    before, clean = model(x), trace(model)
    with Doubler().attached(model):
        assert torch.equal(model(x), (before + 1) * 2)
    assert torch.equal(model(x), before)
    assert trace(model) == clean


def test_a_failure_half_way_or_in_the_body_detaches() -> None:
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    before, clean = model(x), trace(model)
    doubler = Doubler(fail=True)
    with pytest.raises(RuntimeError, match="half-way"):
        doubler.attach(model)
    assert trace(model) == clean
    with pytest.raises(ValueError, match="body"), Doubler().attached(model):
        raise ValueError("body")
    assert trace(model) == clean
    assert torch.equal(model(x), before)


def test_attaching_twice_is_refused_until_removed() -> None:
    model, doubler = nn.Linear(2, 2), Doubler()
    handle = doubler.attach(model)
    assert handle.active
    with pytest.raises(InvalidInputError, match="attached to this Linear already"):
        doubler.attach(model)
    handle.remove()
    handle.remove()
    assert not handle.active
    with doubler.attach(model) as again:
        assert again.active


def test_two_objects_compose_and_undo_in_reverse() -> None:
    model, x = nn.Linear(2, 2), torch.randn(1, 2)
    before = model(x)
    with Doubler().attached(model), Doubler().attached(model):
        assert torch.equal(model(x), (before + 1 + 1) * 2 * 2)
    assert torch.equal(model(x), before)
