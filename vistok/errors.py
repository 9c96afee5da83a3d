"""Errors that users see. Each says what was given, what was expected and what to do; the CLI prints one line."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "CheckpointError",
    "InvalidInputError",
    "InvalidOutputError",
    "MissingExtraError",
    "UnknownNameError",
    "VistokError",
    "require",
]


class VistokError(Exception):
    """Base of every error raised on purpose by vistok."""


class InvalidInputError(VistokError, ValueError):
    """An argument, image, prompt or recipe that cannot be used as given."""


class InvalidOutputError(VistokError, RuntimeError):
    """A model produced something unusable, such as NaN logits."""


class CheckpointError(VistokError, ValueError):
    """A checkpoint that cannot be read, or that belongs to another architecture."""


class UnknownNameError(VistokError, KeyError):
    """A name that neither the registry nor the file system knows."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class MissingExtraError(VistokError, ImportError):
    """A feature that needs an optional dependency which is not installed."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: dotted module name, e.g. `"webdataset"`.
        extra: the extra of vistok that installs it, e.g. `"train"`.

    Raises:
        MissingExtraError: if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this feature needs the package {module.split('.')[0]!r} ({error}); "
            f"install it with: pip install 'vistok[{extra}]'"
        ) from error
