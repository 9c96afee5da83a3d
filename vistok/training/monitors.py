"""How a training is watched: figures on held-out data, and picture grids, for tokenizers and for generators.

Everything here runs with the averaged weights, which are the ones exported.

Shape letters: B images, H rows and W columns of pixels, N tokens an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vistok.metrics.reconstruction import psnr
from vistok.nn.model import VistokModel

from .recipe import Recipe, ShapesImagesRecipe, ShapesTokensRecipe
from .sources import HELD_OUT_STREAM, Source, image_batch, load_photographs

__all__ = ["GeneratorMonitor", "Monitor", "TokenizerMonitor", "picture_grid"]

HELD_OUT_SCENES = 256
PHOTO_SIDE = 256
SHOWN = 16


class Monitor(Protocol):
    """Watches one kind of model."""

    def validate(self, model: VistokModel) -> dict[str, float]:
        """Figures on held-out data."""
        ...

    def sample(self, model: VistokModel, seed: int) -> dict[str, np.ndarray]:
        """Named picture grids, uint8 [H, W, 3]."""
        ...


def picture_grid(images: Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """Images [B, 3, H, W] in [-1, 1] side by side, uint8 [rows, columns, 3] of pixels."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    batch, channels, height, width = pixels.shape
    rows = -(-batch // columns)
    canvas = torch.full((channels, rows * (height + gap) + gap, columns * (width + gap) + gap), 255, dtype=torch.uint8)
    for number, picture in enumerate(pixels):
        top = gap + (number // columns) * (height + gap)
        left = gap + (number % columns) * (width + gap)
        canvas[:, top : top + height, left : left + width] = picture
    return canvas.permute(1, 2, 0).contiguous().numpy()


def centre_crop(image: Any, multiple: int) -> Any:
    """The middle of a picture, at most `PHOTO_SIDE` a side and divisible by `multiple`."""
    width, height = (min(PHOTO_SIDE, side) // multiple * multiple for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class TokenizerMonitor:
    """PSNR and codebook use on held-out lab scenes and photographs; pairs of original and reconstruction.

    Data from users' own folders is judged on its first batches instead.
    """

    def __init__(self, recipe: Recipe, model: VistokModel, source: Source, device: torch.device) -> None:
        self.device, self.model_batch = device, 64
        self.photographs: dict[str, Tensor] = {}
        self.codebook_size: int | None = getattr(model.config, "codebook_size", None)
        data = recipe.data
        if isinstance(data, ShapesImagesRecipe):
            from vistok.data.shapes import render, sample_scene

            stream = recipe.seed + HELD_OUT_STREAM
            scenes = [sample_scene(stream, number, data.objects) for number in range(HELD_OUT_SCENES)]
            self.images = image_batch([render(scene, data.image_size) for scene in scenes])
            multiple = int(getattr(model, "downsample_factor", 16))
            for name, image in load_photographs(data.held_out_photos).items():
                self.photographs[name] = image_batch([np.asarray(centre_crop(image, multiple))])
        else:
            found = source.batch(np.arange(min(HELD_OUT_SCENES, 64), dtype=np.int64))["images"]
            self.images = found.float() / 127.5 - 1

    def _reconstruct(self, model: VistokModel, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            tokens = model.encode(images.to(self.device))
            return model.decode(tokens).float().cpu(), None if tokens.ids is None else tokens.ids.cpu()

    def validate(self, model: VistokModel) -> dict[str, float]:
        """`val/psnr` in dB, `val/codebook_usage` as a fraction, and `val/psnr_<photograph>`."""
        pairs = [self._reconstruct(model, part) for part in self.images.split(self.model_batch)]
        figures = {"val/psnr": psnr(torch.cat([pair[0] for pair in pairs]), self.images).mean().item()}
        used: set[int] = set()
        for _, ids in pairs:
            used.update([] if ids is None else ids.unique().tolist())
        for name, photograph in self.photographs.items():
            decoded, ids = self._reconstruct(model, photograph)
            figures[f"val/psnr_{name}"] = psnr(decoded, photograph).mean().item()
            used.update([] if ids is None else ids.unique().tolist())
        if self.codebook_size is not None:
            figures["val/codebook_usage"] = len(used) / self.codebook_size
        return figures

    def sample(self, model: VistokModel, seed: int) -> dict[str, np.ndarray]:
        """Originals above their reconstructions, and each held-out photograph beside its own."""
        shown = self.images[:SHOWN]
        pictures = {"reconstructions": picture_grid(torch.cat([shown, self._reconstruct(model, shown)[0]]), SHOWN)}
        for name, photograph in self.photographs.items():
            pictures[name] = picture_grid(torch.cat([photograph, self._reconstruct(model, photograph)[0]]), 2)
        return pictures


class GeneratorMonitor:
    """Loss on held-out lab scenes, and pictures sampled for fixed conditions, judged by the oracle."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Any,
        text_encoder: Any,
        held_out: Source | None,
        prepare: Callable[[dict[str, Any]], dict[str, Any]],
        device: torch.device,
    ) -> None:
        self.recipe, self.tokenizer, self.text_encoder = recipe, tokenizer, text_encoder
        self.held_out, self.prepare, self.device = held_out, prepare, device
