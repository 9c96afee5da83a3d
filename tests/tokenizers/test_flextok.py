"""FlexTok: prefixes, collapsed registers, the flow, bad input, the authors' files."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.plain import flextok as plain
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.tokenizers.flextok import FlexTok, NormalizedGuidance, noise_levels, prefix_lengths
from vistok.tokenizers.flextok.decoder import plan_groups
from vistok.tokens import VisualTokens

STEPS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture
def model() -> FlexTok:
    torch.manual_seed(0)
    return FlexTok.tiny()


def images(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


# ------------------------------------------------------------------------------------------------------ image to tokens


def test_fewer_registers_are_the_first_of_all(model: FlexTok) -> None:
    every = model.encode(images())
    assert every.grid is None
    assert every.ids.shape == (2, 16)
    assert 0 <= int(every.ids.min()) <= int(every.ids.max()) < model.codebook_size == 1600
    for count in (1, 5, 15):
        assert torch.equal(model.encode(images(), count).ids, every.ids[:, :count])
    latents = model.encode_latents(images())
    assert torch.equal(plain.encode(model, latents), every.ids)


def test_a_batch_is_its_images_one_by_one(model: FlexTok) -> None:
    batch = images(3)
    assert torch.equal(model.encode(batch).ids, torch.cat([model.encode(one[None]).ids for one in batch]))
    tokens = model.encode(batch)
    together = model.decode(tokens, generator=seeds(3, 4, 5), **STEPS)
    for index, seed in enumerate((3, 4, 5)):
        alone = model.decode(tokens[index], generator=seeds(seed)[0], **STEPS)
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-4)


def test_the_posterior_is_drawn_only_on_request(model: FlexTok) -> None:
    assert torch.equal(model.encode_latents(images()), model.encode_latents(images()))
    first, again = (model.encode_latents(images(), sample_posterior=True, generator=seeds(0)[0]) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, model.encode_latents(images()))


# ------------------------------------------------------------------------------------------------------ tokens to image


@pytest.mark.parametrize("guidance", ["normalized", "classifier_free"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("segments", [1, 2])
def test_collapsed_registers_equal_explicit_ones(guidance: str, scale: float, segments: int) -> None:
    torch.manual_seed(0)
    model = FlexTok.tiny(modulation_segments=segments)
    tokens, lengths = model.encode(images(6)), [1, 16, 5, 15, 5, 8]
    noise = model.draw_noise(6, generator=seeds(0)[0])
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": scale, "guidance": guidance}
    expected = plain.decode_latents(model, tokens.ids, lengths, noise, **settings)
    sequences = [row[:length] for row, length in zip(tokens.ids, lengths)]
    *_, found = model.denoise(sequences, noise=noise, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    mask = torch.arange(16) < torch.tensor(lengths)[:, None]
    *_, masked = model.denoise(VisualTokens(ids=tokens.ids, mask=mask), noise=noise, **settings)
    assert torch.equal(masked, found)


def test_only_the_rows_that_are_needed_run(model: FlexTok) -> None:
    rows: list[int] = []
    for block in model.decoder.blocks:
        block.feed_forward.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    ids = torch.zeros(2, 3, dtype=torch.int64)
    list(model.denoise(VisualTokens(ids=ids), num_inference_steps=2, guidance_scale=2.0))
    # 16 patches for 2 images, conditional and unconditional; 3 + 1 and 1 registers; none in the last block.
    assert rows == [2 * (16 + 4) + 2 * (16 + 1), 4 * 16] * 2
    rows.clear()
    list(model.denoise(VisualTokens(ids=ids), num_inference_steps=1, guidance_scale=1.0))
    assert rows == [2 * (16 + 4), 2 * 16]


def test_modulations_are_computed_once_and_follow_the_weights(model: FlexTok) -> None:
    calls: list[int] = []
    model.decoder.time_embedding.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    tokens, noise = model.encode(images()), model.draw_noise(2, generator=seeds(0)[0])
    first = model.decode(tokens, noise=noise, **STEPS)
    assert torch.equal(model.decode(tokens, noise=noise, **STEPS), first)
    assert calls == [3]
    with torch.no_grad():
        model.decoder.blocks[0].modulation.bias.add_(0.5)
    changed = model.decode(tokens, noise=noise, **STEPS)
    assert calls == [3, 3]
    assert not torch.equal(changed, first)
    fresh = copy.deepcopy(model)
    fresh.decoder._schedule = None
    assert torch.equal(fresh.decode(tokens, noise=noise, **STEPS), changed)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(model: FlexTok, autocast: bool) -> None:
    tokens, noise = model.encode(images()), model.draw_noise(2, generator=seeds(0)[0])
    expected = model.decode_latents(list(model.denoise(tokens, noise=noise, **STEPS))[-1])
    if not autocast:
        model.encoder.to(torch.bfloat16)
        model.decoder.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert model.encode(images(), 4).ids.shape == (2, 4)
        found = model.decode(tokens, noise=noise, **STEPS)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert float((found - expected).abs().mean()) < 0.1 * float(expected.std())


def test_prefixes_share_their_noise(model: FlexTok) -> None:
    tokens = model.encode(images())
    lengths = [1, 4, 16]
    strip = model.decode_prefixes(tokens, lengths, generator=seeds(7, 8), **STEPS)
    assert strip.shape == (2, 3, 3, 32, 32)
    for index, length in enumerate(lengths):
        alone = model.decode(tokens.keep(length), generator=seeds(7, 8), **STEPS)
        torch.testing.assert_close(strip[:, index], alone, rtol=1e-4, atol=1e-4)


def test_guidance_by_a_function_of_time(model: FlexTok) -> None:
    tokens, noise = model.encode(images()), model.draw_noise(2, generator=seeds(0)[0])
    seen: list[float] = []

    def scale(t: float) -> float:
        seen.append(t)
        return 2.0

    settings: dict[str, Any] = {"noise": noise, "num_inference_steps": 4}
    by_function = model.decode(tokens, guidance_scale=scale, **settings)
    assert seen == [1.0, 0.75, 0.5, 0.25]
    torch.testing.assert_close(by_function, model.decode(tokens, guidance_scale=2.0, **settings))
    ones = model.decode(tokens, guidance_scale=lambda t: 1.0, guidance="classifier_free", **settings)
    torch.testing.assert_close(ones, model.decode(tokens, guidance_scale=1.0, **settings))


def test_normalized_guidance_limits_and_projects() -> None:
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 3, 2, 4, 4)
    guided = NormalizedGuidance(momentum=None, eta=0.0, norm_threshold=0.5)(cond, uncond, 3.0)
    added = (guided - cond).flatten(1)
    assert (added.norm(dim=1) <= 2 * 0.5 + 1e-5).all()
    torch.testing.assert_close((added * cond.flatten(1)).sum(1), torch.zeros(3), atol=1e-5, rtol=0)
    everything = NormalizedGuidance(momentum=None, eta=1.0, norm_threshold=0.0)(cond, uncond, 3.0)
    torch.testing.assert_close(everything, uncond + 3 * (cond - uncond), rtol=1e-4, atol=1e-5)
    same = NormalizedGuidance()(cond, cond, 3.0)
    assert torch.equal(same, cond)


def test_a_budget_of_tokens_for_each_image(model: FlexTok) -> None:
    batch = images(3)
    noise_error: dict[int, torch.Tensor] = {}

    def error(reconstructions: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
        found = (reconstructions - originals).square().flatten(1).mean(1)
        noise_error[len(noise_error)] = found
        return found

    settings: dict[str, Any] = {"generator": seeds(0, 1, 2), **STEPS}
    everything = model.tokens_for(batch, 1e-9, error=error, **settings)
    assert everything.lengths.tolist() == [16, 16, 16]
    assert not everything.satisfied.any()
    assert len(noise_error) == 5  # 1, 2, 4, 8, 16
    bound = float(noise_error[2].max())
    settings["generator"] = seeds(0, 1, 2)
    budget = model.tokens_for(batch, bound, error=error, **settings)
    table = torch.stack([noise_error[index] for index in range(5)])
    first = [int((table[:, image] <= bound).nonzero()[0]) for image in range(3)]
    assert budget.lengths.tolist() == [[1, 2, 4, 8, 16][index] for index in first]
    assert budget.satisfied.all()
    assert budget.tokens.mask.sum(1).tolist() == budget.lengths.tolist()
    assert torch.equal(model.encode(batch, 1).ids[:, 0], budget.tokens.ids[:, 0])
    assert model.decode(budget.tokens, **STEPS).shape == batch.shape


def test_other_sizes_need_stretched_positions() -> None:
    torch.manual_seed(0)
    with pytest.raises(InvalidInputError, match="interpolate"):
        FlexTok.tiny().encode(images(1, 64))
    model = FlexTok.tiny(position_scaling="interpolate")
    tokens = model.encode(images(1, 64))
    assert model.decode(tokens, image_size=(64, 40), **STEPS).shape == (1, 3, 64, 40)
    small = FlexTok.tiny()
    assert small.decode(small.encode(images(1, 16)), image_size=16, **STEPS).shape == (1, 3, 16, 16)


def test_pixels_without_an_auto_encoder() -> None:
    torch.manual_seed(0)
    model = FlexTok.tiny(vae_block_out_channels=None, latent_channels=3, patch_size=8)
    assert model.image_size == (32, 32)
    assert model.decode(model.encode(images(), 4), **STEPS).shape == (2, 3, 32, 32)
    with pytest.raises(InvalidInputError, match="latent_channels must be 3"):
        FlexTok.tiny(vae_block_out_channels=None)


# ------------------------------------------------------------------------------------------------------------ objective


def test_training_lowers_the_loss_and_leaves_the_auto_encoder() -> None:
    torch.manual_seed(0)
    model = FlexTok(
        **{
            **{key: value for key, value in FlexTok.tiny().config.items() if not key.startswith("_")},
            "repa_layer": 0,
            "repa_channels": 6,
            "repa_hidden_size": 16,
        }
    ).train()
    before = {key: value.clone() for key, value in model.vae.state_dict().items()}
    features = torch.randn(4, 6, 5, 5)
    model.set_teacher(lambda batch: features)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], 3e-3)
    losses = []
    for step in range(12):
        found = model.training_loss({"images": images(4)}, generator=seeds(step % 2)[0])
        assert set(found) == {"loss", "flow", "repa"}
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append((found["loss"].item(), found["repa"].item()))
    assert losses[-2][0] < losses[0][0]
    assert losses[-2][1] < losses[0][1]
    assert all(torch.equal(value, before[key]) for key, value in model.vae.state_dict().items())
    assert "_teacher" not in dict(model.named_modules())


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = FlexTok.tiny().train()
        if recompute:
            model.enable_gradient_checkpointing()
        model.training_loss({"images": images(3)}, generator=seeds(5)[0])["loss"].backward()
        gradients.append(model.encoder.patch_embedding.weight.grad)
    torch.testing.assert_close(*gradients)


def test_dropped_registers_get_no_gradient(model: FlexTok) -> None:
    latents = model.encode_latents(images())
    noise = torch.randn_like(latents)
    model.train().flow_loss(latents, noise, torch.full((2,), 0.5), [4, 2], [False, False])["loss"].backward()
    gradient = model.encoder.registers.grad
    assert gradient[:4].abs().sum(1).gt(0).all()
    assert not gradient[4:].any()
    assert model.decoder.null_token.grad is None or not model.decoder.null_token.grad.any()


def test_random_prefixes_have_their_distributions() -> None:
    drawn = {mode: prefix_lengths(4000, 16, mode, seeds(0)[0]) for mode in ("uniform", "pow2", "uniform_pow2")}
    assert set(drawn["uniform"]) == set(range(1, 17))
    assert set(drawn["pow2"]) == set(drawn["uniform_pow2"]) == {1, 2, 4, 8, 16}
    assert abs(drawn["pow2"].count(16) / 4000 - 1 / 5) < 0.04
    assert abs(drawn["uniform_pow2"].count(16) / 4000 - 8 / 16) < 0.04
    assert set(prefix_lengths(500, 6, "uniform_pow2", seeds(0)[0])) == {1, 2, 4, 6}
    with pytest.raises(InvalidInputError, match="nested_dropout"):
        prefix_lengths(1, 16, "half")


def test_noise_levels_stay_in_range() -> None:
    draws = torch.rand(1000, generator=seeds(0)[0])
    for schedule in ("mode", "stratified"):
        t = noise_levels(draws, schedule)
        assert (t >= 0).all()
        assert (t <= 1).all()
    stratified = noise_levels(draws, "stratified")
    assert (stratified.diff() > 0).all()
    with pytest.raises(InvalidInputError, match="noise_schedule"):
        noise_levels(draws, "cosine")


def test_groups_join_where_little_is_wasted() -> None:
    assert plan_groups([5, 1, 5]) == [[1], [0, 2]]
    lengths = [1, 2, 3, 100, 101, 200]
    groups = plan_groups(lengths, 3)
    assert sorted(index for group in groups for index in group) == list(range(6))
    assert [[lengths[index] for index in group] for group in groups] == [[1, 2, 3], [100, 101], [200]]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("count", [0, -1, 17, 2.0, True])
def test_bad_numbers_of_tokens(model: FlexTok, count: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"1\.\.16"):
        model.encode(images(), count)


def test_bad_images(model: FlexTok) -> None:
    for bad, message in (
        (images()[:, :2], r"\[B, 3, H, W\]"),
        (torch.zeros(1, 3, 30, 32), "multiples of 8"),
        (torch.zeros(1, 3, 4, 4), "multiples of 8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "preprocess"),
        (images() * 200, r"\[-1, 1\]"),
        (images().fill_(math.nan), "NaN"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            model.encode(bad)
    with torch.no_grad():
        model.encoder.head.weight.fill_(math.nan)
    with pytest.raises(InvalidOutputError, match="weights"):
        model.encode(images())


def test_bad_tokens(model: FlexTok) -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    for bad, message in (
        ([], "at least one sequence"),
        ([[1], []], r"1\.\.16 tokens"),
        ([[1] * 17], r"1\.\.16 tokens"),
        ([[1600]], "0..1599"),
        ([[-1]], "0..1599"),
        ([[0.5]], "integers"),
        (VisualTokens(ids=ids[:, :1].repeat(1, 4), grid=(2, 2)), "without a grid"),
        (VisualTokens(ids=ids, mask=torch.tensor([[True, False, True]] * 2)), "prefix"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            model.decode(bad)
    tokens = VisualTokens(ids=ids)
    for settings, message in (
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance": "strong"}, "normalized"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"image_size": 20}, "multiples of 8"),
        ({"noise": torch.zeros(1, 4, 16, 16)}, "noise must be"),
        ({"generator": seeds(1)}, "1 generators for 2 images"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            model.decode(tokens, **settings)
    with pytest.raises(InvalidInputError, match=r"1\.\.3"):
        model.decode_prefixes(tokens, [1, 4])
    with pytest.raises(InvalidInputError, match="max_error"):
        model.tokens_for(images(), 0.0)


def test_bad_configurations() -> None:
    for overrides, message in (
        ({"nested_dropout": "half"}, "nested_dropout"),
        ({"levels": (1, 8)}, "at least 2"),
        ({"encoder_head_dim": 7}, "multiple of head_dim"),
        ({"decoder_positions": "rope"}, "sincos"),
        ({"repa_channels": 8, "repa_layer": 9}, "repa_layer"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            FlexTok.tiny(**overrides)
    with pytest.raises(InvalidInputError, match="repa_channels"):
        FlexTok.tiny().set_teacher(lambda batch: batch)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_pictures_in_and_out(model: FlexTok, tmp_path: Path) -> None:
    picture = Image.new("RGB", (100, 50), (255, 0, 128))
    picture.save(tmp_path / "red.png")
    batch = model.preprocess([picture, tmp_path / "red.png"])
    assert batch.shape == (2, 3, 32, 32)
    assert model.postprocess(batch, "uint8")[0, 0, 0].tolist() == [255, 0, 128]
    assert model.postprocess(batch)[0].getpixel((3, 3)) == (255, 0, 128)
    assert model.postprocess(batch, "np").shape == (2, 32, 32, 3)
    for bad in ("jpeg", "latent"):
        with pytest.raises(InvalidInputError, match="output_type"):
            model.postprocess(batch, bad)
    with pytest.raises(InvalidInputError, match="at least one image"):
        model.preprocess([])


# --------------------------------------------------------------------------------------------------- saving and loading


def test_saving_and_loading(model: FlexTok, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = FlexTok.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images()).ids, model.encode(images()).ids)
    official = FlexTok.from_official(model.to_official(), dict(model.config))
    assert all(torch.equal(value, official.state_dict()[key]) for key, value in model.state_dict().items())


def tree(name: str = "flextok.model.preprocessors.patching.PatchEmbedder") -> dict[str, Any]:
    """The authors' configuration of `tiny`."""

    def module(kind: str, **arguments: Any) -> dict[str, Any]:
        return {"_target_": f"flextok.x.{kind}", **arguments}

    grid = {"max_sizes": [4, 4], "posemb_type": "sincos", "posemb_scaling": "absolute"}
    patches = {"_target_": name, "channels_in": 4, "dim": 32, "patch_sizes": [4, 4]}
    trunk = {"dim": 32, "depth": 2, "head_dim": 16}
    encoder = {
        "a": patches,
        "b": module("PositionalEmbeddingAdder", dim=32, **grid),
        "c": module("Registers1D", n_min=16, n_max=16, dim=32),
        "d": module("BlockWiseSequencePacker", mask_mode="causal_last"),
        "e": module("FlexTransformer", **trunk),
        "f": module("LinearHead", dim=32, dim_out=4),
    }
    decoder = {
        "a": module("LinearLayer", dim_in=4, dim=32),
        "b": module("PositionalEmbeddingAdder", max_sizes=[16], posemb_type="learnable_sum"),
        "c": module("MaskedNestedDropout", size_sampling_mode="uniform"),
        "d": module("LearnedNullCond", dropout_prob=0.1),
        "e": patches,
        "f": module("PositionalEmbeddingAdder", dim=32, **grid),
        "g": module("TimestepEmbedder", dim=32, frequency_embedding_size=32),
        "h": module("FlexTransformer", adaLN_expansion=2, **trunk),
        "dec_repa_anything": module("SomethingForTraining"),
    }
    return {
        "vae": module("StableDiffusionVAE", latent_channels=4, scaling_factor=0.7),
        "encoder": {"module_dict": encoder},
        "decoder": {"module_dict": decoder},
        "regularizer": module("FSQ", levels=[8, 8, 5, 5]),
        "flow_matching_noise_module": module("MinRFNoiseModule", ln=True),
    }


def test_a_published_folder_and_its_header(model: FlexTok, tmp_path: Path) -> None:
    overrides = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
    config = {"flextok": tree(), "vae_base_cfg_overrides": overrides}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {key: value.contiguous() for key, value in model.to_official().items()}
    state["decoder.module_dict.dec_repa_head.weight"] = torch.zeros(3)
    save_file(state, str(tmp_path / "model.safetensors"))
    with pytest.warns(UserWarning, match="representation loss"):
        loaded = FlexTok.from_official(tmp_path)
    expected = {"scaling_factor": 0.7, "max_timestep": 1000.0, "nested_dropout": "uniform", "condition_dropout": 0.1}
    assert {key: loaded.config[key] for key in expected} == expected
    assert loaded.config.noise_schedule == "logit_normal"
    latents = model.encode_latents(images())
    assert torch.equal(loaded.tokenize_latents(latents).ids, model.tokenize_latents(latents).ids)
    metadata = {key: repr(value) for key, value in tree().items()} | {"_target_": "flextok.flextok_wrapper.FlexTok"}
    (tmp_path / "alone").mkdir()
    bare = tmp_path / "alone" / "bare.safetensors"
    save_file({"x": torch.zeros(1)}, str(bare))
    with pytest.raises(CheckpointError, match="holds no configuration"):
        FlexTok.from_official(bare)
    save_file({"x": torch.zeros(1)}, str(bare), metadata=metadata)
    with pytest.raises(CheckpointError, match="missing"):  # the header's configuration was understood
        FlexTok.from_official(bare)
    save_file({"x": torch.zeros(1)}, str(bare), metadata={"encoder": "__import__('os').getcwd()"})
    with pytest.raises(CheckpointError, match="no literal"):
        FlexTok.from_official(bare)


def test_unknown_modules_are_named_and_not_run() -> None:
    bad = tree("subprocess.Popen")
    with pytest.raises(InvalidInputError, match=r"subprocess\.Popen.*nothing was imported"):
        FlexTok.config_from_official(bad)
    extra = tree()
    extra["decoder"]["module_dict"]["dec_log"] = {"_target_": "os.system", "read_key": "x"}
    with pytest.warns(UserWarning, match=r"dec_log is a os\.system"):
        assert FlexTok.config_from_official(extra) == FlexTok.config_from_official(tree())
    bad = tree()
    bad["vae"]["_target_"] = "os.system"
    with pytest.raises(InvalidInputError, match=r"os\.system"):
        FlexTok.config_from_official(bad)
    bad = tree()
    bad["encoder"]["module_dict"]["d"]["mask_mode"] = "causal"
    with pytest.raises(InvalidInputError, match="mask_mode"):
        FlexTok.config_from_official(bad)
    missing = tree()
    missing["vae"]["scaling_factor"] = None
    with pytest.warns(UserWarning, match="scaling_factor"):
        assert "scaling_factor" not in FlexTok.config_from_official(missing)


def test_the_neighbours_of_the_files_are_recognised(model: FlexTok) -> None:
    config = dict(model.config)
    with pytest.raises(CheckpointError, match="AutoencoderKL"):
        FlexTok.from_official({"encoder.conv_in.weight": torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match="FlexTokAR"):
        FlexTok.from_official({"models.ar_image_model.head.linear.weight": torch.zeros(1)}, config)
    broken = model.to_official()
    broken["encoder.module_dict.enc_transformer.blocks.0.attn.wk.weight"] = torch.zeros(1, 32)
    with pytest.raises(CheckpointError, match="of another shape"):
        FlexTok.from_official(broken, config)
    del broken["encoder.module_dict.enc_transformer.blocks.0.attn.wk.weight"]
    with pytest.raises(CheckpointError, match="missing"):
        FlexTok.from_official(broken, config)
