"""xAR: next-X prediction with flow matching (entities, network, model, sampling run)."""

from __future__ import annotations

from .entities import EntityLayout, annealed_steps, entity_layout
from .model import XAR
from .run import EntityRun

__all__ = ["XAR", "EntityLayout", "EntityRun", "annealed_steps", "entity_layout"]
