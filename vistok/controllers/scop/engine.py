"""The data engine: annotations in, unambiguous captioned pairs out; resumable, and shared among processes.

The images are cut into parts of a fixed number. A part is written under its name only when it is whole, so a run that
was stopped continues with the next missing part, and several processes take every k-th part each.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from vistok.errors import InvalidInputError, require
from vistok.files import atomic_path, write_text_atomic

from .annotations import AnnotatedImage, AnnotationFile
from .captions import caption_of
from .constraints import CONSTRAINTS, Thresholds, judge, pair_indices, relations

__all__ = ["PairRecord", "ScopEngine", "ScopReport", "select_pairs"]


@dataclass(frozen=True)
class PairRecord:
    """One kept pair.

    Attributes:
        sequence: index of the pair among the kept ones of its image.
        image: the image.
        numbers: places of both annotations in the file.
        relations: (object, relation, object) in the authors' order.
    """

    sequence: int
    image: AnnotatedImage
    numbers: tuple[int, int]
    relations: list[tuple[str, str, str]]


@dataclass
class ScopReport:
    """What the engine saw and what each rule took away.

    Attributes:
        images: images with usable boxes.
        boxes: usable boxes.
        small_boxes: boxes under the minimal area.
        pairs: pairs of the remaining boxes.
        failed: rule -> pairs that break it (a pair may break several).
        failed_first: rule -> pairs that this rule is the first one to reject, in the order of the rules.
        failed_alone: rule -> pairs that only this rule rejects.
        kept: pairs that pass.
        kept_images: images with at least one such pair.
        problems: what was wrong with the annotations -> how often.
        missing_images: pairs left out because their picture was not found.
    """

    images: int = 0
    boxes: int = 0
    small_boxes: int = 0
    pairs: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    failed_first: Counter[str] = field(default_factory=Counter)
    failed_alone: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    kept_images: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    missing_images: int = 0

    def add(self, other: ScopReport) -> None:
        """Sum up."""
        for name in ("images", "boxes", "small_boxes", "pairs", "kept", "kept_images", "missing_images"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("failed", "failed_first", "failed_alone", "problems"):
            getattr(self, name).update(getattr(other, name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScopReport:
        """The opposite of `to_dict`."""
        plain: dict[str, Any] = {
            name: Counter(value) if isinstance(value, dict) else value for name, value in values.items()
        }
        return cls(**plain)

    def __str__(self) -> str:
        lines = [
            f"{self.images} images, {self.boxes} boxes, {self.small_boxes} of them too small",
            f"{self.pairs} pairs, {self.kept} kept in {self.kept_images} images",
            "rule                  breaks it   first to reject   only one to reject",
        ]
        lines += [
            f"{name:<22}{self.failed[name]:>9}{self.failed_first[name]:>18}{self.failed_alone[name]:>21}"
            for name in CONSTRAINTS
        ]
        if self.missing_images:
            lines.append(f"{self.missing_images} pairs were left out: their picture was not found")
        lines += [f"{count} x {problem}" for problem, count in self.problems.most_common()]
        return "\n".join(lines)


def select_pairs(
    images: Sequence[AnnotatedImage], categories: dict[Any, str], thresholds: Thresholds
) -> tuple[list[PairRecord], ScopReport]:
    """The unambiguous pairs of some images, in the authors' order, and what was rejected why."""
    report = ScopReport(images=len(images), boxes=sum(len(image.boxes) for image in images))
    sizes = [np.array([box.bbox[2] * box.bbox[3] for box in image.boxes]) for image in images]
    kept_boxes = [
        [box for box, area in zip(image.boxes, areas, strict=True) if area >= thresholds.min_area]
        for image, areas in zip(images, sizes, strict=True)
    ]
    counts = [len(boxes) for boxes in kept_boxes]
    report.small_boxes = report.boxes - sum(counts)
    first, second, image_index = pair_indices(counts)
    report.pairs = len(first)
    if not len(first):
        return [], report
    flat = [box for boxes in kept_boxes for box in boxes]
    numbers = {key: index for index, key in enumerate(categories)}
    table = judge(
        np.array([box.bbox for box in flat], dtype=np.float64),
        np.array([numbers[box.category] for box in flat]),
        first,
        second,
        np.array([image.width * image.height for image in images], dtype=np.float64)[image_index],
        thresholds,
    )
    broken = ~table.verdicts
    alone = broken.sum(axis=1) == 1
    earliest = np.where(broken.any(axis=1), broken.argmax(axis=1), -1)
    for column, name in enumerate(CONSTRAINTS):
        report.failed[name] = int(broken[:, column].sum())
        report.failed_alone[name] = int((broken[:, column] & alone).sum())
        report.failed_first[name] = int((earliest == column).sum())
    records: list[PairRecord] = []
    sequence: Counter[int] = Counter()
    for pair in np.flatnonzero(table.kept):
        one, two, where = flat[first[pair]], flat[second[pair]], int(image_index[pair])
        forward, backward = relations(one.bbox, two.bbox)
        names = categories[one.category], categories[two.category]
        triples = [(names[0], phrase, names[1]) for phrase in forward]
        triples += [(names[1], phrase, names[0]) for phrase in backward]
        records.append(PairRecord(sequence[where], images[where], (one.number, two.number), triples))
        sequence[where] += 1
    report.kept, report.kept_images = len(records), len(sequence)
    return records, report


