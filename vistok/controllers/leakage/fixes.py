"""Editing text states after the encoder: patching, un-contextualised replacement, in-item redundancy removal.

Letters: R rows (prompts), N token positions, D width, T tokens of the prompt.

An item is a contiguous span of tokens that names one thing. Position i of a patched prompt holds its own state, or the
state of an empty prompt at the same position, or the state that the item has when it is encoded alone. Nothing is
masked and nothing gets shorter.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vistok.errors import InvalidInputError, require
from vistok.nn.prompts import EncodedPrompts, PipelineText, PromptController, TextEncoderSlot, pad_ids
from vistok.nn.spans import Subject, TokenSpans, covered_tokens, find_subject, locate_ids, token_spans, visible_tokens

__all__ = [
    "KeepOnly",
    "LeakageFix",
    "kept_positions",
    "lone_positions",
    "merge_positions",
    "noun_chunks",
    "pad_states",
    "patch_states",
    "replace_item",
    "spacy_chunks",
]

Characters = tuple[int, int]
Parser = Callable[[str], Sequence[Characters]]
Chooser = Callable[[Tensor], Sequence[bool]]


def patch_states(states: Tensor, pads: Tensor, keep: Sequence[int]) -> Tensor:
    """Every position outside `keep` takes the pad state of the same position.

    Args:
        states: [R, N, D].
        pads: [R or 1, N, D], states of an empty prompt.
        keep: positions whose own state stays.

    Raises:
        InvalidInputError: for a position outside the sequence.
    """
    length = states.shape[1]
    outside = [position for position in keep if not 0 <= position < length]
    if outside:
        raise InvalidInputError(f"positions {outside} lie outside the sequence of {length} tokens")
    kept = torch.zeros(length, dtype=torch.bool, device=states.device)
    kept[list(keep)] = True
    return torch.where(kept[:, None], states, pads.to(states))


def replace_item(states: Tensor, lone: Tensor, positions: Sequence[int], sources: Sequence[int]) -> Tensor:
    """Un-contextualised replacement: the item's positions take the states that it has by itself.

    Args:
        states: [R, N, D].
        lone: [N, D] or [R, N, D], the item encoded alone at the same length.
        positions: the item's positions in the prompt.
        sources: the same tokens' positions in the lone encoding (from 0 for T5, from 1 for CLIP).
    """
    if len(positions) != len(sources):
        raise InvalidInputError(f"{len(positions)} positions cannot take the states of {len(sources)} tokens")
    result = states.clone()
    result[:, list(positions)] = lone.to(states)[..., list(sources), :]
    return result


def merge_positions(states: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Each range [first, last] of positions shares the mean of its states.

    The authors describe the option without its formula; the mean is our choice.
    """
    result = states.clone()
    for first, last in ranges:
        if not 0 <= first <= last < states.shape[1]:
            raise InvalidInputError(
                f"the range [{first}, {last}] lies outside the sequence of {states.shape[1]} tokens"
            )
        result[:, first : last + 1] = states[:, first : last + 1].mean(dim=1, keepdim=True)
    return result


def kept_positions(selector: str | Sequence[int], count: int, length: int) -> list[int]:
    """Positions that a selector of the authors' wrapper keeps.

    Args:
        selector: `full` (all), `tokens` (the prompt; padding becomes clean), `pads` (the padding only), or positions.
        count: T, tokens of the prompt, special ones included.
        length: N.
    """
    if not isinstance(selector, str):
        return sorted(set(selector))
    known = {"full": range(length), "tokens": range(min(count, length)), "pads": range(min(count, length), length)}
    if selector not in known:
        raise InvalidInputError(f"unknown selector {selector!r}; expected {', '.join(known)} or a list of positions")
    return list(known[selector])


