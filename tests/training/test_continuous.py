"""Training on continuous tokens: cached moments, drawn anew at every step, and the scale of a KL tokenizer."""

import json

import pytest
import torch

from tests.training.common import KL, generator_values, vq_values
from vistok.errors import InvalidInputError
from vistok.tokenizers.kl import KLModel
from vistok.training.export import export
from vistok.training.recipe import parse_recipe
from vistok.training.sources import draw_latents, encode_images
from vistok.training.trainer import Trainer

CPU = {"device": "cpu", "tensorboard": False}
STACK = {"encoder_layers": 1, "encoder_heads": 2, "decoder_layers": 1, "decoder_heads": 2}
HEAD = {"head_layers": 1, "head_width": 16, "num_diffusion_steps": "4", "diffusion_repeats": 1}
NETWORKS = {
    "mar": {
        "latent_channels": 4,
        "grid": [4, 4],
        "encoder_hidden_size": 16,
        "decoder_hidden_size": 16,
        "num_classes": 64,
        "num_condition_tokens": 2,
        **STACK,
        **HEAD,
    },
    "himar": {
        "latent_channels": 4,
        "grid": [4, 4],
        "pivot_grid": [2, 2],
        "hidden_size": 16,
        "num_classes": 64,
        "num_condition_tokens": 2,
        "dense_head_layers": 1,
        "dense_head_width": 16,
        "dense_head_heads": 2,
        "num_dense_diffusion_steps": "4",
        **STACK,
        **HEAD,
    },
    "xar": {
        "latent_channels": 4,
        "grid": [4, 4],
        "entity_size": 2,
        "hidden_size": 16,
        "num_classes": 64,
        **STACK,
    },
}


@pytest.fixture
def tokenizer(tmp_path):
    torch.manual_seed(0)
    KLModel.tiny().save_pretrained(tmp_path / "kl")
    return str(tmp_path / "kl")


def values(system, tokenizer, **changes):
    data = {"source": "shapes-tokens", "image_size": 8, "scenes": 32, "condition": "class"}
    if system == "himar":
        data["pivot_size"] = 4
    return generator_values(
        name=f"tiny-{system}",
        model={"system": system, "config": NETWORKS[system]},
        data=data,
        tokenizer=tokenizer,
        **changes,
    )


@pytest.mark.parametrize("system", NETWORKS)
def test_generators_of_continuous_tokens_train_sample_and_resume(system, tokenizer, tmp_path):
    recipe = parse_recipe(values(system, tokenizer, steps=4, checkpoint_every=2, validate_every=4, sample_every=4))
    whole = Trainer(recipe, tmp_path / "whole", **CPU).fit()
    assert whole.status == "finished"
    assert whole.metrics["val/loss"] > 0
    assert list((tmp_path / "whole" / "samples").glob("*.png"))

    parts = Trainer(recipe, tmp_path / "parts", **CPU)
    step = parts._optimizer_step

    def stop_after_two(batches):
        parts._interrupted = parts.step == 1
        return step(batches)

    parts._optimizer_step = stop_after_two
    assert parts.fit().status == "interrupted"
    resumed = Trainer(recipe, tmp_path / "parts", **CPU)
    resumed.fit()
    trained = Trainer(recipe, tmp_path / "again", **CPU)
    trained.fit()
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_every_step_draws_other_latents_from_the_moments():
    torch.manual_seed(0)
    model = KLModel.tiny()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    found = encode_images(model, images, pivot_size=4)
    assert found["moments"].shape == (2, 8, 4, 4)
    assert found["pivot_moments"].shape == (2, 8, 2, 2)
    first, second = dict(found), dict(found)
    draw_latents(model, first)
    draw_latents(model, second)
    assert set(first) == {"latents", "pivot_latents"}
    assert first["latents"].shape == (2, 4, 4, 4)
    assert not torch.equal(first["latents"], second["latents"])
    mean = model.latents_from_tokens(model.encode(images))
    draws = torch.stack([model.latents_from_tokens(model.tokens_from_moments(found["moments"])) for _ in range(400)])
    assert torch.allclose(draws.mean(0), mean, atol=6 * float(draws.std(0).max()) / 20)


def test_pivots_of_a_codebook_are_refused():
    from vistok.tokenizers.vq import VQModel

    with pytest.raises(InvalidInputError, match="KL tokenizer"):
        encode_images(VQModel.tiny().eval(), torch.zeros(1, 3, 16, 16), pivot_size=8)


def test_an_exported_kl_tokenizer_has_unit_latents(tmp_path):
    recipe = parse_recipe(vq_values(name="tiny-kl", model={"system": "kl", "config": KL}, steps=2))
    Trainer(recipe, tmp_path / "run", **CPU).fit()
    folder = export(tmp_path / "run", None, tmp_path / "assets")
    scale = json.loads((folder / "config.json").read_text())["scaling_factor"]
    model = KLModel.from_pretrained(folder).eval()
    from vistok.training.sources import ShapesImages

    images = ShapesImages(recipe.data, recipe.seed).batch(torch.arange(64).numpy())["images"].float() / 127.5 - 1
    measured = model.measure_latents([images])
    assert scale == 1.0
    torch.testing.assert_close(measured.channel_mean, torch.zeros_like(measured.channel_mean), atol=0.2, rtol=0)
    torch.testing.assert_close(measured.channel_std, torch.ones_like(measured.channel_std), atol=0.2, rtol=0)
