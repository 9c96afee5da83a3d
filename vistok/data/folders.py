"""Folders of images with classes or captions.

Letters: H, W image height and width.

A folder is read in one of two ways, `labels="auto"` chooses:

- **classes**: `root/<class>/**/<image>`; the class index is the position of the subfolder's name in sorted order.
- **captions**: `root/**/<image>` with the words in `<image stem>.txt` beside the image, or in `metadata.jsonl` at the
  root, one `{"file_name": "a/b.png", "text": "..."}` a line (the Hugging Face `imagefolder` convention; `caption` is
  accepted for `text`).

Damaged images cost a warning, not a run: see `ImageFolder`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from vistok.errors import InvalidInputError
from vistok.files import open_image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
Transform = Callable[[Image.Image], torch.Tensor]


def square_tensor(image: Image.Image, image_size: int) -> torch.Tensor:
    """Scale the shorter side to `image_size`, crop the centre square: float32 [3, H, W] in [-1, 1]."""
    width, height = image.size
    scale = image_size / min(width, height)
    size = (max(image_size, round(width * scale)), max(image_size, round(height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    image = image.crop((left, top, left + image_size, top + image_size))
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


class ImageFolder(Dataset):
    """Images of a folder as `{"image": float32 [3, H, W] in [-1, 1], "label": int}` or with `"caption": str`.

    An image that cannot be read is skipped: the next readable one takes its place, a warning names it once, and
    `unreadable` lists what this process has met so far. `check()` reads every image beforehand and drops the bad ones.

    Args:
        root: the folder.
        image_size: side of the square images; the centre is cropped. Ignored if `transform` is given.
        labels: `"classes"`, `"captions"`, `"none"` (images only), or `"auto"`: captions where `metadata.jsonl` or a
            text file beside an image exists, else classes where every image lies in a subfolder, else none.
        transform: own conversion of an upright RGB PIL image to a tensor.

    Raises:
        InvalidInputError: if the folder is missing, holds no images, or lacks the asked labels.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int = 256,
        *,
        labels: Literal["auto", "classes", "captions", "none"] = "auto",
        transform: Transform | None = None,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise InvalidInputError(f"no folder at {self.root}; expected a folder of images")
        if image_size < 1:
            raise InvalidInputError(f"image_size must be at least 1 pixel, got {image_size}")
        if labels not in ("auto", "classes", "captions", "none"):
            raise InvalidInputError(f"labels must be 'auto', 'classes', 'captions' or 'none', got {labels!r}")
        self.image_size = image_size
        self.transform = transform
        self.paths = sorted(
            path
            for path in self.root.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")
        )
        if not self.paths:
            raise InvalidInputError(
                f"{self.root} holds no images; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        self.class_names: tuple[str, ...] = ()
        self.captions: dict[Path, str] = {}
        self.unreadable: dict[Path, str] = {}
        if labels in ("auto", "captions"):
            self.captions = _captions(self.root, self.paths)
        if labels == "captions" and not self.captions:
            raise InvalidInputError(
                f"{self.root} holds no captions; expected metadata.jsonl (file_name, text), or .txt files beside images"
            )
        in_subfolders = all(path.parent != self.root for path in self.paths)
        if labels == "classes" and not in_subfolders:
            stray = next(path for path in self.paths if path.parent == self.root)
            raise InvalidInputError(f"{stray} lies in no class folder; expected {self.root}/<class>/<image>")
        if self.captions:
            without = [path for path in self.paths if path not in self.captions]
            if without:
                warnings.warn(
                    f"{len(without)} of {len(self.paths)} images in {self.root} have no caption and are left out "
                    f"(first: {without[0]})",
                    stacklevel=2,
                )
            self.paths = [path for path in self.paths if path in self.captions]
        elif labels == "classes" or (labels == "auto" and in_subfolders):
            self.class_names = tuple(sorted({self._class_name(path) for path in self.paths}))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self.paths) <= index < len(self.paths):
            raise IndexError(f"index {index} is out of range for {len(self.paths)} images")
        for offset in range(len(self.paths)):
            path = self.paths[(index + offset) % len(self.paths)]
            if path in self.unreadable:
                continue
            try:
                return self._item(path)
            except InvalidInputError as error:
                self._report(path, error)
        raise InvalidInputError(f"none of the {len(self.paths)} images in {self.root} can be read")

    def check(self) -> int:
        """Read every image once, drop those that cannot be read, and return how many were dropped."""
        for path in self.paths:
            if path not in self.unreadable:
                try:
                    open_image(path)
                except InvalidInputError as error:
                    self._report(path, error)
        before = len(self.paths)
        self.paths = [path for path in self.paths if path not in self.unreadable]
        if not self.paths:
            raise InvalidInputError(f"none of the {before} images in {self.root} can be read")
        return before - len(self.paths)

    def _item(self, path: Path) -> dict[str, Any]:
        image = open_image(path)
        tensor = square_tensor(image, self.image_size) if self.transform is None else self.transform(image)
        item: dict[str, Any] = {"image": tensor}
        if self.captions:
            item["caption"] = self.captions[path]
        elif self.class_names:
            item["label"] = self.class_names.index(self._class_name(path))
        return item

    def _class_name(self, path: Path) -> str:
        return path.relative_to(self.root).parts[0]

    def _report(self, path: Path, error: Exception) -> None:
        self.unreadable[path] = str(error)
        warnings.warn(f"skipped an image ({len(self.unreadable)} so far): {error}", stacklevel=3)


def _captions(root: Path, paths: list[Path]) -> dict[Path, str]:
    """Caption of each image that has one; `metadata.jsonl` wins over text files."""
    captions: dict[Path, str] = {}
    for path in paths:
        beside = path.with_suffix(".txt")
        if beside.is_file():
            try:
                captions[path] = " ".join(beside.read_text(encoding="utf-8").split())
            except UnicodeDecodeError as error:
                raise InvalidInputError(f"{beside} is not UTF-8 text ({error})") from error
    metadata = root / "metadata.jsonl"
    if metadata.is_file():
        known = set(paths)
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = row["file_name"], row["text"] if "text" in row else row["caption"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InvalidInputError(
                    f'{metadata} line {number}: expected {{"file_name": "...", "text": "..."}}, got {line[:80]!r}'
                ) from error
            if root / name not in known:
                raise InvalidInputError(f"{metadata} line {number} names {name!r}, but no such image lies in {root}")
            captions[root / name] = str(text)
    return captions
