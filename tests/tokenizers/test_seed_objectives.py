"""SEED: captions in the first stage, features of pictures, codes and texts, revived codes, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.tokenizers.seed import SEED
from vistok.tokenizers.seed.objectives import REVIVAL_INTERVAL

WORDS = {
    "input_ids": torch.tensor([[1, 5, 6, 0], [1, 7, 0, 0], [1, 8, 9, 3], [1, 2, 4, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]),
}


def pictures(number: int) -> Tensor:
    return torch.rand(number, 3, 28, 28, generator=torch.Generator().manual_seed(5)) * 2 - 1


def model(**overrides: Any) -> SEED:
    torch.manual_seed(0)
    text = {"text_vocab_size": 12, "max_text_length": 6, "contrastive_size": 16, "dropout": 0.0}
    return SEED.tiny(**{**text, **overrides})


def test_the_caption_loss_stands_beside_the_contrastive_one() -> None:
    plain, told = model(head=None), model(head=None, caption_weight=0.5)
    batch = {"images": pictures(4), **WORDS}
    told.load_state_dict(plain.state_dict(), strict=False)
    alone, both = plain.training_loss(batch), told.training_loss(batch)
    torch.testing.assert_close(both["contrastive"], alone["loss"].detach())
    torch.testing.assert_close(both["loss"].detach(), both["contrastive"] + 0.5 * both["caption"])
    assert float(both["caption"]) == pytest.approx(math.log(12), abs=0.3)  # it knows nothing yet
    padding = {**batch, "input_ids": WORDS["input_ids"].masked_fill(WORDS["attention_mask"] == 0, 11)}
    torch.testing.assert_close(told.training_loss(padding)["loss"], both["loss"])


def test_captions_are_told_from_the_picture_and_the_words_before() -> None:
    told = model(head=None, caption_weight=1.0)
    batch = {"images": pictures(4), **WORDS}
    optimizer = torch.optim.AdamW(told.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        found = told.training_loss(batch)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
        losses.append(float(found["caption"]))
    assert losses[-1] < losses[0] - 0.3
    told.eval()
    caches: list[list[Any]] = [[], []]
    pixels = told.normalize(batch["images"])
    told.causal_embeddings(pixels, cache=caches[0])
    told.causal_embeddings(pixels.roll(1, 0) * 3, cache=caches[1])
    past = [[(key.expand(4, -1, -1, -1), value.expand(4, -1, -1, -1)) for key, value in cache] for cache in caches]
    ids = WORDS["input_ids"]
    with torch.no_grad():
        own, other = (told.qformer(text_ids=ids, past=one) for one in past)
        changed = told.qformer(text_ids=torch.cat([ids[:, :2], 1 + ids[:, 2:]], dim=1), past=past[0])
    assert float((own - other).abs().max()) > 1e-4
    torch.testing.assert_close(own[:, :2], changed[:, :2])
    assert float((own[:, 2:] - changed[:, 2:]).abs().max()) > 1e-3


@torch.no_grad()
def test_features_are_unit_vectors_and_the_teacher_is_one_of_them() -> None:
    seed = model().eval()
    images = pictures(3)
    ids = seed.encode(images).ids
    features = {
        "images": seed.image_features(images),
        "codes": seed.code_features(ids),
        "texts": seed.text_features(WORDS["input_ids"][:3], WORDS["attention_mask"][:3]),
    }
    for name, feature in features.items():
        assert feature.shape == (3, 16), name
        torch.testing.assert_close(feature.norm(dim=1), torch.ones(3))
    embeddings = seed.causal_embeddings(seed.normalize(images))
    teacher = seed.teacher_embeddings(embeddings)
    torch.testing.assert_close(teacher, features["images"] * 4.0)
    torch.testing.assert_close(
        features["images"], seed.contrastive_features(seed.normalize(images), WORDS["input_ids"][:3])[0][:, -1]
    )


@torch.no_grad()
def test_codes_are_found_like_what_they_rebuild() -> None:
    """With a codebook that holds the queries' own projections and a perfect rebuilding, both features agree."""
    seed = model().eval()
    images = pictures(2)
    embeddings = seed.causal_embeddings(seed.normalize(images))
    seed.rebuild = lambda states: embeddings * 7.0  # type: ignore[method-assign]
    ids = seed.encode(images).ids
    norm = math.sqrt(seed.config.hidden_size)
    assert float((embeddings.norm(dim=-1) - norm).abs().max()) < 0.01 * norm
    torch.testing.assert_close(seed.code_features(ids), seed.image_features(images), rtol=0.02, atol=0.02)


