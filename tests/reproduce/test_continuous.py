"""`vistok reproduce xar` and `himar` on tiny random networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vistok.generators import MAR, XAR, GenerationPipeline, HiMAR
from vistok.metrics import ShapesFeatures
from vistok.metrics.accuracy import Accuracy
from vistok.reproduce import himar, variants, xar
from vistok.reproduce.report import Gap, share_gap
from vistok.tokenizers import KLModel

SIZE = {"num_samples": 10, "steps": 2, "repeats": 1, "image_size": 16, "width": 16}
SHAPE: dict[str, Any] = {"latent_channels": 4, "grid": (4, 4), "num_classes": 64}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("kl")
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    KLModel.tiny(**levels, block_out_channels=(8, 8, 8), norm_num_groups=4).save_pretrained(folder)
    return str(folder)


def small_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few scenes, few draws of a sampler."""
    plain = variants.Lab.__init__

    def few(self: variants.Lab, *given: Any, **named: Any) -> None:
        arguments = list(given)
        arguments[3] = 48
        plain(self, *arguments, **named)
        object.__setattr__(self, "batch_size", 4)

    monkeypatch.setattr(variants.Lab, "__init__", few)
    monkeypatch.setattr(variants, "FLOP_DRAWS", 1)
    monkeypatch.setitem(xar.SAMPLING, "num_inference_steps", 2)
    monkeypatch.setattr(xar, "DIT_STEPS", 3)
    for settings in himar.SAMPLING.values():
        for name in ("num_diffusion_steps", "num_dense_diffusion_steps"):
            if name in settings:
                monkeypatch.setitem(settings, name, 2)
    monkeypatch.setitem(himar.SAMPLING["mar"], "num_inference_steps", 4)


def test_xar_trains_every_entity_and_judges_them(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_lab(monkeypatch)
    model = XAR.tiny(**SHAPE)
    pipeline = GenerationPipeline(model, KLModel.from_pretrained(tokenizer), sampling={"num_inference_steps": 2})
    told: set[str] = set()
    report = xar.run(
        tmp_path,
        quick=True,
        pipeline=pipeline,
        tokenizer=tokenizer,
        extractor=ShapesFeatures.tiny(),
        on_progress=lambda what, done, total: told.add(what),
        **SIZE,
    )
    names = [variant.name for variant in xar.entity_variants(4, 4, 16)]
    assert report.complete
    assert len(report.findings) == len(names)  # one of time, one of each other variant
    assert all(report.figures[name]["class"]["total"] == 10 for name in names)
    assert all(len(report.figures[name]["fid_of_parts"]) == variants.PARTS for name in names)
    assert set(report.figures["time"]["milliseconds"]) == {"xAR", "DiT, 2 steps", "DiT, 3 steps"}
    assert {f"training {name}: {name.replace(' ', '-')}" for name in names} <= told
    assert "teacher forcing" in str(report)
    assert "quick run" in str(report)
    saved = json.loads((tmp_path / "xar.json").read_text())
    assert saved["complete"] is True
    with Image.open(tmp_path / "xar.png") as picture:
        assert picture.size[0] > 800


def test_variants_of_xar_differ_in_one_thing() -> None:
    first, *others = [variant.config for variant in xar.entity_variants(4, 4, 16)]
    for other in others:
        assert {key for key in {*first, *other} if first.get(key) != other.get(key)} <= {
            "entity",
            "entity_size",
            "context",
        }
    sizes = {
        sum(value.numel() for value in XAR(**{**dict(config), "entity": "cell", "entity_size": 2}).parameters())
        for config in (first, *others)
    }
    assert len(sizes) == 1


def test_equal_transformer_is_of_equal_size_and_draws_the_same_for_a_seed() -> None:
    model = XAR.tiny(grid=(4, 4), hidden_size=32, encoder_layers=4, decoder_layers=4)
    network = xar.equal_transformer(model)
    sizes = [sum(value.numel() for value in one.parameters()) for one in (model, network)]
    assert abs(sizes[0] - sizes[1]) < 0.2 * sizes[0]
    drawn = [xar.diffuse(network, torch.tensor([1, 2]), 2, 2.0, seed=5) for _ in range(2)]
    assert drawn[0].shape == (2, 4, 4, 4)
    assert torch.equal(*drawn)


def test_himar_gives_variants_equal_compute(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_lab(monkeypatch)
    decoder = KLModel.from_pretrained(tokenizer)
    fast = {"num_diffusion_steps": 2}
    pipelines = {
        "Hi-MAR": GenerationPipeline(
            HiMAR.tiny(**SHAPE),
            decoder,
            sampling={**fast, "num_dense_diffusion_steps": 2, "num_inference_steps": 2},
        ),
        "MAR": GenerationPipeline(MAR.tiny(**SHAPE), decoder, sampling={**fast, "num_inference_steps": 4}),
    }
    report = himar.run(
        tmp_path,
        quick=True,
        pipelines=pipelines,
        tokenizer=tokenizer,
        extractor=ShapesFeatures.tiny(),
        **{**SIZE, "steps": 4},
    )
    assert report.complete
    assert [finding.verdict in ("holds", "does not hold", "cannot tell") for finding in report.findings] == [True] * 5
    flops, steps = report.figures["training_flops_a_step"], report.settings["steps"]
    assert steps[himar.PLAIN] == 4
    for name, number in steps.items():
        assert number == max(1, round(4 * flops[himar.PLAIN] / flops[name]))
    assert flops[himar.TRANSFORMER] > flops[himar.PLAIN]
    assert (tmp_path / "himar.png").stat().st_size > 10_000


def test_an_interrupted_training_continues(tmp_path: Path, tokenizer: str) -> None:
    lab = variants.Lab(tokenizer, tmp_path, 3, 16, image_size=16, batch_size=4)
    variant = xar.entity_variants(4, 4, 16)[0]
    seen: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        if what.endswith(variant.name):
            seen.append(done)
            if done == 1 and len(seen) == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.train(variant, stop)
    whole = lab.train(variant, stop)
    again = lab.train(variant, stop)
    for one, other in zip(whole.parameters(), again.parameters()):
        assert torch.equal(one, other)
    assert seen.count(3) == 1  # a finished training is loaded


def test_gaps_of_shares_and_distances() -> None:
    gap = share_gap(Accuracy(90, 100), Accuracy(50, 100))
    assert gap.value == pytest.approx(0.4)
    assert 0.2 < gap.low < 0.4 < gap.high < 0.6
    assert gap.lower() is False
    images = torch.zeros(0, 3, 4, 4)
    low, high = (
        variants.Judged(images, {}, value, tuple(value + number for number in range(5)), 10) for value in (1.0, 3.0)
    )
    assert variants.distance_gap(low, high) == Gap(-2.0, -2.0, -2.0)
    assert variants.distance_gap(low, high).lower() is True
    unknown = variants.Judged(images, {}, 1.0, (), 1)
    assert variants.distance_gap(unknown, unknown).lower() is None
