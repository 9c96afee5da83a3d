"""How a training is watched: figures on held-out data, and picture grids, for tokenizers and for generators.

Everything here runs with the averaged weights, which are the ones exported.

Shape letters: B images, H rows and W columns of pixels, N tokens an image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vistok.data.photographs import open_photograph
from vistok.errors import InvalidInputError
from vistok.metrics.accuracy import caption_accuracy, class_accuracy, oracle_agreement
from vistok.metrics.reconstruction import psnr
from vistok.nn.model import VistokModel
from vistok.nn.text import TextCondition

from .recipe import Recipe, ShapesImagesRecipe, ShapesTokensRecipe
from .sources import HELD_OUT_STREAM, Source, draw_latents, encode_images, image_batch

__all__ = ["GeneratorMonitor", "Monitor", "TokenizerMonitor", "picture_grid"]

HELD_OUT_SCENES = 256
EVALUATION_BATCH = 64
PHOTO_SIDE = 256
SHOWN = 16
PREFIX_ROWS = 8
SAMPLED = 64
ORACLE_SIDE = 16  # pixels that the oracle needs
READ_SCENES, READ_SIDE, READ_PREFIX = 64, 32, 4  # of ordered tokens: scenes, their least side, and a short prefix


class Monitor(Protocol):
    """Watches one kind of model."""

    def validate(self, model: VistokModel) -> dict[str, float]:
        """Figures on held-out data."""
        ...

    def sample(self, model: VistokModel, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Named picture grids, uint8 [H, W, 3], and figures read from them."""
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

    Data from users' own folders is judged on its first batches instead. Decoders that draw (FlexTok's) take the
    recipe's `sampling` and start from the same noise every time, so that figures of different steps can be compared.

    Raises:
        InvalidInputError: a sampling setting that such a decoder does not know.
    """

    def __init__(self, recipe: Recipe, model: VistokModel, source: Source, device: torch.device) -> None:
        self.device = device
        self.photographs: dict[str, Tensor] = {}
        self.codebook_size: int | None = getattr(model, "codebook_size", None)
        self.seed = recipe.seed
        self.ordered = hasattr(model, "decode_prefixes")
        self.sampling: dict[str, Any] | None = None  # of a decoder that draws
        self.single: Tensor | None = None  # scenes of one object, for the oracle
        tokenizer: Any = model
        if hasattr(model, "denoise"):
            self.sampling = recipe.sampling.given
            unknown = sorted(set(self.sampling) - set(inspect.signature(tokenizer.denoise).parameters))
            if unknown:
                raise InvalidInputError(f"sampling: {type(model).__name__}.decode has no setting {', '.join(unknown)}")
        data = recipe.data
        if isinstance(data, ShapesImagesRecipe):
            from vistok.data.shapes import render, sample_scene

            stream = recipe.seed + HELD_OUT_STREAM
            scenes = [sample_scene(stream, number, data.objects) for number in range(HELD_OUT_SCENES)]
            self.images = image_batch([render(scene, data.image_size) for scene in scenes])
            if self.ordered and data.image_size >= READ_SIDE:
                simple = [sample_scene(stream, number, 1) for number in range(READ_SCENES)]
                self.single = image_batch([render(scene, data.image_size) for scene in simple])
            multiple = int(getattr(model, "downsample_factor", 16))
            for name in data.held_out_photos:
                if self.ordered:  # made for one size
                    self.photographs[name] = tokenizer.preprocess(open_photograph(name), size=data.image_size)
                else:
                    self.photographs[name] = image_batch([np.asarray(centre_crop(open_photograph(name), multiple))])
        else:
            found = source.batch(np.arange(EVALUATION_BATCH, dtype=np.int64))["images"]
            self.images = found.float() / 127.5 - 1

    def _draws(self, images: Tensor) -> dict[str, Any]:
        """Arguments of a decoder that draws; nothing for the others."""
        if self.sampling is None:
            return {}
        generator = torch.Generator(self.device).manual_seed(self.seed)
        return {"generator": generator, "image_size": tuple(images.shape[-2:]), **self.sampling}

    def _reconstruct(self, model: VistokModel, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            tokens = model.encode(images.to(self.device))
            decoded = model.decode(tokens, **self._draws(images)).float().cpu()
            return decoded, None if tokens.ids is None else tokens.ids.cpu()

    def _prefixes(self, model: Any, images: Tensor) -> np.ndarray:
        """Each image, and beside it what 1, 2, 4, ... and all of its tokens give."""
        total = int(model.num_registers)
        lengths = sorted({1 << power for power in range(total.bit_length())} | {total})
        with torch.no_grad():
            tokens = model.encode(images.to(self.device))
            decoded = model.decode_prefixes(tokens, lengths, **self._draws(images)).float().cpu()
        return picture_grid(torch.cat([images[:, None], decoded], dim=1).flatten(0, 1), 1 + len(lengths))

    def _agreement(self, model: Any, images: Tensor) -> dict[str, float]:
        """What the oracle still reads after a short prefix and after all tokens."""
        lengths = sorted({min(READ_PREFIX, int(model.num_registers)), int(model.num_registers)})
        with torch.no_grad():
            tokens = model.encode(images.to(self.device))
            decoded = model.decode_prefixes(tokens, lengths, **self._draws(images)).float().cpu()
        return {
            f"val/agreement_{length}": oracle_agreement(images, decoded[:, index])["scene"].value
            for index, length in enumerate(lengths)
        }

    def validate(self, model: VistokModel) -> dict[str, float]:
        """`val/psnr` in dB, `val/codebook_usage` as a fraction, `val/psnr_<photograph>`; of ordered tokens also
        `val/agreement_<k>`, the share of one-object scenes that keep shape and colour through the first k tokens."""
        pairs = [self._reconstruct(model, part) for part in self.images.split(EVALUATION_BATCH)]
        figures = {"val/psnr": psnr(torch.cat([pair[0] for pair in pairs]), self.images).mean().item()}
        used: set[int] = set()
        for _, ids in pairs:
            used.update([] if ids is None else ids.unique().tolist())
        for name, photograph in self.photographs.items():
            decoded, ids = self._reconstruct(model, photograph)
            figures[f"val/psnr_{name}"] = psnr(decoded, photograph).mean().item()
            used.update([] if ids is None else ids.unique().tolist())
        if self.single is not None:
            figures |= self._agreement(model, self.single)
        if self.codebook_size is not None:
            figures["val/codebook_usage"] = len(used) / self.codebook_size
        return figures

    def sample(self, model: VistokModel, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Originals above their reconstructions, each held-out photograph beside its own, and, where tokens have an
        order, pictures of the first ones of them."""
        shown = self.images[:SHOWN]
        pictures = {"reconstructions": picture_grid(torch.cat([shown, self._reconstruct(model, shown)[0]]), SHOWN)}
        for name, photograph in self.photographs.items():
            pictures[name] = picture_grid(torch.cat([photograph, self._reconstruct(model, photograph)[0]]), 2)
        if self.ordered:
            pictures["prefixes"] = self._prefixes(model, self.images[:PREFIX_ROWS])
        return pictures, {}


