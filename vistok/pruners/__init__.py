"""Pruners: fewer visual tokens in any supported transformers LVLM. Classes are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "DivPrune": "divprune",
    "FasterVLM": "fastervlm",
    "FastV": "fastv",
    "FoPru": "fopru",
    "HOSTS": "hosts",
    "Host": "hosts",
    "Pruner": "pruner",
    "PyramidDrop": "pyramiddrop",
    "RandomPruner": "random",
    "Report": "report",
    "Schedule": "transprune",
    "Scorer": "stages",
    "Selection": "stages",
    "Settings": "vflowopt",
    "SparseVLM": "sparsevlm",
    "Stage": "stages",
    "TopK": "stages",
    "TransPrune": "transprune",
    "UniformPooling": "pooling",
    "VFlowOpt": "vflowopt",
    "VisionZip": "visionzip",
    "find_host": "hosts",
    "kept_grid": "drawing",
    "overlay": "drawing",
    "register_host": "hosts",
    "search": "vflowopt_search",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted(__all__)
