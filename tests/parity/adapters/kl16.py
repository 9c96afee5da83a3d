"""The KL tokenizer against MAR's: network, posterior, preprocessing, key table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from tests.parity.check import read_text
from vistok.nn.model import describe_mismatch
from vistok.tokenizers.kl import KLModel, diffusers_key
from vistok.tokenizers.transforms import center_crop, to_tensor

SYSTEM = "kl16"


def vae(g: Any) -> dict[str, Tensor]:
    model = KLModel.from_official(g.weights, g.config)
    scale = g.call.get("scale", 0.2325)
    assert model.config.scaling_factor == scale
    assert describe_mismatch(g.weights, model.to_official()) == []
    posterior = model.posterior(g.inputs["image"])
    latents = model.scale_latents(posterior.mean + posterior.std * g.inputs["noise"])
    given = model.decode(model.tokens_from_latents(g.inputs["latents_in"]))
    return {
        "moments": model.moments(g.inputs["image"]),
        "mode": model.unscale_latents(model.latents_from_tokens(model.encode(g.inputs["image"]))),
        "logvar": posterior.logvar,
        "std": posterior.std,
        "kl": posterior.kl(),
        "latents": latents,
        "decoded": model.decode(model.tokens_from_latents(latents)),
        "decoded_from_latents_in": given,
        "uint8": model.postprocess(given, "uint8"),
    }


def posterior(g: Any) -> dict[str, Tensor]:
    ours = DiagonalGaussianDistribution(g.inputs["moments"])
    other = DiagonalGaussianDistribution(g.inputs["moments_other"])
    mean = DiagonalGaussianDistribution(g.inputs["moments"], deterministic=True)
    noise = g.inputs["noise"]
    model = KLModel.tiny(latent_channels=noise.shape[1])
    return {
        "mean": ours.mean,
        "mode": model.latents_from_tokens(model.tokens_from_moments(g.inputs["moments"], sample=False)),
        "logvar": ours.logvar,
        "std": ours.std,
        "var": ours.var,
        "sample": ours.mean + ours.std * noise,
        "deterministic_sample": mean.mean + mean.std * noise,
        "kl": ours.kl(),
        "kl_other": ours.kl(other),
        "nll": ours.nll(noise),
    }


def preprocess(g: Any) -> dict[str, Tensor]:
    found, size = {}, g.call["image_size"]
    model = KLModel.tiny(sample_size=size)
    for name, pixels in g.inputs.items():
        image = Image.fromarray(pixels.numpy())
        crop = center_crop(image, size)
        found[f"crop_{name}"] = torch.from_numpy(np.array(crop))
        found[f"tensor_{name}"] = model.preprocess(image, size)[0]
        assert torch.equal(found[f"tensor_{name}"], to_tensor(crop))
    return found


def manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    state = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in keys.items()
    }
    with torch.device("meta"):
        model = KLModel(**KLModel.published["kl16.mar"].config)
    problems = describe_mismatch(model.state_dict(), KLModel.rename_official(KLModel.unwrap_official({"model": state})))
    problems += describe_mismatch(model.to_official(), state)
    assert not problems, "; ".join(problems)


def diffusers_mapping(path: Path) -> None:
    """Every official key's name in diffusers, which projections lose their 1x1 dimensions, and the configuration."""
    content = json.loads(read_text(path))
    config, table = content["config"], content["keys"]
    with torch.device("meta"):
        model = KLModel(**config)
    official = model.to_official()
    assert official.keys() == table.keys(), sorted(official.keys() ^ table.keys())
    renamed = KLModel.rename_official(official)
    for key, entry in table.items():
        name = diffusers_key(key, len(config["block_out_channels"]))
        assert name == entry["to"], f"{key}: {name} instead of {entry['to']}"
        assert (renamed[name].ndim < official[key].ndim) == entry["squeeze_1x1"], f"{key}: squeezed, or not"
    published = KLModel.published["kl16.mar"].config
    if config["block_out_channels"] == list(published["block_out_channels"]):
        ours = json.loads(json.dumps(published))
        assert ours == {name: config[name] for name in ours}


CASES = {"vae_": vae, "posterior": posterior, "preprocess": preprocess}
MANIFESTS = {"kl": manifest}
FILES = {"diffusers_mapping.json": diffusers_mapping}
