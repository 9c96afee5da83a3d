"""Real photographs without a download: the pictures that scikit-image's wheel carries (extra `train` or `eval`)."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vistok.errors import InvalidInputError, require
from vistok.files import open_image

__all__ = ["PHOTOGRAPHS", "open_photograph", "shipped_pictures"]

# Those that show something real. The rest are drawings, text, masks or near-duplicates (motorcycle_right is the other
# eye of motorcycle_left).
PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "cell",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "ihc",
    "moon",
    "motorcycle_left",
    "retina",
    "rocket",
)


def shipped_pictures() -> dict[str, Path]:
    """Files of all pictures in scikit-image's wheel, by name without suffix.

    Raises:
        MissingExtraError: without scikit-image (extra `train`).
    """
    folder = Path(str(require("skimage.data", "train").__file__)).parent
    return {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in (".png", ".jpg")}


def open_photograph(name: str, longest_side: int | None = None) -> Image.Image:
    """A picture that scikit-image ships, or a file, as RGB.

    Args:
        name: such as `"coffee"`, or a path.
        longest_side: scale larger pictures down to this; None keeps them.

    Raises:
        InvalidInputError: neither a shipped picture (it lists them) nor a readable file.
    """
    path = Path(name)
    if not path.is_file():
        shipped = shipped_pictures()
        if name not in shipped:
            raise InvalidInputError(f"no photograph {name!r}: give a file, or one of {', '.join(shipped)}")
        path = shipped[name]
    picture = open_image(path)
    if longest_side is not None and max(picture.size) > longest_side:
        picture.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    return picture
