"""Steering attributes: any pipeline, per image, delayed, together with others, and both ways to find a direction."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.controllers.conftest import draw, make_flux, make_sd, make_sd3, make_sdxl, pipeline
from vistok.controllers.attribute_directions import (
    AttributeDelta,
    AttributeDirections,
    AttributeEdit,
    ContrastivePrompts,
    DirectionLearner,
    LearningSettings,
    PromptPair,
    TrajectoryBank,
    contrast_delta,
)
from vistok.errors import CheckpointError, InvalidInputError
from vistok.nn.prompts import describe_pipeline, encode_prompts
from vistok.nn.spans import covered_tokens, find_subject, token_spans

PROMPT = "a photo of a woman and an old truck"
LENGTH = {"max_sequence_length": 32}


def delta_for(pipe: Any, seed: int = 0) -> AttributeDelta:
    slots = describe_pipeline(pipe, max_sequence_length=32).encoders
    return AttributeDelta.tiny({slot.key: slot.width for slot in slots if slot.tokens}, seed)


def changed_rows(after: torch.Tensor, before: torch.Tensor) -> list[int]:
    return torch.nonzero((after - before).abs().amax(dim=(0, 2)) > 0).flatten().tolist()


def test_plain_states_are_the_pipelines_own(pipe: Any) -> None:
    controller = AttributeDirections(AttributeEdit(delta_for(pipe), "woman", 0.0), delay=0)
    ours = controller.prompt_kwargs(pipe, PROMPT, **LENGTH)
    family = describe_pipeline(pipe).family
    arguments: dict[str, Any] = {"prompt": PROMPT, "device": "cpu", "num_images_per_prompt": 1}
    if family in ("sd", "sdxl"):
        arguments["do_classifier_free_guidance"] = True
    if family == "sd":
        arguments["negative_prompt"] = ""
    if family in ("sd3", "flux"):
        arguments |= {"prompt_2": None, "max_sequence_length": 32}
    if family == "sd3":
        arguments["prompt_3"] = None
    theirs = pipe.encode_prompt(**arguments)
    assert torch.allclose(ours["prompt_embeds"], theirs[0], atol=1e-5)
    if family == "flux":
        assert torch.allclose(ours["pooled_prompt_embeds"], theirs[1], atol=1e-5)
    else:
        assert torch.allclose(ours["negative_prompt_embeds"], theirs[1], atol=1e-5)
    if family in ("sdxl", "sd3"):
        assert torch.allclose(ours["pooled_prompt_embeds"], theirs[2], atol=1e-5)
        assert torch.allclose(ours["negative_pooled_prompt_embeds"], theirs[3], atol=1e-5)


def test_only_the_subjects_tokens_move_and_linearly(pipe: Any) -> None:
    delta = delta_for(pipe)

    def embeds(scale: float, subject: Any = "woman") -> torch.Tensor:
        controller = AttributeDirections(AttributeEdit(delta, subject, scale), delay=0)
        return controller.prompt_kwargs(pipe, PROMPT, **LENGTH)["prompt_embeds"]

    plain = embeds(0.0)
    moved = changed_rows(embeds(1.0), plain)
    assert moved
    text = describe_pipeline(pipe, max_sequence_length=32)
    expected = set()
    encoded, _ = encode_prompts(text, [PROMPT])
    for slot in text.encoders:
        if slot.tokens:
            offset = 77 if text.family == "sd3" and slot.kind == "t5" else 0
            expected |= {offset + place for place in encoded.positions(slot.key, 0, "woman")}
    assert set(moved) == expected
    assert torch.allclose(embeds(-2.0) - plain, -2 * (embeds(1.0) - plain), atol=1e-5)
    assert torch.equal(embeds(1.0, re.compile(r"\bwoman\b")), embeds(1.0))
    start = PROMPT.index("woman")
    assert torch.equal(embeds(1.0, (start, start + 5)), embeds(1.0))


def test_attached_is_the_same_as_passing_the_arguments_and_leaves_no_trace(pipe: Any) -> None:
    before, kind, marks = draw(pipe, PROMPT), type(pipe), sorted(vars(pipe))
    controller = AttributeDirections(AttributeEdit(delta_for(pipe), "woman", 2.0), delay=0.4)
    kwargs = controller.prompt_kwargs(pipe, PROMPT, **LENGTH)
    assert "callback_on_step_end" in kwargs
    direct = draw(pipe, **kwargs)
    assert not torch.equal(direct, before)
    with controller.attached(pipe):
        assert isinstance(pipe, kind)
        assert torch.equal(draw(pipe, PROMPT), direct)
        assert torch.equal(draw(pipe, **controller.prompt_kwargs(pipe, PROMPT, **LENGTH)), direct)
        with pytest.raises(InvalidInputError, match="attached to this"):
            controller.attach(pipe)
    assert type(pipe) is kind
    assert sorted(vars(pipe)) == marks
    assert torch.equal(draw(pipe, PROMPT), before)


def test_the_delay_keeps_the_first_steps(pipe: Any) -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        def callback(pipeline: Any, index: int, timestep: Any, tensors: dict) -> dict:
            seen.setdefault(name, []).append(tensors["latents"].clone())
            return tensors

        return callback

    draw(pipe, PROMPT, steps=4, callback_on_step_end=keep("plain"))
    controller = AttributeDirections(AttributeEdit(delta_for(pipe), "woman", 3.0), delay=0.5)
    with controller.attached(pipe):
        draw(pipe, PROMPT, steps=4, callback_on_step_end=keep("steered"))
    # Prompts encoded in another batch differ by rounding.
    same = [torch.allclose(one, two, atol=1e-5) for one, two in zip(seen["plain"], seen["steered"], strict=True)]
    assert same == [True, True, False, False]


def test_stop_and_schedule(pipe: Any) -> None:
    edit = AttributeEdit(delta_for(pipe), "woman", 2.0)
    whole = draw(pipe, **AttributeDirections(edit, delay=0).prompt_kwargs(pipe, PROMPT, **LENGTH), steps=4)
    halves = AttributeDirections(edit, delay=0, schedule=[(0.5, 0.0)])
    stopped = AttributeDirections(edit, delay=0, stop=0.5)
    one = draw(pipe, **halves.prompt_kwargs(pipe, PROMPT, **LENGTH), steps=4)
    two = draw(pipe, **stopped.prompt_kwargs(pipe, PROMPT, **LENGTH), steps=4)
    assert torch.allclose(one, two, atol=1e-6)
    assert not torch.allclose(one, whole, atol=1e-3)


def test_a_scale_for_each_image_equals_single_images(pipe: Any) -> None:
    delta, scales = delta_for(pipe), [-2.0, 0.0, 1.5]
    kwargs = AttributeDirections(AttributeEdit(delta, "woman", scales), delay=0.4).prompt_kwargs(pipe, PROMPT, **LENGTH)
    generators = [torch.Generator().manual_seed(5) for _ in scales]
    together = draw(pipe, **kwargs, generator=generators)
    for index, scale in enumerate(scales):
        single = AttributeDirections(AttributeEdit(delta, "woman", scale), delay=0.4)
        alone = draw(pipe, **single.prompt_kwargs(pipe, PROMPT, **LENGTH))
        assert torch.allclose(together[index], alone[0], atol=1e-4)


def test_prompts_with_different_subjects_places_and_several_edits() -> None:
    pipe = pipeline("sdxl")
    one, two = delta_for(pipe, 1), delta_for(pipe, 2)
    prompts = ["a woman and a man", "a very old man and a woman"]
    both = AttributeDirections([AttributeEdit(one, "woman", 1.0), AttributeEdit(two, "man", -1.0)], delay=0)
    batch = both.prompt_kwargs(pipe, prompts)["prompt_embeds"]
    for row, prompt in enumerate(prompts):
        assert torch.allclose(batch[row], both.prompt_kwargs(pipe, prompt)["prompt_embeds"][0], atol=1e-5)
    same = AttributeDirections([AttributeEdit(one, "woman"), AttributeEdit(two, "woman")], delay=0)
    total = AttributeDirections(AttributeEdit(one + two, "woman"), delay=0)
    assert torch.allclose(
        same.prompt_kwargs(pipe, prompts[0])["prompt_embeds"],
        total.prompt_kwargs(pipe, prompts[0])["prompt_embeds"],
        atol=1e-5,
    )
    repeated = AttributeDirections(AttributeEdit(one, "woman"), delay=0).prompt_kwargs(
        pipe, prompts, num_images_per_prompt=2
    )
    assert repeated["prompt_embeds"].shape[0] == repeated["negative_prompt_embeds"].shape[0] == 4
    assert torch.equal(repeated["prompt_embeds"][0], repeated["prompt_embeds"][1])


def test_each_prompt_of_a_batch_may_have_its_own_subject() -> None:
    pipe = pipeline("sd")
    delta = delta_for(pipe)
    subjects = {"a woman and a man": "man", "a truck and a woman": "truck"}
    controller = AttributeDirections(AttributeEdit(delta, subjects, [2.0, -1.0]), delay=0)
    batch = controller.prompt_kwargs(pipe, list(subjects))["prompt_embeds"]
    for row, (prompt, subject, scale) in enumerate(zip(subjects, subjects.values(), (2.0, -1.0), strict=True)):
        single = AttributeDirections(AttributeEdit(delta, subject, scale), delay=0)
        assert torch.allclose(batch[row], single.prompt_kwargs(pipe, prompt)["prompt_embeds"][0], atol=1e-5)
    with pytest.raises(InvalidInputError, match="no subject is given for the prompt 'a dog'"):
        controller.prompt_kwargs(pipe, ["a woman and a man", "a dog"])


def test_pipelines_that_lost_their_text_encoder_are_refused() -> None:
    delta = AttributeDelta.tiny({"oai_clip_vit_l": 32})
    for make, component, named in (
        (make_sd, "text_encoder", "oai_clip_vit_l"),
        (make_sd, "tokenizer", "oai_clip_vit_l"),
        (make_sdxl, "text_encoder_2", "openclip_g"),
        (make_flux, "text_encoder_2", "t5_xxl"),
    ):
        pipe = make()
        pipe.register_modules(**{component: None})
        with pytest.raises(InvalidInputError, match=f"no text encoder or tokenizer for {named}"):
            AttributeDirections(AttributeEdit(delta, "woman")).attach(pipe)
    # SD3 may come without T5; a delta for T5 alone then has nothing to act on.
    pipe = make_sd3()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    with pytest.raises(InvalidInputError, match=r"made for t5_xxl \(80 wide\)"):
        AttributeDirections(AttributeEdit(AttributeDelta.tiny({"t5_xxl": 80}), "woman")).prompt_kwargs(pipe, PROMPT)


def test_occurrences_plurals_and_capitals() -> None:
    pipe = pipeline("sd")
    delta = delta_for(pipe)

    def rows(prompt: str, subject: str, occurrence: int | None = None) -> list[int]:
        plain = AttributeDirections(AttributeEdit(delta, subject, 0.0), delay=0)
        moved = AttributeDirections(AttributeEdit(delta, subject, 1.0, occurrence), delay=0)
        return changed_rows(
            moved.prompt_kwargs(pipe, prompt)["prompt_embeds"], plain.prompt_kwargs(pipe, prompt)["prompt_embeds"]
        )

    both = rows("a man and a man", "man")
    assert rows("a man and a man", "man", 0) == both[:1]
    assert rows("a man and a man", "man", -1) == both[1:]
    assert rows("a photo of two dogs", "dog") == rows("a photo of two dogs", "dogs")
    assert rows("A Man", "man") == rows("a man", "man")
    assert rows("the men and a woman", "man") == rows("the men and a woman", "men")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"subject": "cat"}, "its words are: a, photo, of, woman, and, an, old, truck"),
        ({"subject": "woman", "occurrence": 1}, "occurs 1 time"),
        ({"subject": (3, 900)}, "outside the prompt"),
        ({"subject": re.compile("oman")}, "cuts through the token"),
        ({"subject": "woman", "scale": float("nan")}, "finite"),
        ({"subject": "  "}, "empty"),
    ],
)
def test_bad_subjects_and_scales_are_refused(edit: dict, message: str) -> None:
    pipe = pipeline("sd")
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        AttributeDirections(AttributeEdit(delta_for(pipe), **edit)).prompt_kwargs(pipe, PROMPT)


def test_a_subject_that_is_truncated_away_is_refused(pipe: Any) -> None:
    controller = AttributeDirections(AttributeEdit(delta_for(pipe), "truck"))
    with pytest.raises(InvalidInputError, match="truncated away"):
        controller.prompt_kwargs(pipe, "a photo of " + "a dog and " * 60 + "a truck", **LENGTH)


def test_a_delta_of_other_encoders_names_both() -> None:
    published = AttributeDelta.tiny({"oai_clip_vit_l": 768, "openclip_g": 1280})
    with pytest.raises(InvalidInputError, match=r"oai_clip_vit_l \(768 wide\).*openclip_g.*t5_xxl \(32 wide\)"):
        AttributeDirections(AttributeEdit(published, "woman")).prompt_kwargs(pipeline("flux"), PROMPT)
    with pytest.raises(InvalidInputError, match=r"768 wide.*32 wide"):
        AttributeDirections(AttributeEdit(published, "woman")).prompt_kwargs(pipeline("sd"), PROMPT)
    openclip = make_sd("gelu")
    with pytest.raises(InvalidInputError, match="openclip_h"):
        AttributeDirections(AttributeEdit(delta_for(pipeline("sd")), "woman")).prompt_kwargs(openclip, PROMPT)


def test_uncovered_encoders_stay_and_unknown_pipelines_are_refused() -> None:
    pipe = pipeline("sdxl")
    half = AttributeDelta({"openclip_g": torch.ones(24)})
    plain = AttributeDirections(AttributeEdit(half, "woman", 0.0), delay=0).prompt_kwargs(pipe, PROMPT)["prompt_embeds"]
    moved = AttributeDirections(AttributeEdit(half, "woman", 1.0), delay=0).prompt_kwargs(pipe, PROMPT)["prompt_embeds"]
    assert torch.equal(moved[..., :32], plain[..., :32])
    assert not torch.equal(moved[..., 32:], plain[..., 32:])
    with pytest.raises(InvalidInputError, match="none of the pipelines"):
        AttributeDirections(AttributeEdit(half, "woman")).prompt_kwargs(torch.nn.Linear(1, 1), PROMPT)


def test_pooled_vectors() -> None:
    pipe = pipeline("sdxl")
    delta = AttributeDelta({}, {"openclip_g": torch.ones(20)})
    plain = AttributeDirections(AttributeEdit(delta, "woman", 0.0), delay=0).prompt_kwargs(pipe, PROMPT)
    moved = AttributeDirections(AttributeEdit(delta, "woman", 0.5), delay=0.4).prompt_kwargs(pipe, PROMPT)
    assert torch.equal(moved["pooled_prompt_embeds"], plain["pooled_prompt_embeds"])
    assert not torch.equal(draw(pipe, **moved), draw(pipe, **plain))
    flux = pipeline("flux")
    clip = AttributeDelta({}, {"oai_clip_vit_l": torch.ones(32)})
    with pytest.raises(InvalidInputError, match="cannot change the pooled vector"):
        AttributeDirections(AttributeEdit(clip, "woman"), delay=0.4).prompt_kwargs(flux, PROMPT, **LENGTH)


def test_attached_refuses_calls_that_it_cannot_steer() -> None:
    pipe = pipeline("sdxl")
    controller = AttributeDirections(AttributeEdit(delta_for(pipe), "woman"))
    with controller.attached(pipe):
        with pytest.raises(InvalidInputError, match="without a prompt"):
            draw(pipe, prompt_embeds=torch.zeros(1, 77, 56), pooled_prompt_embeds=torch.zeros(1, 20))
        with pytest.raises(InvalidInputError, match="prompt_2"):
            draw(pipe, PROMPT, prompt_2="something else")


def test_deltas_are_vectors_and_files(tmp_path: Path) -> None:
    one, two = (AttributeDelta.tiny({"oai_clip_vit_l": 8, "openclip_g": 6}, seed) for seed in (1, 2))
    total = (one + two) * 2 - two
    assert torch.allclose(total.tokenwise["openclip_g"], 2 * one.tokenwise["openclip_g"] + two.tokenwise["openclip_g"])
    left = one.orthogonal_to([two])
    assert abs(float(left.tokenwise["openclip_g"] @ two.tokenwise["openclip_g"])) < 1e-5
    assert float((-one).tokenwise["openclip_g"][0]) == -float(one.tokenwise["openclip_g"][0])
    for name in ("delta.pt", "delta.safetensors"):
        one.to(torch.bfloat16).save(tmp_path / name)
        again = AttributeDelta.load(tmp_path / name)
        assert all(torch.equal(again.tokenwise[key], value.bfloat16()) for key, value in one.tokenwise.items())
    with pytest.raises(InvalidInputError, match="saved as"):
        one.save(tmp_path / "delta.txt")
    torch.save({"delta": {"weights": torch.ones(3)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no attribute delta"):
        AttributeDelta.load(tmp_path / "other.pt")
    with pytest.raises(InvalidInputError, match="NaN"):
        AttributeDelta({"openclip_g": torch.tensor([float("nan")])})
    assert len(AttributeDelta.published) == 34


def pairs() -> ContrastivePrompts:
    return ContrastivePrompts([PromptPair("man", "old man", "young man")], "{,a photo of} a")


def test_contrast_is_the_mean_difference(pipe: Any) -> None:
    text = describe_pipeline(pipe, max_sequence_length=32)
    delta = contrast_delta(text, pairs(), pooled=True)
    assert set(delta.tokenwise) == {slot.key for slot in text.encoders if slot.tokens}
    for slot in text.encoders:
        if not slot.tokens:
            continue
        wanted = torch.zeros(slot.width)
        for prefix in pairs().prefixes:
            for phrase, sign in (("old man", 1), ("young man", -1)):
                prompt = f"{prefix} {phrase}"
                spans = token_spans(prompt, slot.tokenizer)
                place = covered_tokens(spans, find_subject(prompt, phrase))[-1]
                with torch.no_grad():
                    wanted += sign * slot.encode([prompt])[0][0, place] / 2
        assert torch.allclose(delta.tokenwise[slot.key], wanted, atol=1e-5)


def short(**settings: Any) -> LearningSettings:
    defaults: dict[str, Any] = {
        "steps": 2,
        "micro_steps": 2,
        "scales": 2,
        "num_inference_steps": 2,
        "size": None,
        "image_size": 64,
        "learning_rate": 0.02,
    }
    return LearningSettings(**(defaults | settings))


def test_learning_changes_the_delta_only_and_resumes_exactly(pipe: Any, tmp_path: Path) -> None:
    network = pipe.components.get("unet") or pipe.components.get("transformer")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    flags = [value.requires_grad for value in network.parameters()]
    whole = DirectionLearner(pipe, pairs(), short(), pooled=True)
    straight = whole.learn(progress=False)
    assert all(float(value.norm()) > 0 for value in straight.tokenwise.values())
    first = DirectionLearner(pipe, pairs(), short(steps=1), pooled=True)
    first.learn(tmp_path / "run.pt", progress=False)
    second = DirectionLearner(pipe, pairs(), short(), pooled=True)
    resumed = second.learn(tmp_path / "run.pt", progress=False)
    assert all(torch.equal(resumed.state_dict()[key], value) for key, value in straight.state_dict().items())
    assert second.losses == whole.losses
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [value.requires_grad for value in network.parameters()] == flags
    with pytest.raises(CheckpointError, match="other settings: seed"):
        DirectionLearner(pipe, pairs(), short(seed=1), pooled=True).learn(tmp_path / "run.pt", progress=False)


def test_learning_lowers_its_loss_and_shares_trajectories(tmp_path: Path) -> None:
    pipe = pipeline("sdxl")
    bank = TrajectoryBank()
    settings = short(steps=1, trajectory_pairs=4, micro_steps=4, learning_rate=0.05, weighting="uniform")
    learner = DirectionLearner(pipe, pairs(), settings, bank=bank)
    learner.optimizer_step()
    assert len(bank) == 1  # four micro-steps, one sampling
    item, draws = learner.item(0), learner.draws(0, 0)
    noisy = learner._banked_sample(item, draws, fresh=False)
    fresh = DirectionLearner(pipe, pairs(), settings, bank=bank)
    losses = []
    for _ in range(12):
        fresh.optimizer.zero_grad()
        step = fresh.micro_step(item, draws, noisy)
        step.loss.backward()
        fresh.optimizer.step()
        losses.append(float(step.loss.detach()))
    assert losses[-1] < losses[0]
    bank.save(tmp_path / "bank.safetensors")
    again = TrajectoryBank.load(tmp_path / "bank.safetensors")
    assert torch.equal(again.get(item.target)[0], bank.get(item.target)[0])
    with pytest.raises(InvalidInputError, match="weighting"):
        LearningSettings(weighting="odd")


def test_prompt_sets(tmp_path: Path) -> None:
    (tmp_path / "age.yaml").write_text(
        "prompts:\n- {prompt_target: man, prompt_positive: old man, prompt_negative: young man, pattern_target: man}\n"
        "prefixes: '{,a photo of} a'\n"
    )
    prompts = ContrastivePrompts.from_yaml(tmp_path / "age.yaml")
    assert [prompts[index].positive for index in range(len(prompts))] == [" a old man", "a photo of a old man"]
    (tmp_path / "bad.yaml").write_text("prompts: []\n")
    with pytest.raises(InvalidInputError, match="expected the keys"):
        ContrastivePrompts.from_yaml(tmp_path / "bad.yaml")
