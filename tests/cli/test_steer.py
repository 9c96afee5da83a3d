"""`vistok steer` on a tiny random Stable Diffusion pipeline that was saved to a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.controllers.conftest import make_flux, make_sd
from vistok import hub
from vistok.cli import main
from vistok.cli.steer import ATTRIBUTES, parse_attribute, parse_scales, with_scale
from vistok.controllers import AttributeDelta, AttributeDirections, AttributeEdit, ContrastivePrompts, PromptPair
from vistok.controllers.attribute_directions import contrast_delta
from vistok.errors import InvalidInputError
from vistok.nn.prompts import describe_pipeline

PROMPT = "a circle and a star"
Run = Callable[..., int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipeline")
    make_sd().save_pretrained(path)
    return str(path)


@pytest.fixture
def run(folder: str, tmp_path: Path) -> Run:
    def steer(*options: str, prompt: str = PROMPT) -> int:
        standard = ["--model", folder, "--num-inference-steps", "3", "-o", str(tmp_path / "strip.png")]
        return main(["steer", prompt, *standard, *options])

    return steer


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[int], str]:
    """The one line that a bad command ends in."""

    def message(code: int) -> str:
        captured = capsys.readouterr()
        assert code == 2
        assert captured.err.startswith("vistok: ")
        assert captured.err.count("\n") == 1
        assert not (tmp_path / "strip.png").exists()
        return captured.err

    return message


def cells(path: Path, count: int, size: int = 64) -> list[np.ndarray]:
    """The pictures of a strip without labels."""
    with Image.open(path) as strip:
        assert strip.size == (count * (size + 2) - 2, size)
        sheet = np.asarray(strip).astype(int)
    return [sheet[:, index * (size + 2) :][:, :size] for index in range(count)]


def test_the_strip_is_what_the_controller_draws(
    run: Run, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--subject", "circle", "--attribute", "small:large", "--scale", "-40:40:3", "--no-labels", "--json")
    assert run(*options, "--seed", "7", "--delay", "0.4") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["scales"] == [-40, 0, 40]
    assert report["attribute"] == {"less": "small", "more": "large"}
    assert report["size"] == [64, 64]
    assert report["mean_pixel_change"][1] == 0
    assert min(report["mean_pixel_change"][0], report["mean_pixel_change"][2]) > 0
    drawn = cells(tmp_path / "strip.png", 3)

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    text = describe_pipeline(pipe)
    assert list(report["subject_tokens"]) == ["oai_clip_vit_l"]
    pair = PromptPair("a circle", "a large circle", "a small circle")
    direction = contrast_delta(text, ContrastivePrompts([pair], "{,a photo of,a picture of}"))
    assert report["delta_norms"] == pytest.approx(direction.norms(), abs=1e-3)
    for scale, picture in zip((-40.0, 0.0, 40.0), drawn, strict=True):
        controller = AttributeDirections(AttributeEdit(direction, "circle", scale), delay=0.4)
        steered = controller.prompt_kwargs(pipe, PROMPT, num_inference_steps=3)
        generator = torch.Generator().manual_seed(7)
        expected = pipe(**steered, num_inference_steps=3, generator=generator).images[0]
        # Batched and single rows may differ in the last bit of a float.
        assert np.abs(np.asarray(expected).astype(int) - picture).max() <= 1
    plain = pipe(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(7)).images[0]
    assert np.abs(np.asarray(plain).astype(int) - drawn[1]).max() <= 1


def test_a_saved_direction_draws_the_same_strip_in_any_batch_size(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "size.safetensors"
    shared = ("--subject", "circle", "--scale", "-30,0,20,30", "--no-labels")
    assert run(*shared, "--attribute", "size", "--save-delta", str(file)) == 0
    first = cells(tmp_path / "strip.png", 4)
    assert run(*shared, "--delta", str(file), "--batch-size", "1") == 0
    for one, two in zip(first, cells(tmp_path / "strip.png", 4), strict=True):
        assert np.abs(one - two).max() <= 1
    assert np.abs(first[0] - first[3]).max() > 1


def test_a_later_start_changes_less(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    changes = []
    for delay in ("0", "0.7"):
        options = ("--subject", "circle", "--attribute", "small:large", "--scale", "0,40", "--delay", delay, "--json")
        assert run(*options) == 0
        changes.append(json.loads(capsys.readouterr().out)["mean_pixel_change"][1])
    assert 0 < changes[1] < changes[0]


def test_labels_stand_below_the_pictures(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--subject", "star", "--attribute", "shade", "--scale", "-1:1:3") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path / 'strip.png'}: 3 pictures, star from light to dark at the scales -1, 0, +1")
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.width == 3 * 66 - 2
        assert strip.height > 64
        below = np.asarray(strip)[64:, :64]
    assert below.max() == 255
    assert below.min() < 100
    assert with_scale(Image.new("RGB", (64, 64)), 1.5).height == strip.height


def test_interrupted_strips_keep_what_is_finished(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = diffusers.StableDiffusionPipeline.__call__
    calls = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(kwargs["generator"]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    # The signature is read for the pipeline's own defaults.
    call.__wrapped__ = original  # type: ignore[attr-defined]
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", call)
    options = ("--subject", "circle", "--attribute", "small:large", "--scale", "-1:1:5", "--batch-size", "2")
    assert run(*options, "--no-labels", "--json") == 130
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scales"] == [-1, -0.5]
    assert json.loads(captured.out)["interrupted"] is True
    assert "2 of 5 pictures" in captured.err
    assert len(cells(tmp_path / "strip.png", 2)) == 2


def test_scales() -> None:
    assert parse_scales("-2:2:9") == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert parse_scales("2:-2:3") == [2, 0, -2]
    assert parse_scales("-0.7:0.7:7")[3] == 0.0
    assert parse_scales("-1, 0, 2.5") == [-1, 0, 2.5]
    assert parse_scales("1.5") == [1.5]
    for wrong in ("", "a", "1:2", "1:2:1", "1:2:3:4", "nan", "-inf:0:3", "1:2:2.5", "1:2:99999", "1,,2", "0:1:-3"):
        with pytest.raises(InvalidInputError, match="--scale"):
            parse_scales(wrong)


def test_attributes() -> None:
    assert parse_attribute("small:large") == ("small", "large")
    assert parse_attribute(" rather  small : very large") == ("rather small", "very large")
    assert all(parse_attribute(name) == pair for name, pair in ATTRIBUTES.items())
    for wrong in ("", "siez", ":large", "small:", "a:b:c", "large:large"):
        with pytest.raises(InvalidInputError, match="LESS:MORE"):
            parse_attribute(wrong)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--attribute", "size"], "--subject"),
        (["--subject", "circle"], "--attribute"),
        (["--subject", "circle", "--attribute", "size", "--delta", "d.pt"], "either"),
        (["--subject", "square", "--attribute", "size"], "its words are: a, circle, and, star"),
        (["--subject", "circle", "--attribute", "size", "--occurrence", "1"], "occurs 1 time"),
        (["--subject", "circle", "--attribute", "siez"], "LESS:MORE"),
        (["--subject", "circle", "--attribute", "size", "--scale", "-2:2"], "--scale"),
        (["--subject", "circle", "--attribute", "size", "--delay", "1"], "[0, 1)"),
        (["--subject", "circle", "--attribute", "size", "--delay", "0.9"], "none of the 3 steps"),
        (["--subject", "circle", "--delta", "absent.pt"], "absent.pt"),
        (["--subject", "circle", "--attribute", "size", "--save-delta", "d.bin"], ".safetensors"),
        (["--subject", "circle", "--attribute", "size", "-o", "strip.xyz"], "strip.xyz"),
        (["--subject", "circle", "--attribute", "size", "--model", "absent"], "Hub id"),
        (["--subject", "circle", "--attribute", "size", "--model", "."], "model_index.json"),
        (["--subject", "circle", "--attribute", "size", "--dtype", "int8"], "float32"),
        (["--subject", "circle", "--attribute", "size", "--device", "abacus"], "abacus"),
        (["--subject", "circle", "--attribute", "size", "--num-inference-steps", "5000"], "cannot draw this"),
        (["--subject", "circle", "--attribute", "size", "--guidance-scale", "nan"], "finite"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    options: list[str],
    said: str,
    run: Run,
    refused: Callable[[int], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(run(*options))


def test_the_lab_pipeline_is_the_default(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "assets" / "t2i-shapes")
    facts = {"system": "text-to-image", "sampling": {"guidance_scale": 2.5, "num_inference_steps": 2}}
    (tmp_path / "assets" / "t2i-shapes" / "vistok.json").write_text(json.dumps(facts))
    monkeypatch.setattr(hub, "ASSETS", tmp_path / "assets")
    arguments = ["steer", PROMPT, "--subject", "circle", "--attribute", "size", "--scale", "0,30", "--no-labels"]
    reports = []
    for index, options in enumerate(([], ["--num-inference-steps", "3", "--guidance-scale", "1.5"])):
        assert main([*arguments, *options, "-o", str(tmp_path / f"{index}.png"), "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    # Its checkpoint's own sampler settings, unless others are given.
    assert [report["model"] for report in reports] == ["t2i-shapes"] * 2
    assert [report["num_inference_steps"] for report in reports] == [2, 3]
    assert [report["guidance_scale"] for report in reports] == [2.5, 1.5]
    shared = ["--model", folder, "--num-inference-steps", "2", "--guidance-scale", "2.5"]
    assert main([*arguments, *shared, "-o", str(tmp_path / "2.png")]) == 0
    for one, two in zip(cells(tmp_path / "0.png", 2), cells(tmp_path / "2.png", 2), strict=True):
        assert np.abs(one - two).max() <= 1


def test_names_of_other_models_are_refused(
    refused: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = ["-o", str(tmp_path / "strip.png")]
    arguments = ["steer", PROMPT, "--subject", "circle", "--attribute", "size", *output]
    message = refused(main([*arguments, "--model", "nar-shapes"]))
    assert "NAR is none of the pipelines whose text states are known" in message
    assert "Stable Diffusion" in message
    monkeypatch.setattr(hub, "ASSETS", tmp_path)
    assert "there is no pipeline at 't2i-shapes'" in refused(main(arguments))


def test_a_pipeline_without_text_encoder_is_refused(tmp_path: Path, refused: Callable[[int], str]) -> None:
    pipe = make_sd()
    pipe.register_modules(text_encoder=None)
    pipe.save_pretrained(tmp_path / "mute")
    options = ["--subject", "circle", "--attribute", "size", "-o", str(tmp_path / "strip.png")]
    message = refused(main(["steer", PROMPT, "--model", str(tmp_path / "mute"), *options]))
    assert "cannot be loaded" in message
    assert "text_encoder" in message


def test_a_subject_beyond_the_encoder_is_refused(run: Run, refused: Callable[[int], str]) -> None:
    code = run("--subject", "zebra", "--attribute", "size", prompt="a dog " * 60 + "and a zebra")
    assert "truncated away" in refused(code)


def test_a_delta_of_another_encoder_is_refused(run: Run, refused: Callable[[int], str], tmp_path: Path) -> None:
    AttributeDelta.tiny({"t5_xxl": 80}).save(tmp_path / "other.pt")
    message = refused(run("--subject", "circle", "--delta", str(tmp_path / "other.pt")))
    assert "t5_xxl (80 wide)" in message
    assert "oai_clip_vit_l (32 wide)" in message


def test_a_broken_pipeline_is_refused(folder: str, refused: Callable[[int], str], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{")
    options = ["--subject", "circle", "--attribute", "size", "-o", str(tmp_path / "strip.png")]
    assert "cannot be loaded" in refused(main(["steer", PROMPT, "--model", str(tmp_path), *options]))


def test_nan_weights_draw_no_picture(tmp_path: Path, refused: Callable[[int], str]) -> None:
    pipe = make_sd()
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "broken")
    options = ["--subject", "circle", "--attribute", "size", "--scale", "0", "--num-inference-steps", "2"]
    code = main(["steer", PROMPT, "--model", str(tmp_path / "broken"), *options, "-o", str(tmp_path / "strip.png")])
    assert "NaN" in refused(code)


def test_flux(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = make_flux()
    pipe.vae.register_to_config(shift_factor=0.0)  # FLUX's decoder shifts its latents
    pipe.save_pretrained(tmp_path / "flux")
    arguments = ["steer", PROMPT, "--model", str(tmp_path / "flux"), "--subject", "circle", "--attribute", "size"]
    arguments += ["--scale", "-20,0", "--num-inference-steps", "2", "--height", "64", "--width", "64", "--json"]
    assert main([*arguments, "-o", str(tmp_path / "strip.png"), "--negative-prompt", "blurred"]) == 2
    assert "negative prompt" in capsys.readouterr().err
    assert main([*arguments, "-o", str(tmp_path / "strip.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["subject_tokens"]) == ["t5_xxl"]
    assert report["mean_pixel_change"][0] > 0
