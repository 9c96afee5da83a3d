"""FlexTok on the latents of another tokenizer, and what a checkpoint says about decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vistok import hub
from vistok.cli import main
from vistok.errors import CheckpointError, InvalidInputError
from vistok.generators import FlexTokAR, GenerationPipeline
from vistok.tokenizers import FlexTok, KLModel
from vistok.tokenizers.flextok.flow import noise_levels, prefix_lengths, shift_levels
from vistok.tokens import VisualTokens

# 16x16 pixels, 8x8 latents of 4 channels, patches of 2x2, five tokens of 16 codes.
CONFIG: dict[str, Any] = {
    "vae_block_out_channels": None,
    "autoencoder": "kl.tiny",
    "autoencoder_factor": 2,
    "patch_size": 2,
    "num_registers": 5,
    "levels": (4, 4),
    "num_inference_steps": 2,
    "guidance_scale": 1.5,
    "guidance": "classifier_free",
}


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture
def latents() -> KLModel:
    return hub.load("kl.tiny")


@pytest.fixture
def model(latents: KLModel) -> FlexTok:
    torch.manual_seed(0)
    model = FlexTok.tiny(**CONFIG)
    model.set_autoencoder(latents)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=seeds(3)[0]) * 2 - 1


def test_latents_are_those_of_the_other_tokenizer(model: FlexTok, latents: KLModel, images: torch.Tensor) -> None:
    assert model.image_size == (16, 16)
    assert model.downsample_factor == 2
    expected = latents.latents_from_tokens(latents.encode(images))
    assert torch.equal(model.encode_latents(images), expected)
    drawn = model.encode_latents(images, sample_posterior=True, generator=seeds(1)[0])
    again = latents.latents_from_tokens(latents.encode(images, sample=True, generator=seeds(1)[0]))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, expected)
    assert torch.equal(model.decode_latents(expected), latents.decode(latents.encode(images)).float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode_latents(images), expected)
    with pytest.raises(InvalidInputError, match="own auto-encoder"):
        model.encode_latents(images, sample_posterior=True, noise=torch.zeros_like(expected))


def test_the_other_tokenizer_is_no_part_of_the_model(model: FlexTok, latents: KLModel, images: torch.Tensor) -> None:
    assert not any(name.startswith("vae") or "autoencoder" in name for name in model.state_dict())
    own = {id(parameter) for parameter in latents.parameters()}
    assert not own & {id(parameter) for parameter in model.parameters()}
    assert not any(parameter.requires_grad for parameter in latents.parameters())
    model.train().training_loss({"images": images}, generator=seeds(0)[0])["loss"].backward()
    assert all(parameter.grad is None for parameter in latents.parameters())
    assert not latents.training
    model.to(torch.bfloat16)
    assert latents.dtype == torch.float32  # it keeps its precision
    assert model.eval().decode(model.encode(images)).dtype == torch.float32


def test_a_saved_model_finds_it_by_name(model: FlexTok, images: torch.Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tokens = model.encode(images)
    drawn = model.decode(tokens, generator=seeds(1, 2))
    loaded = hub.load(tmp_path)
    assert torch.equal(loaded.encode(images).ids, tokens.ids)
    torch.testing.assert_close(loaded.decode(tokens, generator=seeds(1, 2)), drawn)

    alone = FlexTok.from_pretrained(tmp_path)  # diffusers knows nothing of names
    with pytest.raises(InvalidInputError, match=r"no part of it: load it with vistok.load, or give"):
        alone.encode(images)
    alone.set_autoencoder(hub.load("kl.tiny"))
    assert torch.equal(alone.encode(images).ids, tokens.ids)

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "autoencoder": "kl-shape"}))
    with pytest.raises(CheckpointError, match=r"names the auto-encoder 'kl-shape'"):
        hub.load(tmp_path)


def test_other_auto_encoders_are_refused(model: FlexTok, latents: KLModel) -> None:
    with pytest.raises(InvalidInputError, match=r"4 channels, one for 2x2 pixels; .* 3 channels"):
        model.set_autoencoder(KLModel.tiny(latent_channels=3))
    with pytest.raises(InvalidInputError, match="must be a KL tokenizer"):
        model.set_autoencoder(hub.load("vq.tiny"))
    with pytest.raises(InvalidInputError, match="needs no auto-encoder"):
        FlexTok.tiny().set_autoencoder(latents)
    with pytest.raises(InvalidInputError, match="got both"):
        FlexTok.tiny(autoencoder="kl.tiny")


def test_images_smaller_than_a_patch_are_refused(model: FlexTok) -> None:
    with pytest.raises(InvalidInputError, match="multiples of 4, the side of a patch; got 2x2"):
        model.encode(torch.zeros(1, 3, 2, 2))
    with pytest.raises(InvalidInputError, match="image_size must be multiples of 4; got 2x2"):
        model.decode([[0]], image_size=2)


def test_decoding_follows_the_configuration_unless_told_otherwise(model: FlexTok) -> None:
    tokens = VisualTokens(ids=torch.tensor([[1, 5, 9]]))
    own = model.decode(tokens, generator=seeds(0))
    told = {"num_inference_steps": 2, "guidance_scale": 1.5, "guidance": "classifier_free"}
    assert torch.equal(own, model.decode(tokens, generator=seeds(0), **told))
    for other in ({"num_inference_steps": 3}, {"guidance_scale": 4.0}, {"guidance": "normalized"}):
        assert not torch.equal(own, model.decode(tokens, generator=seeds(0), **other))
    published = FlexTok.tiny().config
    assert (published.num_inference_steps, published.guidance_scale, published.guidance) == (25, 7.5, "normalized")
    with pytest.raises(InvalidInputError, match="guidance must be one of"):
        FlexTok.tiny(guidance="free")


def test_decode_draws_from_its_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "tokens.safetensors", tmp_path / "out.png"
    VisualTokens(ids=torch.randint(1600, (2, 4))).save(file)
    command = ["decode", str(file), "--model", "flextok.tiny", "--num-inference-steps", "2", "-o", str(out)]

    def drawn(*more: str) -> bytes:
        assert main([*command, *more]) == 0
        return out.read_bytes()

    first = drawn()
    assert drawn("--seed", "0") == first
    assert drawn("--seed", "1") != first
    assert drawn("--guidance-scale", "1") != first
    VisualTokens(ids=torch.zeros(1, 4, dtype=torch.int64), grid=(2, 2)).save(file)
    capsys.readouterr()
    assert main(["decode", str(file), "--model", "vq.tiny", "--guidance-scale", "2", "-o", str(out)]) == 2
    assert "which draws nothing" in capsys.readouterr().err


def test_noise_can_be_shifted_and_tokens_be_left_without_order() -> None:
    t = noise_levels(torch.rand(2000, generator=seeds(0)[0]))
    shifted = shift_levels(t, 2.5)
    assert torch.equal(shift_levels(t, 1.0), t)
    assert (shifted >= t).all()
    assert shifted.max() <= 1
    assert shifted.mean() > t.mean() + 0.1
    torch.testing.assert_close(shift_levels(shifted, 1 / 2.5), t)
    assert prefix_lengths(3, 5, "none") == [5, 5, 5]
    with pytest.raises(InvalidInputError, match="noise_shift"):
        FlexTok.tiny(noise_shift=0.0)


def test_neighbouring_codes_differ_in_one_feature(model: FlexTok) -> None:
    features = FlexTok.tiny(levels=(4, 3)).code_features()
    assert features.shape == (12, 5)
    assert len(features.unique(dim=0)) == 12
    assert (features[0] != features[1]).sum() == 1  # one step of the first channel
    assert (features[0] != features[4]).sum() == 1  # one step of the second
    assert (features[0] != features[11]).sum() == 5


def test_a_generator_can_start_from_the_codes(model: FlexTok) -> None:
    torch.manual_seed(0)
    generator = FlexTokAR.tiny(vocab_size=16)
    generator.embed_codebook(model.code_features())
    table = generator.token_embedding.weight.detach()
    near, far = (table[0] - table[1]).norm(), (table[0] - table[15]).norm()
    assert near < far
    with pytest.raises(InvalidInputError, match="16 codes, the vocabulary 64"):
        FlexTokAR.tiny(vocab_size=64).embed_codebook(model.code_features())


def test_a_saved_pipeline_finds_it_too(model: FlexTok, tmp_path: Path) -> None:
    torch.manual_seed(0)
    writer = FlexTokAR.tiny(vocab_size=16, num_tokens=5)
    pipe = GenerationPipeline(writer, model)
    pipe.save_pretrained(tmp_path)
    loaded = hub.load_pipeline(tmp_path)
    for one in (pipe, loaded):
        one.set_progress_bar_config(disable=True)
    first, second = (one(class_labels=[3], generator=seeds(1), output_type="pt").images for one in (pipe, loaded))
    torch.testing.assert_close(first, second)


def test_the_random_flavours_fit_each_other() -> None:
    pipe = hub.load_pipeline("flextok-ar.tiny")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[1], generator=seeds(0), num_tokens=3, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)
