"""Reading and writing files so that a crash never costs a good file, and a bad file never runs code."""

from __future__ import annotations

import argparse
import os
import pickle
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, InvalidInputError

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = [
    "PACKED_FILE",
    "atomic_path",
    "open_image",
    "pack_rows",
    "read_state_dict",
    "save_tensors",
    "unpack_rows",
    "write_text_atomic",
]

# Weights of a folder in packed form (see `pack_rows`); other loaders than ours must not take them for plain ones.
PACKED_FILE = "packed.safetensors"
SCALE_SUFFIX = ".row_scale"
SMALLEST_PACKED = 4096  # values; biases, norms and small tables stay as they are
SHORTEST_PACKED_ROW = 16  # values; of shorter rows the scales would eat up what is saved
PICKLE_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt"}
# Decoding more pixels than this takes gigabytes; PIL only warns from here on.
MAX_IMAGE_PIXELS = 178_956_970


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` on success, delete it on any failure.

    The old file stays whole when the disk is full, the process is interrupted or the writer raises.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: image and tensor writers choose their format by it.
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield temporary
        # Without this, a power cut right after the rename can leave an empty file under the final name.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text through `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically. Tensors are made contiguous; shared storage is copied."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel() and tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        plain[name] = tensor
    with atomic_path(path) as temporary:
        save_file(plain, str(temporary), metadata=metadata)


def pack_rows(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in about one byte each: every row of a large matrix as int8 with a float32 scale beside it.

    Rows are what one output is made of, so that a scale a row costs nothing; the rounding is at most 1/254 of the
    row's largest weight. Everything else that is floating point becomes bfloat16.

    Args:
        tensors: a state dict.

    Returns:
        A state dict with an entry `NAME.row_scale` [rows] beside every packed `NAME` (int8, same shape).
    """
    import torch

    packed = {}
    for name, value in tensors.items():
        small = value.ndim < 2 or value.numel() < SMALLEST_PACKED or value[0].numel() < SHORTEST_PACKED_ROW
        if not value.is_floating_point() or small:
            packed[name] = value.to(torch.bfloat16) if value.is_floating_point() else value
            continue
        rows = value.detach().float().flatten(1)
        scale = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        packed[name] = (rows / scale[:, None]).round().to(torch.int8).view_as(value)
        packed[name + SCALE_SUFFIX] = scale
    return packed


def unpack_rows(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `pack_rows`: floating point tensors in bfloat16. Tensors that were not packed pass unchanged."""
    import torch

    plain = {}
    for name, value in tensors.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        scale = tensors.get(name + SCALE_SUFFIX)
        if scale is not None:
            value = (value.float() * scale.view(-1, *[1] * (value.ndim - 1))).to(torch.bfloat16)
        plain[name] = value
    return plain


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint file without running anything that it contains.

    `.safetensors` is read with safetensors; `.pth`, `.pt`, `.bin` and `.ckpt` through `torch.load(weights_only=True)`,
    with `argparse.Namespace` allowed as inert data because training checkpoints keep their arguments in one.
    Wrapper keys (`"model"`, `"ema"`, ...) are left as they are: unwrapping belongs to each architecture. Packed weights
    (`pack_rows`) come out as they were, in bfloat16.

    Raises:
        CheckpointError: missing, empty or truncated file, unknown suffix, or a pickle that contains code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint file at {path}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return unpack_rows(load_file(str(path)))
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}); it is probably truncated: download or copy it again"
            ) from error
    if path.suffix not in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} has the suffix {path.suffix!r}; "
            f"expected .safetensors or one of {', '.join(sorted(PICKLE_SUFFIXES))}"
        )
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} was refused: it is damaged or holds objects other than tensors, "
            f"and loading those could run code ({reason}). Ask its author for a safetensors file"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch checkpoint ({error}); it is probably truncated"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary of tensors")
    return dict(content)


def open_image(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """Open any picture as an upright 8-bit RGB image.

    EXIF rotation is applied, grey is repeated over the channels, transparency is composited on white, 16-bit and float
    greys are scaled to 8 bits, and of an animation the first frame is taken.

    Raises:
        InvalidInputError: missing, empty, truncated, oversized or unrecognised file.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, Image.Image):
        image, name = source, "the given image"
    else:
        path = Path(source)
        name = str(path)
        if not path.is_file():
            raise InvalidInputError(f"no image file at {path}")
        if path.stat().st_size == 0:
            raise InvalidInputError(f"{path} is empty (0 bytes); expected an image such as PNG or JPEG")
        try:
            image = Image.open(path)
        except UnidentifiedImageError as error:
            raise InvalidInputError(
                f"{path} is not an image in a known format; expected PNG, JPEG, WebP, TIFF ..."
            ) from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InvalidInputError(f"{path} is damaged or no image ({error})") from error
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise InvalidInputError(
            f"{name} has {width}x{height} pixels; at most {MAX_IMAGE_PIXELS} are accepted: downscale it first"
        )
    if width == 0 or height == 0:
        raise InvalidInputError(f"{name} has no pixels ({width}x{height})")
    try:
        if getattr(image, "n_frames", 1) > 1:
            image.seek(0)
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise InvalidInputError(f"{name} is damaged: {error}") from error
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise InvalidInputError(f"{name} contains NaN or infinite pixels")
        # 16-bit files use the whole range; floats in 0..1 are scaled up; other wide greys by their maximum.
        highest = float(values.max())
        if image.mode.startswith("I;16") or 255.0 < highest <= 65535.0:
            scale = 255.0 / 65535.0
        elif highest > 65535.0:
            scale = 255.0 / highest
        else:
            scale = 255.0 if image.mode == "F" and highest <= 1.0 else 1.0
        image = Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8), mode="L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")
