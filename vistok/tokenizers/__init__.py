"""Tokenizers: images to visual tokens and back. Classes are imported on first use."""

from __future__ import annotations

from vistok.lazy import lazy_exports

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

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
