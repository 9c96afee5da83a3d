"""FlexTok's generators: caches, prefixes, branches, search, guidance, bad input, the authors' files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.plain import flextok as plain
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError
from vistok.generators.flextok_ar import FlexTokAR, sincos_positions
from vistok.nn.text import TextCondition
from vistok.tokens import VisualTokens

GREEDY: dict[str, Any] = {"temperature": 0.0, "guidance_scale": 2.0}


def build(text: bool = False, **overrides: Any) -> FlexTokAR:
    torch.manual_seed(0)
    return FlexTokAR.tiny(**{"vocab_size": 64, **({"caption_dim": 12} if text else {}), **overrides})


def captions(*lengths: int, seed: int = 0) -> TextCondition:
    features = torch.stack([torch.randn(6, 12, generator=torch.Generator().manual_seed(seed + i)) for i in lengths])
    return TextCondition(features, torch.arange(6) >= 6 - torch.tensor(lengths)[:, None])


def condition_for(model: FlexTokAR) -> Tensor | TextCondition:
    return captions(4, 6, 2) if model.is_text_conditional else torch.tensor([3, 0, 9])


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


VARIANTS = [
    {},
    {"norm_type": "rms", "norm_eps": 1e-6, "qk_norm": True, "cross_qk_norm": True},
    {"gated_mlp": False, "bias": True, "head_bias": True, "head_norm": True, "positions": "sincos1d"},
    {"positions": "sincos2d"},
    {"positions": "none"},
]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_the_cache_changes_nothing(text: bool, overrides: dict[str, Any]) -> None:
    model = build(text, **overrides)
    condition = condition_for(model)
    tokens = model.generate(condition, temperature=0.0)
    logits = model(tokens.ids, condition)
    torch.testing.assert_close(logits.argmax(-1), tokens.ids)
    assert tokens.ids.shape == (3, 16)
    assert len(torch.unique(tokens.ids)) > 3 or overrides == {"positions": "none"}


def test_against_reading_everything_again() -> None:
    model = build()
    labels = torch.tensor([3, 0, 9])
    for settings in ({"temperature": 0.0}, {"guidance_scale": 2.5, "top_k": 20, "top_p": 0.9, "temperature": 0.8}):
        expected = plain.generate(model, labels, generator=seeds(1, 2, 3), **settings)
        assert torch.equal(model.generate(labels, generator=seeds(1, 2, 3), **settings).ids, expected)


def test_steps_are_whole_images() -> None:
    model = build()
    steps = list(model.sample(torch.tensor([1, 2]), num_tokens=5, generator=seeds(0, 1)))
    assert [step.tokens.ids.shape for step in steps] == [(2, n) for n in range(1, 6)]
    assert [(step.index, step.total, step.changed.tolist()) for step in steps] == [(n, 5, [n]) for n in range(5)]
    assert all(step.tokens.grid is None and step.tokens.mask is None for step in steps)
    whole = model.generate(torch.tensor([1, 2]), generator=seeds(0, 1))
    assert torch.equal(whole.ids[:, :5], steps[-1].tokens.ids)


@pytest.mark.parametrize("text", [False, True])
def test_one_position_a_row_is_run(text: bool) -> None:
    model = build(text)
    shapes: list[tuple[int, ...]] = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    read: list[int] = []
    if text:
        model.text_mlp["fc1"].register_forward_pre_hook(lambda module, inputs: read.append(len(inputs[0])))
    model.generate(condition_for(model), num_tokens=4, **GREEDY)
    assert shapes == [(6, 1)] * 4
    assert read == ([4] if text else [])  # three captions and one empty one, once


@pytest.mark.parametrize("text", [False, True])
def test_prefixes_are_continued(text: bool) -> None:
    model = build(text)
    condition = condition_for(model)
    whole = model.generate(condition, **GREEDY)
    for length in (1, 7, 16):
        known = VisualTokens(ids=whole.ids[:, :length])
        steps = list(model.sample(condition, prefix=known, **GREEDY))
        assert len(steps) == 16 - length
        assert torch.equal(model.generate(condition, prefix=known, **GREEDY).ids, whole.ids)
    mask = torch.arange(16) < 3
    masked = VisualTokens(ids=torch.where(mask, whole.ids, 999), mask=mask.expand(3, -1))
    assert torch.equal(model.generate(condition, prefix=masked, **GREEDY).ids, whole.ids)


def test_each_image_depends_on_its_own_generator() -> None:
    model = build()
    together = model.generate(torch.tensor([1, 2, 3]), generator=seeds(5, 6, 7), guidance_scale=2.0)
    alone = model.generate(torch.tensor([2]), generator=seeds(6), guidance_scale=2.0)
    assert torch.equal(together.ids[1], alone.ids[0])
    single = torch.Generator().manual_seed(0)
    first = model.generate(torch.tensor([1, 2]), generator=single)
    assert torch.equal(first.ids, model.generate(torch.tensor([1, 2]), generator=single.manual_seed(0)).ids)


def test_empty_captions_guide() -> None:
    model = build(True)
    condition = captions(4, 6)
    guided = model.generate(condition, **GREEDY)
    assert not torch.equal(guided.ids, model.generate(condition, temperature=0.0).ids)
    features = torch.randn(1, 12)
    given = model.generate(condition, null_condition=TextCondition(features[None]), **GREEDY)
    model.set_null_text(features)
    assert torch.equal(model.generate(condition, **GREEDY).ids, given.ids)
    padded = TextCondition(torch.cat([features, torch.full((3, 12), 7.0)])[None], torch.arange(4)[None] < 1)
    assert torch.equal(model.generate(condition, null_condition=padded, **GREEDY).ids, given.ids)
    with pytest.raises(InvalidInputError, match=r"\[n, caption_dim\]"):
        model.set_null_text(torch.zeros(1, 5))


@pytest.mark.parametrize("text", [False, True])
def test_bfloat16(text: bool) -> None:
    model = build(text)
    condition = condition_for(model)
    ids = model.generate(condition, temperature=0.0).ids
    expected = model(ids, condition).detach()
    model.to(torch.bfloat16)
    found = model(ids, condition).detach()
    assert found.dtype == torch.float32
    assert float((found - expected).abs().mean()) < 0.1 * float(expected.std())
    assert model.generate(condition, guidance_scale=2.0, generator=seeds(0, 1, 2)).ids.shape == (3, 16)
    branches = model.branch(condition, 2, num_tokens=4, generator=seeds(0, 1, 2), guidance_scale=2.0)
    assert torch.isfinite(branches.log_probs).all()


def test_the_authors_guidance_is_an_option() -> None:
    model = build()
    labels = torch.tensor([3, 5])
    fixed = model.generate(labels, **GREEDY)
    bug = model.generate(labels, class_zero_guidance=True, **GREEDY)
    assert torch.equal(bug.ids[:, 0], fixed.ids[:, 0])
    assert not torch.equal(bug.ids, fixed.ids)
    # By hand: from the second token on, the unconditional rows are those of class 0.
    ids = bug.ids[:, :1]
    while ids.shape[1] < 16:
        padded = torch.cat([ids, ids[:, :1]], dim=1)  # the last one is not read
        cond, zero = model(padded, labels)[:, -1], model(padded, torch.zeros_like(labels))[:, -1]
        ids = torch.cat([ids, (zero + 2 * (cond - zero)).argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(bug.ids, ids)
    with pytest.raises(InvalidInputError, match="about classes"):
        build(True).generate(captions(3), class_zero_guidance=True)


# ------------------------------------------------------------------------------------------------- branching and search


@pytest.mark.parametrize("text", [False, True])
def test_branches_share_their_beginning(text: bool) -> None:
    model = build(text)
    condition = condition_for(model)
    found = model.branch(condition, 4, branch_at=5, num_tokens=9, generator=seeds(0, 1, 2), guidance_scale=2.0)
    ids = found.tokens.ids.view(3, 4, 9)
    assert (ids[:, :, :5] == ids[:, :1, :5]).all()
    assert all(len(set(row)) == 4 for row in ids[:, :, 5].tolist())
    # The log-probabilities are those of teacher forcing with guidance.
    for image in range(3):
        own = (
            condition[image : image + 1]
            if not text
            else TextCondition(condition.features[image : image + 1], condition.mask[image : image + 1])
        )
        for branch in range(4):
            prefix, total = VisualTokens(ids=ids[image, branch : branch + 1, :0]), 0.0
            for position in range(9):
                prefix = VisualTokens(ids=ids[image, branch : branch + 1, :position])
                every = model.branch(
                    own,
                    64,
                    num_tokens=position + 1,
                    prefix=prefix if position else None,
                    temperature=0.0,
                    guidance_scale=2.0,
                )
                place = every.tokens.ids[:, -1] == ids[image, branch, position]
                total += float(every.log_probs[place])
            assert total == pytest.approx(float(found.log_probs.view(3, 4)[image, branch]), abs=1e-3)
        break


def test_greedy_branches_are_the_most_likely_tokens() -> None:
    model = build()
    labels = torch.tensor([3, 0])
    found = model.branch(labels, 3, num_tokens=4, temperature=0.0)
    ids = found.tokens.ids.view(2, 3, 4)
    assert torch.equal(ids[:, 0], model.generate(labels, num_tokens=4, temperature=0.0).ids)
    assert torch.equal(ids[:, :, 3], model(ids[:, 0], labels)[:, -1].topk(3).indices)
    assert (found.log_probs.view(2, 3).diff(dim=1) <= 0).all()
    same = model.branch(labels, 3, num_tokens=4, temperature=0.0, distinct=False)
    assert (same.tokens.ids.view(2, 3, 4) == same.tokens.ids.view(2, 3, 4)[:, :1]).all()
    with pytest.raises(InvalidInputError, match="only 2 tokens"):
        model.branch(labels, 3, top_k=2)


def test_draws_without_replacement_follow_the_distribution() -> None:
    model = build()
    labels = torch.zeros(4000, dtype=torch.int64)
    with torch.no_grad():
        expected = model(torch.zeros(1, 1, dtype=torch.int64), labels[:1])[0, 0].softmax(-1)
    found = model.branch(labels, 2, num_tokens=1, branch_at=0, generator=seeds(0)[0]).tokens.ids.view(4000, 2)
    share = torch.bincount(found[:, 0], minlength=64) / 4000
    assert float((share - expected).abs().max()) < 5 * math.sqrt(0.25 / 4000)
    assert (found[:, 0] != found[:, 1]).all()


def prefer(target: int) -> Any:
    """A score that counts how often a token occurs."""

    def score(tokens: VisualTokens, images: Tensor) -> Tensor:
        return (tokens.ids == target).sum(1).float()

    return score


def test_search_finds_better_candidates() -> None:
    model = build()
    labels = torch.tensor([3, 0])
    plain_score = prefer(7)(model.generate(labels, generator=seeds(0, 1)), labels)
    best_of = model.search(
        labels, prefer(7), schedule=[16], num_beams=1, num_candidates=24, generator=seeds(0, 1), temperature=2.0
    )
    found = model.search(
        labels, prefer(7), schedule=range(1, 17), num_beams=3, num_candidates=8, generator=seeds(0, 1), temperature=2.0
    )
    assert (best_of.scores >= plain_score).all()
    assert (found.scores > best_of.scores).all()
    assert torch.equal(prefer(7)(found.tokens, labels), found.scores)
    assert [len(tokens) for tokens, _ in found.history] == [2 * 3] * 15 + [2]
    assert torch.equal(found.history[-1][0].ids, found.tokens.ids)


def test_search_sees_prefixes_and_keeps_images_apart() -> None:
    model = build()
    lengths: list[tuple[int, int, list[int]]] = []

    def score(tokens: VisualTokens, images: Tensor) -> Tensor:
        lengths.append((len(tokens), tokens.num_tokens, images.tolist()))
        return -tokens.ids.float().sum(1)

    labels = torch.tensor([1, 2])
    both = model.search(labels, score, num_beams=2, num_candidates=3, generator=seeds(4, 5), guidance_scale=2.0)
    assert [(count, length) for count, length, _ in lengths] == [(6, 1), *((12, n) for n in (2, 4, 8, 16))]
    assert lengths[1][2] == [0] * 6 + [1] * 6
    alone = model.search(
        labels[1:],
        lambda tokens, images: -tokens.ids.float().sum(1),
        num_beams=2,
        num_candidates=3,
        generator=seeds(5),
        guidance_scale=2.0,
    )
    assert torch.equal(both.tokens.ids[1], alone.tokens.ids[0])
    # A search over one candidate is sampling.
    single = model.search(labels, score, num_beams=1, num_candidates=1, generator=seeds(4, 5))
    assert torch.equal(single.tokens.ids, model.generate(labels, generator=seeds(4, 5)).ids)
    prefix = VisualTokens(ids=both.tokens.ids[:, :3])
    lengths.clear()
    grown = model.search(labels, score, prefix=prefix, generator=seeds(4, 5), num_tokens=10)
    assert [length for _, length, _ in lengths] == [4, 8, 10]
    assert torch.equal(grown.tokens.ids[:, :3], prefix.ids)


# ------------------------------------------------------------------------------------------------------------ objective


@pytest.mark.parametrize("text", [False, True])
def test_training_lowers_the_loss(text: bool) -> None:
    model = build(text).train()
    batch: dict[str, Tensor] = {"ids": torch.randint(0, 64, (3, 16))}
    condition = condition_for(model)
    if isinstance(condition, TextCondition):
        batch |= {"text_features": condition.features, "text_mask": condition.mask}
    else:
        batch["labels"] = condition
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(10):
        loss = model.training_loss(batch, generator=seeds(step)[0])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    every = model.training_loss(batch)["loss"]
    first = model.training_loss({**batch, "valid": torch.tensor([True, False, False])})["loss"]
    assert not torch.isclose(every, first)
    shorter = model.training_loss({**batch, "ids": batch["ids"][:, :4]})["loss"]
    assert torch.isfinite(shorter)


def test_the_null_condition_is_trained() -> None:
    labels, ids = torch.tensor([3, 5]), torch.randint(0, 64, (2, 16))
    model = build(condition_dropout=0.999999).train()
    dropped = model(ids, labels, generator=seeds(0)[0])
    torch.testing.assert_close(dropped, model(ids, labels.flip(0), generator=seeds(0)[0]))
    text = build(True, condition_dropout=0.999999).train()
    text.training_loss({"ids": ids, "text_features": captions(2, 3).features}, generator=seeds(0)[0])["loss"].backward()
    assert text.null_text.grad.abs().sum() > 0


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for recompute in (False, True):
        model = build(True).train()
        if recompute:
            model.enable_gradient_checkpointing()
        condition = captions(2, 3)
        batch = {"ids": torch.arange(32).view(2, 16), "text_features": condition.features, "text_mask": condition.mask}
        model.training_loss(batch, generator=seeds(0)[0])["loss"].backward()
        gradients.append(model.layers[0].attention.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_input() -> None:
    model, text = build(), build(True)
    labels = torch.tensor([1])
    for call, message in (
        (lambda: model.sample(torch.tensor([10])), r"0\.\.9"),
        (lambda: model.sample(torch.tensor([1.0])), "class labels as int64"),
        (lambda: model.sample(captions(3)), "class-conditional"),
        (lambda: text.sample(labels), "text-conditional"),
        (lambda: text.sample(TextCondition(torch.zeros(1, 3, 5))), "another text encoder"),
        (lambda: text.sample(captions(0)), "no valid token"),
        (lambda: model.sample(labels, num_tokens=0), r"1\.\.16"),
        (lambda: model.sample(labels, num_tokens=17), r"1\.\.16"),
        (lambda: model.sample(labels, temperature=-1.0), "temperature"),
        (lambda: model.sample(labels, guidance_scale=math.nan), "guidance_scale"),
        (lambda: model.sample(labels, grid=(4, 4)), r"\(1, 16\)"),
        (lambda: model.sample(labels, generator=seeds(1, 2)), "2 generators"),
        (lambda: model.sample(labels, prefix=VisualTokens(ids=torch.tensor([[64]]))), r"0\.\.63"),
        (lambda: model.sample(labels, prefix=VisualTokens(ids=torch.zeros(2, 1, dtype=torch.int64))), "1 images"),
        (
            lambda: model.sample(labels, num_tokens=2, prefix=VisualTokens(ids=torch.zeros(1, 3, dtype=torch.int64))),
            "more than num_tokens=2",
        ),
        (lambda: model.branch(labels, 0), "num_branches"),
        (lambda: model.branch(labels, 2, branch_at=16), r"0\.\.15"),
        (lambda: model.search(labels, prefer(1), num_beams=0), "num_beams"),
        (lambda: model.search(labels, prefer(1), schedule=[0, 4]), r"1\.\.16"),
        (lambda: model.search(labels, lambda tokens, images: torch.zeros(1)), "4 numbers"),
        (lambda: model.search(labels, lambda tokens, images: torch.full((4,), math.nan)), "NaN"),
        (lambda: build().train().sample(labels), "training mode"),
        (lambda: FlexTokAR.tiny(caption_dim=8, num_classes=3), "either num_classes"),
        (lambda: model.training_loss({"ids": torch.zeros(1, 17, dtype=torch.int64), "labels": labels}), r"1\.\.16"),
        (lambda: model.training_loss({"ids": torch.zeros(1, 16, dtype=torch.int64)}), "'labels'"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            call()
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(InvalidOutputError, match="NaN"):
        model.generate(labels)


# --------------------------------------------------------------------------------------------------- saving and loading


def official_of(model: FlexTokAR) -> dict[str, Tensor]:
    """A state dict of `tiny` under the authors' names."""
    text = model.is_text_conditional
    size = model.config.hidden_size
    state = model.state_dict()
    stem, official = "models.ar_image_model.", {}
    for key, value in state.items():
        if key == "null_text":
            continue
        if key.startswith("layers."):
            key = f"{stem}trunk.blocks.{key.removeprefix('layers.')}"
            key = key.replace("attention_norm", "norm_1").replace("mlp_norm", "norm_3" if text else "norm_2")
            key = key.replace("cross_norm", "norm_2").replace(".feed_forward.", ".mlp.")
            key = key.replace(".cross_attention.", ".cross_attn.").replace(".cross_attn.q.", ".cross_attn.Wq.")
            key = key.replace(".attention.", ".self_attn." if text else ".attn.")
            if ".cross_attn.kv." in key:
                official[key.replace(".kv.", ".Wk.")], official[key.replace(".kv.", ".Wv.")] = value.split(size)
                continue
            if ".mlp.fc1." in key:
                official[key], official[key.replace("fc1", "fc3")] = value.chunk(2)
                continue
            official[key] = value
            continue
        for ours, theirs in (
            ("token_embedding.", f"{stem}preprocessor.embedding."),
            ("class_embedding.", f"{stem}preprocessor.cls_embedding."),
            ("position_table", f"{stem}preprocessor.positional_embedding"),
            ("start", f"{stem}preprocessor.sos_token_embed"),
            ("norm.", f"{stem}trunk.post_trunk_norm."),
            ("head.", f"{stem}head.linear."),
            ("text_mlp.", "models.text_encoder.mlp."),
        ):
            if key.startswith(ours):
                official[theirs + key.removeprefix(ours)] = value
                break
        else:
            raise AssertionError(key)
    return official


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("overrides", [{}, VARIANTS[1]])
def test_the_authors_files(text: bool, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = build(text, **({**overrides, "cross_qk_norm": text} if overrides else {}))
    state = official_of(model)
    state["models.image_tokenizer.anything"] = state["models.text_encoder.t5_embedder.x"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pt")
    loaded = FlexTokAR.from_official(tmp_path / "model.pt", {"num_heads": 4})
    condition = condition_for(model)
    assert torch.equal(loaded.generate(condition, temperature=0.0).ids, model.generate(condition, temperature=0.0).ids)
    if text:
        with pytest.raises(InvalidInputError, match="set_null_text"):
            loaded.sample(condition, guidance_scale=2.0)
        loaded.set_null_text(model.null_text.detach())
    assert torch.equal(loaded.generate(condition, **GREEDY).ids, model.generate(condition, **GREEDY).ids)
    del state["models.ar_image_model.trunk.blocks.1.mlp.fc2.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: layers\.1\.feed_forward\.fc2\.weight"):
        FlexTokAR.from_official(state, {"num_heads": 4})
    with pytest.raises(CheckpointError, match="load it with FlexTok"):
        FlexTokAR.from_official({"encoder.module_dict.enc_transformer.x": torch.zeros(1)}, "flexar-113m.t2i")


def test_saving_and_loading(tmp_path: Path) -> None:
    model = build(True)
    model.save_pretrained(tmp_path)
    again = FlexTokAR.from_pretrained(tmp_path)
    condition = captions(4, 6)
    assert torch.equal(again.generate(condition, **GREEDY).ids, model.generate(condition, **GREEDY).ids)


def test_published_sizes() -> None:
    for name, millions in (("flexar-113m.t2i", 113), ("flexar-382m.t2i", 382), ("flexar-1b.t2i", 1150)):
        with torch.device("meta"):
            model = FlexTokAR(**FlexTokAR.published[name].config)
        inside = sum(parameter.numel() for parameter in model.layers.parameters())
        assert inside == pytest.approx(millions * 1e6, rel=0.03)


def test_fixed_positions() -> None:
    table = sincos_positions(8, 9, "sincos1d")
    assert not table[0].any()
    torch.testing.assert_close(table[1], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    torch.testing.assert_close(
        table[3, 4:],
        torch.tensor([2.0, 0.02, 2.0, 0.02])
        .sin_()
        .index_copy_(0, torch.tensor([2, 3]), torch.tensor([2.0, 0.02]).cos()),
    )
    with pytest.raises(InvalidInputError, match="square"):
        sincos_positions(8, 10, "sincos2d")
