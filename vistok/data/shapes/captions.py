"""Captions of the lab world, their grammar, the parser that inverts it, and the check of a caption against a picture.

    caption   = phrase
              | phrase relation phrase [", and" phrase]
              | phrase "and" phrase
              | phrase "," phrase "and" phrase
    phrase    = "a" | "an", [size], [shade], [colour], shape
    relation  = "to the left of" | "to the right of" | "above" | "below"

Captions may leave attributes out ("a circle"); what they say is always true of their scene. The shade `plain` is never
spoken: "a red circle" is a red circle of any shade. The parser also takes what people type: capitals, a final full
stop, no article, adjectives in another order, "left of" for "to the left of".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NoReturn, Protocol

import numpy as np

from vistok.data.shapes.scene import COLOURS, MAX_OBJECTS, SHAPES, SIZES, Scene, sample_scene
from vistok.errors import InvalidInputError

SPOKEN_SHADES: tuple[str, ...] = ("light", "dark")
RELATION_PHRASES: dict[str, str] = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}
VOCABULARY: tuple[str, ...] = (
    *("a", "an", "and", ",", "to", "the", "left", "right", "of", "above", "below"),
    *SIZES,
    *SPOKEN_SHADES,
    *COLOURS,
    *SHAPES,
)
"""Every word that a caption can hold; the comma counts as a word."""

MAX_CAPTION_WORDS = 21
"""Three full phrases of five words, the longest relation (four words), a comma and an "and"."""


@dataclass(frozen=True)
class Phrase:
    """One described object; None leaves an attribute open. `str()` gives the words: "a large red circle"."""

    shape: str
    colour: str | None = None
    size: str | None = None
    shade: str | None = None

    def __str__(self) -> str:
        words = [word for word in (self.size, self.shade, self.colour, self.shape) if word is not None]
        return " ".join(["an" if words[0] == "orange" else "a", *words])


@dataclass(frozen=True)
class Description:
    """What a caption says: its objects, and where the first lies relative to the second (None: unsaid).

    `str()` gives the caption in its canonical wording.
    """

    objects: tuple[Phrase, ...]
    relation: str | None = None

    def __str__(self) -> str:
        phrases = [str(phrase) for phrase in self.objects]
        if self.relation is not None:
            first = f"{phrases[0]} {RELATION_PHRASES[self.relation]} {phrases[1]}"
            return first if len(phrases) == 2 else f"{first}, and {phrases[2]}"
        if len(phrases) == 3:
            return f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
        return " and ".join(phrases)


def caption(scene: Scene, rng: np.random.Generator | None = None, *, attribute_dropout: float = 0.25) -> str:
    """A true sentence about a scene.

    Args:
        scene: what to describe.
        rng: draws which attributes to leave out; None says everything.
        attribute_dropout: probability that a size, a shade or a relation is left out; a colour is left out with a third
            of it. Without a word on relations the objects are only listed.
    """
    return str(describe(scene, rng, attribute_dropout=attribute_dropout))


def describe(scene: Scene, rng: np.random.Generator | None = None, *, attribute_dropout: float = 0.25) -> Description:
    """What `caption` says, before it is put into words; same arguments."""
    draws = None if rng is None else rng.random(3 * len(scene.objects) + 1)
    phrases = []
    for number, item in enumerate(scene.objects):
        keep = [True] * 3
        if draws is not None:
            spoken = draws[3 * number : 3 * number + 3]
            keep = [spoken[0] >= attribute_dropout, spoken[1] >= attribute_dropout, 3 * spoken[2] >= attribute_dropout]
        phrases.append(
            Phrase(
                shape=item.shape,
                colour=item.colour if keep[2] else None,
                size=item.size if keep[0] else None,
                shade=item.shade if keep[1] and item.shade in SPOKEN_SHADES else None,
            )
        )
    relation = scene.relation(0, 1) if len(phrases) > 1 else None
    if draws is not None and draws[-1] < attribute_dropout:
        relation = None
    return Description(tuple(phrases), relation)


# --------------------------------------------------------------------------------------------------------- parsing
_RELATION_WORDS = {
    ("to", "the", "left", "of"): "left of",
    ("to", "the", "right", "of"): "right of",
    ("left", "of"): "left of",
    ("right", "of"): "right of",
    ("above",): "above",
    ("below",): "below",
}
_ADJECTIVES = {
    word: kind for kind, words in (("size", SIZES), ("shade", SPOKEN_SHADES), ("colour", COLOURS)) for word in words
}


def parse_caption(text: str) -> Description:
    """What a caption says: the inverse of `caption`.

    Raises:
        InvalidInputError: for words outside `VOCABULARY` (it names them, the nearest known ones, and all known words),
            and for sentences outside the grammar (it says what was expected, and where).
    """
    if not isinstance(text, str):
        raise InvalidInputError(f"a caption is text, got {type(text).__name__}; for example 'a red circle'")
    words = re.findall(r"[^\s,]+|,", text.strip().rstrip(".").lower())
    unknown = list(dict.fromkeys(word for word in words if word not in VOCABULARY))
    if unknown:
        nearest = {word: difflib.get_close_matches(word, VOCABULARY, n=1, cutoff=0.7) for word in unknown}
        named = ", ".join(
            f"{word!r}" + (f" (did you mean {nearest[word][0]!r}?)" if nearest[word] else "") for word in unknown
        )
        known = (
            f"shapes: {', '.join(SHAPES)}; colours: {', '.join(COLOURS)}; sizes: {', '.join(SIZES)}; "
            f"shades: {', '.join(SPOKEN_SHADES)}; relations: {', '.join(RELATION_PHRASES.values())}; and: a, an, and"
        )
        raise InvalidInputError(f"unknown word{'s' if len(unknown) > 1 else ''} {named} in {text!r}. Known are {known}")
    return _Parser(text, words).description()


class _Parser:
    """Recursive descent over the words of one caption."""

    def __init__(self, text: str, words: list[str]) -> None:
        self.text = text
        self.words = words
        self.position = 0

    def description(self) -> Description:
        phrases = [self.phrase()]
        relation = None
        while self.position < len(self.words):
            start = self.position
            found = self.relation()
            if found is not None:
                if len(phrases) > 1:
                    self.position = start
                    self.fail("', and' or the end: only the first two objects can be related")
                relation = found
            elif not self.take(",", "and") and not self.take(",") and not self.take("and"):
                self.fail("a relation (to the left of, to the right of, above, below), 'and', ',' or the end")
            if len(phrases) == MAX_OBJECTS:
                self.fail(f"the end: a scene holds at most {MAX_OBJECTS} objects")
            phrases.append(self.phrase())
        return Description(tuple(phrases), relation)

    def phrase(self) -> Phrase:
        if not self.take("a"):
            self.take("an")
        attributes: dict[str, str] = {}
        while (word := self.peek()) in _ADJECTIVES:
            kind = _ADJECTIVES[word]
            if kind in attributes:
                self.fail(f"a shape: the {kind} is already {attributes[kind]!r}")
            attributes[kind] = word
            self.position += 1
        word = self.peek()
        if word not in SHAPES:
            self.fail(f"a shape ({', '.join(SHAPES)})" if attributes else "an object such as 'a red circle'")
        self.position += 1
        return Phrase(word, attributes.get("colour"), attributes.get("size"), attributes.get("shade"))

    def relation(self) -> str | None:
        return next((name for words, name in _RELATION_WORDS.items() if self.take(*words)), None)

    def peek(self) -> str:
        return self.words[self.position] if self.position < len(self.words) else ""

    def take(self, *words: str) -> bool:
        if tuple(self.words[self.position : self.position + len(words)]) != words:
            return False
        self.position += len(words)
        return True

    def fail(self, expected: str) -> NoReturn:
        before = " ".join(self.words[: self.position])
        place = f"after {before!r}" if before else "at the start"
        found = f"found {self.peek()!r}" if self.peek() else "the text ends"
        raise InvalidInputError(f"cannot read the caption {self.text!r}: {place}, expected {expected}, but {found}")


def scene_for(description: Description | str, seed: int = 0, index: int = 0) -> Scene:
    """A scene that shows exactly what a description or caption says; what it leaves open is drawn from the seed."""
    if isinstance(description, str):
        description = parse_caption(description)
    phrases = description.objects
    return sample_scene(
        seed,
        index,
        len(phrases),
        shape=[phrase.shape for phrase in phrases],
        colour=[phrase.colour for phrase in phrases],
        size=[phrase.size for phrase in phrases],
        shade=[phrase.shade for phrase in phrases],
        relation=description.relation,
    )


# -------------------------------------------------------------------------------------------------------- checking
class SeenObjectLike(Protocol):
    """What `satisfies` looks at: the objects of a `Scene` and of an oracle's `Reading` both have it."""

    @property
    def shape(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def size(self) -> str: ...
    @property
    def shade(self) -> str: ...
    @property
    def centre(self) -> tuple[float, float]: ...


class SeenLike(Protocol):
    """A scene or a reading."""

    @property
    def objects(self) -> Sequence[SeenObjectLike]: ...


@dataclass(frozen=True)
class Match:
    """How well a picture shows what a description says.

    Attributes:
        count: whether the picture holds as many objects as the description.
        shape, colour, size, shade: share in [0, 1] of the attributes of this kind that the description speaks of and
            that its objects show; None if it speaks of none.
        relation: whether the relation holds; None if the description has none.
        assignment: for each described object the number of the seen object that was taken for it, or None.
    """

    count: bool
    shape: float | None
    colour: float | None
    size: float | None
    shade: float | None
    relation: bool | None
    assignment: tuple[int | None, ...]

    @property
    def satisfied(self) -> bool:
        """Whether everything that the description says holds, without missing or extra objects."""
        return (
            self.count
            and self.relation is not False
            and all(share in (None, 1.0) for share in (self.shape, self.colour, self.size, self.shade))
        )

    def __bool__(self) -> bool:
        return self.satisfied


def relation_holds(first: tuple[float, float], relation: str, second: tuple[float, float]) -> bool:
    """Whether centre `first` lies in `relation` to centre `second`: on that side, and further along that axis than
    across it. (Sampled scenes keep a wider margin, `RELATION_DOMINANCE`; a generated picture need not.)"""
    dx, dy = first[0] - second[0], first[1] - second[1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    side = -along if relation in ("left of", "above") else along
    return side > 0 and abs(along) >= abs(across)


_ATTRIBUTE_KINDS = ("shape", "colour", "size", "shade")


def satisfies(description: Description | str, seen: SeenLike) -> Match:
    """Compare a description or caption with a `Scene` or with what the oracle read in a picture.

    Described objects are paired with seen ones so that as much as possible agrees. The result is true in a condition
    when everything holds.
    """
    if isinstance(description, str):
        description = parse_caption(description)
    phrases, objects = description.objects, seen.objects
    slots: list[int | None] = [*range(len(objects)), *[None] * max(0, len(phrases) - len(objects))]
    best: tuple[float, Match] | None = None
    for chosen in permutations(slots, len(phrases)):
        hits, spoken = dict.fromkeys(_ATTRIBUTE_KINDS, 0), dict.fromkeys(_ATTRIBUTE_KINDS, 0)
        for phrase, number in zip(phrases, chosen):
            for kind in _ATTRIBUTE_KINDS:
                if (wanted := getattr(phrase, kind)) is not None:
                    spoken[kind] += 1
                    hits[kind] += number is not None and getattr(objects[number], kind) == wanted
        relation = None
        if description.relation is not None:
            first, second = chosen[0], chosen[1]
            relation = (
                first is not None
                and second is not None
                and relation_holds(objects[first].centre, description.relation, objects[second].centre)
            )
        # Shape and colour decide who is who; the rest breaks ties.
        value = hits["shape"] + hits["colour"] + 0.1 * (hits["size"] + hits["shade"]) + 0.3 * bool(relation)
        if best is None or value > best[0]:
            shares = {kind: hits[kind] / spoken[kind] if spoken[kind] else None for kind in _ATTRIBUTE_KINDS}
            best = value, Match(len(objects) == len(phrases), relation=relation, assignment=chosen, **shares)
    assert best is not None  # a description has at least one object
    return best[1]
