"""Hi-MAR: diffusion process, transformer head, both phases, training and whole sampling loops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.parity.adapters.mar import Listener, gradients, head_draws, queue, replayed, single_steps, split, tables
from tests.parity.replay import check_meta_model
from vistok.generators.himar import DiffusionTransformer, HiMAR
from vistok.generators.himar.head import TransformerHeadSampler, denoising_error
from vistok.nn.diffusion import cosine_process
from vistok.nn.masked import cosine_rate, patchify, unpatchify

SYSTEM = "himar"
NOT_ARGUMENTS = ("dense_respacing", "epoch")  # of the object that was recorded


def build(g: Any) -> HiMAR:
    config = {key: value for key, value in g.config.items() if key not in NOT_ARGUMENTS}
    model = HiMAR.from_official(g.weights, config)
    model.epoch = g.config.get("epoch")
    return model


def diffusion_fixed_large(g: Any) -> dict[str, Tensor]:
    process = cosine_process(g.call["respacing"])
    return {**tables(g.outputs), **single_steps(process, g, g.inputs["model_out"], None)}


def transformer(g: Any) -> DiffusionTransformer:
    sizes = g.config
    side, patch = sizes["input_size"], sizes["patch_size"]
    net = DiffusionTransformer(
        (side, side),
        patch,
        sizes["in_channels"],
        sizes["c_channels"],
        sizes["depth"],
        sizes["hidden_size"],
        sizes["num_heads"],
        sizes["mlp_ratio"],
    )
    kernel = g.weights["c_embedder.proj.weight"].shape[-1]
    if kernel != patch:  # conditions may be given on the grid of tokens rather than that of latents
        net.c_embedder.proj = nn.Conv2d(sizes["c_channels"], sizes["hidden_size"], kernel, stride=kernel)
    state = {key: value for key, value in g.weights.items() if key != "c_pos_embed"}
    net.load_state_dict(state, strict=True)
    return net.eval()


@torch.no_grad()
def dit_head(g: Any) -> dict[str, Tensor]:
    net, inputs, scale = transformer(g), g.inputs, g.call["cfg_scale"]
    x, t, mask = inputs["x"], inputs["t"], inputs["mask"]
    z = patchify(inputs["z"], net.c_embedder.proj.kernel_size[0])
    half = x[: len(x) // 2].repeat(2, 1, 1, 1)
    with_condition, without = net(half, t, z).chunk(2)
    embedded, times = net.c_embedder(z), net.t_embedder(t)
    found = {
        "forward": net(x, t, z),
        "forward_with_cfg": torch.lerp(without, with_condition, scale).repeat(2, 1, 1, 1),
        "c_embed": embedded,
        "t_embed": times,
        "pos_embed": net.pos_embed,
        "block0": net.blocks[0](net.embed(x), net.modulations(embedded + times[:, None])[0]),
        "training_loss_masked": denoising_error(net, x, z, t, inputs["noise"], mask[:, None]),
        "training_loss_nomask": denoising_error(net, x, z, t, inputs["noise"], None),
    }
    draw = TransformerHeadSampler(net, g.call["respacing"])
    count = len(inputs["init"])
    for name, rows, guidance in (("cfg", 2 * count, scale), ("nocfg", count, None)):
        noise = [inputs["init"], *inputs[f"{name}.noise_steps"][:-1]]
        with replayed(gaussian_noise=queue(noise)):
            found[f"loop_{name}"] = draw(
                z[:rows],
                tuple(inputs["init"].shape),
                guidance_scale=guidance,
                temperature=g.call["temperature"],
                known=inputs["tokens"][:count],
                unknown=mask[:count, None] > 0,
            )
    return found


def in_order(states: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
    """States [B, L, D] of visible and then hidden positions, in raster order."""
    order = torch.cat([visible, hidden], dim=1).argsort(1)
    return states.gather(1, order[..., None].expand_as(states))


def both_stacks(model: HiMAR, index: int, tokens: Tensor, mask: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Encoder outputs and all decoder outputs [B, L, D] of a phase, from embedded tokens [B, L, D]."""
    visible, hidden = split(mask)
    phase = model.phase(index)
    known = tokens.gather(1, visible[..., None].expand(-1, -1, tokens.shape[2]))
    encoded = model.encode_visible(phase, context.expand(len(tokens), -1, -1), known, visible)
    states = model.decode_hidden(phase, encoded, visible, hidden, mask.shape[1])
    return encoded, in_order(states, visible, hidden)


