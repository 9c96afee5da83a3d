"""What MAR, Hi-MAR and xAR say to input that cannot be right: never a picture, always a sentence that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.common import generator_values
from vistok.errors import InvalidInputError
from vistok.generators import MAR, XAR, GenerationPipeline, HiMAR
from vistok.tokenizers import KLModel
from vistok.training.recipe import parse_recipe, save_recipe
from vistok.training.trainer import Trainer

SYSTEMS: dict[str, Any] = {"mar": MAR, "himar": HiMAR, "xar": XAR}
LABELS = torch.tensor([1, 2])


def batch_of(model: Any) -> dict[str, torch.Tensor]:
    rows, cols = model.grid
    batch = {"latents": torch.randn(2, 4, rows, cols), "labels": LABELS}
    if isinstance(model, HiMAR):
        batch["pivot_latents"] = torch.randn(2, 4, *model.pivot_grid)
    return batch


@pytest.fixture(params=SYSTEMS)
def model(request: pytest.FixtureRequest) -> Any:
    return SYSTEMS[request.param].tiny()


def test_a_tokenizer_with_other_channels_is_named(model: Any) -> None:
    name = type(model).__name__
    with pytest.raises(InvalidInputError, match=f"{name} writes tokens of 4 channels, but KLModel decodes tokens of 6"):
        GenerationPipeline(model, KLModel.tiny(latent_channels=6))


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_tokenizer_with_another_scale_is_named(system: str) -> None:
    model = SYSTEMS[system].tiny(scaling_factor=0.2325)
    GenerationPipeline(model, KLModel.tiny(scaling_factor=0.2325))
    with pytest.raises(InvalidInputError, match=r"trained on latents scaled by 0\.2325, but KLModel scales by 0\.18"):
        GenerationPipeline(model, KLModel.tiny(scaling_factor=0.18))


@pytest.mark.parametrize("entity", ["cell", "subsample"])
def test_entities_that_do_not_divide_the_grid_are_refused(entity: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"{entity} entities of size 3 .* 4x4 grid; possible sizes: \[1, 2, 4"):
        XAR.tiny(entity=entity, entity_size=3)


@pytest.mark.parametrize("steps", [0, -4])
def test_steps_below_one_are_refused(model: Any, steps: int) -> None:
    names = ["num_inference_steps", *(["num_pivot_steps"] if isinstance(model, HiMAR) else [])]
    for name in names:
        with pytest.raises(InvalidInputError, match=rf"at least [12]\b.* got {steps}"):
            model.sample(LABELS, **{name: steps})
    heads = [name for name in model.sampling_defaults if name.endswith("diffusion_steps")]
    for name in heads:
        with pytest.raises(InvalidInputError, match="diffusion step"):
            model.sample(LABELS, **{name: steps})


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_guidance_that_is_no_number_from_zero_on_is_refused(model: Any, scale: float) -> None:
    for name in [name for name in model.sampling_defaults if name.endswith("guidance_scale")]:
        with pytest.raises(InvalidInputError, match=f"guidance_scale must be a number >= 0.* got {scale}"):
            model.sample(LABELS, **{name: scale})


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_latents_that_are_no_numbers_do_not_train(model: Any, bad: float) -> None:
    batch = batch_of(model)
    assert torch.isfinite(model.training_loss(batch)["loss"])
    for name in [name for name in batch if name.endswith("latents")]:
        spoiled = {**batch, name: batch[name].clone()}
        spoiled[name][1, 2, 1, 0] = bad
        with pytest.raises(InvalidInputError, match="latents contain NaN or infinity"):
            model.training_loss(spoiled)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_is_not_resumed_with_another_recipe(system: str, tmp_path: Path) -> None:
    width = "encoder_hidden_size" if system == "mar" else "hidden_size"

    def recipe(size: int, **changes: Any) -> Any:
        model = {"system": system, "config": {width: size, "num_classes": 64}}
        return parse_recipe(generator_values(name=f"tiny-{system}", model=model, tokenizer="kl.tiny", **changes))

    save_recipe(tmp_path / "recipe.yaml", recipe(32))
    other = recipe(48, optimizer={"lr": 0.5}, log_every=7)
    with pytest.raises(InvalidInputError) as refused:
        Trainer(other, tmp_path, device="cpu", tensorboard=False).fit()
    text = str(refused.value)
    assert f"model.config.{width}: 32 -> 48" in text
    assert "optimizer.lr: " in text
    assert "-> 0.5" in text
    assert "log_every" not in text  # leaves the weights alone