class ScopEngine:
    """Builds a spatial data set from box annotations (CoMPaSS, section 3).

        report = ScopEngine("coco/", images="coco/train2017").run("scop/")
        print(report)

    Args:
        annotations: path, see `AnnotationFile`, or such an object.
        images: folder or zip of the pictures; None writes metadata only.
        thresholds: see there.
        layout: `folder` (`metadata.jsonl` and `images/`, as the authors) or `webdataset` (`pairs-*.tar`, one sample a
            pair: picture, `json`, and a caption as `txt`).
        picture: how a folder gets its pictures: `link` (relative symbolic links), `copy`, or `none`.
        images_per_part: images that are written together.
        split: see `AnnotationFile`.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str] | AnnotationFile,
        images: str | os.PathLike[str] | None = None,
        *,
        thresholds: Thresholds | None = None,
        layout: str = "folder",
        picture: str = "link",
        images_per_part: int = 1000,
        split: str = "train2017",
    ) -> None:
        if layout not in ("folder", "webdataset"):
            raise InvalidInputError(f"layout must be 'folder' or 'webdataset', got {layout!r}")
        if picture not in ("link", "copy", "none"):
            raise InvalidInputError(f"picture must be 'link', 'copy' or 'none', got {picture!r}")
        if images_per_part < 1:
            raise InvalidInputError(f"images_per_part must be at least 1, got {images_per_part}")
        if layout == "webdataset":
            require("webdataset", "train")
            if images is None:
                raise InvalidInputError("webdataset shards hold pictures: say where they are with images=")
        self.annotations = (
            annotations if isinstance(annotations, AnnotationFile) else AnnotationFile(annotations, split=split)
        )
        self.images = None if images is None else Path(images)
        if self.images is not None and not self.images.exists():
            raise InvalidInputError(f"there are no pictures at {images}")
        self.thresholds = thresholds or Thresholds()
        self.layout, self.picture, self.images_per_part = layout, picture, images_per_part
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[str, str] = {}

    def records(self) -> Iterator[PairRecord]:
        """The kept pairs as a stream, without writing anything."""
        images = self.annotations.images()
        for start in range(0, len(images), self.images_per_part):
            yield from select_pairs(
                images[start : start + self.images_per_part], self.annotations.categories, self.thresholds
            )[0]

    def run(
        self,
        output: str | os.PathLike[str],
        *,
        process: int = 0,
        processes: int = 1,
        progress: bool = True,
    ) -> ScopReport:
        """Write the data set; parts that are there already are kept.

        Args:
            output: folder.
            process: which of `processes` this is, from 0; it writes every `processes`-th part.
            processes: how many share the work. The one that finds all parts written joins them (`folder` layout).
            progress: show a bar where the output is a terminal.

        Returns:
            The report over all parts that are there.

        Raises:
            InvalidInputError: if the folder holds a data set of other settings, or of other annotations.
        """
        if not 0 <= process < processes:
            raise InvalidInputError(f"process must be in 0..{processes - 1}, got {process}")
        out = Path(output)
        parts = out / "parts"
        parts.mkdir(parents=True, exist_ok=True)
        images = self.annotations.images()
        self._claim(out, len(images))
        count = (len(images) + self.images_per_part - 1) // self.images_per_part
        # First the verdicts, so that one second pass over the annotations fetches every entry that is needed.
        waiting: dict[int, tuple[list[PairRecord], ScopReport]] = {}
        for index in range(process, count, processes):
            if not (parts / f"{index:05d}.report.json").exists():
                chosen = images[index * self.images_per_part : (index + 1) * self.images_per_part]
                waiting[index] = select_pairs(chosen, self.annotations.categories, self.thresholds)
        entries = (
            self.annotations.full(
                {number for records, _ in waiting.values() for record in records for number in record.numbers}
            )
            if waiting
            else {}
        )
        with tqdm(waiting.items(), desc="spatial pairs", unit="part", disable=None if progress else True) as bar:
            for index, (records, report) in bar:
                self._write_part(out, index, records, report, entries)
        total = ScopReport()
        written = [parts / f"{index:05d}.report.json" for index in range(count)]
        for path in written:
            if path.exists():
                total.add(ScopReport.from_dict(json.loads(path.read_text(encoding="utf-8"))))
        total.problems = Counter(self.annotations.problems)
        if all(path.exists() for path in written):
            self._join(out, count)
            write_text_atomic(out / "report.json", json.dumps(total.to_dict(), indent=1))
        return total

    def _claim(self, out: Path, images: int) -> None:
        settings = {
            "thresholds": asdict(self.thresholds),
            "layout": self.layout,
            "images_per_part": self.images_per_part,
            "images": images,
            "annotations": self.annotations.path.name,
        }
        path = out / "settings.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name, value in settings.items() if before.get(name) != value]
            if other:
                raise InvalidInputError(
                    f"{out} holds a data set made with other {', '.join(other)}; choose another folder, or delete it"
                )
        else:
            write_text_atomic(path, json.dumps(settings, indent=1))

    def _write_part(
        self, out: Path, index: int, records: Sequence[PairRecord], report: ScopReport, entries: dict[int, Any]
    ) -> None:
        lines: list[str] = []
        samples: list[dict[str, Any]] = []
        left_out = 0
        for record in records:
            name = Path(record.image.file_name).name
            if self.images is not None and self.picture != "none" and not self._has(record.image.file_name):
                left_out += 1
                continue
            line = {
                "seq": record.sequence,
                "file_name": f"images/{name}",
                "oros": [list(triple) for triple in record.relations],
                "annots": [entries[number] for number in record.numbers],
            }
            lines.append(json.dumps(line, separators=(",", ":")))
            if self.layout == "webdataset":
                samples.append(
                    {
                        "__key__": f"{Path(name).stem.replace('.', '_')}_{record.sequence:04d}",
                        Path(name).suffix.lstrip(".").lower() or "jpg": self._bytes(record.image.file_name),
                        "json": lines[-1].encode(),
                        "txt": caption_of(*record.relations[0]).encode(),
                    }
                )
            elif self.images is not None and self.picture != "none":
                self._place(out / "images" / name, record.image.file_name)
        if self.layout == "webdataset":
            webdataset = require("webdataset", "train")
            target = out / f"pairs-{index:05d}.tar"
            if samples:
                with atomic_path(target) as temporary, webdataset.TarWriter(str(temporary)) as writer:
                    for sample in samples:
                        writer.write(sample)
        else:
            write_text_atomic(out / "parts" / f"{index:05d}.jsonl", "".join(line + "\n" for line in lines))
        report.missing_images = left_out
        report.kept -= left_out
        # Written last: a part counts as done by its report.
        write_text_atomic(out / "parts" / f"{index:05d}.report.json", json.dumps(report.to_dict()))

    def _join(self, out: Path, count: int) -> None:
        if self.layout != "folder":
            return
        with atomic_path(out / "metadata.jsonl") as temporary, open(temporary, "wb") as file:
            for index in range(count):
                with open(out / "parts" / f"{index:05d}.jsonl", "rb") as part:
                    shutil.copyfileobj(part, file)

    def _open_archive(self) -> zipfile.ZipFile:
        assert self.images is not None
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.images)
            self._members = {Path(name).name: name for name in self._archive.namelist()}
        return self._archive

    def _has(self, name: str) -> bool:
        assert self.images is not None
        if self.images.suffix == ".zip":
            self._open_archive()
            return Path(name).name in self._members
        return (self.images / Path(name).name).is_file() or (self.images / name).is_file()

    def _source(self, name: str) -> Path:
        assert self.images is not None
        direct = self.images / name
        return direct if direct.is_file() else self.images / Path(name).name

    def _bytes(self, name: str) -> bytes:
        assert self.images is not None
        if self.images.suffix == ".zip":
            return self._open_archive().read(self._members[Path(name).name])
        return self._source(name).read_bytes()

    def _place(self, target: Path, name: str) -> None:
        if target.exists() or target.is_symlink():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        assert self.images is not None
        if self.images.suffix == ".zip" or self.picture == "copy":
            with atomic_path(target) as temporary, open(temporary, "wb") as file:
                shutil.copyfileobj(io.BytesIO(self._bytes(name)), file)
            return
        source = self._source(name).resolve()
        with suppress(FileExistsError):  # another process was faster
            target.symlink_to(os.path.relpath(source, target.parent.resolve()))
