"""Whole evaluations of a tokenizer or a generator in the lab world, behind `vistok evaluate` and `vistok reproduce`.

Both return a plain dictionary that can go to JSON as it is. Every share comes with its Wilson interval at 95 %, every mean
with a normal one, every Frechet distance with the evaluator, reference, sample counts, resizing and sampler settings.

Held-out scenes come from streams that no recipe can draw from (recipes take seeds below 2**31 and validate at 2**40 and up).

Shape letters: B images, H rows and W columns of pixels.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vistok.data.shapes import CLASS_NAMES, Scene, image_to_tensor, render, sample_scene
from vistok.data.shapes.captions import describe
from vistok.data.shapes.dataset import caption_generator
from vistok.data.shapes.oracle import Reading, read_scenes
from vistok.errors import InvalidInputError, require
from vistok.files import open_image

from .accuracy import caption_accuracy, class_accuracy, oracle_agreement
from .frechet import LAB_EXTRACTOR, FrechetDistance
from .reconstruction import psnr, ssim

__all__ = [
    "HELD_OUT_SEED",
    "class_requests",
    "evaluate_generator",
    "evaluate_tokenizer",
    "held_out_images",
    "open_photograph",
    "photographs",
    "relation_captions",
    "sample_images",
    "single_captions",
]

HELD_OUT_SEED = 2**41
REFERENCE_SEED = 2**41 + 1  # distances are taken to other scenes than those whose captions were asked for
BASELINE_SEED = 2**41 + 2  # real scenes judged like samples: the least distance that this many samples can reach

Progress = Callable[[str, int, int], None]  # what is being done, images done, images in all
Pictures = Callable[[str, Tensor], None]  # what they are, images [B, 3, H, W] in [-1, 1]


# ------------------------------------------------------------------------------------------------------ held-out data
def held_out_images(scenes: Sequence[Scene], image_size: int) -> Tensor:
    """Rendered scenes [B, 3, H, W] in [-1, 1]."""
    return torch.stack([image_to_tensor(render(scene, image_size)) for scene in scenes])


def photographs() -> list[str]:
    """Names of the pictures in scikit-image's wheel, which `open_photograph` takes.

    Raises:
        MissingExtraError: without scikit-image (extra `eval`).
    """
    folder = Path(str(require("skimage.data", "eval").__file__)).parent
    return sorted(file.stem for file in folder.iterdir() if file.suffix in (".png", ".jpg"))


def open_photograph(name: str, longest_side: int | None = None) -> Image.Image:
    """A picture that scikit-image ships, or a file.

    Args:
        name: such as `"coffee"`, or a path.
        longest_side: scale larger pictures down to this; None keeps them.

    Raises:
        InvalidInputError: neither a shipped picture (it lists them) nor a readable file.
    """
    folder = Path(str(require("skimage.data", "eval").__file__)).parent
    shipped = [file for file in (folder / f"{name}.png", folder / f"{name}.jpg") if file.is_file()]
    if not shipped and not Path(name).is_file():
        raise InvalidInputError(f"no photograph {name!r}: give a file, or one of {', '.join(photographs())}")
    picture = open_image(shipped[0] if shipped else name)
    if longest_side is not None and max(picture.size) > longest_side:
        picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    return picture


def class_requests(count: int) -> list[int]:
    """Classes to ask for: all in turn, so that each is asked equally often."""
    return [number % len(CLASS_NAMES) for number in range(count)]


def single_captions(count: int, seed: int = HELD_OUT_SEED) -> list[str]:
    """Captions of held-out scenes of one object, in all wordings of the grammar that name a colour."""
    captions = []
    for index in range(count):
        scene = sample_scene(seed, index, 1)
        words = describe(scene, caption_generator(seed, index))
        captions.append(str(replace(words, objects=(replace(words.objects[0], colour=scene.objects[0].colour),))))
    return captions


def relation_captions(count: int, seed: int = HELD_OUT_SEED) -> list[str]:
    """Captions of held-out scenes of two objects, each with its colour, and always with their relation."""
    captions = []
    for index in range(count):
        scene = sample_scene(seed, index, 2)
        words = describe(scene, caption_generator(seed, index))
        objects = tuple(replace(phrase, colour=item.colour) for phrase, item in zip(words.objects, scene.objects))
        captions.append(str(replace(words, objects=objects, relation=scene.relation(0, 1))))
    return captions


# ------------------------------------------------------------------------------------------------------------- helpers
def _mean(values: Tensor) -> dict[str, float]:
    """Mean with its normal 95 % interval, and the number of values."""
    values = values.double()
    mean = float(values.mean())
    half = 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"value": mean, "low": mean - half, "high": mean + half, "total": len(values)}


def _read(images: Tensor, progress: Progress | None, what: str) -> list[Reading]:
    readings: list[Reading] = []
    for batch in images.split(50):
        readings += read_scenes(batch)
        if progress is not None:
            progress(what, len(readings), len(images))
    return readings


def _chunks(total: int, size: int) -> Iterator[slice]:
    for first in range(0, total, size):
        yield slice(first, min(total, first + size))


# ---------------------------------------------------------------------------------------------------------- tokenizers
@torch.no_grad()
def evaluate_tokenizer(
    model: Any,
    *,
    num_images: int = 1000,
    image_size: int = 64,
    photographs: Sequence[str | os.PathLike[str]] = (),
    photograph_size: int = 512,
    extractor: str | nn.Module | None = LAB_EXTRACTOR,
    batch_size: int = 50,
    on_progress: Progress | None = None,
    on_images: Pictures | None = None,
) -> dict[str, Any]:
    """Judge what a tokenizer keeps of held-out scenes and of photographs.

    Args:
        model: tokenizer with `encode`, `decode` and `preprocess`.
        num_images: held-out scenes of one to three objects, at least 2.
        image_size: their side in pixels.
        photographs: names of pictures that scikit-image ships, or files.
        photograph_size: larger photographs are scaled down to this longest side.
        extractor: for the Frechet distance (see `FrechetDistance`); None leaves it out.
        batch_size: images a forward pass.
        on_progress: called with what is done, images done, images in all.
        on_images: called with `"originals"` and `"reconstructions"` of each batch, `"photograph NAME"` and
            `"reconstruction NAME"` of each photograph.

    Returns:
        `psnr` in dB and `ssim` of the scenes; `codebook` (`usage`, `used`, `size`, `perplexity`; for models with ids);
        `agreement` of the oracle's readings before and after, see `oracle_agreement`; `fid`; `photographs` (`psnr`,
        `ssim`, `width`, `height` by name); `settings`; `seconds`.
    """
    if num_images < 2:
        raise InvalidInputError(f"num_images must be at least 2, got {num_images}")
    started = time.perf_counter()
    scenes = [sample_scene(HELD_OUT_SEED, index) for index in range(num_images)]
    originals = held_out_images(scenes, image_size)
    reconstructions = torch.empty_like(originals)
    parts = []
    for chunk in _chunks(num_images, batch_size):
        tokens = model.encode(originals[chunk].to(model.device))
        parts.append(tokens.to("cpu"))
        reconstructions[chunk] = model.decode(tokens).float().cpu()
        if on_images is not None:
            on_images("originals", originals[chunk])
            on_images("reconstructions", reconstructions[chunk])
        if on_progress is not None:
            on_progress("reconstructing scenes", chunk.stop, num_images)
    report: dict[str, Any] = {
        "kind": "tokenizer",
        "psnr": _mean(psnr(reconstructions, originals)),
        "ssim": _mean(ssim(reconstructions, originals)),
        "tokens_per_image": parts[0].num_tokens,
    }
    if parts[0].ids is not None and hasattr(model, "codebook_report"):
        codebook = model.codebook_report(parts)
        size = int(model.codebook_size)
        report["codebook"] = {
            "usage": codebook.usage,
            "used": round(codebook.usage * size),
            "size": size,
            "perplexity": codebook.perplexity,
            "tokens": num_images * parts[0].num_tokens,
        }
    before = _read(originals, on_progress, "reading originals")
    after = _read(reconstructions, on_progress, "reading reconstructions")
    report["agreement"] = {name: share.to_dict() for name, share in oracle_agreement(before, after).items()}
    if extractor is not None:
        reference = f"the same held-out scenes before the tokenizer, {image_size}x{image_size}, 1 to 3 objects"
        distance = FrechetDistance(extractor, reference=reference)
        distance.add_reference(originals)
        distance.add_samples(reconstructions)
        report["fid"] = distance.compute(sampler="encode, decode").to_dict()
    report["photographs"] = {}
    for number, name in enumerate(photographs):
        picture = open_photograph(os.fspath(name), photograph_size)
        pixels = model.preprocess(picture)
        decoded = model.decode(model.encode(pixels.to(model.device))).float().cpu()
        label = Path(name).stem
        report["photographs"][label] = {
            "psnr": float(psnr(decoded, pixels)),
            "ssim": float(ssim(decoded, pixels)),
            "width": pixels.shape[-1],
            "height": pixels.shape[-2],
        }
        if on_images is not None:
            on_images(f"photograph {label}", pixels)
            on_images(f"reconstruction {label}", decoded)
        if on_progress is not None:
            on_progress("reconstructing photographs", number + 1, len(photographs))
    report["settings"] = {
        "num_images": num_images,
        "image_size": image_size,
        "scene_seed": HELD_OUT_SEED,
        "photograph_size": photograph_size,
    }
    report["seconds"] = time.perf_counter() - started
    return report
