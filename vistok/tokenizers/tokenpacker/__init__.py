"""TokenPacker: the projector, its pictures, and its place in a LLaVA."""

from __future__ import annotations

from .llava import SplicedInputs, expand_image_tokens, llava_from_official, picture_layout, splice_visual_tokens
from .model import TokenPacker
from .pictures import choose_grid, pad_to_square, preprocess, slice_picture
from .training import STAGES, TrainingStage

__all__ = [
    "STAGES",
    "SplicedInputs",
    "TokenPacker",
    "TrainingStage",
    "choose_grid",
    "expand_image_tokens",
    "llava_from_official",
    "pad_to_square",
    "picture_layout",
    "preprocess",
    "slice_picture",
    "splice_visual_tokens",
]
