"""Controllers steer a diffusers text-to-image pipeline that somebody else built; they attach through `vistok.attach`.

`attribute_directions` turns attributes of a subject up and down, `leakage` keeps the meaning of words apart, `tenor`
and `scop` put objects where the prompt says. Imported on first use.
"""

from __future__ import annotations

from vistok.lazy import lazy_exports

_EXPORTS = {
    "AttributeDelta": "attribute_directions",
    "AttributeDirections": "attribute_directions",
    "AttributeEdit": "attribute_directions",
    "ContrastivePrompts": "attribute_directions",
    "DeLeaker": "leakage",
    "DirectionLearner": "attribute_directions",
    "FluxLowRankAdapters": "tenor",
    "KeepOnly": "leakage",
    "LearningSettings": "attribute_directions",
    "LeakageFix": "leakage",
    "PromptPair": "attribute_directions",
    "ScopDataset": "scop",
    "ScopEngine": "scop",
    "Tenor": "tenor",
    "contrast_delta": "attribute_directions",
    "detect_leakage": "leakage",
}

__all__ = sorted(_EXPORTS)

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
