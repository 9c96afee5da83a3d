from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError, UnknownNameError
from vistok.files import save_tensors
from vistok.tokenizers.vq import VQModel
from vistok.tokens import VisualTokens

FOUR = {"encoder_channel_multipliers": (1, 1, 1), "decoder_channel_multipliers": (1, 1, 1)}


@pytest.fixture
def model() -> VQModel:
    torch.manual_seed(0)
    return VQModel.tiny(**FOUR).eval()


def images(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(0)) * 2 - 1


# ---- encode and decode


def test_encode_and_decode_any_divisible_size(model: VQModel) -> None:
    tokens = model.encode(images(2, 3, 12, 20))
    assert tokens.ids.shape == (2, 15)
    assert tokens.grid == (3, 5)
    assert model.decode(tokens).shape == (2, 3, 12, 20)


def test_inference_agrees_with_the_training_graph(model: VQModel) -> None:
    x = images(2, 3, 16, 16)
    output = model(x)
    tokens = model.encode(x)
    assert torch.equal(tokens.ids, output.quantization.ids)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(tokens), output.sample.detach(), rtol=1e-4, atol=1e-5)


def test_square_tokens_need_no_grid_and_others_do(model: VQModel) -> None:
    ids = torch.zeros(1, 9, dtype=torch.int64)
    assert model.decode(VisualTokens(ids=ids)).shape == (1, 3, 12, 12)
    with pytest.raises(InvalidInputError, match=r"8 tokens without a grid"):
        model.decode(VisualTokens(ids=ids[:, :8]))


def test_decoding_follows_changed_weights(model: VQModel) -> None:
    tokens = model.encode(images(1, 3, 16, 16))
    with torch.no_grad():
        before = model.decode(tokens)
        assert torch.equal(model.decode(tokens), before)
        model.quantizer.codebook.neg_()
        after = model.decode(tokens)
        assert not torch.allclose(before, after)
        model.post_quant_conv.bias.add_(1.0)
        assert not torch.allclose(model.decode(tokens), after)
        fresh = VQModel.from_config(model.config).eval()
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.decode(tokens), fresh.decode(tokens))


def test_decode_passes_gradients_to_the_codebook_when_they_are_wanted(model: VQModel) -> None:
    tokens = model.encode(images(1, 3, 16, 16))
    with torch.no_grad():
        model.decode(tokens)  # fills the tables that gradients must not use
    model.decode(tokens).sum().backward()
    assert model.quantizer.codebook.grad.abs().sum() > 0
    assert model.post_quant_conv.weight.grad.abs().sum() > 0


def test_bfloat16_model_decodes(model: VQModel) -> None:
    tokens = model.encode(images(1, 3, 16, 16))
    half = model.to(torch.bfloat16)
    assert half.quantizer.usage_queue.dtype == torch.int32
    decoded = half.decode(tokens)
    assert decoded.dtype == torch.bfloat16
    assert half.postprocess(decoded)[0].size == (16, 16)


