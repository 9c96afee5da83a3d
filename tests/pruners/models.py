"""Tiny random LVLMs of every supported family, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm")

IMAGE, VIDEO, START, END = 59, 58, 57, 56
TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 16,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "vision_use_head": False,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56]]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def build(family: str, seed: int = 0, **text: Any) -> Any:
    """A tiny model in eval mode; its weights are spread enough that attention is not flat."""
    torch.manual_seed(seed)
    text = {**TEXT, **text}
    if family in ("llava", "llava_next"):
        shared = {
            "text_config": {"model_type": "llama", **text},
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }
        if family == "llava":
            model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**shared))
        else:
            config = transformers.LlavaNextConfig(**shared, image_grid_pinpoints=PINPOINTS)
            model = transformers.LlavaNextForConditionalGeneration(config)
    elif family == "llava_onevision":
        config = transformers.LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **text},
            vision_config=SIGLIP,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
            image_grid_pinpoints=PINPOINTS,
        )
        model = transformers.LlavaOnevisionForConditionalGeneration(config)
    elif family.startswith("qwen"):
        vision: dict[str, Any] = {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "in_channels": 3,
        }
        tokens = {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
            "tie_word_embeddings": False,
        }
        rope = {**ROPE, "mrope_section": [2, 1, 1]}
        if family == "qwen2_vl":
            vision |= {"embed_dim": 32, "mlp_ratio": 2, "hidden_size": text["hidden_size"]}
            config = transformers.Qwen2VLConfig(
                text_config={**text, "rope_parameters": rope}, vision_config=vision, **tokens
            )
            model = transformers.Qwen2VLForConditionalGeneration(config)
        elif family == "qwen2_5_vl":
            vision |= {"window_size": 16, "fullatt_block_indexes": [1, 2]}
            config = transformers.Qwen2_5_VLConfig(
                text_config={**text, "rope_parameters": rope}, vision_config=vision, **tokens
            )
            model = transformers.Qwen2_5_VLForConditionalGeneration(config)
        else:
            vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
            config = transformers.Qwen3VLConfig(
                text_config={**text, "head_dim": 8, "rope_parameters": {**rope, "mrope_interleaved": True}},
                vision_config=vision,
                **tokens,
            )
            model = transformers.Qwen3VLForConditionalGeneration(config)
    elif family == "internvl":
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": [32, 32],
            "patch_size": [4, 4],
            "use_qk_norm": True,
            "norm_type": "layer_norm",
        }
        config = transformers.InternVLConfig(
            text_config={"model_type": "qwen2", **text}, vision_config=vision, image_token_id=IMAGE
        )
        model = transformers.InternVLForConditionalGeneration(config)
    elif family == "smolvlm":
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 4,
        }
        config = transformers.SmolVLMConfig(
            text_config={"model_type": "llama", **text},
            vision_config=vision,
            image_token_id=IMAGE,
            scale_factor=2,
            tie_word_embeddings=False,
            pad_token_id=0,
        )
        model = transformers.SmolVLMForConditionalGeneration(config)
    else:
        raise AssertionError(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
            if "lambda" in name:
                parameter.fill_(1.0)
    return model.eval()


def image_of(family: str, seed: int, size: tuple[int, int] = (24, 50)) -> tuple[dict[str, Tensor], int]:
    """(what the processor would give for one picture, its placeholders)."""
    generator = torch.Generator().manual_seed(100 + seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if family == "llava":
        return {"pixel_values": noise(1, 3, 28, 28)}, 16
    if family in ("llava_next", "llava_onevision"):
        # Both sizes are best fitted by a base view and two tiles; the model itself says how many tokens that makes.
        return {"pixel_values": noise(1, 3, 3, 28, 28), "image_sizes": torch.tensor([list(size)])}, -1
    if family.startswith("qwen"):
        grid = [1, 8, 6] if size[0] <= size[1] else [1, 4, 6]
        return {
            "pixel_values": noise(grid[1] * grid[2], 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([grid]),
        }, grid[1] * grid[2] // 4
    if family == "internvl":
        return {"pixel_values": noise(1, 3, 32, 32)}, 16
    return {"pixel_values": noise(1, 1, 3, 32, 32)}, 16


def prompt(
    model: Any, family: str, seed: int = 0, question: int = 5, images: int = 1, size: tuple[int, int] = (24, 50)
) -> dict[str, Tensor]:
    """Inputs of one sample: text, image, (text, image,) question."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(3, 50, (count,), generator=generator).tolist()

    ids, parts = [1, *words(3)], []
    for number in range(images):
        inputs, count = image_of(family, seed * 10 + number, size)
        if count < 0:
            count = len(model.get_image_features(**inputs, return_dict=True).pooler_output[0])
        qwen = family.startswith("qwen")
        ids += [*([START] if qwen else []), *[IMAGE] * count, *([END] if qwen else []), *words(2)]
        parts.append(inputs)
    ids += words(question)
    axis = {"pixel_values": 1 if family == "smolvlm" else 0}
    joined = {name: torch.cat([part[name] for part in parts], dim=axis.get(name, 0)) for name in parts[0]}
    batch = {"input_ids": torch.tensor([ids]), **joined}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if family.startswith("qwen"):
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return batch


def left_padded(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of several samples."""
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    batch: dict[str, Tensor] = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            values = [torch.nn.functional.pad(one, (longest - one.shape[1], 0)) for one in values]
        batch[name] = torch.cat(values)
    return batch


def greedy(model: Any, inputs: dict[str, Tensor], steps: int = 4, **options: Any) -> Any:
    """Generate a fixed number of tokens, with the logits of each step."""
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
