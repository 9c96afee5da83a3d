"""LlamaGen alone: raster order."""

from __future__ import annotations

import pytest
import torch

from tests.generators.models import build, condition_for, seeds
from vistok.errors import InvalidInputError
from vistok.generators.llamagen import LlamaGen
from vistok.tokens import VisualTokens


def test_tokens_appear_in_raster_order() -> None:
    steps = list(build(LlamaGen).sample(torch.tensor([1]), generator=seeds(0)))
    assert [step.changed.tolist() for step in steps] == [[position] for position in range(16)]


def test_logits_do_not_see_later_tokens() -> None:
    model = build(LlamaGen)
    ids = torch.randint(0, 64, (1, 16))
    other = ids.clone()
    other[0, 7] = (ids[0, 7] + 1) % 64
    before, after = model(ids, torch.tensor([1])), model(other, torch.tensor([1]))
    assert torch.equal(before[0, :8], after[0, :8])
    assert not torch.isclose(before[0, 8:], after[0, 8:]).all(-1).any()


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("count", [1, 4, 6, 15])
def test_a_raster_prefix_is_kept_and_continued(text: bool, count: int) -> None:
    model = build(LlamaGen, text=text)
    condition = condition_for(model)
    whole = model.generate(condition, temperature=0.0, guidance_scale=2.0)
    mask = (torch.arange(16) < count).expand(3, -1)
    prefix = VisualTokens(torch.where(mask, whole.ids, 999 * ~mask), grid=(4, 4), mask=mask)
    steps = list(model.sample(condition, temperature=0.0, guidance_scale=2.0, prefix=prefix))
    assert len(steps) == 16 - count
    assert steps[0].changed.tolist() == [count]
    assert torch.equal(steps[-1].tokens.ids, whole.ids)


def test_known_rows_are_a_prefix() -> None:
    model = build(LlamaGen)
    rows = VisualTokens(torch.randint(0, 64, (2, 8)), grid=(2, 4))
    tokens = model.generate(torch.tensor([1, 2]), prefix=rows, grid=(3, 4), generator=seeds(0, 1))
    assert tokens.grid == (3, 4)
    assert torch.equal(tokens.ids[:, :8], rows.ids)
    with pytest.raises(InvalidInputError, match="raster prefixes"):
        model.sample(torch.tensor([1, 2]), prefix=rows, grid=(3, 5))


def test_guidance_ends_after_the_interval() -> None:
    model = build(LlamaGen)
    rows: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    model.generate(torch.tensor([1, 2]), guidance_scale=2.0, guidance_interval=3)
    # The condition; tokens 0 to 3 are fed guided, and so token 4 (decode index 3) is the last guided one.
    assert rows == [3, *[4] * 4, *[2] * 11]
