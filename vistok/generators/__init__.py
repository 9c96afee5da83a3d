"""Generators write visual tokens from a class or a prompt; `GenerationPipeline` turns them into pictures."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "LlamaGen": "llamagen",
    "NAR": "nar",
    "NARVideo": "nar_video",
    "XAR": "xar",
    "MAR": "mar",
    "HiMAR": "himar",
    "FlexTokAR": "flextok_ar",
    "GenerationPipeline": "pipeline",
    "TextEncoder": "text",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"vistok.generators.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'vistok.generators' has no attribute {name!r}; it has: {', '.join(_EXPORTS)}")
