"""Generators write visual tokens from a class or a prompt; `GenerationPipeline` turns them into pictures."""

from __future__ import annotations

from vistok.lazy import lazy_exports

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

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
