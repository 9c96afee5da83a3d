"""Hi-MAR on tiny random networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.plain import himar as plain
from tests.generators.continuous import GENTLE, build, condition_for, seeds
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.generators.himar import DiffusionTransformer, HiMAR
from vistok.generators.himar.head import TransformerHead, TransformerHeadSampler
from vistok.generators.mar import MAR
from vistok.generators.pipeline import GenerationPipeline
from vistok.nn.masked import grid_places, patchify, plan_steps
from vistok.nn.positions import plane_sinusoids
from vistok.tokenizers.kl import KLModel
from vistok.tokens import VisualTokens

CONDITIONS = pytest.mark.parametrize("text", [False, True])
HEADS = pytest.mark.parametrize("dense_head", ["transformer", "mlp"])


def himar(**overrides: Any) -> HiMAR:
    return build(HiMAR, **{"num_dense_diffusion_steps": GENTLE, **overrides})


def images(count: int = 2, seed: int = 0) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(count, 4, 4, 4, generator=draws),
        "pivot_latents": torch.randn(count, 4, 2, 2, generator=draws),
    }


# ----------------------------------------------------------------------------------------------------------------- head
def transformer(patch_size: int = 1) -> DiffusionTransformer:
    torch.manual_seed(0)
    net = DiffusionTransformer((4, 6), patch_size, 3, 8, 2, 16, 4, 4.0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


def test_positions_tell_columns_then_rows() -> None:
    table = plane_sinusoids(grid_places((2, 3)), 8)
    assert table.shape == (6, 8)
    assert torch.equal(table[0], torch.tensor([0.0, 0.0, 1.0, 1.0] * 2))
    torch.testing.assert_close(
        table[1, :4],
        torch.tensor([1.0, 0.01, 1.0, 0.01])
        .sin()
        .where(torch.tensor([True, True, False, False]), torch.tensor([1.0, 0.01, 1.0, 0.01]).cos()),
    )
    assert torch.equal(table[1, 4:], table[0, 4:])  # the same row
    assert torch.equal(table[4, :4], table[1, :4])  # the same column


@torch.no_grad()
def test_patches_are_convolutions() -> None:
    net = transformer(patch_size=2)
    x, z = torch.randn(2, 3, 4, 6), torch.randn(2, 8, 4, 6)
    expected = net.x_embedder.proj(x).flatten(2).mT + net.pos_embed
    torch.testing.assert_close(net.embed(x), expected)
    torch.testing.assert_close(net.c_embedder(patchify(z, 2)), net.c_embedder.proj(z).flatten(2).mT)
    assert net(x, torch.tensor([3, 500]), patchify(z, 2)).shape == x.shape


@torch.no_grad()
def test_known_latents_are_heard_and_kept_out_of_the_state() -> None:
    net, shape = transformer(), (2, 3, 4, 6)
    draw = TransformerHeadSampler(net, GENTLE)
    z, known, unknown = torch.randn(4, 24, 8), torch.randn(shape), torch.rand(2, 1, 4, 6) > 0.4
    arguments: dict[str, Any] = {"guidance_scale": 2.0, "unknown": unknown}
    first = draw(z, shape, generator=seeds(1, 2), known=known, **arguments)
    hidden = torch.where(unknown, 7.0, known)  # values at unknown places are not read
    second = draw(z, shape, generator=seeds(1, 2), known=hidden, **arguments)
    assert torch.equal(first, second)
    third = draw(z, shape, generator=seeds(1, 2), known=known + 1.0, **arguments)
    assert not torch.isclose(third, first)[unknown.expand(shape)].all()
    alone = draw(z[[1, 3]], (1, 3, 4, 6), generator=seeds(2), known=known[1:], guidance_scale=2.0, unknown=unknown[1:])
    torch.testing.assert_close(alone, first[1:], rtol=1e-4, atol=1e-4)


def test_a_new_transformer_predicts_no_noise() -> None:
    head = TransformerHead((4, 4), 3, 8, 2, 16, 4, 4.0)
    head.initialise()
    condition = torch.randn(2, 16, 8)
    assert not head.net(torch.randn(2, 3, 4, 4), torch.tensor([1, 900]), condition).any()
    mask = torch.zeros(2, 1, 4, 4)
    assert head.loss(torch.randn(2, 3, 4, 4), condition, mask) == 0  # nothing is unknown
    mask[:, :, :2] = 1.0
    half = head.loss(torch.randn(2, 3, 4, 4), condition, mask, repeats=64)
    assert half.item() == pytest.approx(0.5, abs=0.1)  # over all latents, half of which count


# -------------------------------------------------------------------------------------------------------------- network
def test_a_new_block_is_a_plain_one() -> None:
    model = HiMAR.tiny()
    phase = model.phase(1)
    x = torch.randn(2, 5, 32)
    block = model.encoder_blocks[0]
    torch.testing.assert_close(block(x, scales=phase.encoder_scales[0]), block(x))
    block.adaLN_scale.data.normal_()
    before, after = (block(x, scales=model.phase(index).encoder_scales[0]) for index in (0, 1))
    assert not torch.isclose(before, after).all()


@torch.no_grad()
def test_states_come_from_what_is_visible() -> None:
    model = himar()
    batch = images()
    pivots, dense = patchify(batch["pivot_latents"], 1), patchify(batch["latents"], 1)
    context = model.context(torch.tensor([1, 2]))
    visible, wanted = torch.tensor([[0], [3]]), torch.tensor([[1, 2, 3], [0, 1, 2]])
    states = model.pivot_states(pivots, visible, wanted, context)
    other = pivots.scatter(1, wanted[..., None].expand(-1, -1, 4), 9.0)
    assert torch.equal(model.pivot_states(other, visible, wanted, context), states)
    seen = pivots.scatter(1, visible[..., None].expand(-1, -1, 4), 9.0)
    assert not torch.isclose(model.pivot_states(seen, visible, wanted, context), states).all()
    known, hidden = torch.tensor([[0, 5], [1, 2]]), torch.arange(16).repeat(2, 1)
    hidden = torch.stack([row[~torch.isin(row, seen)] for row, seen in zip(hidden, known)])
    stand_ins = torch.randn(2, 4, 32)
    every = model.dense_states(dense, known, hidden, stand_ins, context, every=True)
    some = model.dense_states(dense, known, hidden, stand_ins, context, every=False)
    torch.testing.assert_close(every.gather(1, hidden[..., None].expand(-1, -1, 32)), some)
    moved = model.dense_states(dense, known, hidden, torch.randn(2, 4, 32), context, every=False)
    assert not torch.isclose(moved, some).all()


# ------------------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize(
    ("scales", "steps"), [((1.0, 1.0), 3), ((2.5, 1.0), 3), ((1.0, 2.0), 3), ((2.5, 2.0), 1), ((2.5, 2.0), 20)]
)
def test_samples_equal_the_plain_algorithm(scales: tuple[float, float], steps: int) -> None:
    model = himar(encoder_layers=3, decoder_layers=2 if steps > 1 else 1)
    labels = torch.tensor([3, 0, 3])
    settings: dict[str, Any] = {
        "guidance_scale": scales[0],
        "pivot_guidance_scale": scales[1],
        "num_inference_steps": steps,
        "temperature": 0.9,
    }
    ours = list(model.sample(labels, generator=seeds(1, 2, 3), **settings))
    pivots, tokens = plain.generate(model, labels, generator=seeds(1, 2, 3), **settings)
    last = [step for step in ours if step.tokens.grid == (2, 2)][-1]
    torch.testing.assert_close(last.tokens.features, pivots, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[-1].tokens.features, tokens, rtol=1e-4, atol=1e-4)


@CONDITIONS
@HEADS
def test_an_image_depends_on_its_seed_and_not_on_the_batch(text: bool, dense_head: str) -> None:
    model = himar(text=text, dense_head=dense_head)
    settings = {"guidance_scale": 2.0, "num_inference_steps": 3}
    whole = model.generate(condition_for(model), generator=seeds(1, 2, 3), **settings).features
    again = model.generate(condition_for(model), generator=seeds(1, 2, 3), **settings).features
    assert torch.equal(whole, again)
    one = condition_for(model, 1)
    alone = model.generate(one, generator=seeds(1), **settings).features
    torch.testing.assert_close(alone, whole[:1], rtol=1e-4, atol=1e-4)
    assert not torch.isclose(model.generate(one, generator=seeds(2), **settings).features, alone).all()


@HEADS
def test_steps_show_pivots_and_then_the_image(dense_head: str) -> None:
    model = himar(dense_head=dense_head)
    steps = list(model.sample(torch.tensor([1, 2]), num_inference_steps=3, generator=seeds(1, 2)))
    assert [step.index for step in steps] == list(range(7))
    assert {step.total for step in steps} == {7}
    assert [step.tokens.grid for step in steps] == [(2, 2)] * 4 + [(4, 4)] * 3
    for phase in (steps[:4], steps[4:]):
        seen = torch.zeros_like(phase[0].tokens.mask)
        before = torch.zeros_like(phase[0].tokens.features)
        for step in phase:
            assert not seen.gather(1, step.changed).any()
            assert torch.equal(step.tokens.features[seen], before[seen])
            seen.scatter_(1, step.changed, True)
            assert torch.equal(step.tokens.mask, seen)
            assert not step.tokens.features[~seen].any()
            before = step.tokens.features
        assert seen.all()
    fewer = list(model.sample(torch.tensor([1]), num_inference_steps=2, num_pivot_steps=2, generator=seeds(1)))
    assert [step.tokens.grid for step in fewer] == [(2, 2)] * 2 + [(4, 4)] * 2


@HEADS
def test_known_tokens_are_kept_and_heard(dense_head: str) -> None:
    model = himar(dense_head=dense_head)
    condition = condition_for(model, 2)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :4] = mask[1, [3, 7, 11, 15]] = True
    prefix = VisualTokens(features=torch.randn(2, 16, 4), grid=(4, 4), mask=mask)
    settings = {"guidance_scale": 1.5, "num_inference_steps": 4, "generator": None}
    settings["generator"] = seeds(1, 2)
    tokens = model.generate(condition, prefix=prefix, **settings)
    assert torch.equal(tokens.features[mask], prefix.features[mask])
    settings["generator"] = seeds(1, 2)
    other = VisualTokens(features=prefix.features + 1.0, grid=(4, 4), mask=mask)
    changed = model.generate(condition, prefix=other, **settings)
    assert not torch.isclose(changed.features[~mask], tokens.features[~mask]).all()
    full = VisualTokens(features=torch.randn(2, 16, 4), grid=(4, 4))
    assert torch.equal(model.generate(condition, prefix=full).features, full.features)
    with pytest.raises(InvalidInputError, match="pivots cannot be given"):
        model.sample(condition, prefix=VisualTokens(features=torch.randn(2, 4, 4), grid=(2, 2)))


def test_hidden_states_carry_the_pivots_into_the_image() -> None:
    model = himar()
    arguments: dict[str, Any] = {"num_inference_steps": 2, "temperature": 0.0}
    before = model.generate(torch.tensor([1]), generator=seeds(1), **arguments).features
    model.cond_z_proj.weight.data.zero_()
    after = model.generate(torch.tensor([1]), generator=seeds(1), **arguments).features
    assert not torch.isclose(before, after).all()


def test_redundant_rows_are_not_computed() -> None:
    model = himar()
    encoded: list[int] = []
    written: list[tuple[int, int]] = []
    model.encoder_norm.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    model.decoder_norm.register_forward_hook(
        lambda module, inputs, output: written.append((output.shape[0], output.shape[1]))
    )
    settings = {"guidance_scale": 2.0, "num_inference_steps": 2, "num_pivot_steps": 3}
    list(model.sample(torch.tensor([1, 1, 2]), generator=seeds(1, 2, 3), **settings))
    drawn = [step.masked - step.left for step in plan_steps(4, 3)]
    assert encoded == [3, 6, 6, 6, 6]
    assert written == [(3, 4), *((6, count) for count in drawn[1:]), (6, 16), (6, 16)]


@HEADS
def test_half_precision_weights(dense_head: str) -> None:
    model = himar(dense_head=dense_head)
    exact = model.generate(torch.tensor([1]), generator=seeds(1), guidance_scale=1.5, num_inference_steps=2).features
    half = model.to(torch.bfloat16)
    tokens = half.generate(torch.tensor([1]), generator=seeds(1), guidance_scale=1.5, num_inference_steps=2).features
    assert tokens.dtype == torch.float32
    assert float((tokens - exact).norm() / exact.norm()) < 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition": torch.tensor([10])}, r"0\.\.9"),
        ({}, "num_images"),
        ({"num_images": 2, "pivot_guidance_scale": 2.0}, "needs a condition"),
        ({"num_images": 2, "pivot_guidance_scale": -1.0}, "pivot_guidance_scale"),
        ({"num_images": 2, "num_pivot_steps": 0}, "num_pivot_steps"),
        ({"num_images": 2, "num_inference_steps": 0}, "num_inference_steps"),
        ({"num_images": 2, "num_dense_diffusion_steps": "x"}, "diffusion steps must be"),
        ({"num_images": 2, "num_diffusion_steps": 0}, "at least one diffusion step"),
        ({"num_images": 2, "grid": (2, 2)}, "4x4 grid"),
    ],
)
def test_bad_calls_say_what_was_expected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        himar().sample(**arguments)


def test_nan_weights_are_noticed() -> None:
    broken = himar()
    broken.cond_diffloss.net.final_layer.linear.weight.data.fill_(torch.nan)
    with pytest.raises(InvalidOutputError, match="damaged"):
        broken.generate(torch.tensor([1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dense_head": "unet"}, "transformer, mlp"),
        ({"dense_mask_ratio": "linear"}, "cosine, truncated_normal"),
        ({"pivot_grid": (2, 0)}, "pivot_grid"),
        ({"dense_head_heads": 5}, "dense_head_heads 5"),
        ({"num_dense_diffusion_steps": "0"}, "at least one diffusion step"),
        ({"encoder_heads": 5}, "multiple of encoder_heads"),
    ],
)
def test_configurations_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        HiMAR.tiny(**arguments)


# ------------------------------------------------------------------------------------------------------------- training
@CONDITIONS
@HEADS
def test_training_lowers_the_loss(text: bool, dense_head: str) -> None:
    ratio = "truncated_normal" if text else "cosine"
    model = himar(
        text=text, dense_head=dense_head, dense_mask_ratio=ratio, attention_dropout=0.0, projection_dropout=0.0
    ).train()
    condition = condition_for(model, 4)
    batch: dict[str, Any] = {key: value * 0.3 + 1.0 for key, value in images(4).items()}
    batch |= {"text_features": condition.features, "text_mask": condition.mask} if text else {"labels": condition}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    draws = seeds(1)[0]
    losses = []
    for _ in range(20):
        parts = model.training_loss(batch, generator=draws)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    shares = 0.4 * parts["pivot_loss"] + 0.6 * parts["dense_loss"]
    torch.testing.assert_close(parts["loss"].detach(), shares)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert {name for name, value in model.named_parameters() if value.grad is None} == set()


@HEADS
def test_training_in_mixed_precision(dense_head: str) -> None:
    model, batch = himar(dense_head=dense_head).train(), images()
    batch["labels"] = torch.tensor([1, 2])
    exact = model.eval().training_loss(batch, generator=seeds(3)[0])["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.training_loss(batch, generator=seeds(3)[0])["loss"]
    mixed.backward()
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(exact.item(), rel=0.05)


def test_pivots_in_training() -> None:
    model = himar(pivot_rate=1.0)
    states, predicted = torch.randn(3, 2, 32), torch.tensor([[0, 1], [2, 3], [1, 3]])
    mixed = model.training_pivots(states, predicted, None)
    placeholders = model.cond_proj(model.cond_tokens)[0]
    torch.testing.assert_close(mixed[0, :2], model.cond_z_proj(states[0]))
    torch.testing.assert_close(mixed[0, 2:], placeholders[2:])
    model.epoch = 0
    torch.testing.assert_close(model.training_pivots(states, predicted, None)[0], placeholders)
    rates = []
    for epoch in (0, 50, 100, 400, None):
        model.epoch = epoch
        rates.append(model.placeholder_rate)
    assert rates == [1.0, 0.5, 0.0, 0.0, 0.0]
    states.requires_grad_()
    mixed = model.training_pivots(states, predicted, None)
    (gradient,) = torch.autograd.grad(mixed.sum(), states, allow_unused=True)
    assert gradient is None  # the dense phase does not train the pivot phase


@HEADS
def test_velocity_weights_raise_both_losses_and_unknown_ones_are_refused(dense_head: str) -> None:
    batch = {**images(), "labels": torch.tensor([1, 2])}
    plain = himar(dense_head=dense_head)
    weighted = himar(dense_head=dense_head, loss_weighting="velocity")
    weighted.load_state_dict(plain.state_dict())
    first, second = (model.training_loss(batch, generator=seeds(3)[0]) for model in (plain, weighted))
    assert all(second[name] > 1.1 * first[name] for name in ("loss", "pivot_loss", "dense_loss"))
    with pytest.raises(InvalidInputError, match="loss_weighting must be one of epsilon, velocity"):
        himar(loss_weighting="snr")


def test_sinusoids_place_a_pivot_amid_its_dense_tokens_in_both_phases() -> None:
    model = HiMAR.tiny(position_init="sinusoid")
    pivots, dense = 4, 16
    for name, before in (("encoder", 4), ("decoder", 4), ("diffusion", 0)):
        table = getattr(model, f"{name}_pos_embed_learned").detach()[0].unflatten(0, (-1, before + pivots + dense))
        for phase in table[:, before:]:
            assert torch.equal(phase, table[0, before:])
            middles = torch.tensor([[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]])
            assert torch.allclose(phase[:pivots], plane_sinusoids(middles, 32))
            assert torch.allclose(phase[pivots:], plane_sinusoids(grid_places((4, 4)), 32))


def test_losses_are_seeded_and_take_tokens() -> None:
    model, batch = himar(), images()
    batch["labels"] = torch.tensor([1, 2])
    loss = model.training_loss(batch, generator=seeds(3)[0])["loss"]
    assert torch.equal(loss, model.training_loss(batch, generator=seeds(3)[0])["loss"])
    tokens = {
        "features": patchify(batch["latents"], 1),
        "pivot_features": patchify(batch["pivot_latents"], 1),
        "labels": batch["labels"],
    }
    assert torch.equal(loss, model.training_loss(tokens, generator=seeds(3)[0])["loss"])
    with pytest.raises(InvalidInputError, match="'pivot_latents'; got labels, latents"):
        model.training_loss({"latents": batch["latents"], "labels": batch["labels"]})
    with pytest.raises(InvalidInputError, match=r"pivot_latents must be \[B, 4, 2, 2\]"):
        model.training_loss({**batch, "pivot_latents": batch["latents"]})
    with pytest.raises(InvalidInputError, match="1 images of pivots for 2 images"):
        model.training_loss({**batch, "pivot_latents": batch["pivot_latents"][:1]})


# ------------------------------------------------------------------------------------------------------- official files
def test_training_checkpoints_give_their_averaged_weights(tmp_path: Path) -> None:
    model, averaged = himar(), himar()
    averaged.mask_token.data += 1.0
    file = tmp_path / "checkpoint-last.pth"
    unused = {"cond_diffloss.net.c_pos_embed": torch.zeros(1, 16, 32)}
    content = {"model": model.state_dict(), "model_ema": {**averaged.state_dict(), **unused}, "epoch": 3}
    torch.save(content, file)
    arguments = HiMAR.infer_config(content, num_heads=4, dense_head_heads=4)
    loaded = HiMAR.from_official(file, arguments)
    assert torch.equal(loaded.mask_token, averaged.mask_token)
    assert {key: model.config[key] for key in arguments if "grid" not in key} == {
        key: value for key, value in arguments.items() if "grid" not in key
    }
    assert (loaded.grid, loaded.pivot_grid) == (model.grid, model.pivot_grid)


def test_other_files_are_recognised() -> None:
    with pytest.raises(CheckpointError, match="this is a MAR checkpoint"):
        HiMAR.from_official(MAR.tiny().state_dict(), dict(HiMAR.tiny().config))
    with pytest.raises(CheckpointError, match="this is a Hi-MAR checkpoint"):
        MAR.from_official(HiMAR.tiny().state_dict(), dict(MAR.tiny().config))
    with pytest.raises(InvalidInputError, match="patch_size=1; got 2"):
        HiMAR.config_from_official({"img_size": 256, "patch_size": 2})
    with pytest.raises(InvalidInputError, match="decoder_embed_dim=768; got 512"):
        HiMAR.config_from_official({"img_size": 256, "encoder_embed_dim": 768, "decoder_embed_dim": 512})


# ------------------------------------------------------------------------------------------------------------- pipeline
@CONDITIONS
def test_pictures(text: bool, tmp_path: Path) -> None:
    model = himar(text=text, scaling_factor=1.0)
    pipe = GenerationPipeline(model, KLModel.tiny())
    pipe.set_progress_bar_config(disable=True)
    condition = condition_for(model, 2)
    request = {"prompt_embeds": condition} if text else {"class_labels": condition}
    settings = {"num_inference_steps": 2, "pivot_guidance_scale": 2.0, "num_pivot_steps": 2}
    output = pipe(**request, generator=seeds(1, 2), **settings)
    assert [image.size for image in output.images] == [(8, 8), (8, 8)]
    direct = model.generate(condition, generator=seeds(1, 2), **settings)
    assert torch.equal(output.tokens.features, direct.features)
    previews = list(pipe.stream(**request, generator=seeds(1, 2), **settings))
    assert [preview.images[0].size for preview in previews] == [(4, 4), (4, 4), (8, 8), (8, 8)]
    pipe.save_pretrained(tmp_path)
    again = GenerationPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    reloaded = again(**request, generator=seeds(1, 2), **settings).tokens.features
    torch.testing.assert_close(reloaded, direct.features, rtol=1e-3, atol=1e-3)


def test_small_images_are_not_antialiased() -> None:
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 3, 16, 16)
    small = HiMAR.pivot_images(stripes, (8, 8))
    assert small.shape == (1, 3, 8, 8)
    shifted = HiMAR.pivot_images(stripes.roll(1, -1), (4, 4))
    assert float(shifted.abs().mean()) < 0.1 < float(HiMAR.pivot_images(stripes, (6, 6)).abs().mean())
