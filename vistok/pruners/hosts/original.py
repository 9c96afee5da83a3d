"""The original LLaVA checkpoint layout, brought to transformers' classes.

LLaVA-1.5, LLaVA-1.6 and LLaVA-OneVision were published with other key names than transformers uses. `from_original`
loads such a state dict strictly into the transformers model of its configuration, so that the checkpoints of the
pruning papers can be used as they were published.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vistok.errors import CheckpointError, InvalidInputError
from vistok.files import read_state_dict
from vistok.nn.model import describe_mismatch

__all__ = ["PUBLISHED", "build", "config_from_original", "from_original", "rename_original"]

_PREFIXES = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.vision_tower.vision_tower.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "model.image_newline": "model.image_newline",
    "lm_head.": "lm_head.",
}
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")

_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_VICUNA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "tie_word_embeddings": False,
}
_WIDE = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_ANYRES = {
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
}
_QWEN = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "tie_word_embeddings": False,
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
}
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "llava-v1.5-7b": {"llava_config": _VICUNA, "clip_vision_config": _CLIP},
    "llava-v1.5-13b": {"llava_config": {**_VICUNA, **_WIDE}, "clip_vision_config": _CLIP},
    "llava-v1.6-vicuna-7b": {"llava_config": {**_VICUNA, **_ANYRES}, "clip_vision_config": _CLIP},
    "llava-v1.6-vicuna-13b": {"llava_config": {**_VICUNA, **_WIDE, **_ANYRES}, "clip_vision_config": _CLIP},
    "llava-onevision-qwen2-7b-ov": {"llava_qwen_config": _QWEN, "siglip_vision_config": _SIGLIP},
}
"""Original configurations of the published checkpoints that the pruning papers use."""


def rename_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original key names -> transformers' names; buffers that transformers recomputes are dropped.

    Raises:
        CheckpointError: for a key of neither layout.
    """
    renamed, strange = {}, []
    for key, value in state.items():
        if key.endswith(_BUFFERS):
            continue
        for prefix, ours in _PREFIXES.items():
            if key.startswith(prefix):
                renamed[ours + key[len(prefix) :]] = value
                break
        else:
            strange.append(key)
    if strange:
        raise CheckpointError(
            f"{len(strange)} keys belong to no part of an original LLaVA checkpoint, e.g. "
            f"{', '.join(sorted(strange)[:4])}"
        )
    return renamed


def _text_config(given: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    ours = {
        key: value
        for key, value in given.items()
        if not key.startswith(("mm_", "image_", "tokenizer_", "rope_theta", "use_cache"))
    }
    rope = {"rope_type": "default", "rope_theta": float(given.get("rope_theta", 10000.0))}
    return {"model_type": model_type, **ours, "rope_parameters": rope}


def config_from_original(config: Mapping[str, Any], image_token_id: int | None = None) -> Any:
    """The transformers configuration of an original one.

    Args:
        config: `llava_config` and `clip_vision_config` (LLaVA-1.5; with grid pinpoints LLaVA-1.6), or
            `llava_qwen_config` and `siglip_vision_config` (LLaVA-OneVision). Pinpoints are (width, height) there.
        image_token_id: the placeholder, which these checkpoints do not reserve; default the last id of the vocabulary.
            It must not occur in the text.
    """
    from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig

    if "llava_qwen_config" in config:
        given = config["llava_qwen_config"]
        vision = dict(config["siglip_vision_config"])
        # The last layer and the pooling head are not used, and not in the checkpoint.
        vision["num_hidden_layers"] -= 1
        vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        return LlavaOnevisionConfig(
            vision_config=vision,
            text_config=_text_config(given, "qwen2"),
            image_token_index=given["vocab_size"] - 1 if image_token_id is None else image_token_id,
            video_token_index=given["vocab_size"] - 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=given.get("image_aspect_ratio", "anyres_max_9"),
            image_grid_pinpoints=[[height, width] for width, height in given["image_grid_pinpoints"]],
            tie_word_embeddings=given.get("tie_word_embeddings", False),
        )
    if "llava_config" not in config:
        raise InvalidInputError(
            f"an original configuration holds llava_config or llava_qwen_config, got {list(config)}"
        )
    given = config["llava_config"]
    shared = {
        "vision_config": {"model_type": "clip_vision_model", **config["clip_vision_config"]},
        "text_config": _text_config(given, "llama"),
        "image_token_index": given["vocab_size"] - 1 if image_token_id is None else image_token_id,
        "vision_feature_layer": given.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": "default" if given.get("mm_vision_select_feature") == "patch" else "full",
        "tie_word_embeddings": given.get("tie_word_embeddings", False),
    }
    if "image_grid_pinpoints" in given:
        pinpoints = [[height, width] for width, height in given["image_grid_pinpoints"]]
        return LlavaNextConfig(**shared, image_grid_pinpoints=pinpoints)
    return LlavaConfig(**shared)


def build(config: Mapping[str, Any], image_token_id: int | None = None) -> Any:
    """The transformers model of an original configuration, random weights, in eval mode."""
    import transformers

    ours = config_from_original(config, image_token_id)
    names = {
        "llava": "LlavaForConditionalGeneration",
        "llava_next": "LlavaNextForConditionalGeneration",
        "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    }
    return getattr(transformers, names[ours.model_type])(ours).eval()


def from_original(
    source: str | Path | Mapping[str, Tensor],
    config: str | Mapping[str, Any],
    *,
    tower: str | Path | Mapping[str, Tensor] | None = None,
    image_token_id: int | None = None,
) -> Any:
    """Load a checkpoint in the original LLaVA layout into its transformers model, strictly.

    Args:
        source: a file, or a state dict.
        config: a name of `PUBLISHED`, or an original configuration (see `config_from_original`).
        tower: file or state dict of the CLIP vision tower, for LLaVA-1.5 files that leave it out
            (`openai/clip-vit-large-patch14-336`).
        image_token_id: see `config_from_original`.

    Raises:
        CheckpointError: naming every missing, unexpected or misshapen key.
    """
    if isinstance(config, str):
        if config not in PUBLISHED:
            raise InvalidInputError(f"unknown checkpoint {config!r}; there are: {', '.join(PUBLISHED)}")
        config = PUBLISHED[config]
    state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
    model = build(config, image_token_id)
    renamed = rename_original(state)
    if tower is not None:
        own = dict(tower) if isinstance(tower, Mapping) else read_state_dict(tower)
        renamed |= {
            f"model.vision_tower.{key.removeprefix('vision_model.')}": value
            for key, value in own.items()
            if not key.endswith(_BUFFERS)
            and not key.startswith(("text_model.", "text_projection", "visual_projection"))
            and key != "logit_scale"
        }
    problems = describe_mismatch(model.state_dict(), renamed)
    if problems:
        raise CheckpointError("; ".join(problems))
    model.load_state_dict(renamed)
    return model
