"""FlexTok's autoregressive generators (arXiv 2502.13967). Start reading at `model`."""

from __future__ import annotations

from .model import FlexTokAR, Score
from .network import sincos_positions
from .writer import Branches, SearchResult

__all__ = ["Branches", "FlexTokAR", "Score", "SearchResult", "sincos_positions"]
