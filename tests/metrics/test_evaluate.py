from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vistok.data.shapes import CLASS_NAMES, sample_scene
from vistok.data.shapes.captions import scene_for
from vistok.errors import InvalidInputError
from vistok.metrics import ShapesFeatures, evaluate_generator, evaluate_tokenizer
from vistok.metrics.evaluate import held_out_images, sample_images, sampler_settings
from vistok.tokenizers import VQModel


class Lossless:
    """A tokenizer that loses nothing: its tokens carry the pixels."""

    device = torch.device("cpu")

    def encode(self, images: Tensor) -> Any:
        tokens = SimpleNamespace(ids=None, num_tokens=64, pixels=images)
        tokens.to = lambda device: tokens
        return tokens

    def decode(self, tokens: Any) -> Tensor:
        return tokens.pixels


class Renderer:
    """A generation pipeline that draws exactly what it is asked for; every `slip`-th picture shows another class."""

    def __init__(self, text: bool, slip: int = 0) -> None:
        self.generator = SimpleNamespace(
            config=SimpleNamespace(num_classes=None if text else 64, caption_dim=8 if text else None)
        )
        self.tokenizer = Lossless()
        self.config = {"sampling": {"guidance_scale": 3.0}}
        self.slip = slip
        self.calls: list[dict[str, Any]] = []
        self.drawn = 0

    def set_progress_bar_config(self, **settings: Any) -> None:
        self._progress_bar_config = settings

    def __call__(self, prompt: Any = None, class_labels: Any = None, **settings: Any) -> Any:
        self.calls.append(settings)
        scenes = []
        for number, draws in enumerate(settings["generator"]):
            seed = draws.initial_seed()
            self.drawn += 1
            if prompt is not None:
                scenes.append(scene_for(prompt[number], seed))
                continue
            label = class_labels[number]
            if self.slip and self.drawn % self.slip == 0:
                label = (label + 1) % 64
            colour, shape = CLASS_NAMES[label].split()
            scenes.append(sample_scene(seed, 0, 1, colour=colour, shape=shape))
        return SimpleNamespace(images=(held_out_images(scenes, 64) + 1) / 2)


def test_a_perfect_class_generator_is_perfect_and_near_other_real_scenes() -> None:
    pipeline = Renderer(text=False)
    report = evaluate_generator(pipeline, num_samples=24, batch_size=10, extractor=ShapesFeatures.tiny())
    assert report["class"]["class"]["correct"] == 24
    assert report["class"]["class"]["low"] == pytest.approx(0.862, abs=1e-3)
    assert report["class"]["fid"]["value"] < 3 * report["class"]["fid_of_real_scenes"]["value"]
    assert report["class"]["fid_of_the_tokenizer"]["value"] == pytest.approx(
        report["class"]["fid_of_real_scenes"]["value"], rel=1e-3, abs=1e-4
    )
    assert "guidance scale 3.0" in report["class"]["fid"]["sampler"]
    assert [call["guidance_scale"] for call in pipeline.calls] == [3.0] * 3
    json.dumps(report, allow_nan=False)


def test_slips_are_counted() -> None:
    report = evaluate_generator(Renderer(text=False, slip=4), num_samples=16, extractor=None)
    assert report["class"]["class"]["correct"] == 12
    assert "fid" not in report["class"]


def test_a_perfect_text_generator_is_perfect() -> None:
    shown: dict[str, int] = {}
    progress: list[tuple[str, int, int]] = []
    report = evaluate_generator(
        Renderer(text=True),
        num_samples=8,
        extractor=None,
        on_images=lambda what, images: shown.update({what: shown.get(what, 0) + len(images)}),
        on_progress=lambda *state: progress.append(state),
    )
    assert report["one_object"]["caption"]["correct"] == 8
    assert report["two_objects"]["objects"]["correct"] == report["two_objects"]["relation"]["correct"] == 8
    assert report["one_object"]["relation"] == {"value": None, "low": 0.0, "high": 1.0, "correct": 0, "total": 0}
    assert shown == {"one object": 8, "two objects": 8}
    assert progress[-1] == ("reading two objects", 8, 8)
    json.dumps(report, allow_nan=False)


def test_pictures_do_not_depend_on_the_batch_size() -> None:
    labels = [3, 60, 17, 17]
    one = sample_images(Renderer(text=False), labels, seed=5, batch_size=1)
    all_at_once = sample_images(Renderer(text=False), labels, seed=5, batch_size=4)
    assert torch.equal(one, all_at_once)
    assert not torch.equal(all_at_once[2], all_at_once[3])
    assert not torch.equal(one, sample_images(Renderer(text=False), labels, seed=6, batch_size=4))


def test_asked_settings_come_before_the_checkpoints_own() -> None:
    settings = sampler_settings(Renderer(text=False), {"top_k": 5})
    assert settings == {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 5, "top_p": 1.0}


def test_a_generator_of_other_classes_is_refused() -> None:
    pipeline = Renderer(text=False)
    pipeline.generator.config.num_classes = 1000
    with pytest.raises(InvalidInputError, match="1000 classes"):
        evaluate_generator(pipeline, num_samples=2, extractor=None)
    with pytest.raises(InvalidInputError, match="at least 2"):
        evaluate_generator(Renderer(text=False), num_samples=1)


def test_a_tokenizer_gets_every_figure() -> None:
    torch.manual_seed(0)
    model = VQModel.tiny()
    shown: list[str] = []
    report = evaluate_tokenizer(
        model,
        num_images=6,
        batch_size=4,
        photographs=["rocket"],
        photograph_size=64,
        extractor=ShapesFeatures.tiny(),
        on_images=lambda what, images: shown.append(what),
    )
    assert report["codebook"]["size"] == model.codebook_size
    assert 0 < report["codebook"]["used"] <= min(model.codebook_size, 6 * report["tokens_per_image"])
    assert report["psnr"]["low"] <= report["psnr"]["value"] <= report["psnr"]["high"] < 30
    assert report["agreement"]["object"]["total"] >= 6
    assert report["fid"]["samples"] == report["fid"]["reference_samples"] == 6
    assert report["photographs"]["rocket"]["width"] == 64
    assert shown[-2:] == ["photograph rocket", "reconstruction rocket"]
    json.dumps(report, allow_nan=False)
