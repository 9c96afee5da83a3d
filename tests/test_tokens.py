"""`VisualTokens` validates, selects, measures and survives a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vistok.errors import CheckpointError, InvalidInputError
from vistok.files import save_tensors
from vistok.tokens import VisualTokens


def sequence(batch: int = 2, tokens: int = 6) -> VisualTokens:
    ids = torch.arange(batch * tokens).view(batch, tokens)
    return VisualTokens(ids=ids, features=ids[..., None] * torch.tensor([1.0, -1.0]), mask=ids % 2 == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither was given"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, r"\[B, N\]"),
        ({"ids": torch.zeros(1, 4)}, "int64"),
        ({"features": torch.zeros(1, 4)}, r"\[B, N, D\]"),
        ({"features": torch.zeros(1, 4, 2, dtype=torch.int64)}, "floating point"),
        ({"ids": torch.zeros(1, 4, dtype=torch.int64), "features": torch.zeros(1, 3, 2)}, "disagree"),
        ({"ids": torch.zeros(1, 4, dtype=torch.int64), "grid": (3, 2)}, "does not hold 4 tokens"),
        ({"ids": torch.zeros(1, 4, dtype=torch.int64), "mask": torch.zeros(1, 3, dtype=torch.bool)}, "mask must be"),
    ],
)
def test_construction_refuses_what_does_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        VisualTokens(**arguments)


def test_keep_takes_a_prefix_of_every_part() -> None:
    tokens = sequence()
    kept = tokens.keep(4)
    assert torch.equal(kept.ids, tokens.ids[:, :4])
    assert torch.equal(kept.features, tokens.features[:, :4])
    assert torch.equal(kept.mask, tokens.mask[:, :4])
    for wrong in (0, 7):
        with pytest.raises(InvalidInputError, match="between 1 and 6"):
            tokens.keep(wrong)
    with pytest.raises(InvalidInputError, match="2x3 grid"):
        VisualTokens(ids=tokens.ids, grid=(2, 3)).keep(2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=8))
def test_select_by_image_equals_gather(index: list[int]) -> None:
    tokens = sequence()
    chosen = torch.tensor([index, index[::-1]])
    picked = tokens.select(chosen)
    assert torch.equal(picked.ids, tokens.ids.gather(1, chosen))
    assert torch.equal(picked.features, tokens.features.gather(1, chosen[..., None].expand(-1, -1, 2)))


def test_select_refuses_indices_outside() -> None:
    with pytest.raises(InvalidInputError, match=r"0\.\.5"):
        sequence().select(torch.tensor([0, 6]))


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_file_round_trip(tmp_path: Path, grid: tuple[int, int] | None) -> None:
    tokens = sequence()
    tokens = VisualTokens(tokens.ids, tokens.features, grid, tokens.mask)
    tokens.save(tmp_path / "tokens.safetensors")
    back = VisualTokens.load(tmp_path / "tokens.safetensors")
    assert torch.equal(back.ids, tokens.ids)
    assert torch.equal(back.features, tokens.features)
    assert torch.equal(back.mask, tokens.mask)
    assert back.grid == grid
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.safetensors"]


def test_loading_another_file_says_so(tmp_path: Path) -> None:
    save_tensors(tmp_path / "weights.safetensors", {"ids": torch.zeros(1, 2)})
    with pytest.raises(CheckpointError, match="holds no visual tokens"):
        VisualTokens.load(tmp_path / "weights.safetensors")


def test_bits_count_valid_tokens_only() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert VisualTokens(ids=ids, mask=mask).bits(1000).tolist() == [30, 10]
    with pytest.raises(InvalidInputError, match=r"0\.\.2"):
        VisualTokens(ids=ids).bits(3)


def test_images_iterate_as_batches_and_floats_convert() -> None:
    tokens = sequence()
    assert [len(image) for image in tokens] == [1, 1]
    half = tokens.to(torch.bfloat16)
    assert half.features.dtype == torch.bfloat16
    assert half.ids.dtype == torch.int64
