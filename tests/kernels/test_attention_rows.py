"""Attention rows: against float64, causal and padded keys, grouped heads."""

from __future__ import annotations

import pytest
import torch

from vistok import kernels
from vistok.errors import InvalidInputError
from vistok.kernels import attention_rows
from vistok.kernels.attention_rows import attention_received


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "groups", "rows", "keys"), [(1, 1, 1, 1), (4, 2, 7, 33), (6, 6, 40, 40)])
def test_against_float64(
    backend: str,
    dtype: torch.dtype,
    causal: bool,
    heads: int,
    groups: int,
    rows: int,
    keys: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(attention_rows._LOGITS_AT_ONCE, "cpu", 200)  # several chunks
    torch.manual_seed(0)
    query = torch.randn(2, heads, rows, 8, dtype=dtype) * 2
    key = torch.randn(2, groups, keys, 8, dtype=dtype)
    weights = torch.rand(2, rows)
    numbers = torch.randint(0, keys, (2, rows)) if causal else None
    valid = torch.rand(2, keys) > 0.2
    valid[:, 0] = True
    with kernels.use(backend):
        received = attention_received(query, key, weights, scale=0.7, rows=numbers, valid=valid)
    repeated = key.double().repeat_interleave(heads // groups, dim=1)
    logits = query.double() @ repeated.transpose(2, 3) * 0.7
    seen = valid[:, None].expand(2, rows, keys)
    if numbers is not None:
        seen = seen & (torch.arange(keys) <= numbers[..., None])
    matrix = logits.masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1)
    expected = (matrix.mean(dim=1) * weights[..., None].double()).sum(dim=1)
    assert received.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(received.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(received.sum(dim=1), weights.sum(dim=1).to(received.dtype), rtol=1e-5)


def test_default_weights_are_a_mean_and_it_is_one_node_for_the_compiler() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 6, 4)
    assert torch.allclose(
        attention_received(query, key), attention_received(query, key, torch.full((1, 5), 0.2), scale=0.5)
    )
    arguments = (query, key, torch.full((1, 5), 0.2), 0.5, None, None)
    torch.library.opcheck(torch.ops.vistok.attention_received, arguments, test_utils=("test_schema", "test_faketensor"))


def test_shapes_are_checked() -> None:
    query, key = torch.randn(1, 4, 5, 4), torch.randn(1, 2, 6, 4)
    with pytest.raises(InvalidInputError, match="multiple"):
        attention_received(torch.randn(1, 3, 5, 4), key)
    with pytest.raises(InvalidInputError, match="weights must be"):
        attention_received(query, key, torch.ones(1, 4))
    with pytest.raises(InvalidInputError, match="query"):
        attention_received(query, torch.randn(1, 2, 6, 5))
    with pytest.raises(InvalidInputError, match="floating"):
        attention_received(query.long(), key)
