"""How good it is: distances between sets of images, reconstruction, and what the lab world's oracle reads.

Imported on first use, so that `vistok.metrics.psnr` does not load what a Frechet distance needs.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Accuracy": "accuracy",
    "AttributeResponse": "spatial",
    "Detection": "spatial",
    "FrechetDistance": "frechet",
    "FrechetResult": "frechet",
    "ShapesFeatures": "features",
    "SpatialPrompt": "spatial",
    "VisorScore": "spatial",
    "ZeroShotDetector": "spatial",
    "attribute_response": "spatial",
    "caption_accuracy": "accuracy",
    "class_accuracy": "accuracy",
    "compbench_spatial": "spatial",
    "evaluate_generator": "evaluate",
    "evaluate_tokenizer": "evaluate",
    "geneval_position": "spatial",
    "leakage_rate": "spatial",
    "oracle_agreement": "accuracy",
    "oracle_detector": "spatial",
    "psnr": "reconstruction",
    "ssim": "reconstruction",
    "visor": "spatial",
    "wilson_interval": "accuracy",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vistok.metrics' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"vistok.metrics.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
