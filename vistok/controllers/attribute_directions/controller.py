"""The controller: which subject, which delta, how far, and from which step on.

Letters: R rows (images), N token positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vistok.controllers.attribute_directions.deltas import AttributeDelta, add_direction
from vistok.errors import InvalidInputError
from vistok.nn.prompts import EncodedPrompts, PromptController
from vistok.nn.spans import Subject

__all__ = ["AttributeDirections", "AttributeEdit"]


@dataclass(frozen=True)
class AttributeEdit:
    """One attribute of one subject.

    Attributes:
        delta: the direction.
        subject: word or phrase, compiled regular expression, or (start, end) characters; or a mapping from a prompt to
            one of these, for a batch of different prompts. Every token of it is moved.
        scale: how far, one number or one an image; negative turns the attribute down. Useful in about [-2, 2].
        occurrence: which of several matches of the subject (from 0; -1 is the last); None for all of them.
    """

    delta: AttributeDelta
    subject: Subject | Mapping[str, Subject]
    scale: float | Sequence[float] | Tensor = 1.0
    occurrence: int | None = None

    def scales(self) -> list[float]:
        """The scale as a list."""
        values = torch.as_tensor(self.scale, dtype=torch.float64).flatten().tolist()
        if not values or not all(math.isfinite(value) for value in values):
            raise InvalidInputError(f"the scale must be finite numbers, got {self.scale!r}")
        return values

    def subject_of(self, prompt: str) -> Subject:
        """The subject of one prompt.

        Raises:
            InvalidInputError: if a mapping does not have the prompt.
        """
        if not isinstance(self.subject, Mapping):
            return self.subject
        if prompt not in self.subject:
            raise InvalidInputError(
                f"no subject is given for the prompt {prompt!r}; the mapping has: "
                f"{', '.join(map(repr, list(self.subject)[:4])) or '(nothing)'}"
            )
        return self.subject[prompt]


class AttributeDirections(PromptController):
    """Turns attributes of subjects up and down (Baumann et al., CVPR 2025, arXiv 2403.17064, section 4).

        age = AttributeDelta.load("person_age.pt")
        controller = AttributeDirections(AttributeEdit(age, "woman", scale=1.5))
        image = pipe(**controller.prompt_kwargs(pipe, "a photo of a woman and an old truck")).images[0]

    Deltas on the same tokens add up. The pooled vectors, all other tokens and the negative prompt stay as they are
    (unless a delta has pooled vectors). Encoders that a delta has no vector for stay as they are.

    Args:
        edits: one edit or several.
        delay: part of the steps, in [0, 1), that uses the plain prompt, so that the layout stays.
        stop: part of the steps after which the plain prompt comes back.
        schedule: (fraction, factor) pairs: from that fraction of the steps on, every scale is multiplied by the factor.
    """

    order: ClassVar[int] = 10

    def __init__(
        self,
        edits: AttributeEdit | Sequence[AttributeEdit],
        *,
        delay: float = 0.2,
        stop: float = 1.0,
        schedule: Sequence[tuple[float, float]] = (),
    ) -> None:
        self.edits = [edits] if isinstance(edits, AttributeEdit) else list(edits)
        if not self.edits:
            raise InvalidInputError("there is nothing to edit: give at least one AttributeEdit")
        if not 0.0 <= delay < 1.0:
            raise InvalidInputError(f"delay is a part of the steps in [0, 1), got {delay}")
        if not delay <= stop <= 1.0:
            raise InvalidInputError(f"stop is a part of the steps in [delay, 1], got {stop}")
        self.start, self.stop = float(delay), float(stop)
        self.schedule = sorted((float(fraction), float(factor)) for fraction, factor in schedule)
        if any(not 0.0 <= fraction <= 1.0 or not math.isfinite(factor) for fraction, factor in self.schedule):
            raise InvalidInputError(f"a schedule holds (fraction in [0, 1], finite factor), got {list(schedule)}")
        for edit in self.edits:
            edit.scales()

    def changes(self) -> list[float]:
        return [self.start, self.stop, *(fraction for fraction, _ in self.schedule)]

    def rows(self, count: int) -> int:
        sizes = {len(edit.scales()) for edit in self.edits} - {1}
        if not sizes:
            return count
        if len(sizes) > 1 or (count != 1 and {count} != sizes):
            raise InvalidInputError(
                f"scales for {', '.join(map(str, sorted(sizes)))} images were given, and there are {count}; give one "
                "scale, or one an image"
            )
        return sizes.pop()

    def factor(self, fraction: float) -> float:
        """What scales are multiplied by from this fraction of the steps on."""
        return next((factor for start, factor in reversed(self.schedule) if start <= fraction), 1.0)

    def edit(self, prompts: EncodedPrompts, fraction: float) -> EncodedPrompts:
        states, pooled = dict(prompts.states), dict(prompts.pooled)
        for edit in self.edits:
            self._check(edit.delta, prompts)
            scale = torch.tensor(edit.scales(), dtype=torch.float64) * self.factor(fraction)
            scale = scale.expand(len(prompts)) if len(scale) == 1 else scale
            for slot in prompts.text.encoders:
                if slot.tokens and slot.key in edit.delta.tokenwise:
                    mask = self.mask(prompts, slot.key, edit)
                    states[slot.key] = add_direction(states[slot.key], edit.delta.tokenwise[slot.key], mask, scale)
                if slot.pooled and slot.key in edit.delta.pooled:
                    vector = pooled[slot.key]
                    direction = edit.delta.pooled[slot.key].to(vector)
                    pooled[slot.key] = vector + scale.to(vector)[:, None] * direction
        return prompts.with_states(states, pooled)

    def mask(self, prompts: EncodedPrompts, key: str, edit: AttributeEdit) -> Tensor:
        """bool [R, N]: the subject's tokens in one encoder, on the device of its states."""
        chosen = torch.zeros(prompts.states[key].shape[:2], dtype=torch.bool)
        for row in range(len(prompts)):
            subject = edit.subject_of(prompts.prompts[row])
            chosen[row, prompts.positions(key, row, subject, edit.occurrence)] = True
        return chosen.to(prompts.states[key].device)

    @staticmethod
    def _check(delta: AttributeDelta, prompts: EncodedPrompts) -> None:
        """Refuse a delta that belongs to other encoders."""
        here = {slot.key: slot.width for slot in prompts.text.encoders if slot.tokens}
        vectors = {slot.key: prompts.pooled[slot.key].shape[-1] for slot in prompts.text.encoders if slot.pooled}
        wrong = [key for key, value in delta.tokenwise.items() if key in here and len(value) != here[key]]
        wrong += [f"pooled {key}" for key, value in delta.pooled.items() if len(value) != vectors.get(key, len(value))]
        if wrong or not (set(delta.tokenwise) & set(here) or set(delta.pooled) & set(vectors)):
            made = ", ".join(f"{key} ({len(value)} wide)" for key, value in {**delta.tokenwise, **delta.pooled}.items())
            has = ", ".join(f"{key} ({width} wide)" for key, width in here.items())
            raise InvalidInputError(
                f"this delta was made for {made}; the {prompts.text.family} pipeline reads the tokens of {has}. "
                "Use a delta of the same encoders, or find one with contrast_delta or DirectionLearner"
            )
