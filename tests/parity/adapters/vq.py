"""The VQ tokenizer against LlamaGen's: model, quantiser, adversarial objective, preprocessing."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vistok.nn.discriminator import PatchDiscriminator
from vistok.nn.model import describe_mismatch
from vistok.nn.perceptual import LPIPS
from vistok.tokenizers.transforms import center_crop, random_crop, ten_crop, to_tensor, to_uint8
from vistok.tokenizers.vq import VectorQuantizer, VQLoss, VQModel
from vistok.tokens import VisualTokens

SYSTEM = "llamagen"
NOT_ARGUMENTS = ("salt", "gain")  # of procedural weights


def procedural(shapes: Mapping[str, Tensor], salt: int, gain: float, skip: tuple[str, ...]) -> dict[str, Tensor]:
    """Weights computed from a hash of the position, by the rule of the parity files.

    Args:
        shapes: official key -> tensor of the right shape; those of skipped keys and integers are kept.
        salt: seed.
        gain: scale of the matrices.
        skip: beginnings of keys that keep their value (they count all the same).
    """
    made = {}
    for position, key in enumerate(sorted(shapes)):
        value = shapes[key]
        if key.startswith(skip) or not value.is_floating_point():
            made[key] = value
            continue
        stream = np.uint32((salt * 100_000 + position + 1) * 40503 % 2**32)
        bits = np.arange(1, value.numel() + 1, dtype=np.uint32) * np.uint32(2654435761) + stream
        bits ^= bits >> np.uint32(16)
        bits *= np.uint32(0x85EBCA6B)
        bits ^= bits >> np.uint32(13)
        bits *= np.uint32(0xC2B2AE35)
        bits ^= bits >> np.uint32(16)
        u = (bits.astype(np.float64) / 2**31 - 1.0).astype(np.float32)
        if key.endswith("running_var") or (value.ndim == 1 and key.endswith(".weight")):
            u = 1.0 + np.float32(0.1) * u
        elif value.ndim < 2:
            u = np.float32(0.05) * u
        elif not key.endswith("embedding.weight"):
            u = (u * (gain * np.sqrt(3.0 / (value.numel() / value.shape[0])))).astype(np.float32)
        made[key] = torch.from_numpy(u.astype(np.float32)).view(value.shape)
    return made


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in NOT_ARGUMENTS}


def build(g: Any) -> VQModel:
    return VQModel.from_official(g.weights, arguments(g.config))


def channel_first(model: VQModel, ids: Tensor, shape: list[int]) -> Tensor:
    """Unit codes of `ids` as [B, C, h, w]."""
    batch, dim, rows, cols = shape
    return F.embedding(ids.flatten(), model.quantizer.codes()).view(batch, rows, cols, dim).permute(0, 3, 1, 2)


@torch.no_grad()
def vq_encode(g: Any) -> dict[str, Tensor]:
    model = build(g)
    x = g.inputs["x"]
    tokens = model.encode(x)
    output = model.quantizer(model.encode_features(x))
    assert torch.equal(tokens.ids, output.ids)
    return {"h": model.encoder(x), "quant": output.quantized, "indices": tokens.ids.flatten()}


@torch.no_grad()
def vq_decode(g: Any) -> dict[str, Tensor]:
    model = build(g)
    shape = g.call["qzshape"]
    ids = g.inputs["indices"].view(shape[0], -1)
    entries = channel_first(model, ids, shape).permute(0, 2, 3, 1)
    image = model.decode(VisualTokens(ids=ids, grid=(shape[2], shape[3])))
    outputs = {
        "entries_channel_last": entries,
        "entries_flat": entries.reshape(-1, shape[1]),
        "image": image,
        "uint8": to_uint8(image),
    }
    if "quant" in g.inputs:
        outputs["image_from_quant"] = model.decode_features(g.inputs["quant"])
    return outputs


def vq_train(g: Any) -> dict[str, Tensor]:
    # In float64: the recorded gradients carry rounding of 1e-5 already, and ours must not add to it.
    model = build(g).double().train()
    x = g.inputs["x"].double()
    output = model(x)
    quantization = output.quantization
    total = F.mse_loss(output.sample, x) + quantization.loss
    total.backward()
    outputs = {
        "recon": output.sample,
        "vq_loss": quantization.codebook_loss,
        "commit_loss": quantization.commitment_loss,
        "entropy_loss": quantization.entropy_loss,
        "codebook_usage": quantization.usage,
        "total": total,
    }
    if model.quantizer.usage_queue is not None:
        outputs["codebook_used_after"] = model.quantizer.usage_queue.float()
    # Gradients carry the names of their parameters; move them to the authors' names the way weights go.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
    gradients = model.to_official()
    return outputs | {f"grad.{name}": gradients[name] for name in g.call["grads"]}


def quantizer_train(g: Any) -> dict[str, Tensor]:
    config = g.config
    quantizer = VectorQuantizer(
        config["n_e"],
        config["e_dim"],
        commitment_weight=config["beta"],
        entropy_weight=config["entropy_loss_ratio"],
        l2_normalize=config["l2_norm"],
        usage_window=65536 if config["show_usage"] else 0,
    ).train()
    with torch.no_grad():
        quantizer.codebook.copy_(g.weights["embedding.weight"])
        if "codebook_used" in g.weights:
            quantizer.usage_queue.copy_(g.weights["codebook_used"])
    z = g.inputs["z"].clone().requires_grad_(True)
    output = quantizer(z)
    ((output.quantized * g.inputs["gout"]).sum() + output.loss).backward()
    outputs = {
        "indices": output.ids.flatten(),
        "z_q": output.quantized,
        "vq_loss": output.codebook_loss,
        "commit_loss": output.commitment_loss,
        "entropy_loss": output.entropy_loss,
        "grad_z": z.grad,
        "grad_embedding": quantizer.codebook.grad,
    }
    if output.usage is not None:
        outputs["codebook_usage"] = output.usage
        outputs["codebook_used_after"] = quantizer.usage_queue.float()
    return outputs


@torch.no_grad()
def full_procedural(g: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        skeleton = VQModel(**VQModel.config_from_official(arguments(g.config))).to_official()
    skeleton["quantize.codebook_used"] = torch.zeros(skeleton["quantize.codebook_used"].shape)
    weights = procedural(skeleton, g.config["salt"], g.config["gain"], ("quantize.codebook_used",))
    model = VQModel.from_official(weights, arguments(g.config))
    x, ids = g.inputs["x"], g.inputs["tokens"]
    factor = model.downsample_factor
    grid = (x.shape[-2] // factor, x.shape[-1] // factor)
    return {
        "pre_quant": model.encode_features(x),
        "indices": model.encode(x).ids.flatten(),
        "image": model.decode(VisualTokens(ids=ids, grid=grid)),
    }


def vqloss_procedural(g: Any) -> dict[str, Tensor]:
    args = g.config["args"]
    variants = {"non-saturating": "non_saturating_swapped", "vanilla": "non_saturating", "hinge": "hinge"}
    discriminator = PatchDiscriminator(3, args["disc_dim"], args["disc_num_layers"])
    perceptual = LPIPS()
    keys = {f"discriminator.{key}": value for key, value in discriminator.state_dict().items()}
    keys |= {f"perceptual_loss.{key}": value for key, value in perceptual.state_dict().items()}
    keys |= {f"perceptual_loss.scaling_layer.{key}": torch.zeros(1, 3, 1, 1) for key in ("shift", "scale")}
    weights = procedural(keys, g.config["salt"], g.config["gain"], ("perceptual_loss.scaling_layer.",))
    part = {
        name: {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)}
        for name in ("discriminator.", "perceptual_loss.")
    }
    discriminator.load_state_dict(part["discriminator."])
    objective = VQLoss(
        LPIPS.from_official(part["perceptual_loss."]),
        discriminator,
        reconstruction=args["reconstruction_loss"],
        reconstruction_weight=args["reconstruction_weight"],
        perceptual_weight=args["perceptual_weight"],
        generator_loss=variants[args["gen_adv_loss"]],
        discriminator_loss=variants[args["disc_loss"]],
        adversarial_weight=args["disc_weight"],
        adversarial_start=args["disc_start"],
        adaptive_weight=args["disc_adaptive_weight"],
    ).train()
    x, codebook_loss = g.inputs["x"], g.inputs["codebook_loss"].sum()
    last_layer = nn.Parameter(g.inputs["last_layer"].clone())
    reconstruction = F.conv2d(g.inputs["features"], last_layer, padding=1)
    steps = g.call["gen_steps"]
    before = objective.generator_turn(x, reconstruction, codebook_loss, steps["before"], last_layer)["loss"]
    after = objective.generator_turn(x, reconstruction, codebook_loss, steps["after"], last_layer)["loss"]
    (gradient,) = torch.autograd.grad(after, last_layer, retain_graph=True)
    disc_loss = objective.discriminator_turn(x, reconstruction, steps["after"])["loss"]
    disc_loss.backward()
    outputs = {
        "recon": reconstruction,
        "lpips": objective.perceptual(x, reconstruction),
        "gen_loss_before": before,
        "gen_loss_after": after,
        "gen_grad_last_layer": gradient,
        "disc_loss": disc_loss,
        "disc_grad_main.0.weight": discriminator.main[0].weight.grad,
    }
    outputs["disc_eval_logits"] = discriminator.eval()(x)
    return outputs


class Replay(random.Random):
    """Returns recorded draws."""

    def __init__(self, draws: list[int]) -> None:
        super().__init__(0)
        self.draws = list(draws)

    def randrange(self, *bounds: int) -> int:
        draw = self.draws.pop(0)
        assert draw in range(*bounds), f"the recorded draw {draw} is outside range{bounds}"
        return draw


def preprocess(g: Any) -> dict[str, Tensor]:
    image = Image.fromarray(g.inputs["image"].numpy())
    size = g.call["image_size"]
    centre = center_crop(image, size)
    views = [
        torch.from_numpy(np.array(view)).permute(2, 0, 1)
        for view in ten_crop(image, size, crop_range=g.call["crop_range"])
    ]
    return {
        "center_crop": torch.from_numpy(np.array(centre)),
        "random_crop": torch.from_numpy(np.array(random_crop(image, size, rng=Replay(g.call["randrange"])))),
        "ten_crop_u8": torch.stack(views),
        "normalised_center": to_tensor(centre),
    }


def manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    published = {"vq_ds16": "vq16.imagenet", "vq_ds8": "vq8.imagenet"}[name.rsplit("_", 1)[0]]
    entry = VQModel.published[published]
    state = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in keys.items()
    }
    with torch.device("meta"):
        model = VQModel(**entry.config)
    problems = describe_mismatch(model.state_dict(), VQModel.rename_official(VQModel.unwrap_official({"model": state})))
    problems += describe_mismatch(model.to_official(), state)
    assert not problems, "; ".join(problems)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters


# Channels-last convolutions and the folded up-sampling add in another order than the authors' layers.
REORDERED = ("vq_encode", "vq_decode", "vq_train")

CASES = {
    "vq_encode": vq_encode,
    "vq_decode": vq_decode,
    "vq_train": vq_train,
    "quantizer_train": quantizer_train,
    "vq16_full_procedural": full_procedural,
    "vq8_full_procedural": full_procedural,
    "vqloss_procedural": vqloss_procedural,
    "preprocess": preprocess,
}
MANIFESTS = {"vq_ds": manifest}
