"""`vistok evaluate` and `vistok reproduce` as users type them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vistok.cli import main
from vistok.generators import NAR, XAR, HiMAR
from vistok.metrics import ShapesFeatures
from vistok.tokenizers import KLModel, VQModel


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A tiny tokenizer, a generator of 64 classes that writes for it, and a feature extractor."""
    torch.manual_seed(0)
    VQModel.tiny().save_pretrained(tmp_path / "vq")
    NAR.tiny(num_classes=64, grid=(8, 8)).save_pretrained(tmp_path / "nar")
    facts = {"system": "nar", "tokenizer": str(tmp_path / "vq"), "sampling": {"guidance_scale": 1.5, "top_k": 1}}
    (tmp_path / "nar" / "vistok.json").write_text(json.dumps(facts))
    ShapesFeatures.tiny().save_pretrained(tmp_path / "features")
    return tmp_path


def test_a_tokenizer_is_judged_and_pictured(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "evaluate",
        str(models / "vq"),
        "--num-samples",
        "3",
        "--photo",
        "cell",
        "--photo-size",
        "64",
        "--json",
        "--fid",
    ]
    assert main([*arguments, str(models / "features"), "--output", str(models / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["photographs"]["cell"]["psnr"] > 0
    assert report["fid"]["samples"] == 3
    assert json.loads((models / "out" / "report.json").read_text()) == report
    with Image.open(models / "out" / "reconstruction.png") as picture:
        assert picture.size == (3 * 66 - 2, 2 * 66 - 2)
    with Image.open(models / "out" / "photograph-cell.png") as picture:
        assert picture.width > picture.height / 2


def test_a_generator_is_judged_and_pictured(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(models / "nar"), "--num-samples", "3", "--fid", str(models / "features")]
    assert main([*arguments, "--output", str(models / "out"), "--temperature", "0.5"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "class: one object" in printed
    assert "/3" in printed
    assert "guidance scale 1.5, temperature 0.5, top k 1, top p 1.0, seed 0" in printed
    with Image.open(models / "out" / "class.png") as picture:
        assert picture.height == 16


@pytest.mark.parametrize(("system", "said"), [("xar", "solver euler_maruyama"), ("himar", "temperature 1.0")])
def test_continuous_tokens_are_judged(
    system: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    KLModel.tiny().save_pretrained(tmp_path / "kl")
    generator = {"xar": XAR, "himar": HiMAR}[system].tiny(num_classes=64, grid=(8, 8))
    generator.save_pretrained(tmp_path / system)
    facts = {"system": system, "tokenizer": str(tmp_path / "kl"), "sampling": {"guidance_scale": 1.5}}
    (tmp_path / system / "vistok.json").write_text(json.dumps(facts))
    ShapesFeatures.tiny().save_pretrained(tmp_path / "features")
    shared = ["--num-samples", "2", "--fid", str(tmp_path / "features"), "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(tmp_path / system), *shared, "--num-inference-steps", "2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "guidance scale 1.5, guidance schedule linear" in printed
    assert "num inference steps 2" in printed
    assert said in printed
    assert "top k" not in printed


def test_a_tokenizer_without_a_codebook_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    KLModel.tiny().save_pretrained(tmp_path / "kl")
    arguments = ["evaluate", str(tmp_path / "kl"), "--num-samples", "2", "--fid", "none"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "psnr" in printed
    assert "codebook" not in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vq", "--guidance-scale", "2"], "settings for generators"),
        (["nar", "--photo", "cell"], "for tokenizers"),
        (["features"], "ShapesFeatures"),
        (["vq", "--photo", "nothing"], "astronaut"),
    ],
)
def test_mistakes_end_in_one_line(
    models: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evaluate", str(models / arguments[0]), *arguments[1:], "--num-samples", "2", "--fid", "none"]
    assert main([*given, "--output", str(models / "out")]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert not (models / "out" / "report.json").exists()


def test_claims_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    assert "nar" in capsys.readouterr().out
