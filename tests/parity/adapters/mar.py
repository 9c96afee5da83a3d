"""MAR: diffusion process, head, stacks, training and whole sampling loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.parity.replay import check_meta_model
from vistok.generators.mar import MAR
from vistok.nn import diffusion, masked, sampling
from vistok.nn.diffusion import DiffusionProcess, cosine_process
from vistok.nn.diffusion_head import DiffusionHead, DiffusionHeadSampler, timestep_features
from vistok.nn.masked import patchify, unpatchify
from vistok.tokenizers.transforms import center_crop, to_tensor

SYSTEM = "mar"
# Rates are drawn per file; everything else is under these names.
TABLES = {
    "betas": lambda process: process.betas,
    "alphas_cumprod": lambda process: process.alphas_cumprod,
    "alphas_cumprod_prev": lambda process: process.alphas_cumprod_prev,
    "posterior_variance": lambda process: process.posterior_variance,
    "posterior_log_variance_clipped": lambda process: process.posterior_log_variance,
    "posterior_mean_coef1": lambda process: process.posterior_mean_x0,
    "posterior_mean_coef2": lambda process: process.posterior_mean_xt,
    "sqrt_recip_alphas_cumprod": lambda process: (1.0 / process.alphas_cumprod).sqrt(),
    "sqrt_recipm1_alphas_cumprod": lambda process: (1.0 / process.alphas_cumprod - 1.0).sqrt(),
    "fixed_large_variance": lambda process: process.fixed_large_variance,
}


@contextmanager
def replayed(**functions: Any) -> Iterator[None]:
    """Inside, these functions of the diffusion and masking modules are replaced."""
    homes = {
        "gaussian_noise": diffusion,
        "uniform_timesteps": diffusion,
        "random_orders": masked,
        "truncated_normal_rate": masked,
        "uniform": sampling,
    }
    patches = [mock.patch.object(homes[name], name, function) for name, function in functions.items()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def queue(draws: Sequence[Tensor], *, sized: bool = True) -> Any:
    """A function of a shape (or, not `sized`, of a count) that gives recorded draws one after the other."""
    left = list(draws)

    def draw(shape: Sequence[int] | int, *_: object) -> Tensor:
        taken = left.pop(0)
        wanted = tuple(shape) if sized else (shape,)
        assert taken.numel() == int(np.prod(wanted)), f"recorded {list(taken.shape)}, asked for {list(wanted)}"
        return taken.reshape(wanted)

    return draw


def head_draws(inputs: dict[str, Tensor], name: str) -> list[Tensor]:
    """The draws of one head call; the last step adds no noise, so its draw is not asked for."""
    steps = inputs.get(f"{name}.noise_steps")
    return [inputs[f"{name}.noise_init"], *(() if steps is None else steps[:-1])]


def tables(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Timestep maps and tables of every respacing that a file names."""
    found = {}
    for key in outputs:
        respacing, _, table = key.rpartition(".")
        process = (
            cosine_process("" if respacing == "full" else respacing) if table in [*TABLES, "timestep_map"] else None
        )
        if process is not None:
            found[key] = torch.tensor(process.timesteps) if table == "timestep_map" else TABLES[table](process)
    return found


def single_steps(process: DiffusionProcess, g: Any, eps: Tensor, logits: Tensor | None) -> dict[str, Tensor]:
    """Moments and samples at the temperatures of a file."""
    x, t, noise = (g.inputs[name] for name in ("x", "t", "noise"))
    moments = process.reverse_moments(x, t, eps, logits)
    found = {
        "p_mean_variance.mean": moments.mean,
        "p_mean_variance.log_variance": moments.log_variance,
        "p_mean_variance.variance": moments.log_variance.exp(),
        "p_mean_variance.pred_xstart": moments.x0,
        "p_mean_variance_clip.mean": process.reverse_moments(x, t, eps, logits, clip=True).mean,
    }
    for temperature in g.call["temperatures"]:
        found[f"p_sample.T{temperature}"] = process.ancestral_sample(x, t, eps, noise, logits, temperature=temperature)
    return found


