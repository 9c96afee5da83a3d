from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from vistok import hub
from vistok.data.shapes import parse_caption
from vistok.data.shapes.words import caption_tokenizer
from vistok.training.caption_encoder import CaptionEncoder, CaptionMeanings, description_targets
from vistok.training.recipe import ShapesMeaningsRecipe, load_recipe, parse_recipe
from vistok.training.trainer import Trainer, build_model

RECIPES = Path(__file__).parents[2] / "recipes"


def test_the_recipe_builds_the_encoder_that_ships() -> None:
    model = build_model(load_recipe(RECIPES / "text-shapes.yaml"))
    shipped = hub.load("text-shapes")
    assert {name: tuple(value.shape) for name, value in model.encoder.state_dict().items()} == {
        name: tuple(value.shape) for name, value in shipped.model.state_dict().items()
    }
    text = "a large red circle to the left of a small blue star, and a ring"
    assert model.tokenizer(text)["input_ids"] == shipped.tokenizer(text)["input_ids"]
    assert model.facts()["parameters"] == 496832


def test_a_run_ends_with_transformers_files(tmp_path: Path) -> None:
    recipe = parse_recipe(
        {
            "name": "text",
            "model": {"system": "caption-encoder", "config": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}},
            "data": {"source": "shapes-meanings", "objects": [1, 2]},
            "steps": 2,
            "batch_size": 4,
            "ema_decay": 0.0,
            "validate_every": 2,
        }
    )
    result = Trainer(recipe, tmp_path / "text", device="cpu", tensorboard=False).fit()
    assert 0 <= result.metrics["val/whole_description_accuracy"] <= 1
    encoder = hub.load(tmp_path / "text" / "model")
    assert encoder(["a red circle"], num_tokens=8).features.shape == (1, 8, 16)
    facts = json.loads((tmp_path / "text" / "model" / "vistok.json").read_text())
    assert facts["system"] == "text-encoder"
    assert facts["kind"] == "text encoder"


def test_meanings_are_those_of_the_captions() -> None:
    source = CaptionMeanings(ShapesMeaningsRecipe("shapes-meanings", bare=0.5), seed=1)
    batch = source.batch(np.arange(8))
    texts = source.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert [description_targets(parse_caption(text)) for text in texts] == batch["targets"].tolist()
    assert any(not text.startswith(("a ", "an ")) for text in texts)
    alone = source.batch(np.array([5]))
    assert torch.equal(alone["targets"][0], batch["targets"][5])


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = CaptionEncoder.tiny()
    batch = CaptionMeanings(ShapesMeaningsRecipe("shapes-meanings"), seed=1).batch(np.arange(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model.training_loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


def test_both_kinds_of_tokenizers_agree_on_the_words() -> None:
    begin, plain = caption_tokenizer(), caption_tokenizer(begin=False)
    ids, other = begin("a red circle")["input_ids"], plain("A red circle")["input_ids"]
    assert begin.convert_ids_to_tokens(ids) == ["<s>", "a", "red", "circle", "</s>"]
    assert plain.convert_ids_to_tokens(other) == ["a", "red", "circle", "</s>"]
    assert plain.bos_token is None
    assert begin("a dog")["input_ids"][2] == begin.unk_token_id
