"""Whole evaluations of a tokenizer or a generator in the lab world, behind `vistok evaluate` and `vistok reproduce`.

Both return a plain dictionary that can go to JSON as it is. Every share comes with its Wilson interval at 95 %, every
mean with a normal one, every Frechet distance with the evaluator, reference, sample counts, resizing and settings.

Held-out scenes come from streams that no recipe can draw from: recipes take seeds below 2**31 and validate on streams
from 2**40 to 2**40 + 2**31.

Shape letters: B images, H rows and W columns of pixels.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistok.data.photographs import open_photograph
from vistok.data.shapes import CLASS_NAMES, Scene, image_to_tensor, render, sample_scene
from vistok.data.shapes.captions import describe
from vistok.data.shapes.dataset import caption_generator
from vistok.data.shapes.oracle import Reading, read_scenes
from vistok.errors import InvalidInputError

from .accuracy import caption_accuracy, class_accuracy, oracle_agreement
from .frechet import LAB_EXTRACTOR, FrechetDistance
from .reconstruction import psnr, ssim

__all__ = [
    "HELD_OUT_SEED",
    "class_requests",
    "describe_sampling",
    "evaluate_generator",
    "evaluate_tokenizer",
    "held_out_images",
    "image_generators",
    "reference_images",
    "relation_captions",
    "sample_images",
    "sampler_settings",
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
        reconstructions[chunk] = model.decode(tokens, **_draws(model, chunk.start, chunk.stop)).float().cpu()
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
        decoded = model.decode(model.encode(pixels.to(model.device)), **_draws(model, 0, 1)).float().cpu()
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


# ---------------------------------------------------------------------------------------------------------- generators
SAMPLER_DEFAULTS = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def sampler_settings(pipeline: Any, sampling: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every setting of the sampler: what is asked for, else the checkpoint's default, else the plain distribution."""
    plain = getattr(pipeline.generator, "sampling_defaults", SAMPLER_DEFAULTS)
    own = pipeline.config.get("sampling") or {}
    settings = {**plain, **own, **(sampling or {})}
    return {name: value for name, value in settings.items() if value is not None}


def describe_sampling(sampling: Mapping[str, Any]) -> str:
    """Sampler settings in one line, for printing beside a distance."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in sampling.items()) or "the model's defaults"


def image_generators(seed: int, start: int, stop: int) -> list[torch.Generator]:
    """One generator for each of the pictures `start` to `stop - 1`; its draws depend on `seed` and the number alone."""
    # torch's CPU generator reads 32 bits of a seed only; a prime step keeps the streams of near seeds apart.
    return [torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**32) for number in range(start, stop)]


def _draws(tokenizer: Any, start: int, stop: int) -> dict[str, Any]:
    """The argument that makes a tokenizer which decodes by sampling (FlexTok) repeat itself; nothing for the others."""
    return {"generator": image_generators(0, start, stop)} if hasattr(tokenizer, "denoise") else {}


def sample_images(
    pipeline: Any,
    requests: Sequence[int] | Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 50,
    sampling: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
    what: str = "sampling",
    on_images: Pictures | None = None,
) -> Tensor:
    """One picture for each request. Picture i draws from a generator seeded by `seed` and i alone, whatever the batch.

    Args:
        pipeline: generation pipeline.
        requests: classes (numbers) or captions.
        seed: of the draws.
        batch_size: pictures a batch.
        sampling: arguments of the pipeline's call (`guidance_scale`, `temperature`, `top_k`, `top_p`).
        on_progress, on_images: called after each batch; `what` names it.

    Returns:
        float32 [B, 3, H, W] in [-1, 1].
    """
    parts = []
    with _without_bar(pipeline):
        for chunk in _chunks(len(requests), batch_size):
            asked = list(requests[chunk])
            draws = image_generators(seed, chunk.start, chunk.stop)
            wanted: dict[str, Any] = {"prompt": asked} if isinstance(asked[0], str) else {"class_labels": asked}
            images = pipeline(**wanted, generator=draws, output_type="pt", **(sampling or {})).images
            parts.append(images.float().cpu() * 2 - 1)
            if on_images is not None:
                on_images(what, parts[-1])
            if on_progress is not None:
                on_progress(what, chunk.stop, len(requests))
    return torch.cat(parts)


@contextmanager
def _without_bar(pipeline: Any) -> Iterator[None]:
    """Silence the pipeline's own progress bar, which would start anew for every batch."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def reference_images(count: int, image_size: int, kind: str = "class", seed: int = REFERENCE_SEED) -> Tensor:
    """Real scenes that a kind of request is compared with, [B, 3, H, W] in [-1, 1].

    Args:
        count: number of scenes.
        image_size: side in pixels.
        kind: `"class"` (one object, the classes in turn), `"one_object"` or `"two_objects"`.
        seed: stream of scenes.
    """
    number = 2 if kind == "two_objects" else 1
    return held_out_images(
        [sample_scene(seed, index, number, **_fixed(kind, index)) for index in range(count)], image_size
    )


def _distances(
    samples: Tensor, kind: str, what: str, pipeline: Any, extractor: str | nn.Module, sampler: str
) -> dict[str, Any]:
    """Frechet distances of samples, of other real scenes, and of these after the tokenizer, to one reference."""
    size = samples.shape[-1]
    distance = FrechetDistance(extractor, reference=f"held-out scenes, {what}, {size}x{size}")
    distance.add_reference(reference_images(len(samples), size, kind))
    real = reference_images(len(samples), size, kind, BASELINE_SEED)
    tokenizer = pipeline.tokenizer
    results = {}
    for name, images in (("fid", samples), ("fid_of_real_scenes", real), ("fid_of_the_tokenizer", None)):
        if images is None:
            with torch.no_grad():
                coded = [
                    tokenizer.decode(tokenizer.encode(part.to(tokenizer.device)), **_draws(tokenizer, 0, len(part)))
                    for part in real.split(50)
                ]
            images = torch.cat([part.float().cpu() for part in coded])
        distance.reset_samples()
        distance.add_samples(images)
        how = {"fid": sampler, "fid_of_real_scenes": "renderer", "fid_of_the_tokenizer": "encode, decode"}[name]
        results[name] = distance.compute(sampler=how).to_dict()
    return results


def evaluate_generator(
    pipeline: Any,
    *,
    num_samples: int = 1000,
    seed: int = 0,
    sampling: Mapping[str, Any] | None = None,
    extractor: str | nn.Module | None = LAB_EXTRACTOR,
    batch_size: int = 50,
    on_progress: Progress | None = None,
    on_images: Pictures | None = None,
) -> dict[str, Any]:
    """Judge whether a generator of lab scenes shows what it is asked for, and how near its pictures are to real scenes.

    A class-conditional generator is asked for every class in turn. A text-conditional one gets captions of held-out
    scenes: of one object, and of two objects with their relation.

    Args:
        pipeline: generation pipeline of the lab world.
        num_samples: pictures of each kind of request, at least 2.
        seed: of the draws.
        sampling: settings of the sampler; None takes the checkpoint's own.
        extractor: for the Frechet distances (see `FrechetDistance`); None leaves them out.
        batch_size: pictures a batch.
        on_progress: called with what is done, images done, images in all.
        on_images: called with `"class"`, `"one object"` or `"two objects"` and each batch of pictures.

    Returns:
        For each kind of request (`class`; or `one_object` and `two_objects`) the shares of `class_accuracy` or
        `caption_accuracy`, `fid` of the samples, `fid_of_real_scenes` (other real scenes: the least that this many
        samples can reach) and `fid_of_the_tokenizer` (these encoded and decoded); `settings`; `seconds`.

    Raises:
        InvalidInputError: if the generator is no generator of lab scenes.
    """
    if num_samples < 2:
        raise InvalidInputError(f"num_samples must be at least 2, got {num_samples}")
    started = time.perf_counter()
    settings = sampler_settings(pipeline, sampling)
    sampler = describe_sampling({**settings, "seed": seed})
    report: dict[str, Any] = {"kind": "generator"}
    for kind, requests in _requests(pipeline, num_samples).items():
        title = kind.replace("_", " ")
        images = sample_images(
            pipeline,
            requests,
            seed=seed,
            batch_size=batch_size,
            sampling=settings,
            on_progress=on_progress,
            what=title,
            on_images=on_images,
        )
        readings = _read(images, on_progress, f"reading {title}")
        shares = (
            class_accuracy(readings, [request for request in requests if isinstance(request, int)])
            if kind == "class"
            else caption_accuracy(readings, [str(request) for request in requests])
        )
        report[kind] = {name: share.to_dict() for name, share in shares.items()}
        if extractor is not None:
            what = "one object of each class in turn" if kind == "class" else title
            report[kind].update(_distances(images, kind, what, pipeline, extractor, sampler))
    report["settings"] = {"num_samples": num_samples, "seed": seed, "caption_seed": HELD_OUT_SEED, **settings}
    report["seconds"] = time.perf_counter() - started
    return report


def _requests(pipeline: Any, count: int) -> dict[str, list[int] | list[str]]:
    """What to ask of a generator, by kind."""
    config = pipeline.generator.config
    if getattr(config, "caption_dim", None) is not None:
        return {"one_object": single_captions(count), "two_objects": relation_captions(count)}
    if config.num_classes != len(CLASS_NAMES):
        raise InvalidInputError(
            f"this generator knows {config.num_classes} classes, but the lab world has {len(CLASS_NAMES)}: the oracle "
            "judges generators of lab scenes only"
        )
    return {"class": class_requests(count)}


def _fixed(kind: str, index: int) -> dict[str, str]:
    """What a reference scene must show: the classes in turn, as asked of the generator."""
    if kind != "class":
        return {}
    colour, shape = CLASS_NAMES[index % len(CLASS_NAMES)].split()
    return {"colour": colour, "shape": shape}
