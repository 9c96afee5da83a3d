"""What a language model says about lab pictures, judged by the parser of the captions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vistok.data.shapes.captions import parse_caption
from vistok.errors import InvalidInputError

__all__ = ["same_objects", "write_captions"]

CAPTION_WORDS = 24


def same_objects(answer: str, truth: str) -> bool:
    """Whether a text names exactly the objects of a caption: shapes and colours, in any order, none missing or extra.

    Args:
        answer: any text; one outside the caption grammar is wrong.
        truth: a caption.

    Raises:
        InvalidInputError: the truth is no caption.
    """
    wanted = sorted((phrase.shape, phrase.colour or "") for phrase in parse_caption(truth).objects)
    try:
        said = sorted((phrase.shape, phrase.colour or "") for phrase in parse_caption(answer).objects)
    except InvalidInputError:
        return False
    return said == wanted


def write_captions(language: Any, ids: Tensor, batch_size: int = 64) -> list[str]:
    """The most likely caption of each picture.

    Args:
        language: an `ImageLanguageModel`.
        ids: codes int64 [B, n].
        batch_size: pictures at a time.

    Returns:
        B texts; empty where the model wrote none.
    """
    texts = []
    for part in ids.split(batch_size):
        answers = language.generate(
            [[one] for one in part], allow_images=False, max_new_tokens=CAPTION_WORDS, temperature=0.0
        )
        texts += [" ".join(item for item in answer if isinstance(item, str)) for answer in answers]
    return texts
