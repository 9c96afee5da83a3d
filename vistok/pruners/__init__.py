"""Pruners: fewer visual tokens in any supported transformers LVLM. Classes are imported on first use."""

from __future__ import annotations

from vistok.lazy import lazy_exports

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
    "encode_pictures": "encoding",
    "find_host": "hosts",
    "kept_grid": "drawing",
    "overlay": "drawing",
    "register_host": "hosts",
    "search": "vflowopt_search",
}

__all__ = list(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
