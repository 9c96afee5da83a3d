"""Leakage fixes: what is replaced, what stays, in every pipeline; detection; DeLeaker; joint use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.controllers.conftest import draw, pipeline
from vistok.controllers.attribute_directions import AttributeDelta, AttributeDirections, AttributeEdit
from vistok.controllers.leakage import (
    DeLeaker,
    DeLeakerSettings,
    KeepOnly,
    LeakageFix,
    RedundancyClassifier,
    detect_leakage,
    kept_positions,
    merge_positions,
    noun_chunks,
    pad_states,
    patch_states,
    replace_item,
)
from vistok.controllers.leakage.deleaker import smoothed
from vistok.controllers.tenor import Tenor
from vistok.errors import CheckpointError, InvalidInputError
from vistok.nn.prompts import describe_pipeline, encode_prompts
from vistok.nn.spans import token_spans

PROMPT = "a standing zebra to the right of a bus station"
LENGTH = {"max_sequence_length": 40}


def embeds(controller: Any, pipe: Any, prompt: Any = PROMPT, **settings: Any) -> torch.Tensor:
    return controller.prompt_kwargs(pipe, prompt, **(LENGTH | settings))["prompt_embeds"]


def plain(pipe: Any, prompt: Any = PROMPT) -> torch.Tensor:
    return embeds(KeepOnly("full"), pipe, prompt)


def plainly_fixed(pipe: Any, item: str, drop: bool) -> torch.Tensor:
    """The definition, one encoder and one position at a time."""
    text = describe_pipeline(pipe, max_sequence_length=40)
    encoded, _ = encode_prompts(text, [PROMPT])
    states = {key: value.clone() for key, value in encoded.states.items()}
    for slot in text.encoders:
        if not slot.tokens:
            continue
        places = encoded.positions(slot.key, 0, item)
        with torch.no_grad():
            lone = slot.encode([item])[0][0]
        first = token_spans(item, slot.tokenizer).content[0]
        pads = pad_states(text, slot)[0][0]
        for index, place in enumerate(places):
            keep = not drop or index == len(places) - 1
            states[slot.key][0, place] = lone[first + index] if keep else pads[place]
    return text.assemble(states, encoded.pooled)[0]


@pytest.mark.parametrize("drop", [None, "redundant"])
def test_replacement_and_removal_follow_the_definition(pipe: Any, drop: str | None) -> None:
    fix = LeakageFix(["standing zebra"], drop=drop, representative="last")
    assert torch.allclose(embeds(fix, pipe), plainly_fixed(pipe, "standing zebra", drop is not None), atol=1e-5)


def test_only_the_item_changes_and_strength_is_continuous(pipe: Any) -> None:
    before = plain(pipe)
    half, whole = (embeds(LeakageFix(["zebra"], strength=value), pipe) for value in (0.5, 1.0))
    assert torch.allclose(embeds(LeakageFix(["zebra"], strength=0.0), pipe), before, atol=1e-5)
    assert torch.allclose(half - before, (whole - before) / 2, atol=1e-4)
    rows = torch.nonzero((whole - before).abs().amax(dim=(0, 2)) > 1e-5).flatten()
    assert 0 < len(rows) < before.shape[1] // 3


def test_a_batch_of_prompts_with_their_own_items(pipe: Any) -> None:
    prompts = [PROMPT, "a pool by a table"]
    mapped = LeakageFix({PROMPT: ["standing zebra"], prompts[1]: ["pool"]}, drop="redundant")
    shared = LeakageFix(["standing zebra", "pool"], drop="redundant")
    batch = embeds(mapped, pipe, prompts)
    assert torch.allclose(batch, embeds(shared, pipe, prompts), atol=1e-5)
    for row, (prompt, item) in enumerate(zip(prompts, ["standing zebra", "pool"], strict=True)):
        assert torch.allclose(batch[row], embeds(LeakageFix([item], drop="redundant"), pipe, prompt)[0], atol=1e-4)


def test_attached_leaves_no_trace_and_can_start_late(pipe: Any) -> None:
    before = draw(pipe, PROMPT)
    fix = LeakageFix(["standing zebra"], drop="redundant", start=0.4)
    with fix.attached(pipe):
        inside = draw(pipe, PROMPT)
    assert not torch.equal(inside, before)
    assert torch.equal(draw(pipe, **fix.prompt_kwargs(pipe, PROMPT, max_sequence_length=32)), inside)
    assert torch.equal(draw(pipe, PROMPT), before)


def test_all_controllers_together_in_a_defined_order(pipe: Any) -> None:
    text = describe_pipeline(pipe, max_sequence_length=40)
    delta = AttributeDelta.tiny({slot.key: slot.width for slot in text.encoders if slot.tokens})
    fix, steer = LeakageFix(["standing zebra"]), AttributeDirections(AttributeEdit(delta, "zebra", 2.0), delay=0)
    # The delta lands on the replaced states, whatever the order of naming.
    wanted = embeds(fix, pipe) + embeds(steer, pipe) - plain(pipe)
    assert torch.allclose(embeds(fix & steer, pipe), wanted, atol=1e-4)
    assert torch.equal(embeds(steer & fix, pipe), embeds(fix & steer, pipe))
    before, kind = draw(pipe, PROMPT), type(pipe)
    # Detached in another order than attached.
    first, second, third = steer.attach(pipe), fix.attach(pipe), Tenor().attach(pipe)
    inside = draw(pipe, PROMPT)
    first.remove()
    assert not torch.equal(draw(pipe, PROMPT), inside)
    third.remove()
    with steer.attached(pipe):
        assert torch.allclose(
            draw(pipe, PROMPT),
            draw(pipe, **(fix & steer).prompt_kwargs(pipe, PROMPT, max_sequence_length=32)),
            atol=1e-5,
        )
    second.remove()
    assert type(pipe) is kind
    assert torch.equal(draw(pipe, PROMPT), before)


def test_pooled_vectors_are_kept_or_replaced() -> None:
    pipe = pipeline("sdxl")
    kept = LeakageFix(["zebra"]).prompt_kwargs(pipe, PROMPT)["pooled_prompt_embeds"]
    padded = LeakageFix(["zebra"], pooled="pads").prompt_kwargs(pipe, PROMPT)["pooled_prompt_embeds"]
    text = describe_pipeline(pipe)
    assert torch.allclose(padded, pad_states(text, text.slot("openclip_g"))[1], atol=1e-5)  # type: ignore[arg-type]
    assert not torch.allclose(kept, padded, atol=1e-3)


def test_keeping_one_item_only() -> None:
    pipe = pipeline("flux")
    text = describe_pipeline(pipe, max_sequence_length=40)
    encoded, _ = encode_prompts(text, [PROMPT])
    places = encoded.positions("t5_xxl", 0, "bus station")
    pads = pad_states(text, text.slot("t5_xxl"))[0]
    result = embeds(KeepOnly(["bus station"]), pipe)
    assert torch.allclose(result, patch_states(encoded.states["t5_xxl"], pads, places), atol=1e-5)
    assert kept_positions("tokens", 3, 5) == [0, 1, 2]
    assert kept_positions("pads", 3, 5) == [3, 4]
    with pytest.raises(InvalidInputError, match="unknown selector"):
        kept_positions("words", 3, 5)


def test_states_maths() -> None:
    states, pads, lone = torch.randn(2, 5, 3), torch.randn(1, 5, 3), torch.randn(5, 3)
    patched = patch_states(states, pads, [1, 3])
    assert torch.equal(patched[:, [1, 3]], states[:, [1, 3]])
    assert torch.equal(patched[:, [0, 2, 4]], pads[:, [0, 2, 4]].expand(2, -1, -1))
    replaced = replace_item(states, lone, [2, 3], [0, 1])
    assert torch.equal(replaced[1, 2:4], lone[:2])
    merged = merge_positions(states, [(1, 2)])
    assert torch.allclose(merged[:, 1], states[:, 1:3].mean(dim=1))
    assert torch.equal(merged[:, 1], merged[:, 2])
    for call in (
        lambda: patch_states(states, pads, [5]),
        lambda: merge_positions(states, [(3, 9)]),
        lambda: replace_item(states, lone, [1], [0, 1]),
    ):
        with pytest.raises(InvalidInputError):
            call()


def test_noun_chunks() -> None:
    def chunks(prompt: str) -> list[str]:
        return [prompt[start:end] for start, end in noun_chunks(prompt)]

    assert chunks(PROMPT) == ["standing zebra", "bus station"]
    assert chunks("a photo of a large red circle above a star, and the moon") == [
        "large red circle",
        "star",
        "moon",
    ]
    assert chunks("a woman wearing a hat") == ["woman", "hat"]
    assert chunks("nothing here") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"items": ["cat"]}, "not in the prompt"),
        ({"items": ["standing zebra", "zebra"]}, "overlap"),
        ({"items": []}, "empty"),
        ({"items": "zebra"}, "is a list"),
        ({"items": ["zebra"], "drop": "all"}, "drop must be"),
        ({"items": ["zebra"], "replace": False}, "nothing to do"),
        ({"items": ["zebra"], "strength": 2.0}, "strength"),
        ({"items": ["zebra"], "pooled": "none"}, "pooled"),
        ({"items": ["zebra"], "encoders": ["openclip_g"]}, "no text encoder openclip_g"),
        ({"items": ["zebra"], "start": 0.8, "stop": 0.2}, "start <= stop"),
        ({"items": ["zebra"], "drop": "redundant", "representative": lambda states: [True]}, "flags for"),
    ],
)
def test_bad_input_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        LeakageFix(**settings).prompt_kwargs(pipeline("sd"), "a standing zebra")


def test_an_item_that_no_prompt_of_a_batch_has_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="cat"):
        LeakageFix(["zebra", "cat"]).prompt_kwargs(pipeline("sd"), [PROMPT, "a zebra"])


def test_redundancy_classifier(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[3.0, 0, 0, 0], [0, 3.0, 0, 0]])
    states = centres.repeat_interleave(20, dim=0) + 0.3 * torch.randn(40, 4, generator=generator)
    labels = torch.arange(40) >= 20
    classifier = RedundancyClassifier(states, labels)
    assert torch.equal(classifier.redundant(centres), torch.tensor([False, True]))
    assert classifier.representative(centres) == [True, False]
    assert classifier.precision(states, labels) == 1.0
    classifier.save(tmp_path / "knn.safetensors")
    assert torch.equal(RedundancyClassifier.load(tmp_path / "knn.safetensors").redundant(states), labels)
    with pytest.raises(InvalidInputError, match="neighbours"):
        RedundancyClassifier(states, labels, neighbours=0)
    torch.save({"states": states}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no redundancy classifier"):
        RedundancyClassifier.load(tmp_path / "other.pt")


def test_a_classifier_chooses_the_representative() -> None:
    pipe = pipeline("flux")
    first = LeakageFix(
        ["standing zebra"], drop="redundant", representative=lambda states: [index == 0 for index in range(len(states))]
    )
    assert torch.equal(
        embeds(first, pipe), embeds(LeakageFix(["standing zebra"], drop="redundant", representative="first"), pipe)
    )


def test_detection_ranks_items_and_checks_its_input() -> None:
    text = describe_pipeline(pipeline("sd"))
    found = detect_leakage(text, PROMPT)
    assert {entry.item for entry in found} == {"standing zebra", "bus station"}
    gaps = [entry.distance - entry.threshold for entry in found]
    assert gaps == sorted(gaps, reverse=True)
    # An item by itself is where it was: nothing moved.
    alone = detect_leakage(text, "zebra", ["zebra"])[0]
    assert alone.distance < 1e-6
    assert not alone.leaked
    assert not any(entry.leaked for entry in detect_leakage(text, PROMPT, margin=1e6))
    with pytest.raises(InvalidInputError, match="exactly one"):
        detect_leakage(text, PROMPT, contexts=["a photo"])


def eager(**settings: Any) -> DeLeakerSettings:
    defaults = {"aggregate_from": 0, "intervene_from": 0, "text_threshold": 0.0}
    return DeLeakerSettings(**(defaults | settings))


def test_deleaker_changes_flux_and_leaves_no_trace() -> None:
    pipe = pipeline("flux")
    prompt = "a cat and a zebra"
    before = draw(pipe, prompt)
    keep = DeLeaker(pipe, prompt, ["cat", "zebra"], eager(), max_sequence_length=32)
    processors = [block.attn.processor for block in pipe.transformer.transformer_blocks]
    with keep.attached(pipe):
        inside = draw(pipe, prompt)
        assert torch.equal(draw(pipe, prompt), inside)  # each call is a sampling of its own
    assert not torch.equal(inside, before)
    assert [block.attn.processor for block in pipe.transformer.transformer_blocks] == processors
    assert torch.equal(draw(pipe, prompt), before)
    idle = DeLeaker(pipe, prompt, ["cat", "zebra"], eager(intervene_from=10**6), max_sequence_length=32)
    with idle.attached(pipe):
        assert torch.allclose(draw(pipe, prompt), before, atol=1e-5)


def test_deleaker_refuses_bad_input() -> None:
    pipe = pipeline("flux")
    with pytest.raises(InvalidInputError, match="not in the prompt"):
        DeLeaker(pipe, "a cat", ["dog", "cat"])
    with pytest.raises(InvalidInputError, match="at least two"):
        DeLeaker(pipe, "a cat", ["cat"])
    with pytest.raises(InvalidInputError, match="outside"):
        DeLeaker(None, "", {"cat": (0, 2), "dog": (500, 600)})
    with pytest.raises(InvalidInputError, match="works on FLUX"):
        DeLeaker(None, "", {"cat": (0, 2), "dog": (3, 4)}).attach(pipeline("sd"))


def test_smoothing_removes_specks_and_fills_slits() -> None:
    grid = torch.zeros(1, 10, 10, dtype=torch.bool)
    grid[0, 3:9, :] = True
    grid[0, :, 5] = False
    grid[0, 0, 0] = True
    result = smoothed(grid.reshape(1, -1)).reshape(10, 10)
    assert bool(result[3:9].all())
    assert not bool(result[0, 0])
    assert torch.equal(smoothed(torch.ones(1, 7, dtype=torch.bool)), torch.ones(1, 7, dtype=torch.bool))
