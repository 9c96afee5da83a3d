"""SEED: codes and back, training, unCLIP, pictures as words, the authors' files."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.plain import seed as plain
from vistok.errors import CheckpointError, InvalidInputError, InvalidOutputError, MissingExtraError, UnknownNameError
from vistok.tokenizers.seed import (
    SEED,
    STAGES,
    ImageLanguageModel,
    ImageVocabulary,
    PromptDecoder,
    UnCLIPDecoder,
    extend_language_model,
)
from vistok.tokens import VisualTokens


def random_seed_model(**overrides: Any) -> SEED:
    """Tiny, with weights large enough for every part to matter and a codebook among the features."""
    torch.manual_seed(0)
    model = SEED.tiny(**overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.05))
            if name.endswith(".attn.qkv.bias") and name.startswith("vision."):
                parameter.view(3, -1)[1] = 0.0  # the authors' keys have no bias
        z = model.eval().project(model.causal_embeddings(pictures(6))).flatten(0, 1)
        model.codebook.copy_(z.mean(0) + torch.randn_like(model.codebook) * z.std(0))
    return model


def pictures(number: int) -> Tensor:
    return torch.rand(number, 3, 28, 28, generator=torch.Generator().manual_seed(5)) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------- codes
def test_codes_equal_the_plain_way_and_do_not_depend_on_the_batch() -> None:
    model, images = random_seed_model(), pictures(6)
    tokens = model.encode(images)
    assert tokens.ids.shape == (6, 8)
    assert tokens.grid is None
    assert len(tokens.ids.unique()) > 8
    assert torch.equal(tokens.ids, plain.encode(model, model.normalize(images)))
    assert torch.equal(tokens.ids, torch.cat([model.encode(image[None]).ids for image in images]))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_queries_see_earlier_queries_alone(causal: bool) -> None:
    model, pixels = random_seed_model(causal=causal), pictures(2)
    before = model.causal_embeddings(pixels)
    model.query_tokens[:, 5] += torch.randn(24)
    changed = ~torch.isclose(before, model.causal_embeddings(pixels), atol=1e-6).all(-1).all(0)
    assert changed.tolist() == [not causal] * 5 + [True] * 3


@pytest.mark.parametrize("head", ["mlp", "qformer", "text"])
def test_embeddings_equal_the_plain_way(head: str) -> None:
    model = random_seed_model(head=head, num_reverse_tokens=7 if head == "text" else 1, block_heads=4)
    ids = torch.randint(0, 64, (3, 8))
    with torch.no_grad():
        embeddings = model.decode_embeddings(ids)
    assert embeddings.shape == ((3, 7, 16) if head == "text" else (3, 16))
    torch.testing.assert_close(embeddings, plain.decode_embeddings(model, ids), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embeddings, model.decode_embeddings(ids).detach(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_table_of_codes_follows_the_weights() -> None:
    model, ids = random_seed_model(), torch.randint(0, 64, (2, 8))
    first = model.decode_embeddings(ids)
    model.codebook.mul_(0.5)
    second = model.decode_embeddings(ids)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, plain.decode_embeddings(model, ids), rtol=1e-4, atol=1e-5)


def test_bad_pictures_and_codes() -> None:
    model = random_seed_model()
    with pytest.raises(InvalidInputError, match=r"\[B, 3, 28, 28\]"):
        model.encode(torch.zeros(1, 3, 30, 28))
    with pytest.raises(InvalidInputError, match="NaN or infinite pixels"):
        model.encode(torch.full((1, 3, 28, 28), float("nan")))
    with pytest.raises(InvalidInputError, match=r"must lie in \[-1, 1\]"):
        model.encode(torch.full((1, 3, 28, 28), 255.0))
    with pytest.raises(InvalidInputError, match="exactly 8 codes"):
        model.decode_embeddings(torch.zeros(1, 7, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match=r"0\.\.63; got 0\.\.64"):
        model.decode_embeddings(torch.tensor([[0] * 7 + [64]]))
    with pytest.raises(InvalidInputError, match="give decoder=UnCLIPDecoder"):
        model.decode(VisualTokens(ids=torch.zeros(1, 8, dtype=torch.int64)))
    with pytest.raises(InvalidInputError, match="needs ids"):
        model.decode(VisualTokens(features=torch.zeros(1, 8, 4)))
    with pytest.raises(InvalidInputError, match="no codebook"):
        SEED.tiny(head=None).encode(pictures(1))
    with pytest.raises(InvalidInputError, match="head must be"):
        SEED.tiny(head="linear")
    with torch.no_grad():
        model.vision_norm.weight.fill_(float("nan"))
    with pytest.raises(InvalidOutputError, match="check the model's weights"):
        model.encode(pictures(1))


def test_pictures_in_three_ways_and_out(tmp_path: Path) -> None:
    model = random_seed_model()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    made = [model.preprocess([tmp_path / "noise.png"], mode=mode) for mode in ("bilinear", "bicubic", "crop")]
    assert all(one.shape == (1, 3, 28, 28) and float(one.abs().max()) <= 1 for one in made)
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    (picture,) = model.postprocess(made[0])
    assert torch.allclose(model.preprocess(picture), made[0], atol=1 / 100)
    assert model.postprocess(made[0], output_type="np").shape == (1, 28, 28, 3)
    with pytest.raises(InvalidInputError, match="mode must be"):
        model.preprocess(picture, mode="nearest")
    with pytest.raises(InvalidOutputError, match="NaN"):
        model.postprocess(made[0] * float("nan"))


# ------------------------------------------------------------------------------------------------------------- training
def train(model: SEED, stage: str, batch: dict[str, Tensor], steps: int = 12) -> list[float]:
    optimizer = STAGES[stage].prepare(model.train())
    losses = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3
        loss = model.training_loss(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_the_contrastive_stage_learns_and_leaves_the_tower() -> None:
    torch.manual_seed(0)
    model = SEED.tiny(head=None, text_vocab_size=40, max_text_length=6, contrastive_size=8, dropout=0.0)
    vision = {key: value.clone() for key, value in model.vision.state_dict().items()}
    batch = {
        "images": pictures(4),
        "input_ids": torch.tensor([[1, 5, 6, 0], [1, 7, 0, 0], [1, 8, 9, 3], [1, 2, 4, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    losses = train(model, "contrastive", batch)
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(vision[key], value) for key, value in model.vision.state_dict().items())
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 17)}
    torch.testing.assert_close(model.training_loss(batch)["loss"], model.training_loss(other)["loss"])


def test_the_codebook_stage_learns_and_the_frozen_part_has_no_dropout() -> None:
    torch.manual_seed(0)
    model = SEED.tiny(dropout=0.5)
    frozen = {key: value.clone() for key, value in model.state_dict().items() if key.startswith(("vision", "qformer"))}
    batch = {"images": pictures(4), "image_embeds": torch.randn(4, 16)}
    losses = train(model, "codebook", batch)
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in frozen.items())
    assert not model.qformer.training
    model.requires_grad_(True).train()  # the target has no dropout even where nobody froze anything
    assert model.qformer.training
    first, second = (model.training_loss(batch) for _ in range(2))
    assert model.qformer.training
    assert torch.equal(first["loss"], second["loss"])
    total = first["codebook"] + first["reconstruction"] + first["embedding"]
    torch.testing.assert_close(first["loss"], total)
    assert 0 < float(first["usage"]) <= 1
    assert 1 <= float(first["perplexity"]) <= 64


def test_rates_of_the_stages() -> None:
    stage = STAGES["contrastive"]
    assert stage.learning_rate(0, 0) == pytest.approx(3e-7)
    assert stage.learning_rate(0, 2000) == stage.learning_rate(0, 9000) == pytest.approx(3e-5)
    assert stage.learning_rate(5, 0) == pytest.approx((3e-5 + 3e-6) / 2)
    optimizer = STAGES["codebook"].prepare(SEED.tiny())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert all(parameter.ndim >= 2 for parameter in optimizer.param_groups[0]["params"])


def test_batches_of_no_stage() -> None:
    model = SEED.tiny()
    with pytest.raises(InvalidInputError, match=r"input_ids .* or image_embeds"):
        model.training_loss({"images": pictures(2)})
    with pytest.raises(InvalidInputError, match="no text branch"):
        model.training_loss({"images": pictures(2), "input_ids": torch.ones(2, 3, dtype=torch.int64)})
    with pytest.raises(InvalidInputError, match=r"image_embeds must be \[2, 16\]"):
        model.training_loss({"images": pictures(2), "image_embeds": torch.zeros(2, 5)})


# --------------------------------------------------------------------------------------------------------------- unCLIP
class Words:
    """A tokenizer that knows the empty prompt."""

    model_max_length = 5

    def __call__(self, prompt: Any, **_: Any) -> Any:
        number = 1 if isinstance(prompt, str) else len(prompt)
        return SimpleNamespace(input_ids=torch.tensor([[2, 3, 0, 0, 0]] * number), attention_mask=None)

    def tokenize(self, prompt: str) -> list[str]:
        return []

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [""] * len(ids)


def tiny_pipeline() -> StableUnCLIPImg2ImgPipeline:
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=(2, 2),
        class_embed_type="projection",
        projection_class_embeddings_input_dim=32,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )
    clip = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextModel(
        CLIPTextConfig(**clip, vocab_size=4, max_position_embeddings=5, bos_token_id=2, eos_token_id=3, pad_token_id=0)
    )
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**clip, image_size=28, patch_size=14, projection_dim=16))
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=None,
        image_encoder=vision.eval(),
        image_normalizer=StableUnCLIPImageNormalizer(16),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=None,
        text_encoder=text.eval(),
        unet=unet.eval(),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            prediction_type="v_prediction",
        ),
        vae=vae.eval(),
    )
    pipeline.tokenizer = Words()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
def test_painting_equals_the_stock_pipeline_and_leaves_no_trace(guidance_scale: float) -> None:
    pipeline = tiny_pipeline()
    decoder = UnCLIPDecoder(pipeline)
    embeddings, latents = torch.randn(1, 16), torch.randn(1, 4, 8, 8)
    settings = {"num_inference_steps": 3, "guidance_scale": guidance_scale, "noise_level": 5}
    stock = plain.paint(pipeline, embeddings, latents, torch.Generator().manual_seed(1), **settings)
    processors, embed = pipeline.unet.attn_processors, pipeline.unet.class_embedding
    seen = []
    for step in decoder.sample(embeddings, latents=latents, generator=torch.Generator().manual_seed(1), **settings):
        assert pipeline.unet.class_embedding is embed
        assert pipeline.unet.attn_processors == processors
        seen.append(step)
    assert [step.index for step in seen] == list(range(4))  # PNDM visits one time twice
    assert seen[0].total == 4
    torch.testing.assert_close(decoder.paint(seen[-1].latents), stock, rtol=1e-4, atol=1e-4)
    again = plain.paint(pipeline, embeddings, latents, torch.Generator().manual_seed(1), **settings)
    assert torch.equal(stock, again)


def test_each_picture_has_its_own_generator() -> None:
    model = random_seed_model()
    model.decoder = UnCLIPDecoder(tiny_pipeline())
    tokens = VisualTokens(ids=torch.randint(0, 64, (2, 8)))
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}

    def seeds(*numbers: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    both = model.decode(tokens, generator=seeds(7, 8), **settings)
    assert both.shape == (2, 3, 16, 16)
    for number in range(2):
        one = model.decode(tokens[number], generator=seeds(7 + number), **settings)
        torch.testing.assert_close(one[0], both[number], rtol=1e-4, atol=1e-4)
    away = model.decode(tokens, negative=tokens[0], generator=seeds(7, 8), **settings)
    assert not torch.allclose(away, both)


def test_text_like_embeddings_take_the_place_of_a_prompt() -> None:
    parts = tiny_pipeline()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    pipeline = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.tokenizer = Words()
    pipeline.set_progress_bar_config(disable=True)
    model = random_seed_model(head="text", embedding_size=12, num_reverse_tokens=5)
    model.decoder = PromptDecoder(pipeline)
    tokens = VisualTokens(ids=torch.randint(0, 64, (2, 8)))
    seeds = [torch.Generator().manual_seed(number) for number in (1, 2)]
    images = model.decode(tokens, generator=seeds, num_inference_steps=2)
    assert images.shape == (2, 3, 16, 16)
    assert float(images.abs().max()) <= 1
    with torch.no_grad():
        embeds = model.decode_embeddings(tokens.ids[:1])
    seed = torch.Generator().manual_seed(1)
    direct = pipeline(
        prompt_embeds=embeds, negative_prompt=[""], generator=seed, num_inference_steps=2, output_type="pt"
    )
    torch.testing.assert_close(images[:1], direct.images * 2 - 1, rtol=1e-3, atol=1e-3)
    away = model.decode(tokens[0], negative=tokens[1], generator=seeds[:1], num_inference_steps=2)
    assert away.shape == (1, 3, 16, 16)
    with pytest.raises(InvalidInputError, match="painted by UnCLIPDecoder"):
        PromptDecoder(pipeline)(torch.zeros(1, 12))


def test_settings_that_cannot_be_painted() -> None:
    with pytest.raises(InvalidInputError, match="lacks unet, vae"):
        UnCLIPDecoder(SimpleNamespace(scheduler=1))
    decoder = UnCLIPDecoder(tiny_pipeline())
    embeddings = torch.randn(2, 16)
    with pytest.raises(InvalidInputError, match="at least one step"):
        decoder(embeddings, num_inference_steps=0)
    with pytest.raises(InvalidInputError, match=r"noise_level must lie in 0\.\.999"):
        decoder(embeddings, noise_level=1000)
    with pytest.raises(InvalidInputError, match="1 generators for 2"):
        decoder(embeddings, generator=[torch.Generator()])
    with pytest.raises(InvalidInputError, match="NaN"):
        decoder(embeddings * float("nan"))
    with pytest.raises(InvalidInputError, match="negative must be"):
        decoder(embeddings, negative=embeddings[:1])
    with pytest.raises(InvalidInputError, match="latents must be"):
        decoder(embeddings, latents=torch.zeros(1, 4, 9, 8))
    with pytest.raises(InvalidInputError, match="expected image embeddings"):
        decoder(embeddings[0])


# ------------------------------------------------------------------------------------------------------------- language
def tiny_language() -> ImageLanguageModel:
    torch.manual_seed(0)
    known = ["<unk>", "<s>", "</s>", "a", "red", "blue", "square", "draw"]
    vocabulary = Tokenizer(WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(known),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    return extend_language_model(model, tokenizer, codebook_size=16, num_codes=4)


def test_a_language_model_gets_the_words_of_pictures() -> None:
    language = tiny_language()
    assert language.vocabulary == ImageVocabulary(8, 24, 25, 16, 4)
    assert language.model.get_input_embeddings().num_embeddings == 26
    assert language.model.lm_head.out_features == 26
    codes = torch.tensor([3, 0, 15, 7])
    prompt = language.prompt(["a red square", VisualTokens(ids=codes[None]), "blue"], force_image=True)
    assert prompt.tolist() == [1, 3, 4, 6, 24, 11, 8, 23, 15, 25, 5, 24]
    again = extend_language_model(language.model, language.tokenizer, codebook_size=16, num_codes=4)
    assert again.vocabulary == language.vocabulary
    assert language.model.get_input_embeddings().num_embeddings == 26
    with pytest.raises(InvalidInputError, match="do not follow each other"):
        extend_language_model(language.model, language.tokenizer, codebook_size=18, num_codes=4)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_every_written_picture_is_whole(temperature: float) -> None:
    language = tiny_language()
    torch.manual_seed(1)
    settings = {"temperature": temperature, "top_p": 1.0, "max_new_tokens": 40}
    answers = language.generate(["draw a red square", "blue"] * 3, force_image=True, **settings)
    assert len(answers) == 6
    for answer in answers:
        assert isinstance(answer[0], VisualTokens)
        for part in answer:
            if isinstance(part, VisualTokens):
                assert part.ids.shape == (1, 4)
                assert 0 <= int(part.ids.min()) <= int(part.ids.max()) < 16
            else:
                assert "img" not in part
    words = language.generate(["draw a red square"], allow_images=False, **settings)
    assert all(isinstance(part, str) for part in words[0])


def test_generation_in_batches_equals_single_runs() -> None:
    language = tiny_language()
    prompts = [["a", torch.tensor([1, 2, 3, 4]), "red"], "draw a blue square", "a"]
    settings = {"temperature": 0.0, "max_new_tokens": 12}
    together = language.generate(prompts, **settings)
    apart = [language.generate([prompt], **settings)[0] for prompt in prompts]

    def plainly(answer: list[Any]) -> list[Any]:
        return [part if isinstance(part, str) else part.ids.tolist() for part in answer]

    assert [plainly(one) for one in together] == [plainly(one) for one in apart]


def test_broken_pictures_are_left_out_of_answers() -> None:
    words = ImageVocabulary(10, 30, 31, 16, 4)
    ids = [1, 30, 10, 11, 12, 25, 31, 2, 30, 10, 11, 31, 3, 30, 10, 11, 12, 13, 4, 30, 12]
    parts = words.parse(ids)
    assert [part if isinstance(part, list) else part.ids.tolist() for part in parts] == [
        [1],
        [[0, 1, 2, 15]],
        [2, 3, 4],
    ]
    with pytest.raises(InvalidInputError, match="4 integer codes"):
        words.ids(torch.tensor([1, 2, 3]))
    with pytest.raises(InvalidInputError, match=r"0\.\.15; got 1\.\.16"):
        words.ids(torch.tensor([1, 2, 3, 16]))


def test_sequences_are_cut_between_pictures() -> None:
    sequences = tiny_language().sequences(10)
    codes = torch.tensor([1, 2, 3, 4])
    pair = sequences.pair(codes, "a red square blue a")
    assert pair["input_ids"].tolist() == [1, 24, 9, 10, 11, 12, 25, 3, 4, 2]
    document = sequences.interleaved(["a", codes, codes, "red"])
    assert document["input_ids"].tolist() == [1, 3, 24, 9, 10, 11, 12, 25, 2, 0]
    assert document["labels"].tolist()[-1] == -100
    assert document["attention_mask"].tolist()[-1] == 0


def test_a_language_model_learns_to_draw_and_to_caption() -> None:
    language = tiny_language()
    sequences = language.sequences(12)
    red, blue = torch.tensor([1, 2, 3, 4]), torch.tensor([9, 8, 7, 6])
    pairs = [(red, "red square"), (blue, "blue square")]
    rows = [sequences.pair(*pair, image_first=first) for pair in pairs for first in (True, False)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    optimizer = torch.optim.AdamW(language.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = language.training_loss(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    drawn = language.generate(["red square", "blue square"], force_image=True, temperature=0.0, max_new_tokens=8)
    assert [answer[0].ids.tolist() for answer in drawn] == [[red.tolist()], [blue.tolist()]]
    said = language.generate([red, blue], temperature=0.0, max_new_tokens=8)
    assert [answer[0] for answer in said] == ["red square", "blue square"]


def test_models_and_requests_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    language = tiny_language()
    with pytest.raises(InvalidInputError, match="Linear has no resize_token_embeddings"):
        extend_language_model(torch.nn.Linear(2, 2), language.tokenizer)
    fixed = SimpleNamespace(
        resize_token_embeddings=len,
        generate=len,
        get_input_embeddings=lambda: torch.nn.Linear(2, 2),
        get_output_embeddings=lambda: None,
    )
    with pytest.raises(InvalidInputError, match="cannot be resized"):
        extend_language_model(fixed, language.tokenizer)
    with pytest.raises(InvalidInputError, match="no prompts"):
        language.generate([])
    with pytest.raises(InvalidInputError, match="needs 5 new tokens"):
        language.generate(["a"], force_image=True, max_new_tokens=4)
    with pytest.raises(InvalidInputError, match="top_p"):
        language.generate(["a"], top_p=0.0)
    with pytest.raises(InvalidInputError, match="allow_images"):
        language.generate(["a"], force_image=True, allow_images=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"vistok\[lora\]"):
        language.add_lora()


def test_lora_learns_updates_and_saves_embeddings_and_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    language = tiny_language()
    fake = SimpleNamespace(LoraConfig=lambda **given: given, get_peft_model=lambda model, config: (model, config))
    monkeypatch.setitem(sys.modules, "peft", fake)
    before = language.model
    model, config = language.add_lora(rank=4)
    assert model is before
    assert config["r"] == 4
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    whole = ["embed_tokens", "input_layernorm", "lm_head", "norm", "post_attention_layernorm"]
    assert config["modules_to_save"] == whole
    language = tiny_language()
    with pytest.raises(InvalidInputError, match="name some of: down_proj, gate_proj"):
        language.add_lora(target_modules=["c_attn"])


# ------------------------------------------------------------------------------------------------------- authors' files
@pytest.mark.parametrize("head", ["mlp", "qformer", "text"])
def test_official_names_go_round(head: str) -> None:
    model = random_seed_model(head=head, text_vocab_size=20, max_text_length=6)
    official = model.to_official()
    assert ("blocks_text.0.norm1.weight" in official) == (head == "text")
    official |= {
        "Qformer.bert.embeddings.position_ids": torch.arange(6)[None],
        "visual_encoder.blocks.2.norm1.weight": torch.ones(16),  # EVA's last block is not used
        "visual_encoder.norm.weight": torch.ones(16),
        "itm_head.weight": torch.ones(2, 24),
    }
    arguments = {key: value for key, value in model.config.items() if not key.startswith("_")}
    loaded = SEED.from_official({"model": official}, arguments)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_the_tokenizer_and_its_vision_transformer_are_two_files(tmp_path: Path) -> None:
    model = random_seed_model()
    official = model.to_official()
    vision = {key.removeprefix("visual_encoder."): value.half() for key, value in official.items() if "visual_e" in key}
    rest = {key: value for key, value in official.items() if not key.startswith("visual_encoder.")}
    torch.save(rest, tmp_path / "seed_quantizer.pt")
    arguments = {key: value for key, value in model.config.items() if not key.startswith("_")}
    with pytest.raises(CheckpointError, match=r"give vision='eva_vit_g\.pth'"):
        SEED.from_official(tmp_path / "seed_quantizer.pt", arguments)
    torch.save(vision, tmp_path / "eva_vit_g.pth")
    loaded = SEED.from_official(tmp_path / "seed_quantizer.pt", arguments)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.codebook, model.codebook)
    torch.testing.assert_close(loaded.vision.pos_embed, model.vision.pos_embed, rtol=1e-3, atol=1e-3)
    larger = SEED.from_official(tmp_path / "seed_quantizer.pt", {**arguments, "image_size": 56})
    assert larger.vision.pos_embed.shape == (1, 17, 16)
    small = SEED.from_official(tmp_path / "seed_quantizer.pt", {**arguments, "reconstruction": False})
    assert not hasattr(small, "reconstruction_blocks")
    assert torch.equal(small.encode(pictures(3)).ids, loaded.encode(pictures(3)).ids)


def test_stage_checkpoints_overwrite_each_other() -> None:
    model = random_seed_model()
    official = model.to_official()
    arguments = {key: value for key, value in model.config.items() if not key.startswith("_")}
    first = {key: value for key, value in official.items() if key.startswith(("visual", "ln_v", "query", "Qformer"))}
    second = {key: value for key, value in official.items() if key not in first}
    loaded = SEED.from_official([{"model": {**first, "codebook": torch.ones(1)}}, {"model": second}], arguments)
    assert torch.equal(loaded.encode(pictures(2)).ids, model.encode(pictures(2)).ids)
    second.pop("decode_task_layer.0.bias")
    with pytest.raises(CheckpointError, match=r"1 missing: decode_task_layer\.0\.bias"):
        SEED.from_official([first, second], arguments)
    with pytest.raises(CheckpointError, match=r"1 unexpected: .*extra"):
        SEED.from_official([official, {"Qformer.bert.encoder.layer.0.extra": torch.ones(1)}], arguments)
    with pytest.raises(UnknownNameError, match=r"seed-2\.unclip"):
        SEED.from_official(official, "seed-3")


def test_saving_and_loading(tmp_path: Path) -> None:
    model = random_seed_model()
    model.save_pretrained(tmp_path)
    loaded = SEED.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(pictures(3)).ids, model.encode(pictures(3)).ids)
