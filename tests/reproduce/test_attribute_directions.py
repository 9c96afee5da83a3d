"""The claim on attribute directions: in a world whose responses are known, and on a tiny random pipeline."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.controllers.conftest import make_sd
from vistok.controllers.attribute_directions import AttributeDelta, LearningSettings
from vistok.data.shapes import Phrase, Reading, Scene, image_to_tensor, parse_caption, read_scene, render, scene_for
from vistok.errors import InvalidInputError
from vistok.reproduce import CLAIMS, attribute_directions, drawing
from vistok.reproduce.attribute_directions import Arm, lab_prompts, run
from vistok.reproduce.report import Report

SAMPLING = {"num_inference_steps": 2, "guidance_scale": 2.0}


def with_object(scene: Scene, shape: str, **values: Any) -> Scene:
    """The scene with other values for the objects of a shape."""
    changed = tuple(replace(item, **values) if item.shape == shape else item for item in scene.objects)
    return replace(scene, objects=changed)


class World:
    """Stands in for `drawing.draw`: rendered scenes in which a delta of size 1 responds fully and others as they say.

    Args:
        spill: what part of its own change the subject passes on to the other object.
        broken: prompts (by their place among the candidates) that come out wrong.
    """

    def __init__(self, spill: float = 0.0, broken: Callable[[int], bool] = lambda place: False) -> None:
        self.spill, self.broken = spill, broken
        self.candidates: list[str] = []

    def __call__(
        self, pipe: Any, prompts: list[str], seeds: list[int], steer: Any = None, *, on_batch: Any = None, **_: Any
    ) -> Tensor:
        pictures = []
        for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            description = parse_caption(prompt)
            asked = [phrase.size for phrase in description.objects] + [phrase.shade for phrase in description.objects]
            plain = replace(
                description, objects=tuple(replace(phrase, size=None, shade=None) for phrase in description.objects)
            )
            if not any(asked) and steer is None and str(plain) not in self.candidates:
                self.candidates.append(str(plain))
            # Other words draw another scene of the same prompt.
            scene = scene_for(plain, seed=seed + (1 if any(asked) else 0))
            gains = dict.fromkeys((item.shape for item in scene.objects), 0.0)
            attribute = "size"
            if steer is not None:
                edit = steer(range(row, row + 1)).edits[0]
                vector = edit.delta.tokenwise["oai_clip_vit_l"]
                attribute = "size" if float(vector[1]) == 0 else "shade"
                gain = float(vector[0]) * edit.scales()[0]
                subject = edit.subject_of(prompt)
                gains = {shape: gain if shape == subject else self.spill * gain for shape in gains}
            for shape, gain in gains.items():
                scene = with_object(scene, shape, radius=0.17, tone=0.0)
                scene = with_object(scene, shape, **_moved(attribute, gain))
            for phrase in description.objects:
                if phrase.size or phrase.shade:
                    sign = 1.0 if phrase.size == "large" or phrase.shade == "dark" else -1.0
                    scene = with_object(scene, phrase.shape, **_moved("size" if phrase.size else "shade", sign))
            if self.broken(self.candidates.index(str(plain))):
                scene = replace(scene, objects=scene.objects[:1])
            pictures.append(image_to_tensor(render(scene, 64)))
        if on_batch is not None:
            on_batch(len(prompts))
        return torch.stack(pictures)


def _moved(attribute: str, gain: float) -> dict[str, float]:
    return {"radius": 0.165 * (1 + 0.15 * gain)} if attribute == "size" else {"tone": -0.7 * gain}


def marked(contrast: float, learned: float) -> Callable[..., Any]:
    """Stands in for the search for directions: vectors (gain, 0 for size or 1 for shade)."""

    def directions(*_: Any) -> dict[str, dict[str, AttributeDelta]]:
        return {
            attribute: {
                method: AttributeDelta({"oai_clip_vit_l": torch.tensor([gain, float(number)])})
                for method, gain in (("contrast", contrast), ("learned", learned))
            }
            for number, attribute in enumerate(("size", "shade"))
        }

    return directions


def measured(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    world: World,
    contrast: float = 1.0,
    learned: float = 1.0,
    count: int = 4,
) -> Any:
    monkeypatch.setattr(attribute_directions, "draw", world)
    monkeypatch.setattr(attribute_directions, "_directions", marked(contrast, learned))
    return run(folder, pipeline=object(), sampling=SAMPLING, num_prompts=count)


def verdicts(report: Any, words: str) -> list[str]:
    return [finding.verdict for finding in report.findings if words in finding.claim]


def test_a_world_that_responds_perfectly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(monkeypatch, tmp_path, World())
    assert report.complete
    assert verdicts(report, "follows the scale") == ["holds"] * 4
    assert verdicts(report, "no other object changes") == ["holds"] * 4
    # Another prompt draws another scene, so the other object moves; steering leaves it.
    assert verdicts(report, "leaves the rest of the picture") == ["holds"] * 2
    # Both methods are the same here.
    assert verdicts(report, "work better than") == ["cannot tell"] * 2
    size = report.figures["size"]["learned"]["response"]
    assert size["within"] == pytest.approx(1.0)
    assert size["subject"][0] == pytest.approx(64 * 0.165 * 0.85, abs=0.3)
    assert size["subject"][-1] == pytest.approx(64 * 0.165 * 1.15, abs=0.3)
    shade = report.figures["shade"]["contrast"]["response"]
    assert shade["subject"][0] == pytest.approx(-0.7, abs=0.05)
    assert report.figures["size"]["adjective"]["other_moved_pixels"]["value"] > 2
    assert report.figures["size"]["learned"]["other_moved_pixels"]["value"] < 0.5
    saved = json.loads((tmp_path / "attribute-directions.json").read_text())
    assert saved["complete"] is True
    assert len(saved["findings"]) == len(report.findings) == 12
    assert "CompVis" not in str(report)
    with Image.open(tmp_path / "attribute-directions.png") as picture:
        assert picture.size[0] > 800
        assert len(picture.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 20


def test_a_world_without_response_and_with_spill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(monkeypatch, tmp_path, World(spill=0.6), contrast=-1.0, learned=1.0)
    follows = [finding for finding in report.findings if "follows the scale" in finding.claim]
    assert [finding.verdict for finding in follows] == ["does not hold", "holds"] * 2
    assert "rho -1.000" in follows[0].measured
    assert verdicts(report, "no other object changes") == ["does not hold"] * 4
    assert verdicts(report, "work better than") == ["holds"] * 2
    assert report.figures["shade"]["learned"]["response"]["absolute_spill"] == pytest.approx(0.6, abs=0.05)


def test_only_prompts_that_show_both_objects_are_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    def screened(broken: Callable[[int], bool]) -> tuple[Any, Report]:
        monkeypatch.setattr(attribute_directions, "draw", World(broken=broken))
        report = Report("attribute-directions", "", "", settings={"model": "a world"})
        return attribute_directions._screen(None, 4, 0, SAMPLING, report, lambda *_: None), report

    sweep, report = screened(lambda place: place % 2 == 1)
    shown = report.figures["prompts_with_both_objects"]
    assert (shown["correct"], shown["total"]) == (25, 50)
    assert len(sweep.texts) == len(set(sweep.texts)) == 4
    for text, (subject, other), reading in zip(sweep.texts, sweep.pairs, sweep.readings, strict=True):
        assert {str(subject), str(other)} == {str(phrase) for phrase in parse_caption(text).objects}
        assert len(reading.objects) == 2
    few, report = screened(lambda place: place > 2)
    assert len(few.texts) == 3
    # Both places of the prompt are steered.
    assert [text.startswith(str(pair[0])) for text, pair in zip(few.texts, few.pairs)] == [True, False, True]
    assert any("only 3 of the 4 prompts" in note for note in report.notes)


def test_a_random_pipeline_gets_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The oracle finds nothing in noise, and takes its time for that.
    monkeypatch.setattr(attribute_directions, "read_scenes", lambda images: [Reading((), 0.0)] * len(images))
    stages: list[str] = []
    report = run(
        tmp_path,
        quick=True,
        pipeline=make_sd(),
        sampling=SAMPLING,
        num_prompts=1,
        scales=(-1, 0, 1),
        learning=LearningSettings(steps=1, micro_steps=1, scales=1, num_inference_steps=2, size=None),
        on_progress=lambda what, done, total: stages.append(what),
    )
    assert report.complete
    assert {finding.verdict for finding in report.findings} == {"cannot tell"}
    assert "quick run" in str(report)
    assert set(stages) == {
        "learning size",
        "learning shade",
        "prompts with both objects",
        *(f"{one}: {arm}" for one in ("size", "shade") for arm in ("contrast", "learned", "adjective")),
    }
    kept = AttributeDelta.load(tmp_path / "size-learned.safetensors")
    assert kept.norms() == pytest.approx(report.figures["directions"]["size"]["learned"], rel=1e-5)
    assert (tmp_path / "attribute-directions.png").stat().st_size > 1000


def test_pictures_of_a_seed_do_not_depend_on_their_batch() -> None:
    pipe = make_sd()
    texts, seeds = ["a circle and a star", "a star", "a zebra"], [4, 5, 4]
    done: list[int] = []
    one = drawing.draw(pipe, texts, seeds, sampling=SAMPLING, batch_size=2, on_batch=done.append)
    assert done == [2, 1]
    assert one.shape == (3, 3, 64, 64)
    assert one.abs().max() <= 1
    two = drawing.draw(pipe, texts[::-1], seeds[::-1], sampling=SAMPLING, batch_size=3)
    assert torch.allclose(one, two.flip(0), atol=1e-4)
    assert not torch.allclose(one[0], one[1], atol=1e-2)


def test_objects_are_found_by_shape_then_colour() -> None:
    reading = read_scene(render(scene_for("a red circle and a blue star", seed=0)))
    assert drawing.find_object(reading, Phrase("star", "green")).colour == "blue"  # type: ignore[union-attr]
    assert drawing.find_object(reading, Phrase("ring", "red")) is None
    twins = read_scene(render(scene_for("a red circle and a blue circle", seed=0)))
    assert drawing.find_object(twins, Phrase("circle", "red")).colour == "red"  # type: ignore[union-attr]
    assert drawing.find_object(twins, Phrase("circle", "blue")).colour == "blue"  # type: ignore[union-attr]


def test_pairs_of_objects_differ() -> None:
    pairs = drawing.two_objects(300, seed=3)
    assert len(set(pairs)) == 300
    assert all(one.shape != other.shape and one.colour != other.colour for one, other in pairs)
    assert drawing.two_objects(300, seed=3) == pairs
    assert drawing.two_objects(300, seed=4) != pairs
    with pytest.raises(InvalidInputError, match="3136 pairs"):
        drawing.two_objects(4000, seed=0)


def test_lab_prompts_are_captions() -> None:
    for attribute in ("size", "shade"):
        prompts = lab_prompts(attribute)
        for number in range(len(prompts)):
            item = prompts[number]
            target, positive, negative = (parse_caption(text) for text in (item.target, item.positive, item.negative))
            last = target.objects[-1]
            assert getattr(positive.objects[-1], attribute) != getattr(negative.objects[-1], attribute) is not None
            assert (
                replace(positive.objects[-1], **{attribute: None})
                == last
                == replace(negative.objects[-1], **{attribute: None})
            )


def test_means_and_arms() -> None:
    found = drawing.mean_interval([1.0, 3.0, math.nan])
    assert (found.value, found.count) == (2.0, 2)
    assert found.low == 1.0
    assert found.high == 3.0
    nothing = drawing.mean_interval([math.nan])
    assert nothing.to_dict() == {"value": None, "low": None, "high": None, "count": 0}
    arm = Arm((-1.0, 0.0, 1.0), subject=[[1.0, math.nan], [2.0, 2.0], [3.0, math.nan]], other=[[1.0] * 2] * 3)
    assert arm.rhos()[0] == pytest.approx(1.0)
    assert math.isnan(arm.rhos()[1])


@pytest.mark.parametrize("scales", [(-1.0, 1.0), (0.0, 1.0), (0.0,)])
def test_scales_need_both_sides(scales: tuple[float, ...], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="both sides"):
        run(tmp_path, pipeline=object(), sampling={}, scales=scales)


def test_the_claims_are_listed() -> None:
    for name in ("attribute-directions", "leakage"):
        assert CLAIMS[name].models == ("t2i-shapes",)
        assert "arXiv" in CLAIMS[name].paper
