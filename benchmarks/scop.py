"""How fast the data engine reads annotations and judges pairs: annotations a second, in one process and in two.

    python -m benchmarks.scop [--images 20000] [--processes 1 2] [--repeats 3]

The file is drawn, with the size of COCO's images and its mean number of boxes (7.3 an image; 117,266 images of 2017
train hold 860,001). `plain` judges one pair after the other in Python over the whole file in memory; it must keep the
same pairs. It checks nothing and writes nothing, where the engine checks every annotation, reports on every rule, and
writes metadata that survives an interruption. Neither copies pictures: that measures the disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plain.controllers import select_pairs_plainly
from benchmarks.timing import bars, save
from vistok.controllers import ScopEngine
from vistok.controllers.scop.constraints import Thresholds

RESULTS = Path(__file__).parent / "results"
MEAN_BOXES = 7.3
CATEGORIES = 80
SIDE = (640, 480)


def write_annotations(path: Path, images: int, seed: int = 0) -> int:
    """A COCO-style file of random boxes; returns how many annotations it holds."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    for image in range(images):
        for _ in range(max(1, int(rng.poisson(MEAN_BOXES)))):
            width, height = (float(round(side * rng.beta(0.8, 2.5), 2)) + 1.0 for side in SIDE)
            left, top = float(rng.uniform(0, SIDE[0] - width)), float(rng.uniform(0, SIDE[1] - height))
            outline = [round(float(value), 2) for value in rng.uniform(0, 480, 24)]  # what makes such files long
            annotations.append(
                {
                    "segmentation": [outline],
                    "area": width * height,
                    "iscrowd": 0,
                    "image_id": image,
                    "bbox": [round(left, 2), round(top, 2), width, height],
                    "category_id": int(rng.integers(1, CATEGORIES + 1)),
                    "id": len(annotations) + 1,
                }
            )
    content = {
        "images": [
            {"id": image, "file_name": f"{image:012d}.jpg", "width": SIDE[0], "height": SIDE[1]}
            for image in range(images)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": f"thing {number}"} for number in range(1, CATEGORIES + 1)],
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return len(annotations)


def plain(path: Path) -> int:
    """Kept pairs, judged one by one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    limits = Thresholds()
    grouped: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        grouped.setdefault(annotation["image_id"], []).append(annotation)
    return sum(
        len(
            select_pairs_plainly(
                [one["bbox"] for one in grouped.get(image["id"], [])],
                [one["category_id"] for one in grouped.get(image["id"], [])],
                image["width"],
                image["height"],
                limits,
            )
        )
        for image in content["images"]
    )


def engine(path: Path, output: Path, process: int = 0, processes: int = 1) -> int:
    """Kept pairs, with the metadata written."""
    return ScopEngine(path).run(output, process=process, processes=processes, progress=False).kept


def measure(path: Path, processes: Sequence[int], repeats: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds on the clock of each variant, in turn, and the pairs that each keeps."""
    seconds: dict[str, list[float]] = {}
    kept: dict[str, int] = {}
    for _ in range(repeats):
        started = time.perf_counter()
        kept["plain"] = plain(path)
        seconds.setdefault("plain", []).append(time.perf_counter() - started)
        for count in processes:
            name = f"vistok, {count} process{'es' if count > 1 else ''}"
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                if count == 1:
                    engine(path, Path(folder))
                else:
                    # Forked: starting Python anew is no work of the engine.
                    workers = [
                        multiprocessing.get_context("fork").Process(
                            target=engine, args=(path, Path(folder), rank, count)
                        )
                        for rank in range(count)
                    ]
                    for worker in workers:
                        worker.start()
                    for worker in workers:
                        worker.join()
                seconds.setdefault(name, []).append(time.perf_counter() - started)
                # All parts are there: this only adds up their reports.
                kept[name] = engine(path, Path(folder))
    return seconds, kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "scop")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instances.json"
        annotations = write_annotations(path, given.images)
        size = path.stat().st_size
        seconds, kept = measure(path, given.processes, given.repeats)
    rows = {
        name: {
            "seconds": statistics.median(values),
            "annotations_per_second": annotations / statistics.median(values),
            "kept": kept[name],
        }
        for name, values in seconds.items()
    }
    print(f"{annotations:,} annotations of {given.images:,} images, {size / 2**20:.0f} MiB")
    for name, row in rows.items():
        print(f"  {name:<22} {row['annotations_per_second']:>11,.0f} annotations/s {row['kept']:>9,} pairs kept")
    settings = {"images": given.images, "annotations": annotations, "bytes": size, "repeats": given.repeats}
    save(given.output.with_suffix(".json"), {"settings": settings, "rows": rows})
    bars(
        given.output.with_suffix(".png"),
        {"SCOP": {name: row["annotations_per_second"] for name, row in rows.items()}},
        "annotations a second",
        f"{annotations:,} drawn annotations in the size of COCO's; metadata only",
    )


if __name__ == "__main__":
    main()
