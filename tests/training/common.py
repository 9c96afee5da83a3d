"""Tiny recipes that train in a second."""

from __future__ import annotations

from typing import Any

from vistok.training.recipe import Recipe, parse_recipe

VQ = {
    "base_channels": 32,
    "encoder_channel_multipliers": [1, 1],
    "decoder_channel_multipliers": [1, 1],
    "num_res_blocks": 1,
    "z_channels": 8,
    "codebook_size": 32,
    "usage_window": 256,
    "revive_dead_codes": True,
    "attention": "middle",
}
KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "latent_channels": 2,
    "sample_size": 16,
}
LLAMAGEN = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "multiple_of": 16,
    "num_classes": 64,
    "grid": [4, 4],
}


def vq_values(**changes: Any) -> dict[str, Any]:
    """A tokenizer on lab scenes and photograph crops of 16x16 pixels."""
    values: dict[str, Any] = {
        "name": "tiny-vq",
        "model": {"system": "vq", "config": dict(VQ)},
        "data": {"source": "shapes-images", "image_size": 16, "photo_ratio": 0.5, "held_out_photos": ["coffee"]},
        "steps": 6,
        "batch_size": 4,
        "ema_decay": 0.9,
        "checkpoint_every": 3,
        "log_every": 1,
    }
    return {**values, **changes}


def generator_values(**changes: Any) -> dict[str, Any]:
    """A raster generator with dropout on 48 scenes of 4x4 tokens."""
    values: dict[str, Any] = {
        "name": "tiny-llamagen",
        "model": {"system": "llamagen", "config": dict(LLAMAGEN)},
        "data": {"source": "shapes-tokens", "image_size": 8, "scenes": 48, "condition": "class"},
        "tokenizer": "vq.tiny",
        "steps": 6,
        "batch_size": 8,
        "ema_decay": 0.9,
        "checkpoint_every": 3,
        "log_every": 1,
    }
    return {**values, **changes}


def vq_recipe(**changes: Any) -> Recipe:
    """`vq_values`, checked."""
    return parse_recipe(vq_values(**changes))


def generator_recipe(**changes: Any) -> Recipe:
    """`generator_values`, checked."""
    return parse_recipe(generator_values(**changes))
