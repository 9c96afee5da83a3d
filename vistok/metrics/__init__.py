"""How good it is: distances between sets of images, reconstruction, and what the lab world's oracle reads.

Imported on first use, so that `vistok.metrics.psnr` does not load what a Frechet distance needs.
"""

from __future__ import annotations

from vistok.lazy import lazy_exports

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
    "evaluate_pruners": "pruning",
    "evaluate_tokenizer": "evaluate",
    "geneval_position": "spatial",
    "leakage_rate": "spatial",
    "oracle_agreement": "accuracy",
    "oracle_detector": "spatial",
    "psnr": "reconstruction",
    "retrieval_accuracy": "retrieval",
    "ssim": "reconstruction",
    "visor": "spatial",
    "wilson_interval": "accuracy",
}

__all__ = sorted(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
