"""Leakage fixes: redundancy removal and un-contextualised replacement of text tokens (Kaplan et al., arXiv 2504.01137).

A prompt's words stay mostly by themselves inside the text encoder, but in about one case in ten context changes what a
word means ("a pool by a table" becomes a pool table). In order of reading: `fixes` (editing the states), `detection`
(which tokens are redundant, which items leak), `deleaker` (reweighting FLUX's attention during sampling,
arXiv 2510.15015).

Differences from the authors' code: whole batches, items found by text, the same encoder pass for prompt and items, the
final norm of T5 applied once, the tokenizers of the pipeline left alone.
"""

from __future__ import annotations

from vistok.controllers.leakage.deleaker import DeLeaker, DeLeakerSettings
from vistok.controllers.leakage.detection import (
    NEUTRAL_CONTEXTS,
    ItemLeakage,
    RedundancyClassifier,
    detect_leakage,
)
from vistok.controllers.leakage.fixes import (
    KeepOnly,
    LeakageFix,
    kept_positions,
    lone_positions,
    merge_positions,
    noun_chunks,
    pad_states,
    patch_states,
    replace_item,
    spacy_chunks,
)

__all__ = [
    "NEUTRAL_CONTEXTS",
    "DeLeaker",
    "DeLeakerSettings",
    "ItemLeakage",
    "KeepOnly",
    "LeakageFix",
    "RedundancyClassifier",
    "detect_leakage",
    "kept_positions",
    "lone_positions",
    "merge_positions",
    "noun_chunks",
    "pad_states",
    "patch_states",
    "replace_item",
    "spacy_chunks",
]
