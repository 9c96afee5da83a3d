"""What LlamaGen and NAR share: sampling, training, official files, errors."""

from __future__ import annotations

import copy
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks.plain.llamagen
import benchmarks.plain.nar
from benchmarks.plain.blocks import SAVINGS
from tests.generators.models import build, captions, condition_for, seeds
from tests.parity.replay import recorded_draws
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.generators.llamagen import LlamaGen
from vistok.generators.nar import NAR
from vistok.nn.llama import ConditionalLlama
from vistok.nn.text import TextCondition
from vistok.tokens import VisualTokens

SYSTEMS = pytest.mark.parametrize("cls", [LlamaGen, NAR])
CONDITIONS = pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
PLAIN = {LlamaGen: benchmarks.plain.llamagen.generate, NAR: benchmarks.plain.nar.generate}


def plain(model: ConditionalLlama, *arguments: Any, **settings: Any) -> Tensor:
    return PLAIN[type(model)](model, *arguments, **settings)


def rows_per_call(model: ConditionalLlama, **settings: Any) -> list[int]:
    """Rows of each model call while sampling two images of different classes."""
    rows: list[int] = []
    handle = model.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    model.generate(torch.tensor([1, 2]), generator=torch.Generator().manual_seed(0), **settings)
    handle.remove()
    return rows


# ------------------------------------------------------------------------------------------------------------ sampling
@SYSTEMS
@CONDITIONS
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_cached_logits_equal_teacher_forcing(cls: Any, text: bool, num_kv_heads: int | None) -> None:
    model = build(cls, text=text, num_kv_heads=num_kv_heads, grid=(3, 5))
    condition = condition_for(model)
    steps: list[Tensor] = []
    with recorded_draws(logits=steps):
        final = list(model.sample(condition, temperature=0.0))
    order = torch.cat([step.changed for step in final])
    forced = model(final[-1].tokens.ids, condition)
    torch.testing.assert_close(torch.cat(steps, 1), forced[:, order], rtol=1e-4, atol=1e-4)
    assert torch.equal(final[-1].tokens.ids, forced.argmax(-1))


@SYSTEMS
@CONDITIONS
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 3.0, "top_k": 20, "temperature": 0.9},
        {"guidance_scale": 2.5, "guidance_interval": 5, "top_p": 0.8},
        {"guidance_scale": 2.0, "guidance_interval": 0, "grid": (3, 6)},
    ],
    ids=["free", "guided", "interval", "rectangle"],
)
def test_the_plain_sampler_writes_the_same_tokens(cls: Any, text: bool, settings: dict[str, Any]) -> None:
    model = build(cls, text=text, num_kv_heads=2)
    condition = condition_for(model, 4)
    ours = model.generate(condition, generator=seeds(0, 1, 2, 3), **settings).ids
    assert torch.equal(plain(model, condition, generator=seeds(0, 1, 2, 3), **settings), ours)


@SYSTEMS
@pytest.mark.parametrize("saving", sorted(SAVINGS))
def test_no_saving_changes_the_tokens(cls: Any, saving: str) -> None:
    settings = {"guidance_scale": 2.0, "guidance_interval": 6, "top_k": 30, "top_p": 0.9}
    for text in (False, True):
        model = build(cls, text=text)
        condition = condition_for(model)
        ours = model.generate(condition, generator=seeds(0, 1, 2), **settings).ids
        assert torch.equal(plain(model, condition, generator=seeds(0, 1, 2), savings=[saving], **settings), ours)


@SYSTEMS
@CONDITIONS
def test_seeds_do_not_depend_on_the_batch(cls: Any, text: bool) -> None:
    model = build(cls, text=text)
    condition = condition_for(model, 4)
    settings = {"guidance_scale": 2.0, "top_k": 40}
    together = model.generate(condition, generator=seeds(10, 11, 12, 13), **settings).ids
    for index in (0, 2, 3):
        alone = (
            TextCondition(condition.features[index : index + 1], condition.mask[index : index + 1])
            if isinstance(condition, TextCondition) and condition.mask is not None
            else condition[index : index + 1]
        )
        assert torch.equal(model.generate(alone, generator=seeds(10 + index), **settings).ids[0], together[index])


