"""Replaying recorded draws, and listening to a sampler's logits. The adapters of generators share it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vistok.nn import sampling


@contextmanager
def recorded_draws(
    exp_noise: Tensor | None = None, drop_rand: Tensor | None = None, logits: list[Tensor] | None = None
) -> Iterator[None]:
    """Inside, samplers and training forwards use recorded draws.

    Args:
        exp_noise: [K, B, V], draws of the k-th token in decoding order.
        drop_rand: [B], the uniform draws of the condition dropout.
        logits: collects the guided logits [B, S, V] of each step.
    """
    used = 0

    def exponential_noise(shape: Sequence[int], generator: object, device: object) -> Tensor:
        nonlocal used
        assert exp_noise is not None
        count = shape[1]
        drawn = exp_noise[used : used + count].transpose(0, 1)
        assert tuple(drawn.shape) == tuple(shape), "the recorded draws do not fit this step"
        used += count
        return drawn

    choose = sampling.choose_tokens

    def choose_tokens(values: Tensor, **settings: Any) -> Tensor:
        if logits is not None:
            logits.append(values)
        return choose(values, **settings)

    def uniform(shape: Sequence[int], generator: object, device: object) -> Tensor:
        assert drop_rand is not None
        assert tuple(drop_rand.shape) == tuple(shape)
        return drop_rand

    with mock.patch.multiple(
        sampling, exponential_noise=exponential_noise, choose_tokens=choose_tokens, uniform=uniform
    ):
        yield


def sampler_settings(call: dict[str, Any]) -> dict[str, Any]:
    """Our sampling arguments from the authors'."""
    given = call["kwargs"]
    interval = given.get("cfg_interval", -1)
    return {
        "guidance_scale": given.get("cfg_scale", 1.0),
        "guidance_interval": None if interval < 0 else interval,
        "temperature": given.get("temperature", 1.0) if given.get("sample_logits", True) else 0.0,
        "top_k": given.get("top_k", 0),
        "top_p": given.get("top_p", 1.0),
    }


def check_meta_model(cls: Any, arguments: dict[str, Any], keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Raise unless the model on the meta device has exactly the official keys and shapes."""
    from vistok.nn.model import describe_mismatch

    with torch.device("meta"):
        model = cls(**arguments)
    official = cls.rename_official({key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()})
    problems = describe_mismatch(model.state_dict(), official)
    assert not problems, "; ".join(problems)
