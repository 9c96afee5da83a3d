"""LARP: videos to ordered tokens and back, the stochastic quantiser, the training-time prior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tests.generators.models import seeds
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.nn import sampling
from vistok.tokenizers.larp import LARP
from vistok.tokens import VisualTokens

OFFICIAL: dict[str, Any] = {
    "bottleneck": {
        "name": "bottleneck",
        "args": {
            "bottleneck_dim": 8,
            "norm": "none",
            "regularizer": {
                "name": "vq",
                "args": {
                    "codebook_size": 64,
                    "l2_normalized": True,
                    "stochastic": True,
                    "stochastic_temperature": 0.03,
                },
            },
        },
    },
    "prior_model": {"name": "none"},
    "bottleneck_token_num": 24,
    "input_size": 16,
    "frame_num": 4,
    "temporal_patch_size": 2,
    "patch_size": 8,
    "decoder_temporal_patch_size": 2,
    "decoder_patch_size": 8,
    "encoder_hidden_size": 32,
    "decoder_hidden_size": 32,
    "encoder_num_heads": 4,
    "decoder_num_heads": 4,
    "encoder_depth": 2,
    "decoder_depth": 2,
    "use_decoder_patch_query_token_type_embed": True,
}
PRIOR = {"name": "gptc-T", "args": {"n_layer": 2, "n_head": 4, "n_embd": 32}, "no_dropout": True}
EVERYTHING = {
    "learned_encoder_positions": True,
    "learned_encoder_queries": False,
    "learned_decoder_positions": True,
    "learned_decoder_queries": True,
    "encoder_position_kind": True,
    "encoder_query_kind": True,
    "decoder_position_kind": True,
    "stochastic_temperature": None,
}


def build(**overrides: Any) -> LARP:
    """A tiny model whose layers all matter."""
    torch.manual_seed(0)
    model = LARP.tiny(**overrides)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def clips(count: int = 2, frames: int = 4) -> Tensor:
    return torch.rand(count, 3, frames, 16, 16, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------ coding
def test_videos_become_a_sequence_and_videos_again() -> None:
    model, videos = build(), clips()
    tokens = model.encode(videos)
    assert tokens.shape == (2, 24)
    assert tokens.grid is None
    assert 0 <= int(tokens.ids.min()) <= int(tokens.ids.max()) < model.codebook_size
    decoded = model.decode(tokens)
    assert decoded.shape == videos.shape
    torch.testing.assert_close(decoded, model(videos).sample)  # in eval mode, forward takes the best codes, too
    alone = model.encode(videos[1:])
    assert torch.equal(alone.ids[0], tokens.ids[1])
    torch.testing.assert_close(model.decode(alone), decoded[1:])


@pytest.mark.parametrize("depth", [1, 3])
def test_what_is_saved_changes_nothing(depth: int) -> None:
    model = build(encoder_layers=depth)
    context, queries = torch.randn(2, 7, 32), torch.randn(1, 5, 32)
    x = torch.cat([context, queries.expand(2, -1, -1)], dim=1)
    for block in model.encoder:
        x = block(x)
    torch.testing.assert_close(model._run(model.encoder, context, queries), x[:, -5:])


def test_patches_are_laid_out_frame_row_column() -> None:
    model = build()
    for parameter in model.decoder.parameters():
        parameter.data.zero_()  # the blocks pass their input on
    # A decoder query that is 1 at the channel of its own place lights up exactly its patch.
    model.decoder_queries.table.zero_()
    model.decoder_queries.kind.data.zero_()
    model.decoder_queries.table[0, torch.arange(8), torch.arange(8)] = 1.0
    model.output_norm = nn.Identity()
    model.output.weight.data.zero_()
    for place in range(8):
        model.output.weight.data.zero_()
        model.output.weight.data[:, place] = torch.arange(2 * 8 * 8 * 3)
        video = model.decode(VisualTokens(torch.zeros(1, 24, dtype=torch.int64)))
        frame, row, col = place // 4 * 2, place // 2 % 2 * 8, place % 2 * 8
        patch = video[0, :, frame : frame + 2, row : row + 8, col : col + 8].permute(1, 2, 3, 0)
        assert torch.equal(patch.flatten(), torch.arange(2 * 8 * 8 * 3.0))
        assert float(video.abs().sum()) == float(patch.sum())


def test_fewer_frames() -> None:
    model = build()
    tokens = model.encode(clips(frames=2))
    assert tokens.shape == (2, 24)
    assert model.decode(tokens, num_frames=2).shape == (2, 3, 2, 16, 16)
    assert model(clips(frames=2)).sample.shape == (2, 3, 2, 16, 16)
    for frames in (1, 3, 6):
        with pytest.raises(InvalidInputError, match="multiple of 2, at most 4"):
            model.encode(clips(frames=frames))
        with pytest.raises(InvalidInputError, match="multiple of 2, at most 4"):
            model.decode(tokens, num_frames=frames)


def test_drawn_codes_depend_on_their_own_seed_alone() -> None:
    model, videos = build(stochastic_temperature=0.5), clips(3)
    best = model.encode(videos).ids
    drawn = model.encode(videos, stochastic=True, generator=seeds(0, 1, 2)).ids
    assert not torch.equal(best, drawn)
    assert torch.equal(model.encode(videos, stochastic=True, generator=seeds(0, 1, 2)).ids, drawn)
    assert torch.equal(model.encode(videos[1:2], stochastic=True, generator=seeds(1)).ids[0], drawn[1])
    cold = build(stochastic_temperature=1e-6)
    assert torch.equal(cold.encode(videos, stochastic=True, generator=seeds(0, 1, 2)).ids, cold.encode(videos).ids)


def test_codes_are_drawn_by_their_cosine() -> None:
    model = build(codebook_size=4, stochastic_temperature=0.5)
    z = torch.randn(1, 1, 8).expand(1, 20000, 8)
    drawn = model.quantizer(z, stochastic=True, generator=torch.Generator().manual_seed(0)).ids
    shares = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
    expected = (F.normalize(z[0, 0], dim=0) @ F.normalize(model.quantizer.codebook, dim=1).T / 0.5).softmax(0)
    torch.testing.assert_close(shares, expected, rtol=0.0, atol=0.02)


def test_the_quantiser_against_its_definition() -> None:
    for options in ({}, {"l2_normalize": False, "stochastic": False}):
        model = build(**options)
        z = torch.randn(2, 5, 8, requires_grad=True)
        result = model.quantizer(z, stochastic=False)
        table = model.quantizer.codebook if options else F.normalize(model.quantizer.codebook, dim=1)
        vectors = z if options else F.normalize(z, dim=2)
        assert torch.equal(result.ids, torch.cdist(vectors, table.expand(2, -1, -1)).argmin(-1))
        chosen = table[result.ids]
        torch.testing.assert_close(result.quantized, chosen)
        error = (chosen - vectors).square().mean()
        torch.testing.assert_close(result.codebook_loss, error)
        torch.testing.assert_close(result.loss, 1.25 * error)
        (gradient,) = torch.autograd.grad(result.quantized.sum(), vectors if options else z, retain_graph=True)
        (expected,) = torch.autograd.grad(vectors.sum(), z)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "overrides",
    [
        EVERYTHING,
        {"l2_normalize": False, "stochastic": False},
        {"temporal_patch_size": 1},
        {"decoder_temporal_patch_size": 4, "decoder_patch_size": 4},
        {"encoder_hidden_size": 48, "decoder_hidden_size": 64, "prior_layers": 1},
    ],
    ids=["learned", "nearest", "frames", "patches", "widths"],
)
def test_every_option_codes_and_trains(overrides: dict[str, Any]) -> None:
    model = build(**overrides)
    assert model.decode(model.encode(clips())).shape == (2, 3, 4, 16, 16)
    model.train().training_loss({"videos": clips()}, generator=torch.Generator().manual_seed(0))["loss"].backward()
    without = {name for name, value in model.named_parameters() if value.grad is None}
    assert without <= {"quantizer.inverse_temperature"}  # codes are drawn without a gradient
    assert LARP.from_official(model.to_official(), dict(_own(model))).state_dict().keys() == model.state_dict().keys()


def _own(model: LARP) -> dict[str, Any]:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


# ------------------------------------------------------------------------------------------ training
def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = LARP.tiny(prior_layers=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(15):
        result = model.training_loss({"videos": clips(4)}, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(float(result["loss"].detach()))
    assert set(result) == {"loss", "reconstruction", "codebook", "commitment", "quantizer", "prior"}
    parts = result["reconstruction"] + 0.1 * result["quantizer"] + 0.06 * result["prior"]
    torch.testing.assert_close(result["loss"], parts)
    assert losses[-1] < losses[0] - 0.2


def test_the_prior_predicts_each_token_from_those_before() -> None:
    model = build(prior_layers=2)
    quantization = model(clips()).quantization
    codes = quantization.quantized.clone()
    assert model.prior is not None
    before = model.prior(codes)
    codes[:, 10] += 1.0
    after = model.prior(codes)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.isclose(before[:, 10:], after[:, 10:]).all(-1).any()
    # At the start of the training no prediction is mixed in: both rounds are plain teacher forcing.
    logits = model.prior(quantization.quantized[:, :-1]) @ model.quantizer.codes().T
    expected = F.cross_entropy(logits.flatten(0, 1), quantization.ids[:, 1:].flatten())
    torch.testing.assert_close(model.prior_loss(quantization, progress=0.0), expected)
    generator = torch.Generator().manual_seed(0)
    assert not torch.isclose(model.prior_loss(quantization, progress=1.0, generator=generator), expected)


def test_scheduled_sampling_rises_to_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(prior_layers=1)
    quantization = model(clips()).quantization
    drawn = sampling.choose_tokens
    mixed: list[float] = []

    def read(self: Any, x: Tensor) -> Tensor:
        mixed.append(float((x - quantization.quantized[:, :-1]).abs().sum(-1).gt(0).float().mean()))
        return forward(x)

    assert model.prior is not None
    forward = model.prior.forward
    monkeypatch.setattr(
        sampling, "choose_tokens", lambda logits, **_: (drawn(logits) * 0 + quantization.ids[:, 1:] + 1) % 64
    )
    monkeypatch.setattr(model.prior, "forward", lambda x: read(model.prior, x))
    for progress in (0.0, 0.15, 0.3, 1.0):
        model.prior_loss(quantization, progress=progress, generator=torch.Generator().manual_seed(0))
    first, second = mixed[::2], mixed[1::2]
    assert first == [0.0] * 4
    assert second[0] == 0.0
    assert 0.0 < second[1] < second[2] == second[3]


def test_the_last_round_alone_can_count() -> None:
    model = build(prior_layers=1, prior_averages_rounds=False)
    quantization = model(clips()).quantization
    both = build(prior_layers=1)
    seed = torch.Generator
    last = model.prior_loss(quantization, generator=seed().manual_seed(0))
    mean = both.prior_loss(quantization, generator=seed().manual_seed(0))
    first = both.prior_loss(quantization, progress=0.0, generator=seed().manual_seed(0))
    torch.testing.assert_close(2.0 * mean, first + last)
    with pytest.raises(InvalidInputError, match="has no prior"):
        build().prior_loss(quantization)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = build(stochastic=False).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.training_loss({"videos": clips()})["loss"].backward()
        gradients.append({name: value.grad.clone() for name, value in model.named_parameters()})
        model.enable_gradient_checkpointing()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


# ------------------------------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize("prior", [False, True])
def test_official_files_round_trip(tmp_path: Path, prior: bool) -> None:
    model = build(**({"prior_layers": 2} if prior else {}))
    config = {**OFFICIAL, "prior_model": PRIOR} if prior else OFFICIAL
    state = model.to_official()
    assert "prior_model.blocks.1.attn.key.weight" in state if prior else "prior_model.pos_emb" not in state
    assert {"x_embedder.proj.weight", "bottleneck.regularizer.embedding.weight", "encoder_patch_pe"} <= state.keys()
    path = tmp_path / "larp.pth"
    torch.save({"model": {"name": "larp_tokenizer", "sd": state}}, path)
    for source in (state, path):
        again = LARP.from_official(source, config)
        assert again.state_dict().keys() == model.state_dict().keys()
        for name, value in again.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
    missing = {key: value for key, value in state.items() if key != "encoder.blocks.1.attn.qkv.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.1\.attn\.qkv\.weight"):
        LARP.from_official(missing, config)
    if prior:
        with pytest.raises(CheckpointError, match="holds the prior of the training"):
            LARP.from_official(state, OFFICIAL)


def test_the_prior_of_a_published_file_is_left_out_unless_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(prior_layers=12, prior_heads=6, prior_hidden_size=48)
    entry = LARP.published["larp-l-long.ucf101"]
    own = {key: value for key, value in _own(model).items() if key not in ("prior_layers", "prior_heads")}
    small = type(entry)(**{**entry.__dict__, "config": own})
    monkeypatch.setattr(LARP, "published", {entry.name: small})
    monkeypatch.setattr("vistok.tokenizers.larp.model.PRIOR_S", {"prior_layers": 12, "prior_heads": 6})
    assert LARP.from_official(model.to_official(), entry.name).prior is None
    assert LARP.from_official(model.to_official(), entry.name, prior=True).prior is not None


def test_single_frame_patches_of_the_authors_are_two_dimensional() -> None:
    model = build(temporal_patch_size=1)
    state = model.to_official()
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].squeeze(2)
    again = LARP.from_official(state, _own(model))
    assert torch.equal(again.patch_embedding.weight, model.patch_embedding.weight)


def test_parts_that_no_published_tokenizer_has_are_refused() -> None:
    def changed(**regularizer: Any) -> dict[str, Any]:
        inside = OFFICIAL["bottleneck"]["args"]
        changed = {**inside["regularizer"], "args": {**inside["regularizer"]["args"], **regularizer}}
        return {**OFFICIAL, "bottleneck": {"args": {**inside, "regularizer": changed}}}

    assert LARP.config_from_official(changed(stochastic_temperature=-1.0))["stochastic_temperature"] is None
    with pytest.raises(InvalidInputError, match="entropy_loss_weight"):
        LARP.config_from_official(changed(entropy_loss_weight=0.1))
    with pytest.raises(InvalidInputError, match="regularizer 'skl'"):
        LARP.config_from_official({**OFFICIAL, "bottleneck": {"args": {"regularizer": {"name": "skl"}}}})
    with pytest.raises(InvalidInputError, match="transformer_encoder_fused"):
        LARP.config_from_official({**OFFICIAL, "transformer_name": "transformer_encoder_fused"})
    with pytest.raises(InvalidInputError, match="gptc-Z"):
        LARP.config_from_official({**OFFICIAL, "prior_model": {"name": "gptc-Z"}})
    for arguments in (
        {"patch_size": 5},
        {"encoder_heads": 5},
        {"l2_normalize": False},
        {"stochastic_temperature": 0.0},
    ):
        with pytest.raises(InvalidInputError):
            LARP.tiny(**arguments)


def test_bfloat16_codes_and_trains() -> None:
    model = build(prior_layers=1)
    half = LARP.from_official(model.to_official(), _own(model)).to(torch.bfloat16)
    tokens = half.encode(clips())
    assert half.decode(tokens).dtype == torch.bfloat16
    assert half.quantizer(half.encode_features(clips()), stochastic=False).quantized.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train().training_loss({"videos": clips()}, generator=torch.Generator().manual_seed(0))
    losses["loss"].backward()
    full = model.training_loss({"videos": clips()}, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses["loss"], full["loss"], rtol=0.05, atol=0.0)


def test_saved_models_load_again(tmp_path: Path) -> None:
    model = build(prior_layers=1)
    model.save_pretrained(tmp_path)
    again = LARP.from_pretrained(tmp_path)
    assert torch.equal(model.decode(model.encode(clips())), again.decode(again.encode(clips())))


# ------------------------------------------------------------------------------------------ pictures
def frames(count: int, height: int = 20, width: int = 30) -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in values]


def test_short_videos_repeat_their_last_frame() -> None:
    model = build()
    video = model.preprocess(frames(3))
    assert video.shape == (1, 3, 4, 16, 16)
    assert torch.equal(video[:, :, 3], video[:, :, 2])
    assert not torch.equal(video[:, :, 2], video[:, :, 1])
    assert 0.0 <= float(video.min()) <= float(video.max()) <= 1.0
    longer = model.preprocess(frames(9), start=5)
    stacked = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames(9)])
    assert torch.equal(model.preprocess(stacked[5:9]), longer)
    with pytest.raises(InvalidInputError, match=r"0\.\.2 for 3 frames; got 3"):
        model.preprocess(frames(3), start=3)


def test_videos_of_the_right_size_pass_unchanged() -> None:
    model = build()
    pixels = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    assert torch.equal(model.postprocess(model.preprocess(pixels), "uint8")[0], pixels)
    wide = torch.randint(0, 256, (4, 16, 22, 3), dtype=torch.uint8)
    assert torch.equal(model.postprocess(model.preprocess(wide), "uint8")[0], wide[:, :, 3:19])


def test_folders_and_animations(tmp_path: Path) -> None:
    model = build()
    pictures = frames(4)
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index:02}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    expected = model.preprocess(pictures)
    assert torch.equal(model.preprocess(tmp_path), expected)
    animation = tmp_path / "animation.webp"
    pictures[0].save(animation, save_all=True, append_images=pictures[1:], lossless=True)
    assert torch.equal(model.preprocess(animation), expected)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="holds no frames"):
        model.preprocess(tmp_path / "empty")
    with pytest.raises(InvalidInputError, match="not an image"):
        model.preprocess(tmp_path / "notes.txt")
    with pytest.raises(InvalidInputError, match="one size; got 20x30, 21x30"):
        model.preprocess([*pictures, *frames(1, height=21)])
    with pytest.raises(InvalidInputError, match="no frames"):
        model.preprocess([])
    with pytest.raises(InvalidInputError, match="uint8"):
        model.preprocess(torch.rand(4, 16, 16, 3))


def test_frames_come_out_in_every_type() -> None:
    model = build()
    videos = torch.tensor([-0.5, 0.5, 2.0]).view(1, 3, 1, 1, 1).expand(2, 3, 4, 16, 16)
    pictures = model.postprocess(videos)
    assert len(pictures) == 2
    assert len(pictures[0]) == 4
    assert pictures[1][3].getpixel((0, 0)) == (0, 128, 255)
    assert model.postprocess(videos, "np").shape == (2, 4, 16, 16, 3)
    assert float(model.postprocess(videos, "pt").max()) == 1.0
    with pytest.raises(InvalidInputError, match="'gif'"):
        model.postprocess(videos, "gif")
    with pytest.raises(InvalidOutputError, match="NaN"):
        model.postprocess(videos * float("nan"))


# ------------------------------------------------------------------------------------------ errors
def test_bad_input_is_refused() -> None:
    model, videos = build(), clips()
    for wrong, match in (
        (videos[:, 0], r"\[B, 3, frames, 16, 16\]"),
        (videos[..., :8], r"\[B, 3, frames, 16, 16\]"),
        ((videos * 255).to(torch.uint8), "floating point"),
        (videos * 2 - 1, r"\[0, 1\]"),
        (videos * 255, r"\[0, 1\]"),
        (videos * float("nan"), "NaN"),
    ):
        with pytest.raises(InvalidInputError, match=match):
            model.encode(wrong)
    with pytest.raises(InvalidInputError, match="24 tokens a video; got 23"):
        model.decode(VisualTokens(torch.zeros(1, 23, dtype=torch.int64)))
    with pytest.raises(InvalidInputError, match=r"0\.\.63; got 64\.\.64"):
        model.decode(VisualTokens(torch.full((1, 24), 64)))
    with pytest.raises(InvalidInputError, match="needs ids"):
        model.decode(VisualTokens(features=torch.zeros(1, 24, 8)))
    with pytest.raises(InvalidInputError, match="'videos'; got images"):
        model.training_loss({"images": videos})
    model.bottleneck_in.weight.data.fill_(float("nan"))
    for stochastic in (False, True):
        with pytest.raises(InvalidOutputError, match="NaN"):
            model.encode(videos, stochastic=stochastic)