@torch.no_grad()
def stages(g: Any) -> dict[str, Tensor]:
    model, inputs = build(g), g.inputs
    dense, pivots = patchify(inputs["latents"], 1), patchify(inputs["pivot_latents"], 1)
    context = model.context(inputs["labels"])
    mask1, mask2 = inputs["mask1"] > 0, inputs["mask2"] > 0
    first = torch.cat([model.cond_proj(pivots), model.z_proj(dense)], dim=1)
    second = torch.cat([model.cond_z_proj(inputs["small_z"]), model.z_proj(dense)], dim=1)
    found = {"patchified": dense, "pivot_patchified": pivots}
    for name, index, tokens, mask in (
        ("stage1", 0, first, mask1),
        ("stage2", 1, second, mask2),
        ("stage2_cond", 1, first, mask2),
    ):
        found[f"{name}.encoder_out"], found[f"{name}.z"] = both_stacks(model, index, tokens, mask, context)
    every = torch.arange(model.num_pivots).expand(len(pivots), -1)
    found["stage1_allmasked_uncond.z"] = model.pivot_states(pivots, every[:, :0], every, model.context(None))
    # The same states through the functions that training uses.
    visible, hidden = split(mask1[:, : model.num_pivots])
    states = model.pivot_states(pivots, visible, hidden, context)
    torch.testing.assert_close(
        states, found["stage1.z"].gather(1, hidden[..., None].expand_as(states)), rtol=1e-4, atol=1e-5
    )
    visible, hidden = split(mask2[:, model.num_pivots :])
    dense_states = model.dense_states(dense, visible, hidden, model.cond_z_proj(inputs["small_z"]), context, every=True)
    torch.testing.assert_close(dense_states, found["stage2.z"][:, model.num_pivots :], rtol=1e-4, atol=1e-5)
    for phase, side in ((0, "encoder"), (1, "decoder")):
        vector = model.scale_vector(side, phase)
        block = getattr(model, f"{side}_blocks")[0]
        found[f"block_task{phase}.scale_vector"] = vector[None, None]
        found[f"block_task{phase}.out"] = block(inputs["h"], scales=block.scales(vector, phase))
    return found


def mask_of(order: Tensor, rate: float) -> Tensor:
    """float32 [B, n]: 1 at the first ceil(n rate) entries of the order [B, n]."""
    count = math.ceil(order.shape[1] * rate)
    return torch.zeros(order.shape).scatter(1, order[:, :count], 1.0)


def masks(g: Any) -> dict[str, Tensor]:
    pivots = g.config["cond_scale"] ** 2
    orders, found = g.inputs["orders"], {}
    batch, dense = len(orders), orders.shape[1] - pivots
    for index, rate in enumerate(g.call["rates"]):
        found[f"rate{index}.pivot"] = torch.cat([mask_of(orders[:, :pivots], rate), torch.ones(batch, dense)], dim=1)
        hidden = mask_of(orders[:, pivots:] - pivots, rate)
        found[f"rate{index}.dense"] = torch.cat([torch.zeros(batch, pivots), hidden], dim=1)
    with replayed(uniform=queue(list(g.inputs["u"][:, None]))):
        found["cosine_rates"] = torch.tensor([cosine_rate(None) for _ in g.inputs["u"]])
    return found


def train(g: Any) -> dict[str, Tensor]:
    model, inputs = build(g).train(), g.inputs
    pivots = model.num_pivots
    orders = [inputs["orders"][:, :pivots], inputs["orders"][:, pivots:] - pivots]
    rates = [float(inputs["mask_rate1"])]
    uniforms = []
    drops = model.condition_dropout > 0
    if drops:
        uniforms.append(inputs["label_drop_rand1"])
    if model.config.dense_mask_ratio == "cosine":
        uniforms.append(inputs["mask_rate2_u"])
        rate2 = math.cos(math.pi / 2 * float(inputs["mask_rate2_u"]))
    else:
        rate2 = float(inputs["mask_rate2"] if "mask_rate2" in inputs else inputs["mask_rate2_u"])
        rates.append(rate2)
    uniforms.append(inputs["pivot_drop_rand"])
    if drops:
        uniforms.append(inputs["label_drop_rand2"])
    hidden1, hidden2 = mask_of(orders[0], rates[0]), mask_of(orders[1], rate2)
    # The pivots' draws are recorded for every position; ours are made for the masked ones.
    chosen = (hidden1 > 0).flatten().repeat(model.config.diffusion_repeats)
    seen: dict[str, Tensor] = {}

    def heard(name: str) -> Any:
        function = getattr(HiMAR, name)

        def listen(self: HiMAR, *arguments: Any, **settings: Any) -> Tensor:
            seen[name] = function(self, *arguments, **settings)
            return seen[name]

        return mock.patch.object(HiMAR, name, listen)

    orders_left, rates_left = list(orders), list(rates)
    with (
        replayed(
            random_orders=lambda *_: orders_left.pop(0),
            truncated_normal_rate=lambda *_: rates_left.pop(0),
            uniform=queue(uniforms),
            uniform_timesteps=queue([inputs["t1"][chosen], inputs["t2"]], sized=False),
            gaussian_noise=queue([inputs["noise1"][chosen], inputs["noise2"]]),
        ),
        heard("training_pivots"),
        heard("dense_states"),
    ):
        losses = model.training_loss(
            {key: inputs[key] for key in ("latents", "pivot_latents", "labels")},
        )
    losses["loss"].backward()
    total = pivots + model.num_tokens
    mask1 = torch.cat([hidden1, torch.ones(len(hidden1), model.num_tokens)], dim=1)
    mask2 = torch.cat([torch.zeros(len(hidden1), pivots), hidden2], dim=1)
    dense, small = patchify(inputs["latents"], 1), patchify(inputs["pivot_latents"], 1)
    contexts = [
        model.context(inputs["labels"], inputs[f"label_drop_rand{index}"] < model.condition_dropout if drops else None)
        for index in (1, 2)
    ]
    first = torch.cat([model.cond_proj(small), model.z_proj(dense)], dim=1)
    z1 = both_stacks(model, 0, first, mask1 > 0, contexts[0])[1][:, :pivots]
    second = torch.cat([seen["training_pivots"], model.z_proj(dense)], dim=1)
    z2 = both_stacks(model, 1, second, mask2 > 0, contexts[1])[1]
    torch.testing.assert_close(seen["dense_states"], z2[:, pivots:], rtol=1e-4, atol=1e-5)
    assert z2.shape[1] == total
    return {
        "loss1": 2.0 * losses["pivot_loss"],
        "loss2": 0.75 * losses["dense_loss"],
        "total": losses["loss"],
        "mask1": mask1,
        "mask2": mask2,
        "z1": z1,
        "z2": z2,
        **gradients(model, g.call["grad_keys"]),
    }


