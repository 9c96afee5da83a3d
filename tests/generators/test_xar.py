"""xAR: entities, masks, objective, sampling against the plain way, continuation, official files, bad input."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.plain import xar as plain
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError, UnknownNameError
from vistok.generators.xar import XAR, EntityRun, annealed_steps, entity_layout
from vistok.generators.xar import run as xar_run
from vistok.generators.xar.network import PackedFeedForward, attend_to_prefixes
from vistok.nn.masked import unpatchify
from vistok.tokens import VisualTokens

KINDS: dict[str, dict[str, Any]] = {
    "token": {"entity": "token"},
    "cell": {"entity": "cell", "entity_size": 2},
    "subsample": {"entity": "subsample", "entity_size": 2},
    "scale": {"entity": "scale"},
    "image": {"entity": "image"},
}
LABELS = torch.tensor([3, 0, 3])


def build(kind: str = "cell", **overrides: Any) -> XAR:
    torch.manual_seed(0)
    model = XAR.tiny(**{**KINDS[kind], **overrides})
    for parameter in model.parameters():  # biases and tables, too, so that everything moves the output
        if parameter.ndim == 1 or parameter.shape[0] == 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def batch_of(model: XAR, count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (count, model.latent_channels, *(side * model.patch_size for side in model.grid))
    return {"latents": torch.randn(shape, generator=generator), "labels": torch.arange(count) % model.num_classes}


# ------------------------------------------------------------------------------------------------------------- entities
@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (6, 2)])
@pytest.mark.parametrize("kind", ["token", "cell", "subsample", "image"])
def test_layouts_against_their_definitions(kind: str, grid: tuple[int, int]) -> None:
    rows, cols = grid
    layout = entity_layout(grid, kind, 2)
    number = {
        "token": lambda r, q: r * cols + q,
        "cell": lambda r, q: (r // 2) * (cols // 2) + q // 2,
        "subsample": lambda r, q: (r % 2) * 2 + q % 2,
        "image": lambda r, q: 0,
    }[kind]
    cells = sorted(product(range(rows), range(cols)), key=lambda cell: (number(*cell), cell))
    assert layout.places.tolist() == [r * cols + q for r, q in cells]
    assert layout.coordinates.tolist() == [[r, q] for r, q in cells]
    assert layout.number.tolist() == [number(*cell) for cell in cells]
    tokens = torch.randn(2, rows * cols, 3)
    sequence = layout.to_sequence(tokens)
    assert torch.equal(sequence, tokens[:, [r * cols + q for r, q in cells]])
    assert torch.equal(layout.to_raster(sequence), tokens)
    assert layout.uniform == layout.starts[1]


def test_scales_are_averages_at_the_centres_of_their_tokens() -> None:
    layout = entity_layout((4, 8), "scale")
    assert layout.starts == (0, 2, 10, 42)
    assert layout.uniform is None
    assert layout.coordinates[:2].tolist() == [[1.5, 1.5], [1.5, 5.5]]
    assert layout.coordinates[2].tolist() == [0.5, 0.5]
    assert layout.coordinates[10:12].tolist() == [[0, 0], [0, 1]]
    tokens = torch.randn(1, 32, 2)
    image = tokens.view(4, 8, 2)
    sequence = layout.to_sequence(tokens)
    torch.testing.assert_close(sequence[0, 1], image[:, 4:].mean((0, 1)))
    torch.testing.assert_close(sequence[0, 2], image[:2, :2].mean((0, 1)))
    assert torch.equal(layout.to_raster(sequence), tokens)
    assert entity_layout((4, 8), "scale", 8, (1, 4)).starts == (0, 2, 34)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((16, 16), "cell", 3), r"possible sizes: \[1, 2, 4, 8, 16\]"),
        (((16, 16), "subsample", 0), "possible sizes"),
        (((4, 4), "patch", 2), "entity must be one of"),
        (((4, 4), "scale", 2, (2, 1, 4)), "ascending"),
        (((4, 4), "scale", 2, (1, 2)), "end with the grid's"),
        (((4, 6), "scale", 2, (1, 4)), "whole columns"),
    ],
)
def test_bad_entities_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        entity_layout(*arguments)


@pytest.mark.parametrize("kind", list(KINDS))
def test_velocities_depend_on_nothing_later(kind: str) -> None:
    model = build(kind)
    layout = model.layout
    tokens = torch.randn(1, layout.length, 4)
    index = torch.randint(0, 1000, (1, layout.num_entities))
    before = model(tokens, index, torch.tensor([1]))
    for entity, (start, stop) in list(enumerate(pairwise(layout.starts)))[:6]:
        changed, times = tokens.clone(), index.clone()
        changed[:, start] += 1.0
        times[:, entity] = (times[:, entity] + 500) % 1000
        after = model(changed, times, torch.tensor([1]))
        torch.testing.assert_close(after[:, :start], before[:, :start])
        assert not torch.isclose(after[:, start:stop], before[:, start:stop]).all(-1).any()  # all of the entity sees it
        if stop < layout.length:
            assert not torch.isclose(after[:, -1], before[:, -1]).all()


def test_attending_entity_by_entity_is_attending_under_the_mask() -> None:
    model = build("cell")
    attend, layout = model.training_attention(0.0, False), model.layout
    query, key, value = torch.randn(3, 2, 4, layout.length, 8)
    expected = attend_to_prefixes(query, key, value, layout.starts, 0.0)
    torch.testing.assert_close(attend(query, key, value), expected)


# ------------------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize(
    ("kind", "guidance_scale", "solver"),
    [*((kind, 2.5, "euler_maruyama") for kind in KINDS), ("cell", 1.0, "euler_maruyama"), ("cell", 2.5, "euler")],
)
def test_samples_are_those_of_the_plain_way(kind: str, guidance_scale: float, solver: str) -> None:
    model = build(kind)
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": 2, "solver": solver}
    ours = model.generate(LABELS, generator=torch.Generator().manual_seed(1), **settings)
    for savings in ((), tuple(plain.SAVINGS)):
        generator = torch.Generator().manual_seed(1)
        expected = plain.generate(model, LABELS, generator=generator, savings=savings, **settings)
        torch.testing.assert_close(ours.features, expected, rtol=2e-4, atol=5e-5)
    assert ours.grid == (4, 4)


@pytest.mark.parametrize("kind", ["cell", "scale"])
def test_the_run_computes_what_training_does(kind: str) -> None:
    """With clean earlier entities at time 0, the training pass and the cached call are the same function."""
    model, labels = build(kind), torch.tensor([2, 5])
    layout = model.layout
    tokens = torch.randn(2, layout.length, 4)
    with torch.no_grad():
        run = EntityRun(model, labels, guided=False, indices=[333], context=True)
        for entity, (start, stop) in enumerate(pairwise(layout.starts)):
            index = torch.zeros(2, layout.num_entities, dtype=torch.int64)
            index[:, entity] = 333
            expected = model(tokens, index, labels)[:, start:stop]
            torch.testing.assert_close(run.velocity(tokens[:, start:stop], entity, 333), expected, rtol=1e-4, atol=1e-5)
            run.remember(tokens[:, start:stop], entity)


def test_steps_preview_entities_and_then_decide_them() -> None:
    model = build()
    steps = list(model.sample(LABELS, num_inference_steps=3, guidance_scale=2.0, generator=seeds(0, 1, 2)))
    assert [step.index for step in steps] == list(range(12))
    assert {step.total for step in steps} == {12}
    assert [len(step.changed) for step in steps] == [0, 0, 4] * 4
    assert steps[2].changed.tolist() == [0, 1, 4, 5]
    assert sorted(torch.cat([step.changed for step in steps]).tolist()) == list(range(16))
    for step in steps:
        decided = step.tokens.mask[0].nonzero().flatten().tolist()
        assert decided == sorted(torch.cat([s.changed for s in steps[: step.index + 1]]).tolist())
        shown = (step.tokens.features[0] != 0).all(-1)
        assert bool(shown[step.tokens.mask[0]].all())
        assert int(shown.sum()) == 4 * (step.index // 3 + 1)  # the present entity is shown as well
    assert torch.equal(steps[-1].tokens.features[:, [0, 1, 4, 5]], steps[2].tokens.features[:, [0, 1, 4, 5]])


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_image_does_not_depend_on_its_batch(kind: str) -> None:
    model = build(kind)
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0}
    together = model.generate(LABELS, generator=seeds(1, 2, 3), **settings)
    alone = model.generate(LABELS[1:2], generator=seeds(2), **settings)
    torch.testing.assert_close(together.features[1:2], alone.features, rtol=1e-4, atol=1e-5)
    again = model.generate(LABELS, generator=seeds(1, 2, 3), **settings)
    assert torch.equal(together.features, again.features)


def test_unconditional_rows_are_run_for_guided_entities_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = build(), []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda x, start=0, stop=None: (rows.append(len(x)), embed(x, start, stop))[1])
    model.generate(LABELS, num_inference_steps=2, guidance_scale=2.0)
    assert rows == [3, 3, 6, 6, 6, 6, 6, 6, 6, 6, 6]  # the first entity; then the clean pass and two calls each
    rows.clear()
    model.generate(LABELS, num_inference_steps=2)
    assert rows == [3] * 11
    rows.clear()
    model.generate(LABELS, num_inference_steps=2, guidance_scale=2.0, guidance_schedule="constant")
    assert rows == [6] * 11


def test_equal_classes_share_their_modulations() -> None:
    model = build()
    run = EntityRun(model, LABELS, guided=True, indices=[1000, 500], context=True)
    assert run.table is not None
    assert run.table.shape[1:3] == (3, 3)  # times 0, 500, 1000; classes 0, 3 and the null class


def test_large_tables_are_computed_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0}
    expected = model.generate(LABELS, generator=seeds(1, 2, 3), **settings)
    monkeypatch.setattr(xar_run, "TABLE_BYTES", 0)
    ours = model.generate(LABELS, generator=seeds(1, 2, 3), **settings)
    torch.testing.assert_close(ours.features, expected.features)


def test_packed_mlps_are_the_mlps() -> None:
    mlp = build(hidden_size=40, encoder_heads=2, decoder_heads=2).encoder_blocks[0].mlp
    packed, x = PackedFeedForward(mlp), torch.randn(2, 5, 40)
    assert packed.output.shape[1] == 128  # of 106
    torch.testing.assert_close(packed(x), mlp(x))


def test_guidance_rises_from_entity_to_entity() -> None:
    assert build().guidance_scales(2.5) == [1.0, 1.5, 2.0, 2.5]
    assert build().guidance_scales(2.5, "constant") == [2.5] * 4
    assert build("image").guidance_scales(2.5) == [2.5]


def test_fewer_steps_for_later_entities() -> None:
    assert annealed_steps(4) == (50, 38, 26, 15)
    assert annealed_steps(1) == (50,)
    steps = list(build().sample(LABELS, num_inference_steps=annealed_steps(4, 5, 2)))
    assert steps[0].total == 5 + 4 + 3 + 2
    assert [step.index for step in steps if len(step.changed)] == [4, 8, 11, 13]


def test_images_without_a_class() -> None:
    model = build()
    tokens = model.generate(num_images=2, num_inference_steps=2, generator=seeds(1, 2))
    assert tokens.features.shape == (2, 16, 4)
    assert not torch.allclose(
        tokens.features, model.generate(torch.tensor([1, 1]), num_inference_steps=2, generator=seeds(1, 2)).features
    )


def test_bfloat16_stays_close() -> None:
    model = build()
    settings = {"num_inference_steps": 3, "guidance_scale": 1.5}
    expected = model.generate(LABELS, generator=seeds(1, 2, 3), **settings).features
    ours = model.to(torch.bfloat16).generate(LABELS, generator=seeds(1, 2, 3), **settings).features
    assert ours.dtype == torch.float32
    assert float((ours - expected).norm() / expected.norm()) < 0.2


# --------------------------------------------------------------------------------------------------------- continuation
@pytest.mark.parametrize("kind", ["token", "cell", "subsample"])
def test_known_entities_are_kept_and_continued(kind: str) -> None:
    model, settings = build(kind), {"num_inference_steps": 2, "solver": "euler", "guidance_scale": 2.0}
    whole = list(model.sample(LABELS, generator=seeds(1, 2, 3), **settings))
    count = model.layout.num_entities // 2
    half = whole[2 * count - 1].tokens
    assert int(half.mask[0].sum()) == 8
    steps = list(model.sample(LABELS, generator=seeds(1, 2, 3), prefix=half, **settings))
    assert len(steps) == len(whole) - 2 * count
    known = half.mask[0]
    assert torch.equal(steps[-1].tokens.features[:, known], half.features[:, known])
    # The same draws for the rest give the same rest.
    generators = seeds(1, 2, 3)
    for generator in generators:
        for start, stop in list(pairwise(model.layout.starts))[:count]:
            torch.randn(stop - start, 4, generator=generator)
    rest = model.generate(LABELS, generator=generators, prefix=half, **settings)
    torch.testing.assert_close(rest.features, whole[-1].tokens.features, rtol=1e-4, atol=1e-5)


def test_a_known_entity_in_the_middle_is_context_of_later_ones() -> None:
    model, settings = build(), {"num_inference_steps": 2, "solver": "euler"}
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [2, 3, 6, 7]] = True  # the second cell

    def run(value: float) -> Tensor:
        prefix = VisualTokens(features=torch.full((1, 16, 4), value), grid=(4, 4), mask=mask)
        return model.generate(LABELS[:1], prefix=prefix, generator=seeds(1), **settings).features[0]

    first, second = run(0.5), run(-0.5)
    assert (first[[2, 3, 6, 7]] == 0.5).all()
    assert torch.equal(first[[0, 1, 4, 5]], second[[0, 1, 4, 5]])  # made before it
    assert not torch.isclose(first[8:], second[8:]).all(-1).any()  # made after it


def test_complete_and_impossible_prefixes() -> None:
    model = build()
    features = torch.randn(1, 16, 4)
    complete = VisualTokens(features=features, grid=(4, 4))
    assert list(model.sample(LABELS[:1], prefix=complete)) == []
    assert torch.equal(model.generate(LABELS[:1], prefix=complete).features, features)
    corner = VisualTokens(features=features[:, :4], grid=(2, 2))  # the first cell
    assert torch.equal(
        model.generate(LABELS[:1], prefix=corner, num_inference_steps=2).features[:, [0, 1, 4, 5]], features[:, :4]
    )
    part = VisualTokens(features=features[:, :2], grid=(1, 2))
    with pytest.raises(InvalidInputError, match="whole entities"):
        model.sample(LABELS[:1], prefix=part)
    with pytest.raises(InvalidInputError, match="complete, or absent"):
        build("scale").sample(LABELS[:1], prefix=corner)
    with pytest.raises(InvalidInputError, match="NaN"):
        model.sample(LABELS[:1], prefix=VisualTokens(features=features * float("nan"), grid=(4, 4)))
    with pytest.raises(InvalidInputError, match="7 channels"):
        model.sample(LABELS[:1], prefix=VisualTokens(features=torch.zeros(1, 16, 7), grid=(4, 4)))
    with pytest.raises(InvalidInputError, match="features of 1 images"):
        model.sample(LABELS[:1], prefix=VisualTokens(ids=torch.zeros(1, 16, dtype=torch.int64), grid=(4, 4)))


# ------------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    ("kind", "context"), [*((kind, "noisy") for kind in KINDS), ("cell", "clean"), ("scale", "clean")]
)
def test_training_lowers_the_loss(kind: str, context: str) -> None:
    model = build(kind, context=context, projection_dropout=0.0, attention_dropout=0.0).train()
    batch = batch_of(model)
    batch["latents"] = batch["latents"].mean((2, 3), keepdim=True).expand_as(batch["latents"]).contiguous()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(12):
        loss = model.training_loss(batch, generator=torch.Generator().manual_seed(0))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_objective_against_its_formula() -> None:
    model, generator = build(), torch.Generator().manual_seed(4)
    batch = batch_of(model, 2)
    loss = model.training_loss(batch, generator=torch.Generator().manual_seed(4))["loss"]
    times = torch.sigmoid(torch.randn(8, generator=generator).double()).float().view(4, 2).T
    noise = torch.randn(2, 16, 4, generator=generator)
    clean = model.layout.to_sequence(batch["latents"].flatten(2).transpose(1, 2))
    t = times.repeat_interleave(4, dim=1)[..., None]
    velocity = model((1 - t) * clean + t * noise, (1000 * times).long(), batch["labels"])
    torch.testing.assert_close(loss, ((velocity - (noise - clean)) ** 2).mean())


def test_teacher_forcing_sees_clean_entities() -> None:
    """A noisy entity with clean context equals a training pass whose earlier entities are clean at time 0."""
    model = build()
    clean, noisy = torch.randn(2, 1, 16, 4)
    index = torch.tensor([[300, 400, 500, 600]])
    forced = model(noisy, index, torch.tensor([1]), clean=clean)
    for entity, (start, stop) in enumerate(pairwise(model.layout.starts)):
        mixed, times = clean.clone(), torch.zeros(1, 4, dtype=torch.int64)
        mixed[:, start:stop], times[:, entity] = noisy[:, start:stop], index[:, entity]
        expected = model(mixed, times, torch.tensor([1]))[:, start:stop]
        torch.testing.assert_close(forced[:, start:stop], expected, rtol=1e-4, atol=1e-5)


def test_classes_are_dropped_in_training_alone() -> None:
    model = build(condition_dropout=1.0, projection_dropout=0.0, attention_dropout=0.0)
    batch = batch_of(model)
    other = {**batch, "labels": batch["labels"].flip(0)}

    def loss(given: dict[str, Tensor]) -> Tensor:
        return model.training_loss(given, generator=torch.Generator().manual_seed(1))["loss"]

    assert not torch.equal(loss(batch), loss(other))
    assert torch.equal(loss(batch), loss(batch))  # a validation loss
    model.train()
    assert torch.equal(loss(batch), loss(other))


@pytest.mark.parametrize("kind", ["cell", "scale"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    model = build(kind, projection_dropout=0.0, attention_dropout=0.0).train()
    batch = batch_of(model)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model.training_loss(batch, generator=torch.Generator().manual_seed(1))["loss"].backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    before = gradients()
    model.enable_gradient_checkpointing()
    for ours, expected in zip(gradients(), before, strict=True):
        torch.testing.assert_close(ours, expected)


# ------------------------------------------------------------------------------------------------------- official files
def test_official_files_go_there_and_back(tmp_path: Path) -> None:
    model = build()
    official = model.to_official()
    assert official["mask"].shape == (1, 1, 16, 16)
    assert official["encoder_blocks.0.attn.rope.freqs_cos"].shape == (16, 8)
    torch.save({"model_ema": official, "model": {}, "epoch": 3}, tmp_path / "checkpoint-last.pth")
    config = {
        "img_size": 32,
        "vae_stride": 8,
        "patch_size": 1,
        "encoder_embed_dim": 32,
        "encoder_depth": 2,
        "encoder_num_heads": 4,
        "decoder_embed_dim": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 2,
        "vae_embed_dim": 4,
        "class_num": 10,
        "clusters": 4,
        "norm_layer": None,
    }
    again = XAR.from_official(tmp_path / "checkpoint-last.pth", config)
    assert again.config.entity_size == 2
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    ours = model.generate(LABELS, num_inference_steps=2, generator=seeds(1, 2, 3))
    theirs = again.generate(LABELS, num_inference_steps=2, generator=seeds(1, 2, 3))
    assert torch.equal(ours.features, theirs.features)
    del official["pred.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: pred\.bias"):
        XAR.from_official(official, config)
    with pytest.raises(CheckpointError, match="MAR or Hi-MAR"):
        XAR.from_official({**official, "diffloss.net.input_proj.weight": torch.zeros(1)}, config)
    for change, message in (
        ({"clusters": 8}, "8 equal square cells"),
        ({"img_size": 36}, "equal square cells"),
        ({"decoder_embed_dim": 64}, "must be equal"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            XAR.from_official(official, {**config, **change})
    with pytest.raises(UnknownNameError, match=r"xar-b\.imagenet256"):
        XAR.from_official(official, "xar-x.imagenet256")


def test_folders_keep_everything(tmp_path: Path) -> None:
    model = build("scale", scales=(2, 4))
    model.save_pretrained(tmp_path)
    again = XAR.from_pretrained(tmp_path)
    assert again.layout.starts == (0, 4, 20)
    assert torch.equal(
        model.generate(LABELS, num_inference_steps=2, generator=seeds(1, 2, 3)).features,
        again.generate(LABELS, num_inference_steps=2, generator=seeds(1, 2, 3)).features,
    )


def test_patches_of_latents() -> None:
    model = build(patch_size=2, latent_channels=3).train()
    assert model.token_size == 12
    batch = batch_of(model)
    assert batch["latents"].shape == (4, 3, 8, 8)
    assert float(model.training_loss(batch)["loss"].detach()) > 0
    tokens = model.eval().generate(LABELS, num_inference_steps=2)
    assert unpatchify(tokens.features, tokens.grid, 2).shape == (3, 3, 8, 8)


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_schedule": "cosine"}, "guidance_schedule"),
        ({"num_inference_steps": 0}, "at least 2 steps"),
        ({"num_inference_steps": -2, "solver": "euler"}, "at least 1 steps"),
        ({"num_inference_steps": [3, 3]}, "one for each of 4 entities"),
        ({"solver": "heun"}, "solver"),
        ({"grid": (8, 8)}, "learned the positions of a 4x4 grid"),
        ({"generator": seeds(1)}, "1 generators for 3 images"),
        ({"num_images": 3}, "not both"),
    ],
)
def test_bad_settings_are_named_at_once(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build().sample(LABELS, **arguments)


def test_bad_conditions_and_modes_are_named() -> None:
    model = build()
    for condition, message in (
        (torch.tensor([10]), r"0\.\.9; got 10"),
        (torch.tensor([0.5]), "int64"),
        (torch.zeros(0, dtype=torch.int64), "at least one"),
        ("cat", "not str"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            model.sample(condition)
    with pytest.raises(InvalidInputError, match="give a condition"):
        model.sample()
    with pytest.raises(InvalidInputError, match="guidance needs a condition"):
        model.sample(num_images=2, guidance_scale=2.0)
    with pytest.raises(InvalidInputError, match="null class"):
        build(condition_dropout=0.0).sample(LABELS, guidance_scale=2.0)
    with pytest.raises(InvalidInputError, match="training mode"):
        model.train().sample(LABELS)


def test_bad_batches_are_named() -> None:
    model = build()
    batch = batch_of(model)
    with pytest.raises(InvalidInputError, match="latents"):
        model.training_loss({"labels": batch["labels"]})
    with pytest.raises(InvalidInputError, match=r"must be \[B, 4, 4, 4\]"):
        model.training_loss({**batch, "latents": torch.zeros(4, 16, 4, 4)})
    with pytest.raises(InvalidInputError, match="NaN"):
        model.training_loss({**batch, "latents": batch["latents"] * float("inf")})
    with pytest.raises(InvalidInputError, match="class labels"):
        model.training_loss({**batch, "labels": batch["labels"] + 10})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 36}, "divisible by 4"),
        ({"entity_size": 3}, "do not divide"),
        ({"context": "half"}, "context"),
        ({"encoder_layers": 0}, "at least one layer"),
        ({"num_classes": 0}, "at least 1"),
        ({"grid": (4,)}, "grid must be"),
    ],
)
def test_bad_configurations_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        XAR.tiny(**arguments)


def test_damaged_weights_are_noticed() -> None:
    model = build()
    model.pred.bias.data.fill_(float("nan"))
    with pytest.raises(InvalidOutputError, match="NaN"):
        model.generate(LABELS, num_inference_steps=2)
