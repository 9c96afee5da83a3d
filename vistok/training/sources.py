"""Training data: every sample is a function of (seed, its number), so any step of any run can be drawn again.

A source answers `batch(numbers)`: sample numbers in, a dictionary of stacked tensors and lists out. Numbers run on for
ever; sources with a finite set shuffle it anew each epoch. Images stay uint8 until they are on the training device.

Shape letters: B samples, H rows and W columns of pixels, N tokens an image.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Sampler

from vistok.data.photographs import PHOTOGRAPHS, open_photograph
from vistok.errors import InvalidInputError
from vistok.files import atomic_path, open_image

from .recipe import (
    FolderRecipe,
    Recipe,
    ShapesCaptionsRecipe,
    ShapesImagesRecipe,
    ShapesMeaningsRecipe,
    ShapesPairsRecipe,
    ShapesQuestionsRecipe,
    ShapesSEEDRecipe,
    ShapesTokensRecipe,
    ShardsRecipe,
)

__all__ = [
    "FolderImages",
    "ShapesImages",
    "ShapesMoments",
    "ShapesTokens",
    "ShardImages",
    "Source",
    "StepBatches",
    "draw_latents",
    "encode_images",
    "open_source",
]

IMAGE_KEYS = ("png", "jpg", "jpeg", "webp")
# What a tokenizer can make of a scene: files of the token cache and keys of a batch.
ENCODED = ("ids", "moments", "pivot_moments")
# Streams of lab scenes that training never draws from.
HELD_OUT_STREAM = 2**40
# Each scene has several wordings, one an epoch, from full descriptions to bare ones.
ATTRIBUTE_DROPOUT = (0.0, 0.25, 0.5, 0.75)


class Source(Protocol):
    """What the trainer needs of a data source."""

    def batch(self, numbers: np.ndarray) -> dict[str, Any]:
        """The samples of these numbers: `images` uint8 [B, 3, H, W] or `ids` int64 [B, N]; `labels` int64 [B] and
        `captions` (list of B texts) where the source has them."""
        ...


class StepBatches(Dataset):
    """The batches of one process, by number of the forward pass.

    Optimiser step s takes the samples s * batch_size up to (s + 1) * batch_size whatever the number of processes and
    accumulation steps, which only divide them.
    """

    def __init__(self, source: Source, batch_size: int, accumulation: int, rank: int, processes: int) -> None:
        self.source, self.accumulation = source, accumulation
        self.rank, self.processes = rank, processes
        self.size = batch_size // (accumulation * processes)

    def __getitem__(self, forward: int) -> dict[str, Any]:
        first = (forward * self.processes + self.rank) * self.size
        return self.source.batch(np.arange(first, first + self.size, dtype=np.int64))


class Forwards(Sampler):
    """Numbers of the forward passes still to do."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop - self.start


