from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vistok.nn import conv


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_resnet_block_is_two_normalised_convolutions_and_a_skip() -> None:
    block = conv.ResnetBlock(32, 64)
    x = torch.randn(2, 32, 5, 7)
    h = block.conv1(F.silu(F.group_norm(x, 32, block.norm1.weight, block.norm1.bias, 1e-6)))
    h = block.conv2(F.silu(F.group_norm(h, 32, block.norm2.weight, block.norm2.bias, 1e-6)))
    torch.testing.assert_close(block(x), block.shortcut(x) + h)
    assert isinstance(conv.ResnetBlock(32, 32).shortcut, nn.Identity)


def test_normalisation_of_a_single_pixel_does_not_depend_on_the_batch() -> None:
    norm = conv.group_norm(32)
    nn.init.normal_(norm.bias)
    pixels = torch.randn(2, 32, 1, 1)
    torch.testing.assert_close(norm(pixels[:1]), norm(pixels)[:1])


def test_attention_block_is_softmax_over_pixels() -> None:
    block = conv.AttentionBlock(32)
    x = torch.randn(2, 32, 3, 5)
    q, k, v = block.qkv(block.norm(x)).flatten(2).chunk(3, dim=1)
    weights = torch.softmax(q.transpose(1, 2) @ k / 32**0.5, dim=-1)
    expected = x + block.proj((v @ weights.transpose(1, 2)).unflatten(2, (3, 5)))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    channels_last = block(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, expected, rtol=1e-4, atol=1e-5)


def test_downsample_pads_right_and_bottom_only() -> None:
    block = conv.Downsample(1)
    with torch.no_grad():
        block.conv.weight.zero_()[0, 0, 0, 0] = 1.0  # picks the top left of each window
        block.conv.bias.zero_()
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(block(x), x[..., ::2, ::2])


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16)])
def test_folded_upsampling_equals_nearest_and_convolution(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    block = conv.Upsample(8)
    x = torch.randn(2, 8, *size, requires_grad=True)
    plain = block.conv(F.interpolate(x, scale_factor=2.0))
    wanted = torch.autograd.grad(plain.square().sum(), [x, block.conv.weight, block.conv.bias])
    monkeypatch.setattr(conv.Upsample, "FOLD_FROM", 1)
    folded = block(x)
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-5)
    given = torch.autograd.grad(folded.square().sum(), [x, block.conv.weight, block.conv.bias])
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-3)


def test_encoder_and_decoder_mirror_each_other() -> None:
    encoder = conv.ConvEncoder(3, 32, (1, 1, 2), 1, 6, attention_levels=(2,))
    decoder = conv.ConvDecoder(6, 32, (1, 1, 2), 1, 3)
    z = encoder(torch.randn(1, 3, 16, 24))
    assert z.shape == (1, 6, 4, 6)
    assert decoder(z).shape == (1, 3, 16, 24)
    assert [len(level.attentions) for level in encoder.levels] == [0, 0, 1]
    assert [len(level.blocks) for level in decoder.levels] == [2, 2, 2]
    assert not any(len(level.attentions) for level in decoder.levels)
    # The coarsest level comes first.
    assert [level.blocks[-1].conv2.out_channels for level in decoder.levels] == [64, 32, 32]


def test_attention_keys_are_joined_and_split() -> None:
    block = nn.ModuleDict({"attn": conv.AttentionBlock(32), "norm": conv.group_norm(32)})
    state = block.state_dict()
    split = conv.split_attention_keys(state)
    assert split["attn.q.weight"].shape == (32, 32, 1, 1)
    assert "attn.qkv.weight" not in split
    merged = conv.merge_attention_keys(split)
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[key], value) for key, value in state.items())
    del split["attn.k.bias"]
    merged = conv.merge_attention_keys(split)
    assert {"attn.q.bias", "attn.v.bias", "attn.qkv.weight"} <= merged.keys()
    assert "attn.qkv.bias" not in merged


def test_tiles_of_a_local_function_give_its_result() -> None:
    x = torch.randn(1, 2, 22, 12)
    double = conv.run_tiled(lambda t: F.interpolate(t, scale_factor=2.0), x, 8, 4, 2, enlarge=True)
    torch.testing.assert_close(double, F.interpolate(x, scale_factor=2.0))
    half = conv.run_tiled(lambda t: F.avg_pool2d(t, 2), x, 8, 2, 2, enlarge=False)
    torch.testing.assert_close(half, F.avg_pool2d(x, 2))


def test_tiles_fade_into_each_other() -> None:
    numbers = iter(range(10))

    def run(tile: torch.Tensor) -> torch.Tensor:
        return torch.full_like(tile, float(next(numbers)))

    row = conv.run_tiled(run, torch.zeros(1, 1, 4, 6), 4, 2, 1, enlarge=True)[0, 0, 0]
    assert row[0] == 0
    assert row[-1] == 1
    assert torch.all(row.diff() >= 0)
    assert 0 < row[2] < row[3] < 1
