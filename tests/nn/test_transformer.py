"""The blocks: norm, rotary positions, attention with and without a cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vistok.nn.cache import KVCache
from vistok.nn.norms import RMSNorm
from vistok.nn.rope import apply_rotation, grid_rotation
from vistok.nn.transformer import TransformerBlock, drop_path, feed_forward_size


def block(num_heads: int = 4, num_kv_heads: int = 4, size: int = 32) -> TransformerBlock:
    torch.manual_seed(0)
    made = TransformerBlock(
        size,
        num_heads,
        num_kv_heads,
        ffn_size=48,
        norm_eps=1e-5,
        attention_dropout=0.0,
        residual_dropout=0.0,
        ffn_dropout=0.0,
        drop_path=0.0,
    )
    return made.eval()


def test_rms_norm_against_float64() -> None:
    norm = RMSNorm(7, eps=1e-3)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 7)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, rtol=1e-5, atol=1e-6)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_rotation_angles_are_rows_then_columns() -> None:
    table = grid_rotation((2, 3), 8, theta=100.0, num_condition_tokens=2)
    assert table.shape == (8, 4)
    assert (table[:2] == 0).all()  # condition positions vanish
    frequencies = [1.0, 100.0 ** (-2 / 4)]
    for cell, (row, col) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        angles = [row * f for f in frequencies] + [col * f for f in frequencies]
        expected = torch.tensor([complex(math.cos(angle), math.sin(angle)) for angle in angles])
        torch.testing.assert_close(table[2 + cell], expected)


def test_rotated_products_depend_on_offsets_alone() -> None:
    table = grid_rotation((4, 4), 8)
    query, key = torch.randn(1, 16, 1, 8), torch.randn(1, 16, 1, 8)
    rotated = (
        apply_rotation(query[:, :1].expand(1, 16, 1, 8), table),
        apply_rotation(key[:, :1].expand(1, 16, 1, 8), table),
    )
    products = (rotated[0][0, :, 0] @ rotated[1][0, :, 0].T).view(4, 4, 4, 4)
    torch.testing.assert_close(products[0, 1, 2, 3], products[1, 0, 3, 2])
    torch.testing.assert_close(products[1, 1, 0, 0], products[3, 2, 2, 1])


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_a_cache_filled_piece_by_piece_equals_causal_attention(num_kv_heads: int) -> None:
    layer, x, rotation = block(num_kv_heads=num_kv_heads), torch.randn(2, 6, 32), grid_rotation((2, 3), 8)
    whole = layer(x, rotation, None, True)
    cache = KVCache(1, 2, num_kv_heads, 2, 8, dtype=x.dtype, device=x.device)
    first = layer(x[:, :2], rotation[:2], None, True, cache.layers[0])
    cache.reserve(4)
    rest = [layer(x[:, i : i + 1], rotation[i : i + 1], None, False, cache.layers[0]) for i in range(2, 6)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole)
    assert cache.length == 6


def test_cache_rows_can_be_repeated_and_dropped() -> None:
    layer, x = block(), torch.randn(2, 1, 32)
    cache = KVCache(1, 2, 4, 1, 8, dtype=x.dtype, device=x.device)
    layer(x, None, None, False, cache.layers[0])
    keys = cache.layers[0].keys.clone()
    cache.select_rows(torch.tensor([1, 0, 1]))
    assert torch.equal(cache.layers[0].keys, keys[[1, 0, 1]])
    cache.select_rows(slice(0, 1))
    assert torch.equal(cache.layers[0].keys, keys[1:])


def test_grouped_heads_equal_repeated_ones() -> None:
    grouped, full = block(num_kv_heads=2), block()
    full.load_state_dict(grouped.state_dict() | {"attention.wqkv.weight": full.attention.wqkv.weight})
    query, key, value = grouped.attention.wqkv.weight.detach().view(8, 8, 32).split([4, 2, 2])
    repeated = torch.cat([query, key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)])
    full.attention.wqkv.weight.data.copy_(repeated.flatten(0, 1))
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(grouped(x, is_causal=True), full(x, is_causal=True))


def test_feed_forward_sizes_of_the_paper() -> None:
    sizes = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 3200: 8704}
    assert {size: feed_forward_size(size, 256) for size in sizes} == sizes
    assert feed_forward_size(32, 16, 1.5) == 128


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 3), 0.25, True)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped == dropped[:, :1]).all()
    assert abs(dropped.mean().item() - 1) < 0.05
    assert torch.equal(drop_path(dropped, 0.25, False), dropped)
