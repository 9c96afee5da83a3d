"""Where the words of a prompt lie among its tokens, for any Hugging Face tokenizer.

Letters: T tokens of the unpadded prompt (special tokens included).

Source: attribute control (arXiv 2403.17064) selects tokens whose characters all belong to the subject. Fast tokenizers
report the characters of each token (capitals, accents and bytes included); for others `align_tokens` walks over the
prompt as the authors' code does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vistok.errors import InvalidInputError

__all__ = [
    "Subject",
    "TokenSpans",
    "align_tokens",
    "character_mask",
    "covered_tokens",
    "find_subject",
    "locate_ids",
    "token_spans",
    "visible_tokens",
]

# A word or phrase, a regular expression, or (start, end) characters of the prompt.
Subject = str | re.Pattern[str] | tuple[int, int]
Characters = tuple[int, int]

_WORD = re.compile(r"\w+(?:['’]\w+)?", re.UNICODE)
_IRREGULAR = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "ox": "oxen",
    "leaf": "leaves",
    "knife": "knives",
    "wolf": "wolves",
    "calf": "calves",
    "shelf": "shelves",
}


@dataclass(frozen=True)
class TokenSpans:
    """A tokenised prompt.

    Attributes:
        prompt: the text.
        ids: T token ids, special tokens included, neither padded nor truncated.
        characters: T pairs (start, end) of characters; empty for special tokens and for bare spaces.
        special: T flags.
    """

    prompt: str
    ids: tuple[int, ...]
    characters: tuple[Characters, ...]
    special: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def content(self) -> tuple[int, int]:
        """(first, one after last) position of tokens that are not special."""
        real = [position for position, special in enumerate(self.special) if not special]
        return (real[0], real[-1] + 1) if real else (self.special.index(True) + 1 if any(self.special) else 0,) * 2


def align_tokens(prompt: str, tokens: Sequence[str]) -> list[Characters]:
    """Characters of each token from its vocabulary string, walking over the prompt with a cursor.

    Args:
        prompt: the text; capitals are compared as the tokenizer writes them or in lower case.
        tokens: vocabulary strings of CLIP (`man</w>`, `<|endoftext|>`) or SentencePiece (`▁man`, `</s>`).

    Returns:
        (start, end) for each token; special tokens get the empty span at the cursor.

    Raises:
        InvalidInputError: if the tokens do not spell the prompt.
    """
    lowered = prompt.lower() if len(prompt.lower()) == len(prompt) else prompt
    spans: list[Characters] = []
    skipped = []
    cursor = 0
    for token in tokens:
        if token in ("<|startoftext|>", "<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>"):
            spans.append((cursor, cursor))
            continue
        piece = token.removesuffix("</w>").removeprefix("▁")
        if not piece:
            spans.append((cursor, cursor))
            continue
        text = prompt if piece != piece.lower() else lowered
        begin = text.find(piece, cursor)
        if begin < 0 or any(sign.isalpha() for sign in prompt[cursor:begin]):
            raise InvalidInputError(
                f"token {token!r} does not continue the prompt {prompt!r} at character {cursor}; "
                "use a fast tokenizer (use_fast=True), which reports the characters of every token"
            )
        skipped.append(prompt[cursor:begin])
        cursor = begin + len(piece)
        spans.append((begin, cursor))
    rest = prompt[cursor:]
    if any(sign.isalpha() for part in (*skipped, rest) for sign in part):
        raise InvalidInputError(f"the tokens do not cover {rest!r} at the end of the prompt {prompt!r}")
    return spans


def token_spans(prompt: str, tokenizer: Any) -> TokenSpans:
    """Tokenise a prompt (no padding, no truncation) and find the characters of each token.

    Args:
        prompt: the text.
        tokenizer: any `transformers` tokenizer. Fast ones handle capitals, accents and characters of several tokens.
    """
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(
            prompt,
            add_special_tokens=True,
            truncation=False,
            padding=False,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        ids = [int(number) for number in encoded["input_ids"]]
        special = [bool(flag) for flag in encoded["special_tokens_mask"]]
        offsets = _trimmed(prompt, [tuple(pair) for pair in encoded["offset_mapping"]], special)
    else:
        ids = [int(number) for number in tokenizer(prompt, truncation=False, padding=False, verbose=False)["input_ids"]]
        offsets = align_tokens(prompt, tokenizer.convert_ids_to_tokens(ids))
        known = set(tokenizer.all_special_ids)
        special = [number in known and begin == end for number, (begin, end) in zip(ids, offsets, strict=True)]
    return TokenSpans(prompt, tuple(ids), tuple(offsets), tuple(special))


def _trimmed(prompt: str, offsets: Sequence[Characters], special: Sequence[bool]) -> list[Characters]:
    """Offsets without surrounding spaces; special tokens get the empty span at the cursor."""
    spans: list[Characters] = []
    cursor = 0
    for (begin, end), is_special in zip(offsets, special, strict=True):
        while begin < end and prompt[begin].isspace():
            begin += 1
        while end > begin and prompt[end - 1].isspace():
            end -= 1
        if is_special or end <= begin:
            spans.append((cursor, cursor))
        else:
            spans.append((begin, end))
            cursor = max(cursor, end)
    return spans


def visible_tokens(spans: TokenSpans, length: int) -> int:
    """How many leading positions still hold the prompt's own tokens once it is cut to `length`.

    Truncation keeps the closing special tokens (CLIP: 75 words between two of them; T5: all but one).
    """
    if len(spans) <= length:
        return len(spans)
    closing = 0
    while closing < len(spans) and spans.special[len(spans) - 1 - closing]:
        closing += 1
    return max(length - closing, 0)


def character_mask(prompt: str, subject: str | re.Pattern[str], *, escape: bool = False) -> list[bool]:
    """Marks the characters of every non-overlapping match.

    Args:
        prompt: the text.
        subject: a regular expression, or a plain string with `escape`.
        escape: take `subject` literally.
    """
    pattern = subject if isinstance(subject, re.Pattern) else re.compile(re.escape(subject) if escape else subject)
    mask = [False] * len(prompt)
    for match in pattern.finditer(prompt):
        mask[match.start() : match.end()] = [True] * (match.end() - match.start())
    return mask


def _forms(word: str) -> list[str]:
    """The other number of an English noun: plurals of a singular, and singulars of a plural."""
    found = []
    lower = word.lower()
    for one, many in _IRREGULAR.items():
        if lower == one or (lower.endswith(one) and one in ("man", "woman", "child")):
            found.append(lower.removesuffix(one) + many)
        if lower == many or (lower.endswith(many) and one in ("man", "woman", "child")):
            found.append(lower.removesuffix(many) + one)
    if lower.endswith("y") and len(lower) > 2 and lower[-2] not in "aeiou":
        found.append(lower[:-1] + "ies")
    elif lower.endswith(("s", "x", "z", "ch", "sh", "o")):
        found.append(lower + "es")
    found.append(lower + "s")
    if lower.endswith("ies") and len(lower) > 4:
        found.append(lower[:-3] + "y")
    if lower.endswith("es") and len(lower) > 3:
        found.append(lower[:-2])
    if lower.endswith("s") and not lower.endswith("ss") and len(lower) > 2:
        found.append(lower[:-1])
    return found


def _matches(prompt: str, phrase: str) -> list[Characters]:
    # Any run of spaces stands between the words of a phrase; word boundaries only where the phrase ends in a letter.
    words = [re.escape(word) for word in phrase.split()]
    before = r"(?<!\w)" if re.match(r"\w", phrase.strip()) else ""
    after = r"(?!\w)" if re.search(r"\w$", phrase.strip()) else ""
    pattern = before + r"\s+".join(words) + after
    return [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)]


def find_subject(prompt: str, subject: Subject, occurrence: int | None = None) -> list[Characters]:
    """The characters of a subject.

    Args:
        prompt: the text.
        subject: a word or phrase (any case, whole words; where it does not occur, its plural or singular is looked
            for), a compiled regular expression, or (start, end).
        occurrence: which of several matches, counted from 0 (negative from the end); None takes all of them.

    Returns:
        One (start, end) for each match.

    Raises:
        InvalidInputError: if the subject is empty or does not occur (the words of the prompt are listed), if there is
            no such occurrence, or if (start, end) lies outside the prompt.
    """
    if isinstance(subject, tuple):
        start, end = subject
        if not 0 <= start < end <= len(prompt):
            raise InvalidInputError(
                f"the span ({start}, {end}) lies outside the prompt of {len(prompt)} characters, or is empty"
            )
        return [(start, end)]
    if isinstance(subject, re.Pattern):
        name = subject.pattern
        found = [match.span() for match in subject.finditer(prompt) if match.end() > match.start()]
    else:
        name = subject
        if not subject.strip():
            raise InvalidInputError("the subject is empty; expected a word or phrase of the prompt")
        found = _matches(prompt, subject)
        if not found:
            *start_words, last = subject.split()
            for form in _forms(last):
                found = _matches(prompt, " ".join([*start_words, form]))
                if found:
                    break
    if not found:
        words = list(dict.fromkeys(word.group() for word in _WORD.finditer(prompt)))
        raise InvalidInputError(
            f"the subject {name!r} is not in the prompt {prompt!r}; its words are: {', '.join(words) or '(none)'}"
        )
    if occurrence is None:
        return found
    if not -len(found) <= occurrence < len(found):
        raise InvalidInputError(
            f"the subject {name!r} occurs {len(found)} time{'s' if len(found) > 1 else ''} in the prompt {prompt!r}; "
            f"occurrence {occurrence} does not exist (they count from 0)"
        )
    return [found[occurrence]]


def covered_tokens(spans: TokenSpans, characters: Sequence[Characters], length: int | None = None) -> list[int]:
    """Positions of the tokens whose characters all lie inside the given ones.

    Args:
        spans: the tokenised prompt.
        characters: (start, end) pairs.
        length: tokens that the encoder sees; None for all.

    Raises:
        InvalidInputError: if a token lies only partly inside, if none lies inside, or if truncation to `length` takes
            some of them away.
    """
    marked = [False] * len(spans.prompt)
    for start, end in characters:
        marked[start:end] = [True] * (end - start)
    chosen = []
    for position, (start, end) in enumerate(spans.characters):
        if end <= start or spans.special[position]:
            continue
        inside = marked[start:end]
        if all(inside):
            chosen.append(position)
        elif any(inside):
            raise InvalidInputError(
                f"the subject cuts through the token {spans.prompt[start:end]!r} of the prompt {spans.prompt!r}; "
                "choose whole words (in a regular expression: word boundaries, \\b)"
            )
    given = [spans.prompt[start:end] for start, end in characters]
    if not chosen:
        raise InvalidInputError(f"no token of the prompt {spans.prompt!r} belongs to {given}")
    if length is not None:
        visible = visible_tokens(spans, length)
        lost = [position for position in chosen if position >= visible]
        if lost:
            raise InvalidInputError(
                f"{given} is truncated away: it takes the token positions {chosen}, but of this prompt of {len(spans)} "
                f"tokens the encoder sees the first {visible}; shorten the prompt or move the subject forward"
            )
    return chosen


def locate_ids(ids: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Starts of every occurrence of the id sequence `wanted` inside `ids`."""
    size = len(wanted)
    if size == 0:
        return []
    return [start for start in range(len(ids) - size + 1) if list(ids[start : start + size]) == list(wanted)]
