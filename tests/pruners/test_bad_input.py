"""What pruners refuse, and what they bear: each case of bad input ends in words, and leaves the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pruners.models import build, greedy, prompt
from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.pruners import (
    DivPrune,
    FasterVLM,
    FastV,
    FoPru,
    Pruner,
    RandomPruner,
    Scorer,
    Selection,
    Stage,
    TopK,
    TransPrune,
    VFlowOpt,
    encode_pictures,
)
from vistok.pruners.vflowopt import Settings


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


class Norms(Scorer):
    def score(self, context: Any) -> list[Tensor]:
        return [context.features(span).norm(dim=-1) for span in context.spans]


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, logits_to_keep=1).logits


def hooks(model: Any) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def untouched(model: Any) -> bool:
    """Whether no pruner has left anything; the library itself keeps hooks from a model's first call on."""
    fresh = build("llava")
    logits(fresh, prompt(fresh, "llava"))
    return hooks(model) in (hooks(fresh), [(0, 0)] * len(hooks(fresh)))


@pytest.mark.parametrize("number", [17, -1])
def test_more_tokens_than_there_are_or_fewer_than_none(number: int) -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    for scope in ("per_image", "global"):
        pruner = Pruner([Stage("embeddings", TopK(lambda now, first: number, scope), Norms())])  # type: ignore[arg-type]
        with pytest.raises(InvalidInputError, match=f"keep {number} of 16 tokens"), pruner.attached(model):
            logits(model, inputs)
    with pytest.raises(InvalidInputError, match="a view has 16 tokens"), FasterVLM(tokens_per_view=17).attached(model):
        logits(model, inputs)
    assert untouched(model)


@pytest.mark.parametrize("chosen", [[3, 1], [2, 2], [0, 16], [-1, 3]])
def test_what_a_selector_returns_is_checked(chosen: list[int]) -> None:
    model = build("llava")

    def select(scores: list[Tensor], context: Any) -> list[Tensor]:
        return [torch.tensor(chosen) for _ in context.spans]

    with pytest.raises((InvalidOutputError, IndexError)), Pruner([Stage("embeddings", select)]).attached(model):
        logits(model, prompt(model, "llava"))
    assert untouched(model)


def test_keeping_no_visual_token_at_all_still_answers() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    pruner = TransPrune(accumulate=(1,), prune=(1, 2), ratios=(0.05, 0.05))  # int(16 * 0.05) is none
    with pruner.attached(model):
        result = greedy(model, inputs)
    assert torch.stack(result.logits).isfinite().all()
    assert [len(one) for one in pruner.last_report.kept()] == [0]
    assert pruner.last_report.visual_per_layer == [[16, 0, 0, 0]]


def test_image_tokens_split_over_turns_are_refused() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    plain = logits(model, inputs)
    places = (inputs["input_ids"][0] == 59).nonzero()[:, 0]
    cut = int(places[8])
    first = {"input_ids": inputs["input_ids"][:, :cut], "pixel_values": inputs["pixel_values"]}
    for pruner in (FoPru(0.5), FastV(0.5, layer=2)):
        with pruner.attached(model):
            with pytest.raises(ValueError, match=r"(?i)image (features|tokens)"):
                model(**first)
            whole = logits(model, inputs)  # the failed call leaves nothing behind
        with pruner.attached(model):
            assert torch.equal(logits(model, inputs), whole)
    assert torch.equal(logits(model, inputs), plain)
    assert untouched(model)


def test_layers_past_the_depth_are_named() -> None:
    model = build("llava")
    with pytest.raises(InvalidInputError, match=r"has layers 0\.\.3"):
        FastV(layer=4).attach(model)
    with pytest.raises(InvalidInputError, match=r"the vision tower has layers 0\.\.2, got 3"):
        FoPru(layer=3).attach(model)
    with pytest.raises(InvalidInputError, match=r"the vision tower has layers 0\.\.2, got -4"):
        VFlowOpt(Settings((0.5, 0.8), 1.0, 3.0), layers=(2,), tower_layer=-4).attach(model)
    with pytest.raises(InvalidInputError, match=r"layers 0\.\.3"):
        VFlowOpt(Settings((0.5, 0.8), 1.0, 3.0), layers=(9,)).attach(model)
    assert untouched(model)


def test_tensor_parallel_models_and_models_on_several_devices_are_refused() -> None:
    model = build("llava")
    model._tp_size = 2
    with pytest.raises(InvalidInputError, match="tensor-parallel"):
        FoPru().attach(model)
    model._tp_size = None
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1, "lm_head": "cpu"}
    with pytest.raises(InvalidInputError, match=r"several devices \(0, 1\).*load it on one"):
        FoPru().attach(model)
    assert untouched(model)


