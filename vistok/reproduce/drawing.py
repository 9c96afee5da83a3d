"""What the claims about controllers share: pictures of one pipeline from the same noise, found objects, plots.

Letters: R pictures, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vistok.data.shapes import COLOURS, SHAPES, Phrase, Reading, SeenObject
from vistok.errors import InvalidInputError, require
from vistok.files import atomic_path
from vistok.nn.prompts import PromptController

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "MODEL",
    "PAIRS",
    "MeanInterval",
    "draw",
    "find_object",
    "mean_interval",
    "new_figure",
    "save_figure",
    "show_strip",
    "two_objects",
]

MODEL = "t2i-shapes"
PAIRS = len(SHAPES) * (len(SHAPES) - 1) * len(COLOURS) * (len(COLOURS) - 1)  # of objects that differ in both


@torch.no_grad()
def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steer: Callable[[range], PromptController] | None = None,
    *,
    sampling: dict[str, Any],
    batch_size: int = 50,
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """float32 [R, 3, H, W] in [-1, 1]: one picture a prompt, its noise a function of its seed alone.

    Args:
        pipe: a diffusers text-to-image pipeline.
        prompts: R prompts.
        seeds: R seeds; pictures of one seed start from the same noise whatever the arm and the batch.
        steer: the controller of some of the rows; None draws the prompts as they are.
        sampling: keyword arguments of the pipeline.
        batch_size: pictures drawn at once.
        on_batch: called with the number of pictures that were finished.
    """
    pictures = []
    for first in range(0, len(prompts), batch_size):
        rows = range(first, min(first + batch_size, len(prompts)))
        chosen = [prompts[row] for row in rows]
        inputs: dict[str, Any] = {"prompt": chosen}
        if steer is not None:
            inputs = steer(rows).prompt_kwargs(pipe, chosen, num_inference_steps=sampling.get("num_inference_steps"))
        drawn = pipe(
            **inputs,
            **sampling,
            generator=[torch.Generator().manual_seed(seeds[row]) for row in rows],
            output_type="pt",
        ).images
        pictures.append(drawn.float().cpu().clamp(0, 1) * 2 - 1)
        if on_batch is not None:
            on_batch(len(rows))
    return torch.cat(pictures)


def find_object(reading: Reading, phrase: Phrase) -> SeenObject | None:
    """The seen object of a phrase's shape, the one of its colour if there are several; None if there is none.

    The shape alone decides where it can, because steering may carry a colour over the border to the next one.
    """
    alike = [item for item in reading.objects if item.shape == phrase.shape]
    return max(alike, key=lambda item: (item.colour == phrase.colour, item.confidence), default=None)


def two_objects(count: int, seed: int) -> list[tuple[Phrase, Phrase]]:
    """Pairs of coloured objects that differ in shape and in colour; no pair comes twice."""
    if count > PAIRS:
        raise InvalidInputError(f"there are {PAIRS} pairs of objects, {count} were asked for")
    rng = np.random.default_rng(seed)
    pairs: dict[tuple[Phrase, Phrase], None] = {}
    while len(pairs) < count:
        first, second = rng.permutation(len(SHAPES))[:2]
        one, other = rng.permutation(len(COLOURS))[:2]
        pairs[Phrase(SHAPES[first], COLOURS[one]), Phrase(SHAPES[second], COLOURS[other])] = None
    return list(pairs)


def new_figure(width: float, height: float) -> Figure:
    """An empty matplotlib figure that needs no display."""
    require("matplotlib", "eval")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with atomic_path(path) as temporary:
        figure.savefig(str(temporary), format="png", dpi=110)


def show_strip(axes: Any, images: Sequence[Tensor], titles: Sequence[str], label: str) -> None:
    """A row of pictures [3, H, W] in one axes, each under its title."""
    gap = 3
    height, width = images[0].shape[-2:]
    row = torch.ones(3, height, len(images) * (width + gap) - gap)
    for column, image in enumerate(images):
        row[..., column * (width + gap) : column * (width + gap) + width] = image
    axes.imshow(((row.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy(), interpolation="nearest")
    axes.xaxis.tick_top()
    axes.set_xticks([column * (width + gap) + width / 2 for column in range(len(titles))], titles)
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.spines[:].set_visible(False)


@dataclass(frozen=True)
class MeanInterval:
    """A mean over prompts and its 95 % interval; `str()` gives "+0.31 [+0.20, +0.42]"."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:+.3g} [{self.low:+.3g}, {self.high:+.3g}] (n={self.count})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; None where nothing was measured."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {**{name: None if math.isnan(one) else one for name, one in values.items()}, "count": self.count}


def mean_interval(values: Sequence[float], resamples: int = 2000) -> MeanInterval:
    """The mean of the values that were measured (NaN: not), with a percentile bootstrap over them."""
    table = torch.tensor(list(values), dtype=torch.float64)
    table = table[~table.isnan()]
    if not len(table):
        return MeanInterval(math.nan, math.nan, math.nan, 0)
    drawn = torch.randint(len(table), (resamples, len(table)), generator=torch.Generator().manual_seed(0))
    low, high = table[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return MeanInterval(float(table.mean()), low, high, len(table))