class Epochs:
    """Which of `size` items sample number n takes: a new permutation each epoch, a function of (seed, n)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        chosen = np.empty_like(numbers)
        epochs = numbers // self.size
        for epoch in np.unique(epochs):
            if epoch != self._epoch:
                self._epoch = int(epoch)
                self._order = np.random.default_rng((self.seed, self._epoch)).permutation(self.size)
            here = epochs == epoch
            chosen[here] = self._order[numbers[here] % self.size]
        return chosen


class PhotoCrops:
    """Random crops of photographs: log-uniform scale, mirrored or turned, with changed colours."""

    def __init__(self, images: Sequence[Image.Image], size: int) -> None:
        self.size = size
        # Halved copies: cutting a large crop from the full picture and shrinking it would cost ten times the rest.
        self.pyramids: list[list[Image.Image]] = []
        for image in images:
            levels = [image]
            while min(levels[-1].size) >= 4 * size:
                levels.append(levels[-1].reduce(2))
            self.pyramids.append(levels)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One crop, uint8 [H, W, 3]."""
        levels = self.pyramids[int(rng.integers(len(self.pyramids)))]
        width, height = levels[0].size
        smallest, largest = min(self.size, width, height), min(width, height)
        side = smallest * (largest / smallest) ** rng.random()
        left, top = rng.random() * (width - side), rng.random() * (height - side)
        level = min(len(levels) - 1, max(0, int(np.log2(side / self.size))))
        picture = levels[level]
        scale = picture.width / width
        box = (left * scale, top * scale, (left + side) * scale, (top + side) * scale)
        box = (box[0], box[1], min(box[2], picture.width), min(box[3], picture.height))
        crop = np.asarray(picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < 0.25:
            crop = crop.transpose(1, 0, 2)
        if rng.random() < 0.5:  # a dozen photographs show few colours: permuted channels show six times as many
            crop = crop[:, :, rng.permutation(3)]
        if rng.random() < 0.5:
            gain, offset = 0.6 + 0.8 * rng.random(3), 60.0 * (rng.random(3) - 0.5)
            crop = np.clip((crop - 127.5) * gain + 127.5 + offset, 0.0, 255.0)
        return crop.astype(np.uint8)


class ShapesImages:
    """Lab scenes mixed with photograph crops (see `ShapesImagesRecipe`)."""

    def __init__(self, recipe: ShapesImagesRecipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        self.crops: PhotoCrops | None = None
        self.pool: np.ndarray | None = None
        self.order: Epochs | None = None
        unknown = sorted(set(recipe.held_out_photos) - set(PHOTOGRAPHS))
        if unknown:
            raise InvalidInputError(f"data.held_out_photos: no photograph {unknown}; known: {', '.join(PHOTOGRAPHS)}")
        if recipe.photo_ratio:
            names = [name for name in PHOTOGRAPHS if name not in recipe.held_out_photos]
            if not names:
                raise InvalidInputError("data.held_out_photos leaves no photograph to train on")
            self.crops = PhotoCrops([open_photograph(name) for name in names], recipe.image_size)
        if recipe.scenes:
            self.pool = np.stack([self.render(number) for number in range(recipe.scenes)])
            self.order = Epochs(recipe.scenes, seed)

    def scene(self, number: int) -> Any:
        """Scene `number` of this training's stream."""
        from vistok.data.shapes import sample_scene

        objects = self.recipe.objects
        if (
            self.recipe.single_ratio
            and np.random.default_rng((self.seed, number, 1)).random() < self.recipe.single_ratio
        ):
            objects = (objects[0], objects[0])
        return sample_scene(self.seed, number, objects)

    def render(self, number: int) -> np.ndarray:
        """Its pixels, uint8 [H, W, 3]."""
        from vistok.data.shapes import render

        return render(self.scene(number), self.recipe.image_size)

    def batch(self, numbers: np.ndarray) -> dict[str, Any]:
        """uint8 images [B, 3, H, W], and `objects` if the recipe asks for annotations."""
        scenes = numbers if self.order is None else self.order(numbers)
        pictures = []
        for number, scene in zip(numbers.tolist(), scenes.tolist(), strict=True):
            if self.crops is not None:
                rng = np.random.default_rng((self.seed, number))
                if rng.random() < self.recipe.photo_ratio:
                    pictures.append(self.crops.draw(rng))
                    continue
            pictures.append(self.render(scene) if self.pool is None else self.pool[scene])
        found: dict[str, Any] = {"images": torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()}
        if self.recipe.annotations:
            from vistok.metrics.features import scene_targets

            found["objects"] = scene_targets([self.scene(number) for number in scenes.tolist()])
        return found


def image_batch(pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 [H, W, 3] pictures as one float batch [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class ShapesMoments:
    """Lab scenes and photograph crops as a KL tokenizer's moments, from memory maps (see `ShapesImagesRecipe`)."""

    def __init__(self, folder: Path, recipe: ShapesImagesRecipe, seed: int) -> None:
        self.folder = folder
        self.names = ["moments"] + (["teacher_features"] if recipe.teacher else [])
        self.order = Epochs(recipe.scenes, seed)
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:  # workers map the files themselves instead of receiving a copy
        return {**self.__dict__, "_maps": {}}

    def batch(self, numbers: np.ndarray) -> dict[str, Any]:
        """`moments` float32 [B, 2C, h, w], and `teacher_features` [B, F, rows, columns] if there is a teacher."""
        if not self._maps:
            self._maps = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in self.names}
        chosen = self.order(numbers)
        return {name: torch.from_numpy(held[chosen].astype(np.float32)) for name, held in self._maps.items()}


class ShapesTokens:
    """Lab scenes as tokenizer ids or moments, read from memory maps (see `ShapesTokensRecipe`)."""

    def __init__(self, folder: Path, recipe: ShapesTokensRecipe, seed: int) -> None:
        self.folder, self.condition = folder, recipe.condition
        self.labels = np.load(folder / "labels.npy")
        self.captions: list[list[str]] = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        self.order = Epochs(recipe.scenes, seed)
        self.names = [name for name in ENCODED if (folder / f"{name}.npy").is_file()]
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:  # workers map the files themselves instead of receiving a copy
        return {**self.__dict__, "_maps": {}}

    def encoded(self, name: str) -> np.ndarray:
        """One of `ENCODED`, of all scenes."""
        if name not in self._maps:
            self._maps[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._maps[name]

    def batch(self, numbers: np.ndarray) -> dict[str, Any]:
        """`ids` int64 [B, N] or `moments` float32 [B, 2C, h, w] (and `pivot_moments`), and `labels` or `captions`."""
        chosen = self.order(numbers)
        found: dict[str, Any] = {}
        for name in self.names:
            values = self.encoded(name)[chosen]
            found[name] = torch.from_numpy(values.astype(np.int64 if name == "ids" else np.float32))
        if self.condition == "class":
            found["labels"] = torch.from_numpy(self.labels[chosen].astype(np.int64))
        else:
            epochs = (numbers // self.order.size).tolist()
            found["captions"] = [
                self.captions[scene][(epoch + scene) % len(ATTRIBUTE_DROPOUT)]
                for scene, epoch in zip(chosen.tolist(), epochs, strict=True)
            ]
        return found


def fingerprint(model: nn.Module) -> str:
    """A hash of a network's weights: what it made is kept under this name."""
    digest = hashlib.sha256()
    given = getattr(model, "_autoencoder", None)  # a FlexTok's tokens also depend on the latents it was given
    for part in [model] if given is None else [model, given]:
        for name, value in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode_images(tokenizer: Any, images: Tensor, pivot_size: int = 0) -> dict[str, Tensor]:
    """What generators are trained on.

    Args:
        tokenizer: VQ or KL model.
        images: [B, 3, H, W] in [-1, 1].
        pivot_size: side of the images' small copies, for KL models; 0 makes none.

    Returns:
        `ids` int64 [B, N], or `moments` [B, 2C, h, w] and, with a pivot size, `pivot_moments`.

    Raises:
        InvalidInputError: pivots were asked of a tokenizer with a codebook.
    """
    with torch.no_grad():
        if not hasattr(tokenizer, "moments"):
            if pivot_size:
                raise InvalidInputError(f"data.pivot_size needs a KL tokenizer; got {type(tokenizer).__name__}")
            return {"ids": tokenizer.encode(images).ids}
        found = {"moments": tokenizer.moments(images)}
        if pivot_size:
            # As Hi-MAR does: bicubic, without antialiasing.
            small = functional.interpolate(images, size=(pivot_size, pivot_size), mode="bicubic", align_corners=False)
            found["pivot_moments"] = tokenizer.moments(small.clamp(-1, 1))
        return found


def draw_latents(tokenizer: Any, batch: dict[str, Any]) -> None:
    """Replace `moments` of a batch by scaled latents [B, C, h, w] drawn from them, `pivot_moments` likewise."""
    for name in ("", "pivot_"):
        moments = batch.pop(f"{name}moments", None)
        if moments is not None:
            tokens = tokenizer.tokens_from_moments(moments, sample=True)
            batch[f"{name}latents"] = tokenizer.latents_from_tokens(tokens)


def encode_pictures(
    recipe: ShapesImagesRecipe,
    tokenizer: Any,
    seed: int,
    cache: Path,
    *,
    device: torch.device,
    batch_size: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Encode the first `recipe.scenes` samples of an image source, scenes and crops alike, by a KL tokenizer, once.

    Arguments as in `encode_scenes`.

    Returns:
        Folder with `moments.npy` float16 [scenes, 2C, h, w], and `teacher_features.npy` float16 [scenes, F, rows,
        columns] if there is a teacher.
    """
    teacher = None if recipe.teacher is None else _teacher(recipe.teacher).to(device)
    networks = [fingerprint(network) for network in (tokenizer, teacher) if network is not None]
    key = json.dumps([asdict(recipe), seed, *networks], sort_keys=True)
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    if (folder / "moments.npy").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    source = ShapesImages(replace(recipe, scenes=0), seed)
    parts, seen = [], []
    for first in range(0, recipe.scenes, batch_size):
        numbers = np.arange(first, min(first + batch_size, recipe.scenes), dtype=np.int64)
        images = source.batch(numbers)["images"].to(device).float() / 127.5 - 1.0
        parts.append(encode_images(tokenizer, images)["moments"].to(torch.float16).cpu().numpy())
        if teacher is not None:
            with torch.no_grad():
                seen.append(teacher.feature_map(images).to(torch.float16).cpu().numpy())
        if on_progress is not None:
            on_progress(first + len(numbers), recipe.scenes)
    for name, arrays in (("teacher_features", seen), ("moments", parts)):  # the last one says that all are there
        if arrays:
            with atomic_path(folder / f"{name}.npy") as path:
                np.save(path, np.concatenate(arrays))
    return folder


def _teacher(name: str) -> Any:
    """A network with a `feature_map`."""
    from vistok import hub

    network = hub.load(name)
    if not hasattr(network, "feature_map"):
        raise InvalidInputError(
            f"data.teacher: {name} is a {type(network).__name__} and has no feature map; the lab's is features-shapes"
        )
    return network


def encode_scenes(
    recipe: ShapesTokensRecipe,
    tokenizer: Any,
    stream: int,
    cache: Path,
    *,
    device: torch.device,
    batch_size: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Encode the scenes of a recipe once.

    The folder's name depends on scenes and tokenizer weights, so that a changed tokenizer never meets old tokens.

    Args:
        recipe: which scenes.
        tokenizer: VQ or KL model.
        stream: seed of the scenes.
        cache: folder of all token files.
        device: where the tokenizer runs.
        batch_size: images a forward pass.
        on_progress: called with (scenes done, scenes).

    Returns:
        Folder with `ids.npy` int32 [scenes, N], or `moments.npy` (and `pivot_moments.npy`) float16 [scenes, 2C, h, w];
        `labels.npy` int64 [scenes] (class of the first object) and `captions.json` (lists of wordings).
    """
    from vistok.data.shapes import caption, render, sample_scene

    key = json.dumps([asdict(recipe) | {"condition": None}, stream, fingerprint(tokenizer)], sort_keys=True)
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    if (folder / "labels.npy").is_file():  # written last
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [sample_scene(stream, number, recipe.objects) for number in range(recipe.scenes)]
    parts: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(scenes), batch_size):
        pictures = [render(scene, recipe.image_size) for scene in scenes[first : first + batch_size]]
        for name, value in encode_images(tokenizer, image_batch(pictures).to(device), recipe.pivot_size).items():
            kept = value.to(torch.int32 if name == "ids" else torch.float16)
            parts.setdefault(name, []).append(kept.cpu().numpy())
        if on_progress is not None:
            on_progress(first + len(pictures), len(scenes))
    texts = []
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng((stream, number))
        texts.append([caption(scene, rng, attribute_dropout=share) for share in ATTRIBUTE_DROPOUT])
    for name, values in parts.items():
        with atomic_path(folder / f"{name}.npy") as path:
            np.save(path, np.concatenate(values))
    with atomic_path(folder / "captions.json") as path:
        path.write_text(json.dumps(texts), encoding="utf-8")
    with atomic_path(folder / "labels.npy") as path:
        np.save(path, np.array([scene.label for scene in scenes], dtype=np.int64))
    return folder


class RandomCrops:
    """Random crops whose side is the picture's short side divided by 1..`crop_ratio`, half of them mirrored."""

    def __init__(self, image_size: int, crop_ratio: float, flip: bool) -> None:
        self.image_size, self.crop_ratio, self.flip = image_size, crop_ratio, flip

    def draw(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """One crop, uint8 [H, W, 3]."""
        side = min(image.size) / (1 + (self.crop_ratio - 1) * rng.random())
        left, top = rng.random() * (image.width - side), rng.random() * (image.height - side)
        size = (self.image_size, self.image_size)
        crop = image.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        pixels = np.asarray(crop)
        return pixels[:, ::-1] if self.flip and rng.random() < 0.5 else pixels


def _as_it_is(image: Image.Image) -> Any:
    return image


class FolderImages:
    """Random crops of a folder's images with their classes or captions (see `FolderRecipe`)."""

    def __init__(self, recipe: FolderRecipe, seed: int) -> None:
        from vistok.data.folders import ImageFolder

        self.folder = ImageFolder(recipe.path, recipe.image_size, transform=_as_it_is)
        self.crops = RandomCrops(recipe.image_size, recipe.crop_ratio, recipe.flip)
        self.order, self.seed = Epochs(len(self.folder), seed), seed

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or nothing."""
        return self.folder.class_names

    def batch(self, numbers: np.ndarray) -> dict[str, Any]:
        """`images` uint8 [B, 3, H, W], and `labels` or `captions` where the folder has them."""
        items = [self.folder[index] for index in self.order(numbers).tolist()]
        return _crop_batch(items, numbers, self.crops, self.seed)


class ShardImages:
    """Random crops from tar shards, read at any position through an index of the members (see `ShardsRecipe`).

    A sample that cannot be read becomes a grey picture with `valid` 0, which the generators' losses leave out.
    """

    def __init__(self, recipe: ShardsRecipe, seed: int) -> None:
        from vistok.data.shards import ShardDataset

        self.dataset = ShardDataset(recipe.pattern, recipe.image_size, transform=_as_it_is)
        self.crops = RandomCrops(recipe.image_size, recipe.crop_ratio, recipe.flip)
        # Of each sample: its shard, and where in it each of its files lies.
        self.samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
        for shard in self.dataset.shards:
            self.samples += [(shard, files) for files in _tar_index(shard)]
        if not self.samples:
            raise InvalidInputError(
                f"{recipe.pattern} holds no images; expected files ending in {', '.join(IMAGE_KEYS)}"
            )
        self.order, self.seed = Epochs(len(self.samples), seed), seed

    def batch(self, numbers: np.ndarray) -> dict[str, Any]:
        """`images` uint8 [B, 3, H, W], `valid` float [B], and `labels` or `captions` where the shards have them."""
        items = [self._read(*self.samples[index]) for index in self.order(numbers).tolist()]
        found = _crop_batch(items, numbers, self.crops, self.seed)
        found["valid"] = torch.tensor([item["valid"] for item in items])
        return found

    def _read(self, shard: str, files: dict[str, tuple[int, int]]) -> dict[str, Any]:
        parts = {}
        with open(shard, "rb") as file:
            for suffix, (start, size) in files.items():
                file.seek(start)
                parts[suffix] = file.read(size)
        item: dict[str, Any] = {"valid": 1.0}
        try:
            if "cls" in parts:
                item["label"] = int(parts["cls"])
            if "txt" in parts:
                item["caption"] = parts["txt"].decode()
            picture = next(parts[suffix] for suffix in IMAGE_KEYS if suffix in parts)
            item["image"] = open_image(Image.open(io.BytesIO(picture)))
        except (InvalidInputError, OSError, ValueError, SyntaxError):
            side = self.crops.image_size
            item = {"label": 0, "caption": "", **item, "valid": 0.0, "image": Image.new("RGB", (side, side), "grey")}
        return item


def _tar_index(shard: str) -> list[dict[str, tuple[int, int]]]:
    """Samples of a tar file that hold an image: suffix -> (offset, bytes) of each of their files."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    samples.setdefault(f"{folder}/{stem}", {})[suffix.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise InvalidInputError(f"{shard} cannot be read as an uncompressed tar file: {error}") from error
    return [files for files in samples.values() if any(suffix in files for suffix in IMAGE_KEYS)]


def _crop_batch(items: list[dict[str, Any]], numbers: np.ndarray, crops: RandomCrops, seed: int) -> dict[str, Any]:
    pictures = []
    for item, number in zip(items, numbers.tolist(), strict=True):
        pictures.append(crops.draw(item["image"], np.random.default_rng((seed, number))))
    found: dict[str, Any] = {"images": torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()}
    if all("label" in item for item in items):
        found["labels"] = torch.tensor([item["label"] for item in items])
    if all("caption" in item for item in items):
        found["captions"] = [item["caption"] for item in items]
    return found


def open_source(
    recipe: Recipe,
    *,
    tokenizer: Any,
    cache: Path,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> Source:
    """The data source of a recipe.

    Args:
        recipe: the recipe.
        tokenizer: encodes lab scenes; None for sources that give images.
        cache: where encoded scenes are kept.
        device: where the tokenizer runs.
        on_progress: called with (scenes done, scenes) while encoding.
    """
    data = recipe.data
    if isinstance(data, ShapesImagesRecipe):
        if data.scenes and hasattr(tokenizer, "moments"):
            folder = encode_pictures(data, tokenizer, recipe.seed, cache, device=device, on_progress=on_progress)
            return ShapesMoments(folder, data, recipe.seed)
        if data.teacher is not None:
            raise InvalidInputError("data.teacher goes with a KL tokenizer, whose latents are encoded once")
        return ShapesImages(data, recipe.seed)
    if isinstance(data, ShapesTokensRecipe):
        folder = encode_scenes(data, tokenizer, recipe.seed, cache, device=device, on_progress=on_progress)
        return ShapesTokens(folder, data, recipe.seed)
    if isinstance(data, ShapesPairsRecipe):
        from .pairs import open_pairs

        return open_pairs(data, tokenizer, recipe.seed, cache, device=device, on_progress=on_progress)
    if isinstance(data, ShapesCaptionsRecipe):
        from .seed import ShapesCaptions

        return ShapesCaptions(data, recipe.seed)
    if isinstance(data, ShapesMeaningsRecipe):
        from .caption_encoder import CaptionMeanings

        return CaptionMeanings(data, recipe.seed)
    if isinstance(data, ShapesSEEDRecipe):
        from .seed import open_seed

        return open_seed(data, recipe.seed, tokenizer, cache, device=device, on_progress=on_progress)
    if isinstance(data, ShapesQuestionsRecipe):
        from .lvlm import ShapesQuestions

        return ShapesQuestions(data, recipe.seed)
    if isinstance(data, FolderRecipe):
        return FolderImages(data, recipe.seed)
    return ShardImages(data, recipe.seed)
