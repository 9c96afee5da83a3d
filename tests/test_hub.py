"""Names, and what they load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vistok import hub
from vistok.errors import CheckpointError, InvalidInputError, UnknownNameError
from vistok.generators.nar import NAR
from vistok.tokenizers.vq import VQModel


def test_tiny_flavours_of_every_system_build() -> None:
    for system in hub.SYSTEMS:
        model = hub.load(f"{system}.tiny")
        assert not model.training
        assert sum(value.numel() for value in model.parameters()) < 1_000_000


def test_published_names_are_listed_with_their_facts() -> None:
    assert "nar-l.imagenet256" in hub.list_models("nar-*")
    info = hub.model_info("nar-l.imagenet256")
    assert info["hub_id"] == "chenfeng1271/NAR-imagenet-256-L"
    assert info["parameters"] == 372_536_320
    assert info["tokenizer"] in hub.list_models("vq*")
    assert hub.list_models("no-such-*") == []


@pytest.mark.parametrize("name", [name for name in hub.list_models(include_published=True) if "." in name])
def test_published_configurations_have_the_published_size(name: str) -> None:
    entry = hub.published()[name]
    with torch.device("meta"):
        model = hub.system_class(entry.system)(**entry.config)
    assert sum(value.numel() for value in model.parameters()) == entry.parameters


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"nar-l\.imagenet256"):
        hub.load("nar-l.imagenet")
    with pytest.raises(UnknownNameError, match="no folder at"):
        hub.load("./no-such-folder")
    with pytest.raises(UnknownNameError, match="vistok models"):
        hub.model_info("zzz")


def test_folders_round_trip(tmp_path: Path) -> None:
    model = NAR.tiny().eval()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "mine")
    again = hub.load(tmp_path / "mine")
    assert isinstance(again, NAR)
    assert {value.dtype for value in again.parameters()} == {torch.float32}
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].float()), name
    assert {value.dtype for value in hub.load(tmp_path / "mine", dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_float16_on_a_cpu_is_refused_with_a_warning(tmp_path: Path) -> None:
    NAR.tiny().save_pretrained(tmp_path / "mine")
    with pytest.warns(UserWarning, match="slower"):
        model = hub.load(tmp_path / "mine", dtype=torch.float16)
    assert torch.float16 not in {value.dtype for value in model.parameters()}


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hub.load(tmp_path / "empty")
    VQModel.tiny().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        hub.load(tmp_path / "cut")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(CheckpointError, match="UNet2DModel"):
        hub.load(tmp_path / "foreign")
    with pytest.raises(InvalidInputError, match="is a file"):
        hub.load(tmp_path / "foreign" / "config.json")


def test_a_pipeline_needs_a_generator_that_names_its_tokenizer(tmp_path: Path) -> None:
    NAR.tiny().save_pretrained(tmp_path / "mine")
    with pytest.raises(InvalidInputError, match="does not say which tokenizer"):
        hub.load_pipeline(tmp_path / "mine")
    with pytest.raises(UnknownNameError, match="nearest known"):
        hub.load_pipeline("nar-shpes-x")
