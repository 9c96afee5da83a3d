"""Questions about a scene, with the true answer and the answers to choose from.

A question is only asked where it has one answer: "what colour is the star?" needs exactly one star. Every answer is one
word of `ANSWERS`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vistok.data.shapes.captions import RELATION_PHRASES
from vistok.data.shapes.scene import COLOURS, INVERSE_RELATIONS, SHADES, SHAPES, SIZES, Scene, SceneObject

NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three")
SIDES: tuple[str, ...] = ("left", "right", "top", "bottom")
ANSWERS: tuple[str, ...] = (*COLOURS, *SHAPES, *SIZES, *SHADES, *NUMBERS, *SIDES, "yes", "no")
QUESTION_KINDS: tuple[str, ...] = ("colour", "shape", "size", "shade", "count", "relation", "where")
QUESTION_VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            "what which how many is are the of in to there object objects picture half colour shape size shade or ? , "
            f"above below {' '.join(ANSWERS)} {' '.join(shape + 's' for shape in SHAPES)} crosses"
        )
        .replace("crosss ", "")
        .split()
    )
)
"""Every word that a question can hold; punctuation counts as words."""

MIDDLE = 0.06
"""Objects whose centre is nearer than this to the middle line belong to neither half."""


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Attributes:
        text: the question, in lower case, with a question mark.
        answer: the true answer, one word.
        kind: one of `QUESTION_KINDS`.
        choices: the possible answers of this question, the true one among them.
    """

    text: str
    answer: str
    kind: str
    choices: tuple[str, ...]


def questions(scene: Scene) -> list[Question]:
    """Every question that has one answer in this scene."""
    found: list[Question] = []
    objects = scene.objects
    for item in objects:
        if _alone(scene, "shape", item.shape):
            found.append(Question(f"what colour is the {item.shape}?", item.colour, "colour", COLOURS))
        if _alone(scene, "colour", item.colour):
            found.append(Question(f"what shape is the {item.colour} object?", item.shape, "shape", SHAPES))
        name = _name(scene, item)
        if name is None:
            continue
        found.append(Question(f"what size is the {name}?", item.size, "size", SIZES))
        found.append(Question(f"what shade is the {name}?", item.shade, "shade", SHADES))
        for coordinate, halves in zip(item.centre, (SIDES[:2], SIDES[2:])):
            if abs(coordinate - 0.5) >= MIDDLE:
                text = f"in which half of the picture is the {name}, {halves[0]} or {halves[1]}?"
                found.append(Question(text, halves[coordinate > 0.5], "where", halves))
    found.append(Question("how many objects are there?", NUMBERS[len(objects)], "count", NUMBERS[1:]))
    for colour in dict.fromkeys(item.colour for item in objects):
        count = sum(item.colour == colour for item in objects)
        found.append(Question(f"how many {colour} objects are there?", NUMBERS[count], "count", NUMBERS))
    for shape in dict.fromkeys(item.shape for item in objects):
        count = sum(item.shape == shape for item in objects)
        found.append(Question(f"how many {_plural(shape)} are there?", NUMBERS[count], "count", NUMBERS))
    absent = next(shape for shape in _rotated(SHAPES, scene.label) if not _count(scene, "shape", shape))
    found.append(Question(f"how many {_plural(absent)} are there?", NUMBERS[0], "count", NUMBERS))
    for first, relation, second in scene.relations():
        subject, reference = _name(scene, objects[first]), _name(scene, objects[second])
        if subject is None or reference is None:
            continue
        # Each pair occurs in both directions, so asking the true and the inverse relation keeps yes and no balanced.
        for asked, answer in ((relation, "yes"), (INVERSE_RELATIONS[relation], "no")):
            text = f"is the {subject} {RELATION_PHRASES[asked]} the {reference}?"
            found.append(Question(text, answer, "relation", ("yes", "no")))
        others = [number for number in range(len(objects)) if number not in (first, second)]
        # With a diagonal third object the answer would be a matter of taste.
        if all(scene.relation(number, second) not in (None, relation) for number in others):
            text = f"what shape is {RELATION_PHRASES[relation]} the {reference}?"
            found.append(Question(text, objects[first].shape, "relation", SHAPES))
    return found


def question(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Question | None:
    """One random question: first its kind is drawn, so that kinds are balanced, then a question of that kind.

    Returns None if the scene allows no question of the asked `kind`.
    """
    found = questions(scene)
    if kind is None:
        present = [name for name in QUESTION_KINDS if any(item.kind == name for item in found)]
        kind = present[int(rng.integers(len(present)))]
    found = [item for item in found if item.kind == kind]
    return found[int(rng.integers(len(found)))] if found else None


def _count(scene: Scene, attribute: str, value: str) -> int:
    return sum(getattr(item, attribute) == value for item in scene.objects)


def _alone(scene: Scene, attribute: str, value: str) -> bool:
    return _count(scene, attribute, value) == 1


def _name(scene: Scene, item: SceneObject) -> str | None:
    """The colour and shape that single the object out, or None if another object shares both."""
    alike = sum(other.shape == item.shape and other.colour == item.colour for other in scene.objects)
    return f"{item.colour} {item.shape}" if alike == 1 else None


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def _rotated(names: tuple[str, ...], start: int) -> tuple[str, ...]:
    start %= len(names)
    return names[start:] + names[:start]
