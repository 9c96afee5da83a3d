"""SEED on the command line: codes of any photograph, pictures of codes, and plain words where something is missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.cli import main
from vistok.tokenizers import KLModel
from vistok.tokenizers.seed import SEED, UnCLIPDenoiser
from vistok.tokens import VisualTokens


def test_codes_of_a_picture_and_a_picture_of_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    autoencoder = KLModel.tiny()
    autoencoder.save_pretrained(tmp_path / "kl")
    side = 32 // autoencoder.downsample_factor
    UnCLIPDenoiser.tiny(autoencoder=str(tmp_path / "kl"), sample_size=side).save_pretrained(tmp_path / "unclip")
    SEED.tiny(unclip=str(tmp_path / "unclip")).save_pretrained(tmp_path / "seed")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    model, codes = ["--model", str(tmp_path / "seed")], tmp_path / "codes.safetensors"
    assert main(["encode", str(tmp_path / "photo.png"), *model, "-o", str(codes), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_image"] == 8
    assert VisualTokens.load(codes).ids.shape == (1, 8)
    pictures = []
    for seed in (0, 0, 1):
        settings = ["--seed", str(seed), "--num-inference-steps", "1", "-o", str(tmp_path / "again.png")]
        assert main(["decode", str(codes), *model, *settings]) == 0
        pictures.append(np.asarray(Image.open(tmp_path / "again.png")))
    assert pictures[0].shape == (32, 32, 3)
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    assert main(["encode", str(tmp_path / "red.png"), "--model", "seed.tiny", "--size", "64"]) == 2
    assert "28 pixels a side; got 64" in capsys.readouterr().err
    VisualTokens(ids=torch.zeros(1, 8, dtype=torch.int64)).save(tmp_path / "codes.safetensors")
    assert main(["decode", str(tmp_path / "codes.safetensors"), "--model", "seed.tiny"]) == 2
    assert "UnCLIPDecoder" in capsys.readouterr().err
