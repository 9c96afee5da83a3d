"""SEED's recipes: both stages, the unCLIP denoiser, the language model, in a chain of tiny runs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vistok import hub
from vistok.data.shapes import caption, parse_caption, sample_scene
from vistok.data.shapes.words import caption_tokenizer
from vistok.errors import InvalidInputError
from vistok.tokenizers import KLModel
from vistok.tokenizers.seed import SEED, ImageLanguageModel, UnCLIPDecoder
from vistok.training.image_language import ImageLanguage, SentenceWriter
from vistok.training.recipe import Recipe, ShapesCaptionsRecipe, load_recipe, parse_recipe
from vistok.training.seed import SEEDMonitor, ShapesCaptions
from vistok.training.trainer import Trainer, build_model, train_only

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "vision_size": 16,
    "vision_layers": 1,
    "vision_heads": 2,
    "vision_mlp_size": 16,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_size": 24,
    "dropout": 0.0,
    "num_queries": 4,
    "text_vocab_size": 35,
    "max_text_length": 24,
    "contrastive_size": 8,
}


def recipe(name: str, system: str, config: dict[str, Any], data: dict[str, Any], **more: Any) -> Recipe:
    model = {"system": system, "config": config, **more.pop("model", {})}
    common = {"steps": 3, "batch_size": 4, "checkpoint_every": 2, "log_every": 1, "ema_decay": 0.5}
    return parse_recipe({"name": name, "model": model, "data": data, **common, **more})


def fit(values: Recipe, folder: Path) -> dict[str, float]:
    return Trainer(values, folder / values.name, device="cpu", tensorboard=False).fit().metrics


def first_stage() -> Recipe:
    return recipe(
        "one",
        "seed",
        {**SMALL, "head": None, "caption_weight": 1.0},
        {"source": "shapes-captions", "image_size": 32},
        model={"trained": ["vision", "query_tokens", "qformer", "text_proj"]},
        precision="bf16",
        validate_every=3,
    )


Run = tuple[Path, dict[str, float]]
SEEN = {"source": "shapes-seed", "image_size": 32, "scenes": 12}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The first stage: run folder and figures."""
    folder = tmp_path_factory.mktemp("seed")
    return folder / "one", fit(first_stage(), folder)


@pytest.fixture(scope="module")
def two(one: Run) -> Run:
    """The second stage, whose pictures the denoiser `unclip` paints."""
    folder = one[0].parent
    codes = {"codebook_size": 32, "codebook_dim": 4, "embedding_size": 8, "num_blocks": 1, "block_heads": 2}
    second = recipe(
        "two",
        "seed",
        {**SMALL, **codes, "revive_dead_codes": True, "unclip": str(folder / "unclip" / "model")},
        {**SEEN, "give": "embeddings", "encoder": str(one[0] / "model")},
        model={
            "init_from": str(one[0]),
            "trained": ["codebook", "encode_task", "decode_task", "reconstruction_", "image_", "embedding_proj"],
        },
        validate_every=3,
    )
    return folder / "two", fit(second, folder)


@pytest.fixture(scope="module")
def unclip(two: Run) -> Run:
    """The denoiser."""
    folder = two[0].parent
    torch.manual_seed(0)
    KLModel.tiny().save_pretrained(folder / "kl")
    config = {
        "autoencoder": str(folder / "kl"),
        "sample_size": 32 // KLModel.tiny().downsample_factor,
        "latent_channels": 4,
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "embedding_size": 8,
        "text_size": 8,
    }
    values = recipe(
        "unclip",
        "seed-unclip",
        config,
        {**SEEN, "give": "latents", "encoder": str(two[0] / "model")},
        tokenizer=str(folder / "kl"),
        sample_every=3,
        sampling={"num_inference_steps": 1, "guidance_scale": 2.0},
    )
    patch = pytest.MonkeyPatch()
    patch.setattr("vistok.training.seed.PAINTED", 2)  # the oracle takes its time over noise
    figures = fit(values, folder)
    patch.undo()
    return folder / "unclip", figures


@pytest.fixture(scope="module")
def language(two: Run) -> Run:
    """The language model."""
    words = {"codebook_size": 32, "num_codes": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 16}
    data = {**SEEN, "give": "sentences", "encoder": str(two[0] / "model")}
    values = recipe("language", "image-language", words, data, validate_every=3)
    return two[0].parent / "language", fit(values, two[0].parent)