def test_models_with_parts_on_disk_are_pruned_as_if_they_were_in_memory(tmp_path: Path) -> None:
    from accelerate import disk_offload

    pruner = FoPru(0.6) + TransPrune(accumulate=(1, 2), prune=(2,), ratios=(0.5,))
    model = build("llava")
    inputs = prompt(model, "llava")
    with pruner.attached(model):
        expected = torch.stack(greedy(model, inputs).logits)
    offloaded = build("llava")
    disk_offload(offloaded, str(tmp_path), execution_device=torch.device("cpu"))
    assert next(offloaded.model.language_model.layers[0].mlp.parameters()).is_meta
    with pruner.attached(offloaded):
        found = torch.stack(greedy(offloaded, inputs).logits)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["static", "static-by-hand"])
def test_static_caches_are_refused(name: str) -> None:
    from transformers import StaticCache

    model = build("llava")
    inputs = prompt(model, "llava")

    def run() -> None:
        if name == "static":
            greedy(model, inputs, cache_implementation="static")
        else:
            model(**inputs, past_key_values=StaticCache(config=model.config.get_text_config(), max_cache_len=64))

    with pytest.raises(InvalidInputError, match="default dynamic cache"), FastV(layer=2).attached(model):
        run()
    assert untouched(model)


def test_two_pruners_at_one_place_and_attaching_twice() -> None:
    model = build("llava")
    with pytest.raises(InvalidInputError, match="two stages act at the place 'tower'"):
        FoPru() + FasterVLM()
    with pytest.raises(InvalidInputError, match="two stages act at the place 'embeddings'"):
        DivPrune() + RandomPruner()
    with pytest.raises(InvalidInputError, match="two stages act at the decoder layer 2"):
        FastV(layer=2) + RandomPruner(layer=2)
    pruner = FoPru()
    handle = pruner.attach(model)
    with pytest.raises(InvalidInputError, match="attached to this"):
        pruner.attach(model)
    with pytest.raises(InvalidInputError, match="prunes this model already"):
        FastV().attach(model)
    handle.remove()
    handle.remove()  # a second time does nothing
    with FastV(layer=2).attached(model):
        pass
    assert untouched(model)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_pictures_are_encoded_once_for_all_pruners(family: str) -> None:
    model = build(family)
    inputs = prompt(model, family)
    encoded = encode_pictures(model, inputs)
    assert "pixel_values" not in encoded
    pruners = [
        FoPru(0.4),
        DivPrune(0.4),
        VFlowOpt(Settings((0.5, 0.8, 0.6), 1.0, 3.0), layers=(2, 3)),
        FoPru(0.5) + FastV(0.5, layer=2),
    ]
    if family != "qwen2_5_vl":
        pruners.append(FasterVLM(0.4))
    expected = []
    for pruner in pruners:
        with pruner.attached(model):
            expected.append(torch.stack(greedy(model, inputs).logits))
    calls: list[int] = []
    tower = model.model.visual if family == "qwen2_5_vl" else model.model.vision_tower
    counting = tower.register_forward_hook(lambda *_: calls.append(1))
    for pruner, one in zip(pruners, expected):
        with pruner.attached(model):
            assert torch.equal(torch.stack(greedy(model, encoded).logits), one), type(pruner).__name__
    counting.remove()
    assert not calls, "the tower ran again"
    with pytest.raises(InvalidInputError, match="no pictures among the inputs"):
        encode_pictures(model, {"input_ids": inputs["input_ids"]})


def test_visionzip_reads_encoded_pictures_too() -> None:
    from vistok.pruners import VisionZip

    model = build("llava")
    inputs = prompt(model, "llava")
    with VisionZip(4, 2).attached(model):
        expected = logits(model, inputs)
        assert torch.equal(logits(model, encode_pictures(model, inputs)), expected)


def test_replaced_features_go_where_their_tokens_go() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")

    def select(scores: list[Tensor], context: Any) -> list[Tensor]:
        return [torch.arange(len(span)) for span in context.spans]

    def merge(kept: list[Tensor], scores: list[Tensor], context: Any) -> list[Selection]:
        return [Selection(one, context.features(span)) for one, span in zip(kept, context.spans)]

    same = logits(model, inputs)
    with Pruner([Stage("embeddings", select, merger=merge)]).attached(model):
        assert torch.equal(logits(model, inputs), same), "features put back where they stood change nothing"
