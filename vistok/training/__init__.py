"""Training: recipes, the trainer, its checkpoints, and the export of shipped checkpoints."""

from __future__ import annotations

from vistok.lazy import lazy_exports

_EXPORTS = {
    "EMA": "ema",
    "Recipe": "recipe",
    "Trainer": "trainer",
    "TrainingResult": "trainer",
    "export": "export",
    "load_recipe": "recipe",
    "parse_recipe": "recipe",
}

__all__ = list(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
