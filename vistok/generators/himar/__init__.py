"""Hi-MAR: masked autoregression in two resolutions. `model` holds the generator, `head` its diffusion transformer."""

from __future__ import annotations

from .head import DiffusionTransformer, TransformerHead
from .model import HiMAR

__all__ = ["DiffusionTransformer", "HiMAR", "TransformerHead"]
