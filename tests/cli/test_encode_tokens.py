"""`vistok encode --tokens`: the first ones of ordered tokens, and a strip of what they hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.cli import main
from vistok.cli.pictures import load_tokenizer
from vistok.tokens import VisualTokens

SIDE, GAP, MARGIN = 32, 2, 16  # pixels of flextok.tiny, between pictures, and of the titles
FEW = ["--num-inference-steps", "2"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return picture(tmp_path / "photo.png", 0, (37, 50))


def picture(path: Path, seed: int, size: tuple[int, int]) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def cells(path: Path, columns: int) -> np.ndarray:
    """The pictures of a strip, [rows, columns, H, W, 3]."""
    sheet = np.asarray(Image.open(path))[MARGIN:]
    step = SIDE + GAP
    rows = (sheet.shape[0] + GAP) // step
    assert sheet.shape == (rows * step - GAP, columns * step - GAP, 3)
    return np.stack(
        [
            np.stack([sheet[row * step : row * step + SIDE, at * step : at * step + SIDE] for at in range(columns)])
            for row in range(rows)
        ]
    )


def test_a_photo_of_any_size_gives_tokens_and_a_strip(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokens.safetensors"
    arguments = ["encode", str(photo), "--model", "flextok.tiny", "--tokens", "4,1,16", "-o", str(file), *FEW]
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["strip"] == str(tmp_path / "tokens.png")
    assert [one["tokens"] for one in facts["prefixes"]] == [1, 4, 16]
    assert [one["bits"] for one in facts["prefixes"]] == [11, 43, 171]  # log2(1600) a token, rounded up in all
    tokenizer = load_tokenizer("flextok.tiny")
    pixels = tokenizer.preprocess(photo)
    whole = tokenizer.encode(pixels)
    assert torch.equal(VisualTokens.load(file).ids, whole.ids)
    drawn = tokenizer.decode_prefixes(
        whole, [1, 4, 16], generator=torch.Generator().manual_seed(0), num_inference_steps=2
    )[0]
    expected = np.stack([np.asarray(one) for one in tokenizer.postprocess(torch.cat([pixels, drawn]))])
    found = cells(tmp_path / "tokens.png", 4)[0]
    assert np.array_equal(found[0], expected[0])
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert not np.array_equal(found[1], found[3])

    assert main(arguments) == 0
    assert "the original first" in capsys.readouterr().out
    assert np.array_equal(cells(tmp_path / "tokens.png", 4)[0], found)


def test_fewer_tokens_are_the_first_ones_and_a_picture_is_independent_of_the_others(
    photo: Path, tmp_path: Path
) -> None:
    other = picture(tmp_path / "other.png", 1, (80, 33))
    common = ["--model", "flextok.tiny", "--tokens", "2,5", *FEW]
    both, alone = tmp_path / "both.safetensors", tmp_path / "alone.safetensors"
    strip = tmp_path / "strips" / "both.jpg"
    assert main(["encode", str(photo), str(other), *common, "-o", str(both), "--strip", str(strip)]) == 0
    assert Image.open(strip).size == (3 * (SIDE + GAP) - GAP, MARGIN + 2 * (SIDE + GAP) - GAP)
    assert main(["encode", str(other), *common, "-o", str(alone), "--seed", "1"]) == 0
    held = VisualTokens.load(both)
    assert held.shape == (2, 5)
    assert torch.equal(held.ids[1:], VisualTokens.load(alone).ids)
    tokenizer = load_tokenizer("flextok.tiny")
    assert torch.equal(held.ids[:1], tokenizer.encode(tokenizer.preprocess(photo)).ids[:, :5])
    assert main(["encode", str(photo), str(other), *common, "-o", str(both)]) == 0
    rows = cells(both.with_suffix(".png"), 3).astype(int)
    assert np.abs(rows[1] - cells(alone.with_suffix(".png"), 3)[0]).max() <= 1


def test_lengths_choose_a_tokenizer_with_ordered_tokens(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(name: str) -> object:
        asked.append(name)
        return load_tokenizer({"flextok-shapes": "flextok.tiny", "vq-shapes": "vq.tiny"}[name])

    monkeypatch.setattr("vistok.cli.pictures.load_tokenizer", load)
    file = str(tmp_path / "tokens.safetensors")
    assert main(["encode", str(photo), "--tokens", "1", "-o", file, *FEW]) == 0
    assert VisualTokens.load(file).shape == (1, 1)
    assert main(["encode", str(photo), "-o", file]) == 0
    assert asked == ["flextok-shapes", "vq-shapes"]


def test_without_lengths_all_tokens_are_written_and_nothing_is_drawn(photo: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.safetensors"
    assert main(["encode", str(photo), "--model", "flextok.tiny", "-o", str(file)]) == 0
    assert VisualTokens.load(file).shape == (1, 16)
    assert not list(tmp_path.glob("tokens.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vq.tiny", "--tokens", "1,4"], "VQModel, whose tokens have no order"),
        (["--model", "flextok.tiny", "--tokens", "1,17"], "at most 16 tokens of a picture; got 17"),
        (["--model", "flextok.tiny", "--tokens", "0,4"], "each at least 1"),
        (["--model", "flextok.tiny", "--tokens", "1,-4"], "each at least 1"),
        (["--model", "flextok.tiny", "--tokens", "1,,4"], "such as 1,4,16,64"),
        (["--model", "flextok.tiny", "--tokens", "four"], "such as 1,4,16,64"),
        (["--model", "flextok.tiny", "--strip", "a.png"], "need --tokens"),
        (["--model", "flextok.tiny", "--tokens", "1", "--size", "64"], "position table"),
        (["--model", "flextok.tiny", "--tokens", "1", "--strip", "a.txt", *FEW], "suffix"),
        (["--model", "flextok.tiny", "--tokens", "1", "-o", "a.png"], "cannot both be written"),
        (["--model", "flextok-ar.tiny", "--tokens", "1"], "not a tokenizer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_lengths_are_answered_in_a_line_and_write_nothing(
    arguments: list[str],
    message: str,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["encode", str(photo), *arguments]) == 2
    answer = capsys.readouterr().err.splitlines()[-1]  # diffusers may warn about types before it
    assert answer.startswith("vistok: ")
    assert message in answer
    assert not list((tmp_path / "here").iterdir())


def test_reconstruct_names_the_command_for_ordered_tokens(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    assert main(["reconstruct", str(photo), "--model", "flextok.tiny", "-o", str(out)]) == 2
    assert "vistok encode --tokens" in capsys.readouterr().err
    assert not out.exists()


def test_the_help_says_what_happens_to_pictures_of_other_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for said in ("cut out their middle", "take the square they were trained for", "the output's name with .png"):
        assert said in words
