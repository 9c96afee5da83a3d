"""TokenPacker: network, splicing, slicing, attaching, training, the authors' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from benchmarks.plain import tokenpacker as plain
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError, UnknownNameError
from vistok.tokenizers.tokenpacker import (
    STAGES,
    TokenPacker,
    choose_grid,
    expand_image_tokens,
    llava_from_official,
    picture_layout,
    preprocess,
    slice_picture,
    splice_visual_tokens,
)
from vistok.tokenizers.tokenpacker.llava import multi_level_features

IMAGE_ID = 3


def random_packer(**overrides: Any) -> TokenPacker:
    """Tiny, with weights large enough for every part to matter."""
    torch.manual_seed(0)
    packer = TokenPacker.tiny(**overrides)
    with torch.no_grad():
        for parameter in packer.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
    return packer.eval()


def tiny_llava(tower: str = "clip", **vision: Any) -> LlavaForConditionalGeneration:
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        **vision,
    }
    text = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    config = LlavaConfig(
        vision_config=(CLIPVisionConfig if tower == "clip" else SiglipVisionConfig)(**sizes),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE_ID,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    return LlavaForConditionalGeneration(config).eval()


def prompts(*rows: list[int], tokens: int, **settings: Any) -> dict[str, Tensor]:
    return expand_image_tokens(torch.tensor(rows), tokens, image_token_id=IMAGE_ID, **settings).model_inputs()


# -------------------------------------------------------------------------------------------------------------- network
@pytest.mark.parametrize("scale_factor", [1, 2, 3, 4])
def test_inference_training_and_the_plain_way_agree(scale_factor: int) -> None:
    packer = random_packer(grid_size=12, scale_factor=scale_factor)
    multi_level, features = torch.randn(2, 144, 48), torch.randn(2, 144, 16)
    trained = packer(multi_level, features)
    assert trained.shape == (2, (12 // scale_factor) ** 2, 32)
    assert trained.requires_grad
    with torch.no_grad():
        folded = packer(multi_level, features)
    torch.testing.assert_close(folded, trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.project(packer, features, multi_level), trained, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_levels_one_by_one_and_the_default_query() -> None:
    packer = random_packer()
    levels = [torch.randn(2, 16, 16) for _ in range(3)]
    joined = packer(torch.cat(levels, -1), levels[-1])
    torch.testing.assert_close(packer(levels), joined, rtol=1e-4, atol=1e-5)
    assert torch.equal(packer(torch.cat(levels, -1)), joined)


@torch.no_grad()
def test_a_token_depends_on_its_own_cell_alone() -> None:
    packer = random_packer(grid_size=6, scale_factor=3)
    patches = torch.randn(1, 36, 48)
    other = patches.clone()
    other[0, 6 * 4 + 1] += 1.0  # row 4, column 1: cell (1, 0)
    changed = ~torch.isclose(packer(patches), packer(other), atol=1e-6).all(-1)[0]
    assert changed.tolist() == [False, False, True, False]


@torch.no_grad()
def test_grids_that_are_no_squares_and_other_scales() -> None:
    packer = random_packer(scale_factor=2)
    wide = torch.randn(1, 4 * 8, 48)
    whole = packer(wide, grid=(4, 8))
    left = wide.view(1, 4, 8, 48)[:, :, :4].reshape(1, 16, 48)
    torch.testing.assert_close(whole.view(1, 2, 4, 32)[:, :, :2].flatten(1, 2), packer(left), rtol=1e-4, atol=1e-5)
    assert packer(wide, grid=(4, 8), scale_factor=4).shape == (1, 2, 32)


def test_the_folded_weights_follow_the_weights() -> None:
    packer, patches = random_packer(), torch.randn(1, 16, 48)
    with torch.no_grad():
        first = packer(patches)
        for parameter in packer.parameters():
            parameter.mul_(0.9)
        second = packer(patches)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, packer(patches).detach(), rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(packer(patches).clone(), second, rtol=1e-4, atol=1e-5)


def test_inputs_that_do_not_fit() -> None:
    packer = random_packer()
    with pytest.raises(InvalidInputError, match="48 channels together"):
        packer(torch.randn(1, 16, 47))
    with pytest.raises(InvalidInputError, match="leave the class token out"):
        packer(torch.randn(1, 17, 48))
    with pytest.raises(InvalidInputError, match="must divide both sides of the patch grid 4x4; got 3"):
        packer(torch.randn(1, 16, 48), scale_factor=3)
    with pytest.raises(InvalidInputError, match="features must be"):
        packer(torch.randn(1, 16, 48), torch.randn(2, 16, 16))
    with pytest.raises(InvalidInputError, match="must divide"):
        TokenPacker.tiny(scale_factor=3)
    with pytest.raises(InvalidInputError, match="multiple of num_heads"):
        TokenPacker.tiny(num_heads=3)


# ------------------------------------------------------------------------------------------------------------ attaching
def trace(model: LlavaForConditionalGeneration) -> tuple[Any, ...]:
    hooks = {name: len(part._forward_hooks) + len(part._forward_pre_hooks) for name, part in model.named_modules()}
    own = {name: sorted(vars(part)) for name, part in model.named_modules()}
    return list(model.state_dict()), hooks, own, model.config.to_dict()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_attach_compresses_and_detach_leaves_no_trace(tower: str) -> None:
    model = tiny_llava(tower)
    packer = TokenPacker.for_llava(model, embed_dim=16, num_heads=2)
    pixels = torch.randn(2, 3, 56, 56)
    inputs = prompts([1, -200, 5, 6], [1, 7, -200, 8], tokens=16)
    before, clean = model(**inputs, pixel_values=pixels).logits, trace(model)
    with packer.attached(model):
        tokens = torch.stack(list(model.get_image_features(pixels).pooler_output))
        few = prompts([1, -200, 5, 6], [1, 7, -200, 8], tokens=4)
        logits = model(**few, pixel_values=pixels).logits
        assert logits.shape == (2, 7, 40)
        with pytest.raises(InvalidInputError, match="another TokenPacker"):
            TokenPacker.for_llava(model, embed_dim=16, num_heads=2).attach(model)
    # The levels of the whole tower, though attaching skips the blocks behind the last one.
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    first = int(tower == "clip")
    expected = packer(torch.cat([states[level][:, first:] for level in packer.config.feature_levels], -1))
    assert torch.equal(tokens, expected)
    after = model(**inputs, pixel_values=pixels).logits
    assert torch.equal(before, after)
    assert trace(model) == clean


@torch.no_grad()
def test_generation_in_batches_equals_single_runs() -> None:
    model, rows = tiny_llava(), ([1, -200, 5, 6, 9], [-200, 8])
    packer = TokenPacker.for_llava(model, embed_dim=16, num_heads=2)
    pixels = torch.randn(2, 3, 56, 56)
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    with packer.attached(model):
        single = []
        for row, image in zip(rows, pixels):
            made = model.generate(**prompts(row, tokens=4), pixel_values=image[None], **settings)
            single.append(made[0, -5:])
        ids = torch.tensor([rows[0], [0, 0, 0, *rows[1]]])
        seen = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
        batch = expand_image_tokens(ids, 4, image_token_id=IMAGE_ID, attention_mask=seen, padding_side="left")
        made = model.generate(**batch.model_inputs(), pixel_values=pixels, **settings)
    assert torch.equal(made[:, -5:], torch.stack(single))


def tiny_processor() -> LlavaProcessor:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE_ID, "what": 4, "is": 5, "it": 6}
    vocabulary = Tokenizer(WordLevel(words, unk_token="<unk>"))
    vocabulary.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="<unk>", pad_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    pictures = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    return LlavaProcessor(
        pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


@torch.no_grad()
def test_a_stock_processor_writes_fewer_image_tokens_while_attached() -> None:
    model, processor = tiny_llava(), tiny_processor()
    packer = TokenPacker.for_llava(model, embed_dim=16, num_heads=2)
    request = {"images": Image.new("RGB", (70, 60), "red"), "text": "<image> what is it", "return_tensors": "pt"}
    before = processor(**request)
    assert int((before["input_ids"] == IMAGE_ID).sum()) == 16
    with packer.attached(model), packer.attached(processor):
        inputs = processor(**request)
        assert int((inputs["input_ids"] == IMAGE_ID).sum()) == 4
        assert model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 9)
    assert torch.equal(processor(**request)["input_ids"], before["input_ids"])
    with pytest.raises(InvalidInputError, match="attaches to a LLaVA or to its processor"):
        packer.attach(type("Other", (), {})())


def test_models_that_do_not_fit_are_refused() -> None:
    model = tiny_llava()
    clean = trace(model)
    with pytest.raises(InvalidInputError, match="Linear is of type 'unknown' and lacks vision_tower"):
        random_packer().attach(torch.nn.Linear(2, 2))
    with pytest.raises(InvalidInputError, match="language model's width is 32"):
        random_packer(hidden_size=24).attach(model)
    with pytest.raises(InvalidInputError, match="level 9, but the vision tower has 4 blocks"):
        random_packer(feature_levels=(1, 9)).attach(model)
    with pytest.raises(InvalidInputError, match="grid 4x4; got 5"):
        random_packer(grid_size=5, scale_factor=5).attach(model)
    with torch.device("meta"):
        elsewhere = TokenPacker.tiny()
    with pytest.raises(InvalidInputError, match="move the TokenPacker"):
        elsewhere.attach(model)
    assert trace(model) == clean


@torch.no_grad()
def test_a_tower_and_a_projector_encode_pictures() -> None:
    tower = tiny_llava().model.vision_tower
    packer, pixels = random_packer(), torch.randn(2, 3, 56, 56)
    tokens = packer.encode(pixels, tower)
    assert tokens.grid == (2, 2)
    features, joined = plain.tower_features(tower, pixels, packer.config.feature_levels)
    torch.testing.assert_close(tokens.features, plain.project(packer, features, joined), rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInputError, match="NaN or infinite pixels"):
        packer.encode(pixels * float("nan"), tower)
    with pytest.raises(InvalidInputError, match="expected float images"):
        packer.encode(pixels[0], tower)
    with pytest.raises(InvalidInputError, match="level 9 asked of a tower with"):
        multi_level_features(tower, pixels, [9])
    packer.mlp_out.bias.fill_(float("nan"))
    with pytest.raises(InvalidOutputError, match="check the weights"):
        packer.encode(pixels, tower)


# ------------------------------------------------------------------------------------------------------------- training
def test_both_stages_learn_what_they_should() -> None:
    model = tiny_llava()
    packer = TokenPacker.for_llava(model, embed_dim=16, num_heads=2)
    rows = torch.tensor([[1, -200, 5, 6, 9], [1, -200, 8, 4, 7]])
    labels = torch.where(rows == -200, -100, rows)
    labels[:, :2] = -100
    spliced = expand_image_tokens(rows, 4, image_token_id=IMAGE_ID, labels=labels)
    batch = {**spliced.model_inputs(), "pixel_values": torch.randn(2, 3, 56, 56)}
    with pytest.raises(InvalidInputError, match="attach it to one LLaVA first"):
        packer.training_loss(batch)
    with pytest.raises(InvalidInputError, match="attach a TokenPacker"):
        STAGES["alignment"].prepare(model, 10)
    with packer.attached(model):
        for name, learns in (("alignment", False), ("instruction", True)):
            optimizer, scheduler = STAGES[name].prepare(model, 8, projector_learning_rate=1e-2)
            head, tower = model.lm_head.weight.detach().clone(), model.model.vision_tower.state_dict()
            tower = {key: value.clone() for key, value in tower.items()}
            losses = []
            for _ in range(8):
                loss = packer.training_loss(batch)["loss"]
                loss.backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
            assert losses[-1] < losses[0]
            assert torch.equal(model.lm_head.weight, head) != learns
            now = model.model.vision_tower.state_dict()
            assert all(torch.equal(now[key], value) for key, value in tower.items())
            assert scheduler.get_last_lr()[0] < 1e-6
        with pytest.raises(InvalidInputError, match="no labels"):
            packer.training_loss({"input_ids": rows})


# -------------------------------------------------------------------------------------------------------------- prompts
@pytest.mark.parametrize(
    ("grid", "length"), [((2, 3), 1015), ((3, 3), 1450), ((4, 4), 2465), ((1, 1), 145), (None, 144)]
)
def test_lengths_of_pictures(grid: tuple[int, int] | None, length: int) -> None:
    layout = picture_layout(144, grid)
    assert len(layout) == length
    rows, cols = grid or (1, 1)
    crops = rows * cols + (rows * cols > 1)
    assert layout[layout >= 0].tolist() == list(range(144 * crops))
    assert int((layout == -1).sum()) == rows * (cols - 1)


@torch.no_grad()
def test_expanded_prompts_and_spliced_embeddings_give_the_same_logits() -> None:
    model = tiny_llava()
    packer = TokenPacker.for_llava(model, embed_dim=16, num_heads=2)
    rows = torch.tensor([[1, -200, 5, -200, 9], [1, 7, 8, 4, 0]])
    settings = {
        "grids": [(1, 2), (1, 1)],
        "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 1, 0]]),
        "labels": torch.where(rows == -200, -100, rows),
        "separator_id": 11,
        "row_end_id": 0,
    }
    with packer.attached(model):
        pixels = torch.randn(4, 3, 56, 56)
        expanded = expand_image_tokens(rows, 4, image_token_id=IMAGE_ID, **settings)
        stock = model(**expanded.model_inputs(), pixel_values=pixels)
        tokens = torch.stack(list(model.get_image_features(pixels).pooler_output))
        spliced = splice_visual_tokens(model.get_input_embeddings(), rows, tokens, **settings)
        ours = model(**spliced.model_inputs())
    seen = spliced.attention_mask
    assert torch.equal(seen, expanded.attention_mask)
    torch.testing.assert_close(stock.logits[seen], ours.logits[seen], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stock.loss, ours.loss)


def test_padding_sides_and_cutting() -> None:
    rows = torch.tensor([[1, -200, 2], [5, 6, 7]])
    right = expand_image_tokens(rows, 3, image_token_id=IMAGE_ID, pad_token_id=39)
    left = expand_image_tokens(rows, 3, image_token_id=IMAGE_ID, pad_token_id=39, padding_side="left")
    assert right.input_ids.tolist() == [[1, 3, 3, 3, 2], [5, 6, 7, 39, 39]]
    assert left.input_ids.tolist() == [[1, 3, 3, 3, 2], [39, 39, 5, 6, 7]]
    assert left.attention_mask.tolist() == [[True] * 5, [False, False, True, True, True]]
    assert right.labels is None
    short = expand_image_tokens(rows, 3, image_token_id=IMAGE_ID, max_length=4)
    assert short.input_ids.tolist() == [[1, 3, 3, 3], [5, 6, 7, 0]]
    none = expand_image_tokens(rows[1:], 3)
    assert torch.equal(none.input_ids, rows[1:])


def test_prompts_that_do_not_fit_their_pictures() -> None:
    embedding, rows = torch.nn.Embedding(10, 4), torch.tensor([[1, -200, 2]])
    with pytest.raises(InvalidInputError, match="need 1 crops; visual_tokens holds 2"):
        splice_visual_tokens(embedding, rows, torch.randn(2, 3, 4))
    with pytest.raises(InvalidInputError, match="1 pictures in the prompts, but 2 grids"):
        expand_image_tokens(rows, 3, grids=[(1, 1), (1, 1)])
    with pytest.raises(InvalidInputError, match="must be int64"):
        expand_image_tokens(rows.float(), 3)
    with pytest.raises(InvalidInputError, match="labels"):
        expand_image_tokens(rows, 3, labels=rows[:, :2])
    with pytest.raises(InvalidInputError, match="padding_side"):
        expand_image_tokens(rows, 3, padding_side="top")


# ------------------------------------------------------------------------------------------------------------- pictures
def test_slices_show_the_whole_picture() -> None:
    image = Image.effect_noise((200, 90), 60).convert("RGB")
    crops, grid = slice_picture(image, crop_size=28)
    assert crops.shape == (grid[0] * grid[1] + 1, 3, 28, 28)
    canvas = crops[:-1].view(*grid, 3, 28, 28).permute(2, 0, 3, 1, 4).reshape(3, grid[0] * 28, grid[1] * 28)
    used = canvas.abs().sum(0) > 0
    assert used[:, 0].float().mean() > 0.5
    assert used[0].float().mean() > 0.5
    smooth, _ = slice_picture(image, crop_size=28, antialias=True, overview_of_picture=True)
    assert smooth.shape == crops.shape
    assert float(smooth.std()) < float(crops.std())


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (336, 336)])
def test_extreme_sizes_are_sliced(size: tuple[int, int]) -> None:
    crops, (rows, cols) = slice_picture(Image.new("RGB", size, "red"), crop_size=14)
    assert len(crops) == rows * cols + (rows * cols > 1)
    assert torch.isfinite(crops).all()


def test_batches_of_pictures(tmp_path: Path) -> None:
    wide, tall = Image.new("RGB", (90, 30), "blue"), Image.new("RGB", (30, 60), "red")
    wide.save(tmp_path / "wide.png")
    pixels, grids = preprocess([tmp_path / "wide.png", tall], image_size=28)
    assert pixels.shape == (2, 3, 28, 28)
    assert grids is None
    crops, grids = preprocess([wide, tall], mode="slice", image_size=28, max_crops=16)
    assert len(grids) == 2
    assert len(crops) == sum(rows * cols + (rows * cols > 1) for rows, cols in grids)
    with pytest.raises(InvalidInputError, match="mode must be"):
        preprocess(wide, mode="stretch")
    with pytest.raises(InvalidInputError, match="no pictures"):
        preprocess([])
    with pytest.raises(InvalidInputError, match="max_crops must be one of"):
        choose_grid(10, 10, max_crops=7)
    with pytest.raises(InvalidInputError, match="at least one pixel"):
        choose_grid(0, 10)


# ------------------------------------------------------------------------------------------------------- authors' files
def test_official_names_go_round() -> None:
    packer = random_packer()
    official = packer.to_official()
    assert len(official) == 23
    config = {"hidden_size": 32, "raw_grid": 4, "kv_dim": 16, "multi_dim": 48, "embed_dim": 16, "num_heads": 2}
    wrapped = {f"model.mm_projector.{key}": value for key, value in official.items()} | {
        "lm_head.weight": torch.ones(1)
    }
    loaded = TokenPacker.from_official(wrapped, {**config, "scale_factor": 2})
    for key, value in packer.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    official = random_packer().to_official()
    config = dict(random_packer().config)
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    official.pop("mlp.2.bias")
    with pytest.raises(CheckpointError, match=r"1 missing: mlp_out\.bias"):
        TokenPacker.from_official(official, arguments)
    with pytest.raises(CheckpointError, match="LLaVA's MLP projector"):
        TokenPacker.from_official({"0.weight": torch.ones(2, 2), "2.weight": torch.ones(2, 2)}, arguments)
    with pytest.raises(UnknownNameError, match=r"tokenpacker-7b\.144tokens"):
        TokenPacker.from_official(official, "tokenpacker-7")
    with pytest.raises(CheckpointError, match="no checkpoint index"):
        TokenPacker.from_official(tmp_path, arguments)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "a.bin"}}))
    with pytest.raises(CheckpointError, match="lists no mm_projector weights"):
        TokenPacker.from_official(tmp_path, arguments)


def test_a_sharded_checkpoint_of_the_authors(tmp_path: Path) -> None:
    model = tiny_llava(hidden_act="quick_gelu")
    packer = random_packer()
    official = {f"model.mm_projector.{key}": value for key, value in packer.to_official().items()}
    for key, value in model.state_dict().items():
        if key.startswith("model.vision_tower."):
            name = key.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            official[f"model.vision_tower.vision_tower.vision_model.{name}"] = value
        elif not key.startswith("model.multi_modal_projector."):
            official[key.replace("model.language_model.", "model.")] = value
    official["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    keys = sorted(official)
    shards = {"pytorch_model-00001-of-00002.bin": keys[:60], "pytorch_model-00002-of-00002.bin": keys[60:]}
    for name, held in shards.items():
        torch.save({key: official[key].clone() for key in held}, tmp_path / name)
    index = {"weight_map": {key: name for name, held in shards.items() for key in held}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    text = {key: value for key, value in model.config.text_config.to_dict().items() if not key.startswith("_")}
    config = {**text, "model_type": "llava", "mm_vision_tower": "/somewhere/clip", "scale_factor": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = {key: value for key, value in packer.config.items() if not key.startswith("_")}
    alone = TokenPacker.from_official(tmp_path, arguments)
    assert torch.equal(alone.mlp_in.weight, packer.mlp_in.weight)
    vision = {
        key: getattr(model.config.vision_config, key) for key in ("hidden_size", "intermediate_size", "image_size")
    }
    vision |= {"num_hidden_layers": 4, "num_attention_heads": 2}
    small = {key: arguments[key] for key in ("feature_levels", "embed_dim", "num_heads")}
    whole = llava_from_official(tmp_path, vision=vision, **small)
    pixels = torch.randn(1, 3, 56, 56)
    inputs = prompts([1, -200, 5, 6], tokens=4)
    with torch.no_grad(), packer.attached(model):
        torch.testing.assert_close(
            whole(**inputs, pixel_values=pixels).logits, model(**inputs, pixel_values=pixels).logits
        )
    with pytest.raises(CheckpointError, match=r"does not fit LLaVA-TokenPacker: .* of another shape"):
        llava_from_official(tmp_path, vision={**vision, "intermediate_size": 20}, **small)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        llava_from_official(tmp_path / "nowhere")


def test_published_entries() -> None:
    assert len(TokenPacker.published) == 7
    for name, entry in TokenPacker.published.items():
        assert entry.name == name
        assert entry.config["scale_factor"] in (2, 3, 4)


def test_saving_and_loading(tmp_path: Path) -> None:
    packer, patches = random_packer(), torch.randn(1, 16, 48)
    packer.save_pretrained(tmp_path)
    loaded = TokenPacker.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(patches), packer(patches))