def test_stored_embeddings_stand_for_pictures() -> None:
    seed = model().train()
    images, embeds = pictures(4), torch.randn(4, 16)
    with torch.no_grad():
        stored = seed.causal_embeddings(seed.normalize(images))
    one = seed.training_loss({"images": images, "image_embeds": embeds})
    other = seed.training_loss({"causal_embeddings": stored, "image_embeds": embeds})
    torch.testing.assert_close(one["loss"], other["loss"])


def test_dead_codes_come_back_from_the_pictures() -> None:
    seed = model(revive_dead_codes=True).train()
    batch = {"causal_embeddings": torch.randn(8, 8, 24), "image_embeds": torch.randn(8, 16)}
    first = seed.training_loss(batch)
    assert float(first["usage"]) > 0.3  # at once: the codebook starts among the pictures
    assert seed.codes_seen is not None
    used = seed.codes_seen.clone()
    before = seed.codebook.detach().clone()
    for _ in range(REVIVAL_INTERVAL - 1):
        seed.training_loss(batch)
    assert torch.equal(seed.codebook, before)
    seed.training_loss(batch)
    assert torch.equal(seed.codebook[used], before[used])
    assert not torch.equal(seed.codebook[~used], before[~used])
    seed.eval()
    held = seed.codebook.detach().clone()
    for _ in range(REVIVAL_INTERVAL + 1):
        seed.training_loss(batch)
    assert torch.equal(seed.codebook, held)


def test_the_published_network_knows_none_of_this() -> None:
    names = set(SEED.tiny().state_dict())
    assert not {name for name in names if name.startswith(("codes_seen", "passes", "qformer.lm_"))}


def test_what_needs_a_part_that_is_not_there() -> None:
    plain = SEED.tiny()
    with pytest.raises(InvalidInputError, match="no text branch"):
        plain.text_features(WORDS["input_ids"])
    with pytest.raises(InvalidInputError, match="no text branch"):
        plain.code_features(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match="language head needs a text branch"):
        SEED.tiny(caption_weight=1.0)
    with pytest.raises(InvalidInputError, match="reconstruction=True"):
        model(reconstruction=False).code_features(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match=r"0\.\.63; got -1\.\.0"):
        model().code_features(torch.tensor([[0] * 7 + [-1]]))
    with pytest.raises(InvalidInputError, match="at most 6 tokens; got 7"):
        model().text_features(torch.ones(1, 7, dtype=torch.int64))


@pytest.mark.parametrize("size", [0, 8, 30])
def test_pictures_must_hold_a_patch(size: int) -> None:
    with pytest.raises(InvalidInputError, match="hold one patch"):
        SEED.tiny(image_size=size)


def test_tiny_and_narrow_pictures() -> None:
    seed = SEED.tiny()
    with pytest.raises(InvalidInputError, match=r"\[B, 3, 28, 28\]"):
        seed.encode(torch.zeros(1, 3, 7, 7))
    dot = Image.fromarray(np.full((1, 1, 3), 200, dtype=np.uint8))
    for mode in ("bilinear", "bicubic", "crop"):
        assert seed.preprocess(dot, mode=mode).shape == (1, 3, 28, 28)
    assert torch.equal(seed.preprocess(dot, 28), seed.preprocess(dot))
    with pytest.raises(InvalidInputError, match="28 pixels a side; got 64"):
        seed.preprocess(dot, 64)
    narrow = Image.new("RGB", (1, 500))
    assert seed.preprocess(narrow).shape == (1, 3, 28, 28)
    with pytest.raises(InvalidInputError, match="1x500 pixels is too narrow"):
        seed.preprocess(narrow, mode="crop")