def test_published_sizes() -> None:
    assert VQModel.published["vq16.imagenet"].num_tokens == 256
    assert VQModel.published["vq8.imagenet"].num_tokens == 1024
    for entry in VQModel.published.values():
        with torch.device("meta"):
            built = VQModel(**entry.config)
        assert sum(parameter.numel() for parameter in built.parameters()) == entry.parameters
        assert (entry.image_size // built.downsample_factor) ** 2 == entry.num_tokens


# ---- tiles


def test_tiles_agree_with_the_whole_where_the_network_is_local() -> None:
    torch.manual_seed(0)
    model = VQModel.tiny(attention="middle", **FOUR).eval()
    x = images(1, 3, 40, 24)
    whole = model.encode_features(x)
    model.enable_tiling(16, 8)
    tokens = model.encode(x)
    assert tokens.grid == (10, 6)
    assert model.decode(tokens).shape == x.shape
    model.disable_tiling()
    assert torch.equal(model.encode(x).ids, model.quantizer(whole).ids)


@pytest.mark.parametrize(("tile", "overlap"), [(18, 4), (16, 3), (16, 16)])
def test_unsuitable_tiles_are_refused(model: VQModel, tile: int, overlap: int) -> None:
    with pytest.raises(InvalidInputError, match="multiples of 4"):
        model.enable_tiling(tile, overlap)


# ---- pictures


def photo(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_preprocess_cuts_to_whole_tokens_or_to_the_asked_size(model: VQModel) -> None:
    image = photo(19, 22)
    kept = model.preprocess(image)
    assert kept.shape == (1, 3, 16, 20)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, 1:17, 1:21]
    assert torch.equal(((kept[0] + 1) * 127.5).round().to(torch.uint8), pixels)
    assert model.preprocess([image, photo(40, 30)], size=8).shape == (2, 3, 8, 8)
    assert model.preprocess(image, size=(8, 16)).shape == (1, 3, 8, 16)


def test_preprocess_refuses_what_it_cannot_use(model: VQModel, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for arguments, message in [
        (([],), "at least one"),
        (([photo(8, 8), photo(8, 12)],), "8x8, 8x12"),
        ((photo(3, 8),), "at least 4x4"),
        ((photo(8, 8), 10), "multiple of 4"),
        ((tmp_path / "empty.png",), "empty"),
        ((tmp_path / "absent.png",), "no image file"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            model.preprocess(*arguments)


def test_postprocess_formats(model: VQModel) -> None:
    x = torch.tensor([-2.0, 0.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert model.postprocess(x)[0].getpixel((0, 0)) == (0, 128, 255)
    assert model.postprocess(x, "uint8").shape == (1, 4, 4, 3)
    assert model.postprocess(x, "np")[0, 0, 0].tolist() == [0.0, 0.5, 1.0]
    assert model.postprocess(x, "pt").shape == (1, 3, 4, 4)
    with pytest.raises(InvalidInputError, match="output_type"):
        model.postprocess(x, "jpeg")
    with pytest.raises(InvalidOutputError, match="NaN"):
        model.postprocess(x * float("nan"))


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (16, 16), (21, 9)])
def test_reconstruct_keeps_any_size(model: VQModel, size: tuple[int, int]) -> None:
    assert model.reconstruct(photo(*size)).size == (size[1], size[0])


def test_reconstruct_in_tiles_leaves_the_model_as_it_was(model: VQModel) -> None:
    assert model.reconstruct(photo(50, 33), tile_size=16).size == (33, 50)
    assert model.tile_size is None
    with pytest.raises(InvalidInputError, match="multiples"):
        model.reconstruct(photo(50, 33), tile_size=18)
    assert model.tile_size is None


def test_reconstruct_of_a_whole_picture_needs_no_padding(model: VQModel) -> None:
    image = photo(16, 16)
    tokens = model.encode(model.preprocess(image))
    assert model.reconstruct(image).tobytes() == model.postprocess(model.decode(tokens))[0].tobytes()


# ---- objective


def test_a_few_steps_of_training_reduce_the_loss() -> None:
    torch.manual_seed(0)
    model = VQModel.tiny(revive_dead_codes=True, usage_window=256).train()
    x = F.interpolate(images(4, 3, 4, 4), scale_factor=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    history = []
    for _ in range(12):
        losses = model.training_loss({"images": x})
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append(float(losses["reconstruction"]))
    assert history[-1] < 0.5 * history[0]
    assert set(losses) == {"loss", "reconstruction", "codebook", "commitment", "usage"}
    assert not any(value.requires_grad for name, value in losses.items() if name != "loss")


def test_gradient_checkpointing_changes_nothing(model: VQModel) -> None:
    x = images(1, 3, 16, 16)
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.enable_gradient_checkpointing()
        model.train().zero_grad()
        model.training_loss({"images": x})["loss"].backward()
        gradients.append(model.encoder.conv_in.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_report_counts_tokens_of_batches(model: VQModel) -> None:
    ids = torch.tensor([[0, 1, 1, 5]])
    mask = torch.tensor([[True, True, True, False]])
    report = model.codebook_report([VisualTokens(ids=ids), VisualTokens(ids=ids, mask=mask)])
    assert report.num_tokens == 7
    assert report.counts[:6].tolist() == [2, 4, 0, 0, 0, 1]
    assert report.usage == 3 / 64
    with pytest.raises(InvalidInputError, match=r"0\.\.63"):
        model.codebook_report(VisualTokens(ids=ids * 20))
    with pytest.raises(InvalidInputError, match="ids"):
        model.codebook_report(VisualTokens(features=torch.zeros(1, 4, 8)))


# ---- bad input


def test_unusable_images_are_named(model: VQModel) -> None:
    x = images(1, 3, 16, 16)
    for bad, message in [
        (x[0], r"\[B, 3, H, W\]; got \[3, 16, 16\]"),
        (x[:, :1], r"got \[1, 1, 16, 16\]"),
        (images(1, 3, 16, 18), "16x18: the nearest valid sizes are 16x16 and 16x20"),
        (images(1, 3, 2, 16), "4x16 and 4x16"),
        ((x * 127 + 128).to(torch.uint8), "torch.uint8"),
        (x * 127 + 128, r"must lie in \[-1, 1\]"),
        (x.where(x < 0.9, float("nan")), "NaN"),
        (x.where(x < 0.9, float("inf")), "infinite"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            model.encode(bad)


def test_unusable_tokens_are_named(model: VQModel) -> None:
    for ids in ([[0, 1, 2, 64]], [[0, -1, 2, 3]]):
        with pytest.raises(InvalidInputError, match=r"0\.\.63"):
            model.decode(VisualTokens(ids=torch.tensor(ids)))
    with pytest.raises(InvalidInputError, match="needs ids"):
        model.decode(VisualTokens(features=torch.zeros(1, 4, 8)))


def test_broken_weights_do_not_pass_for_tokens(model: VQModel) -> None:
    with torch.no_grad():
        model.encoder.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InvalidOutputError, match="weights"):
        model.encode(images(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_channels": 48}, r"multiple of norm_groups \(32\); got 48"),
        ({"attention": "everywhere"}, "bottleneck"),
        ({"decoder_channel_multipliers": (1, 1)}, "same number of levels"),
    ],
)
def test_constructor_arguments_are_checked(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        VQModel.tiny(**{**FOUR, **arguments})


# ---- files

OFFICIAL = {
    "ch": 32,
    "num_res_blocks": 1,
    "codebook_size": 64,
    "codebook_embed_dim": 8,
    "encoder_ch_mult": [1, 1, 1],
    "decoder_ch_mult": [1, 1, 1],
    "z_channels": 16,
}


@pytest.fixture
def official() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return VQModel.tiny(**FOUR, usage_window=65536).to_official()


def test_official_names_go_both_ways(official: dict[str, torch.Tensor]) -> None:
    assert official["quantize.codebook_used"].dtype == torch.float32
    assert "encoder.conv_blocks.2.attn.0.q.weight" in official
    assert "decoder.conv_blocks.0.upsample.conv.weight" in official
    assert "encoder.conv_blocks.0.downsample.conv.bias" in official
    assert "encoder.mid.1.proj_out.weight" in official
    model = VQModel.from_official(official, OFFICIAL)
    again = model.to_official()
    assert again.keys() == official.keys()
    assert all(torch.equal(again[key], value) for key, value in official.items())
    assert not model.training
    official["quant_conv.bias"].add_(1.0)  # the model owns its weights
    assert not torch.equal(model.quant_conv.bias, official["quant_conv.bias"])


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict"])
def test_every_layout_of_the_authors_loads(wrapper: str, official: dict[str, torch.Tensor], tmp_path: Path) -> None:
    checkpoint = {
        wrapper: {f"_orig_mod.module.{key}": value for key, value in official.items()},
        "discriminator": {"main.0.weight": torch.zeros(1)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "steps": 7,
        "args": argparse.Namespace(vq_model="VQ-16", data_path="images"),
    }
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint, path)
    model = VQModel.from_official(path, OFFICIAL)
    assert torch.equal(model.quantizer.codebook, official["quantize.embedding.weight"])


def test_the_moving_average_is_preferred_unless_asked(official: dict[str, torch.Tensor], tmp_path: Path) -> None:
    ema = {key: value + 1 for key, value in official.items()}
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": official, "ema": ema}, path)
    key = "quantize.embedding.weight"
    for weights, expected in (("auto", ema), ("ema", ema), ("model", official)):
        model = VQModel.from_official(path, OFFICIAL, weights=weights)
        assert torch.equal(model.quantizer.codebook, expected[key])
    torch.save({"model": official}, path)
    with pytest.raises(CheckpointError, match="no 'ema' weights; top-level keys: model"):
        VQModel.from_official(path, OFFICIAL, weights="ema")


def test_a_generator_file_is_recognised() -> None:
    state = {"tok_embeddings.weight": torch.zeros(4, 4), "layers.0.attention.wqkv.weight": torch.zeros(12, 4)}
    with pytest.raises(CheckpointError, match=r"This is a generator .*missing: .*encoder"):
        VQModel.from_official({"model": state}, OFFICIAL)


def test_differences_are_named(official: dict[str, torch.Tensor]) -> None:
    official["conv_in.strange"] = official.pop("encoder.mid.1.k.weight")
    official["decoder.conv_out.weight"] = torch.zeros(1, 32, 3, 3)
    with pytest.raises(CheckpointError) as caught:
        VQModel.from_official(official, OFFICIAL)
    message = str(caught.value)
    assert "encoder.middle.1.qkv.weight" in message
    assert "conv_in.strange" in message
    assert "decoder.conv_out.weight [1, 32, 3, 3] instead of [3, 32, 3, 3]" in message


def test_truncated_and_unknown_files_are_refused(official: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "vq.safetensors"
    save_tensors(path, official)
    assert torch.equal(VQModel.from_official(path, OFFICIAL).quantizer.codebook, official["quantize.embedding.weight"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        VQModel.from_official(path, OFFICIAL)
    with pytest.raises(UnknownNameError, match=r"vq16\.imagenet"):
        VQModel.from_official(official, "vq16.imagnet")
    with pytest.raises(InvalidInputError, match="VQ-16, VQ-8"):
        VQModel.from_official(official, {"vq_model": "VQ-4"})
    with pytest.raises(InvalidInputError, match="cannot be built"):
        VQModel.from_official(official, {**OFFICIAL, "wings": 2})


def test_save_and_load_keep_everything(model: VQModel, tmp_path: Path) -> None:
    x = images(1, 3, 16, 16)
    model.train()(x)
    model.eval().save_pretrained(tmp_path)
    loaded = VQModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(x).ids, model.encode(x).ids)
    assert torch.equal(loaded.quantizer.usage_queue, model.quantizer.usage_queue)
    half = VQModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(half.quantizer.usage_queue, model.quantizer.usage_queue)