@SYSTEMS
def test_one_generator_repeats(cls: Any) -> None:
    model, labels = build(cls), torch.tensor([1, 1])
    first, second = (model.generate(labels, generator=seeds(4)[0]).ids for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@SYSTEMS
@CONDITIONS
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 2), (3, 7)])
def test_any_rectangle(cls: Any, text: bool, grid: tuple[int, int]) -> None:
    model = build(cls, text=text)
    size = grid[0] * grid[1]
    steps = list(model.sample(condition_for(model, 2), grid=grid, guidance_scale=2.0, generator=seeds(0, 1)))
    assert len(steps) == steps[0].total == (sum(grid) - 1 if cls is NAR else size)
    assert [step.index for step in steps] == list(range(len(steps)))
    assert sorted(torch.cat([step.changed for step in steps]).tolist()) == list(range(size))
    seen = 0
    for earlier, step in pairwise(steps):
        seen += len(earlier.changed)
        assert earlier.tokens.mask is not None
        assert int(earlier.tokens.mask.sum()) == 2 * seen
        assert (earlier.tokens.ids[~earlier.tokens.mask] == 0).all()
        assert torch.equal(step.tokens.ids[earlier.tokens.mask], earlier.tokens.ids[earlier.tokens.mask])
    assert steps[-1].tokens.grid == grid
    assert steps[-1].tokens.ids.max() < model.vocab_size


@SYSTEMS
def test_guidance_up_to_one_is_no_guidance(cls: Any) -> None:
    model = build(cls)
    assert set(rows_per_call(model)) == {2}
    assert rows_per_call(model, guidance_scale=0.5) == rows_per_call(model, guidance_scale=1.0)
    free = model.generate(torch.tensor([1]), generator=seeds(0))
    assert torch.equal(model.generate(torch.tensor([1]), generator=seeds(0), guidance_scale=0.3).ids, free.ids)


@SYSTEMS
def test_equal_conditions_run_once(cls: Any) -> None:
    model = build(cls)
    rows: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    model.generate(torch.tensor([1, 1, 5, 1]), guidance_scale=2.0)
    assert rows[0] == 3  # two classes and the null class
    assert set(rows[1:]) == {8}
    model = build(cls, text=True)
    positions: list[tuple[int, int]] = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: positions.append(tuple(inputs[0].shape[:2])))
    model.generate(captions(4, 4, 2, 2), guidance_scale=2.0)
    assert positions[0] == (4, 4)  # two captions and a null caption for each padding, without the padding all share


@SYSTEMS
@CONDITIONS
def test_stronger_guidance_changes_tokens_and_unguided_ones_differ(cls: Any, text: bool) -> None:
    model = build(cls, text=text)
    condition = condition_for(model)
    results = [
        model.generate(condition, guidance_scale=scale, generator=seeds(0, 1, 2)).ids for scale in (1.0, 2.0, 6.0)
    ]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@SYSTEMS
def test_padding_never_matters(cls: Any) -> None:
    model = build(cls, text=True)
    condition = captions(3, 5)
    assert condition.mask is not None
    garbage = torch.where(condition.mask[..., None], condition.features, torch.randn(2, 6, 12))
    settings = {"guidance_scale": 2.0, "temperature": 0.0}
    clean = model.generate(condition, **settings).ids
    assert torch.equal(model.generate(TextCondition(garbage, condition.mask), **settings).ids, clean)
    full = captions(6, 6)
    without_mask = model.generate(TextCondition(full.features), **settings).ids
    assert torch.equal(model.generate(full, **settings).ids, without_mask)


@SYSTEMS
def test_a_complete_prefix_leaves_nothing_to_write(cls: Any) -> None:
    model = build(cls)
    tokens = model.generate(torch.tensor([1, 2]))
    assert list(model.sample(torch.tensor([1, 2]), prefix=tokens)) == []
    assert torch.equal(model.generate(torch.tensor([1, 2]), prefix=tokens).ids, tokens.ids)


