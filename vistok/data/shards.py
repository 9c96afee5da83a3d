"""webdataset shards: tar files of images with classes or captions, streamed in order of the disk.

Letters: H, W image height and width.

A sample is a group of files with one stem: `000012.png` (or jpg, jpeg, webp) with `000012.cls` (class index),
`000012.txt` (caption) or `000012.json` (anything else). Needs the extra `train`.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from PIL import Image
from torch.utils.data import IterableDataset

from vistok.data.folders import Transform, square_tensor
from vistok.errors import InvalidInputError, require
from vistok.files import atomic_path, open_image

IMAGE_KEYS = ("png", "jpg", "jpeg", "webp")


def write_shards(
    samples: Iterable[dict[str, Any]],
    pattern: str | os.PathLike[str],
    *,
    samples_per_shard: int = 1000,
    image_format: str = "png",
) -> list[Path]:
    """Write samples into shards; each shard appears under its name only when it is whole.

    Args:
        samples: dictionaries with `image` (PIL image, or float [3, H, W] in [-1, 1]) and any of `label` (int),
            `caption` (str), `json` (what the json module can write).
        pattern: path with one `%d`-style number, such as `"train-%05d.tar"`.
        samples_per_shard: samples in each shard; the last may hold fewer.
        image_format: one of `IMAGE_KEYS`; png and webp keep every pixel, jpeg does not.

    Returns:
        The shards' paths in order.

    Raises:
        MissingExtraError: without webdataset.
        InvalidInputError: for a pattern without a number, an unknown format, a sample without image, or no samples.
    """
    webdataset = require("webdataset", "train")
    text = os.fspath(pattern)
    place = re.search(r"%\d*d", text)
    if place is None:
        raise InvalidInputError(f"pattern needs a number such as %05d, got {text!r}; for example 'train-%05d.tar'")
    if image_format not in IMAGE_KEYS:
        raise InvalidInputError(f"image_format must be one of {', '.join(IMAGE_KEYS)}, got {image_format!r}")
    if samples_per_shard < 1:
        raise InvalidInputError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    written: list[Path] = []
    waiting = iter(samples)
    index = itertools.count()
    while (first := next(waiting, None)) is not None:
        target = Path(f"{text[: place.start()]}{place.group() % len(written)}{text[place.end() :]}")
        with atomic_path(target) as temporary, webdataset.TarWriter(str(temporary)) as writer:
            for sample in itertools.chain([first], itertools.islice(waiting, samples_per_shard - 1)):
                number = next(index)
                writer.write({"__key__": f"{number:09d}", **_encoded(sample, image_format, number)})
        written.append(target)
    if not written:
        raise InvalidInputError("there are no samples to write")
    return written


def _encoded(sample: dict[str, Any], image_format: str, number: int) -> dict[str, bytes]:
    image = sample.get("image")
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise InvalidInputError(f"sample {number}: expected an image [3, H, W], got shape {list(image.shape)}")
        pixels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    if not isinstance(image, Image.Image):
        raise InvalidInputError(f"sample {number} has no image: expected a PIL image or a tensor under 'image'")
    buffer = io.BytesIO()
    options = {"lossless": True} if image_format == "webp" else {"quality": 95} if image_format != "png" else {}
    image.convert("RGB").save(buffer, "JPEG" if image_format in ("jpg", "jpeg") else image_format.upper(), **options)
    parts = {image_format: buffer.getvalue()}
    if "label" in sample:
        parts["cls"] = str(int(sample["label"])).encode()
    if "caption" in sample:
        parts["txt"] = str(sample["caption"]).encode()
    if "json" in sample:
        parts["json"] = json.dumps(sample["json"]).encode()
    return parts


class ShardDataset(IterableDataset):
    """Streams `{"image": float32 [3, H, W] in [-1, 1], "label"?: int, "caption"?: str, "json"?: Any}` from shards.

    Shards are divided among ranks and workers, each shard read by one of them, so give at least as many shards as
    there are workers. An image that cannot be read is skipped with a warning; `unreadable` counts those of this
    process. A truncated shard yields what it holds, then a warning.

    Args:
        shards: paths, or a pattern with wildcards (`*`) or braces (`train-{00000..00009}.tar`).
        image_size: side of the square images (centre crop). Ignored if `transform` is given.
        shuffle_buffer: samples held to shuffle within a worker; 0 keeps the order.
        seed: of the shuffle.
        transform: own conversion of an upright RGB PIL image to a tensor.

    Raises:
        MissingExtraError: without webdataset.
        InvalidInputError: if no shard is found.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        image_size: int = 256,
        *,
        shuffle_buffer: int = 0,
        seed: int = 0,
        transform: Transform | None = None,
    ) -> None:
        require("webdataset", "train")
        self.shards = _expand(shards)
        self.image_size = image_size
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.transform = transform
        self.unreadable = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        webdataset = require("webdataset", "train")
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if together else 0
        world_size = torch.distributed.get_world_size() if together else 1
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        mine = self.shards[rank * workers + worker :: world_size * workers]
        if not mine:
            return
        pipeline: Iterable[dict[str, Any]] = webdataset.WebDataset(
            mine, shardshuffle=False, nodesplitter=None, workersplitter=None, handler=self._skip, empty_check=False
        )
        if self.shuffle_buffer > 0:
            pipeline = pipeline.shuffle(self.shuffle_buffer, seed=self.seed)  # type: ignore[attr-defined]
        for sample in pipeline:
            try:
                yield self._decoded(sample)
            except InvalidInputError as error:
                self._skip(error)

    def _skip(self, error: Exception) -> bool:
        self.unreadable += 1
        warnings.warn(f"skipped a sample ({self.unreadable} so far): {error}", stacklevel=2)
        return True

    def _decoded(self, sample: dict[str, Any]) -> dict[str, Any]:
        key = next((name for name in IMAGE_KEYS if name in sample), None)
        if key is None:
            raise InvalidInputError(
                f"sample {sample['__key__']!r} of {sample.get('__url__')} has no image ({', '.join(IMAGE_KEYS)})"
            )
        try:
            image = open_image(Image.open(io.BytesIO(sample[key])))
        except (OSError, ValueError, SyntaxError) as error:
            raise InvalidInputError(f"sample {sample['__key__']!r} of {sample.get('__url__')}: {error}") from error
        tensor = square_tensor(image, self.image_size) if self.transform is None else self.transform(image)
        item: dict[str, Any] = {"image": tensor}
        try:
            if "cls" in sample:
                item["label"] = int(sample["cls"])
            if "txt" in sample:
                item["caption"] = sample["txt"].decode()
            if "json" in sample:
                item["json"] = json.loads(sample["json"])
        except ValueError as error:
            raise InvalidInputError(f"sample {sample['__key__']!r} of {sample.get('__url__')}: {error}") from error
        return item


def _expand(shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    patterns = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    found: list[str] = []
    for pattern in patterns:
        for name in _braces(os.fspath(pattern)):
            paths = sorted(glob(name)) if any(sign in name for sign in "*?[") else [name]
            missing = [path for path in paths if not Path(path).is_file()]
            if missing or not paths:
                raise InvalidInputError(f"no shard at {missing[0] if missing else name}; expected .tar files")
            found += paths
    if not found:
        raise InvalidInputError("no shards were given; expected paths of .tar files or a pattern such as 'train-*.tar'")
    return found


def _braces(pattern: str) -> list[str]:
    span = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if span is None:
        return [pattern]
    low, high = span.groups()
    return [
        pattern[: span.start()] + str(number).zfill(len(low)) + pattern[span.end() :]
        for number in range(int(low), int(high) + 1)
    ]
