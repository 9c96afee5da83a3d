"""A tiny random LLaVA with a processor, saved as transformers saves it, and a folder of questions."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "what", "colour", "is", "it", "the", "user", "red", "blue", "yes"]
ANSWERS = [f"word{number}" for number in range(20)]


def save_lvlm(folder: Path, *, layers: int = 4, template: bool = True) -> Path:
    """Save the model; 16 visual tokens an image."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: number for number, word in enumerate([*WORDS, *ANSWERS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    text = "user {% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
    text += "{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=text if template else None,
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(vocabulary),
            "num_hidden_layers": layers,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **shape,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "num_hidden_layers": 3,
            "image_size": 28,
            "patch_size": 7,
            "projection_dim": 16,
            **shape,
        },
        image_token_index=vocabulary["<image>"],
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_questions(folder: Path, count: int = 3) -> Path:
    """Pictures of one colour each, and a question about each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        noise = torch.randint(0, 256, (30, 40, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.byte().numpy()).save(folder / f"{number}.png")
        fields = {"image": f"{number}.png", "question": "what colour is it", "answer": ["red", "word3"]}
        lines.append(json.dumps(fields))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder
