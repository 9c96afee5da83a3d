"""Tiny diffusers pipelines and their parts from the configurations of golden files. Several adapters share it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def part(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights below `name.`, or {}."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], allowed_missing: tuple[str, ...] = ()) -> nn.Module:
    """Load every weight; tied weights that the file leaves out are named in `allowed_missing`."""
    missing, unexpected = module.load_state_dict(dict(weights), strict=False)
    missing = [key for key in missing if key not in allowed_missing and not key.endswith("position_ids")]
    assert not missing, f"missing {missing[:5]}"
    assert not unexpected, f"unexpected {unexpected[:5]}"
    return module.eval()


def clip_encoder(config: Mapping[str, Any], weights: Mapping[str, Tensor] | None, projection: bool) -> nn.Module:
    """A CLIP text encoder; published files name its layers `text_model.*`, with or without projection."""
    cls = CLIPTextModelWithProjection if projection else CLIPTextModel
    model = cls(CLIPTextConfig(**config))
    if weights:
        own = model.state_dict()
        if not any(key.startswith("text_model.") for key in own):
            weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
        weights = {key: value for key, value in weights.items() if not key.endswith("position_ids")}
        load_strictly(model, weights)
    return model.eval()


def t5_encoder(config: Mapping[str, Any], weights: Mapping[str, Tensor] | None) -> nn.Module:
    """A T5 encoder; its two names of the embedding are one tensor, recorded once."""
    model = T5EncoderModel(T5Config(**config))
    if weights:
        table = weights.get("shared.weight", weights.get("encoder.embed_tokens.weight"))
        full = {**weights, "shared.weight": table, "encoder.embed_tokens.weight": table}
        full = {key: value for key, value in full.items() if key in model.state_dict() or key in weights}
        load_strictly(model, full)
    return model.eval()


def unet(config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A conditional UNet."""
    model = diffusers.UNet2DConditionModel(**config)
    return load_strictly(model, weights) if weights else model.eval()


def scheduler(config: Mapping[str, Any]) -> Any:
    """The scheduler that `_class` names."""
    return getattr(diffusers, config["_class"]).from_config(
        {key: value for key, value in config.items() if key != "_class"}
    )


def _tokenizer_file(folder: Path, name: str) -> dict[str, Any]:
    places = [
        folder / name,
        *(REPOSITORY / "tests" / "golden" / system / name for system in ("attribute_directions", "leakage")),
    ]
    for place in places:
        if place.is_file():
            return json.loads(place.read_text(encoding="utf-8"))
    raise FileNotFoundError(f"no {name} beside the golden file")


def clip_tokenizer(folder: Path, **settings: Any) -> CLIPTokenizer:
    """The recorded small CLIP tokenizer."""
    content = _tokenizer_file(folder, "tiny_clip_tokenizer.json")
    return CLIPTokenizer(
        vocab=content["vocab"],
        merges=[tuple(pair) for pair in content["merges"]],
        model_max_length=content.get("model_max_length", 77),
        **settings,
    )


def t5_tokenizer(folder: Path) -> T5Tokenizer:
    """The recorded small T5 tokenizer."""
    content = _tokenizer_file(folder, "tiny_t5_tokenizer.json")
    return T5Tokenizer(vocab=[tuple(entry) for entry in content["vocab"]], extra_ids=0, model_max_length=512)


def tiny_vae() -> Any:
    """The smallest VAE that gives the pipelines their scale factor of 8; these cases never decode."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )


def unet_pipeline(config: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path) -> Any:
    """A Stable Diffusion or SDXL pipeline; parts without recorded weights are random."""
    torch.manual_seed(0)
    encoder = clip_encoder(config["text_encoder"], part(weights, "text_encoder"), projection=False)
    network = unet(config["unet"], part(weights, "unet") or None)
    steps = scheduler(config["scheduler"])
    tokens = clip_tokenizer(folder)
    if "text_encoder_2" in config:
        second = clip_encoder(config["text_encoder_2"], part(weights, "text_encoder_2"), projection=True)
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=encoder,
            text_encoder_2=second,
            tokenizer=tokens,
            tokenizer_2=clip_tokenizer(folder, pad_token="!"),
            unet=network,
            scheduler=steps,
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
    else:
        pipe = diffusers.StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=encoder,
            tokenizer=tokens,
            unet=network,
            scheduler=steps,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe
