"""FlexTok and its generator in the trainer: seeded draws of the decoder, exact resume, facts, and the lab's recipes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.common import generator_values, vq_values
from vistok import hub
from vistok.errors import InvalidInputError
from vistok.metrics.features import ShapesFeatures
from vistok.tokenizers.flextok import FlexTok
from vistok.tokenizers.kl import KLModel
from vistok.training import monitors
from vistok.training.logs import read_metrics
from vistok.training.monitors import TokenizerMonitor
from vistok.training.recipe import load_recipe, parse_recipe
from vistok.training.sources import ShapesImages, open_source
from vistok.training.trainer import Trainer, build_model, check_vocabulary, give_autoencoder

CPU = {"device": "cpu", "tensorboard": False}
RECIPES = Path(__file__).parents[2] / "recipes"
# 16x16 pixels to five tokens of 16 codes, without an auto-encoder.
TOKENIZER = {
    "vae_block_out_channels": None,
    "latent_channels": 3,
    "patch_size": 4,
    "grid": [4, 4],
    "num_registers": 5,
    "levels": [4, 4],
    "encoder_size": 16,
    "encoder_depth": 1,
    "encoder_head_dim": 8,
    "decoder_size": 16,
    "decoder_depth": 1,
    "decoder_head_dim": 8,
    "frequency_size": 16,
    "nested_dropout": "uniform_pow2",
    "repa_layer": None,
}
GENERATOR = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_tokens": 5,
    "mlp_hidden_size": 32,
    "num_classes": 64,
}


def tokenizer_values(**changes):
    sampling = {"guidance_scale": 2.0, "num_inference_steps": 2}
    model = {"system": "flextok", "config": TOKENIZER}
    return vq_values(**{"name": "tiny-flextok", "model": model, "sampling": sampling, "steps": 4, **changes})


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a tokenizer of 8x8 pixels, which are too few for the oracle: it is slow on noise."""
    torch.manual_seed(0)
    FlexTok.tiny(**{**TOKENIZER, "patch_size": 2}).save_pretrained(tmp_path / "flextok")
    return str(tmp_path / "flextok")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return FlexTok.tiny(**TOKENIZER)


def train_with_and_without_interruption(values, folder):
    """A watched run in one go, and its weights after a run that is killed half way and never watched."""
    watched = parse_recipe(values | {"checkpoint_every": 2, "validate_every": 2, "sample_every": 2})
    whole = Trainer(watched, folder / "whole", **CPU)
    result = whole.fit()
    assert result.status == "finished"

    unwatched = parse_recipe(values | {"checkpoint_every": 2})
    parts = Trainer(unwatched, folder / "parts", **CPU)
    step = parts._optimizer_step

    def stop_after_two(batches):
        parts._interrupted = parts.step == 1
        return step(batches)

    parts._optimizer_step = stop_after_two
    assert parts.fit().status == "interrupted"
    resumed = Trainer(unwatched, folder / "parts", **CPU)
    resumed.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    for name, value in whole.ema.state_dict().items():
        assert torch.equal(value, resumed.ema.state_dict()[name]), name
    return result


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_tokenizer_trains_shows_its_prefixes_and_resumes(precision, tmp_path):
    result = train_with_and_without_interruption(tokenizer_values(precision=precision), tmp_path)
    assert result.metrics["val/psnr"] > 0
    assert result.metrics["val/psnr_coffee"] > 0
    assert 0 < result.metrics["val/codebook_usage"] <= 1
    shown = {path.name for path in (result.run_dir / "samples").glob("*-00000004.png")}
    assert shown == {f"{name}-00000004.png" for name in ("reconstructions", "coffee", "prefixes")}
    facts = json.loads((result.run_dir / "model" / "vistok.json").read_text())
    assert facts["kind"] == "tokenizer"
    assert (facts["num_tokens"], facts["codebook_size"]) == (5, 16)
    model = hub.load(result.run_dir / "model")
    assert model.encode(torch.zeros(1, 3, 16, 16), 3).shape == (1, 3)


def test_the_generator_trains_on_its_ids_samples_and_resumes(tokenizer, tmp_path):
    values = generator_values(
        name="tiny-flextok-ar",
        model={"system": "flextok-ar", "config": GENERATOR},
        data={"source": "shapes-tokens", "image_size": 8, "scenes": 32, "condition": "class"},
        tokenizer=tokenizer,
        sampling={"guidance_scale": 1.5},
        steps=4,
    )
    result = train_with_and_without_interruption(values, tmp_path)
    assert result.metrics["val/loss"] > 0
    assert [path.name for path in (result.run_dir / "samples").glob("*-00000004.png")] == ["samples-00000004.png"]
    (cached,) = (tmp_path / "token-cache").glob("*/ids.npy")
    ids = np.load(cached)
    assert ids.shape == (32, 5)
    assert 0 <= ids.min() < ids.max() < 16
    facts = json.loads((result.run_dir / "model" / "vistok.json").read_text())
    assert facts["kind"] == "generator"
    assert (facts["num_tokens"], facts["codebook_size"]) == (5, 16)
    assert facts["tokenizer"] == tokenizer


def test_a_generator_of_another_codebook_is_refused(tokenizer, tmp_path):
    values = generator_values(
        model={"system": "flextok-ar", "config": {**GENERATOR, "vocab_size": 32}},
        data={"source": "shapes-tokens", "image_size": 8, "scenes": 32, "condition": "class"},
        tokenizer=tokenizer,
    )
    with pytest.raises(InvalidInputError, match=r"vocab_size is 32, but the tokenizer .* has 16 codes"):
        Trainer(parse_recipe(values), tmp_path / "run", **CPU).fit()


def test_the_monitor_draws_the_same_noise_every_time(model):
    recipe = parse_recipe(tokenizer_values())
    source = ShapesImages(recipe.data, recipe.seed)
    monitor = TokenizerMonitor(recipe, model, source, torch.device("cpu"))
    figures, pictures = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        figures.append(monitor.validate(model))
        pictures.append(monitor.sample(model, seed=0)[0])
    assert figures[0] == figures[1]
    for name, picture in pictures[0].items():
        assert np.array_equal(picture, pictures[1][name]), name
    # Eight scenes: the original, then 1, 2, 4 and all five tokens.
    assert pictures[0]["prefixes"].shape == (2 + 8 * 18, 2 + 5 * 18, 3)
    changed = TokenizerMonitor(parse_recipe(tokenizer_values(seed=1)), model, source, torch.device("cpu"))
    changed.images = monitor.images
    assert changed.validate(model)["val/psnr"] != figures[0]["val/psnr"]


def test_the_oracle_reads_what_a_prefix_keeps_of_simple_scenes(monkeypatch):
    monkeypatch.setattr(monitors, "HELD_OUT_SCENES", 2)
    monkeypatch.setattr(monitors, "READ_SCENES", 2)
    torch.manual_seed(0)
    model = FlexTok.tiny(**{**TOKENIZER, "patch_size": 8})
    data = {"source": "shapes-images", "image_size": 32, "photo_ratio": 0.0}
    recipe = parse_recipe(tokenizer_values(data=data))
    monitor = TokenizerMonitor(recipe, model, ShapesImages(recipe.data, recipe.seed), torch.device("cpu"))
    perfect = monitor.single
    monkeypatch.setattr(model, "decode_prefixes", lambda tokens, lengths, **_: perfect[:, None].repeat(1, 2, 1, 1, 1))
    figures = monitor.validate(model)
    assert (figures["val/agreement_4"], figures["val/agreement_5"]) == (1.0, 1.0)
    blank = torch.zeros(2, 2, 3, 32, 32)
    monkeypatch.setattr(model, "decode_prefixes", lambda tokens, lengths, **_: blank)
    assert monitor.validate(model)["val/agreement_4"] == 0.0


def test_a_sampling_setting_that_the_decoder_lacks_is_named(model):
    recipe = parse_recipe(tokenizer_values(sampling={"guidance_scale": 2.0, "top_k": 5}))
    with pytest.raises(InvalidInputError, match=r"FlexTok\.decode has no setting top_k"):
        TokenizerMonitor(recipe, model, ShapesImages(recipe.data, 0), torch.device("cpu"))


@pytest.fixture
def latents(tmp_path):
    """A folder with a KL tokenizer of 2x2 pixels and 4 channels."""
    torch.manual_seed(0)
    KLModel.tiny().save_pretrained(tmp_path / "latents")
    return str(tmp_path / "latents")


def on_latents(latents, **changes):
    config = {**TOKENIZER, "autoencoder": latents, "autoencoder_factor": 2, "latent_channels": 4, "patch_size": 2}
    return tokenizer_values(model={"system": "flextok", "config": config}, tokenizer=latents, **changes)


def test_on_the_latents_of_another_tokenizer_pictures_are_encoded_once_and_the_auto_encoder_stays_out(
    latents, tmp_path
):
    data = {
        "source": "shapes-images",
        "image_size": 16,
        "objects": [1, 3],
        "single_ratio": 0.5,
        "scenes": 24,
        "photo_ratio": 0.25,
        "held_out_photos": ["coffee"],
    }
    result = train_with_and_without_interruption(on_latents(latents, data=data), tmp_path)
    assert result.metrics["val/psnr"] > 0
    (cached,) = (tmp_path / "token-cache").glob("*/moments.npy")  # once for both runs
    assert np.load(cached).shape == (24, 8, 8, 8)
    folder = result.run_dir / "model"
    facts = json.loads((folder / "vistok.json").read_text())
    assert facts["autoencoder"] == latents
    assert facts["sampling"] == {"guidance_scale": 2.0, "num_inference_steps": 2}
    model = hub.load(folder)
    assert not [name for name in model.state_dict() if not name.startswith(("encoder.", "decoder."))]
    assert (model.config.guidance_scale, model.config.num_inference_steps) == (2.0, 2)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = model.encode(images)
    drawn = model.decode(tokens, generator=torch.Generator().manual_seed(0))
    same = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": torch.Generator().manual_seed(0)}
    assert torch.equal(drawn, model.decode(tokens, **same))
    assert drawn.shape == images.shape


def test_a_teacher_is_read_once_and_its_head_stays_behind(latents, tmp_path):
    ShapesFeatures.tiny().save_pretrained(tmp_path / "teacher")
    data = {"source": "shapes-images", "image_size": 16, "scenes": 6, "teacher": str(tmp_path / "teacher")}
    values = on_latents(latents, data=data, log_every=1)
    values["model"]["config"] |= {"repa_layer": 0, "repa_channels": 32, "repa_hidden_size": 16, "repa_weight": 0.5}
    trainer = Trainer(parse_recipe(values), tmp_path / "run", **CPU)
    trainer.fit()
    (cached,) = (tmp_path / "token-cache").glob("*/teacher_features.npy")
    assert np.load(cached).shape == (6, 32, 8, 8)
    lines = [line for line in read_metrics(tmp_path / "run") if "repa" in line]
    assert all(line["loss"] == pytest.approx(line["flow"] + 0.5 * line["repa"], rel=1e-4) for line in lines)
    assert len(lines) == 4
    assert any(name.startswith("repa_head.") for name in trainer.model.state_dict())
    model = hub.load(tmp_path / "run" / "model")
    assert model.config.repa_channels is None
    assert not any(name.startswith("repa_head.") for name in model.state_dict())


def test_a_teacher_needs_encoded_pictures_and_a_feature_map(latents, tmp_path):
    data = {"source": "shapes-images", "image_size": 16, "teacher": "vq.tiny"}
    with pytest.raises(InvalidInputError, match=r"set data\.scenes"):
        parse_recipe(on_latents(latents, data=data))
    with pytest.raises(InvalidInputError, match="no feature map"):
        Trainer(parse_recipe(on_latents(latents, data={**data, "scenes": 6})), tmp_path, **CPU).fit()
    with pytest.raises(InvalidInputError, match="goes with a KL tokenizer"):
        Trainer(parse_recipe(tokenizer_values(data={**data, "scenes": 6})), tmp_path / "other", **CPU).fit()


def test_the_pictures_of_the_cache_are_those_of_the_source(latents, tmp_path):
    recipe = parse_recipe(
        on_latents(
            latents,
            data={"source": "shapes-images", "image_size": 16, "scenes": 6, "photo_ratio": 0.5, "single_ratio": 1.0},
        )
    )
    tokenizer = hub.load(latents)
    cached = open_source(recipe, tokenizer=tokenizer, cache=tmp_path / "cache", device=torch.device("cpu"))
    images = ShapesImages(replace(recipe.data, scenes=0), recipe.seed)
    assert all(len(images.scene(number).objects) == 1 for number in range(20))
    numbers = np.arange(12)
    expected = tokenizer.moments(images.batch(cached.order(numbers))["images"].float() / 127.5 - 1)
    assert torch.allclose(cached.batch(numbers)["moments"], expected, atol=2e-2)


def test_a_recipe_must_name_the_tokenizer_that_its_network_works_on(latents, tmp_path):
    with pytest.raises(InvalidInputError, match="but the recipe's tokenizer is None"):
        Trainer(parse_recipe({**on_latents(latents), "tokenizer": None}), tmp_path / "run", **CPU).fit()


def test_the_recipes_of_the_lab_fit_each_other_and_the_size_that_may_ship():
    first, second = load_recipe(RECIPES / "flextok-shapes.yaml"), load_recipe(RECIPES / "flextok-ar-shapes.yaml")
    tokenizer, generator = build_model(first), build_model(second)
    for model in (tokenizer, generator):
        assert model.num_parameters() <= 2_000_000
    assert second.tokenizer == first.name
    check_vocabulary(second, generator, tokenizer)
    assert generator.num_tokens == tokenizer.num_registers
    assert tokenizer.image_size == (first.data.image_size,) * 2 == (second.data.image_size,) * 2
    latents = build_model(load_recipe(RECIPES / f"{first.tokenizer}.yaml")).eval()
    give_autoencoder(first, tokenizer, latents)
    losses = tokenizer.training_loss({"images": torch.rand(2, 3, 64, 64) * 2 - 1})
    assert losses["loss"].isfinite()
    tokens = tokenizer.eval().encode(torch.zeros(2, 3, 64, 64))
    labels = torch.tensor([0, 63])
    assert generator.training_loss({"ids": tokens.ids, "labels": labels})["loss"].isfinite()
