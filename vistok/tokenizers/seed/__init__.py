"""SEED: the tokenizer, its unCLIP decoder, and pictures as words of a language model."""

from __future__ import annotations

from .language import ImageLanguageModel, ImageVocabulary, SequenceBuilder, extend_language_model
from .model import SEED, STAGES, SEEDStage, interpolate_positions
from .qformer import QFormer
from .unclip import UnCLIPDecoder, UnCLIPStep

__all__ = [
    "SEED",
    "STAGES",
    "ImageLanguageModel",
    "ImageVocabulary",
    "QFormer",
    "SEEDStage",
    "SequenceBuilder",
    "UnCLIPDecoder",
    "UnCLIPStep",
    "extend_language_model",
    "interpolate_positions",
]
