"""The base class of every network: diffusers' saving and loading, and the authors' own files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vistok.errors import CheckpointError, InvalidInputError
from vistok.files import PACKED_FILE, read_state_dict
from vistok.registry import Published, unknown_name

__all__ = ["VistokModel", "describe_mismatch"]


def _names_modules(record: logging.LogRecord) -> bool:
    return "should be kept in float32: []" not in record.getMessage()


# diffusers 0.42 warns at every cast of a network that keeps no module in float32.
logging.getLogger("diffusers.models.modeling_utils").addFilter(_names_modules)


def _listed(names: list[str], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def describe_mismatch(expected: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What keeps `given` from being loaded as `expected`: one sentence each for missing, unexpected and misshapen keys.

    Args:
        expected: key -> tensor (or anything with `.shape`) of the model.
        given: the same of the checkpoint.
    """
    problems = []
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    misshapen = [
        f"{key} {list(given[key].shape)} instead of {list(expected[key].shape)}"
        for key in expected
        if key in given and tuple(given[key].shape) != tuple(expected[key].shape)
    ]
    if missing:
        problems.append(f"{len(missing)} missing: {_listed(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_listed(unexpected)}")
    if misshapen:
        problems.append(f"{len(misshapen)} of another shape: {_listed(misshapen)}")
    return problems


class VistokModel(ModelMixin, ConfigMixin):
    """A network with `from_pretrained`/`save_pretrained` (diffusers) and `from_official` (the authors' files).

    Subclasses take plain, typed arguments in a `@register_to_config` constructor and override the three hooks
    `config_from_official`, `unwrap_official` and `rename_official`.
    """

    config_name = "config.json"
    system: ClassVar[str]
    published: ClassVar[dict[str, Published]] = {}

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> Any:
        """diffusers' `from_pretrained`, which also takes a folder of the lab with packed weights (`PACKED_FILE`).

        Args:
            source: a folder, or a repository of the Hub.
            options: of diffusers' method; packed weights take `torch_dtype` alone.
        """
        packed = Path(source) / PACKED_FILE
        if not packed.is_file():
            return super().from_pretrained(source, **options)
        model = cls.from_config(cls.load_config(source))
        model.load_state_dict(read_state_dict(packed), strict=True)
        return model.to(options.get("torch_dtype") or torch.float32).eval()

    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our constructor arguments from the authors' (or from our own, which pass unchanged)."""
        return dict(config)

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The flat state dict inside the wrapper keys that the authors' files use."""
        return dict(state)

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict under our names. Keys without a counterpart keep theirs (and are reported)."""
        return state

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """A sentence naming what the file really is, if these differences tell."""
        return None

    @classmethod
    def arguments_for(cls, config: str | Mapping[str, Any]) -> dict[str, Any]:
        """Our constructor arguments for a published name, or for the authors' arguments (or ours).

        Raises:
            UnknownNameError: no such published checkpoint.
        """
        if not isinstance(config, str):
            return cls.config_from_official(config)
        if config not in cls.published:
            raise unknown_name(f"{cls.__name__} checkpoint", config, cls.published)
        return dict(cls.published[config].config)

    @classmethod
    def from_official(cls, source: str | os.PathLike[str] | Mapping[str, Any], config: str | Mapping[str, Any]) -> Any:
        """Build the model and load the authors' weights strictly.

        Args:
            source: a checkpoint file as published (`.safetensors`, or `.pth/.pt/.bin/.ckpt` read without running
                code), or its content.
            config: name of a published checkpoint (key of `published`), or constructor arguments (the authors'
                names or ours).

        Returns:
            The model in eval mode, in the checkpoint's floating point type.

        Raises:
            CheckpointError: naming every missing, unexpected or misshapen key.
            UnknownNameError: if `config` names no published checkpoint.
        """
        arguments = cls.arguments_for(config)
        name = "the given state dict" if isinstance(source, Mapping) else str(source)
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        flat = cls.unwrap_official(state)
        stray = [key for key, value in flat.items() if not isinstance(value, Tensor)]
        if stray:
            raise CheckpointError(
                f"{name} does not hold a {cls.__name__} state dict: {_listed(stray)} "
                f"{'is' if len(stray) == 1 else 'are'} no tensor; top-level keys: {_listed(list(map(str, state)))}"
            )
        renamed = cls.rename_official(flat)
        try:
            with torch.device("meta"):
                model = cls(**arguments)
        except TypeError as error:
            raise InvalidInputError(f"{cls.__name__} cannot be built from this configuration: {error}") from error
        expected = model.state_dict()
        problems = describe_mismatch(expected, renamed)
        if problems:
            missing = [key for key in expected if key not in renamed]
            unexpected = [key for key in renamed if key not in expected]
            diagnosis = cls.diagnose_official(missing, unexpected)
            raise CheckpointError(
                f"{name} does not fit {cls.__name__}: " + (f"{diagnosis} " if diagnosis else "") + "; ".join(problems)
            )
        if isinstance(source, Mapping):  # the model must not share memory with the caller's tensors
            renamed = {key: value.clone() for key, value in renamed.items()}
        # Assigning into the meta model skips the random initialisation, which takes minutes at billions of parameters.
        model.load_state_dict(renamed, strict=True, assign=True)
        if any(buffer.is_meta for buffer in model.buffers()):  # tables outside the state dict need a real constructor
            model = cls(**arguments)
            dtypes = {value.dtype for value in renamed.values() if value.is_floating_point()}
            if len(dtypes) == 1:
                model = model.to(dtypes.pop())
            model.load_state_dict(renamed, strict=True)
        return model.eval()

    @classmethod
    def tiny(cls, **overrides: Any) -> Any:
        """A random flavour that builds in milliseconds, for tests and documentation."""
        raise InvalidInputError(f"{cls.__name__} has no tiny flavour")

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The training objective.

        Returns:
            Scalars; `loss` is the one to minimise, the others are logged.
        """
        raise InvalidInputError(f"{type(self).__name__} has no training objective")
