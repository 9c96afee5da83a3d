"""vistok: make, generate, steer and drop visual tokens.

Importing this package costs milliseconds and loads no torch; everything below is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from vistok.lazy import lazy_exports

__version__ = "0.1.0"

_EXPORTS = {
    "VisualTokens": "vistok.tokens",
    "load": "vistok.hub",
    "load_pipeline": "vistok.hub",
    "list_models": "vistok.hub",
    "model_info": "vistok.hub",
    "GenerationPipeline": "vistok.generators.pipeline",
    "TextEncoder": "vistok.generators.text",
    "VQModel": "vistok.tokenizers.vq",
    "SEED": "vistok.tokenizers.seed",
    "KLModel": "vistok.tokenizers.kl",
    "FlexTok": "vistok.tokenizers.flextok",
    "LARP": "vistok.tokenizers.larp",
    "TokenPacker": "vistok.tokenizers.tokenpacker",
    "LlamaGen": "vistok.generators.llamagen",
    "NAR": "vistok.generators.nar",
    "NARVideo": "vistok.generators.nar_video",
    "XAR": "vistok.generators.xar",
    "MAR": "vistok.generators.mar",
    "HiMAR": "vistok.generators.himar",
    "FlexTokAR": "vistok.generators.flextok_ar",
    "AttributeDelta": "vistok.controllers",
    "AttributeDirections": "vistok.controllers",
    "AttributeEdit": "vistok.controllers",
    "LeakageFix": "vistok.controllers",
    "ScopEngine": "vistok.controllers",
    "Tenor": "vistok.controllers",
}
_ROOMS = (
    "controllers",
    "data",
    "errors",
    "generators",
    "hub",
    "kernels",
    "metrics",
    "nn",
    "pruners",
    "tokenizers",
    "tokens",
    "training",
)

__all__ = ["__version__", *_EXPORTS, *_ROOMS]


_HIDDEN = {"ModelMixin": "vistok.nn.model"}  # diffusers looks for a part's base class in the library that defines it
_find = lazy_exports(__name__, {**_EXPORTS, **_HIDDEN})[0]


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"vistok.{name}") if name in _ROOMS else _find(name)


def __dir__() -> list[str]:
    return sorted(__all__)
