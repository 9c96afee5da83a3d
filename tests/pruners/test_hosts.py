"""Every model family: generate() in all its modes on pruned prompts, and no trace afterwards."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pruners.models import FAMILIES, IMAGE, build, greedy, left_padded, prompt
from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.pruners import (
    DivPrune,
    FasterVLM,
    FastV,
    FoPru,
    Host,
    Pruner,
    PyramidDrop,
    RandomPruner,
    Scorer,
    Settings,
    SparseVLM,
    Stage,
    TopK,
    TransPrune,
    UniformPooling,
    VFlowOpt,
    VisionZip,
    find_host,
)

METHODS = {
    "fopru": lambda: FoPru(0.4),
    "fopru-row": lambda: FoPru(0.5, "row"),
    "fastervlm": lambda: FasterVLM(0.4),
    "divprune": lambda: DivPrune(0.4),
    "random": lambda: RandomPruner(0.4),
    "random-inside": lambda: RandomPruner(0.4, layer=2),
    "fastv": lambda: FastV(0.4, layer=2),
    "pyramiddrop": lambda: PyramidDrop((2, 3), (0.5, 0.25)),
    "transprune": lambda: TransPrune(accumulate=(1, 2, 3), prune=(2, 3), ratios=(0.6, 0.3)),
    "sparsevlm": lambda: SparseVLM(counts=(8, 5), layers=(1, 2)),
    "vflowopt": lambda: VFlowOpt(Settings((0.5, 0.8, 0.6), 1.0, 3.0), layers=(2, 3)),
    "visionzip": lambda: VisionZip(4, 2),
    "pooling": lambda: UniformPooling(2),
    "stacked": lambda: FoPru(0.6) + TransPrune(accumulate=(1, 2), prune=(2,), ratios=(0.5,)),
}
# What a longer prompt does not change: the selection depends on the image alone.
IMAGE_ONLY = (
    "fopru",
    "fopru-row",
    "fastervlm",
    "divprune",
    "random",
    "random-inside",
    "vflowopt",
    "visionzip",
    "pooling",
)


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


def steps(result: Any) -> Tensor:
    return torch.stack(result.logits, dim=1)


def close(one: Tensor, two: Tensor) -> bool:
    return bool(torch.allclose(one, two, rtol=1e-4, atol=5e-6))


# Every method on one family of each kind (one view, tiles with newlines, merged patches on three rotary axes); on the
# others one method of each place.
COMBINATIONS = [(family, method) for family in ("llava", "llava_next", "qwen3_vl") for method in METHODS]
COMBINATIONS += [
    (family, method)
    for family in ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl", "smolvlm")
    for method in ("vflowopt", "visionzip", "sparsevlm", "pooling")
]


@pytest.mark.parametrize(("family", "method"), COMBINATIONS)
def test_tokens_cache_and_report_agree_and_detaching_leaves_no_trace(family: str, method: str) -> None:
    model, pruner = build(family), METHODS[method]()
    inputs = prompt(model, family)
    before = steps(greedy(model, inputs))
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    names = sorted(vars(model.model))
    with pruner.attached(model):
        result = greedy(model, inputs, steps=3)
    assert torch.equal(before, steps(greedy(model, inputs)))
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    assert names == sorted(vars(model.model))
    report = pruner.last_report
    assert not close(steps(result)[:, :3], before[:, :3]), "pruning changed nothing"
    lengths = torch.tensor([layer.get_seq_length() for layer in result.cache.layers]) - 2
    assert lengths.tolist() == report.tokens_per_layer[0]
    kept = [layer.keys[:, :, :length] for layer, length in zip(result.cache.layers, lengths)]
    assert report.kv_bytes == sum(2 * one.numel() * one.element_size() for one in kept) < report.unpruned_kv_bytes
    assert report.flops < report.unpruned_flops
    assert 0 < report.average_kept < 1
    for stage in report.stages:
        for visual in stage.visuals:
            assert 0 < len(visual.kept) <= visual.tokens
            assert set(visual.kept.tolist()) <= set(range(visual.tokens))
    assert "kept over depth" in str(report)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["stacked", "vflowopt"])
def test_batches_beams_and_assisted_decoding_equal_single_greedy_runs(family: str, method: str) -> None:
    model, pruner = build(family), METHODS[method]()
    first = prompt(model, family, 1, question=5)
    second = prompt(model, family, 2, question=9, size=(50, 24))
    with pruner.attached(model):
        alone = [greedy(model, sample) for sample in (first, second)]
        together = steps(greedy(model, left_padded([first, second])))
        for row, single in zip(together, alone):
            assert close(row, steps(single)[0])
        beams = greedy(model, left_padded([first, second]), num_beams=3).sequences
        assert torch.equal(beams[0, -4:], greedy(model, first, num_beams=3).sequences[0, -4:])
        assisted = greedy(model, first, prompt_lookup_num_tokens=3)
        assert torch.equal(assisted.sequences, alone[0].sequences)
        torch.manual_seed(0)
        sampled = greedy(model, first, do_sample=True, num_return_sequences=2).sequences
        torch.manual_seed(0)
        assert torch.equal(sampled, greedy(model, first, do_sample=True, num_return_sequences=2).sequences)
        model.set_attn_implementation("eager")
        assert close(steps(greedy(model, left_padded([first, second]))), together)


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
@pytest.mark.parametrize("method", IMAGE_ONLY)
def test_decoding_with_the_cache_equals_decoding_without(family: str, method: str) -> None:
    model, pruner = build(family), METHODS[method]()
    inputs = prompt(model, family)
    with pruner.attached(model):
        result = greedy(model, inputs)
        longer = {**inputs, "input_ids": result.sequences, "attention_mask": torch.ones_like(result.sequences)}
        if "mm_token_type_ids" in inputs:
            longer["mm_token_type_ids"] = (result.sequences == IMAGE).int()
        logits = model(**longer, use_cache=False).logits[:, -5:-1]
    assert close(logits, steps(result))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm"])
@pytest.mark.parametrize("method", ["stacked", "fastv"])
def test_a_second_turn_goes_on_from_the_pruned_cache(family: str, method: str) -> None:
    model, pruner = build(family), METHODS[method]()
    inputs = prompt(model, family)
    with pruner.attached(model):
        first = greedy(model, inputs)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9, 10]])], dim=1)
        extra = {"mm_token_type_ids": torch.zeros_like(ids)} if family.startswith("qwen") else {}
        copied = copy.deepcopy(first.cache)  # as a prefix cache would
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}
        turn = greedy(model, again, cache=copied)
        for place in range(first.sequences.shape[1] - 1, ids.shape[1]):  # the same tokens one by one
            positions = torch.tensor([[place]])
            if extra:
                positions = positions[None].expand(3, -1, -1) + model.model.rope_deltas
            last = model(
                input_ids=ids[:, place : place + 1],
                cache=first.cache,
                position_ids=positions,
                attention_mask=torch.ones(1, place + 1, dtype=torch.long),
            )
    assert close(last.logits[:, -1], turn.logits[0])
    assert pruner.last_report.unpruned == [inputs["input_ids"].shape[1]], "the second turn pruned again"


class Norms(Scorer):
    """A scorer that any place can use."""

    def score(self, context: Any) -> list[Tensor]:
        return [context.features(span).norm(dim=-1) for span in context.spans]


@pytest.mark.parametrize("positions", ["renumber", "keep"])
@pytest.mark.parametrize("layer", [None, 2])
def test_an_image_in_a_later_turn_is_pruned_as_in_one_prompt(positions: Any, layer: int | None) -> None:
    model = build("llava")
    place = "embeddings" if layer is None else "decoder"
    pruner = Pruner([Stage(place, TopK(lambda now, first: 5), Norms(), layer=layer, positions=positions)])
    first, second = prompt(model, "llava", 1), prompt(model, "llava", 2)
    with pruner.attached(model):
        one = greedy(model, first)
        ids = torch.cat([one.sequences, second["input_ids"]], dim=1)
        images = {"pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]])}
        mask = torch.ones_like(ids)
        together = steps(greedy(model, {"input_ids": ids, "attention_mask": mask, **images}))
        again = {"input_ids": ids, "attention_mask": mask, "pixel_values": second["pixel_values"]}
        later = greedy(model, again, cache=one.cache)
    assert close(steps(later), together)
    assert len({layer.get_seq_length() for layer in later.cache.layers[2:]}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_several_images_share_a_prompt(family: str) -> None:
    model = build(family)
    inputs = prompt(model, family, images=2)
    other = prompt(model, family, 3)
    for method in ("stacked", "vflowopt"):
        pruner = METHODS[method]()
        with pruner.attached(model):
            assert steps(greedy(model, inputs, steps=2)).isfinite().all()
            assert len(pruner.last_report.stages[0].visuals) == 2
            if family != "smolvlm":  # its processor pads the list of pictures
                batch = greedy(model, left_padded([inputs, other]), steps=2)
                assert close(steps(batch)[1], steps(greedy(model, other, steps=2))[0])
    shared = FastV(0.5, layer=2, scope="global")
    with shared.attached(model):
        greedy(model, inputs)
    first, second = shared.last_report.stages[0].visuals
    total = first.tokens + second.tokens
    assert len(first.kept) + len(second.kept) == total - round(total * 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_no_bit(family: str) -> None:
    model = build(family)
    inputs = prompt(model, family)
    before = greedy(model, inputs)
    every = [
        FoPru(1.0, newline="keep_all"),
        FastV(1.0, layer=2),
        DivPrune(1.0),
        RandomPruner(1.0),
        TransPrune(accumulate=(1, 2), prune=(2, 3), ratios=(1.0, 1.0)),
        VFlowOpt(Settings((1.0, 1.0), 1.0, 3.0), layers=(2,)),
        PyramidDrop((2, 3), (1.0, 1.0)),
        FoPru(1.0, "row", newline="keep_all"),
    ]
    for pruner in every:
        with pruner.attached(model):
            after = greedy(model, inputs)
        assert torch.equal(steps(before), steps(after)), type(pruner).__name__


@pytest.mark.parametrize("method", ["stacked", "vflowopt", "sparsevlm"])
def test_reported_bytes_are_those_of_a_padded_cache(method: str) -> None:
    model, pruner = build("llava"), METHODS[method]()
    batch = left_padded([prompt(model, "llava", 1, question=5), prompt(model, "llava", 2, question=9)])
    with pruner.attached(model):
        cache = model(**batch, use_cache=True, logits_to_keep=1).cache
    held = sum(one.numel() * one.element_size() for layer in cache.layers for one in (layer.keys, layer.values))
    assert pruner.last_report.kv_bytes == held < pruner.last_report.unpruned_kv_bytes


def test_positions_are_closed_or_kept() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    seen: dict[str, list[int]] = {}
    for positions in ("renumber", "keep"):
        held: list[Tensor] = []

        def note(module: Any, args: tuple, kwargs: dict[str, Any], held: list[Tensor] = held) -> None:
            held.append(kwargs["position_ids"])

        with FastV(0.25, layer=2, positions=positions).attached(model):
            hook = model.model.language_model.layers[3].register_forward_pre_hook(note, with_kwargs=True)
            greedy(model, inputs, steps=2)
            hook.remove()
        seen[positions] = [int(one[0, -1]) for one in held]
    length = inputs["input_ids"].shape[1]
    assert seen == {"renumber": [length - 13, length - 12], "keep": [length - 1, length]}


def test_video_frames_are_views_of_one_visual() -> None:
    model = build("llava_onevision")
    frames = torch.randn(1, 3, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    tokens = 3 * 4 + 1
    ids = torch.tensor([[1, 5, *[58] * tokens, 6, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values_videos": frames, "attention_mask": torch.ones_like(ids)}
    for pruner in (VFlowOpt(Settings((0.5, 0.5), 1.0, 3.0), layers=(2,)), DivPrune(0.5), UniformPooling(2)):
        with pruner.attached(model):
            assert steps(greedy(model, inputs)).isfinite().all()
        (visual,) = pruner.last_report.stages[0].visuals
        assert visual.kind == "video"
        assert visual.tokens == tokens
    assert len(visual.kept) == 3 * 1 + 1, "each frame of 2 x 2 tokens pools to one, the newline stays"
    qwen = build("qwen2_5_vl")
    patches = torch.randn(2 * 4 * 4, 96, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[1, 57, *[58] * 8, 56, 6, 7]])
    inputs = {
        "input_ids": ids,
        "pixel_values_videos": patches,
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 58).int() * 2,
    }
    pruner = FoPru(0.5)
    with pruner.attached(qwen):
        assert steps(greedy(qwen, inputs)).isfinite().all()
    (visual,) = pruner.last_report.stages[0].visuals
    assert visual.tokens == 8
    assert [int((visual.kept // 4 == frame).sum()) for frame in range(2)] == [2, 2], "each frame is a view"


def test_a_cache_that_the_model_makes_itself_remembers() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    with FoPru(0.4).attached(model):
        first = model(**inputs)
        token = first.logits[:, -1:].argmax(dim=-1)
        by_hand = model(input_ids=token, cache=first.cache).logits
        generated = steps(greedy(model, inputs, steps=2))
    assert close(by_hand[:, -1], generated[:, 1])


def test_the_report_keeps_no_pixels_alive() -> None:
    import gc
    import weakref

    for family in ("llava", "llava_next", "internvl"):
        model = build(family)
        pruner = FoPru(0.4)
        inputs = prompt(model, family)
        pixels = weakref.ref(inputs["pixel_values"])
        with pruner.attached(model):
            greedy(model, inputs, steps=2)
        del inputs
        gc.collect()
        assert pruner.last_report is not None
        assert pixels() is None, family


def test_loss_follows_the_kept_tokens_and_trains() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    plain = model(**inputs, labels=labels)
    with FoPru(1.0).attached(model):
        assert torch.equal(model(**inputs, labels=labels).loss, plain.loss)
    pruner = FoPru(0.5) + FastV(0.5, layer=2)
    with pruner.attached(model), torch.enable_grad():
        result = model(**inputs, labels=labels)
        source = pruner.last_report.source
        targets = labels.gather(1, source)[:, 1:]
        manual = torch.nn.functional.cross_entropy(result.logits[0, :-1], targets[0], ignore_index=-100)
        assert torch.allclose(result.loss, manual)
        result.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_no_image_is_a_no_op_said_once() -> None:
    model = build("llava")
    ids = torch.tensor([[1, 5, 6, 7]])
    plain = steps(greedy(model, {"input_ids": ids}))
    pruner = METHODS["stacked"]()
    with pruner.attached(model):
        with pytest.warns(UserWarning, match="no image in the prompt"):
            assert torch.equal(steps(greedy(model, {"input_ids": ids})), plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            greedy(model, {"input_ids": ids})
    assert pruner.last_report is None


def test_wrong_use_is_refused_in_words() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    with pytest.raises(InvalidInputError, match=r"has layers 0\.\.3"):
        FastV(layer=4).attach(model)
    with pytest.raises(InvalidInputError, match="past the decoder's 4 layers"):
        TransPrune(accumulate=(9,), prune=(2,), ratios=(0.5,)).attach(model)
    with pytest.raises(InvalidInputError, match="prunes this model already"), FoPru().attached(model):
        FastV().attach(model)
    pruner = FoPru()
    with pytest.raises(InvalidInputError, match="attached to this"), pruner.attached(model):
        pruner.attach(model)
    with pytest.raises(InvalidInputError, match="two stages act at the decoder layer 2"):
        FastV(layer=2) + RandomPruner(layer=2)
    with pytest.raises(InvalidInputError, match="default dynamic cache"), FoPru().attached(model):
        greedy(model, inputs, cache_implementation="static")
    qwen = build("qwen2_5_vl")
    with pytest.raises(InvalidInputError, match="no class token"), FoPru(queries="cls").attached(qwen):
        greedy(qwen, prompt(qwen, "qwen2_5_vl"))
    with pytest.raises(InvalidInputError, match="cannot be renumbered"):
        FastV(positions="renumber").attach(build("qwen2_5_vl"))
    with pytest.raises(InvalidInputError, match="prune before layer 2 or later"):
        FastV(layer=1).attach(build("qwen3_vl"))
    with pytest.raises(InvalidInputError, match="attends inside windows"):
        FoPru(layer=0).attach(build("qwen2_5_vl"))
    with pytest.raises(InvalidInputError, match="a view has 16 tokens"), VisionZip(54, 10).attached(model):
        greedy(model, inputs)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_features_made_before_attaching_still_serve_methods_that_need_no_tower() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    features = {"image": model.get_image_features(pixel_values=inputs.pop("pixel_values"), return_dict=True)}
    with DivPrune(0.5).attached(model):
        assert model(**inputs, mm_encoder_outputs=features).logits.shape[1] == inputs["input_ids"].shape[1] - 8
    with pytest.raises(InvalidInputError, match="pass pixel_values"), FoPru(0.5).attached(model):
        model(**inputs, mm_encoder_outputs=features)


def test_broken_weights_are_not_silent() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    model.model.language_model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(InvalidOutputError, match="NaN"), FastV(0.5, layer=2).attached(model):
        greedy(model, inputs)


def test_unknown_models_hear_what_is_supported() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(InvalidInputError, match=r"LlamaForCausalLM .*supported: LLaVA-1.5 .*register_host") as error:
        FoPru().attach(LlamaForCausalLM(config))
    assert "lacks model.language_model.layers" in str(error.value)


def test_a_method_of_ones_own_is_short() -> None:
    model = build("qwen3_vl")
    inputs = prompt(model, "qwen3_vl")
    pruner = Pruner([Stage("embeddings", TopK(lambda now, first: first // 3), Norms(), name="norms")])
    with pruner.attached(model):
        greedy(model, inputs)
    (visual,) = pruner.last_report.stages[0].visuals
    assert set(visual.kept.tolist()) == set(visual.scores.topk(visual.tokens // 3).indices.tolist())
    assert isinstance(find_host(model), Host)
