"""A language model with image words on disk, and its seeded draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vistok import hub
from vistok.data.shapes.words import caption_tokenizer
from vistok.errors import CheckpointError, InvalidInputError
from vistok.tokenizers.seed import ImageLanguageModel, extend_language_model


def language() -> ImageLanguageModel:
    torch.manual_seed(0)
    tokenizer = caption_tokenizer(64)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return extend_language_model(LlamaForCausalLM(config).eval(), tokenizer, codebook_size=12, num_codes=3)


def test_files_go_round_and_load_by_name_of_their_folder(tmp_path: Path) -> None:
    before = language()
    before.save_pretrained(tmp_path)
    for after in (ImageLanguageModel.from_pretrained(tmp_path), hub.load(tmp_path)):
        assert after.vocabulary == before.vocabulary
        prompt = before.prompt(["a red circle", torch.tensor([3, 0, 11])])[None]
        with torch.no_grad():
            assert torch.equal(after.model(prompt).logits, before.model(prompt).logits)
    assert next(hub.load(tmp_path, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_a_seed_repeats_the_draws_and_leaves_the_callers_alone() -> None:
    model = language()
    settings = {"force_image": True, "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = [model.generate(["a star"] * 4, seed=seed, **settings) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    codes = [torch.cat([answer[0].ids for answer in answers]) for answers in drawn]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no language model could be loaded"):
        ImageLanguageModel.from_pretrained(tmp_path)
    plain = language()
    plain.tokenizer = caption_tokenizer(64)
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(InvalidInputError, match="knows no image words"):
        ImageLanguageModel.from_pretrained(tmp_path / "plain")
    language().save_pretrained(tmp_path / "torn")
    file = tmp_path / "torn" / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights: model\.norm\.weight"):
        ImageLanguageModel.from_pretrained(tmp_path / "torn")
