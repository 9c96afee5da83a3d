"""Text conditions: cleaned captions, and their features as generators take them.

Letters: B captions, T tokens, D channels.
"""

from __future__ import annotations

import html
import re
import urllib.parse
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.errors import InvalidInputError

__all__ = ["TextCondition", "clean_caption", "left_pad"]

_URL = r"\b((?:{scheme}(?:/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)))"
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
_DASHES += "\ufe31\ufe32\ufe58\ufe63\uff0d"

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


# What captions crawled from the web are stripped of, in this order; the text encoders of the published models were fed
# captions cleaned exactly so. First: before HTML tags are removed.
_BEFORE_HTML = _rules(
    ("<person>", "person"),
    (_URL.format(scheme="https?:"), ""),
    (_URL.format(scheme="www:"), ""),
)
_SYMBOLS = _rules(
    (r"@[\w\d]+\b", ""),  # nicknames
    ("[\u31c0-\u9fff]+", ""),  # CJK strokes, letters, hexagrams, ideographs
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),  # a backslash and an n
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILE_TYPES})", ""),
    ("[\"']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_JOINTS = re.compile("[-_]")  # this-is-a-title or this_is_a_title, if there are more than three
_WORDS = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", ""),  # 1024x768, with a Latin or Cyrillic x, or a cross
    (r"\b\s+:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    ("^[\"']([\\w\\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def _apply(rules: Rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def clean_caption(text: str) -> str:
    """A caption as the text encoders of the published text-conditional models were fed it.

    Lower case, without links, HTML, nicknames, CJK text, file names, sizes, article numbers and shop phrases; dashes
    and quotation marks unified; broken encodings repaired (the DeepFloyd and PixArt convention, applied twice).
    """
    return _clean_once(_clean_once(text))


def _clean_once(text: str) -> str:
    import ftfy
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning

    text = _apply(_BEFORE_HTML, urllib.parse.unquote_plus(text).strip().lower())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)  # a caption may look like a file name
        text = BeautifulSoup(text, features="html.parser").text
    text = _apply(_SYMBOLS, text)
    if len(_JOINTS.findall(text)) > 3:
        text = _JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return _apply(_WORDS, text).strip()


def left_pad(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each caption's valid prefix to the end and zero the rest, as LlamaGen and NAR were trained.

    Args:
        features: [B, T, D], valid tokens first.
        mask: [B, T], nonzero where valid.

    Returns:
        features [B, T, D] and bool mask [B, T], valid tokens last.
    """
    mask = mask.bool()
    batch, total = mask.shape
    positions = torch.arange(total, device=mask.device)
    source = (positions + mask.sum(1, keepdim=True)) % total
    # A flat index_select copies whole rows; gather with an expanded index is about ten times slower on CPUs.
    source += torch.arange(batch, device=mask.device)[:, None] * total
    moved = features.flatten(0, 1).index_select(0, source.flatten()).view_as(features)
    flipped = mask.flip(1)
    return torch.where(flipped[..., None], moved, 0.0), flipped


@dataclass(frozen=True)
class TextCondition:
    """Features of a batch of captions, left-padded.

    Attributes:
        features: float [B, T, D].
        mask: bool [B, T], True at valid tokens, which end each row; None if all are valid.
    """

    features: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or not self.features.is_floating_point():
            raise InvalidInputError(
                f"text features must be floating point [B, T, D]; got {self.features.dtype} {list(self.features.shape)}"
            )
        if self.mask is not None and (
            self.mask.dtype != torch.bool or tuple(self.mask.shape) != tuple(self.features.shape[:2])
        ):
            raise InvalidInputError(
                f"text mask must be bool {list(self.features.shape[:2])}; got {self.mask.dtype} {list(self.mask.shape)}"
            )

    def __len__(self) -> int:
        """Number of captions, B."""
        return self.features.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextCondition:
        """Move the features (and cast them) and the mask."""
        mask = None if self.mask is None else self.mask.to(device=device)
        return TextCondition(self.features.to(device=device, dtype=dtype), mask)

    def repeat_interleave(self, repeats: int) -> TextCondition:
        """Each caption `repeats` times in a row."""
        mask = None if self.mask is None else self.mask.repeat_interleave(repeats, 0)
        return TextCondition(self.features.repeat_interleave(repeats, 0), mask)
