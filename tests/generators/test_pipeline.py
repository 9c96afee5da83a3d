"""`GenerationPipeline` and `TextEncoder` on tiny random networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from vistok.errors import InvalidInputError
from vistok.generators.flextok_ar import FlexTokAR
from vistok.generators.llamagen import LlamaGen
from vistok.generators.nar import NAR
from vistok.generators.pipeline import GenerationPipeline
from vistok.generators.text import TextEncoder
from vistok.tokenizers.flextok import FlexTok
from vistok.tokenizers.vq import VQModel
from vistok.tokens import VisualTokens

NAMES = [f"thing {index}" for index in range(10)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "a", "red", "blue", "circle"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def text_encoder() -> TextEncoder:
    torch.manual_seed(0)
    config = T5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return TextEncoder(T5EncoderModel(config).eval(), word_tokenizer())


def class_pipeline(generator: type = NAR, **overrides: object) -> GenerationPipeline:
    torch.manual_seed(0)
    model = generator.tiny(**overrides).eval()
    torch.nn.init.normal_(model.output.weight)  # an untrained head is uniform whatever the condition
    pipe = GenerationPipeline(model, VQModel.tiny(codebook_size=64).eval(), class_names=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_pipeline() -> GenerationPipeline:
    torch.manual_seed(0)
    model = NAR.tiny(num_classes=None, caption_dim=8, num_condition_tokens=5).eval()
    torch.nn.init.normal_(model.output.weight)
    encoder = text_encoder()
    pipe = GenerationPipeline(model, VQModel.tiny(codebook_size=64).eval(), encoder.model, encoder.tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("generator", [NAR, LlamaGen])
def test_output_types_agree(generator: type) -> None:
    pipe = class_pipeline(generator)
    outputs = {
        kind: pipe(class_labels=[3, 4], generator=seeds(1, 2), output_type=kind)
        for kind in ("pil", "np", "pt", "latent")
    }
    pixels = outputs["pt"].images
    assert pixels.shape[:2] == (2, 3)
    assert 0.0 <= float(pixels.min()) <= float(pixels.max()) <= 1.0
    np.testing.assert_allclose(outputs["np"].images, pixels.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(
        np.asarray(outputs["pil"].images[0]), np.rint(outputs["np"].images[0] * 255).astype(np.uint8)
    )
    assert isinstance(outputs["latent"].images, VisualTokens)
    assert torch.equal(outputs["latent"].images.ids, outputs["pil"].tokens.ids)


def test_a_picture_depends_on_its_seed_and_not_on_the_batch() -> None:
    pipe = class_pipeline()
    together = pipe(class_labels=[1, 2, 2], generator=seeds(7, 8, 9), output_type="latent").images.ids
    alone = pipe(class_labels=[2], generator=seeds(9), output_type="latent").images.ids
    assert torch.equal(together[2:], alone)
    assert not torch.equal(together[1], together[2])


def test_names_and_articles_mean_the_class() -> None:
    pipe = class_pipeline()
    numbered = pipe(class_labels=4, generator=seeds(0), output_type="latent").images.ids
    for arguments in ({"prompt": "a thing 4"}, {"prompt": "Thing 4"}, {"class_labels": ["thing 4"]}):
        named = pipe(**arguments, generator=seeds(0), output_type="latent").images.ids
        assert torch.equal(named, numbered)


def test_prompts_reach_the_pictures_and_equal_prompts_agree() -> None:
    pipe = text_pipeline()
    ids = pipe(
        ["a red circle", "a blue circle", "a red circle"], generator=seeds(5, 5, 5), output_type="latent"
    ).images.ids
    assert torch.equal(ids[0], ids[2])
    assert not torch.equal(ids[0], ids[1])


def test_streaming_ends_where_the_call_ends_and_shows_growth() -> None:
    pipe = class_pipeline()
    previews = list(pipe.stream(class_labels=2, generator=seeds(3), temperature=0.8))
    final = pipe(class_labels=2, generator=seeds(3), temperature=0.8)
    assert len(previews) == 7  # diagonals of a 4x4 grid
    assert [len(preview.step.changed) for preview in previews] == [1, 2, 3, 4, 3, 2, 1]
    assert torch.equal(previews[-1].step.tokens.ids, final.tokens.ids)
    np.testing.assert_array_equal(np.asarray(previews[-1].images[0]), np.asarray(final.images[0]))
    corner = np.asarray(previews[0].images[0])[-1, -1]
    assert (corner == 128).all()  # undecided places are grey


def test_callbacks_see_every_step_and_can_stop() -> None:
    pipe = class_pipeline()
    seen = []

    def stop_at_two(pipeline: GenerationPipeline, index: int, total: int, inputs: dict) -> dict:
        seen.append((index, total, int(inputs["tokens"].mask.sum())))
        pipeline._interrupt = index == 2
        return inputs

    output = pipe(class_labels=0, generator=seeds(0), callback_on_step_end=stop_at_two)
    assert seen == [(0, 7, 1), (1, 7, 3), (2, 7, 6)]
    assert int(output.tokens.mask.sum()) == 6


def test_sizes_are_given_in_tokens_or_pixels() -> None:
    pipe = class_pipeline()
    factor = pipe.tokenizer.downsample_factor
    in_tokens = pipe(class_labels=1, grid=(2, 5), generator=seeds(0))
    in_pixels = pipe(class_labels=1, height=2 * factor, width=5 * factor, generator=seeds(0))
    assert in_tokens.images[0].size == (5 * factor, 2 * factor)
    assert torch.equal(in_tokens.tokens.ids, in_pixels.tokens.ids)
    with pytest.raises(InvalidInputError, match="multiple of"):
        pipe(class_labels=1, height=2 * factor + 1)
    with pytest.raises(InvalidInputError, match="not both"):
        pipe(class_labels=1, height=factor, grid=(1, 1))


def test_defaults_of_a_checkpoint_apply_unless_overridden() -> None:
    torch.manual_seed(0)
    model = NAR.tiny().eval()
    torch.nn.init.normal_(model.output.weight)
    pipe = GenerationPipeline(model, VQModel.tiny(codebook_size=64), sampling={"temperature": 0.0})
    pipe.set_progress_bar_config(disable=True)
    greedy = [pipe(class_labels=1, generator=seeds(seed), output_type="latent").images.ids for seed in (0, 1)]
    assert torch.equal(*greedy)
    free = [
        pipe(class_labels=1, generator=seeds(seed), temperature=1.0, output_type="latent").images.ids for seed in (0, 1)
    ]
    assert not torch.equal(*free)


def test_saved_pipelines_load_again(tmp_path: Path) -> None:
    pipe = text_pipeline()
    pipe.save_pretrained(tmp_path)
    again = GenerationPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    before = pipe("a red circle", generator=seeds(1), output_type="latent").images.ids
    assert torch.equal(again("a red circle", generator=seeds(1), output_type="latent").images.ids, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a prompt or class_labels"),
        ({"prompt": "thing 1", "class_labels": 1}, "not both"),
        ({"class_labels": 10}, r"0\.\.9"),
        ({"class_labels": "thing 77"}, "unknown class 'thing 77'"),
        ({"prompt": "a dog"}, "unknown class 'a dog'"),
        ({"prompt": "  "}, "none empty"),
        ({"class_labels": 1, "output_type": "gif"}, "output_type"),
        ({"class_labels": 1, "num_images_per_prompt": 0}, "at least 1"),
        ({"class_labels": 1, "guidance_scale": -1.0}, "guidance_scale"),
        ({"class_labels": 1, "guidance_scale": float("nan")}, "guidance_scale"),
        ({"class_labels": 1, "temperature": -0.1}, "temperature"),
        ({"class_labels": 1, "top_p": 0.0}, "top_p"),
        ({"class_labels": 1, "top_k": -3}, "top_k"),
        ({"class_labels": [1, 2], "generator": seeds(0)}, "1 generators for 2 images"),
        ({"class_labels": 1, "callback_on_step_end_tensor_inputs": ["latents"]}, "latents"),
    ],
)
def test_bad_calls_say_what_was_expected(arguments: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        class_pipeline()(**arguments)


def test_parts_that_do_not_fit_are_named() -> None:
    with pytest.raises(InvalidInputError, match=r"codebook of 64, but VQModel has 32"):
        GenerationPipeline(NAR.tiny(), VQModel.tiny(codebook_size=32))
    with pytest.raises(InvalidInputError, match="text_encoder"):
        GenerationPipeline(NAR.tiny(num_classes=None, caption_dim=8), VQModel.tiny(codebook_size=64))("a red circle")
    with pytest.raises(InvalidInputError, match="3 class_names for 10 classes"):
        GenerationPipeline(NAR.tiny(), VQModel.tiny(codebook_size=64), class_names=["a", "b", "c"])
    with pytest.raises(InvalidInputError, match="text-conditional"):
        text_pipeline()(class_labels=1)


def test_unknown_words_are_listed_with_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match=r"unknown words 'dog', 'green'.*a, blue, circle, red"):
        text_pipeline()("a dog green circle")


def test_text_features_are_left_padded_and_do_not_depend_on_the_batch() -> None:
    encoder = text_encoder()
    both = encoder(["a circle", "a red circle"], num_tokens=5)
    assert both.mask.tolist() == [[False] * 3 + [True] * 2, [False] * 2 + [True] * 3]
    assert not both.features[0, :3].any()
    alone = encoder(["a circle"], num_tokens=5)
    torch.testing.assert_close(alone.features[0], both.features[0])
    with pytest.raises(InvalidInputError, match="at most 5"):
        encoder(["a red circle a blue circle"], num_tokens=5)
    with pytest.raises(InvalidInputError, match="list of texts"):
        encoder("a circle", num_tokens=5)


def test_a_tokenizer_that_decodes_by_sampling_draws_from_the_image_s_generator() -> None:
    torch.manual_seed(0)
    tokenizer = FlexTok.tiny()
    pipe = GenerationPipeline(FlexTokAR.tiny(), tokenizer)
    pipe.set_progress_bar_config(disable=True)
    together = pipe(class_labels=[1, 1], generator=seeds(1, 2), output_type="pt").images
    alone = pipe(class_labels=1, generator=seeds(2), output_type="pt").images
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    tokens = pipe(class_labels=1, generator=seeds(2), output_type="latent").images
    state = torch.get_rng_state()
    first, second = (np.asarray(pipe.preview(tokens)[0]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(InvalidInputError, match="codebook of 64, but FlexTok has"):
        GenerationPipeline(FlexTokAR.tiny(vocab_size=64), tokenizer)
