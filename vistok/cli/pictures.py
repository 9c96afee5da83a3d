"""Pictures and progress that several commands need."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


def grid_of(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Pictures side by side, row by row, on white; smaller ones (previews of pivots) are enlarged to the largest."""
    from PIL import Image

    columns = columns or max(1, round(len(images) ** 0.5))
    width, height = max(image.size for image in images)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(image, ((index % columns) * (width + gap), (index // columns) * (height + gap)))
    return sheet


def with_titles(sheet: Image.Image, titles: Sequence[str], gap: int = 2) -> Image.Image:
    """A sheet of `grid_of` with a title above each column."""
    from PIL import Image, ImageDraw, ImageFont

    width = (sheet.width + gap) // len(titles)
    size = max(8, min(18, width // 6))
    titled = Image.new("RGB", (sheet.width, sheet.height + 2 * size), "white")
    titled.paste(sheet, (0, 2 * size))
    draw, font = ImageDraw.Draw(titled), ImageFont.load_default(size)
    for column, title in enumerate(titles):
        draw.text((column * width + (width - gap) / 2, size), title, fill="black", font=font, anchor="mm")
    return titled


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture atomically; the suffix chooses the format.

    Raises:
        InvalidInputError: for a suffix that no image format has.
    """
    from PIL import Image

    from vistok.errors import InvalidInputError
    from vistok.files import atomic_path

    if path.suffix.lower() not in Image.registered_extensions():
        raise InvalidInputError(f"{path} has no suffix of an image format; use .png")
    with atomic_path(path) as temporary:
        image.save(temporary)


def load_tokenizer(name: str) -> Any:
    """A network that encodes and decodes pictures.

    Raises:
        InvalidInputError: if the name is another kind of network's.
    """
    from vistok.errors import InvalidInputError
    from vistok.hub import load

    network = load(name)
    if not (hasattr(network, "encode") and hasattr(network, "decode")):
        raise InvalidInputError(f"{name} is a {type(network).__name__}, not a tokenizer; use --model vq-shapes")
    if network.config.get("num_frames", 1) > 1:
        raise InvalidInputError(f"{name} codes videos, this command pictures; in Python: vistok.load({name!r}).encode")
    return network


def codebook_size(tokenizer: Any) -> int | None:
    """Codes of a tokenizer; None for continuous tokens."""
    return tokenizer.config.get("codebook_size") or getattr(tokenizer, "codebook_size", None)


@contextmanager
def progress(description: str, total: int) -> Iterator[Any]:
    """A bar with rate and time left on stderr, silent when that is not a terminal; yields `advance(count=1)`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(show_speed=True))
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    ) as bar:
        task = bar.add_task(description, total=total)

        def advance(count: int = 1, total: int | None = None) -> None:
            bar.update(task, advance=count, total=total)

        yield advance
