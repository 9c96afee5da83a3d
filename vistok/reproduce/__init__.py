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
        name: of the claim and of its module here.
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
    module = importlib.import_module(f"vistok.reproduce.{name}")
    return module.run(output, quick=quick, seed=seed, on_progress=on_progress)
