"""Tokenizers: images to visual tokens and back. Classes are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "CodebookReport": "vq",
    "SEED": "seed",
    "KLLoss": "kl",
    "KLModel": "kl",
    "KLModelOutput": "kl",
    "FlexTok": "flextok",
    "LARP": "larp",
    "TokenPacker": "tokenpacker",
    "VQLoss": "vq",
    "VQModel": "vq",
    "VQModelOutput": "vq",
    "VectorQuantizer": "vq",
    "load_moments": "kl",
    "save_moments": "kl",
    "center_crop": "transforms",
    "random_crop": "transforms",
    "ten_crop": "transforms",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted(__all__)
