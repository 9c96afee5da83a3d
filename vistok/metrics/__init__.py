"""How good it is: distances between sets of images, reconstruction, and what the lab world's oracle reads.

Imported on first use, so that `vistok.metrics.psnr` does not load what a Frechet distance needs.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Accuracy": "accuracy",
    "FrechetDistance": "frechet",
    "FrechetResult": "frechet",
    "ShapesFeatures": "features",
    "caption_accuracy": "accuracy",
    "class_accuracy": "accuracy",
    "evaluate_generator": "evaluate",
    "evaluate_tokenizer": "evaluate",
    "oracle_agreement": "accuracy",
    "psnr": "reconstruction",
    "ssim": "reconstruction",
    "wilson_interval": "accuracy",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vistok.metrics' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"vistok.metrics.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
