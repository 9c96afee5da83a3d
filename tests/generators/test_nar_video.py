"""NAR for video: planes, three heads, classes and frame prediction."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.plain.nar_video import generate as plain
from tests.generators.models import seeds
from tests.parity.replay import recorded_draws
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.generators.nar import NAR
from vistok.generators.nar_video import NARVideo
from vistok.generators.pipeline import GenerationPipeline
from vistok.tokenizers.larp import LARP
from vistok.tokens import VisualTokens

FRAMES = {"num_classes": None, "num_condition_tokens": 13}  # a frame of 3x4 and the separator
LABELS = torch.tensor([3, 0, 9])


def build(**overrides: Any) -> NARVideo:
    """A tiny model whose heads are not zero, so that logits differ."""
    torch.manual_seed(0)
    model = NARVideo.tiny(**overrides)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.3 if "output" in name else 0.15)
    return model


def rows_per_call(model: NARVideo, **settings: Any) -> list[int]:
    rows: list[int] = []
    handle = model.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    model.generate(torch.tensor([1, 2]), **settings)
    handle.remove()
    return rows


# ------------------------------------------------------------------------------------------ steps and logits
def test_steps_are_planes() -> None:
    model = build()
    steps = list(model.sample(torch.tensor([1]), generator=seeds(0)))
    assert [step.changed.tolist() for step in steps] == [
        [0],
        [1, 4, 12],
        [2, 5, 8, 13, 16],
        [3, 6, 9, 14, 17, 20],
        [7, 10, 15, 18, 21],
        [11, 19, 22],
        [23],
    ]
    assert [step.index for step in steps] == list(range(7))
    assert {step.total for step in steps} == {7}
    seen = torch.zeros(24, dtype=torch.bool)
    for step in steps:
        seen[step.changed] = True
        assert step.tokens.mask is not None
        assert torch.equal(step.tokens.mask[0], seen)
        assert (step.tokens.ids[:, ~seen] == 0).all()
    assert step.tokens.grid is None


@pytest.mark.parametrize("overrides", [{}, {"num_kv_heads": 2}, {"fixed_positions": True}, FRAMES, {"grid": (3, 2, 2)}])
def test_cached_logits_equal_teacher_forcing(overrides: dict[str, Any]) -> None:
    model = build(**overrides)
    condition = torch.randint(0, 64, (3, 12)) if model.predicts_frames else LABELS
    logits: list[Tensor] = []
    with recorded_draws(logits=logits):
        steps = list(model.sample(condition, temperature=0.0))
    order = torch.cat([step.changed for step in steps])
    forced = model(steps[-1].tokens.ids, condition)
    torch.testing.assert_close(torch.cat(logits, 1), forced[:, order], rtol=1e-4, atol=1e-4)
    assert torch.equal(steps[-1].tokens.ids, forced.argmax(-1))


def test_logits_see_nearer_planes_alone() -> None:
    model = build()
    ids = torch.randint(0, 64, (1, 24))
    other = ids.clone()
    other[0, 18] = (ids[0, 18] + 1) % 64  # frame 1, row 1, column 2: plane 4
    before, after = (model(tokens, torch.tensor([1])) for tokens in (ids, other))
    distance = torch.tensor([sum(cell) for cell in itertools.product(range(2), range(3), range(4))])
    torch.testing.assert_close(before[0, distance <= 4], after[0, distance <= 4])
    assert not torch.isclose(before[0, distance > 4], after[0, distance > 4]).all(-1).any()


def test_each_head_speaks_along_its_axis() -> None:
    model = build()
    ids = torch.randint(0, 64, (1, 24))
    before = model(ids, torch.tensor([1]))
    cells = list(itertools.product(range(2), range(3), range(4)))
    for axis, head in zip((2, 1, 0), model.heads):
        weight = head.weight.detach().clone()
        head.weight.data.zero_()
        changed = ~torch.isclose(before, model(ids, torch.tensor([1]))).all(-1)[0]
        head.weight.data.copy_(weight)
        assert changed.tolist() == [cell[axis] > 0 or cell == (0, 0, 0) for cell in cells]


def test_negative_labels_mean_no_class() -> None:
    model = build()
    ids = torch.randint(0, 64, (2, 24))
    assert torch.equal(model(ids, torch.tensor([-1, -7])), model(ids, torch.tensor([10, 10])))
    nothing = torch.tensor([-1, 4])
    free = model.generate(nothing, temperature=0.0).ids
    guided = model.generate(nothing, temperature=0.0, guidance_scale=4.0).ids
    assert torch.equal(free[0], guided[0])
    assert not torch.equal(free[1], guided[1])


# ------------------------------------------------------------------------------------------ sampling
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.8, "top_k": 20},
        {"guidance_scale": 2.5, "top_p": 0.8},
        {"guidance_scale": 3.0, "guidance_interval": 6},
        {"guidance_scale": 3.0, "guidance_interval": 0},
    ],
)
def test_the_plain_sampler_writes_the_same_tokens(settings: dict[str, Any]) -> None:
    model = build(num_kv_heads=2)
    ours = model.generate(LABELS, generator=seeds(0, 1, 2), **settings).ids
    assert torch.equal(plain(model, LABELS, generator=seeds(0, 1, 2), **settings), ours)


def test_the_plain_sampler_continues_frames_alike() -> None:
    model = build(**FRAMES)
    given = torch.randint(0, 64, (2, 12))
    ours = model.generate(given, generator=seeds(0, 1)).ids
    assert torch.equal(plain(model, given, generator=seeds(0, 1)), ours)


def test_seeds_do_not_depend_on_the_batch() -> None:
    model = build()
    settings = {"guidance_scale": 2.0, "top_k": 40}
    together = model.generate(LABELS, generator=seeds(10, 11, 12), **settings).ids
    for index in range(3):
        alone = model.generate(LABELS[index : index + 1], generator=seeds(10 + index), **settings).ids
        assert torch.equal(alone[0], together[index])
    again = model.generate(LABELS, generator=seeds(10, 11, 12), **settings).ids
    assert torch.equal(again, together)


def test_guidance_ends_before_the_plane_that_enough_tokens_precede() -> None:
    # 1 and 4 tokens precede planes 1 and 2, 9 precede plane 3; the condition is run once for both null rows.
    assert rows_per_call(build(), guidance_scale=2.0, guidance_interval=4) == [3, 4, 4, 2, 2, 2, 2]
    assert set(rows_per_call(build())) == {2}


def test_positions_of_a_cell_do_not_depend_on_the_grid() -> None:
    model = build()
    whole = model.positions(model.grid).view(2, 3, 4, -1)
    assert torch.equal(model.positions((2, 2, 3)), whole[:, :2, :3].flatten(0, 2))
    tokens = model.generate(LABELS, grid=(1, 2, 3), generator=seeds(0, 1, 2))
    assert tokens.num_tokens == 6
    with pytest.raises(InvalidInputError, match="up to 2 frames of up to 3x4"):
        model.sample(LABELS, grid=(3, 3, 4))
    longer = build(fixed_positions=True)
    assert torch.equal(longer.positions((2, 3, 4)), longer.positions((5, 3, 4))[:24])
    assert longer.generate(LABELS, grid=(4, 3, 4), generator=seeds(0, 1, 2)).num_tokens == 48
    with pytest.raises(InvalidInputError, match="any number of frames"):
        longer.sample(LABELS, grid=(2, 3, 5))


# ------------------------------------------------------------------------------------------ continuations
def test_known_frames_are_kept_and_continued() -> None:
    model = build()
    settings = {"temperature": 0.0, "guidance_scale": 2.0}
    whole = model.generate(LABELS, **settings)
    steps = list(model.sample(LABELS, prefix=whole.keep(12), **settings))
    # The first cell of the second frame lies in plane 1, the last in plane 6.
    assert len(steps) == steps[0].total == 6
    assert sorted(torch.cat([step.changed for step in steps]).tolist()) == list(range(12, 24))
    assert torch.equal(steps[-1].tokens.ids, whole.ids)
    assert torch.equal(model.generate(LABELS, prefix=whole).ids, whole.ids)
    other = VisualTokens(ids=(whole.ids[:, :12] + 1) % 64)
    continued = model.generate(LABELS, prefix=other, **settings)
    assert torch.equal(continued.ids[:, :12], other.ids)
    assert not torch.equal(continued.ids[:, 12:], whole.ids[:, 12:])


@pytest.mark.parametrize("sides", [(2, 3, 1), (2, 1, 4), (1, 2, 2), (2, 3, 4), (1, 1, 1)])
def test_a_known_corner_is_kept_and_continued(sides: tuple[int, int, int]) -> None:
    model = build()
    whole = model.generate(LABELS, temperature=0.0)
    known = torch.zeros(2, 3, 4, dtype=torch.bool)
    known[: sides[0], : sides[1], : sides[2]] = True
    mask = known.flatten().expand(3, -1)
    prefix = VisualTokens(torch.where(mask, whole.ids, 999), mask=mask)
    assert torch.equal(model.generate(LABELS, temperature=0.0, prefix=prefix).ids, whole.ids)


def test_prefixes_that_cannot_be_continued_are_refused() -> None:
    model = build()
    ids = torch.zeros(1, 24, dtype=torch.int64)
    label = torch.tensor([1])
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[0, [0, 13]] = True  # frame 1, column 1: its neighbours are unknown
    with pytest.raises(InvalidInputError, match="in the frame before"):
        model.sample(label, prefix=VisualTokens(ids, mask=mask))
    with pytest.raises(InvalidInputError, match="whole frames of 3x4 = 12"):
        model.sample(label, prefix=VisualTokens(ids[:, :7]))
    with pytest.raises(InvalidInputError, match="whole frames"):
        model.sample(label, prefix=VisualTokens(torch.zeros(1, 36, dtype=torch.int64)))
    with pytest.raises(InvalidInputError, match=r"0\.\.63; got 64\.\.64"):
        model.sample(label, prefix=VisualTokens(ids[:, :12] + 64))
    with pytest.raises(InvalidInputError, match="ids of 1 videos; got 2"):
        model.sample(label, prefix=VisualTokens(ids.repeat(2, 1)))


def test_given_frames_are_visible_to_every_token() -> None:
    model = build(**FRAMES)
    ids, given = torch.randint(0, 64, (1, 24)), torch.randint(0, 64, (1, 12))
    before = model(ids, given)
    for place in (0, 11):
        other = given.clone()
        other[0, place] = (given[0, place] + 1) % 64
        assert not torch.isclose(before, model(ids, other)).all(-1).any()
    for wrong in (given[:, :11], given[0], given + 64, given.float()):
        with pytest.raises(InvalidInputError, match="tokens"):
            model.sample(wrong)
    with pytest.raises(InvalidInputError, match="no null condition"):
        model.sample(given, guidance_scale=2.0)


# ------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("overrides", [{}, FRAMES])
def test_training_lowers_the_loss(overrides: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = NARVideo.tiny(**overrides).train()
    ids = torch.randint(0, 64, (4, 24))
    name = "frames" if overrides else "labels"
    batch = {"ids": ids, name: torch.randint(0, 64, (4, 12)) if overrides else torch.tensor([0, 1, -1, 3])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        loss = model.training_loss(batch, generator=torch.Generator().manual_seed(step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(4.1589, abs=1e-3)  # ln 64: the heads start at zero
    assert losses[-1] < losses[0] - 0.3


def test_samples_that_do_not_count_do_not_matter() -> None:
    model = build()
    ids = torch.randint(0, 64, (2, 24))
    batch = {"ids": ids, "labels": torch.tensor([1, 2]), "valid": torch.tensor([1.0, 0.0])}
    alone = model.training_loss({"ids": ids[:1], "labels": torch.tensor([1])})["loss"]
    torch.testing.assert_close(model.training_loss(batch)["loss"], alone)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = build(token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0, condition_dropout=0.0).train()
    batch = {"ids": torch.randint(0, 64, (2, 24)), "labels": torch.tensor([1, 2])}
    model.training_loss(batch)["loss"].backward()
    before = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model.training_loss(batch)["loss"].backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, before[name])


def test_sampling_first_does_not_spoil_training() -> None:
    model = build(grid=(2, 2, 5))
    with torch.inference_mode():
        model.generate(LABELS, generator=seeds(0, 1, 2))
    model.train().training_loss({"ids": torch.randint(0, 64, (1, 20)), "labels": torch.tensor([1])})["loss"].backward()


# ------------------------------------------------------------------------------------------ checkpoints
@pytest.mark.parametrize("overrides", [{}, {"fixed_positions": True}, FRAMES])
def test_official_files_round_trip(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model = build(**overrides)
    config = {"n_layer": 2, "dim": 32, "n_head": 4, "multiple_of": 16, "num_classes": 10, "vocab_size": 64}
    config |= {"latent_shape": [2, 3, 4], "max_seq_len": 24, "use_fixed_pe": "fixed_positions" in overrides}
    if overrides == FRAMES:
        config |= {"frame_prediction": True, "cls_token_num": 13}
    state = model.to_official()
    assert {"norm_R.weight", "output_D.weight", "output_B.weight", "abs_pe"} <= state.keys()
    averaged = {key: value + 1 for key, value in state.items()}
    path = tmp_path / "last.pth"
    torch.save({"model": {"name": "llama-abs-L", "args": {}, "sd": state, "ema_sd": {0.999: averaged}}}, path)
    for source in (state, path):
        again = NARVideo.from_official(source, config)
        for name, value in again.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
    mean = NARVideo.from_official(path, config, ema_decay=0.999)
    assert torch.equal(mean.output.weight, model.output.weight + 1)
    with pytest.raises(CheckpointError, match=r"no moving average with decay 0\.5; it holds: 0\.999"):
        NARVideo.from_official(path, config, ema_decay=0.5)


def test_the_authors_names_stand_for_sizes() -> None:
    published = NARVideo.published["nar-lp.ucf101"].config
    named = NARVideo.config_from_official({"name": "llama-abs-LP", "args": {"num_classes": 101}})
    assert {key: named[key] for key in published} == dict(published)
    assert named["num_positions"] == 1024
    assert NARVideo.config_from_official({"config": {"dim": 8, "n_layer": 1, "n_head": 2}})["hidden_size"] == 8
    assert NARVideo.config_from_official({"hidden_size": 8}) == {"hidden_size": 8}
    with pytest.raises(InvalidInputError, match="llama-abs-Q"):
        NARVideo.config_from_official({"name": "llama-abs-Q", "args": {}})


def test_files_of_other_systems_are_recognised() -> None:
    picture = NAR.tiny().to_official()
    config = dict(NARVideo.tiny().config)
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    with pytest.raises(CheckpointError, match="NAR for images"):
        NARVideo.from_official(picture, own)
    single = {key: value for key, value in picture.items() if not key.startswith("medusa_")}
    with pytest.raises(CheckpointError, match="single head"):
        NARVideo.from_official(single, own)
    whole = NARVideo.tiny().to_official()
    del whole["norm_B.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: temporal_norm\.weight"):
        NARVideo.from_official(whole, own)


def test_saved_models_load_again(tmp_path: Path) -> None:
    model = build(fixed_positions=True)
    model.save_pretrained(tmp_path)
    again = NARVideo.from_pretrained(tmp_path)
    assert torch.equal(
        model.generate(LABELS, generator=seeds(0, 1, 2)).ids, again.generate(LABELS, generator=seeds(0, 1, 2)).ids
    )


def test_bfloat16_samples() -> None:
    model = build().to(torch.bfloat16)
    assert model.generate(LABELS, guidance_scale=1.25, generator=seeds(0, 1, 2)).ids.max() < 64


def test_heads_can_start_from_the_codebook() -> None:
    codes = torch.randn(64, 8)
    codes[1] = codes[0]
    for overrides in ({}, FRAMES):
        model = NARVideo.tiny(**overrides)
        model.embed_codebook(codes)
        for head in model.heads:
            assert torch.equal(head.weight[0], head.weight[1])
            assert not torch.equal(head.weight[0], head.weight[2])


# ------------------------------------------------------------------------------------------ errors
def test_bad_arguments_are_refused_at_once() -> None:
    model = build()
    for condition in (torch.tensor([10]), torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([], dtype=torch.long)):
        with pytest.raises(InvalidInputError):
            model.sample(condition)
    with pytest.raises(InvalidInputError, match=r"\(frames, rows, cols\)"):
        model.sample(LABELS, grid=(3, 4))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="guidance_scale"):
        model.sample(LABELS, guidance_scale=-1.0)
    with pytest.raises(InvalidInputError, match="null class"):
        build(condition_dropout=0.0).sample(torch.tensor([-1]))
    with pytest.raises(InvalidInputError, match="training mode"):
        build().train().sample(LABELS)
    with pytest.raises(InvalidInputError, match="'labels'"):
        model.training_loss({"ids": torch.zeros(1, 24, dtype=torch.int64)})
    with pytest.raises(InvalidInputError, match=r"\[B, 24\]"):
        model.training_loss({"ids": torch.zeros(1, 9, dtype=torch.int64), "labels": LABELS[:1]})
    for arguments in ({"grid": (2, 3)}, {"num_positions": 5}, {"num_classes": None}, {"num_heads": 5}):
        with pytest.raises(InvalidInputError):
            NARVideo.tiny(**arguments)


def test_damaged_weights_are_noticed() -> None:
    model = build()
    model.temporal_output.weight.data.fill_(float("nan"))
    with pytest.raises(InvalidOutputError, match="NaN"):
        model.generate(LABELS)


def test_the_snippets_of_the_documentation_run(tmp_path: Path) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "nar_video.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    snippets = [snippet for snippet in snippets if "checkpoint=" not in snippet]
    assert len(snippets) == 4
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, page.name, "exec"), names)
    assert torch.equal(names["continued"].ids[:, :12], names["whole"].ids[:, :12])
    assert names["opening"].shape == (1, 3, 2, 16, 16)


def test_a_video_goes_all_the_way_to_an_animation(tmp_path: Path) -> None:
    tokenizer, model = LARP.tiny(), build()
    tokens = model.generate(LABELS, guidance_scale=1.25, generator=seeds(0, 1, 2))
    videos = tokenizer.postprocess(tokenizer.decode(tokens))
    assert [len(frames) for frames in videos] == [4, 4, 4]
    videos[0][0].save(tmp_path / "video.gif", save_all=True, append_images=videos[0][1:])
    assert tokenizer.preprocess(tmp_path / "video.gif").shape == (1, 3, 4, 16, 16)


def test_the_pipeline_for_pictures_refuses_videos() -> None:
    with pytest.raises(InvalidInputError, match="writes videos of 2x3x4 tokens"):
        GenerationPipeline(generator=NARVideo.tiny(), tokenizer=LARP.tiny())
