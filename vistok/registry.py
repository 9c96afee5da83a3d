"""What exists: the systems, and the entry that describes one published or shipped checkpoint. Imports no room."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import UnknownNameError

__all__ = ["SYSTEMS", "Published", "system_class", "unknown_name"]


@dataclass(frozen=True)
class Published:
    """One checkpoint of a paper: where it is, what it needs and under which terms.

    Attributes:
        name: `architecture.tag`, e.g. `"nar-l.imagenet256"`.
        system: key of `SYSTEMS`.
        config: arguments of our constructor.
        hub_id: Hugging Face Hub repository, or None where the authors published no file.
        hub_file: file inside it.
        licence: SPDX identifier of the weights, or the authors' own words.
        paper: arXiv identifier.
        origin: repository of the authors' code.
        image_size: input or output side in pixels.
        num_tokens: tokens an image.
        codebook_size: entries of the codebook; None for continuous tokens.
        preprocessing: how images become model input.
        tokenizer: name of the tokenizer entry that a generator writes for.
        text_encoder: Hub id of the text encoder of a text-conditional model.
        sampling: settings that the authors sample a generator with, by their names in its `sample`.
        parameters: trainable parameters.
    """

    name: str
    system: str
    config: Mapping[str, Any] = field(repr=False)
    hub_id: str | None = None
    hub_file: str | None = None
    licence: str = "unknown"
    paper: str | None = None
    origin: str | None = None
    image_size: int | None = None
    num_tokens: int | None = None
    codebook_size: int | None = None
    preprocessing: str | None = None
    tokenizer: str | None = None
    text_encoder: str | None = None
    sampling: Mapping[str, Any] | None = None
    parameters: int | None = None


# system name -> "module:class"; strings, so that listing systems imports none of them.
SYSTEMS: dict[str, str] = {
    "vq": "vistok.tokenizers.vq:VQModel",
    "kl": "vistok.tokenizers.kl:KLModel",
    "llamagen": "vistok.generators.llamagen:LlamaGen",
    "nar": "vistok.generators.nar:NAR",
    "nar-video": "vistok.generators.nar_video:NARVideo",
    "larp": "vistok.tokenizers.larp:LARP",
    "seed": "vistok.tokenizers.seed:SEED",
    "xar": "vistok.generators.xar:XAR",
    "mar": "vistok.generators.mar:MAR",
    "himar": "vistok.generators.himar:HiMAR",
    "flextok": "vistok.tokenizers.flextok:FlexTok",
    "flextok-ar": "vistok.generators.flextok_ar:FlexTokAR",
    "tokenpacker": "vistok.tokenizers.tokenpacker:TokenPacker",
    "tenor": "vistok.controllers.tenor:FluxLowRankAdapters",
}

# Networks that serve the others (evaluation features, a pipeline to steer) and have no published checkpoints.
HELPERS: dict[str, str] = {
    "lab-llava": "vistok.training.lvlm:LabLlava",
    "shapes-features": "vistok.metrics.features:ShapesFeatures",
    "seed-unclip": "vistok.tokenizers.seed:UnCLIPDenoiser",
    "image-language": "vistok.training.image_language:ImageLanguage",
    "caption-encoder": "vistok.training.caption_encoder:CaptionEncoder",
    "text-to-image": "vistok.training.text_to_image:TextToImage",
}


def system_class(system: str) -> type:
    """The class of a system, e.g. `"nar"` -> `vistok.generators.NAR`.

    Raises:
        UnknownNameError: if there is no such system.
    """
    table = {**SYSTEMS, **HELPERS}
    if system not in table:
        raise unknown_name("system", system, table)
    module, name = table[system].split(":")
    return getattr(importlib.import_module(module), name)


def unknown_name(kind: str, given: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """An error that names the nearest known names."""
    known = sorted(known)
    nearest = difflib.get_close_matches(given, known, n=4, cutoff=0.4) or known[:8]
    ending = f"; {hint}" if hint else ""
    return UnknownNameError(f"unknown {kind} {given!r}; nearest known: {', '.join(nearest)}{ending}")
