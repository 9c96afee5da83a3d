"""Spatial accuracy, attribute response and leakage rate on detections whose scores are known."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from vistok import metrics
from vistok.data.shapes import render, scene_for
from vistok.errors import InvalidInputError
from vistok.metrics.spatial import (
    Detection,
    SpatialPrompt,
    ZeroShotDetector,
    attribute_response,
    compbench_spatial,
    geneval_position,
    holds,
    leakage_rate,
    oracle_detector,
    visor,
)

DOG, CAT = Detection("dog", (0, 0, 10, 10), 0.8), Detection("cat", (30, 0, 40, 10), 0.6)
PROMPT = SpatialPrompt("dog", "left of", "cat")


def test_relations_of_boxes() -> None:
    assert holds(DOG, "left of", CAT)
    assert holds(CAT, "right of", DOG)
    assert not holds(DOG, "right of", CAT)
    assert not holds(DOG, "above", CAT)  # equal heights
    assert not holds(DOG, "left of", CAT, margin=2.0)
    assert PROMPT.text == "a dog to the left of a cat"
    with pytest.raises(InvalidInputError, match="unknown relation"):
        SpatialPrompt("dog", "near", "cat")


def test_visor_counts() -> None:
    wrong = [Detection("dog", (50, 0, 60, 10)), CAT]
    groups = [[[DOG, CAT], wrong, [DOG], []], [[DOG, CAT], [DOG, CAT], [DOG, CAT], wrong]]
    score = visor([PROMPT, PROMPT], groups)
    assert (score.object_accuracy.correct, score.object_accuracy.total) == (6, 8)
    assert (score.unconditional.correct, score.unconditional.total) == (4, 8)
    assert (score.conditional.correct, score.conditional.total) == (4, 6)
    assert [entry.value for entry in score.at_least] == [1.0, 0.5, 0.5, 0.0]
    assert score.to_dict()["VISOR_4"]["value"] == 0.0
    assert "VISOR_2" in str(score)
    assert visor([PROMPT], [[[DOG, CAT]]], threshold=0.7).object_accuracy.correct == 0
    with pytest.raises(InvalidInputError, match="same number of pictures"):
        visor([PROMPT, PROMPT], [[[DOG]], [[DOG], [CAT]]])
    with pytest.raises(InvalidInputError, match="prompts"):
        visor([], [])


def test_compbench_score() -> None:
    assert compbench_spatial([PROMPT], [[DOG, CAT]]) == pytest.approx(0.25 * 1.4 + 0.5)
    assert compbench_spatial([SpatialPrompt("cat", "left of", "dog")], [[DOG, CAT]]) == pytest.approx(0.35)
    assert compbench_spatial([PROMPT], [[DOG]]) == pytest.approx(0.2)
    assert compbench_spatial([PROMPT], [[]]) == 0.0
    near = Detection("cat", (2, 0, 12, 10), 1.0)
    overlap = 80 / 120
    assert compbench_spatial([PROMPT], [[DOG, near]]) == pytest.approx(0.25 * 1.8 + 0.5 * 0.1 / overlap)


def test_geneval_position() -> None:
    assert geneval_position([PROMPT], [[DOG, CAT]]).correct == 1
    assert geneval_position([SpatialPrompt("dog", "above", "cat")], [[DOG, CAT]]).correct == 0
    diagonal = Detection("cat", (30, 30, 40, 40))
    for relation in ("left of", "above"):
        assert geneval_position([SpatialPrompt("dog", relation, "cat")], [[DOG, diagonal]]).correct == 1
    touching = Detection("cat", (1, 0, 11, 10))
    assert geneval_position([PROMPT], [[DOG, touching]]).correct == 0  # inside the margin
    assert geneval_position([PROMPT], [[DOG]]).total == 1


def test_attribute_response() -> None:
    curve = attribute_response([1, -1, 0], [[3.0, 3.2], [1.0, 1.1], [2.0, 2.1]], [[5.0], [4.8], [4.9]])
    assert curve.scales == (-1, 0, 1)
    assert curve.rising == 1.0
    assert curve.spearman > 0.95
    assert curve.spill == pytest.approx(0.2 / 2.05)
    falling = attribute_response([0, 1, 2], [[3.0], [2.0], [1.0]])
    assert falling.spearman == pytest.approx(-1.0)
    assert falling.rising == 0.0
    assert math.isnan(falling.spill)
    assert attribute_response([0, 1, 2], [[1.0, math.nan], [1.0], [1.0]]).spearman == 0.0
    assert attribute_response([0, 1], [[1.0, 5.0], [2.0, 5.0, 4.0]]).pictures == 5
    for scales, values in (([1], [[1.0]]), ([0, 0], [[1.0], [2.0]]), ([0, 1], [[1.0]]), ([0, 1], [[1.0], [math.nan]])):
        with pytest.raises(InvalidInputError):
            attribute_response(scales, values)


def test_a_perfect_response_of_unlike_pictures_is_one_within_them_only() -> None:
    scales = [-1.0, 0.0, 1.0]
    starts = [float(number) for number in range(20)]
    others = [[0.05 * scale * (-1) ** number for number in range(20)] for scale in scales]
    curve = attribute_response(scales, [[start + scale for start in starts] for scale in scales], others)
    assert curve.within == pytest.approx(1.0)
    assert curve.within_interval == pytest.approx((1.0, 1.0))
    assert curve.spearman < 0.5
    assert 0 < curve.spearman_interval[0] < curve.spearman_interval[1] < 0.5
    # Changes either way cancel in the mean, not in the mean of their sizes.
    assert curve.spill == pytest.approx(0.0, abs=1e-12)
    assert curve.absolute_spill == pytest.approx(0.05)
    assert curve.absolute_spill_interval == pytest.approx((0.05, 0.05))
    assert curve.spill_interval[1] > 0.01
    saved = attribute_response(scales, [[1.0], [1.0], [1.0]]).to_dict()
    assert saved["within"] == 0.0
    assert saved["spill"] is None
    assert json.loads(json.dumps(saved, allow_nan=False)) == saved
    # A picture whose subject was lost at one scale still counts at the others.
    lost = attribute_response(scales, [[1.0, math.nan], [2.0, 2.0], [3.0, 1.0]])
    assert lost.within == pytest.approx(1.0)
    assert lost.pictures == 5
    with pytest.raises(InvalidInputError, match="resample"):
        attribute_response([0, 1], [[1.0, 2.0], [2.0, 3.0]], resamples=0)


def test_leakage_rate() -> None:
    rate = leakage_rate([True, False, False, False])
    assert rate.value == 0.25
    assert rate.interval[0] < 0.25 < rate.interval[1]


def test_the_oracle_detects_what_was_drawn() -> None:
    scene = scene_for("a large red circle above a small blue star", seed=0)
    picture = Image.fromarray(render(scene, 64))
    names = ["red circle", "blue star", "circle", "star", "green square"]
    found = oracle_detector([picture], names)[0]
    assert {detection.name for detection in found} == set(names[:4])
    assert oracle_detector([picture], []) == [[]]
    assert visor([SpatialPrompt("red circle", "above", "blue star")], [[found]]).unconditional.correct == 1


def test_a_zero_shot_detector_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []

    def pipeline(task: str, **settings: object) -> object:
        asked.append({"task": task, **settings})

        def detect(picture: Image.Image, candidate_labels: list[str], threshold: float) -> list[dict]:
            asked.append({"labels": candidate_labels, "threshold": threshold})
            box = {"xmin": 1, "ymin": 2, "xmax": 11, "ymax": 22}
            return [{"label": candidate_labels[1], "box": box, "score": 0.75}]

        return detect

    monkeypatch.setattr("transformers.pipeline", pipeline)
    detector = ZeroShotDetector("some/model", threshold=0.2)
    found = detector([Image.new("RGB", (32, 32))] * 2, ["dog", "umbrella"])
    assert asked[0] == {"task": "zero-shot-object-detection", "model": "some/model", "device": "cpu"}
    assert asked[1] == {"labels": ["a photo of a dog", "a photo of an umbrella"], "threshold": 0.2}
    assert found == [[Detection("umbrella", (1.0, 2.0, 11.0, 22.0), 0.75)]] * 2
    assert found[0][0].centre == (6.0, 12.0)


def test_scores_of_text_to_image_are_exported() -> None:
    for name in (
        "AttributeResponse",
        "attribute_response",
        "leakage_rate",
        "visor",
        "compbench_spatial",
        "geneval_position",
    ):
        assert getattr(metrics, name) is not None
