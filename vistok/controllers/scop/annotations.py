"""Reading box annotations without holding the file in memory, and without trusting it.

COCO's `instances` JSON (a file, gzipped or not, a data set folder, or its zip) is read as a stream; other box data sets
come as JSON lines of one image each.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import zipfile
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from vistok.errors import InvalidInputError

__all__ = ["AnnotatedImage", "AnnotationFile", "Box", "iterate_json_arrays"]

_CHUNK = 1 << 20


def iterate_json_arrays(stream: IO[str]) -> Iterator[tuple[str, Any]]:
    """(key, item) of every array at the top level of a JSON object; other values come whole as (key, value).

    Reads in pieces: memory holds one item and one piece. Raises `InvalidInputError` where the text is no such JSON.
    """
    for key, item, _, _ in _located_arrays(stream):
        yield key, item


def _located_arrays(stream: IO[str]) -> Iterator[tuple[str, Any, int, int]]:
    """As `iterate_json_arrays`, with the first character of each item and the one behind its last."""
    decoder = json.JSONDecoder()
    buffer, place, ended = "", 0, False
    passed = 0  # characters before the buffer
    begin = 0

    def more() -> bool:
        nonlocal buffer, place, ended, passed
        if ended:
            return False
        piece = stream.read(_CHUNK)
        ended = not piece
        passed += place
        buffer, place = buffer[place:] + piece, 0
        return not ended

    def peek() -> str:
        nonlocal place
        while True:
            while place < len(buffer) and buffer[place].isspace():
                place += 1
            if place < len(buffer):
                return buffer[place]
            if not more():
                raise InvalidInputError(f"{getattr(stream, 'name', 'the JSON')} ends in the middle; it is truncated")

    def expect(signs: str) -> str:
        nonlocal place
        sign = peek()
        if sign not in signs:
            raise InvalidInputError(
                f"{getattr(stream, 'name', 'the JSON')} is no annotation file: expected {' or '.join(signs)}, "
                f"got {sign!r}"
            )
        place += 1
        return sign

    def value() -> Any:
        nonlocal place, begin
        peek()
        while True:
            try:
                found, end = decoder.raw_decode(buffer, place)
            except json.JSONDecodeError as error:
                if more():
                    continue
                raise InvalidInputError(
                    f"{getattr(stream, 'name', 'the JSON')} is damaged or truncated: {error.msg}"
                ) from error
            # A number that ends near the end of a piece may go on in the next one ("-1" of "-1.5e3").
            number = isinstance(found, int | float) and not isinstance(found, bool)
            if number and buffer[end : end + 3].strip("0123456789.eE+-") == "" and more():
                continue
            begin, place = passed + place, end
            return found

    expect("{")
    if peek() == "}":
        return
    while True:
        key = value()
        expect(":")
        if peek() == "[":
            place += 1
            if peek() == "]":
                place += 1
            else:
                while True:
                    item = value()
                    yield key, item, begin, passed + place
                    if expect(",]") == "]":
                        break
        else:
            item = value()
            yield key, item, begin, passed + place
        if expect(",}") == "}":
            return


class Box(NamedTuple):
    """One annotation.

    Attributes:
        number: its place in the file, from 0.
        category: category id.
        bbox: (x, y, width, height) in pixels.
        identity: its id in the file.
    """

    number: int
    category: int
    bbox: tuple[float, float, float, float]
    identity: Any = None


@dataclass
class AnnotatedImage:
    """One image and its usable boxes, in file order."""

    image_id: Any
    file_name: str
    width: float
    height: float
    boxes: list[Box] = field(default_factory=list)


def boxes_of_line(line: Any) -> list[Any]:
    """The boxes of a JSON line, or none if it has no readable list of them."""
    try:
        return list(json.loads(line)["boxes"])
    except (KeyError, TypeError, ValueError):
        return []


class AnnotationFile:
    """Box annotations, read twice as a stream: first the boxes, later the full text of the annotations that are kept.

    Args:
        path: COCO's `instances_*.json` (or `.json.gz`), a folder with `annotations/instances_*.json`, a zip that holds
            it, or JSON lines (`.jsonl`), one image each: `file_name`, `width`, `height` and
            `boxes`, a list of `{"name", "bbox"}`.
        split: which `instances_<split>.json` of a folder or zip.
        outside: what to do with boxes that lie wholly outside of their image: `skip` or `keep`. Boxes that reach beyond
            an edge are kept as they are, as the authors do; both are counted.

    Attributes:
        problems: what was wrong -> how often. Wrong annotations are skipped.
        categories: id -> name.
    """

    def __init__(self, path: str | os.PathLike[str], *, split: str = "train2017", outside: str = "skip") -> None:
        if outside not in ("skip", "keep"):
            raise InvalidInputError(f"outside must be 'skip' or 'keep', got {outside!r}")
        self.path, self.split, self.outside = Path(path), split, outside
        if not self.path.exists():
            raise InvalidInputError(f"there are no annotations at {path}")
        self.problems: Counter[str] = Counter()
        self.categories: dict[Any, str] = {}
        self._member: str | None = None
        # First character of each annotation and the one behind its last, once the file was read.
        self._starts, self._ends = array("q"), array("q")
        if self.path.is_dir():
            inner = self.path / "annotations" / f"instances_{split}.json"
            if not inner.is_file():
                raise InvalidInputError(f"{self.path} has no annotations/instances_{split}.json; choose another split")
            self.path = inner
        elif self.path.suffix == ".zip":
            with zipfile.ZipFile(self.path) as archive:
                wanted = [name for name in archive.namelist() if name.endswith(f"instances_{split}.json")]
            if not wanted:
                raise InvalidInputError(f"{self.path} holds no instances_{split}.json")
            self._member = wanted[0]

    @property
    def lines(self) -> bool:
        """Whether the file holds JSON lines."""
        return self.path.suffix == ".jsonl"

    @contextmanager
    def _open(self) -> Iterator[IO[str]]:
        if self._member is not None:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._member) as raw:
                yield io.TextIOWrapper(raw, encoding="utf-8")
        elif self.path.suffix == ".gz":
            with gzip.open(self.path, "rt", encoding="utf-8") as text:
                yield text
        else:
            with open(self.path, encoding="utf-8") as text:
                yield text

    def images(self) -> list[AnnotatedImage]:
        """All images that have usable boxes, ordered by their first annotation.

        Raises:
            InvalidInputError: if the file is no annotation file, or is truncated.
        """
        self.problems.clear()
        return self._read_lines() if self.lines else self._read_coco()

    def _read_coco(self) -> list[AnnotatedImage]:
        known: dict[Any, AnnotatedImage] = {}
        pending: dict[Any, list[Box]] = {}
        order: dict[Any, None] = {}
        self.categories = {}
        number = -1
        seen = set()
        self._starts, self._ends = array("q"), array("q")
        with self._open() as stream:
            try:
                for key, entry, start, end in _located_arrays(stream):
                    seen.add(key)
                    if key == "images":
                        self._add_image(entry, known)
                    elif key == "categories":
                        self._add_category(entry)
                    elif key == "annotations":
                        number += 1
                        self._starts.append(start)
                        self._ends.append(end)
                        box, image_id = self._box(number, entry)
                        if box is not None:
                            order.setdefault(image_id)
                            pending.setdefault(image_id, []).append(box)
            except UnicodeDecodeError as error:
                raise InvalidInputError(f"{self.path} is not UTF-8 text: {error}") from error
        missing = {"images", "annotations", "categories"} - seen
        if missing:
            raise InvalidInputError(
                f"{self.path} is no COCO instances file: it has no entries under {', '.join(sorted(missing))}"
            )
        return [image for image in (self._joined(key, pending[key], known) for key in order) if image is not None]

    def _joined(self, key: Any, boxes: list[Box], known: dict[Any, AnnotatedImage]) -> AnnotatedImage | None:
        """The image with the boxes that fit it; images may stand behind the annotations in the file."""
        if key not in known:
            self.problems["annotation of an unknown image"] += len(boxes)
            return None
        image = known[key]
        for box in boxes:
            if box.category not in self.categories:
                self.problems["annotation of an unknown category"] += 1
            elif self._inside(box, image):
                image.boxes.append(box)
        return image if image.boxes else None

    def _inside(self, box: Box, image: AnnotatedImage) -> bool:
        x, y, w, h = box.bbox
        if x >= image.width or y >= image.height or x + w <= 0 or y + h <= 0:
            self.problems["box outside of its image"] += 1
            return self.outside == "keep"
        if x < 0 or y < 0 or x + w > image.width or y + h > image.height:
            self.problems["box beyond the edge of its image (kept)"] += 1
        return True

    def _add_image(self, entry: Any, known: dict[Any, AnnotatedImage]) -> None:
        try:
            width, height = float(entry["width"]), float(entry["height"])
            if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
                raise ValueError
            name = entry.get("file_name") or f"{int(entry['id']):012d}.jpg"
            known[entry["id"]] = AnnotatedImage(entry["id"], str(name), width, height)
        except (KeyError, TypeError, ValueError, AttributeError):
            self.problems["malformed image entry"] += 1

    def _add_category(self, entry: Any) -> None:
        try:
            name = entry["name"]
            if not isinstance(name, str) or not name.strip():
                self.problems["category without a name"] += 1
            else:
                self.categories[entry["id"]] = name
        except (KeyError, TypeError):
            self.problems["malformed category entry"] += 1

    def _box(self, number: int, entry: Any) -> tuple[Box | None, Any]:
        try:
            values = [float(value) for value in entry["bbox"]]
            image_id, category = entry["image_id"], entry["category_id"]
            hash(image_id), hash(category)
        except (KeyError, TypeError, ValueError):
            self.problems["malformed annotation"] += 1
            return None, None
        if len(values) != 4 or not all(math.isfinite(value) for value in values):
            self.problems["box without four finite numbers"] += 1
            return None, None
        if values[2] <= 0 or values[3] <= 0:
            self.problems["box without area"] += 1
            return None, None
        return Box(number, category, tuple(values), entry.get("id")), image_id  # type: ignore[arg-type]

    def _read_lines(self) -> list[AnnotatedImage]:
        found: list[AnnotatedImage] = []
        ids: dict[str, int] = {}
        self.categories = {}
        number = -1
        with self._open() as stream:
            for index, line in enumerate(stream):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    image = AnnotatedImage(
                        entry.get("image_id", index),
                        str(entry["file_name"]),
                        float(entry["width"]),
                        float(entry["height"]),
                    )
                    boxes = list(entry["boxes"])
                    if not (math.isfinite(image.width * image.height) and image.width > 0 and image.height > 0):
                        raise ValueError
                except (KeyError, TypeError, ValueError, AttributeError):
                    self.problems["malformed image entry"] += 1
                    number += len(boxes_of_line(line))  # `full` counts them, too
                    continue
                for raw in boxes:
                    number += 1
                    name = raw.get("name") if isinstance(raw, dict) else None
                    if not isinstance(name, str) or not name.strip():
                        self.problems["category without a name"] += 1
                        continue
                    category = ids.setdefault(name, len(ids) + 1)
                    self.categories[category] = name
                    box, _ = self._box(
                        number,
                        {
                            "bbox": raw.get("bbox"),
                            "image_id": index,
                            "category_id": category,
                            "id": raw.get("id", number),
                        },
                    )
                    if box is not None and self._inside(box, image):
                        image.boxes.append(box)
                if image.boxes:
                    found.append(image)
        return found

    def full(self, numbers: set[int]) -> dict[int, Any]:
        """The whole entries (segmentation and all) of the given places in the file."""
        found: dict[int, Any] = {}
        place = -1
        with self._open() as stream:
            if self.lines:
                for line in stream:
                    for raw in boxes_of_line(line) if line.strip() else ():
                        place += 1
                        if place in numbers:
                            found[place] = raw
                return found
            if not self._starts:
                self.images()
            # Only what was asked for is parsed; the rest is just read.
            buffer, passed = "", 0
            for place in sorted(numbers):
                start, end = self._starts[place], self._ends[place]
                while passed + len(buffer) < end:
                    piece = stream.read(_CHUNK)
                    if not piece:
                        raise InvalidInputError(f"{self.path} was changed or cut while it was read")
                    used = min(len(buffer), max(0, start - passed))
                    buffer, passed = buffer[used:] + piece, passed + used
                found[place] = json.loads(buffer[start - passed : end - passed])
        return found
