"""Questions about a scene, with the true answer and the answers to choose from.

A question is only asked where it has one answer: "what colour is the star?" needs exactly one star. Every answer is one
word of `ANSWERS`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vistok.data.shapes.captions import RELATION_PHRASES
from vistok.data.shapes.scene import COLOURS, INVERSE_RELATIONS, SHADES, SHAPES, SIZES, Scene, SceneObject, sample_scene
from vistok.errors import InvalidInputError

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


def questions_in_turn(
    count: int,
    *,
    seed: int = 0,
    num_objects: int | tuple[int, int] | None = None,
    per_image: int = 1,
    kinds: tuple[str, ...] = QUESTION_KINDS,
) -> Iterator[tuple[int, Scene, list[Question]]]:
    """Scenes of a stream and questions about each; kinds take turns, so that each has its share.

    A scene that allows no question of the kind in turn is passed over.

    Args:
        count: questions in all.
        seed: stream of scenes.
        num_objects: objects a scene; None draws 1 to 3.
        per_image: most questions about one scene.
        kinds: which kinds are asked.

    Raises:
        InvalidInputError: unknown kinds, numbers out of range, or a kind that such scenes never allow.
    """
    unknown = [kind for kind in kinds if kind not in QUESTION_KINDS]
    if unknown or not kinds:
        raise InvalidInputError(f"unknown kinds of questions: {unknown}; there are {', '.join(QUESTION_KINDS)}")
    if count < 1 or per_image < 1:
        raise InvalidInputError(f"count and per_image are numbers from 1 on, got {count} and {per_image}")
    done, index = 0, 0
    while done < count:
        scene = sample_scene(seed, index, num_objects)
        rng = np.random.default_rng((seed, index))
        wanted = [kinds[(done + turn) % len(kinds)] for turn in range(min(per_image, count - done))]
        asked = {item.text: item for kind in wanted if (item := question(scene, rng, kind)) is not None}
        if asked:
            yield index, scene, list(asked.values())
        elif index >= 1000 * (done + 1):
            raise InvalidInputError(f"scenes of {num_objects} objects allow no question of the kind {wanted[0]}")
        done += len(asked)
        index += 1


def write_questions(
    folder: str | os.PathLike[str],
    count: int,
    *,
    seed: int = 0,
    image_size: int = 64,
    num_objects: int | tuple[int, int] | None = None,
    per_image: int = 1,
    kinds: tuple[str, ...] = QUESTION_KINDS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write pictures and questions about them, as `vistok eval pruners --data` reads them.

    Kinds take turns, so that each has its share; a scene that allows no question of the kind in turn is passed over.

    Args:
        folder: written: `00000.png`, ... and `questions.jsonl` with one object a line: image, question, answer, kind,
            choices.
        count: questions.
        seed: stream of scenes.
        image_size: side in pixels.
        num_objects: objects a scene; None draws 1 to 3.
        per_image: most questions about one picture.
        kinds: which kinds are asked.
        on_progress: called with (questions done, questions).

    Returns:
        The questions file, written last.

    Raises:
        InvalidInputError: unknown kinds, numbers out of range, or a folder that already holds questions.
    """
    from PIL import Image

    from vistok.data.shapes.render import render
    from vistok.files import write_text_atomic

    folder = Path(folder)
    file = folder / "questions.jsonl"
    if file.exists():
        raise InvalidInputError(f"{file} exists; choose another folder")
    lines: list[str] = []
    turns = questions_in_turn(count, seed=seed, num_objects=num_objects, per_image=per_image, kinds=kinds)
    for index, scene, asked in turns:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{index:05d}.png"
        Image.fromarray(render(scene, image_size)).save(folder / name)
        for item in asked:
            fields = {"image": name, "question": item.text, "answer": item.answer, "kind": item.kind}
            lines.append(json.dumps({**fields, "choices": item.choices}))
        if on_progress is not None:
            on_progress(len(lines), count)
    write_text_atomic(file, "\n".join(lines) + "\n")
    return file