def test_the_first_stage_reports_what_it_learns(one: Run) -> None:
    assert {"contrastive", "caption", "accuracy", "val/retrieval"} <= set(one[1])
    assert "val/retrieval_codes" not in one[1]


def test_a_killed_run_goes_on_bit_for_bit(one: Run, tmp_path: Path) -> None:
    trainer = Trainer(first_stage(), tmp_path / "one", device="cpu", tensorboard=False)
    step = trainer._optimizer_step

    def interrupted(batches: Any) -> Any:
        trainer._interrupted = trainer.step == 1
        return step(batches)

    trainer._optimizer_step = interrupted  # type: ignore[method-assign]
    assert trainer.fit().status == "interrupted"
    fit(first_stage(), tmp_path)
    whole, parts = (hub.load(folder / "model").state_dict() for folder in (one[0], tmp_path / "one"))
    assert all(torch.equal(whole[name], value) for name, value in parts.items())


def test_the_second_stage_reports_its_codes_and_leaves_the_first_as_it_is(one: Run, two: Run) -> None:
    wanted = {"codebook", "reconstruction", "embedding", "val/retrieval_codes", "val/retrieval_embedding"}
    assert wanted <= set(two[1])
    assert 0 < two[1]["val/codebook_usage"] <= 1
    first, second = (hub.load(folder / "model").state_dict() for folder, _ in (one, two))
    frozen = ("vision", "qformer", "query_tokens", "text_proj")
    kept = [name for name in first if name.startswith(frozen) and name in second]
    assert len(kept) > 20
    assert all(torch.equal(first[name], second[name]) for name in kept)


def test_codes_are_painted_by_the_denoiser_that_the_configuration_names(two: Run, unclip: Run) -> None:
    assert 0 <= unclip[1]["samples/objects"] <= 1
    assert (unclip[0] / "samples" / "painted-00000003.png").is_file()
    model = hub.load(two[0] / "model")
    facts = json.loads((two[0] / "model" / "vistok.json").read_text())
    assert (facts["system"], facts["num_tokens"], facts["codebook_size"]) == ("seed", 4, 32)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = model.encode(images)
    draws = [torch.Generator().manual_seed(number) for number in range(2)]
    painted = model.decode(tokens, generator=draws, num_inference_steps=1)
    assert painted.shape == images.shape
    decoder = hub.load(unclip[0] / "model").decoder()
    assert isinstance(decoder, UnCLIPDecoder)
    draws = [torch.Generator().manual_seed(number) for number in range(2)]
    again = model.decode(tokens, decoder=decoder, generator=draws, num_inference_steps=1)
    assert torch.equal(painted, again)


