"""Whether pictures and captions find each other by their features.

Shape letters: B pictures and captions, F channels of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vistok.errors import InvalidInputError

from .accuracy import Accuracy

__all__ = ["retrieval_accuracy"]


def retrieval_accuracy(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, Accuracy]:
    """Top-1 retrieval among B pictures and their captions. A caption that says the same word for word is as right.

    Args:
        images: unit features [B, F] of the pictures.
        texts: unit features [B, F] of their captions, in the same order.
        captions: the captions.

    Returns:
        `image_to_text`: the nearest caption of each picture says what its own does; `text_to_image`: the nearest
        picture of each caption has that caption.

    Raises:
        InvalidInputError: for shapes or lengths that differ, or no pictures.
    """
    if images.shape != texts.shape or images.ndim != 2 or len(images) != len(captions) or not len(captions):
        raise InvalidInputError(
            f"expected features [B, F] of as many pictures and texts as captions; got {list(images.shape)}, "
            f"{list(texts.shape)} and {len(captions)} captions"
        )
    likeness = images.float() @ texts.float().t()
    found = {"image_to_text": likeness.argmax(1).tolist(), "text_to_image": likeness.argmax(0).tolist()}
    return {
        name: Accuracy.of(captions[one] == wanted for one, wanted in zip(numbers, captions, strict=True))
        for name, numbers in found.items()
    }
