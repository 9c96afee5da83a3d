"""The KL tokenizer: against diffusers' own class, scales, patches, caches, objective, bad input, the authors' files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.nn.discriminator import PatchDiscriminator
from vistok.tokenizers.kl import KLLoss, KLModel, load_moments, save_moments, to_uint8
from vistok.tokens import VisualTokens

GOLDEN = Path(__file__).parents[1] / "golden" / "kl16"
KL16 = KLModel.published["kl16.mar"]


def build(**overrides: object) -> KLModel:
    torch.manual_seed(0)
    return KLModel.tiny(**overrides)


def images(batch: int = 2, height: int = 8, width: int = 12, seed: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def plain_vae(model: KLModel) -> AutoencoderKL:
    names = AutoencoderKL._get_init_keys(AutoencoderKL) - {"self"}
    vae = AutoencoderKL(**{name: model.config[name] for name in names}).eval()
    vae.load_state_dict(model.state_dict())
    return vae


# ----------------------------------------------------------------------------------------------------------- inference
def test_it_is_the_function_of_diffusers() -> None:
    model, x = build(scaling_factor=0.5), images()
    vae = plain_vae(model)
    with torch.no_grad():
        mean = vae.encode(x).latent_dist.mode()
        tokens = model.encode(x)
        assert tokens.grid == (4, 6)
        assert torch.equal(model.latents_from_tokens(tokens), mean * 0.5)
        assert torch.equal(model.decode(tokens), vae.decode(mean).sample)


def test_any_diffusers_folder_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=3).eval()
    vae.save_pretrained(tmp_path / "vae")
    # Old configurations lack newer entries: the defaults must then be diffusers', not ours.
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    model = KLModel.from_pretrained(tmp_path / "vae", patch_size=2)
    assert model.config.scaling_factor == 0.18215
    assert (model.token_size, model.downsample_factor) == (12, 2)
    with torch.no_grad():
        expected = vae.encode(images()).latent_dist.mode() * 0.18215
    assert torch.equal(model.latents_from_tokens(model.encode(images())), expected)
    model.save_pretrained(tmp_path / "ours")
    again = KLModel.from_pretrained(tmp_path / "ours")
    assert again.config.patch_size == 2
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), vae.state_dict().values(), strict=True))


def test_sampled_tokens_depend_on_their_own_generator_alone() -> None:
    model, x = build(), images(3)
    mean, std = (getattr(model.posterior(x), name).detach() for name in ("mean", "std"))
    together = model.encode(x, sample=True, generator=seeds(1, 2, 3))
    alone = model.encode(x[1:2], sample=True, generator=seeds(2))
    torch.testing.assert_close(together.features[1:2], alone.features)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    drawn = model.encode(x, sample=True, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(model.latents_from_tokens(drawn), mean + std * noise)
    assert not torch.equal(drawn.features, model.encode(x).features)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_tokens_lay_out_patches_in_raster_order(patch_size: int) -> None:
    model = build(patch_size=patch_size)
    latents = torch.randn(2, 4, 4, 6)
    tokens = model.tokens_from_latents(latents)
    assert tokens.features.shape == (2, 24 // patch_size**2, 4 * patch_size**2)
    assert torch.equal(model.latents_from_tokens(tokens), latents)
    row, col = 1, 1
    corner = latents[:, :, row * patch_size : (row + 1) * patch_size, col * patch_size : (col + 1) * patch_size]
    assert torch.equal(tokens.features[:, row * tokens.grid[1] + col], corner.flatten(1))


@pytest.mark.parametrize(
    "scale",
    [
        {"scaling_factor": 0.2325},
        {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        {"latents_mean": (0.1, -0.2, 0.3, 0.0), "latents_std": (1.0, 2.0, 0.5, 3.0)},
    ],
)
def test_scales_invert(scale: dict) -> None:
    model, latents = build(**scale), torch.randn(2, 4, 3, 3)
    scaled = model.scale_latents(latents)
    torch.testing.assert_close(model.unscale_latents(scaled), latents)
    if "latents_std" in scale:
        torch.testing.assert_close(scaled[:, 1], (latents[:, 1] + 0.2) / 2.0)
    else:
        torch.testing.assert_close(scaled, (latents - scale.get("shift_factor", 0.0)) * scale["scaling_factor"])


def test_slicing_and_tiling_are_diffusers_own() -> None:
    model, x = build(), images(2, 16, 24)
    whole = model.encode(x)
    model.enable_slicing()
    torch.testing.assert_close(model.encode(x).features, whole.features)
    torch.testing.assert_close(model.decode(whole), torch.cat([model.decode(whole[i]) for i in range(2)]))
    model.enable_tiling()
    assert model.encode(x).grid == (8, 12)
    assert model.decode(whole).shape == x.shape


def test_pictures_go_through_in_their_own_size(tmp_path: Path) -> None:
    model = build()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (11, 15, 3), dtype=np.uint8))
    assert model.reconstruct(picture).size == (15, 11)
    picture.save(tmp_path / "a.png")
    assert model.preprocess([tmp_path / "a.png", picture], 8).shape == (2, 3, 8, 8)
    assert model.preprocess(picture).shape == (1, 3, 10, 14)


def test_uint8_rounds_half_to_even_after_scaling() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, 254.5, -3.0, 400.0]) / 255.0 * 2 - 1
    assert to_uint8(values.double().float().view(1, 1, 1, -1).expand(1, 3, 1, -1))[0, 0, :, 0].tolist()[4:] == [0, 255]
    exact = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    assert to_uint8(exact)[0, 0, :, 0].tolist() == [0, 128, 255]  # 127.5 goes to the even neighbour


# ------------------------------------------------------------------------------------------------------ cached moments
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cached_moments_give_the_tokens_of_the_images(tmp_path: Path, dtype: torch.dtype) -> None:
    model, x = build(), images()
    straight, mirrored = model.cached_moments(x)
    save_moments(tmp_path / "a.npz", straight[0].to(dtype), mirrored[0].to(dtype))
    first, flipped = load_moments(tmp_path / "a.npz")
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
    one = model.tokens_from_moments(first[None], sample=False)
    torch.testing.assert_close(one.features, model.encode(x[:1]).features, **tolerance)
    other = model.tokens_from_moments(flipped[None], sample=False)
    torch.testing.assert_close(other.features, model.encode(x[:1].flip(-1)).features, **tolerance)
    with np.load(tmp_path / "a.npz") as archive:
        assert set(archive) == {"moments", "moments_flip"}


def test_damaged_caches_are_refused(tmp_path: Path) -> None:
    save_moments(tmp_path / "a.npz", torch.zeros(8, 2, 2), torch.zeros(8, 2, 2))
    (tmp_path / "short.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    np.savez(tmp_path / "other.npz", moments=np.zeros(3))
    for name in ("short.npz", "other.npz", "missing.npz"):
        with pytest.raises(CheckpointError, match=name):
            load_moments(tmp_path / name)


def test_the_scale_is_measured() -> None:
    model = build()
    batches = [images(4, seed=seed) for seed in range(3)]
    measured = model.measure_latents(batches, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([model.encode(x, sample=True, generator=generator).features for x in batches]).double()
    assert measured.mean == pytest.approx(float(drawn.mean()), abs=1e-6)
    assert measured.scaling_factor == pytest.approx(1 / float(drawn.std(correction=0)), rel=1e-5)
    torch.testing.assert_close(measured.channel_std, drawn.flatten(0, 1).std(0, correction=0), rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidInputError, match="no images"):
        model.measure_latents([])


# ----------------------------------------------------------------------------------------------------------- objective
def test_the_loss_is_error_plus_divergence_an_image() -> None:
    model, x = build(kl_weight=0.5), images()
    losses = model.training_loss({"images": x})  # in eval mode: the mean of the posterior
    posterior = model.posterior(x)
    mean, logvar = posterior.mean, posterior.logvar
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
    torch.testing.assert_close(losses["kl"], 0.5 * divergence.detach() / x[0].numel())
    error = (model.decode(model.encode(x)) - x).square().mean()
    torch.testing.assert_close(losses["reconstruction"], error)
    torch.testing.assert_close(losses["loss"].detach(), losses["kl"] + error)


def test_training_lowers_the_loss_with_and_without_an_adversary() -> None:
    x = images(4, 1, 1).expand(-1, -1, 8, 8).contiguous()  # plain colours
    model = build(block_out_channels=(8, 8)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    first = last = 0.0
    for step in range(20):
        loss = model.training_loss({"images": x}, generator=torch.Generator().manual_seed(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = float(loss.detach())
        first = last if step == 0 else first
    assert last < 0.8 * first
    objective = KLLoss(
        None, PatchDiscriminator(base_channels=8, num_layers=1), reconstruction="l1", adversarial_start=0,
        adaptive_weight=True,
    )  # fmt: skip
    output = model(x)
    losses = objective.generator_turn(x, output.sample, output.bottleneck_loss, 0, model.last_layer)
    assert {"reconstruction", "adversarial", "adaptive_weight", "kl"} <= losses.keys()
    losses["loss"].backward()
    judged = objective.discriminator_turn(x, output.sample, 0)
    assert float(judged["loss"].detach()) > 0


# --------------------------------------------------------------------------------------------------- the authors' files
def test_official_names_go_there_and_back(tmp_path: Path) -> None:
    config = {"embed_dim": 4, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16, 8]}
    config |= {"resolution": 16}
    torch.manual_seed(0)
    model = KLModel(**KLModel.config_from_official(config)).eval()
    official = model.to_official()
    assert "encoder.down.1.attn.0.q.weight" in official
    assert official["encoder.mid.attn_1.proj_out.weight"].shape == (64, 64, 1, 1)
    assert "decoder.up.1.upsample.conv.weight" in official
    torch.save({"model": {**official, "loss.logvar": torch.zeros(1)}}, tmp_path / "kl.ckpt")
    again = KLModel.from_official(tmp_path / "kl.ckpt", config)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    missing = dict(official)
    del missing["decoder.up.1.upsample.conv.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.up_blocks\.0\.upsamplers\.0\.conv\.weight"):
        KLModel.from_official(missing, config)
    with pytest.raises(CheckpointError, match="VQGAN"):
        KLModel.from_official({**official, "quantize.embedding.weight": torch.zeros(2, 2)}, config)
    with pytest.raises(CheckpointError, match="attn_resolutions"):
        KLModel.from_official(official, {**config, "attn_resolutions": [8]})


def test_the_published_keys_are_all_renamed() -> None:
    keys = json.loads((GOLDEN / "manifest_kl16.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}
    with torch.device("meta"):
        expected = AutoencoderKL(**KL16.config).state_dict()
    renamed = KLModel.rename_official(state)
    assert {key: value.shape for key, value in renamed.items()} == {key: v.shape for key, v in expected.items()}
    assert sum(value.numel() for value in renamed.values()) == KL16.parameters


# ----------------------------------------------------------------------------------------------------------- bad input
def test_bad_input_is_named() -> None:
    model = build()
    with pytest.raises(InvalidInputError, match="nearest valid sizes are 8x8"):
        model.encode(torch.zeros(1, 3, 9, 8))
    with pytest.raises(InvalidInputError, match="NaN"):
        model.encode(torch.full((1, 3, 8, 8), float("nan")))
    with pytest.raises(InvalidInputError, match="preprocess"):
        model.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(InvalidInputError, match=r"4 channels, these have 16.*another tokenizer"):
        model.decode(VisualTokens(features=torch.zeros(1, 4, 16), grid=(2, 2)))
    with pytest.raises(InvalidInputError, match="ids of a codebook"):
        model.decode(VisualTokens(ids=torch.zeros(1, 4, dtype=torch.int64), grid=(2, 2)))
    with pytest.raises(InvalidInputError, match="did the generator overflow"):
        model.decode(VisualTokens(features=torch.full((1, 4, 4), float("inf")), grid=(2, 2)))
    with pytest.raises(InvalidInputError, match="without a grid"):
        model.decode(VisualTokens(features=torch.zeros(1, 6, 4)))
    with pytest.raises(InvalidInputError, match="moments must be"):
        model.tokens_from_moments(torch.zeros(1, 4, 2, 2))
    with pytest.raises(InvalidOutputError, match="NaN"):
        model.tokens_from_moments(torch.full((1, 8, 2, 2), float("nan")))
    with pytest.raises(InvalidInputError, match="patches"):
        build(patch_size=2).tokens_from_latents(torch.zeros(1, 4, 3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_out_channels": (16, 12)}, "norm_num_groups"),
        ({"block_out_channels": (16,)}, "one entry a level"),
        ({"scaling_factor": 0.0}, "scaling_factor"),
        ({"latents_std": (1.0,)}, "4 values"),
        ({"patch_size": 0}, "patch_size"),
    ],
)
def test_bad_configurations_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build(**arguments)


def test_official_arguments_are_checked() -> None:
    with pytest.raises(InvalidInputError, match="from_official"):
        KLModel.from_single_file("kl16.ckpt")
    with pytest.raises(InvalidInputError, match="begin with 1"):
        KLModel.config_from_official({"ch_mult": [2, 4]})
    with pytest.raises(InvalidInputError, match="unknown argument"):
        KLModel.config_from_official({"embed_dim": 4, "channels": 3})


def test_absorbed_statistics_change_the_latents_and_no_picture() -> None:
    torch.manual_seed(3)
    model = KLModel.tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    images = torch.rand(6, 3, 16, 16) * 2 - 1
    before, posterior = model.decode(model.encode(images)), model.posterior(images)
    statistics = model.measure_latents([images], generator=torch.Generator().manual_seed(0))
    model.absorb_statistics(statistics)
    torch.testing.assert_close(model.decode(model.encode(images)), before, rtol=1e-4, atol=1e-4)
    mean, std = (value.float().view(-1, 1, 1) for value in (statistics.channel_mean, statistics.channel_std))
    torch.testing.assert_close(model.posterior(images).mean, (posterior.mean - mean) / std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.posterior(images).std, posterior.std / std, rtol=1e-4, atol=1e-5)
    after = model.measure_latents([images], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(after.channel_mean, torch.zeros_like(after.channel_mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(after.channel_std, torch.ones_like(after.channel_std), rtol=0, atol=1e-3)


def test_statistics_need_the_convolutions_around_the_bottleneck() -> None:
    model = KLModel.tiny(use_quant_conv=False, use_post_quant_conv=False)
    statistics = model.measure_latents([torch.rand(2, 3, 8, 8)])
    with pytest.raises(InvalidInputError, match="use_quant_conv"):
        model.absorb_statistics(statistics)
