"""Costs: the papers' printed figures, torch's own counter, and real caches."""

from __future__ import annotations

import pytest

from vistok.errors import InvalidInputError
from vistok.metrics.flops import SHAPES, counted_flops, profile, tower_flops
from vistok.pruners import FastV, FoPru, PyramidDrop, SparseVLM, TransPrune, UniformPooling, VFlowOpt, VisionZip
from vistok.pruners.cost import DecoderShape, kv_bytes, prefill_flops


def test_printed_figures_come_out() -> None:
    """TransPrune's table 1: theoretical TFLOPs of LLaVA-1.5-7B and LLaVA-NeXT-7B."""
    small = {"visual": 576}
    large = {"visual": 2880}
    name = "llava-v1.5-7b"
    high, low = TransPrune("high"), TransPrune("low")
    assert profile(name, high, **small).paper_macs(pruned=False) / 1e12 == pytest.approx(3.817, abs=5e-4)
    assert profile(name, high, **large).paper_macs(pruned=False) / 1e12 == pytest.approx(20.83, abs=5e-3)
    assert profile(name, high, **small).paper_macs() / 1e12 == pytest.approx(1.557, abs=1e-3)
    assert profile(name, high, **large).paper_macs() / 1e12 == pytest.approx(8.33, abs=5e-3)
    assert profile(name, low, **small).paper_macs() / 1e12 == pytest.approx(1.195, abs=1e-3)
    assert profile(name, low, **large).paper_macs() / 1e12 == pytest.approx(6.406, abs=5e-3)
    assert profile(name, PyramidDrop(), **small).paper_macs() / 1e12 == pytest.approx(1.78, abs=0.02)
    assert profile("qwen2.5-vl-7b", high, **small).average_kept == pytest.approx(0.451, abs=0.005)
    budget = profile("llava-onevision-qwen2-7b", VFlowOpt(0.25), visual=7290)
    assert budget.average_kept == pytest.approx(0.251, abs=1e-3)


def test_cache_sizes_of_the_specification() -> None:
    assert kv_bytes(SHAPES["llava-v1.5-7b"], [1] * 32) == 512 * 1024
    assert kv_bytes(SHAPES["qwen2.5-vl-7b"], [1] * 28) == 56 * 1024


def test_formula_equals_torchs_counter() -> None:
    from transformers import LlamaConfig, Qwen2Config

    for kind in (LlamaConfig, Qwen2Config):
        config = kind(
            vocab_size=10,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        tokens = [40, 40, 17]
        shape = DecoderShape.from_config(config)
        assert counted_flops(config, tokens) == pytest.approx(prefill_flops(shape, tokens), rel=1e-6)
        assert prefill_flops(shape, tokens, causal=True) < prefill_flops(shape, tokens)


def test_plans_stack_and_refuse() -> None:
    stacked = FoPru(0.5) + FastV(0.5, layer=2)
    assert stacked.plan(4, 100) == [50, 50, 25, 25], "shares count from what entered the decoder"
    visionzip = VisionZip(258, 30) + TransPrune("high")
    assert visionzip.plan(32, 576)[-1] == 36, "the paper's stack: 288 tokens in, 36 at the end"
    assert SparseVLM(64).plan(32, 576)[3] == 66 + int((int(0.3 * 510) + 1) / 10) + 1
    assert "TFLOPs" in str(profile("llava-v1.5-13b", stacked, visual=576, text=60))
    with pytest.raises(InvalidInputError, match="depends on the picture"):
        UniformPooling().plan(4, 100)
    with pytest.raises(InvalidInputError, match=r"layers 0\.\.3"):
        FastV(layer=9).plan(4, 100)
    with pytest.raises(InvalidInputError, match="no decoder is called"):
        profile("llava-9", stacked, visual=576)
    with pytest.raises(InvalidInputError, match="visual token"):
        profile("llava-v1.5-7b", stacked, visual=0)


def test_tower_costs_grow_with_views_and_layers() -> None:
    from transformers import CLIPVisionConfig

    config = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    one = tower_flops(config, 577)
    assert one == pytest.approx(2 * 24 * (12 * 577 * 1024**2 + 2 * 577**2 * 1024))
    assert tower_flops(config, 577, views=5, layers=12) == pytest.approx(one * 2.5)
