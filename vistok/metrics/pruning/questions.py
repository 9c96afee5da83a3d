"""Questions about pictures: from a folder, or about held-out scenes of the lab world; and which answers are right."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from vistok.data.shapes import questions_in_turn, render
from vistok.errors import InvalidInputError
from vistok.files import open_image

__all__ = ["Match", "Question", "answers_agree", "held_out_questions", "load_questions"]

Match = Literal["exact", "contains"]


@dataclass(frozen=True)
class Question:
    """One question about a picture.

    Attributes:
        image: file of the picture, or the picture.
        question: what is asked.
        answers: the answers that count as right.
        kind: what the question is about, for figures by kind; may be empty.
    """

    image: Path | Image.Image
    question: str
    answers: tuple[str, ...]
    kind: str = ""

    def picture(self) -> Image.Image:
        """The picture, RGB.

        Raises:
            InvalidInputError: if its file cannot be read.
        """
        return open_image(self.image) if isinstance(self.image, Path) else self.image.convert("RGB")

    def picture_bytes(self) -> bytes:
        """What tells pictures apart."""
        if isinstance(self.image, Path):
            return self.image.read_bytes()
        return f"{self.image.mode} {self.image.size} ".encode() + self.image.tobytes()


def held_out_questions(count: int, image_size: int, *, seed: int | None = None) -> list[Question]:
    """One question each about held-out scenes of the lab world, of one to three objects; kinds take turns.

    Args:
        count: at least 1.
        image_size: side of the pictures in pixels; give that of the model's vision tower.
        seed: stream of scenes; None is that of held-out scenes, which no recipe can draw from.

    Raises:
        InvalidInputError: for no questions, or an image size outside the renderer's.
    """
    if seed is None:
        from vistok.metrics.evaluate import HELD_OUT_SEED  # it loads what Frechet distances need

        seed = HELD_OUT_SEED
    return [
        Question(Image.fromarray(render(scene, image_size)), one.text, (one.answer,), one.kind)
        for _, scene, asked in questions_in_turn(count, seed=seed)
        for one in asked
    ]


def load_questions(folder: str | Path, questions: str | Path | None = None, limit: int | None = None) -> list[Question]:
    """Questions about the pictures of a folder.

    Args:
        folder: where the pictures are.
        questions: JSON lines with `image` (path inside the folder), `question`, `answer` (a text, a number, or a list
            of accepted ones), and if you like `kind`; default `questions.jsonl` in the folder.
        limit: read only so many.

    Raises:
        InvalidInputError: for a missing file or picture, or a bad line, by its number.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InvalidInputError(f"{folder} is no folder; give one with pictures and a questions.jsonl")
    file = Path(questions) if questions is not None else folder / "questions.jsonl"
    if not file.is_file():
        raise InvalidInputError(
            f"no questions at {file}; expected JSON lines such as "
            '{"image": "car.png", "question": "What colour is the car?", "answer": "red"}'
        )
    found: list[Question] = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{file} is not UTF-8 text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if limit is not None and len(found) == limit:
            break
        found.append(_question(line, f"{file}, line {number}", folder))
    if not found:
        raise InvalidInputError(f"{file} holds no questions")
    return found


def _question(line: str, where: str, folder: Path) -> Question:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{where}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InvalidInputError(f"{where}: expected an object with image, question and answer")
    for name in ("image", "question"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise InvalidInputError(f"{where}: {name!r} must be a text, got {fields.get(name)!r}")
    answers = fields.get("answer")
    answers = answers if isinstance(answers, list) else [answers]
    if not answers or any(isinstance(one, bool) or not isinstance(one, (str, int, float)) for one in answers):
        raise InvalidInputError(f"{where}: 'answer' must be a text or a list of texts, got {fields.get('answer')!r}")
    kind = fields.get("kind", "")
    if not isinstance(kind, str):
        raise InvalidInputError(f"{where}: 'kind' must be a text, got {kind!r}")
    image = folder / fields["image"]
    if not image.is_file():
        raise InvalidInputError(f"{where}: no picture at {image}")
    return Question(image, fields["question"], tuple(str(one) for one in answers), kind)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces, as visual question answering compares answers."""
    words = text.lower().translate(str.maketrans(string.punctuation, " " * len(string.punctuation))).split()
    return " ".join(word for word in words if word not in ("a", "an", "the")) or " ".join(words)


def answers_agree(given: str, accepted: Sequence[str], match: Match = "exact") -> bool:
    """Whether an answer is right: equal to an accepted one, or (`"contains"`) holding one as whole words."""
    said = normalised(given)
    if match == "exact":
        return any(said == normalised(one) for one in accepted)
    return any(re.search(rf"(?<!\S){re.escape(normalised(one))}(?!\S)", said) for one in accepted)
