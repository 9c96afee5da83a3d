from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistok.data.shapes import CLASS_NAMES, sample_scene
from vistok.data.shapes.captions import parse_caption, scene_for
from vistok.errors import InvalidInputError
from vistok.metrics import Accuracy, caption_accuracy, class_accuracy, oracle_agreement, wilson_interval
from vistok.metrics.evaluate import class_requests, held_out_images, relation_captions, single_captions


def test_wilson_interval_has_the_textbook_values() -> None:
    # Newcombe (1998), table I: 81 of 263 and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(20, 20)[1] == 1.0


@given(st.integers(1, 5000), st.data())
def test_wilson_interval_holds_the_share_and_is_symmetric(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = wilson_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    mirrored = wilson_interval(total - correct, total)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


def test_accuracy_prints_share_interval_and_counts() -> None:
    assert str(Accuracy.of([True] * 972 + [False] * 28)) == "97.2 % [96.0, 98.1], 972/1000"
    assert Accuracy(1, 2).to_dict()["total"] == 2


def test_class_accuracy_counts_what_the_pictures_show() -> None:
    labels = class_requests(12)
    scenes = [
        sample_scene(0, number, 1, colour=CLASS_NAMES[label].split()[0], shape=CLASS_NAMES[label].split()[1])
        for number, label in enumerate(labels)
    ]
    images = held_out_images(scenes, 64)
    right = class_accuracy(images, labels)
    assert {name: share.value for name, share in right.items()} == dict.fromkeys(right, 1.0)
    wrong_colour = class_accuracy(images, [(label + 8) % 64 for label in labels])
    assert wrong_colour["class"].correct == 0
    assert wrong_colour["shape"].value == 1.0
    assert wrong_colour["colour"].correct == 0
    two = held_out_images([sample_scene(0, 0, 2, shape="circle", colour="red", size="large")], 64)
    assert class_accuracy(two, [0])["class"].correct == 0
    noise = class_accuracy(torch.zeros(1, 3, 64, 64), [0])
    assert noise["class"].correct == noise["one_object"].correct == 0


def test_caption_accuracy_checks_objects_and_relations() -> None:
    captions = relation_captions(6) + single_captions(4)
    images = held_out_images([scene_for(text, 1, number) for number, text in enumerate(captions)], 64)
    right = caption_accuracy(images, captions)
    assert right["caption"].correct == right["caption"].total == 10
    assert (right["relation"].correct, right["relation"].total) == (6, 6)
    swapped = caption_accuracy(images[:6], captions[1:6] + captions[:1])
    assert swapped["caption"].correct < 2


def test_requested_captions_name_every_colour_and_the_relation() -> None:
    for text in relation_captions(20):
        words = parse_caption(text)
        assert words.relation is not None
        assert len(words.objects) == 2
        assert all(phrase.colour is not None for phrase in words.objects)
    assert all(parse_caption(text).objects[0].colour is not None for text in single_captions(20))
    assert class_requests(130)[:65] == [*range(64), 0]


def test_oracle_agreement_pairs_objects_by_place() -> None:
    images = held_out_images([sample_scene(4, index, 2) for index in range(6)], 64)
    same = oracle_agreement(images, (images + 0.01).clamp(-1, 1))
    assert same["object"].value == same["scene"].value == 1.0
    assert same["object"].total == 12
    fewer = images.clone()
    fewer[0] = 0.3  # an empty picture
    lost = oracle_agreement(images, fewer)
    assert (lost["object"].correct, lost["object"].total, lost["scene"].correct) == (10, 12, 5)


def test_wrong_input_is_refused() -> None:
    images = torch.zeros(2, 3, 64, 64)
    with pytest.raises(InvalidInputError, match="one class for each"):
        class_accuracy(images, [1])
    with pytest.raises(InvalidInputError, match=r"0\.\.63"):
        class_accuracy(images, [1, 64])
    with pytest.raises(InvalidInputError, match="one caption for each"):
        caption_accuracy(images, [])
    with pytest.raises(InvalidInputError, match="0 <= correct"):
        wilson_interval(3, 2)
