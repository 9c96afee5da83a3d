"""The lab's vision-language model: packed questions, objectives, files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.data.shapes import COLOURS, QUESTION_VOCABULARY, SHAPES, VOCABULARY, questions, render, sample_scene
from vistok.errors import CheckpointError, InvalidInputError
from vistok.metrics.pruning import Asker, load_lvlm
from vistok.training.export import export
from vistok.training.lvlm import (
    ASSISTANT,
    BEGIN,
    END,
    IMAGE,
    UNKNOWN,
    USER,
    VOCABULARY_SIZE,
    LabLlava,
    LlavaMonitor,
    ShapesQuestions,
    answers,
    build_processor,
    inventory,
    pack,
    patch_targets,
    word_ids,
)
from vistok.training.recipe import ShapesQuestionsRecipe, parse_recipe
from vistok.training.trainer import Trainer, read_weights

DATA = {"source": "shapes-questions", "image_size": 16, "text_tokens": 48}
SIZES = {
    "image_size": 16,
    "vision_hidden_size": 16,
    "vision_layers": 2,
    "vision_heads": 2,
    "vision_ffn_size": 16,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_size": 16,
}


def recipe(name: str = "tiny-llava", stage: str = "language", **changes):
    values = {
        "name": name,
        "model": {"system": "lab-llava", "config": {"stage": stage, **SIZES}},
        "data": dict(DATA),
        "steps": 4,
        "batch_size": 4,
        "ema_decay": 0.5,
        "checkpoint_every": 2,
        "log_every": 1,
    }
    return parse_recipe({**values, **changes})


def batch(count: int = 4, **changes) -> dict:
    source = ShapesQuestions(ShapesQuestionsRecipe(**{**DATA, **changes}), 0)
    found = source.batch(np.arange(count))
    found["images"] = found["images"].float() / 127.5 - 1
    return found


def test_words_are_those_of_the_tokenizer():
    tokenizer = build_processor(16).tokenizer
    assert UNKNOWN not in word_ids(" ".join([*QUESTION_VOCABULARY, *VOCABULARY]))
    for index in range(20):
        for item in questions(sample_scene(3, index)):
            assert tokenizer(item.text)["input_ids"] == word_ids(item.text)
            assert len(word_ids(item.answer)) == 1
    assert word_ids("What colour is the zebra?")[4] == UNKNOWN


def test_patch_targets_say_what_lies_where():
    scene = sample_scene(0, 0, 1, shape="square", colour="red")
    targets = patch_targets(scene, 64, 4)
    assert targets.shape == (256, 7)
    owned = targets[:, 0] > 0
    assert set(targets[owned, 0]) == {SHAPES.index("square") + 1}
    assert set(targets[owned, 1]) == {COLOURS.index("red")}
    assert np.allclose(targets[owned, 4:6], scene.objects[0].centre)
    assert (targets[~owned, 1:4] == -1).all()
    # The patch nearest the centre holds the centre.
    column, row = (int(value * 16) for value in scene.objects[0].centre)
    assert targets[:, 6].argmax() == row * 16 + column
    # Its pixels differ from the background: the annotation and the picture agree.
    pixels = render(scene, 64).reshape(16, 4, 16, 4, 3).mean((1, 3)).reshape(256, 3)
    redness = pixels[:, 0] - pixels[:, 2]
    assert redness[owned].min() > redness[~owned].max() - 60


def test_packing_fills_the_row_and_learns_answers_only():
    text, labels, segments = np.zeros(24, int), np.full(24, -100), np.full(24, -1)
    pairs = [("how many objects are there?", "two", "count"), ("what shape is the red object?", "star", "shape")]
    assert pack([*pairs, pairs[0]], text, labels, segments) == 2
    first, second = word_ids(pairs[0][0]), word_ids(pairs[1][0])
    assert text[: len(first) + 2].tolist() == [*first, ASSISTANT, *word_ids("two")]
    assert labels[len(first) : len(first) + 2].tolist() == [*word_ids("two"), END]
    assert (labels != -100).sum() == 4
    assert segments.tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 2) + [-1] * (24 - 4 - 13)


def test_scenes_are_a_function_of_seed_and_number():
    source = ShapesQuestions(ShapesQuestionsRecipe(**DATA, descriptions=0.5), 5)
    both, second = source.batch(np.array([1, 2])), source.batch(np.array([2]))
    for name, value in both.items():
        assert torch.equal(value[1:], second[name]), name
    texts = [text for number in range(12) for text, _, kind in source.asked(number) if kind == "description"]
    assert 0 < len(texts) < 12
    scene = sample_scene(1, 4, 2)
    assert inventory(scene).count(",") == 1


def test_kinds_take_turns_and_relations_may_come_more_often():
    counted = []
    for relations in (1, 3):
        source = ShapesQuestions(ShapesQuestionsRecipe(**DATA, objects=(3, 3), relations=relations), 5)
        listed = [[kind for _, _, kind in source.asked(number)][:9] for number in range(40)]
        counted.append(sum(kinds.count("relation") for kinds in listed))
        # The same questions, in another order.
        assert sorted(source.asked(3)) == sorted(
            ShapesQuestions(ShapesQuestionsRecipe(**DATA, objects=(3, 3)), 5).asked(3)
        )
    assert counted[1] > 1.8 * counted[0] > 0


@torch.no_grad()
def test_packed_questions_equal_the_stock_model_on_each_alone():
    torch.manual_seed(0)
    model = LabLlava.tiny().eval()
    data = batch(2, text_tokens=64)
    logits = model.answer_logits(data["images"], data["text"], data["segments"])
    checked = 0
    for row in range(2):
        for segment in range(int(data["segments"][row].max()) + 1):
            places = data["segments"][row] == segment
            ids = torch.cat([torch.tensor([BEGIN, USER] + [IMAGE] * 16), data["text"][row][places]])[None]
            alone = model.llava(input_ids=ids, pixel_values=data["images"][row : row + 1]).logits
            torch.testing.assert_close(logits[row][places], alone[0, 18:], rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked > 6


@pytest.mark.parametrize("projector", ["tokenpacker", "pooling", "points"])
@torch.no_grad()
def test_fewer_visual_tokens_equal_the_stock_model(projector):
    torch.manual_seed(0)
    model = LabLlava.tiny(projector=projector, scale_factor=2, feature_levels=(1, 2)).eval()
    data = batch(2)
    states = model.tower(data["images"])
    assert model.visual_tokens(states).shape == (2, 4, 16)
    logits = model.answer_logits(data["images"], data["text"], data["segments"])
    assert logits.shape == (2, 48, VOCABULARY_SIZE)
    if projector == "tokenpacker":
        places = data["segments"][0] == 0
        ids = torch.cat([torch.tensor([BEGIN, USER] + [IMAGE] * 4), data["text"][0][places]])[None]
        alone = model.llava(input_ids=ids, pixel_values=data["images"][:1]).logits
        torch.testing.assert_close(logits[0][places], alone[0, 6:], rtol=1e-4, atol=1e-5)
    else:
        patches = states[-1][:, 1:].unflatten(1, (2, 2, 2, 2)).transpose(2, 3).flatten(1, 2).mean((2, 3))
        torch.testing.assert_close(model.visual_tokens(states), model.llava.model.multi_modal_projector(patches))


@torch.no_grad()
def test_a_part_of_the_tokens_keeps_its_places():
    torch.manual_seed(0)
    model = LabLlava.tiny(visual_keep_ratio=0.5, all_tokens_from=10).eval()
    data = batch(3)
    kept = model.drawn_tokens(data["patches"])
    assert kept.shape == (3, 10)
    assert (kept[:, :2] == torch.tensor([0, 1])).all()
    assert (kept.diff(dim=1) > 0).all()
    assert kept.max() < 18
    prefix = model.prefix(model.tower(data["images"]))
    everything = torch.arange(18).expand(3, -1)
    whole = model.text_states(prefix, data["text"], data["segments"])
    torch.testing.assert_close(model.text_states(prefix, data["text"], data["segments"], everything), whole)
    # Dropping a token is the same as nobody attending to it.
    part = model.text_states(prefix, data["text"], data["segments"], kept)
    assert not torch.allclose(part, whole)
    early, late = (model.training_loss({**data, "step": step})["loss"] for step in (0, 10))
    assert early != late


@pytest.mark.parametrize("scale_factor", [1, 2])
def test_alignment_is_smallest_where_tokens_say_what_they_show(scale_factor):
    torch.manual_seed(0)
    projector = "mlp" if scale_factor == 1 else "tokenpacker"
    model = LabLlava.tiny(projector=projector, scale_factor=scale_factor, feature_levels=(1, 2), alignment_weight=0.5)
    data = batch(3)
    visual = torch.zeros(3, 16 // scale_factor**2, 16, requires_grad=True)
    optimizer = torch.optim.Adam([visual], lr=1.0)
    losses = []
    for _ in range(60):
        loss = model.alignment_loss(visual, data["patches"])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    even = np.mean([np.log(number) for number in (8, 8, 2, 3, 2, 2)])
    assert losses[0] == pytest.approx(even, rel=1e-5)
    assert losses[-1] < 0.2 * even
    found = model.training_loss(data)
    torch.testing.assert_close(found["loss"], found["answers"] + 0.5 * found["alignment"])


@pytest.mark.parametrize("stage", ["tower", "projector", "language", "all"])
def test_a_stage_lowers_its_loss_and_leaves_the_rest_alone(stage):
    torch.manual_seed(0)
    model = LabLlava.tiny(stage=stage)
    before = {name: value.clone() for name, value in model.named_parameters()}
    data = batch(4)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(12):
        found = model.training_loss(data)
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found["loss"].detach()))
    assert losses[-1] < (0.98 if stage == "projector" else 0.8) * losses[0]
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    tower = any("vision_tower" in name for name in changed)
    decoder = any("language_model" in name for name in changed)
    projector = any("projector" in name for name in changed)
    assert (tower, projector, decoder) == {
        "tower": (True, False, False),
        "projector": (False, True, False),
        "language": (False, True, True),
        "all": (True, True, True),
    }[stage]


def test_bad_sizes_are_refused():
    with pytest.raises(InvalidInputError, match="stage"):
        LabLlava.tiny(stage="everything")
    with pytest.raises(InvalidInputError, match="projector is one of"):
        LabLlava.tiny(projector="resampler", scale_factor=2)
    with pytest.raises(InvalidInputError, match="scale_factor"):
        LabLlava.tiny(scale_factor=2)
    with pytest.raises(InvalidInputError, match="divide"):
        LabLlava.tiny(projector="pooling", scale_factor=3)
    with pytest.raises(InvalidInputError, match="patch_size"):
        LabLlava.tiny(image_size=18)
    with pytest.raises(InvalidInputError, match="objects"):
        recipe(data={**DATA, "objects": [3, 1]})


def test_both_stages_train_and_ship_a_stock_model(tmp_path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    Trainer(recipe(stage="tower"), tmp_path / "tower", device="cpu", tensorboard=False).fit()
    second = recipe(
        model={"system": "lab-llava", "config": {"stage": "language", **SIZES}, "init_from": str(tmp_path / "tower")},
        validate_every=4,
    )
    result = Trainer(second, tmp_path / "run", device="cpu", tensorboard=False).fit()
    assert 0 <= result.metrics["val/accuracy"] <= 1
    folder = export(tmp_path / "run", "lab", tmp_path)
    facts = json.loads((folder / "vistok.json").read_text())
    assert (facts["system"], facts["kind"], facts["num_tokens"]) == ("lab-llava", "language model", 16)
    assert "codebook_size" not in facts
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    loaded = vistok.load(folder)
    assert type(loaded) is type(model)
    assert loaded.dtype == torch.float32
    # The frozen tower came through both stages.
    name = "model.vision_tower.embeddings.patch_embedding.weight"
    assert torch.equal(read_weights(str(tmp_path / "tower"))[f"llava.{name}"].bfloat16(), model.get_parameter(name))
    scene = sample_scene(1, 0)
    picture = Image.fromarray(render(scene, 64))  # larger than the model's pictures
    content = [{"type": "image"}, {"type": "text", "text": "how many objects are there?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    expected = [BEGIN, USER, *[IMAGE] * 16, *word_ids("how many objects are there?"), ASSISTANT]
    assert inputs["input_ids"][0].tolist() == expected
    small = (torch.from_numpy(np.array(render(scene, 16))).permute(2, 0, 1).float() / 127.5 - 1)[None]
    same = processor(images=Image.fromarray(render(scene, 16)), text=prompt, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(same, small, rtol=0, atol=1e-6)
    ids = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] > len(expected)


def test_a_tokenpacker_is_trained_on_a_finished_model_and_ships(tmp_path):
    torch.manual_seed(0)
    base = LabLlava.tiny()
    base.save_transformers(tmp_path / "base", base.state_dict())
    few = {**SIZES, "projector": "tokenpacker", "scale_factor": 2, "feature_levels": [1, 2], "projector_size": 16}
    model = {"system": "lab-llava", "config": {"stage": "projector", **few}, "init_from": str(tmp_path / "base")}
    Trainer(recipe(model=model), tmp_path / "aligned", device="cpu", tensorboard=False).fit()
    started = (tmp_path / "aligned" / "init_from.txt").read_text()
    assert "multi_modal_projector" in started
    assert "language_model" not in started
    model = {**model, "config": {"stage": "language", **few}, "init_from": str(tmp_path / "aligned")}
    Trainer(recipe(model=model), tmp_path / "run", device="cpu", tensorboard=False).fit()
    assert not (tmp_path / "run" / "init_from.txt").exists()
    folder = export(tmp_path / "run", "lab-tokenpacker", tmp_path)
    loaded, processor = load_lvlm(str(folder))
    assert type(loaded.model.multi_modal_projector).__name__ == "TokenPacker"
    asker = Asker(loaded, processor, max_new_tokens=2)
    answer = asker.ask(Image.fromarray(render(sample_scene(1, 0), 64)), "how many objects are there?", "unpruned")
    assert answer.visual_tokens == 4
    (folder / "projector" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="TokenPacker"):
        vistok.load(folder)


def test_a_stopped_training_goes_on_the_same(tmp_path):
    whole = Trainer(recipe(), tmp_path / "whole", device="cpu", tensorboard=False).fit()
    Trainer(recipe(steps=2), tmp_path / "half", device="cpu", tensorboard=False).fit()
    file = tmp_path / "half" / "recipe.yaml"
    file.write_text(file.read_text().replace("steps: 2\n", "steps: 4\n", 1))
    resumed = Trainer(recipe(), tmp_path / "half", device="cpu", tensorboard=False).fit()
    assert resumed.metrics["loss"] == whole.metrics["loss"]


def test_the_monitor_counts_right_answers_by_kind():
    torch.manual_seed(0)
    model = LabLlava.tiny().eval()
    monitor = LlavaMonitor(recipe(), torch.device("cpu"))
    monitor.scenes = 8

    class Knows(LabLlava):
        def answer_logits(self, images, text, segments):
            # Says the word that follows in the row, which is the true one.
            following = torch.roll(text, -1, dims=1)
            return torch.nn.functional.one_hot(following, VOCABULARY_SIZE).float()

    model.__class__ = Knows
    figures = monitor.validate(model)
    assert figures["val/accuracy"] == 1.0
    assert {"val/accuracy_count", "val/accuracy_colour"} <= set(figures)


def test_the_shipped_model_answers():
    model = LabLlava.around(vistok.load("llava-shapes"))
    assert model.grid == (16, 16)
    source = ShapesQuestions(ShapesQuestionsRecipe("shapes-questions", text_tokens=96), 7)
    found = answers(model, source, 16, torch.device("cpu"))
    assert len(found) > 100
    assert np.mean([one.right for one in found]) > 0.85