@torch.no_grad()
def pad_states(text: PipelineText, slot: TextEncoderSlot, pads: str | None = None) -> tuple[Tensor, Tensor | None]:
    """(states [1, N, D], pooled [1, P] or None) that stand for "no token".

    Args:
        text: the pipeline's encoders.
        slot: one of them.
        pads: a text of your own, or None for the authors' rule: the empty prompt for FLUX, the empty prompt with its
            attention mask for SDXL, and the padding token written as text for Stable Diffusion and SD3.
    """
    own = slot.tokenizer.pad_token if text.family in ("sd", "sd3") else ""
    ids, mask = pad_ids(slot.tokenizer, [own if pads is None else pads], slot.length)
    masked = slot.masked or (text.family == "sdxl" and pads is None)
    return slot.states(ids, attention_mask=mask if masked else None)


def lone_positions(prompt: TokenSpans, positions: Sequence[int], lone: TokenSpans) -> list[int]:
    """Where the tokens of an item stand in its lone encoding.

    The same ids are matched one to one; where the tokenizer cuts the item differently in the prompt (punctuation glued
    to a word), each token takes the lone token that holds its first character.

    Args:
        prompt: the tokenised prompt.
        positions: the item's positions in it.
        lone: the tokenised item.
    """
    start, stop = lone.content
    wanted = [prompt.ids[position] for position in positions]
    if list(lone.ids[start:stop]) == wanted:
        return list(range(start, stop))
    found = locate_ids(lone.ids, wanted)
    if found:
        return list(range(found[0], found[0] + len(wanted)))
    offset = prompt.characters[positions[0]][0]
    sources = []
    for position in positions:
        place = prompt.characters[position][0] - offset
        inside = [
            index for index in range(start, stop) if lone.characters[index][0] <= place < lone.characters[index][1]
        ]
        if not inside:
            raise InvalidInputError(
                f"the item {lone.prompt!r} is tokenised differently by itself; choose a span that ends at word "
                "boundaries"
            )
        sources.append(inside[-1])
    return sources


_DETERMINERS = [
    "a",
    "an",
    "the",
    "this",
    "that",
    "these",
    "those",
    "his",
    "her",
    "its",
    "their",
    "my",
    "your",
    "our",
    "some",
    "two",
    "three",
    "four",
    "five",
    "six",
]
_BREAKS = {
    "to",
    "of",
    "in",
    "on",
    "at",
    "by",
    "with",
    "from",
    "near",
    "under",
    "over",
    "above",
    "below",
    "behind",
    "beside",
    "between",
    "beneath",
    "inside",
    "outside",
    "into",
    "onto",
    "through",
    "across",
    "against",
    "along",
    "around",
    "and",
    "or",
    "but",
    "while",
    "as",
    "is",
    "are",
    "was",
    "were",
    "be",
    "been",
    "next",
    "left",
    "right",
    "front",
    "top",
    "bottom",
    "who",
    "which",
    "that",
    "where",
    "when",
    "wearing",
    "holding",
    "sitting",
    "standing",
    "running",
    "walking",
    "riding",
    "eating",
    "looking",
    "photo",
    "picture",
    "image",
    "painting",
    "portrait",
    "drawing",
}


def noun_chunks(prompt: str) -> list[Characters]:
    """Candidate items by rule: what follows a determiner, up to the next preposition, conjunction or punctuation.

    A small stand-in for a parser (English only); `spacy_chunks` uses a real one. A participle right after the
    determiner belongs to the item ("a standing zebra").

    Returns:
        (start, end) characters of each candidate, without its determiner.
    """
    chunks: list[Characters] = []
    words = list(re.finditer(r"[\w'’-]+|[^\w\s]", prompt))
    index = 0
    while index < len(words):
        if words[index].group().lower() not in _DETERMINERS:
            index += 1
            continue
        index += 1
        first = index
        while index < len(words):
            word = words[index].group().lower()
            ending = word.endswith("ing") and index > first
            if word in _DETERMINERS or not re.match(r"\w", word) or ending:
                break
            if word in _BREAKS and not (index == first and word.endswith("ing")):
                break
            index += 1
        if index > first:
            chunks.append((words[first].start(), words[index - 1].end()))
    return chunks


