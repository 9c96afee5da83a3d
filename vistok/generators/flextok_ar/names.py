"""The authors' files of FlexTok's generators: key names, and what shapes show of the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["infer_config", "rename"]

OFFICIAL_TO_OURS = (
    ("models.ar_image_model.preprocessor.embedding.", "token_embedding."),
    ("models.ar_image_model.preprocessor.cls_embedding.", "class_embedding."),
    ("models.ar_image_model.preprocessor.positional_embedding", "position_table"),
    ("models.ar_image_model.preprocessor.sos_token_embed", "start"),
    ("models.ar_image_model.trunk.blocks.", "layers."),
    ("models.ar_image_model.trunk.post_trunk_norm.", "norm."),
    ("models.ar_image_model.head.linear.", "head."),
    ("models.ar_image_model.head.norm.", "output_norm."),
    ("models.text_encoder.mlp.", "text_mlp."),
)
LAYER_TO_OURS = (
    (".cross_attn.Wq.", ".cross_attention.q."),
    (".cross_attn.", ".cross_attention."),
    (".self_attn.", ".attention."),
    (".attn.", ".attention."),
    (".mlp.", ".feed_forward."),
    (".norm_1.", ".attention_norm."),
)


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join keys and values of cross-attention, and the halves of SwiGLU; incomplete pairs stay as they are."""
    joined = dict(state)
    for first, second, whole in (
        (".cross_attn.Wk.", ".cross_attn.Wv.", ".cross_attn.kv."),
        (".mlp.fc1.", ".mlp.fc3.", ""),
    ):
        for key in state:
            other = key.replace(first, second)
            if ".blocks." in key and first in key and other in state:
                parts = torch.cat([joined.pop(key), joined.pop(other)])
                joined[key.replace(first, whole) if whole else key] = parts
    return joined


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours; parts of one product are joined, and captions get an unset null feature."""
    text = any(".cross_attn." in key for key in state)
    renamed: dict[str, Tensor] = {}
    for key, value in _joined(state).items():
        for theirs, ours in OFFICIAL_TO_OURS:
            if key.startswith(theirs):
                key = ours + key.removeprefix(theirs)
                break
        if key.startswith("layers."):
            for theirs, ours in LAYER_TO_OURS:
                key = key.replace(theirs, ours)
            key = key.replace(".norm_2.", ".cross_norm." if text else ".mlp_norm.")
            key = key.replace(".norm_3.", ".mlp_norm.")
        renamed[key] = value
    features = renamed.get("text_mlp.fc1.weight")
    if features is not None and "null_text" not in renamed:
        renamed["null_text"] = torch.full((1, features.shape[1]), math.nan, dtype=features.dtype)
        if features.is_meta:
            renamed["null_text"] = renamed["null_text"].to("meta")
    return renamed


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the shapes and names of official weights show; {} if these are none."""

    def shape(ending: str) -> tuple[int, ...] | None:
        return next((tuple(value.shape) for key, value in state.items() if key.endswith(ending)), None)

    embedding = shape("preprocessor.embedding.weight")
    if embedding is None:
        return {}
    blocks = {int(key.split(".blocks.")[1].split(".")[0]) for key in state if ".blocks." in key}
    classes, text = shape("preprocessor.cls_embedding.weight"), shape("text_encoder.mlp.fc1.weight")
    hidden = shape("blocks.0.mlp.fc1.weight")
    layer_norm = shape("post_trunk_norm.bias") is not None or shape("blocks.0.norm_1.bias") is not None
    table = shape("preprocessor.positional_embedding")
    known: dict[str, Any] = {
        "vocab_size": embedding[0],
        "hidden_size": embedding[1],
        "num_layers": len(blocks),
        "num_heads": max(1, embedding[1] // 64),
        "gated_mlp": shape("blocks.0.mlp.fc3.weight") is not None,
        "norm_type": "layer" if layer_norm else "rms",
        "norm_eps": 1e-5 if layer_norm else 1e-6,
        "qk_norm": shape("blocks.0.self_attn.q_norm.weight") is not None
        or shape("blocks.0.attn.q_norm.weight") is not None,
        "cross_qk_norm": shape("blocks.0.cross_attn.q_norm.weight") is not None,
        "bias": shape("blocks.0.mlp.fc2.bias") is not None,
        "head_norm": shape("head.norm.weight") is not None,
        "head_bias": shape("head.linear.bias") is not None,
        "num_classes": None if classes is None else classes[0],
        "caption_dim": None if classes is not None or text is None else text[1],
        "positions": "none" if table is None else "absolute",
    }
    if hidden is not None:
        known["mlp_hidden_size"] = hidden[0]
    if table is not None:
        known["num_tokens"] = table[0]
    return known
