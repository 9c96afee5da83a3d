"""What leaves a run folder: averaged weights in bf16 with everything that loading them needs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from vistok import hub
from vistok.errors import CheckpointError, InvalidInputError
from vistok.files import read_state_dict
from vistok.training.checkpoint import Checkpoint, save_checkpoint
from vistok.training.export import export
from vistok.training.logs import MetricsLog
from vistok.training.recipe import parse_recipe, save_recipe
from vistok.training.trainer import Trainer, build_model

from .common import VQ, generator_recipe, vq_recipe, vq_values


def write_run(run_dir, recipe):
    """A run folder as after one step, with an average that differs from the weights."""
    run_dir.mkdir()
    model = build_model(recipe)
    weights = model.state_dict()
    averaged = {name: value * 2 if value.is_floating_point() else value for name, value in weights.items()}
    save_recipe(run_dir / "recipe.yaml", recipe)
    save_checkpoint(run_dir, Checkpoint(1, dict(weights), averaged, 1, {}), dict(model.config), keep=1)
    return averaged


def test_a_tokenizer_is_exported_with_its_facts(tmp_path):
    averaged = write_run(tmp_path / "run", vq_recipe())
    MetricsLog(tmp_path / "run", 0, tensorboard=False).write(1, {"loss": 1.0, "val/psnr": 21.5})
    folder = export(tmp_path / "run", "mine", tmp_path / "assets")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "packed.safetensors",
        "vistok.json",
    ]
    stored = read_state_dict(folder / "packed.safetensors")
    assert stored["decoder.conv_out.weight"].dtype == torch.bfloat16
    assert stored["quantizer.usage_queue"].dtype == torch.int32
    assert torch.equal(stored["decoder.conv_out.weight"], averaged["decoder.conv_out.weight"].bfloat16())
    facts = json.loads((folder / "vistok.json").read_text())
    assert facts["system"] == "vq"
    assert facts["kind"] == "tokenizer"
    assert facts["image_size"] == 16
    assert facts["num_tokens"] == 64
    assert facts["codebook_size"] == 32
    card = (folder / "README.md").read_text()
    assert card.startswith("# mine")
    assert "| val/psnr | 21.5 |" in card
    loaded = hub.load(str(folder))
    images = torch.zeros(1, 3, 16, 16)
    assert loaded.decode(loaded.encode(images)).shape == images.shape


def test_a_generator_names_its_classes_and_partners(tmp_path):
    recipe = generator_recipe(sampling={"guidance_scale": 2.0})
    write_run(tmp_path / "run", recipe)
    folder = export(tmp_path / "run", None, tmp_path / "assets")
    assert folder.name == "tiny-llamagen"
    facts = json.loads((folder / "vistok.json").read_text())
    assert facts["kind"] == "generator"
    assert facts["tokenizer"] == "vq.tiny"
    assert "text_encoder" not in facts
    assert facts["class_names"][0] == "red circle"
    assert len(facts["class_names"]) == 64
    assert facts["sampling"]["guidance_scale"] == 2.0
    assert facts["num_tokens"] == 16
    loaded = hub.load(str(folder))
    assert type(loaded).__name__ == "LlamaGen"
    # Generators ship as int8 rows, which both ways of loading undo.
    assert (folder / "packed.safetensors").is_file()
    assert not (folder / "diffusion_pytorch_model.safetensors").is_file()
    other = type(loaded).from_pretrained(folder)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in other.state_dict().items())
    assert other.dtype == torch.float32


def test_large_or_foreign_weights_are_refused(tmp_path):
    write_run(tmp_path / "run", vq_recipe())
    with pytest.raises(InvalidInputError, match=r"MiB in int8 rows; at most 0\.01 MiB may ship"):
        export(tmp_path / "run", None, tmp_path / "assets", max_bytes=10_000)
    assert not (tmp_path / "assets").exists()
    other = parse_recipe({**vq_values(), "model": {"system": "vq", "config": {**VQ, "codebook_size": 8}}})
    save_recipe(tmp_path / "run" / "recipe.yaml", other)
    with pytest.raises(CheckpointError, match=r"quantizer\.codebook \[32, 8\] instead of \[8, 8\]"):
        export(tmp_path / "run", None, tmp_path / "assets")
    (tmp_path / "empty").mkdir()
    save_recipe(tmp_path / "empty" / "recipe.yaml", other)
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        export(tmp_path / "empty", None, tmp_path / "assets")


def test_a_finished_run_holds_a_loadable_model(tmp_path):
    recipe = replace(vq_recipe(), steps=1)
    Trainer(recipe, tmp_path, device="cpu", tensorboard=False).fit()
    model = hub.load(str(tmp_path / "model"))
    checkpoint = read_state_dict(tmp_path / "checkpoints" / "step-00000001" / "ema.safetensors")
    assert all(torch.equal(value, checkpoint[name]) for name, value in model.state_dict().items())
