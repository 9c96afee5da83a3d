"""Recipes: every mistake is named, and nothing is lost on the way to disk and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vistok.errors import InvalidInputError
from vistok.training.recipe import (
    ShapesImagesRecipe,
    load_recipe,
    parse_recipe,
    recipe_differences,
    recipe_to_dict,
    save_recipe,
)

from .common import generator_values, vq_values

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_values_become_typed_dataclasses():
    recipe = parse_recipe(vq_values(optimizer={"lr": "1e-3", "betas": [0.5, 0.9]}, precision=False))
    assert isinstance(recipe.data, ShapesImagesRecipe)
    assert recipe.data.held_out_photos == ("coffee",)
    assert recipe.optimizer.lr == pytest.approx(1e-3)
    assert recipe.optimizer.betas == (0.5, 0.9)
    assert recipe.precision == "no"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batchsize": 3}, ["batchsize", "batch_size"]),
        ({"optimizer": {"learning_rate": 1}}, ["optimizer.learning_rate", "known: name, lr"]),
        ({"optimizer": {"beta": [0.9, 0.9]}}, ["optimizer.beta", "betas"]),
        ({"steps": 0}, ["steps", "at least 1", "got 0"]),
        ({"steps": "many"}, ["steps", "an integer", "many"]),
        ({"steps": True}, ["steps", "an integer"]),
        ({"steps": 2.5}, ["steps", "an integer"]),
        ({"optimizer": {"lr": float("nan")}}, ["optimizer.lr", "a number"]),
        ({"optimizer": {"betas": [0.9]}}, ["optimizer.betas", "length 2"]),
        ({"optimizer": {"betas": [0.9, 1.5]}}, ["optimizer.betas", "between 0.0 and 1.0"]),
        ({"precision": "fp8"}, ["precision", "'bf16'", "fp8"]),
        ({"schedule": {"name": "linear"}}, ["schedule.name", "'cosine'"]),
        ({"schedule": {"warmup_steps": 7}}, ["warmup_steps", "6 steps"]),
        ({"data": {"source": "imagenet"}}, ["data.source", "shapes-images", "imagenet"]),
        ({"data": {"source": "shapes-images", "scene": 3}}, ["data.scene", "scenes"]),
        ({"data": {"source": "shapes-images", "objects": [3, 1]}}, ["data.objects", "[3, 1]"]),
        ({"data": {"source": "shapes-images", "photo_ratio": 0.5, "annotations": True}}, ["annotations"]),
        ({"data": {"source": "folder"}}, ["data.path", "missing"]),
        ({"model": {"system": "vq", "config": [1]}}, ["model.config", "a mapping"]),
        ({"gradient_accumulation": 3}, ["batch_size 4", "gradient_accumulation 3"]),
        ({"data": {"source": "shapes-tokens", "scenes": 8, "condition": "class"}}, ["tokenizer"]),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(InvalidInputError) as caught:
        parse_recipe(vq_values(**changes))
    for word in words:
        assert word in str(caught.value)


def test_captions_need_a_text_encoder_and_classes_one_object():
    data = {"source": "shapes-tokens", "scenes": 8}
    with pytest.raises(InvalidInputError, match="text_encoder"):
        parse_recipe(generator_values(data={**data, "condition": "caption"}))
    with pytest.raises(InvalidInputError, match="one object"):
        parse_recipe(generator_values(data={**data, "condition": "class", "objects": [1, 2]}))
    with pytest.raises(InvalidInputError, match="belongs to the systems vq and kl; this recipe trains llamagen"):
        parse_recipe(generator_values(discriminator={}))


def test_a_missing_field_is_named():
    values = vq_values()
    del values["steps"]
    with pytest.raises(InvalidInputError, match=r"steps is missing; expected an integer"):
        parse_recipe(values)


def test_overrides_reach_nested_fields():
    recipe = parse_recipe(
        vq_values(), ["optimizer.lr=2e-4", "model.config.codebook_size=16", "data.held_out_photos=[chelsea]"]
    )
    assert recipe.optimizer.lr == pytest.approx(2e-4)
    assert recipe.model.config["codebook_size"] == 16
    assert recipe.data.held_out_photos == ("chelsea",)
    for wrong, word in (("steps", "key=value"), ("steps.more=1", "no group"), ("stepz=1", "steps"), ("seed=[", "YAML")):
        with pytest.raises(InvalidInputError, match=word):
            parse_recipe(vq_values(), [wrong])


def test_files_keep_everything(tmp_path):
    recipe = parse_recipe(vq_values(discriminator={"start_step": 2}))
    path = tmp_path / "recipe.yaml"
    save_recipe(path, recipe)
    assert load_recipe(path) == recipe
    assert recipe_to_dict(recipe) == yaml.safe_load(path.read_text())
    with pytest.raises(InvalidInputError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    path.write_text("steps: [")
    with pytest.raises(InvalidInputError, match="not valid YAML"):
        load_recipe(path)
    path.write_text("- 1")
    with pytest.raises(InvalidInputError, match="mapping"):
        load_recipe(path)


def test_differences_name_what_changes_the_weights():
    before = parse_recipe(vq_values())
    now = parse_recipe(vq_values(seed=1, log_every=7, model={"system": "vq", "config": {"codebook_size": 8}}))
    found = recipe_differences(before, now)
    assert "seed: 0 -> 1" in found
    assert "model.config.codebook_size: 32 -> 8" in found
    assert "model.config.base_channels: 32 -> None" in found
    assert not any("log_every" in line for line in found)
    assert recipe_differences(before, parse_recipe(vq_values(keep_checkpoints=5))) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_small_enough_to_ship(path):
    from vistok.training.export import MAX_BYTES, largest_file
    from vistok.training.trainer import build_model

    recipe = load_recipe(path)
    assert recipe.name == path.stem
    model = build_model(recipe)
    tensors = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    assert largest_file(model, tensors) < MAX_BYTES