def diffusion_process(g: Any) -> dict[str, Tensor]:
    x, t, noise, output = (g.inputs[name] for name in ("x", "t", "noise", "model_out"))
    eps, logits = output.split(x.shape[1], dim=1)
    process = cosine_process(g.call["respacing"])
    found = {**tables(g.outputs), **single_steps(process, g, eps, logits)}
    for eta in g.call["etas"]:
        found[f"ddim_sample.eta{eta}"] = process.ddim_step(x, t, eps, noise, eta=eta)
    whole, t = cosine_process(), g.inputs["t_train"]
    error, bound = whole.losses(x, t, noise, eps, logits)
    return {
        **found,
        "q_sample": whole.add_noise(x, t, noise),
        "training_losses.mse": error,
        "training_losses.vb": bound,
        "training_losses.loss": error + bound,
    }


def diffloss_head(g: Any) -> dict[str, Tensor]:
    sizes = g.config
    head = DiffusionHead(sizes["target_channels"], sizes["z_channels"], sizes["depth"], sizes["width"])
    head.load_state_dict(g.weights, strict=True)
    x, t, c, size, scale = g.inputs["x"], g.inputs["t"], g.inputs["c"], head.token_size, g.call["cfg_scale"]
    half = x[: len(x) // 2].repeat(2, 1)
    eps, logits = head.net(half, t, c).split(size, dim=-1)
    with_cond, without = eps.chunk(2)
    guided = torch.lerp(without, with_cond, scale).repeat(2, 1)
    found = {
        "forward": head.net(x, t, c),
        "forward_with_cfg": torch.cat([guided, logits], dim=-1),
        "time_embed": head.net.time_embed(t),
        "time_freq": timestep_features(t),
    }
    draw = head.sampler(sizes["num_sampling_steps"])
    for name, guidance in (("nocfg", None), ("cfg", scale)):
        with torch.no_grad(), replayed(gaussian_noise=queue(head_draws(g.inputs, name))):
            found[f"sample_{name}"] = draw(
                g.inputs["z"], num_images=1, guidance_scale=guidance, temperature=g.call["temperature"]
            )
    z, mask = g.inputs["train_z"].clone().requires_grad_(), g.inputs["train_mask"]
    error, bound = head.loss_terms(g.inputs["train_target"], z, g.inputs["train_t"], g.inputs["train_noise"])
    loss = ((error + bound) * mask).sum() / mask.sum()
    (gradient,) = torch.autograd.grad(loss, z)
    return {
        **found,
        "train_mse_per_token": error,
        "train_vb_per_token": bound,
        "train_loss": loss,
        "train_loss_nomask": (error + bound).mean(),
        "train_grad_z": gradient,
    }


def split(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(visible [B, V], masked [B, M]) positions of a mask [B, L], ascending."""
    order = mask.long().argsort(dim=1, stable=True)
    known = int((mask[0] == 0).sum())
    return order[:, :known], order[:, known:]


@torch.no_grad()
def encode_decode(g: Any) -> dict[str, Tensor]:
    model = MAR.from_official(g.weights, g.config)
    latents, mask, labels = g.inputs["latents"], g.inputs["mask"] > 0, g.inputs["labels"]
    tokens = patchify(latents, model.patch_size)
    every = torch.ones_like(mask)
    return {
        "patchified": tokens,
        "unpatchified": unpatchify(tokens, model.grid, model.patch_size),
        "encoder_out": model._encode(tokens, split(mask)[0], model.context(labels)),
        "z": model(tokens, mask, labels),
        "encoder_out_allmasked_uncond": model._encode(tokens, split(every)[0], model.context(None)),
        "z_allmasked_uncond": model(tokens, every, None),
    }


def gradients(model: torch.nn.Module, keys: Sequence[str]) -> dict[str, Tensor]:
    """The gradients under the names of the files, and their norms in the order of `keys`."""
    grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    norms = [grads[key].norm() if key in grads else torch.zeros(()) for key in keys]
    return {"grad_norms": torch.stack(norms), **{f"grad.{name}": value for name, value in grads.items()}}


def train(g: Any) -> dict[str, Tensor]:
    model = MAR.from_official(g.weights, g.config).train()
    inputs, orders = g.inputs, g.inputs["orders"]
    count = int(np.ceil(orders.shape[1] * float(inputs["mask_rate"])))
    mask = torch.zeros(orders.shape, dtype=torch.bool).scatter(1, orders[:, :count], True)
    # Draws are recorded for every position; ours are made for the masked ones, raster by raster.
    chosen = mask.flatten().repeat(model.diffusion_repeats)
    with replayed(
        random_orders=lambda *_: orders,
        truncated_normal_rate=lambda *_: float(inputs["mask_rate"]),
        uniform=lambda *_: inputs["label_drop_rand"],
        uniform_timesteps=lambda *_: inputs["t"][chosen],
        gaussian_noise=lambda *_: inputs["noise"][chosen],
    ):
        loss = model.training_loss({"latents": inputs["latents"], "labels": inputs["labels"]})["loss"]
    loss.backward()
    drop = inputs["label_drop_rand"] < model.condition_dropout
    tokens = patchify(inputs["latents"], model.patch_size)
    context = model.context(inputs["labels"], drop)
    return {
        "loss": loss,
        "mask": mask.float(),
        "z": model(tokens, mask, inputs["labels"], drop),
        "encoder_out": model._encode(tokens, split(mask)[0], context),
        **gradients(model, g.call["grad_keys"]),
    }


class Listener:
    """Hears what the MLP head is given and draws."""

    def __init__(self) -> None:
        self.conditions: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.scales: list[float] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        call, listener = DiffusionHeadSampler.__call__, self

        def heard(draw: DiffusionHeadSampler, condition: Tensor, **settings: Any) -> Tensor:
            tokens = call(draw, condition, **settings)
            listener.conditions.append(condition)
            listener.tokens.append(tokens)
            scale = settings["guidance_scale"]
            listener.scales.append(1.0 if scale is None else scale)
            return tokens

        with mock.patch.object(DiffusionHeadSampler, "__call__", heard):
            yield


def sample(g: Any) -> dict[str, Tensor]:
    model = MAR.from_official(g.weights, g.config)
    call, inputs = g.call, g.inputs
    names = sorted({key.split(".")[0] for key in inputs if key.startswith("iter")})
    noise = queue([draw for name in names for draw in head_draws(inputs, name)])
    listener = Listener()
    labels = None if call["labels"] is None else inputs["labels"]
    with replayed(random_orders=lambda *_: inputs["orders"], gaussian_noise=noise), listener.attached():
        tokens = model.generate(
            labels,
            num_images=call["bsz"] if labels is None else None,
            guidance_scale=call["cfg"],
            guidance_schedule=call["cfg_schedule"],
            temperature=call["temperature"],
            num_inference_steps=call["num_iter"],
        )
    found = {
        "latents": unpatchify(tokens.features, model.grid, model.patch_size),
        "cfg_per_iter": torch.tensor(listener.scales),
    }
    for name, condition, drawn in zip(names, listener.conditions, listener.tokens):
        found |= {f"{name}.z": condition, f"{name}.tokens": drawn}
    return found


def preprocess(g: Any) -> dict[str, Tensor]:
    crops = {
        name: center_crop(Image.fromarray(pixels.numpy()), g.call["image_size"]) for name, pixels in g.inputs.items()
    }
    found = {name: torch.from_numpy(np.array(crop)) for name, crop in crops.items()}
    return {**found, "normalised": to_tensor(crops["image0"])}


CASES = {
    "diffusion": diffusion_process,
    "diffloss_head": diffloss_head,
    "encode_decode": encode_decode,
    "train": train,
    "sample": sample,
    "preprocess": preprocess,
}


def manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    entry = MAR.published[f"mar-{name.removeprefix('mar_')[0]}.imagenet256"]
    check_meta_model(MAR, dict(entry.config), keys)


MANIFESTS = {"mar_": manifest}
