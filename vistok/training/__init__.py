"""Training: recipes, the trainer, its checkpoints, and the export of shipped checkpoints."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "EMA": "ema",
    "Recipe": "recipe",
    "Trainer": "trainer",
    "TrainingResult": "trainer",
    "export": "export",
    "load_recipe": "recipe",
    "parse_recipe": "recipe",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted(__all__)