def test_the_language_model_is_stock(language: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    assert {"val/caption_loss", "val/picture_loss", "val/caption_objects"} <= set(language[1])
    folder = language[0] / "model"
    loaded = hub.load(folder)
    assert isinstance(loaded, ImageLanguageModel)
    words = loaded.vocabulary
    assert (words.codebook_size, words.num_codes) == (32, 4)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    ids = tokenizer("a red circle <img> <img_00003> </img>")["input_ids"]
    assert ids[-4:-1] == [words.begin_id, words.first_code_id + 3, words.end_id]
    with torch.no_grad():
        assert torch.equal(model(torch.tensor([ids])).logits, loaded.model(torch.tensor([ids])).logits)
    drawn = [loaded.generate(["a red circle"], force_image=True, max_new_tokens=6, seed=3)[0][0] for _ in range(2)]
    assert torch.equal(drawn[0].ids, drawn[1].ids)
    facts = json.loads((folder / "vistok.json").read_text())
    assert (facts["kind"], facts["codebook_size"], facts["num_tokens"]) == ("language model", 32, 4)


def test_captions_are_true_of_their_pictures_and_depend_on_the_number_alone() -> None:
    source = ShapesCaptions(ShapesCaptionsRecipe("shapes-captions", 16, (1, 2), 0.5), seed=3)
    batch = source.batch(np.arange(6))
    assert batch["images"].shape == (6, 3, 16, 16)
    texts = source.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    for number, text in enumerate(texts):
        scene = sample_scene(3, number, (1, 2))
        assert len(parse_caption(text).objects) == len(scene.objects)
    assert any(text.replace(" ,", ",") == caption(sample_scene(3, n, (1, 2))) for n, text in enumerate(texts))
    alone = source.batch(np.array([4]))
    assert torch.equal(alone["images"][0], batch["images"][4])
    width = alone["input_ids"].shape[1]
    assert torch.equal(alone["input_ids"][0], batch["input_ids"][4][:width])


def test_sentences_teach_one_half_and_survive_workers() -> None:
    write = SentenceWriter(32, 4)
    ids = torch.tensor([[1, 2, 3, 31], [0, 0, 5, 7]])
    texts = ["a red circle", "a large blue star above a ring"]
    batch = write(ids, texts, [True, False])
    first = len(caption_tokenizer())
    image = [first + 32, *(first + code for code in (1, 2, 3, 31)), first + 33]
    assert batch["input_ids"][0, 1:7].tolist() == image
    assert (batch["labels"][0, :7] == -100).all()
    assert (batch["labels"][0, 7:11] == batch["input_ids"][0, 7:11]).all()
    learnt = batch["labels"][1] != -100
    assert batch["input_ids"][1][learnt].tolist() == [first, first, first + 5, first + 7, first + 33, 1]
    again = pickle.loads(pickle.dumps(write))(ids, texts, [True, False])
    assert all(torch.equal(again[name], value) for name, value in batch.items())


@pytest.mark.parametrize("name", ["seed-shapes-stage1", "seed-shapes", "seed-unclip-shapes", "seed-lm-shapes"])
def test_recipes_build_networks_that_may_ship(name: str) -> None:
    values = load_recipe(RECIPES / f"{name}.yaml")
    model = build_model(values)
    train_only(model, values.model.trained)
    assert sum(parameter.numel() for parameter in model.parameters()) * 2 <= 4 * 2**20
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_the_recipes_of_both_stages_fit_each_other() -> None:
    first, second = (load_recipe(RECIPES / f"{name}.yaml") for name in ("seed-shapes-stage1", "seed-shapes"))
    one, two = first.model.config, second.model.config
    for name in set(one) & set(two) - {"head"}:
        assert one[name] == two[name], name
    assert two["text_vocab_size"] == len(caption_tokenizer())
    assert two["embedding_size"] == two["contrastive_size"]
    words = load_recipe(RECIPES / "seed-lm-shapes.yaml").model.config
    assert (words["codebook_size"], words["num_codes"]) == (two["codebook_size"], two["num_queries"])
    unclip = load_recipe(RECIPES / "seed-unclip-shapes.yaml")
    assert unclip.model.config["embedding_size"] == two["embedding_size"]
    assert unclip.name == two["unclip"]


def test_parts_that_do_not_exist_and_data_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no parameter begins with 'towers'"):
        train_only(SEED.tiny(), ["towers"])
    data = {"source": "shapes-seed", "give": "latents", "encoder": "seed.tiny", "image_size": 28, "scenes": 4}
    unclip = {"sample_size": 4, "latent_channels": 4, "block_out_channels": [8, 16], "norm_num_groups": 4}
    with pytest.raises(InvalidInputError, match="needs the field tokenizer"):
        Trainer(recipe("u", "seed-unclip", unclip, data), tmp_path / "u", device="cpu", tensorboard=False).fit()
    with pytest.raises(InvalidInputError, match="no text branch"):
        fit(recipe("e", "seed", {**SMALL, "head": None}, {**data, "give": "embeddings"}), tmp_path)
    with pytest.raises(InvalidInputError, match=r"data.give: expected 'embeddings' or 'latents' or 'sentences'"):
        recipe("x", "seed", {}, {**data, "give": "words"})
    with pytest.raises(InvalidInputError, match="least, greatest"):
        recipe("x", "seed", {}, {**data, "objects": [2, 1]})


def test_a_model_without_a_text_branch_is_not_judged() -> None:
    assert SEEDMonitor(first_stage(), torch.device("cpu")).validate(SEED.tiny()) == {}


def test_the_small_language_model_learns() -> None:
    torch.manual_seed(0)
    model = ImageLanguage.tiny()
    batch = SentenceWriter(64, 8)(torch.randint(0, 64, (4, 8)), ["a red circle", "a star"] * 2, [True, False] * 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model.training_loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1.0
