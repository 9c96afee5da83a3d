"""Tenor: constants equal the plain way, nothing is left behind, caches never go stale, training learns."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from benchmarks.plain.controllers import PlainTenorCrossAttention, PlainTenorJointAttention
from tests.controllers.conftest import draw, pipeline, unet_config
from vistok.controllers.tenor import (
    PUBLISHED_UNETS,
    AttentionMaps,
    FineTuneSettings,
    FluxLowRankAdapters,
    FluxObjective,
    Tenor,
    UNetObjective,
    attention_layers,
    fine_tune,
    flux_schedule,
    load_unet,
    pack_latents,
    position_code,
    projected_code,
)
from vistok.controllers.tenor.attention import network_of
from vistok.errors import CheckpointError, InvalidInputError, UnknownNameError

PROMPT = "a dog left of a zebra"


def test_position_code() -> None:
    code = position_code(7, 6)
    assert torch.allclose(code[0], torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]))
    assert torch.allclose(code[3, 2], torch.tensor(3 * 10000 ** (-2 / 6)).sin())
    assert torch.equal(position_code(7, 5), position_code(7, 6)[:, :5])
    linear = nn.Linear(6, 4)
    assert torch.allclose(projected_code(linear, 7, 6, torch.zeros(1)), code @ linear.weight.T, atol=1e-6)
    with pytest.raises(InvalidInputError, match="at least one"):
        position_code(0, 4)


def test_constants_equal_the_plain_way_and_leave_no_trace(pipe: Any) -> None:
    before = draw(pipe, PROMPT)
    network = network_of(pipe)
    processors = dict(network.attn_processors)
    with Tenor().attached(pipe):
        inside = draw(pipe, PROMPT)
    assert dict(network.attn_processors) == processors
    assert torch.equal(draw(pipe, PROMPT), before)
    assert not torch.allclose(inside, before, atol=1e-3)
    layers = list(attention_layers(network))
    stock = [layer.processor for _, layer in layers]
    try:
        for place, layer in layers:
            layer.processor = (
                PlainTenorJointAttention(type(network).__name__.startswith("Flux"))
                if place == "joint"
                else PlainTenorCrossAttention()
            )
        assert torch.allclose(draw(pipe, PROMPT), inside, atol=1e-3, rtol=1e-3)
    finally:
        for (_, layer), processor in zip(layers, stock, strict=True):
            layer.processor = processor


def test_fused_projections_give_the_same() -> None:
    for family in ("sd", "flux", "sd3"):
        pipe = pipeline(family)
        with Tenor().attached(pipe):
            wanted = draw(pipe, PROMPT)
        other = copy.copy(pipe)
        network = copy.deepcopy(network_of(pipe))
        name = "unet" if family == "sd" else "transformer"
        other = type(pipe)(**{**pipe.components, name: network})
        other.set_progress_bar_config(disable=True)
        for module in network.modules():
            if hasattr(module, "fuse_projections") and hasattr(module, "processor"):
                module.fuse_projections()
        with Tenor().attached(other):
            assert torch.allclose(draw(other, PROMPT), wanted, atol=1e-4), family


def test_text_keys_are_kept_over_steps_and_never_stale() -> None:
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(**unet_config(32)).eval()
    text = torch.randn(1, 7, 32)
    calls: list[int] = []
    layer = next(layer for _, layer in attention_layers(network))

    def run(states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network(torch.ones(1, 4, 8, 8), 5, encoder_hidden_states=states, return_dict=False)[0]

    original = layer.to_v.forward
    layer.to_v.forward = lambda states: calls.append(1) or original(states)  # type: ignore[func-returns-value]
    with Tenor().attached(network):
        first = run(text)
        assert torch.equal(run(text), first)
        assert len(calls) == 1  # the second step projected no text
        text.mul_(2)
        changed = run(text)
        assert not torch.equal(changed, first)
        assert len(calls) == 2
        with torch.no_grad():
            layer.to_k.weight.mul_(1.5)
        again = run(text)
        assert not torch.equal(again, changed)
    with Tenor().attached(network):
        assert torch.equal(run(text.clone()), again)
    layer.to_k.register_forward_hook(lambda module, inputs, output: output * 2)
    with Tenor().attached(network):  # a stranger's hook may compute anything: nothing is kept
        count = len(calls)
        run(text)
        run(text)
        assert len(calls) == count + 2


def test_attention_maps() -> None:
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(**unet_config(32)).eval()
    maps = AttentionMaps()
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(2, 7, 32)}
    with torch.no_grad():
        with Tenor().attached(network):
            wanted = network(**inputs).sample
        with Tenor(maps).attached(network):
            assert torch.allclose(network(**inputs).sample, wanted, atol=1e-5)
    assert set(maps.maps) == {"down_8", "mid_4", "up_8"}
    layer = maps.maps["down_8"][0]
    assert layer.shape == (2, 2, 8, 8, 7)
    assert torch.allclose(layer.sum(dim=-1), torch.ones(2, 2, 8, 8), atol=1e-5)


def test_refusals() -> None:
    pipe = pipeline("sd")
    with Tenor().attached(pipe), pytest.raises(InvalidInputError, match="attached already"):
        Tenor().attach(pipe)
    with pytest.raises(InvalidInputError, match="knows UNet2D"):
        Tenor().attach(nn.Linear(2, 2))
    with pytest.raises(InvalidInputError, match="UNets only"):
        Tenor(AttentionMaps()).attach(pipeline("flux"))

    class Odd:
        def __call__(self, *args: Any, **kwargs: Any) -> None: ...

    layer = next(layer for _, layer in attention_layers(pipe.unet))
    before = layer.processor
    layer.processor = Odd()
    try:
        with pytest.raises(InvalidInputError, match="a layer uses Odd"):
            Tenor().attach(pipe)
        assert isinstance(layer.processor, Odd)
    finally:
        layer.processor = before
    with pytest.raises(UnknownNameError, match=r"sd1\.5"):
        load_unet("compass-unet.sd1")
    assert len(PUBLISHED_UNETS) == 3


def filled(adapters: FluxLowRankAdapters) -> FluxLowRankAdapters:
    torch.manual_seed(3)
    with torch.no_grad():
        for value in adapters.parameters():
            value.normal_(std=0.3)
    return adapters


def test_adapters_merged_or_not_are_the_same_and_leave_no_trace() -> None:
    pipe = pipeline("flux")
    before = draw(pipe, PROMPT)
    adapters = filled(FluxLowRankAdapters.tiny())
    results = []
    for merge in (False, True):
        with adapters.with_strength(0.5, merge=merge).attached(pipe), Tenor().attached(pipe):
            results.append(draw(pipe, PROMPT))
    assert torch.allclose(*results, atol=1e-4)
    assert not torch.allclose(results[0], before, atol=1e-3)
    assert torch.equal(draw(pipe, PROMPT), before)
    with adapters.with_strength(0.0, merge=False).attached(pipe):
        assert torch.equal(draw(pipe, PROMPT), before)


def test_changed_adapters_change_the_constants() -> None:
    pipe = pipeline("flux")
    adapters = filled(FluxLowRankAdapters.tiny()).with_strength(1.0, merge=False)
    with adapters.attached(pipe), Tenor().attached(pipe):
        draw(pipe, PROMPT)
        with torch.no_grad():
            for value in adapters.parameters():
                value.mul_(0.5)
        late = draw(pipe, PROMPT)
    with adapters.attached(pipe), Tenor().attached(pipe):
        assert torch.equal(draw(pipe, PROMPT), late)


def test_adapter_files(tmp_path: Path) -> None:
    adapters = filled(FluxLowRankAdapters.tiny())
    state = adapters.state_dict()
    assert "double_blocks.0.processor.qkv_lora1.down.weight" in state
    config = FluxLowRankAdapters.config_from_state(state)
    again = FluxLowRankAdapters.from_official({**state, "double_blocks.0.processor.pe.inv_freq": torch.ones(3)}, config)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    with pytest.raises(CheckpointError, match="missing"):
        FluxLowRankAdapters.from_official(dict(list(state.items())[1:]), config)
    with pytest.raises(CheckpointError, match="no FLUX adapter"):
        FluxLowRankAdapters.config_from_state({"lora.weight": torch.ones(1)})
    with pytest.raises(InvalidInputError, match="do not fit this FLUX"):
        FluxLowRankAdapters.tiny(num_double_blocks=3).attach(pipeline("flux"))
    adapters.save_pretrained(tmp_path)
    assert torch.equal(
        FluxLowRankAdapters.from_pretrained(tmp_path).state_dict()["single_blocks.1.processor.proj_lora.up.weight"],
        state["single_blocks.1.processor.proj_lora.up.weight"],
    )


def four_levels() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        **unet_config(
            32,
            block_out_channels=[8, 8, 16, 16],
            down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        )
    )


def unet_batch(rows: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(rows, 2, 64, 64)
    masks[:, 0, :, :30], masks[:, 1, :, 34:] = 1, 1
    return {
        "latents": torch.randn(rows, 4, 8, 8, generator=generator),
        "noise": torch.randn(rows, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([300] * rows),
        "encoder_hidden_states": torch.randn(rows, 12, 32, generator=generator),
        "masks": masks,
        "token_positions": [[[2, 3], [7]]] * rows,
    }


def test_unet_objective_batches_skips_dropped_captions_and_learns(tmp_path: Path) -> None:
    network, scheduler = four_levels(), diffusers.DDPMScheduler()
    objective = UNetObjective(network, scheduler, token_scale=0.1, pixel_scale=0.1)
    batch = unet_batch()
    both = objective.training_loss(batch)
    rows = [objective.training_loss({key: value[row : row + 1] for key, value in batch.items()}) for row in (0, 1)]
    for name in ("denoise", "token", "pixel"):
        assert torch.allclose(both[name], (rows[0][name] + rows[1][name]) / 2, rtol=1e-3), name
    dropped = objective.training_loss(batch | {"token_positions": [[], []]})
    assert float(dropped["token"]) == float(dropped["pixel"]) == 0.0
    assert {type(processor).__name__ for processor in network.attn_processors.values()} == {"AttnProcessor2_0"}

    settings = FineTuneSettings(steps=6, learning_rate=2e-3, accumulation=1, checkpoint_every=3)
    losses = fine_tune(objective, [batch], settings, progress=False)
    assert losses[-1] < losses[0]
    with pytest.raises(InvalidInputError, match="no batches"):
        fine_tune(objective, [], settings, progress=False)
    network.enable_gradient_checkpointing()
    network.train()
    with pytest.raises(InvalidInputError, match="gradient checkpointing"):
        objective.training_loss(batch)


def test_fine_tuning_resumes_exactly(tmp_path: Path) -> None:
    def run(steps: int, path: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
        objective = UNetObjective(four_levels(), diffusers.DDPMScheduler())
        batch = unet_batch()
        for name in ("noise", "timesteps"):
            del batch[name]
        settings = FineTuneSettings(steps=steps, learning_rate=1e-3, accumulation=1)
        return fine_tune(objective, [batch], settings, checkpoint=path, progress=False), objective.state_dict()

    whole, weights = run(2, tmp_path / "whole.pt")
    run(1, tmp_path / "parts.pt")
    resumed, again = run(2, tmp_path / "parts.pt")
    assert resumed == whole
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_flux_objective_trains_the_adapters_only() -> None:
    network = copy.deepcopy(pipeline("flux").transformer)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    objective = FluxObjective(network, FluxLowRankAdapters.tiny())
    generator = torch.Generator().manual_seed(1)
    batch = {
        "latents": torch.randn(2, 4, 4, 4, generator=generator),
        "noise": torch.randn(2, 4, 16, generator=generator),
        "time_index": torch.tensor([400, 600]),
        "text": torch.randn(2, 6, 32, generator=generator),
        "pooled": torch.randn(2, 32, generator=generator),
    }
    losses = fine_tune(
        objective,
        [batch],
        FineTuneSettings(steps=8, learning_rate=5e-3, accumulation=1, warmup_steps=2),
        progress=False,
    )
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert float(objective.adapters.double_blocks["0"].processor["qkv_lora2"].up.weight.detach().norm()) > 0


def test_schedules_and_packing() -> None:
    schedule = flux_schedule(10, 1024)
    assert float(schedule[0]) == 1.0
    assert float(schedule[-1]) == 0.0
    assert bool((schedule.diff() < 0).all())
    assert float(flux_schedule(10, 4096)[5]) > float(schedule[5])
    with pytest.raises(InvalidInputError, match="either tokens or mu"):
        flux_schedule(10)
    latents = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    tokens, ids = pack_latents(latents)
    assert tokens.shape == (2, 6, 12)
    assert tokens[0, 0].tolist() == latents[0, :, :2, :2].flatten().tolist()
    assert ids[4].tolist() == [0, 1, 1]
    with pytest.raises(InvalidInputError, match="2 x 2"):
        pack_latents(torch.zeros(1, 3, 3, 4))


def test_attention_is_judged_at_the_levels_that_a_small_unet_has() -> None:
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=32,
    )
    objective = UNetObjective(network, diffusers.DDPMScheduler())
    assert objective.places(8) == ["mid_4", "up_8"]
    assert UNetObjective(four_levels(), diffusers.DDPMScheduler()).places(64) == ["mid_8", "up_16", "up_32", "up_64"]
    losses = objective.training_loss(unet_batch())
    assert losses["token.mid_4"].detach() > 0
    assert losses["pixel.up_8"].detach() > 0
