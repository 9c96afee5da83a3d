"""Names of a package that are imported on first use, so that a package costs nothing until it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazy_exports"]


def lazy_exports(package: str, exports: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        exports: name -> module that defines it, absolute (`vistok....`) or below the package.
    """

    def find(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has: {', '.join(sorted(exports))}")
        module = exports[name]
        absolute = module.startswith(f"{package.partition('.')[0]}.")
        return getattr(importlib.import_module(module if absolute else f"{package}.{module}"), name)

    return find, lambda: sorted(exports)
