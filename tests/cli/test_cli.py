"""The command line: what it writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.cli import main
from vistok.tokenizers.kl import KLModel
from vistok.tokenizers.vq import VQModel
from vistok.tokens import VisualTokens


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    torch.manual_seed(0)
    VQModel.tiny().save_pretrained(tmp_path / "vq")
    return str(tmp_path / "vq")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (37, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_help_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys\nfrom vistok.cli import main\nmain(['--help'])\n"
        "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split("LOADED")[1].split())
    assert not loaded & {"torch", "numpy", "diffusers", "transformers", "PIL"}
    for command in ("generate", "models", "encode", "decode", "reconstruct", "train", "evaluate", "reproduce", "env"):
        assert command in run.stdout


def test_python_dash_m_runs_the_same_command() -> None:
    run = subprocess.run([sys.executable, "-m", "vistok", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("vistok ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["generate"],
        ["generate", "a red circle", "--class", "3"],
        ["generate", "a red circle", "--num-images", "0"],
        ["generate", "a red circle", "--model", "nar-shpes"],
        ["models", "zzz*"],
        ["reconstruct", "absent.png"],
        ["decode", "absent.safetensors"],
        ["reproduce", "absent"],
        ["train", "absent.yaml"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vistok: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_encode_then_decode(tokenizer: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "tokens.safetensors", tmp_path / "back.png"
    assert main(["encode", str(photo), "--model", tokenizer, "--size", "32", "-o", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    tokens = VisualTokens.load(file)
    assert facts["grid"] == list(tokens.grid)
    assert facts["tokens_per_image"] == tokens.num_tokens
    assert main(["decode", str(file), "--model", tokenizer, "-o", str(picture)]) == 0
    assert Image.open(picture).size == (32, 32)


def test_pictures_of_several_sizes_need_a_size(
    tokenizer: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "other.png")
    file = str(tmp_path / "t.safetensors")
    assert main(["encode", str(photo), str(tmp_path / "other.png"), "--model", tokenizer, "-o", file]) == 2
    assert "--size" in capsys.readouterr().err


def test_reconstruct_keeps_any_size(
    tokenizer: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    assert main(["reconstruct", str(photo), "--model", tokenizer, "-o", str(out), "--json"]) == 0
    assert Image.open(out).size == (50, 37)
    assert json.loads(capsys.readouterr().out)["psnr"] > 0


def test_a_generator_is_no_tokenizer(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("encode", "reconstruct"):
        assert main([command, str(photo), "--model", "nar.tiny", "-o", str(tmp_path / "out.png")]) == 2
        assert "NAR, not a tokenizer" in capsys.readouterr().err


def test_pictures_need_an_image_suffix(
    tokenizer: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reconstruct", str(photo), "--model", tokenizer, "-o", str(tmp_path / "out.txt")]) == 2
    assert "suffix" in capsys.readouterr().err
    assert not (tmp_path / "out.txt").exists()


def test_data_preview_writes_the_scenes_of_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    assert main(["data", "preview", "-n", "4", "--seed", "3", "-o", str(first)]) == 0
    printed = capsys.readouterr().out
    assert main(["data", "preview", "-n", "4", "--seed", "3", "-o", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert printed.count("\n") == 5


def test_models_and_env_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "nar-*.imagenet256", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {entry["name"] for entry in entries} >= {"nar-b.imagenet256", "nar-xxl.imagenet256"}
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__.split("+")[0]


def test_ctrl_c_ends_in_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from vistok import hub

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "list_models", interrupted)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "vistok: interrupted\n"


def test_data_preview_and_decode_speak_json(
    tokenizer: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "preview", "-n", "3", "-o", str(tmp_path / "a.png"), "--json"]) == 0
    scenes = json.loads(capsys.readouterr().out)["scenes"]
    assert [scene["index"] for scene in scenes] == [0, 1, 2]
    assert all(scene["caption"] and scene["objects"][0]["shape"] for scene in scenes)
    file, picture = tmp_path / "tokens.safetensors", tmp_path / "back.png"
    assert main(["encode", str(photo), "--model", tokenizer, "--size", "32", "-o", str(file)]) == 0
    capsys.readouterr()
    assert main(["decode", str(file), "--model", tokenizer, "-o", str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": str(picture),
        "num_images": 1,
        "width": 32,
        "height": 32,
    }


def test_generate_draws_the_same_pictures_in_any_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole.png", tmp_path / "parts.png"
    asked = ["generate", "a red circle", "-n", "3", "--temperature", "1"]
    assert main([*asked, "-o", str(whole), "--steps-dir", str(tmp_path / "steps"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 3
    steps = sorted((tmp_path / "steps").iterdir())
    assert len(steps) == 15  # diagonals of 8x8 tokens
    assert np.array_equal(np.asarray(Image.open(steps[-1])), np.asarray(Image.open(whole)))
    assert main([*asked, "-o", str(parts), "--batch-size", "2"]) == 0
    difference = np.asarray(Image.open(whole)).astype(int) - np.asarray(Image.open(parts)).astype(int)
    assert abs(difference).max() <= 1


def test_generate_keeps_finished_pictures_on_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vistok.generators.pipeline import GenerationPipeline

    draw, calls = GenerationPipeline.__call__, []

    def interrupted(self: GenerationPipeline, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, *arguments, **options)

    monkeypatch.setattr(GenerationPipeline, "__call__", interrupted)
    out = tmp_path / "out.png"
    assert main(["generate", "a red circle", "-n", "4", "--batch-size", "1", "-o", str(out)]) == 130
    assert "1 of 4 pictures" in capsys.readouterr().err
    assert Image.open(out).size == (64, 64)


def test_generate_with_continuous_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pivots come first and are smaller: a film strip shows them as large as the picture."""
    out, film = tmp_path / "grid.png", tmp_path / "film.png"
    asked = ["generate", "--model", "himar.tiny", "--class", "3", "-n", "2", "--num-inference-steps", "2"]
    assert main([*asked, "-o", str(out), "--film", str(film), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 2
    assert sorted(Image.open(out).size) == [8, 18]
    pixels = np.asarray(Image.open(film))
    assert pixels.shape[:2] == (18, 6 * 10 - 2)  # a row a picture; one pivot a step, then the image in two
    assert (pixels[:8, :8] == 128).all(-1).sum() == 48  # three of four pivots are undecided after the first step


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--class", "red circle"], "no class names; give a number in 0..9"),
        (["red circle"], "no class names; give a number in 0..9"),
        (["--class", "12"], "classes are numbered 0..9"),
        (["--class", "3", "--temperature", "0.5"], "unknown sampling setting ['temperature'] of XAR; known: guidance"),
        (["--class", "3", "--height", "24"], "XAR has learned the positions of a 4x4 grid"),
    ],
)
def test_generate_says_what_a_model_lacks(
    asked: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", "xar.tiny", *asked, "-o", str(tmp_path / "grid.png")]) != 0
    message = " ".join(capsys.readouterr().err.split())
    assert words in message
    assert "Traceback" not in message
    assert not (tmp_path / "grid.png").exists()


def test_continuous_tokens_go_there_and_back(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    KLModel.tiny().save_pretrained(tmp_path / "kl")
    file, picture, model = str(tmp_path / "tokens.safetensors"), str(tmp_path / "back.png"), str(tmp_path / "kl")
    assert main(["encode", str(photo), "--model", model, "--size", "32", "-o", file]) == 0
    assert "1 x 256 tokens (16, 16), 4 numbers each" in " ".join(capsys.readouterr().out.split())
    assert VisualTokens.load(file).features.shape == (1, 256, 4)
    assert main(["decode", file, "--model", model, "-o", picture]) == 0
    assert Image.open(picture).size == (32, 32)
    capsys.readouterr()
    assert main(["reconstruct", str(photo), "--model", model, "-o", picture, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["tokens"], report["bits_per_pixel"]) == (19 * 25, None)
    assert main(["decode", file, "--model", "vq.tiny", "-o", picture]) == 2
    assert "continuous features" in capsys.readouterr().err
