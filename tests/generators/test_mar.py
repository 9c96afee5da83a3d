"""MAR on tiny random networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.plain import mar as plain
from tests.generators.continuous import build, condition_for, seeds
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.generators.mar import MAR
from vistok.generators.pipeline import GenerationPipeline
from vistok.nn import masked
from vistok.nn.masked import patchify, plan_steps, random_orders, truncated_normal_rate, unpatchify
from vistok.nn.vit import ViTBlock
from vistok.tokenizers.kl import KLModel
from vistok.tokenizers.vq import VQModel
from vistok.tokens import VisualTokens

CONDITIONS = pytest.mark.parametrize("text", [False, True])


# ------------------------------------------------------------------------------------------------------------- schedule
@pytest.mark.parametrize("steps", [1, 4, 16, 64, 256, 300])
def test_every_token_is_drawn_once(steps: int) -> None:
    plan = plan_steps(256, steps)
    assert plan[0].masked == 256
    assert [step.left for step in plan] == [*(step.masked for step in plan[1:]), 0]
    assert all(step.masked > step.left for step in plan)
    assert len(plan) == min(steps, 256)
    shares = [step.share for step in plan]
    assert shares == sorted(shares)
    assert shares[-1] == 255 / 256


def test_the_published_counts() -> None:
    counts = [step.masked - step.left for step in plan_steps(256, 64)]
    assert counts[:18] == [1] * 13 + [2, 3, 2, 2, 3]
    assert counts[-1] in (6, 7)
    assert [step.masked - step.left for step in plan_steps(256, 4)] == [20, 55, 84, 97]
    pivots = [step.masked - step.left for step in plan_steps(64, 32)]
    assert pivots == [1] * 13 + [2, 2, 2, 3, 2, 2, 3, 3, 2] + [3] * 10


def test_a_schedule_is_entered_where_as_many_are_left() -> None:
    whole = plan_steps(256, 16)
    assert plan_steps(256, 16, whole[5].masked) == whole[5:]
    between = plan_steps(256, 16, whole[5].masked - 1)
    assert between[0].masked == whole[5].masked - 1
    assert between[1:] == whole[6:]
    assert plan_steps(256, 16, 0) == []


def test_mask_rates_follow_the_truncated_normal() -> None:
    draws = torch.Generator().manual_seed(0)
    rates = torch.tensor([truncated_normal_rate(0.7, draws) for _ in range(4000)])
    assert 0.7 <= rates.min() < 0.71
    assert 0.99 < rates.max() <= 1.0
    reference = torch.nn.init.trunc_normal_(torch.empty(40000), 1.0, 0.25, 0.7, 1.0)
    assert rates.mean() == pytest.approx(float(reference.mean()), abs=0.01)
    assert rates.std() == pytest.approx(float(reference.std()), abs=0.01)


def test_patches_round_trip() -> None:
    latents = torch.randn(2, 3, 4, 6)
    tokens = patchify(latents, 2)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[:, 1, 4:8], latents[:, 1, :2, 2:4].flatten(1))
    assert torch.equal(unpatchify(tokens, (2, 3), 2), latents)


def test_orders_are_permutations_that_keep_to_their_generator() -> None:
    both = random_orders(2, 20, seeds(1, 2))
    assert (both.sort(1).values == torch.arange(20)).all()
    assert torch.equal(both[1:], random_orders(1, 20, seeds(2)))
    assert not torch.equal(both[0], both[1])


# -------------------------------------------------------------------------------------------------------------- network
def test_the_last_rows_of_a_block() -> None:
    block = ViTBlock(16, 4, 32, norm_eps=1e-6)
    x = torch.randn(2, 7, 16)
    whole = block(x)
    torch.testing.assert_close(block(x, wanted=3), whole[:, -3:])
    torch.testing.assert_close(block(x, block.project(x), 3), whole[:, -3:])
    shuffled = torch.randperm(7)
    torch.testing.assert_close(block(x[:, shuffled]), whole[:, shuffled])


@torch.no_grad()
def test_unknown_tokens_are_not_seen() -> None:
    model = build(MAR)
    tokens, mask = torch.randn(2, 16, 4), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :5] = mask[1, 8:13] = True
    labels = torch.tensor([1, 2])
    before = model(tokens, mask, labels)
    torch.testing.assert_close(model(torch.where(mask[..., None], 9.0, tokens), mask, labels), before)
    assert not torch.isclose(model(torch.where(mask[..., None], tokens, 9.0), mask, labels), before).any(-1).all()
    assert not torch.isclose(model(tokens, mask, torch.tensor([1, 3])), before)[1].all()
    torch.testing.assert_close(
        model(tokens, mask, labels, torch.tensor([False, True]))[1:], model(tokens[1:], mask[1:], None)
    )
    mask[0, 7] = True
    with pytest.raises(InvalidInputError, match=r"same number of unknown tokens; got \[6, 5\]"):
        model(tokens, mask, labels)


@torch.no_grad()
def test_a_caption_without_words_is_no_condition() -> None:
    model = build(MAR, text=True)
    text = condition_for(model, 2)
    text.mask[1] = False
    context = model.context(text)
    torch.testing.assert_close(context[1:], model.context(None))
    assert not torch.isclose(context[0], context[1]).all()


# ------------------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize(
    ("guidance_scale", "schedule", "steps"),
    [(1.0, "linear", 5), (2.5, "linear", 5), (2.5, "constant", 5), (2.5, "linear", 1), (2.5, "linear", 20)],
)
def test_samples_equal_the_plain_algorithm(guidance_scale: float, schedule: str, steps: int) -> None:
    model = build(MAR, encoder_layers=3, decoder_layers=2 if steps > 1 else 1)
    labels = torch.tensor([3, 0, 3])
    settings = {
        "guidance_scale": guidance_scale,
        "guidance_schedule": schedule,
        "num_inference_steps": steps,
        "temperature": 0.9,
    }
    ours = model.generate(labels, generator=seeds(1, 2, 3), **settings).features
    torch.testing.assert_close(
        ours, plain.generate(model, labels, generator=seeds(1, 2, 3), **settings), rtol=1e-4, atol=1e-4
    )


@CONDITIONS
def test_an_image_depends_on_its_seed_and_not_on_the_batch(text: bool) -> None:
    model = build(MAR, text=text)
    condition = condition_for(model)
    settings = {"guidance_scale": 2.0, "num_inference_steps": 6}
    whole = model.generate(condition, generator=seeds(1, 2, 3), **settings).features
    again = model.generate(condition, generator=seeds(1, 2, 3), **settings).features
    assert torch.equal(whole, again)
    one = condition_for(model, 1)
    alone = model.generate(one, generator=seeds(1), **settings).features
    torch.testing.assert_close(alone, whole[:1], rtol=1e-4, atol=1e-4)
    other = model.generate(one, generator=seeds(2), **settings).features
    assert not torch.isclose(other, alone).all()


def test_steps_say_what_changed() -> None:
    model = build(MAR)
    steps = list(model.sample(torch.tensor([1, 2]), num_inference_steps=5, generator=seeds(1, 2)))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert {step.total for step in steps} == {5}
    seen = torch.zeros(2, 16, dtype=torch.bool)
    before = torch.zeros(2, 16, 4)
    for step in steps:
        assert not seen.gather(1, step.changed).any()
        seen.scatter_(1, step.changed, True)
        assert torch.equal(step.tokens.mask, seen)
        assert torch.equal(step.tokens.features[~seen], torch.zeros(int((~seen).sum()), 4))
        same = seen.scatter(1, step.changed, False)
        assert torch.equal(step.tokens.features[same], before[same])
        before = step.tokens.features
    assert seen.all()


@CONDITIONS
def test_known_tokens_are_kept_and_heard(text: bool) -> None:
    model = build(MAR, text=text)
    condition = condition_for(model, 2)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :4] = mask[1, [3, 7, 11, 15]] = True
    prefix = VisualTokens(features=torch.randn(2, 16, 4), grid=(4, 4), mask=mask)
    settings = {"guidance_scale": 1.5, "num_inference_steps": 6}
    steps = list(model.sample(condition, prefix=prefix, generator=seeds(1, 2), **settings))
    tokens = steps[-1].tokens
    assert torch.equal(tokens.features[mask], prefix.features[mask])
    assert sorted(torch.cat([step.changed[0] for step in steps]).tolist()) == list(range(4, 16))
    other = VisualTokens(features=prefix.features + 1.0, grid=(4, 4), mask=mask)
    changed = model.generate(condition, prefix=other, generator=seeds(1, 2), **settings).features
    assert not torch.isclose(changed[~mask], tokens.features[~mask]).all()
    corner = VisualTokens(features=torch.randn(2, 2, 4), grid=(1, 2))
    grown = model.generate(condition, prefix=corner, generator=seeds(1, 2), **settings).features
    assert torch.equal(grown[:, :2], corner.features)
    full = VisualTokens(features=torch.randn(2, 16, 4), grid=(4, 4))
    assert list(model.sample(condition, prefix=full)) == []
    assert torch.equal(model.generate(condition, prefix=full).features, full.features)


def test_guidance_schedules() -> None:
    model = build(MAR)
    labels, settings = torch.tensor([1, 2]), {"num_inference_steps": 4}

    def draw(**more: Any) -> Tensor:
        return model.generate(labels, generator=seeds(1, 2), **{**settings, **more}).features

    plain_images = draw()
    assert not torch.isclose(draw(guidance_scale=3.0), plain_images).all()
    shares: list[float] = []

    def none(share: float) -> float:
        shares.append(share)
        return 1.0

    torch.testing.assert_close(draw(guidance_scale=3.0, guidance_schedule=none), plain_images, rtol=1e-4, atol=1e-4)
    assert shares == [step.share for step in plan_steps(16, 4)]
    linear = draw(guidance_scale=3.0, guidance_schedule=lambda share: 1.0 + 2.0 * share)
    torch.testing.assert_close(linear, draw(guidance_scale=3.0))
    # A scale of 0 is the unconditional model.
    without = model.generate(num_images=2, generator=seeds(1, 2), **settings).features
    torch.testing.assert_close(
        draw(guidance_scale=0.0, guidance_schedule="constant", temperature=0.0),
        model.generate(num_images=2, generator=seeds(1, 2), temperature=0.0, **settings).features,
        rtol=1e-4,
        atol=1e-4,
    )
    assert not torch.isclose(without, plain_images).all()


def test_redundant_rows_are_not_computed() -> None:
    model = build(MAR)
    encoded: list[int] = []
    written: list[tuple[int, int]] = []
    model.encoder_norm.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    model.decoder_norm.register_forward_hook(
        lambda module, inputs, output: written.append((output.shape[0], output.shape[1]))
    )
    steps = list(
        model.sample(torch.tensor([1, 1, 2]), guidance_scale=2.0, num_inference_steps=4, generator=seeds(1, 2, 3))
    )
    drawn = [step.changed.shape[1] for step in steps]
    # First two classes and "no class", once each and everywhere; then 6 rows, where tokens are drawn.
    assert encoded == [3, 6, 6, 6]
    assert written == [(3, 16), *((6, count) for count in drawn[1:])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition": torch.tensor([10])}, r"0\.\.9"),
        ({"condition": torch.tensor([1.0])}, "int64"),
        ({"condition": torch.tensor([], dtype=torch.int64)}, "at least one"),
        ({}, "num_images"),
        ({"condition": torch.tensor([1]), "num_images": 2}, "not both"),
        ({"num_images": 0}, "at least 1"),
        ({"num_images": 2, "guidance_scale": 2.0}, "needs a condition"),
        ({"num_images": 2, "guidance_scale": -1.0}, "guidance_scale"),
        ({"num_images": 2, "guidance_scale": float("nan")}, "guidance_scale"),
        ({"num_images": 2, "guidance_schedule": "cosine"}, "'linear' or 'constant'"),
        ({"num_images": 2, "temperature": -0.5}, "temperature"),
        ({"num_images": 2, "num_inference_steps": 0}, "num_inference_steps"),
        ({"num_images": 2, "num_diffusion_steps": "0"}, "at least one diffusion step"),
        ({"num_images": 2, "num_diffusion_steps": -3}, "diffusion steps must be"),
        ({"num_images": 2, "grid": (8, 8)}, "4x4 grid"),
        ({"num_images": 2, "generator": seeds(1)}, "1 generators for 2 images"),
        ({"num_images": 2, "prefix": VisualTokens(features=torch.ones(1, 16, 4), grid=(4, 4))}, "1 images"),
        ({"num_images": 1, "prefix": VisualTokens(features=torch.ones(1, 16, 5), grid=(4, 4))}, "5 channels"),
        ({"num_images": 1, "prefix": VisualTokens(features=torch.ones(1, 25, 4), grid=(5, 5))}, "5x5"),
        ({"num_images": 1, "prefix": VisualTokens(features=torch.full((1, 16, 4), torch.nan), grid=(4, 4))}, "NaN"),
        (
            {
                "num_images": 2,
                "prefix": VisualTokens(
                    features=torch.ones(2, 16, 4), grid=(4, 4), mask=torch.arange(32).view(2, 16) < 20
                ),
            },
            "same number",
        ),
    ],
)
def test_bad_calls_say_what_was_expected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build(MAR).sample(**arguments)


def test_models_that_cannot_sample_say_so() -> None:
    with pytest.raises(InvalidInputError, match="training mode"):
        build(MAR).train().sample(torch.tensor([1]))
    with pytest.raises(InvalidInputError, match="without condition dropout"):
        build(MAR, condition_dropout=0.0).sample(torch.tensor([1]), guidance_scale=2.0)
    broken = build(MAR)
    broken.decoder_norm.weight.data.fill_(torch.nan)
    with pytest.raises(InvalidOutputError, match="damaged"):
        broken.generate(torch.tensor([1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_hidden_size": 30}, "multiple of encoder_heads"),
        ({"num_classes": None}, "neither"),
        ({"caption_dim": 5}, "both"),
        ({"num_diffusion_steps": "2000"}, "no 2000"),
        ({"grid": (4,)}, "grid"),
        ({"decoder_layers": 0}, "at least one layer"),
        ({"num_condition_tokens": 0}, "num_condition_tokens"),
    ],
)
def test_configurations_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        MAR.tiny(**arguments)


# ------------------------------------------------------------------------------------------------------------- training
@CONDITIONS
def test_training_lowers_the_loss(text: bool) -> None:
    model = build(MAR, text=text, attention_dropout=0.0, projection_dropout=0.0).train()
    condition = condition_for(model, 4)
    batch: dict[str, Any] = {"latents": torch.randn(4, 4, 4, 4, generator=seeds(0)[0]) * 0.3 + 1.0}
    batch |= {"text_features": condition.features, "text_mask": condition.mask} if text else {"labels": condition}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draws = seeds(1)[0]
    losses = []
    for _ in range(25):
        loss = model.training_loss(batch, generator=draws)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_velocity_weights_raise_the_loss_and_unknown_ones_are_refused() -> None:
    batch = {"latents": torch.randn(2, 4, 4, 4), "labels": torch.tensor([1, 2])}
    plain, weighted = MAR.tiny(), MAR.tiny(loss_weighting="velocity")
    weighted.load_state_dict(plain.state_dict())
    losses = [model.training_loss(batch, generator=seeds(3)[0])["loss"].item() for model in (plain, weighted)]
    assert losses[1] > 1.2 * losses[0]  # every weight is at least 1
    with pytest.raises(InvalidInputError, match="loss_weighting must be one of epsilon, velocity"):
        MAR.tiny(loss_weighting="snr")


def test_positions_start_as_sinusoids_on_request() -> None:
    torch.manual_seed(0)
    plain = MAR.tiny().state_dict()
    torch.manual_seed(0)
    placed = MAR.tiny(position_init="sinusoid").state_dict()
    changed = {name for name, value in plain.items() if not torch.equal(value, placed[name])}
    assert changed == {f"{name}_pos_embed_learned" for name in ("encoder", "decoder", "diffusion")}
    cells = placed["encoder_pos_embed_learned"][0, 4:].view(4, 4, -1)  # after four condition tokens
    assert torch.equal(plain["encoder_pos_embed_learned"][:, :4], placed["encoder_pos_embed_learned"][:, :4])
    assert torch.equal(cells[0, :, :16], cells[3, :, :16])  # the first half tells the column
    assert torch.equal(cells[:, 1, 16:], cells[:, 2, 16:])
    assert len(cells.flatten(0, 1).unique(dim=0)) == 16
    with pytest.raises(InvalidInputError, match="position_init must be one of normal, sinusoid"):
        MAR.tiny(position_init="zeros")


def test_the_loss_is_that_of_masked_tokens_and_seeded() -> None:
    model = build(MAR)
    latents = torch.randn(2, 4, 4, 4)
    batch = {"latents": latents, "labels": torch.tensor([1, 2])}
    loss = model.training_loss(batch, generator=seeds(3)[0])["loss"]
    assert torch.equal(loss, model.training_loss(batch, generator=seeds(3)[0])["loss"])
    tokens = {"features": patchify(latents, 1), "labels": batch["labels"]}
    assert torch.equal(loss, model.training_loss(tokens, generator=seeds(3)[0])["loss"])
    order = torch.arange(16).repeat(2, 1)
    with (
        mock.patch.object(masked, "random_orders", return_value=order),
        mock.patch.object(masked, "truncated_normal_rate", return_value=0.75),
    ):
        loss = model.training_loss(batch, generator=seeds(3)[0])["loss"]
        mask = order < 12
        z = model(tokens["features"], mask, batch["labels"])[mask]
        expected = model.diffloss.loss(tokens["features"][mask], z, repeats=4, generator=seeds(3)[0])
    torch.testing.assert_close(loss, expected)


def test_mixed_precision_and_half_weights() -> None:
    model = build(MAR)
    batch = {"latents": torch.randn(2, 4, 4, 4), "labels": torch.tensor([1, 2])}
    exact = model.training_loss(batch, generator=seeds(3)[0])["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.training_loss(batch, generator=seeds(3)[0])["loss"]
    mixed.backward()
    assert mixed.item() == pytest.approx(exact.item(), rel=0.05)
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.5}
    full = model.generate(batch["labels"], generator=seeds(1, 2), **settings).features
    half = model.to(torch.bfloat16).generate(batch["labels"], generator=seeds(1, 2), **settings).features
    assert half.dtype == torch.float32
    assert float((half - full).norm() / full.norm()) < 0.2


def test_gradient_checkpointing_changes_nothing() -> None:
    model = build(MAR)
    batch = {"latents": torch.randn(2, 4, 4, 4), "labels": torch.tensor([1, 2])}
    grads = []
    for enable in (False, True):
        model.zero_grad()
        if enable:
            model.enable_gradient_checkpointing()
        model.training_loss(batch, generator=seeds(3)[0])["loss"].backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(grads[0]) > 50
    for before, after in zip(*grads):
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": torch.tensor([1])}, "'latents'; got labels"),
        ({"latents": torch.ones(1, 4, 4, 4)}, "'labels'"),
        ({"latents": torch.ones(1, 4, 4, 5), "labels": torch.tensor([1])}, r"\[B, 4, 4, 4\]"),
        ({"features": torch.ones(1, 9, 4), "labels": torch.tensor([1])}, r"\[B, 16, 4\]"),
        ({"latents": torch.full((1, 4, 4, 4), torch.nan), "labels": torch.tensor([1])}, "NaN"),
    ],
)
def test_bad_batches_are_named(batch: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build(MAR).training_loss(batch)


# ------------------------------------------------------------------------------------------------------- official files
def test_training_checkpoints_give_their_averaged_weights(tmp_path: Path) -> None:
    import argparse

    model, averaged = build(MAR), build(MAR)
    averaged.mask_token.data += 1.0
    file = tmp_path / "checkpoint-last.pth"
    content = {"model": model.state_dict(), "model_ema": averaged.state_dict(), "epoch": 3}
    torch.save({**content, "args": argparse.Namespace(lr=1e-4)}, file)
    loaded = MAR.from_official(file, dict(model.config))
    assert torch.equal(loaded.mask_token, averaged.mask_token)
    arguments = MAR.infer_config(content, num_heads=4)
    inferred = MAR.from_official(file, arguments)
    assert inferred.grid == model.grid
    assert {key: model.config[key] for key in arguments} == {**arguments, "grid": model.config.grid}


def test_other_files_are_recognised() -> None:
    model = build(MAR)
    state = model.state_dict()
    with pytest.raises(CheckpointError, match="Hi-MAR checkpoint"):
        MAR.from_official({**state, "cond_tokens": torch.ones(1, 4, 4)}, dict(model.config))
    del state["mask_token"]
    with pytest.raises(CheckpointError, match="1 missing: mask_token"):
        MAR.from_official(state, dict(model.config))
    with pytest.raises(InvalidInputError, match="multiple of vae_stride"):
        MAR.config_from_official({"img_size": 100, "vae_stride": 16})


def test_saved_models_load_again(tmp_path: Path) -> None:
    model = build(MAR)
    model.save_pretrained(tmp_path)
    again = MAR.from_pretrained(tmp_path).eval()
    labels = torch.tensor([1, 2])
    torch.testing.assert_close(
        again.generate(labels, generator=seeds(1, 2)).features, model.generate(labels, generator=seeds(1, 2)).features
    )


# ------------------------------------------------------------------------------------------------------------- pipeline
def pipeline(**overrides: Any) -> GenerationPipeline:
    pipe = GenerationPipeline(
        build(MAR, scaling_factor=1.0, **overrides),
        KLModel.tiny(),
        class_names=[f"thing {index}" for index in range(10)],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pictures_from_classes() -> None:
    pipe = pipeline()
    settings = {"num_inference_steps": 4, "guidance_schedule": "constant", "guidance_scale": 1.5}
    output = pipe(["a thing 3", "thing 4"], generator=seeds(1, 2), **settings)
    assert [image.size for image in output.images] == [(8, 8), (8, 8)]
    assert output.tokens.mask is None
    direct = pipe.generator.generate(torch.tensor([3, 4]), generator=seeds(1, 2), **settings)
    assert torch.equal(output.tokens.features, direct.features)
    previews = list(pipe.stream(class_labels=3, generator=seeds(1), num_inference_steps=4))
    assert len(previews) == 4
    assert previews[0].step.tokens.mask.sum() < 16


def test_callbacks_may_replace_tokens_and_the_run_goes_on() -> None:
    pipe = pipeline()
    seen = []

    def brighten(pipe: Any, index: int, total: int, inputs: dict[str, Any]) -> dict[str, Any]:
        tokens = inputs["tokens"]
        seen.append((index, total, int(tokens.mask[0].sum())))
        if index != 1:
            return {}
        return {"tokens": VisualTokens(features=tokens.features + 1.0, grid=tokens.grid, mask=tokens.mask)}

    output = pipe(class_labels=1, generator=seeds(1)[0], num_inference_steps=4, callback_on_step_end=brighten)
    known = [16 - step.left for step in plan_steps(16, 4)]
    assert seen == [(index, 4, count) for index, count in enumerate(known)]
    assert torch.isfinite(output.tokens.features).all()


def test_saved_pipelines_load_again(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    again = GenerationPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"class_labels": 1, "num_inference_steps": 3, "output_type": "latent"}
    before = pipe(generator=seeds(1), **arguments).images
    torch.testing.assert_close(again(generator=seeds(1), **arguments).images.features, before.features)


def test_wrong_tokenizers_are_named() -> None:
    with pytest.raises(InvalidInputError, match="continuous tokens, but VQModel decodes ids"):
        GenerationPipeline(MAR.tiny(), VQModel.tiny())
    with pytest.raises(InvalidInputError, match="tokens of 4 channels, but KLModel decodes tokens of 16"):
        GenerationPipeline(MAR.tiny(), KLModel.tiny(patch_size=2))
    with pytest.raises(InvalidInputError, match=r"scaled by 0\.2325, but KLModel scales by 1\.0"):
        GenerationPipeline(MAR.tiny(scaling_factor=0.2325), KLModel.tiny())
    with pytest.raises(InvalidInputError, match=r"\['top_k'\] of MAR; known: guidance_scale, guidance_schedule"):
        pipeline()(class_labels=1, top_k=5)


def test_patches_of_several_latents() -> None:
    pipe = GenerationPipeline(build(MAR, patch_size=2, grid=(2, 3)), KLModel.tiny(patch_size=2))
    pipe.set_progress_bar_config(disable=True)
    image = pipe(class_labels=1, generator=seeds(1), num_inference_steps=3).images[0]
    assert image.size == (3 * 2 * 2, 2 * 2 * 2)
