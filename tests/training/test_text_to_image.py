"""The lab's text-to-image pipeline: its tokenizer, objective, training, export, fine-tunings, and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

import vistok
from vistok import hub
from vistok.cli import main
from vistok.data.shapes import VOCABULARY
from vistok.errors import CheckpointError, InvalidInputError
from vistok.files import PACKED_FILE, read_state_dict
from vistok.tokenizers import KLModel
from vistok.tokenizers.kl import stock_autoencoder
from vistok.training.export import export, write_model
from vistok.training.recipe import Recipe, load_recipe, parse_recipe
from vistok.training.text_to_image import TextToImage, build_clip_tokenizer, reworded
from vistok.training.trainer import Trainer

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIG = {
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "attention_heads": 2,
    "norm_num_groups": 4,
    "time_embedding_dim": 16,
    "text_hidden_size": 16,
    "text_layers": 1,
    "text_heads": 2,
    "text_ffn_size": 16,
}
ATTENTION = ["unet.mid_block.attentions.0.transformer_blocks.0.attn"]


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "tiny-t2i",
        "model": {"system": "text-to-image", "config": dict(CONFIG)},
        "data": {"source": "shapes-tokens", "image_size": 16, "objects": [1, 2], "scenes": 12, "condition": "caption"},
        "tokenizer": "kl.tiny",
        "steps": 4,
        "batch_size": 4,
        "ema_decay": 0.5,
        "optimizer": {"name": "muon", "convolutions": True, "lr": 1e-3},
        "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0},
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return parse_recipe({**values, **changes})


def trained(run: Path, asked: Recipe) -> Trainer:
    trainer = Trainer(asked, run, device="cpu", tensorboard=False)
    assert trainer.fit().status == "finished"
    return trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an exported pipeline."""
    folder = tmp_path_factory.mktemp("base")
    trained(folder / "run", recipe())
    return export(folder / "run", None, folder)


def draw(pipe: Any, *prompts: str) -> np.ndarray:
    return pipe(
        list(prompts),
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(number) for number, _ in enumerate(prompts)],
        output_type="np",
    ).images


# ---------------------------------------------------------------------------------------------------------- tokenizer
def test_every_word_of_the_lab_is_one_token_and_others_are_spelt(tmp_path: Path) -> None:
    tokenizer = build_clip_tokenizer()
    assert isinstance(tokenizer, CLIPTokenizer)
    assert tokenizer.model_max_length == 32
    for word in VOCABULARY:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert tokenizer.tokenize("  A  LARGE\n circle,and ") == ["a</w>", "large</w>", "circle</w>", ",</w>", "and</w>"]
    assert tokenizer.tokenize("dog") == ["d", "o", "g</w>"]
    ids = tokenizer("a red circle")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a red circle"
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "an image of a small dog! left of 3 rings"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_wordings_keep_the_meaning() -> None:
    text = "a circle to the left of a star"
    assert reworded(text, 0.9, 0.0, 0.9) == text
    assert reworded(text, 0.9, 0.0, 0.1) == "a circle left of a star"
    assert reworded(text, 0.0, 0.99, 0.9) == f"an image of {text}"


# ---------------------------------------------------------------------------------------------------------- objective
def batch(count: int = 8) -> dict[str, Any]:
    captions = ["a large red circle to the left of a small blue star", "a light ring"] * (count // 2)
    return {"latents": torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0)), "captions": captions}


def test_training_lowers_both_parts_of_the_loss() -> None:
    torch.manual_seed(0)
    model = TextToImage.tiny().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    found = []
    for step in range(16):
        losses = model.training_loss(batch(), generator=torch.Generator().manual_seed(step % 5))
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: float(value.detach()) for name, value in losses.items()})
    assert set(found[0]) == {"loss", "denoise", "text", "text_accuracy"}
    assert found[-1]["denoise"] < found[0]["denoise"]
    assert found[-1]["text"] < 0.7 * found[0]["text"]
    assert found[-1]["text_accuracy"] > found[0]["text_accuracy"]


def test_same_generator_same_loss_and_captions_matter() -> None:
    torch.manual_seed(0)
    model = TextToImage.tiny().eval()

    def loss(captions: list[str] | None = None) -> float:
        given = batch() if captions is None else {**batch(), "captions": captions}
        with torch.no_grad():
            return float(model.training_loss(given, generator=torch.Generator().manual_seed(3))["denoise"])

    assert loss() == loss()
    assert loss() != loss(["a dark cross"] * 8)


def test_captions_in_other_words_need_a_loss_without_heads() -> None:
    model = TextToImage.tiny()
    other = {**batch(2), "captions": ["a photo of a circle left of and above a star", "a dog"]}
    with pytest.raises(InvalidInputError, match="unknown word"):
        model.training_loss(other)
    assert set(TextToImage.tiny(text_loss_weight=0.0).training_loss(other)) == {"loss", "denoise"}


