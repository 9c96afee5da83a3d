"""Claims of papers, measured again in the lab world: one file a claim, `vistok reproduce NAME`.

Listing the claims imports none of them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vistok.registry import unknown_name

if TYPE_CHECKING:
    from .report import Report

__all__ = ["CLAIMS", "Claim", "reproduce"]


@dataclass(frozen=True)
class Claim:
    """What `vistok reproduce` can measure.

    Attributes:
        name: of the claim and, with underscores, of its module here.
        title: the claim in one line.
        paper: title and arXiv identifier.
        models: shipped checkpoints that it needs.
        minutes: of a full run on two CPU cores.
    """

    name: str
    title: str
    paper: str
    models: tuple[str, ...]
    minutes: float


CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim(
            "nar",
            "decoding near to far takes a fraction of raster order's steps and time, at the same quality",
            "Neighboring Autoregressive Modeling for Efficient Visual Generation (arXiv:2503.10696)",
            ("nar-shapes-class", "llamagen-shapes-class", "features-shapes"),
            4.0,
        ),
        Claim(
            "xar",
            "cells of tokens with noisy context draw better than other entities, in a fraction of a diffusion "
            "transformer's time",
            "Beyond Next-Token: Next-X Prediction for Autoregressive Visual Generation (arXiv:2502.20388)",
            ("xar-shapes", "kl-shapes", "features-shapes"),
            10.0,
        ),
        Claim(
            "himar",
            "low-resolution pivots and a transformer head draw better than plain masked autoregression, in less time",
            "Hierarchical Masked Autoregressive Models with Low-Resolution Token Pivots (arXiv:2505.20288)",
            ("himar-shapes", "mar-shapes", "kl-shapes", "features-shapes"),
            10.0,
        ),
        Claim(
            "flextok",
            "1 to N ordered tokens an image: few for what matters, more for complex scenes, at any length a picture",
            "FlexTok: Resampling Images into 1D Token Sequences of Flexible Length (arXiv:2502.13967)",
            ("flextok-shapes", "kl-shapes", "flextok-shapes-unordered", "flextok-ar-shapes", "features-shapes"),
            5.0,
        ),
        Claim(
            "seed",
            "pictures are found by their codes, and a language model reads and draws them as causal words",
            "Planting a SEED of Vision in Large Language Model (arXiv:2307.08041, arXiv:2310.01218)",
            ("seed-shapes", "seed-unclip-shapes", "kl-shapes", "seed-lm-shapes"),
            5.0,
        ),
        Claim(
            "tokenpacker",
            "one visual token for each cell of patches answers better than a pooled grid, at a fraction of the cost",
            "TokenPacker: Efficient Visual Projector for Multimodal LLM (arXiv:2407.02392)",
            ("llava-shapes",),
            4.5,
        ),
        Claim(
            "transprune",
            "visual tokens chosen by their transitions and the question's attention: few left, the same answers",
            "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model (arXiv:2507.20630)",
            ("llava-shapes",),
            5.5,
        ),
        Claim(
            "fopru",
            "[P, with assumptions] attention received in the vision tower says which quarter of the tokens suffices",
            "FoPru: Focal Pruning for Efficient Large Vision-Language Models (arXiv:2411.14164; abstract only)",
            ("llava-shapes",),
            3.0,
        ),
        Claim(
            "vflowopt",
            "settings searched on one's own model and pictures prune better than others at equal average shares",
            "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization "
            "(arXiv:2508.05211)",
            ("llava-shapes",),
            4.5,
        ),
        Claim(
            "attribute-directions",
            "one vector on a subject's tokens turns its size or shade up and down, and nothing else",
            "Continuous, Subject-Specific Attribute Control in T2I Models by Identifying Semantic Directions "
            "(arXiv:2403.17064)",
            ("t2i-shapes",),
            6.5,
        ),
        Claim(
            "compass",
            "filtered pairs and a code of word order put objects where the prompt says",
            "CoMPaSS: Enhancing Spatial Understanding in Text-to-Image Diffusion Models (arXiv:2412.13195)",
            (
                "t2i-shapes",
                "t2i-shapes-unfiltered",
                "t2i-shapes-unfiltered-tenor",
                "t2i-shapes-scop",
                "t2i-shapes-tenor",
            ),
            3.0,
        ),
        Claim(
            "leakage",
            "encoding an item without its context stops leakage, and most tokens of an item are redundant",
            "Follow the Flow: On Information Flow Across Textual Tokens in Text-to-Image Models (arXiv:2504.01137)",
            ("t2i-shapes",),
            2.5,
        ),
    )
}


def reproduce(
    name: str,
    output: str | os.PathLike[str],
    *,
    quick: bool = False,
    seed: int = 0,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Measure a claim.

    Args:
        name: key of `CLAIMS`.
        output: folder for `NAME.json` (written after every stage, so an interrupted run keeps what it has) and
            `NAME.png`.
        quick: far fewer samples: checks that everything runs, the figures are noisy.
        seed: of all draws.
        on_progress: called with what is done, units done, units in all.

    Raises:
        UnknownNameError: no such claim.
    """
    if name not in CLAIMS:
        raise unknown_name("claim", name, CLAIMS)
    module = importlib.import_module(f"vistok.reproduce.{name.replace('-', '_')}")
    return module.run(output, quick=quick, seed=seed, on_progress=on_progress)
