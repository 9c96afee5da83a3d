"""FlexTok: images as 1 to 256 ordered tokens (arXiv 2502.13967). Start reading at `model`."""

from __future__ import annotations

from .autoencoder import Autoencoder
from .blocks import PositionTable, ProjectionHead
from .budget import TokenBudget
from .decoder import FlowDecoder, RegisterEncoder, Registers
from .flow import NormalizedGuidance, classifier_free_guidance, noise_levels, prefix_lengths
from .model import FlexTok, Teacher

__all__ = [
    "Autoencoder",
    "FlexTok",
    "FlowDecoder",
    "NormalizedGuidance",
    "PositionTable",
    "ProjectionHead",
    "RegisterEncoder",
    "Registers",
    "Teacher",
    "TokenBudget",
    "classifier_free_guidance",
    "noise_levels",
    "prefix_lengths",
]