def spacy_chunks(model: str = "en_core_web_sm") -> Parser:
    """A parser of noun chunks by spaCy, without their determiners.

    Raises:
        MissingExtraError: without spaCy.
    """
    pipeline = require("spacy", "controllers").load(model)

    def parse(prompt: str) -> list[Characters]:
        found = []
        for chunk in pipeline(prompt).noun_chunks:
            words = [token for token in chunk if token.pos_ not in ("DET", "PRON")]
            if words:
                found.append((words[0].idx, words[-1].idx + len(words[-1])))
        return found

    return parse


class LeakageFix(PromptController):
    """Stops one item's meaning from leaking into another (Kaplan et al., arXiv 2504.01137).

        fix = LeakageFix(["standing zebra"])
        image = pipe(**fix.prompt_kwargs(pipe, "a standing zebra to the right of a bus station")).images[0]

    Acts on the token states after the text encoder: chosen items get the states that they have without context, and
    tokens that carry no meaning of their own are replaced by padding. Nothing is added to the denoising steps.

    Args:
        items: what to treat: words or phrases, compiled regular expressions or (start, end) characters; or a mapping
            from a prompt to its items. None asks `parser`.
        parser: prompt -> (start, end) of the candidates; `noun_chunks` by default.
        replace: un-contextualised replacement of the items.
        drop: `redundant` to replace all but the representative token of each item by padding; None to keep them.
        representative: which token carries an item. `last`, `first`, `rule` (the last for causal CLIP; for T5 the one
            whose state changes least between the item alone and "a photo of ..."), or a function of the item's lone
            states [T, D] that returns T flags (`RedundancyClassifier.representative`).
        pooled: `full` keeps the pooled vector of the whole prompt; `pads` takes that of the empty prompt, which also
            removes global style.
        pads: text that stands for padding; None for the authors' rule, see `pad_states`.
        strength: 1 replaces, 0 leaves; values between mix the states.
        encoders: keys of the encoders to edit; None for all.
        start: part of the steps before which the plain prompt holds.
        stop: part of the steps after which it holds again.
    """

    order: ClassVar[int] = 0

    def __init__(
        self,
        items: Sequence[Subject] | Mapping[str, Sequence[Subject]] | None = None,
        *,
        parser: Parser = noun_chunks,
        replace: bool = True,
        drop: str | None = None,
        representative: str | Chooser = "rule",
        pooled: str = "full",
        pads: str | None = None,
        strength: float = 1.0,
        encoders: Sequence[str] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        if drop not in (None, "redundant"):
            raise InvalidInputError(f"drop must be None or 'redundant', got {drop!r}")
        if not replace and drop is None:
            raise InvalidInputError("there is nothing to do: choose replace=True, drop='redundant', or both")
        if isinstance(representative, str) and representative not in ("rule", "last", "first"):
            raise InvalidInputError(
                f"representative must be 'rule', 'last', 'first' or a function, got {representative!r}"
            )
        if pooled not in ("full", "pads"):
            raise InvalidInputError(f"pooled must be 'full' or 'pads', got {pooled!r}")
        if not 0.0 <= strength <= 1.0:
            raise InvalidInputError(f"strength must lie in [0, 1], got {strength}")
        if not isinstance(items, Mapping) and items is not None and not list(items):
            raise InvalidInputError("the list of items is empty; give items, or None to ask the parser")
        if isinstance(items, str):
            raise InvalidInputError(f"items is a list, got the text {items!r}; write [{items!r}]")
        self.items = items
        self.parser = parser
        self.replace, self.drop, self.representative = replace, drop, representative
        self.pooled, self.pads, self.strength = pooled, pads, float(strength)
        self.encoders = encoders
        self.start, self.stop = float(start), float(stop)

    def spans(self, prompt: str, *, alone: bool = True) -> list[Characters]:
        """Characters of the items of one prompt; overlapping items are refused.

        Args:
            prompt: the text.
            alone: whether an item that the prompt does not have is an error (in a batch others may have it).
        """
        if self.items is None:
            found = [tuple(span) for span in self.parser(prompt)]
        else:
            wanted = self.items.get(prompt, ()) if isinstance(self.items, Mapping) else self.items
            found = []
            for item in wanted:
                try:
                    found += find_subject(prompt, item)
                except InvalidInputError:
                    if alone or isinstance(self.items, Mapping):
                        raise
        ordered = sorted(set(found))
        for (start, end), (following, last) in itertools.pairwise(ordered):
            if following < end:
                raise InvalidInputError(
                    f"the items {prompt[start:end]!r} and {prompt[following:last]!r} overlap in {prompt!r}"
                )
        return ordered  # type: ignore[return-value]

    def _check_batch(self, prompts: Sequence[str]) -> None:
        if self.items is None or isinstance(self.items, Mapping) or len(set(prompts)) == 1:
            return
        for item in self.items:
            if not any(_occurs(prompt, item) for prompt in prompts):
                find_subject(prompts[0], item)  # raises with the list of words

    def texts(self, prompts: Sequence[str], text: PipelineText) -> list[str]:
        self._check_batch(prompts)
        found = []
        for prompt in dict.fromkeys(prompts):
            for start, end in self.spans(prompt, alone=len(set(prompts)) == 1):
                found.append(prompt[start:end])
                if (
                    self.drop is not None
                    and self.representative == "rule"
                    and any(slot.kind == "t5" for slot in text.encoders)
                ):
                    found.append(f"a photo of {prompt[start:end]}")
        return found

    def edit(self, prompts: EncodedPrompts, fraction: float) -> EncodedPrompts:
        unknown = set(self.encoders or ()) - set(prompts.text.keys)
        if unknown:
            raise InvalidInputError(
                f"this pipeline has no text encoder {', '.join(sorted(unknown))}; it has {', '.join(prompts.text.keys)}"
            )
        states, pooled = dict(prompts.states), dict(prompts.pooled)
        single = len(set(prompts.prompts)) == 1
        for slot in prompts.text.encoders:
            if self.encoders is not None and slot.key not in self.encoders:
                continue
            pads, pooled_pads = (None, None)
            if self.drop is not None or self.pooled == "pads":
                pads, pooled_pads = pad_states(prompts.text, slot, self.pads)
            if slot.tokens:
                rows: dict[str, Tensor] = {}
                for row, prompt in enumerate(prompts.prompts):
                    if prompt not in rows:
                        rows[prompt] = self._row(prompts, slot, row, pads, single)
                edited = torch.stack([rows[prompt] for prompt in prompts.prompts])
                states[slot.key] = (
                    edited if self.strength == 1.0 else torch.lerp(states[slot.key], edited, self.strength)
                )
            if self.pooled == "pads" and slot.pooled and pooled_pads is not None:
                pooled[slot.key] = pooled_pads.to(pooled[slot.key]).expand_as(pooled[slot.key]).clone()
        return prompts.with_states(states, pooled)

    def _row(
        self, prompts: EncodedPrompts, slot: TextEncoderSlot, row: int, pads: Tensor | None, single: bool
    ) -> Tensor:
        """The edited states [N, D] of one prompt in one encoder: one gather from (prompt, empty prompt, items)."""
        prompt, own = prompts.prompts[row], prompts.states[slot.key][row]
        spans = prompts.spans(slot.key, row)
        bank = [own, own if pads is None else pads[0].to(own)]
        source = torch.zeros(own.shape[0], dtype=torch.long)
        place = torch.arange(own.shape[0])
        for characters in self.spans(prompt, alone=single):
            text = prompt[characters[0] : characters[1]]
            positions = covered_tokens(spans, [characters], slot.length)
            alone = token_spans(text, slot.tokenizer)
            sources = lone_positions(spans, positions, alone)
            lone = prompts.lone_states(slot.key, text).to(own)
            where = torch.tensor(positions)
            if self.replace:
                bank.append(lone)
                source[where], place[where] = len(bank) - 1, torch.tensor(sources)
            if self.drop is not None:
                carrying = self._representatives(prompts, slot, text, lone, alone, sources)
                redundant = [position for position, keep in zip(positions, carrying, strict=True) if not keep]
                source[redundant], place[redundant] = 1, torch.tensor(redundant, dtype=torch.long)
        chosen = torch.stack(bank)
        return chosen[source.to(own.device), place.to(own.device)]

    def _representatives(
        self,
        prompts: EncodedPrompts,
        slot: TextEncoderSlot,
        text: str,
        lone: Tensor,
        alone: TokenSpans,
        sources: Sequence[int],
    ) -> list[bool]:
        """Which of the item's tokens carry it."""
        count = len(sources)
        if callable(self.representative):
            flags = [bool(flag) for flag in self.representative(lone[list(sources)])]
            if len(flags) != count:
                raise InvalidInputError(f"the representative function gave {len(flags)} flags for {count} tokens")
            return flags if any(flags) else [index == count - 1 for index in range(count)]
        chosen = 0 if self.representative == "first" else count - 1
        if self.representative == "rule" and slot.kind == "t5":
            context = f"a photo of {text}"
            inside = token_spans(context, slot.tokenizer)
            start = len(context) - len(text)
            positions = covered_tokens(inside, [(start, len(context))])
            if len(positions) == count and max(positions) < visible_tokens(inside, slot.length):
                moved = prompts.lone_states(slot.key, context).to(lone)[positions]
                alike = torch.cosine_similarity(moved.float(), lone[list(sources)].float(), dim=-1)
                chosen = int(alike.argmax())
        return [index == chosen for index in range(count)]


def _occurs(prompt: str, item: Subject) -> bool:
    try:
        find_subject(prompt, item)
    except InvalidInputError:
        return False
    return True


class KeepOnly(PromptController):
    """Shows what some tokens mean by themselves: all others become padding (the paper's probe).

        single = KeepOnly(["zebra"])          # the image of this item within its prompt

    Args:
        keep: items (as in `LeakageFix`), or `tokens` / `pads` / `full`.
        pooled: `full` or `pads`, see `LeakageFix`.
        pads: see `LeakageFix`.
    """

    order: ClassVar[int] = 5

    def __init__(self, keep: str | Sequence[Subject], *, pooled: str = "full", pads: str | None = None) -> None:
        if isinstance(keep, str) and keep not in ("full", "tokens", "pads"):
            raise InvalidInputError(f"keep is 'full', 'tokens', 'pads' or a list of items, got {keep!r}")
        if pooled not in ("full", "pads"):
            raise InvalidInputError(f"pooled must be 'full' or 'pads', got {pooled!r}")
        self.keep, self.pooled, self.pads = keep, pooled, pads

    def edit(self, prompts: EncodedPrompts, fraction: float) -> EncodedPrompts:
        states, pooled = dict(prompts.states), dict(prompts.pooled)
        for slot in prompts.text.encoders:
            pads, pooled_pads = pad_states(prompts.text, slot, self.pads)
            if slot.tokens:
                rows = []
                for row in range(len(prompts)):
                    kept = self._positions(prompts, slot, row)
                    rows.append(patch_states(states[slot.key][row : row + 1], pads, kept))
                states[slot.key] = torch.cat(rows)
            if self.pooled == "pads" and slot.pooled and pooled_pads is not None:
                pooled[slot.key] = pooled_pads.to(pooled[slot.key]).expand_as(pooled[slot.key]).clone()
        return prompts.with_states(states, pooled)

    def _positions(self, prompts: EncodedPrompts, slot: Any, row: int) -> list[int]:
        spans = prompts.spans(slot.key, row)
        if isinstance(self.keep, str):
            return kept_positions(self.keep, len(spans), slot.length)
        return sorted({place for item in self.keep for place in prompts.positions(slot.key, row, item)})
