"""Training items: a square crop around both objects, a caption, and masks with the tokens that they belong to.

Letters: S side of the crops.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vistok.errors import InvalidInputError
from vistok.files import atomic_path, open_image

from .captions import DEFAULT_TEMPLATES, caption_of, object_positions

__all__ = ["ItemDraws", "Sam2Segmenter", "ScopDataset", "square_crop", "write_masks"]

Bbox = Sequence[float]


def square_crop(first: Bbox, second: Bbox, width: float, height: float, scale: float) -> tuple[float, ...]:
    """(left, top, right, bottom) of a crop around both boxes; square unless the image is too narrow.

    Args:
        first: (x, y, width, height).
        second: the same.
        width: of the image.
        height: of the image.
        scale: of the longer side of both boxes' hull; the authors draw it from 1.0 to 1.1.
    """
    left, top = min(first[0], second[0]), min(first[1], second[1])
    right = max(first[0] + first[2], second[0] + second[2])
    bottom = max(first[1] + first[3], second[1] + second[3])
    centre_x, centre_y = (left + right) / 2, (top + bottom) / 2
    side = min(max(right - left, bottom - top) * scale, min(width, height))

    def clamped(values: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        return max(0, values[0]), max(0, values[1]), min(width, values[2]), min(height, values[3])

    box = clamped((centre_x - side / 2, centre_y - side / 2, centre_x + side / 2, centre_y + side / 2))
    across, down = box[2] - box[0], box[3] - box[1]
    if across < down:
        grow = (down - across) / 2
        box = (box[0] - grow, box[1], box[2] + grow, box[3])
    elif down < across:
        grow = (across - down) / 2
        box = (box[0], box[1] - grow, box[2], box[3] + grow)
    return clamped(box)


@dataclass(frozen=True)
class ItemDraws:
    """The random numbers of one item, in the order in which the authors draw them.

    Attributes:
        scale: of the crop.
        choice: index of the relation.
        dropout: uniform; the caption is dropped below the dropout rate.
        template: index of the caption template.
    """

    scale: float
    choice: int
    dropout: float
    template: int = 0


class ScopDataset(Dataset):
    """Items of a data set folder for training.

    Each item is a function of (seed, epoch, index), so any order of workers gives the same data.

    Args:
        folder: what `ScopEngine` wrote (layout `folder`).
        image_size: S.
        tokenizer: CLIP's, for token ids and positions; None leaves them out.
        masks: whether to read `masks/` (needed by the attention terms of UNets).
        caption_dropout: part of the captions that is emptied.
        scale_range: of the crop.
        templates: caption templates; one is drawn where there are several.
        first_match: see `object_positions`.
        seed: of all draws.
        records: metadata entries instead of those of the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        image_size: int = 512,
        *,
        tokenizer: Any = None,
        masks: bool = False,
        caption_dropout: float = 0.1,
        scale_range: tuple[float, float] = (1.0, 1.1),
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        first_match: bool = False,
        seed: int = 0,
        records: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.image_size, self.tokenizer, self.masks = image_size, tokenizer, masks
        self.caption_dropout, self.scale_range = caption_dropout, scale_range
        self.templates, self.first_match = list(templates), first_match
        self.seed, self.epoch = seed, 0
        if records is None:
            path = self.folder / "metadata.jsonl"
            if not path.is_file():
                raise InvalidInputError(f"{self.folder} has no metadata.jsonl; make it with ScopEngine(...).run(...)")
            with open(path, encoding="utf-8") as file:
                records = [json.loads(line) for line in file if line.strip()]
        self.records = list(records)
        if not self.records:
            raise InvalidInputError(f"{self.folder} holds no pairs")

    def __len__(self) -> int:
        return len(self.records)

    def draws(self, index: int) -> ItemDraws:
        """The random numbers of an item in the current epoch."""
        generator = random.Random(f"{self.seed}/{self.epoch}/{index}")
        scale = generator.uniform(*self.scale_range)
        choice = generator.randrange(len(self.records[index]["oros"]))
        dropout = generator.random()
        return ItemDraws(scale, choice, dropout, generator.randrange(len(self.templates)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = open_image(self.folder / record["file_name"])
        masks = None
        if self.masks:
            masks = [Image.open(path).convert("L") for path in mask_paths(self.folder, record)]
        return self.item(record, image, masks, self.draws(index))

    def item(
        self, record: dict[str, Any], image: Image.Image, masks: Sequence[Image.Image] | None, draws: ItemDraws
    ) -> dict[str, Any]:
        """One training item.

        Args:
            record: a line of the metadata.
            image: its picture.
            masks: of both annotations, in their order.
            draws: random numbers.

        Returns:
            `pixel_values` [3, S, S] in [-1, 1], `text`, `objects` (two names in the caption's order); with a tokenizer
            `input_ids` [N] and `token_positions`; with masks `masks` [2, S, S] in [0, 1] in the caption's order.
        """
        annotations = record["annots"]
        box = square_crop(annotations[0]["bbox"], annotations[1]["bbox"], *image.size, draws.scale)
        side = (self.image_size, self.image_size)
        pixels = image.crop(box).resize(side, Image.Resampling.LANCZOS)  # type: ignore[arg-type]
        values = torch.from_numpy(np.array(pixels.convert("RGB"))).permute(2, 0, 1).float() / 255
        first, relation, second = record["oros"][draws.choice]
        dropped = draws.dropout < self.caption_dropout
        text = "" if dropped else caption_of(first, relation, second, self.templates[draws.template])
        result: dict[str, Any] = {"pixel_values": values * 2 - 1, "text": text, "objects": [first, second]}
        if self.tokenizer is not None:
            length = int(self.tokenizer.model_max_length)
            encoded = self.tokenizer(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
            result["input_ids"] = torch.tensor(encoded)
            names = [self.tokenizer(name, add_special_tokens=False)["input_ids"] for name in (first, second)]
            result["token_positions"] = (
                [] if dropped else object_positions(encoded, names, first_match=self.first_match)
            )
        if masks is not None:
            # The first half of the relations speaks of the first annotation.
            forward = draws.choice < len(record["oros"]) // 2
            ordered = list(masks) if forward else list(masks)[::-1]
            result["masks"] = torch.stack([self._mask(mask, box, side) for mask in ordered])
        return result

    @staticmethod
    def _mask(mask: Image.Image, box: Sequence[float], side: tuple[int, int]) -> Tensor:
        cut = mask.crop(box).resize(side, Image.Resampling.LANCZOS)  # type: ignore[arg-type]
        return torch.from_numpy(np.array(cut)).float() / 255


def mask_paths(folder: Path, record: dict[str, Any]) -> list[Path]:
    """Where the masks of both annotations of a pair lie."""
    stem = Path(record["file_name"]).stem
    names = [record["oros"][0][0], record["oros"][0][2]]
    return [folder / "masks" / stem / f"mask_{stem}_{name}.{record['seq']}.png" for name in names]


class Sam2Segmenter:
    """SAM 2 through transformers, prompted with a box; of its masks the one with the highest score.

    Args:
        model: Hub id; the authors use the large one (tiny, small and base-plus exist).
        device: where it runs.
    """

    def __init__(self, model: str = "facebook/sam2-hiera-large", device: str = "cpu") -> None:
        from transformers import Sam2Model, Sam2Processor

        self.processor = Sam2Processor.from_pretrained(model)
        self.model = Sam2Model.from_pretrained(model).to(device).eval()
        self.device = device

    @torch.no_grad()
    def __call__(self, image: Image.Image, bbox: Bbox) -> np.ndarray:
        """bool [H, W] of the object in a box (x, y, width, height)."""
        x, y, w, h = bbox
        inputs = self.processor(images=image, input_boxes=[[[x, y, x + w, y + h]]], return_tensors="pt").to(self.device)
        output = self.model(**inputs, multimask_output=True)
        masks = self.processor.post_process_masks(output.pred_masks.cpu(), inputs["original_sizes"].cpu())[0][0]
        return masks[int(output.iou_scores[0, 0].argmax())].numpy() > 0


def write_masks(
    folder: str | os.PathLike[str],
    segment: Callable[[Image.Image, Bbox], np.ndarray],
    *,
    process: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> int:
    """Write the objects' masks of a data set folder; those that are there already are kept.

    Args:
        folder: what `ScopEngine` wrote.
        segment: (picture, bbox) -> bool [H, W]; `Sam2Segmenter()` as the authors.
        process: which of `processes` this is; it takes every `processes`-th pair.
        processes: how many share the work.
        progress: show a bar where the output is a terminal.

    Returns:
        Masks written.
    """
    root = Path(folder)
    records = ScopDataset(root).records[process::processes]
    written = 0
    for record in tqdm(records, desc="masks", unit="pair", disable=None if progress else True):
        missing = [
            (path, annotation["bbox"])
            for path, annotation in zip(mask_paths(root, record), record["annots"], strict=True)
            if not path.exists()
        ]
        if not missing:
            continue
        image = open_image(root / record["file_name"])
        for path, bbox in missing:
            mask = np.asarray(segment(image, bbox))
            if mask.shape != (image.height, image.width):
                raise InvalidInputError(
                    f"the segmenter gave a mask of {list(mask.shape)} for a picture of {[image.height, image.width]}"
                )
            with atomic_path(path) as temporary:
                Image.fromarray(mask.astype(bool).astype(np.uint8) * 255).save(temporary, "PNG")
            written += 1
    return written
