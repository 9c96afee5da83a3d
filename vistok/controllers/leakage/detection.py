"""Which tokens carry an item, and which items leak.

Letters: T tokens of an item, K items, D width.

The redundancy classifier follows the paper's description (nearest neighbours on encoder states); its features, k and
training set are not published, so labels are the user's. The leakage score is a cheap stand-in of ours for judging
images: how far an item's states move in this prompt, compared with how far they move in neutral contexts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vistok.controllers.leakage.fixes import Parser, lone_positions, noun_chunks
from vistok.errors import CheckpointError, InvalidInputError
from vistok.files import read_state_dict, save_tensors
from vistok.nn.prompts import PipelineText, encode_prompts
from vistok.nn.spans import Subject, covered_tokens, find_subject, token_spans

__all__ = ["NEUTRAL_CONTEXTS", "ItemLeakage", "RedundancyClassifier", "detect_leakage"]

# {} is the item. Contexts that do not change what an item is.
NEUTRAL_CONTEXTS = (
    "a photo of {}",
    "{} and a tree",
    "a picture of {} outdoors",
    "a drawing of {}",
    "a tree and {}",
    "{} on a plain background",
    "a close-up of {}",
    "{} in the sun",
)


class RedundancyClassifier:
    """Finds tokens that add nothing to their item: k nearest neighbours on encoder states, by cosine distance.

    Args:
        states: [M, D], states of labelled tokens.
        redundant: bool [M].
        neighbours: k.
    """

    def __init__(self, states: Tensor, redundant: Tensor, neighbours: int = 5) -> None:
        if states.ndim != 2 or redundant.shape != states.shape[:1] or not len(states):
            raise InvalidInputError(
                f"expected states [M, D] and M labels, got {list(states.shape)} and {list(redundant.shape)}"
            )
        if not 1 <= neighbours <= len(states):
            raise InvalidInputError(f"neighbours must be between 1 and the {len(states)} examples, got {neighbours}")
        if not bool(torch.isfinite(states).all()):
            raise InvalidInputError("the states of the examples hold NaN or infinite values")
        self.states = functional.normalize(states.float(), dim=-1)
        self.labels = redundant.bool()
        self.neighbours = neighbours

    def redundant(self, states: Tensor) -> Tensor:
        """bool [T] for token states [T, D]."""
        alike = functional.normalize(states.float(), dim=-1) @ self.states.T.to(states.device)
        nearest = alike.topk(self.neighbours, dim=-1).indices
        votes = self.labels.to(states.device)[nearest].float().mean(dim=-1)
        return votes > 0.5

    def representative(self, states: Tensor) -> list[bool]:
        """T flags for `LeakageFix(representative=...)`: the tokens that carry the item."""
        return [not flag for flag in self.redundant(states).tolist()]

    def precision(self, states: Tensor, redundant: Tensor) -> float:
        """Share of tokens called redundant that are; NaN if none is called so."""
        called = self.redundant(states)
        return float(redundant.to(called.device)[called].float().mean()) if bool(called.any()) else float("nan")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the examples as safetensors."""
        save_tensors(path, {"states": self.states, "labels": self.labels}, {"neighbours": str(self.neighbours)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RedundancyClassifier:
        """Read what `save` wrote."""
        from safetensors import safe_open

        tensors = read_state_dict(path)
        if set(tensors) != {"states", "labels"}:
            raise CheckpointError(f"{path} is no redundancy classifier: it holds {', '.join(sorted(tensors)[:6])}")
        with safe_open(str(path), framework="pt") as file:
            neighbours = int((file.metadata() or {}).get("neighbours", 5))
        return cls(tensors["states"], tensors["labels"], neighbours)


@dataclass(frozen=True)
class ItemLeakage:
    """How an item fares in a prompt.

    Attributes:
        item: its text.
        characters: (start, end) in the prompt.
        distance: cosine distance between its states in the prompt and alone, averaged over the encoders.
        threshold: the quantile of that distance over neutral contexts.
        leaked: whether the distance exceeds the threshold.
    """

    item: str
    characters: tuple[int, int]
    distance: float
    threshold: float

    @property
    def leaked(self) -> bool:
        return self.distance > self.threshold


@torch.no_grad()
def detect_leakage(
    text: PipelineText,
    prompt: str,
    items: Sequence[Subject] | None = None,
    *,
    parser: Parser = noun_chunks,
    contexts: Sequence[str] = NEUTRAL_CONTEXTS,
    quantile: float = 0.95,
    margin: float = 1.0,
) -> list[ItemLeakage]:
    """Flags items that the rest of the prompt changes more than neutral contexts do (a proxy of ours, not the paper's).

    A causal encoder moves states with their position as well, so items late in a long prompt score higher; compare
    items of prompts of like length, or raise `margin`.

    Args:
        text: the pipeline's encoders (`vistok.nn.prompts.describe_pipeline`).
        prompt: the prompt.
        items: see `LeakageFix`; None asks the parser.
        parser: prompt -> (start, end) of candidates.
        contexts: templates with one `{}`.
        quantile: of the neutral distances, in (0, 1].
        margin: factor on that quantile.

    Returns:
        One entry an item, most moved first.
    """
    if not 0.0 < quantile <= 1.0 or margin <= 0:
        raise InvalidInputError(f"quantile must lie in (0, 1] and margin above 0, got {quantile} and {margin}")
    if not contexts or any(context.count("{}") != 1 for context in contexts):
        raise InvalidInputError("each neutral context needs exactly one {}")
    spans: list[Any] = (
        list(parser(prompt)) if items is None else [span for item in items for span in find_subject(prompt, item)]
    )
    found = []
    for start, end in spans:
        name = prompt[start:end]
        framed = [context.format(name) for context in contexts]
        encoded, _ = encode_prompts(text, [name, prompt, *framed])
        places = [(start, end), *((context.index("{}"), context.index("{}") + len(name)) for context in contexts)]
        distances = torch.zeros(len(places), dtype=torch.float64)
        slots = [slot for slot in text.encoders if slot.tokens]
        for slot in slots:
            alone = token_spans(name, slot.tokenizer)
            for index, (sentence, characters) in enumerate(zip([prompt, *framed], places, strict=True)):
                inside = token_spans(sentence, slot.tokenizer)
                positions = covered_tokens(inside, [characters], slot.length)
                sources = lone_positions(inside, positions, alone)
                states = encoded.states[slot.key]
                alike = torch.cosine_similarity(
                    states[index + 1, positions].double(), states[0, sources].double(), dim=-1
                )
                # The tokens that carry an item move least; the mean follows all of them.
                distances[index] += float((1 - alike).mean()) / len(slots)
        threshold = float(distances[1:].quantile(quantile)) * margin
        found.append(ItemLeakage(name, (start, end), float(distances[0]), threshold))
    return sorted(found, key=lambda entry: entry.distance - entry.threshold, reverse=True)
