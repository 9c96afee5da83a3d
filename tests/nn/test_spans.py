"""Words among tokens: offsets of fast tokenizers, the cursor walk, subjects, truncation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.parity.pipelines import clip_tokenizer, t5_tokenizer
from vistok.errors import InvalidInputError
from vistok.nn.spans import (
    TokenSpans,
    align_tokens,
    character_mask,
    covered_tokens,
    find_subject,
    locate_ids,
    token_spans,
    visible_tokens,
)

FOLDER = Path(__file__).parents[1] / "golden" / "leakage"
TOKENIZERS = {"clip": clip_tokenizer(FOLDER), "t5": t5_tokenizer(FOLDER)}


def words(spans: TokenSpans, positions: list[int]) -> str:
    return "".join(spans.prompt[start:end] for start, end in (spans.characters[position] for position in positions))


@pytest.mark.parametrize("name", list(TOKENIZERS))
@pytest.mark.parametrize(
    "prompt",
    ["a photo of a Zebra", "  a   zebra,   a man's dog!", "Ein zebra über einem dog", "zebra", "two zebra/dog (zoo)"],
)
def test_every_real_token_lies_in_the_prompt_in_order(name: str, prompt: str) -> None:
    spans = token_spans(prompt, TOKENIZERS[name])
    first, last = spans.content
    cursor = 0
    for start, end in spans.characters[first:last]:
        assert 0 <= start <= end <= len(prompt)
        assert end >= cursor or start == end
        cursor = max(cursor, end)
    letters = {index for start, end in spans.characters for index in range(start, end)}
    assert all(index in letters for index, sign in enumerate(prompt) if sign.isascii() and sign.isalnum())
    for subject in ("zebra", "dog"):
        if subject in prompt.lower():
            places = covered_tokens(spans, find_subject(prompt, subject))
            assert set(words(spans, places).lower()) <= set(subject)


def test_the_walk_agrees_with_offsets() -> None:
    for name, tokenizer in TOKENIZERS.items():
        for prompt in ("a photo of 12 dogs!", " a   old man's dog", "a teddy bear and a bear"):
            spans = token_spans(prompt, tokenizer)
            aligned = align_tokens(prompt, tokenizer.convert_ids_to_tokens(list(spans.ids)))
            real = [
                (one, two)
                for one, two, special in zip(spans.characters, aligned, spans.special, strict=True)
                if not special and two[0] != two[1]
            ]
            assert all(one == two for one, two in real), (name, prompt)


def test_tokens_that_do_not_spell_the_prompt_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="does not continue"):
        align_tokens("a dog", ["a</w>", "cat</w>"])
    with pytest.raises(InvalidInputError, match="do not cover"):
        align_tokens("a dog", ["a</w>"])


def test_subjects() -> None:
    prompt = "A Woman, two women and a hot  dog; the dog"
    assert find_subject(prompt, "woman") == [(2, 7)]
    assert find_subject(prompt, "hot dog") == [(25, 33)]
    assert find_subject(prompt, "dog") == [(30, 33), (39, 42)]
    assert find_subject(prompt, "dogs", -1) == [(39, 42)]
    assert find_subject(prompt, re.compile("h.t")) == [(25, 28)]
    assert find_subject("three knives", "knife") == [(6, 12)]
    assert find_subject("a box of berries", "berry") == [(9, 16)]
    assert find_subject("C++ code", "C++") == [(0, 3)]
    with pytest.raises(InvalidInputError, match="its words are: A, Woman, two"):
        find_subject(prompt, "man")
    assert character_mask("a+b", "a+b", escape=True) == [True] * 3


def test_truncation_keeps_the_closing_tokens() -> None:
    for name, (limit, visible) in {"clip": (10, 9), "t5": (10, 9)}.items():
        tokenizer = TOKENIZERS[name]
        spans = token_spans("a zebra " * 8 + "and a dog", tokenizer)
        assert visible_tokens(spans, limit) == visible
        cut = tokenizer(spans.prompt, truncation=True, max_length=limit)["input_ids"]
        assert cut[:visible] == list(spans.ids[:visible])
        with pytest.raises(InvalidInputError, match="truncated away"):
            covered_tokens(spans, find_subject(spans.prompt, "dog"), limit)
    assert locate_ids([1, 2, 1, 2, 3], [1, 2]) == [0, 2]
    assert locate_ids([1], []) == []
