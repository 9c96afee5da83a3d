"""SEED: the tokenizer, its unCLIP decoder, and pictures as words of a language model."""

from __future__ import annotations

from .denoiser import UnCLIPDenoiser
from .language import ImageLanguageModel, ImageVocabulary, SequenceBuilder, extend_language_model
from .model import SEED
from .qformer import QFormer
from .training import STAGES, SEEDStage
from .unclip import PromptDecoder, UnCLIPDecoder, UnCLIPStep
from .vision import interpolate_positions

__all__ = [
    "SEED",
    "STAGES",
    "ImageLanguageModel",
    "ImageVocabulary",
    "PromptDecoder",
    "QFormer",
    "SEEDStage",
    "SequenceBuilder",
    "UnCLIPDecoder",
    "UnCLIPDenoiser",
    "UnCLIPStep",
    "extend_language_model",
    "interpolate_positions",
]
