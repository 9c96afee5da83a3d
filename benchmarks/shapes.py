"""Measure the lab world: scenes/s, the oracle exact on fresh scenes, its agreement on imperfect images, images/s.

    python benchmarks/shapes.py [--scenes 5000] [--imperfect 500] [--seed 2024] [--output FILE]

Rates are per second of CPU time of this one process (OMP_NUM_THREADS=1), so that a busy machine does not distort them.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from vistok.data import shapes

ATTRIBUTES = ("shape", "colour", "size", "shade")


def compare(scene: shapes.Scene, reading: shapes.Reading) -> dict[str, bool]:
    """Which kinds of attributes the reading has right for every object; all False where the count differs."""
    if len(scene.objects) != len(reading.objects):
        return dict.fromkeys(("count", *ATTRIBUTES, "centre", "all"), False)
    right = dict.fromkeys(("count", *ATTRIBUTES, "centre"), True)
    for item in scene.objects:
        seen = min(reading.objects, key=lambda other: math.dist(other.centre, item.centre))
        right["centre"] &= math.dist(seen.centre, item.centre) < 0.03
        for name in ATTRIBUTES:
            right[name] &= getattr(seen, name) == getattr(item, name)
    return {**right, "all": all(right.values())}


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def noise(image: np.ndarray, deviation: float) -> np.ndarray:
    rng = np.random.default_rng(int(image.sum()))
    return np.clip(image + rng.normal(0.0, deviation, image.shape), 0, 255).astype(np.uint8)


SPOILT: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "blur 1 px": (64, lambda image: ndimage.gaussian_filter(image, (1.0, 1.0, 0.0))),
    "blur 1.5 px": (64, lambda image: ndimage.gaussian_filter(image, (1.5, 1.5, 0.0))),
    "blur 2 px": (64, lambda image: ndimage.gaussian_filter(image, (2.0, 2.0, 0.0))),
    "noise 8": (64, lambda image: noise(image, 8.0)),
    "noise 16": (64, lambda image: noise(image, 16.0)),
    "noise 25": (64, lambda image: noise(image, 25.0)),
    "jpeg 75": (64, lambda image: jpeg(image, 75)),
    "jpeg 40": (64, lambda image: jpeg(image, 40)),
    "jpeg 20": (64, lambda image: jpeg(image, 20)),
    "32x32": (32, lambda image: image),
    "48x48": (48, lambda image: image),
    "128x128": (128, lambda image: image),
    "256x256": (256, lambda image: image),
}


def measure(seed: int, count: int, num_objects: int | None, image_size: int = 64, spoil=lambda image: image) -> dict:
    total: dict[str, int] = {}
    confidence: dict[bool, list[float]] = {True: [], False: []}
    spent = 0.0
    for scene in shapes.sample_scenes(seed, count, num_objects=num_objects):
        image = spoil(shapes.render(scene, image_size))
        start = time.process_time()
        reading = shapes.read_scene(image)
        spent += time.process_time() - start
        right = compare(scene, reading)
        confidence[right["all"]].append(reading.confidence)
        for name, value in right.items():
            total[name] = total.get(name, 0) + value
    result = {name: value / count for name, value in total.items()}
    result["images_per_cpu_second"] = count / spent
    result["confidence_right"] = float(np.mean(confidence[True])) if confidence[True] else None
    result["confidence_wrong"] = float(np.mean(confidence[False])) if confidence[False] else None
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=5000, help="fresh scenes for each number of objects")
    parser.add_argument("--imperfect", type=int, default=500, help="scenes for each way to spoil them")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results: dict[str, dict] = {}
    for num_objects in (1, 2, 3, None):
        start = time.process_time()
        for scene in shapes.sample_scenes(options.seed, 2000, num_objects=num_objects):
            shapes.render(scene, 64)
        rate = 2000 / (time.process_time() - start)
        print(f"render 64x64, {num_objects or '1-3'} objects: {rate:.0f} scenes/s", flush=True)
        results[f"render {num_objects or '1-3'}"] = {"scenes_per_cpu_second": rate}
    for num_objects in (1, 2, 3):
        results[f"clean {num_objects}"] = measure(options.seed, options.scenes, num_objects)
        print(f"clean, {num_objects} objects: {results[f'clean {num_objects}']}", flush=True)
    for name, (image_size, spoil) in SPOILT.items():
        results[name] = measure(options.seed + 1, options.imperfect, None, image_size, spoil)
        print(f"{name}: {results[name]}", flush=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
