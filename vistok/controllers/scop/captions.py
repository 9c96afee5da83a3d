"""Captions of spatial pairs, and where their objects stand among the tokens (CoMPaSS, section 3.6)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vistok.errors import InvalidInputError
from vistok.nn.spans import locate_ids

__all__ = ["DEFAULT_TEMPLATES", "article", "caption_of", "object_positions"]

# {first} and {second} come with their article; the authors use the first template only.
DEFAULT_TEMPLATES = ("a photo of {first} {relation} {second}",)

# Vowels that are spoken as consonants, silent consonants, and letters that are spelled out.
_CONSONANT_SOUND = re.compile(
    r"^(?:uni(?![nm][^aeiou])|use|usu|uti|uku|ura|uro|eu|ewe|one\b|once|ouija)", re.IGNORECASE
)
_VOWEL_SOUND = re.compile(r"^(?:hour|honest|honou?r|heir|herb\b)", re.IGNORECASE)
_SPELLED = re.compile(r"^(?:[A-Z]{2,}|[a-z]\b|[A-Z]\b|x-)")


def article(name: str) -> str:
    """The name with its indefinite article, by sound: "an oven", "a unicycle", "an hourglass".

    Plurals keep one too ("a skis", "a scissors"), as in the authors' captions.
    """
    word = name.strip()
    if not word:
        raise InvalidInputError("a category without a name cannot be captioned")
    if _SPELLED.match(word):
        vowel = word[0].upper() in "AEFHILMNORSX"
    elif _VOWEL_SOUND.match(word):
        vowel = True
    else:
        vowel = word[0].lower() in "aeiou" and not _CONSONANT_SOUND.match(word)
    return f"{'an' if vowel else 'a'} {word}"


def caption_of(first: str, relation: str, second: str, template: str = DEFAULT_TEMPLATES[0]) -> str:
    """The caption of one relation; "to the" is left out ("left of", "left of and above").

    Args:
        first: name of the object that the sentence is about.
        relation: e.g. `"to the left of and above"`.
        second: name of the other object.
        template: text with `{first}`, `{relation}` and `{second}`.

    Raises:
        InvalidInputError: for a template without these three places.
    """
    for place in ("{first}", "{relation}", "{second}"):
        if place not in template:
            raise InvalidInputError(f"the caption template {template!r} has no {place}")
    text = template.format(
        first=article(first), relation=f" {relation}".replace(" to the", "").strip(), second=article(second)
    )
    return text


def object_positions(
    ids: Sequence[int], names: Sequence[Sequence[int]], *, first_match: bool = False
) -> list[list[int]]:
    """Token positions of each object of a caption.

    Args:
        ids: the caption's tokens, special ones included.
        names: each object's name as tokens, without special ones, in the order of the caption.
        first_match: take the first occurrence of each name, as the authors do: "a teddy bear left of a bear" then gives
            both objects the same "bear". Otherwise positions inside another object are skipped.

    Raises:
        InvalidInputError: if a name does not occur in the caption.
    """
    found: list[list[int]] = []
    # Longer names claim their tokens first, so that "dog" does not take the one of "hot dog".
    order = range(len(names)) if first_match else sorted(range(len(names)), key=lambda index: -len(names[index]))
    taken: set[int] = set()
    places: dict[int, list[int]] = {}
    for index in order:
        wanted = names[index]
        starts = locate_ids(ids, wanted)
        spans = [list(range(start, start + len(wanted))) for start in starts]
        if not first_match:
            spans = [span for span in spans if not taken.intersection(span)]
        if not spans:
            raise InvalidInputError(f"the tokens {list(wanted)} do not occur in the caption {list(ids)}")
        places[index] = spans[0]
        taken.update(spans[0])
    found = [places[index] for index in range(len(names))]
    return found
