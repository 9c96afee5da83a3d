"""Spatial accuracy, attribute response and leakage rate on detections whose scores are known."""

from __future__ import annotations

import math

import pytest
from PIL import Image

from vistok.data.shapes import render, scene_for
from vistok.errors import InvalidInputError
from vistok.metrics.spatial import (
    Detection,
    SpatialPrompt,
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
    for scales, values in (([1], [[1.0]]), ([0, 0], [[1.0], [2.0]]), ([0, 1], [[1.0]]), ([0, 1], [[1.0], [math.nan]])):
        with pytest.raises(InvalidInputError):
            attribute_response(scales, values)


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
