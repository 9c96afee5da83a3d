"""SCOP: spatial constraints-oriented pairing (CoMPaSS, Zhang et al., ICCV 2025, arXiv 2412.13195, section 3).

Selects pairs of objects whose position in a picture is beyond doubt and writes captions for them. In order of reading:
`constraints` (the rules), `annotations` (reading), `captions`, `engine` (writing data sets), `dataset` (items).
"""

from __future__ import annotations

from vistok.controllers.scop.annotations import AnnotatedImage, AnnotationFile, Box, iterate_json_arrays
from vistok.controllers.scop.captions import DEFAULT_TEMPLATES, article, caption_of, object_positions
from vistok.controllers.scop.constraints import (
    BEST_GENEVAL,
    CONSTRAINTS,
    PairTable,
    Thresholds,
    judge,
    pair_indices,
    relations,
)
from vistok.controllers.scop.dataset import ItemDraws, Sam2Segmenter, ScopDataset, square_crop, write_masks
from vistok.controllers.scop.engine import PairRecord, ScopEngine, ScopReport, select_pairs

__all__ = [
    "BEST_GENEVAL",
    "CONSTRAINTS",
    "DEFAULT_TEMPLATES",
    "AnnotatedImage",
    "AnnotationFile",
    "Box",
    "ItemDraws",
    "PairRecord",
    "PairTable",
    "Sam2Segmenter",
    "ScopDataset",
    "ScopEngine",
    "ScopReport",
    "Thresholds",
    "article",
    "caption_of",
    "iterate_json_arrays",
    "judge",
    "object_positions",
    "pair_indices",
    "relations",
    "select_pairs",
    "square_crop",
    "write_masks",
]
