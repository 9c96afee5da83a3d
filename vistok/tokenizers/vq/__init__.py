"""VQ tokenizer (LlamaGen's VQ-16 and VQ-8): quantiser, model, names of the authors' code, adversarial loss."""

from __future__ import annotations

from .loss import VQLoss
from .model import VQModel, VQModelOutput
from .quantizer import CodebookReport, QuantizerOutput, VectorQuantizer

__all__ = ["CodebookReport", "QuantizerOutput", "VQLoss", "VQModel", "VQModelOutput", "VectorQuantizer"]
