"""Model families that pruners attach to. `find_host(model)` picks one, or says what is supported and missing."""

from __future__ import annotations

from typing import Any

from vistok.errors import InvalidInputError
from vistok.pruners.hosts.base import Host, TowerAttention, Visual
from vistok.pruners.hosts.llava import Llava, LlavaNext, LlavaOnevision
from vistok.pruners.hosts.qwen import Qwen2_5VL, Qwen2VL, Qwen3VL
from vistok.pruners.hosts.shuffled import InternVL, SmolVLM

__all__ = ["HOSTS", "Host", "TowerAttention", "Visual", "find_host", "register_host"]

HOSTS: list[type[Host]] = [Llava, LlavaNext, LlavaOnevision, Qwen2VL, Qwen2_5VL, Qwen3VL, InternVL, SmolVLM]
"""The known families; `register_host` adds one."""


def register_host(host: type[Host]) -> type[Host]:
    """Add a family; it goes first, so it may replace a built-in one. Usable as a decorator."""
    HOSTS.insert(0, host)
    return host


def find_host(model: Any) -> Host:
    """The host of a transformers model.

    Raises:
        InvalidInputError: for a model of another family, naming the supported ones and what a host needs.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for host in HOSTS:
        if model_type in host.model_types:
            try:
                return host(model)
            except AttributeError as error:
                raise InvalidInputError(
                    f"{type(model).__name__} says it is {host.name!r} but lacks a part: {error}; give the whole model "
                    "for conditional generation, as from_pretrained returns it"
                ) from error
    supported = ", ".join(f"{host.name} ({', '.join(host.model_types)})" for host in HOSTS)
    lacks = [
        part
        for part, found in {
            "model (the multimodal core)": hasattr(model, "model"),
            "model.language_model.layers": hasattr(
                getattr(getattr(model, "model", None), "language_model", None), "layers"
            ),
            "model.get_image_features": hasattr(getattr(model, "model", None), "get_image_features"),
        }.items()
        if not found
    ]
    raise InvalidInputError(
        f"no pruner host for {type(model).__name__} (model_type {model_type!r}); supported: {supported}. "
        + (f"It lacks {', '.join(lacks)}. " if lacks else "It has the usual parts. ")
        + "A new family is one subclass of vistok.pruners.hosts.Host, added with register_host"
    )
