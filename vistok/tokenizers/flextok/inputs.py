"""What FlexTok takes: lengths, tokens, sizes, images, and how pictures become such images.

Letters: B images, H, W pixels, N registers, k tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.tokenizers.pictures import check_pixels
from vistok.tokens import VisualTokens

__all__ = ["check_images", "check_length", "check_size", "check_tokens", "resize_and_crop"]


def check_length(num_tokens: int | None, longest: int) -> int:
    """A number of tokens, `longest` for None, or an InvalidInputError."""
    if num_tokens is None:
        return longest
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or not 1 <= num_tokens <= longest:
        raise InvalidInputError(f"num_tokens must be an integer in 1..{longest}; got {num_tokens!r}")
    return num_tokens


def check_tokens(
    tokens: VisualTokens | Sequence[Tensor] | Sequence[Sequence[int]],
    longest: int,
    codebook_size: int,
    device: torch.device,
) -> tuple[Tensor, list[int]]:
    """ids int64 [B, k] on the device (0 where there is none), and the length of each sequence.

    Args:
        tokens: ids [B, k], shorter sequences by a mask that is True at a prefix; or a list of sequences of any lengths.
        longest: registers N.
        codebook_size: ids lie below it.
        device: of the result.

    Raises:
        InvalidInputError: no ids, ids with a grid or outside the codebook, empty or too long sequences.
    """
    if isinstance(tokens, VisualTokens):
        if tokens.ids is None or tokens.grid is not None:
            raise InvalidInputError("FlexTok decodes ordered ids without a grid; were these made by FlexTok.encode?")
        ids, lengths = tokens.ids, [tokens.num_tokens] * len(tokens)
        if tokens.mask is not None:
            mask = tokens.mask.cpu()
            if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
                raise InvalidInputError("the mask of tokens must be True at a prefix of each sequence")
            lengths = mask.sum(1).tolist()
            ids = torch.where(tokens.mask, ids, 0)
    else:
        rows = [torch.as_tensor(row).flatten().to(device) for row in tokens]
        wrong = [row.dtype for row in rows if len(row) and (row.is_floating_point() or row.dtype == torch.bool)]
        if wrong:
            raise InvalidInputError(f"token ids must be integers; got {wrong[0]}")
        lengths = [len(row) for row in rows]
        ids = torch.zeros(len(rows), max(lengths, default=0), dtype=torch.int64, device=device)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
    if not lengths:
        raise InvalidInputError("no tokens were given; expected at least one sequence")
    if min(lengths) < 1 or max(lengths) > longest:
        raise InvalidInputError(f"a sequence must have 1..{longest} tokens; got lengths {min(lengths)}..{max(lengths)}")
    ids = ids[:, : max(lengths)].to(device)
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or high >= codebook_size:
        raise InvalidInputError(
            f"ids must lie in 0..{codebook_size - 1}; got {low}..{high}: do these tokens come from another tokenizer?"
        )
    return ids, lengths


def check_size(image_size: int | Sequence[int], factor: int) -> tuple[int, int]:
    """(height, width) in pixels, each divisible by the side of a patch, or an InvalidInputError."""
    given = image_size
    height, width = (given, given) if isinstance(given, int) else (int(given[0]), int(given[1]))
    if min(height, width) < factor or height % factor or width % factor:
        raise InvalidInputError(f"image_size must be multiples of {factor}; got {height}x{width}")
    return height, width


def check_images(images: Tensor, factor: int) -> None:
    """Raise InvalidInputError unless images are float [B, 3, H, W], finite, about [-1, 1], of whole patches."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise InvalidInputError(f"images must be [B, 3, H, W]; got {list(images.shape)}")
    if not images.is_floating_point():
        raise InvalidInputError(f"images must be floating point in [-1, 1]; got {images.dtype}: use preprocess()")
    height, width = images.shape[-2:]
    if not height or not width or height % factor or width % factor:
        raise InvalidInputError(
            f"height and width must be multiples of {factor}, the side of a patch; got {height}x{width}: "
            "use preprocess(), which resizes and crops"
        )
    check_pixels(images)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size` pixels (bilinear, antialiased), then the centre square."""
    if size < 1:
        raise InvalidInputError(f"size must be at least 1 pixel; got {size}")
    width, height = image.size
    if width <= height:
        target = (size, int(size * height / width))
    else:
        target = (int(size * width / height), size)
    if target != image.size:
        image = image.resize(target, Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))