@SYSTEMS
def test_sampling_leaves_no_trace(cls: Any) -> None:
    model = build(cls)
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        model.generate(torch.tensor([1]), guidance_scale=2.0)
        model.generate(torch.tensor([1]), grid=(2, 3))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    model.train().training_loss({"ids": torch.zeros(1, 16, dtype=torch.int64), "labels": torch.tensor([1])})[
        "loss"
    ].backward()
    assert model.tok_embeddings.weight.grad is not None


@SYSTEMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floating_point_types(cls: Any, dtype: torch.dtype) -> None:
    for text in (False, True):
        model = build(cls, text=text).to(dtype)
        tokens = model.generate(condition_for(model), guidance_scale=2.0, generator=seeds(0, 1, 2))
        assert tokens.ids.shape == (3, 16)


@SYSTEMS
@pytest.mark.parametrize(
    ("condition", "settings", "message"),
    [
        (torch.tensor([10]), {}, r"0\.\.9; got 10\.\.10"),
        (torch.tensor([-1]), {}, r"0\.\.9; got -1\.\.-1"),
        (torch.tensor([1.0]), {}, r"int64 \[B\], not torch.float32 \[1\]"),
        (torch.tensor([[1]]), {}, r"int64 \[B\], not torch.int64 \[1, 1\]"),
        (torch.tensor([], dtype=torch.int64), {}, "at least one"),
        ([1, 2], {}, "not list"),
        (captions(2), {}, "not TextCondition"),
        (torch.tensor([1]), {"guidance_scale": float("nan")}, "guidance_scale"),
        (torch.tensor([1]), {"guidance_interval": -1}, "guidance_interval"),
        (torch.tensor([1]), {"generator": seeds(0, 1)}, "2 generators for 1 images"),
        (torch.tensor([1]), {"grid": (0, 4)}, "grid must be"),
        (torch.tensor([1]), {"prefix": VisualTokens(torch.zeros(1, 4, dtype=torch.int64))}, "with a grid"),
        (torch.tensor([1]), {"prefix": VisualTokens(torch.zeros(2, 4, dtype=torch.int64), grid=(1, 4))}, "1 images"),
        (torch.tensor([1]), {"prefix": VisualTokens(torch.zeros(1, 5, dtype=torch.int64), grid=(1, 5))}, "1x5"),
        (torch.tensor([1]), {"prefix": VisualTokens(torch.full((1, 4), 64), grid=(1, 4))}, r"0\.\.63"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(cls: Any, condition: Any, settings: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build(cls).sample(condition, **settings)


@SYSTEMS
def test_wrong_text_conditions_are_refused(cls: Any) -> None:
    model = build(cls, text=True)
    with pytest.raises(InvalidInputError, match="text-conditional"):
        model.sample(torch.tensor([1]))
    with pytest.raises(InvalidInputError, match=r"\[B, 6, 12\].*another text encoder"):
        model.sample(TextCondition(torch.zeros(1, 6, 13)))
    with pytest.raises(InvalidInputError, match="NaN"):
        model.sample(TextCondition(torch.full((1, 6, 12), float("nan"))))


@SYSTEMS
def test_modes_and_models_that_cannot_sample(cls: Any) -> None:
    with pytest.raises(InvalidInputError, match="eval"):
        build(cls).train().sample(torch.tensor([1]))
    without_null = build(cls, condition_dropout=0.0)
    without_null.generate(torch.tensor([1]))
    with pytest.raises(InvalidInputError, match="no null class"):
        without_null.sample(torch.tensor([1]), guidance_scale=2.0)


@SYSTEMS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_weights_are_reported(cls: Any, temperature: float) -> None:
    model = build(cls)
    model.layers[1].feed_forward.w2.weight.data[0, 0] = float("nan")
    with pytest.raises(InvalidOutputError, match="NaN logits"):
        model.generate(torch.tensor([1]), temperature=temperature)


# ------------------------------------------------------------------------------------------------------------ training
def training_batch(model: ConditionalLlama, count: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {"ids": torch.randint(0, 64, (count, 16), generator=generator)}
    condition = condition_for(model, count)
    if isinstance(condition, TextCondition):
        return batch | {"text_features": condition.features, "text_mask": condition.mask}
    return batch | {"labels": condition}


@SYSTEMS
@CONDITIONS
def test_gradient_checkpointing_changes_nothing(cls: Any, text: bool) -> None:
    model = build(cls, text=text).train()
    results = []
    for recompute in (False, True):
        if recompute:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        torch.manual_seed(1)  # the same dropout
        loss = model.training_loss(training_batch(model), generator=torch.Generator().manual_seed(2))["loss"]
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


@SYSTEMS
@CONDITIONS
def test_the_loss_is_the_cross_entropy_of_the_logits(cls: Any, text: bool) -> None:
    model = build(cls, text=text)
    batch = training_batch(model)
    logits = model(batch["ids"], condition_for(model))
    each = -logits.log_softmax(-1).gather(-1, batch["ids"][..., None]).mean((1, 2))
    torch.testing.assert_close(model.training_loss(batch)["loss"], each.mean())
    valid = torch.tensor([1, 0, 1])
    torch.testing.assert_close(model.training_loss(batch | {"valid": valid})["loss"], each[[0, 2]].mean())
    assert model.training_loss(batch | {"valid": torch.zeros(3)})["loss"] == 0


@SYSTEMS
@CONDITIONS
def test_condition_dropout_is_the_null_condition(cls: Any, text: bool) -> None:
    off = {f"{name}_dropout": 0.0 for name in ("token", "residual", "ffn")}
    model = build(cls, text=text, **off).train()
    batch, condition = training_batch(model), condition_for(model)
    with recorded_draws(drop_rand=torch.tensor([0.05, 0.5, 0.01])):
        dropped = model(batch["ids"], condition)
    model.eval()
    kept = model(batch["ids"], condition)
    torch.testing.assert_close(dropped[1], kept[1])
    if isinstance(condition, TextCondition):
        null = model.cls_embedding.uncond_embedding.expand(3, -1, -1)
        unconditional = model(batch["ids"], TextCondition(null, condition.mask))
    else:
        unconditional = model(batch["ids"], torch.full((3,), 10))
    torch.testing.assert_close(dropped[[0, 2]], unconditional[[0, 2]])


@SYSTEMS
def test_training_learns_a_class(cls: Any) -> None:
    torch.manual_seed(0)
    off = {f"{name}_dropout": 0.0 for name in ("token", "residual", "ffn", "condition")}
    model = cls.tiny(num_classes=2, **off).train()
    ids = torch.stack([torch.arange(16), torch.arange(16).flip(0)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.training_loss({"ids": ids.repeat(4, 1), "labels": torch.tensor([0, 1]).repeat(4)})["loss"].backward()
        optimizer.step()
    assert torch.equal(model.eval().generate(torch.tensor([1, 0]), temperature=0.0).ids, ids.flip(0))


@SYSTEMS
def test_an_untrained_model_starts_where_the_authors_do(cls: Any) -> None:
    model = cls.tiny()
    assert (model.output.weight == 0).all()
    assert abs(float(model.layers[0].attention.wqkv.weight.detach().std()) - 0.02) < 0.002
    if cls is LlamaGen:
        loss = model.training_loss(training_batch(model))["loss"]
        torch.testing.assert_close(loss, torch.tensor(64.0).log())


@SYSTEMS
def test_incomplete_batches_are_refused(cls: Any) -> None:
    ids = torch.zeros(1, 16, dtype=torch.int64)
    with pytest.raises(InvalidInputError, match="'labels'"):
        build(cls).training_loss({"ids": ids})
    with pytest.raises(InvalidInputError, match="'text_features'"):
        build(cls, text=True).training_loss({"ids": ids, "labels": torch.tensor([0])})
    with pytest.raises(InvalidInputError, match=r"\[B, 16\].*\[1, 9\]"):
        build(cls).training_loss({"ids": ids[:, :9], "labels": torch.tensor([0])})


# ------------------------------------------------------------------------------------------- configuration and files
@SYSTEMS
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "head width"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"num_classes": None}, "neither"),
        ({"caption_dim": 8}, "both"),
        ({"num_condition_tokens": 2}, "one condition token"),
        ({"grid": (4, 0)}, "grid"),
    ],
)
def test_impossible_configurations(cls: Any, arguments: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        cls.tiny(**arguments)


@SYSTEMS
@pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict"])
def test_official_files_of_every_layout(cls: Any, wrapper: str | None, tmp_path: Path) -> None:
    model = build(cls)
    state = {**model.to_official(), "freqs_cis": torch.zeros(2)}
    content = state if wrapper is None else {wrapper: state, "steps": 3, "args": Namespace(lr=1.0)}
    torch.save(content, tmp_path / "last_version.pt")
    official = {
        "dim": 32,
        "n_layer": 2,
        "n_head": 4,
        "multiple_of": 16,
        "num_classes": 10,
        "vocab_size": 64,
        "block_size": 16,
        "max_batch_size": 8,
    }
    for config in (official, dict(model.config)):
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        again = cls.from_official(tmp_path / "last_version.pt", config)
        assert not again.training
        labels = torch.tensor([2])
        assert torch.equal(
            again.generate(labels, generator=seeds(0)).ids, model.generate(labels, generator=seeds(0)).ids
        )


def test_the_other_systems_file_is_named() -> None:
    nar, llamagen = build(NAR), build(LlamaGen)
    config = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "multiple_of": 16, "num_classes": 10}
    config |= {"vocab_size": 64, "grid": (4, 4)}
    with pytest.raises(CheckpointError, match=r"this is a LlamaGen checkpoint: the vertical head \(medusa_\*\)"):
        NAR.from_official(llamagen.to_official(), config)
    with pytest.raises(CheckpointError, match=r"this is a NAR checkpoint"):
        LlamaGen.from_official(nar.to_official(), config)
    with pytest.raises(CheckpointError, match=r"tok_embeddings\.weight") as caught:
        NAR.from_official({"encoder.weight": torch.zeros(1)}, config)
    assert "LlamaGen checkpoint" not in str(caught.value)
    damaged = nar.to_official()
    damaged["norm.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"norm.weight \[3\] instead of \[32\]"):
        NAR.from_official(damaged, config)


@SYSTEMS
def test_unknown_configurations_are_refused(cls: Any) -> None:
    with pytest.raises(KeyError, match=r"llamagen-b\.imagenet256|nar-b\.imagenet256"):
        cls.from_official({}, "llamagen-b.imagenet" if cls is LlamaGen else "nar-b.imagenet")
    with pytest.raises(InvalidInputError, match="perfect square"):
        cls.from_official({}, {"dim": 32, "block_size": 15})
    with pytest.raises(InvalidInputError, match="unexpected keyword argument 'width'"):
        cls.from_official({}, {"dim": 32, "width": 15})


@SYSTEMS
def test_every_published_configuration_has_the_papers_size(cls: Any) -> None:
    for name, entry in cls.published.items():
        assert entry.name == name
        with torch.device("meta"):
            model = cls(**entry.config)
        assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters, name
        assert model.grid[0] * model.grid[1] == entry.num_tokens
        assert entry.image_size == 16 * model.grid[0]
        assert (entry.text_encoder is not None) == model.is_text_conditional


@SYSTEMS
def test_saved_models_load_again(cls: Any, tmp_path: Path) -> None:
    model = build(cls, text=True, grid=(2, 3))
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    condition = captions(2, 3)
    assert torch.equal(
        again.generate(condition, generator=seeds(0, 1)).ids, model.generate(condition, generator=seeds(0, 1)).ids
    )
