"""Tiny random diffusers pipelines of every family that controllers know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from tests.parity.pipelines import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer, tiny_vae, unet_pipeline

FOLDER = Path(__file__).parents[1] / "golden" / "leakage"


def clip_config(width: int, act: str, projection: int, layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": 230,
        "max_position_embeddings": 77,
        "bos_token_id": 228,
        "eos_token_id": 229,
        "pad_token_id": 229,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "hidden_act": act,
        "projection_dim": projection,
    }


def t5_config(width: int) -> dict[str, Any]:
    return {
        "vocab_size": 162,
        "d_model": width,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


def scheduler_config() -> dict[str, Any]:
    return {
        "_class": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def unet_config(width: int, **settings: Any) -> dict[str, Any]:
    return {
        "sample_size": 8,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": width,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        **settings,
    }


def make_sd(act: str = "quick_gelu") -> Any:
    config = {"text_encoder": clip_config(32, act, 32), "unet": unet_config(32), "scheduler": scheduler_config()}
    return unet_pipeline(config, {}, FOLDER)


def make_sdxl() -> Any:
    return unet_pipeline(
        {
            "text_encoder": clip_config(32, "quick_gelu", 32),
            "text_encoder_2": clip_config(24, "gelu", 20),
            "unet": unet_config(
                56,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=68,
                transformer_layers_per_block=[1, 1],
                use_linear_projection=True,
            ),
            "scheduler": scheduler_config(),
        },
        {},
        FOLDER,
    )


def make_sd3() -> Any:
    torch.manual_seed(1)
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=80,
        caption_projection_dim=32,
        pooled_projection_dim=52,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=clip_encoder(clip_config(32, "quick_gelu", 32), None, True),
        tokenizer=clip_tokenizer(FOLDER),
        text_encoder_2=clip_encoder(clip_config(40, "gelu", 20), None, True),
        tokenizer_2=clip_tokenizer(FOLDER, pad_token="!"),
        text_encoder_3=t5_encoder(t5_config(80), None),
        tokenizer_3=t5_tokenizer(FOLDER),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_flux() -> Any:
    torch.manual_seed(2)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=clip_encoder(clip_config(32, "quick_gelu", 32), None, False),
        tokenizer=clip_tokenizer(FOLDER),
        text_encoder_2=t5_encoder(t5_config(32), None),
        tokenizer_2=t5_tokenizer(FOLDER),
        transformer=network,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


MAKERS = {"sd": make_sd, "sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux}
_MADE: dict[str, Any] = {}


def pipeline(family: str) -> Any:
    """The pipeline of a family, made once a session; tests leave it as they find it."""
    if family not in _MADE:
        _MADE[family] = MAKERS[family]()
    return _MADE[family]


@pytest.fixture(params=list(MAKERS))
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipeline(request.param)


def draw(pipe: Any, *args: Any, steps: int = 3, **kwargs: Any) -> torch.Tensor:
    """Latents of a short sampling with fixed noise."""
    settings: dict[str, Any] = {
        "num_inference_steps": steps,
        "output_type": "latent",
        "height": 64,
        "width": 64,
        "generator": torch.Generator().manual_seed(5),
        "guidance_scale": 3.0,
    }
    if type(pipe).__name__.startswith(("FluxPipeline", "StableDiffusion3")):
        settings["max_sequence_length"] = 32
    return pipe(*args, **(settings | kwargs)).images
