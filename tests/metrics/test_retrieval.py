from __future__ import annotations

import pytest
import torch

from vistok.errors import InvalidInputError
from vistok.metrics.language import same_objects, write_captions
from vistok.metrics.retrieval import retrieval_accuracy


def test_pictures_and_captions_find_each_other() -> None:
    features = torch.eye(4)
    captions = ["a red circle", "a blue star", "a green ring", "a pink heart"]
    found = retrieval_accuracy(features, features, captions)
    assert found["image_to_text"].value == found["text_to_image"].value == 1.0
    turned = retrieval_accuracy(features, features.roll(1, 0), captions)
    assert turned["image_to_text"].correct == 0


def test_one_direction_may_fail_alone() -> None:
    images = torch.tensor([[1.0, 0.0], [0.9, 0.1]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = retrieval_accuracy(images, texts, ["a red circle", "a blue star"])
    assert found["image_to_text"].correct == 1
    assert found["text_to_image"].correct == 2


def test_the_same_words_are_as_right() -> None:
    images = torch.eye(3)
    texts = torch.eye(3)[[1, 0, 2]]
    assert retrieval_accuracy(images, texts, ["a red circle", "a red circle", "a star"])["image_to_text"].value == 1.0


@pytest.mark.parametrize(
    ("images", "texts", "captions"), [((2, 3), (3, 3), 2), ((2, 3), (2, 3), 1), ((0, 3), (0, 3), 0)]
)
def test_what_does_not_fit(images: tuple[int, int], texts: tuple[int, int], captions: int) -> None:
    with pytest.raises(InvalidInputError, match="as many pictures and texts as captions"):
        retrieval_accuracy(torch.zeros(images), torch.zeros(texts), ["a circle"] * captions)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("a red circle and a blue star", True),
        ("a large blue star to the left of a light red circle", True),
        ("a red circle", False),
        ("a red circle and a red star", False),
        ("a red circle and a blue star , and a blue star", False),
        ("circle a red", False),
        ("", False),
        ("a dog", False),
    ],
)
def test_objects_count_in_any_order_and_nothing_else(answer: str, right: bool) -> None:
    assert same_objects(answer, "a small red circle above a blue star") is right


def test_the_truth_must_be_a_caption() -> None:
    with pytest.raises(InvalidInputError, match="unknown word"):
        same_objects("a red circle", "a red dog")


def test_captions_are_written_in_batches() -> None:
    calls: list[int] = []

    class Language:
        def generate(self, prompts, **settings):
            assert settings["temperature"] == 0.0
            assert settings["allow_images"] is False
            calls.append(len(prompts))
            return [["a red", "circle"] for _ in prompts]

    assert write_captions(Language(), torch.zeros(5, 3, dtype=torch.int64), batch_size=2) == ["a red circle"] * 5
    assert calls == [2, 2, 1]