class DenseListener:
    """Hears what the transformer head is given and draws."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Tensor]] = []
        self.scales: list[float] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        call, listener = TransformerHeadSampler.__call__, self

        def heard(draw: TransformerHeadSampler, condition: Tensor, shape: Sequence[int], **settings: Any) -> Tensor:
            latents = call(draw, condition, shape, **settings)
            unknown = settings["unknown"]
            mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool) if unknown is None else unknown[:, 0]
            grid = condition.mT.unflatten(2, tuple(shape[2:]))
            listener.calls.append({"z": grid, "head_out": latents, "mask": mask})
            scale = settings["guidance_scale"]
            listener.scales.append(1.0 if scale is None else scale)
            return latents

        with mock.patch.object(TransformerHeadSampler, "__call__", heard):
            yield


def sample(g: Any) -> dict[str, Tensor]:
    model, call, inputs = build(g), g.call, g.inputs
    pivots = model.num_pivots
    names = sorted({key.split(".")[0] for key in inputs if key.startswith("pivot") and "." in key})
    dense_names = sorted({key.split(".")[0] for key in inputs if key.startswith("dense") and "." in key})
    noise = queue([draw for name in [*names, *dense_names] for draw in head_draws(inputs, name)])
    orders = [inputs["orders"][:, :pivots], inputs["orders"][:, pivots:] - pivots]
    listener, dense = Listener(), DenseListener()
    labels = None if call["labels"] is None else inputs["labels"]
    with (
        replayed(random_orders=lambda *_: orders.pop(0), gaussian_noise=noise),
        listener.attached(),
        dense.attached(),
    ):
        steps = list(
            model.sample(
                labels,
                num_images=call["bsz"] if labels is None else None,
                guidance_scale=call["cfg"],
                pivot_guidance_scale=call["re_cfg"],
                guidance_schedule=call["cfg_schedule"],
                temperature=call["temperature"],
                num_inference_steps=call["num_iter"],
                num_dense_diffusion_steps=g.config.get("dense_respacing"),
            )
        )
    last_pivots = next(step.tokens for step in reversed(steps) if step.tokens.grid == model.pivot_grid)
    found = {
        "latents": unpatchify(steps[-1].tokens.features, model.grid, 1),
        "pivot_latents": unpatchify(last_pivots.features, model.pivot_grid, 1),
        "pivot_n": torch.tensor([len(tokens) for tokens in listener.tokens]),
        "pivot_tokens": torch.cat(listener.tokens),
        "pivot_z": torch.cat([z[: len(tokens)] for z, tokens in zip(listener.conditions, listener.tokens)]),
        "pivot_cfg": torch.tensor(listener.scales),
        "dense_cfg": torch.tensor(dense.scales),
    }
    for index, heard in enumerate(dense.calls):
        found |= {f"dense{index:02d}.{key}": value for key, value in heard.items()}
    return found


def pivot_image(g: Any) -> dict[str, Tensor]:
    small = HiMAR.pivot_images(g.inputs["image"], (g.call["small"], g.call["small"]))
    return {"pivot_image": small, "pivot_image_clamped": small.clamp(-1.0, 1.0)}


CASES = {
    "diffusion_fixed_large": diffusion_fixed_large,
    "dit_head": dit_head,
    "stages": stages,
    "masks": masks,
    "train": train,
    "sample": sample,
    "pivot_image": pivot_image,
}


def manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    entry = HiMAR.published[f"himar-{name.removeprefix('himar_')[0]}.imagenet256"]
    check_meta_model(HiMAR, dict(entry.config), keys)


MANIFESTS = {"himar_": manifest}