# ----------------------------------------------------------------------------------------------------------- pipeline
def test_what_ships_becomes_a_stock_pipeline(base: Path, tmp_path: Path) -> None:
    assert not (base / "vae").exists()
    vistok.load(str(base)).save_pretrained(str(tmp_path))
    pipe = DiffusionPipeline.from_pretrained(str(tmp_path))
    assert type(pipe) is StableDiffusionPipeline
    assert type(pipe.vae) is AutoencoderKL
    assert isinstance(pipe.text_encoder, CLIPTextModel)
    pipe.set_progress_bar_config(disable=True)
    pictures = draw(pipe, "a red circle", "a blue star")
    assert pictures.shape == (2, 16, 16, 3)
    assert np.isfinite(pictures).all()
    alone = draw(pipe, "a red circle")
    assert np.abs(alone[0] - pictures[0]).max() < 1e-4
    facts = json.loads((base / "vistok.json").read_text())
    assert (facts["kind"], facts["tokenizer"]) == ("pipeline", "kl.tiny")
    assert hub.recommended_sampling(str(base)) == {"num_inference_steps": 2, "guidance_scale": 2.0}
    for load in (vistok.load, vistok.load_pipeline):
        found = load(str(base))
        assert type(found) is StableDiffusionPipeline
        assert {part.dtype for part in (found.unet, found.vae, found.text_encoder)} == {torch.float32}
        assert np.array_equal(draw(found, "a red circle"), alone)


def test_a_run_writes_a_stock_pipeline(base: Path, tmp_path: Path) -> None:
    write_model(base.parent / "run", tmp_path / "model", "mine")
    pipe = DiffusionPipeline.from_pretrained(str(tmp_path / "model"))
    assert type(pipe.vae) is AutoencoderKL
    own = vistok.load("kl.tiny").state_dict()
    assert all(torch.equal(value, own[name]) for name, value in pipe.vae.state_dict().items())


def test_latents_mean_the_same_to_the_tokenizer_and_to_the_pipeline() -> None:
    tokenizer = KLModel.tiny(scaling_factor=0.7)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    stock = stock_autoencoder(tokenizer)
    mode = stock.encode(images).latent_dist.mode() * stock.config.scaling_factor
    tokens = tokenizer.tokens_from_moments(tokenizer.moments(images), sample=False)
    assert torch.allclose(tokenizer.latents_from_tokens(tokens), mode, atol=1e-5)


def test_other_parts_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="whole pipeline"):
        vistok.load_pipeline(str(base), tokenizer="kl.tiny")
    (tmp_path / "vistok.json").write_text(json.dumps({"system": "text-to-image"}))
    with pytest.raises(CheckpointError, match="no pipeline"):
        vistok.load(str(tmp_path))


def test_generate_draws_with_it(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "a red circle", "-m", str(base), "-n", "2", "-o", str(tmp_path / "grid.png")]
    assert main([*arguments, "--film", str(tmp_path / "film.png"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_images"] == 2
    assert (tmp_path / "grid.png").is_file()
    assert (tmp_path / "film.png").is_file()
    assert main([*arguments, "--temperature", "0.5"]) != 0
    assert "--temperature" in capsys.readouterr().err
    assert main([*arguments, "--height", "20"]) != 0
    assert "cannot draw" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- fine-tuning
def test_a_fine_tuning_ships_what_it_changed_and_keeps_tenor(base: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "text_loss_weight": 0.0, "tenor": True}
    arm = recipe(
        name="tiny-tenor",
        model={"system": "text-to-image", "config": config, "init_from": str(base), "trained": ATTENTION},
        data={"source": "shapes-pairs", "filtered": True, "image_size": 16, "scenes": 24},
    )
    trainer = trained(tmp_path / "run", arm)
    started = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    now = trainer.model.unet.state_dict()
    changed = {key for key, value in started.items() if not torch.equal(value.float(), now[key])}
    assert changed
    assert all("mid_block" in key and ".attn" in key for key in changed)
    folder = export(tmp_path / "run", None, tmp_path)
    assert {file.name for file in folder.iterdir()} == {PACKED_FILE, "vistok.json", "README.md"}
    shipped = read_state_dict(folder / PACKED_FILE)
    assert set(shipped) == changed
    pipe, plain = vistok.load(str(folder)), vistok.load(str(base))
    processor = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
    assert "_UNetProcessor" in type(processor).__name__
    assert not np.array_equal(draw(pipe, "a red circle"), draw(plain, "a red circle"))
    facts = json.loads((folder / "vistok.json").read_text())
    assert (facts["base"], facts["tenor"]) == (str(base), True)


def test_the_shipped_recipes_are_one_experiment() -> None:
    assert load_recipe(RECIPES / "t2i-shapes.yaml").name == "t2i-shapes"
    arms = [
        load_recipe(RECIPES / f"t2i-shapes-{arm}.yaml") for arm in ("unfiltered", "unfiltered-tenor", "scop", "tenor")
    ]
    settings = []
    for arm in arms:
        data: Any = arm.data
        settings.append((data.filtered, arm.model.config["tenor"]))
        assert (arm.steps, arm.batch_size, arm.optimizer, arm.schedule, arm.seed) == (
            arms[0].steps,
            arms[0].batch_size,
            arms[0].optimizer,
            arms[0].schedule,
            arms[0].seed,
        )
        assert arm.model.trained == arms[0].model.trained
    assert settings == [(False, False), (False, True), (True, False), (True, True)]