class GeneratorMonitor:
    """Loss on held-out lab scenes, and pictures sampled for fixed conditions, judged by the oracle.

    Generators of users' own data are only sampled: for their first classes, or for captions of the first samples.

    Args:
        recipe: of the training.
        model: the generator.
        tokenizer: decodes its tokens.
        encode_captions: captions to a `TextCondition`; None for class-conditional generators.
        source: training data, for the captions of users' own data.
        device: where the networks are.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: VistokModel,
        tokenizer: Any,
        encode_captions: Callable[[Sequence[str]], TextCondition] | None,
        source: Source,
        device: torch.device,
    ) -> None:
        self.settings, self.tokenizer, self.encode_captions = recipe.sampling.given, tokenizer, encode_captions
        self.device = device
        self.held_out: list[dict[str, Any]] = []
        self.labels: list[int] = []
        self.captions: list[str] = []
        self.oracle_can_read = isinstance(recipe.data, ShapesTokensRecipe) and recipe.data.image_size >= ORACLE_SIDE
        if isinstance(recipe.data, ShapesTokensRecipe):
            self._draw_held_out(recipe.data, recipe.seed + HELD_OUT_STREAM)
        elif encode_captions is not None:
            self.captions = source.batch(np.arange(SAMPLED, dtype=np.int64)).get("captions", [])
        else:
            self.labels = list(range(min(SAMPLED, int(model.config.num_classes))))

    def _draw_held_out(self, data: ShapesTokensRecipe, stream: int) -> None:
        from vistok.data.shapes import CLASS_NAMES, caption, render, sample_scene

        scenes = [sample_scene(stream, number, data.objects) for number in range(HELD_OUT_SCENES)]
        texts = [caption(scene) for scene in scenes]
        for first in range(0, len(scenes), EVALUATION_BATCH):
            part = scenes[first : first + EVALUATION_BATCH]
            images = image_batch([render(scene, data.image_size) for scene in part]).to(self.device)
            batch: dict[str, Any] = {**encode_images(self.tokenizer, images, data.pivot_size)}
            draw_latents(self.tokenizer, batch)
            if self.encode_captions is None:
                batch["labels"] = torch.tensor([scene.label for scene in part], device=self.device)
            else:
                condition = self.encode_captions(texts[first : first + EVALUATION_BATCH])
                batch["text_features"], batch["text_mask"] = condition.features, condition.mask
            self.held_out.append(batch)
        if self.encode_captions is None:
            self.labels = list(range(min(SAMPLED, len(CLASS_NAMES))))
        else:
            self.captions = texts[:SAMPLED]

    def validate(self, model: VistokModel) -> dict[str, float]:
        """`val/loss` (of discrete tokens, in nats a token), where there are held-out scenes."""
        if not self.held_out:
            return {}
        with torch.no_grad():
            losses = [
                (model.training_loss(batch)["loss"].item(), len(next(iter(batch.values())))) for batch in self.held_out
            ]
        return {"val/loss": sum(loss * size for loss, size in losses) / sum(size for _, size in losses)}

    def sample(self, model: VistokModel, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """One picture a condition, and the share of them that show what was asked."""
        generator: Any = model
        condition: Tensor | TextCondition
        if self.encode_captions is None:
            condition = torch.tensor(self.labels, device=self.device)
        else:
            condition = self.encode_captions(self.captions)
        draws = torch.Generator(self.device).manual_seed(seed)
        with torch.no_grad():
            tokens = generator.generate(condition, generator=draws, **self.settings)
            images = self.tokenizer.decode(tokens, generator=draws).float().cpu()
        figures: dict[str, float] = {}
        if self.oracle_can_read:
            shares = caption_accuracy(images, self.captions) if self.captions else class_accuracy(images, self.labels)
            figures = {f"samples/{name}": share.value for name, share in shares.items() if share.total}
        return {"samples": picture_grid(images, 8)}, figures
