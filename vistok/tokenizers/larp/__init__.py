"""LARP: a video tokenizer whose tokens are learned queries over the whole clip, in an order that is easy to predict."""

from __future__ import annotations

from .model import LARP, LARPOutput
from .prior import ContinuousPrior
from .quantizer import Quantization, StochasticQuantizer

__all__ = ["LARP", "ContinuousPrior", "LARPOutput", "Quantization", "StochasticQuantizer"]
