"""xAR against the authors' code: layout, schedules, solvers, block, training, sampling."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from tests.parity.replay import check_meta_model
from vistok.generators.xar import XAR, EntityRun, entity_layout
from vistok.generators.xar import model as xar_model
from vistok.generators.xar.network import Block, axial_rotation
from vistok.nn import diffusion, flow, sampling
from vistok.nn.diffusion_head import timestep_features
from vistok.nn.masked import patchify, unpatchify
from vistok.nn.model import describe_mismatch

SYSTEM = "xar"
SOLVERS = {"euler_maruyama": "euler_maruyama", "em": "euler_maruyama", "sde": "euler_maruyama", "euler": "euler"}


@contextmanager
def recorded(normal: Sequence[Tensor], uniform: Tensor | None = None) -> Iterator[None]:
    """Inside, normal draws are these in turn, and the uniform draws of dropped classes are those."""
    queue = list(normal)

    def gaussian_noise(shape: Sequence[int], generator: object, device: object) -> Tensor:
        drawn = queue.pop(0)
        assert tuple(drawn.shape) == tuple(shape), f"the recorded draws {list(drawn.shape)} are not {list(shape)}"
        return drawn

    def uniform_draws(shape: Sequence[int], generator: object, device: object) -> Tensor:
        assert uniform is not None
        return uniform

    with (
        mock.patch.object(diffusion, "gaussian_noise", gaussian_noise),
        mock.patch.object(sampling, "uniform", uniform_draws),
    ):
        yield


def arguments(g: Any) -> dict[str, Any]:
    """Ours; the authors' class table has 1001 rows whatever the number of classes."""
    found = XAR.config_from_official(g.config)
    if "class_emb.weight" in g.weights:
        found["num_classes"] = len(g.weights["class_emb.weight"]) - 1
    return found


def build(g: Any) -> XAR:
    model = XAR.from_official(g.weights, arguments(g))
    # The tables that we derive are those of the file.
    ours = model.to_official()
    for key, value in g.weights.items():
        if key == "mask" or ".rope." in key:
            torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)
        else:
            assert torch.equal(ours[key], value), key
    return model


def cell_layout(g: Any) -> dict[str, Tensor]:
    config = XAR.config_from_official(g.config)
    layout = entity_layout(config["grid"], config["entity"], config["entity_size"])
    latents = g.inputs["latents"]
    sequence = layout.to_sequence(patchify(latents, 1))
    head_dim = g.config["encoder_embed_dim"] // g.config["encoder_num_heads"]
    turns = torch.view_as_real(axial_rotation(layout.coordinates, head_dim, torch.device("cpu")))
    turns = turns.repeat_interleave(2, dim=1)
    return {
        "cells": sequence.unflatten(1, (layout.num_entities, -1)),
        "roundtrip": unpatchify(layout.to_raster(sequence), layout.grid, 1),
        "freqs_cos": turns[..., 0],
        "freqs_sin": turns[..., 1],
    }


def schedule(g: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for steps in g.call["num_steps"]:
        for name, solver in (("em", "euler_maruyama"), ("euler", "euler")):
            ours = flow.flow_schedule(steps, solver)
            found[f"{name}_{steps}_grid"] = torch.tensor(ours.times, dtype=torch.float64)
            found[f"{name}_{steps}_time"] = torch.tensor(ours.network_times, dtype=torch.float64)
            found[f"{name}_{steps}_index"] = torch.tensor(ours.indices)
    model = XAR.tiny()
    for scale in g.call["cfg"]:
        found[f"cfg_{scale}"] = torch.tensor(model.guidance_scales(scale), dtype=torch.float64)
    found["embedding"] = timestep_features(torch.tensor(g.call["embed_index"]), 256)
    found["score_linear"] = flow.score_from_velocity(
        torch.linspace(-2, 2, 24, dtype=torch.float64).view(2, 3, 4),
        torch.linspace(1, -3, 24, dtype=torch.float64).view(2, 3, 4),
        torch.tensor([0.35, 0.9], dtype=torch.float64).view(2, 1, 1),
    )
    return found


def sampler_toy(g: Any) -> dict[str, Tensor]:
    """The analytic velocity of the notes: 0.3 x + y / 1000 - 0.5 t sin(3x)."""
    null, labels = 1000, g.inputs["labels"]
    steps, scale = g.call["num_steps"], float(g.call["cfg_scale"])  # the scale of the entity, ramp included

    def run(solver: str, weight: float, draws: Sequence[Tensor]) -> Tensor:
        times = flow.flow_schedule(steps, solver)

        def velocity(x: Tensor, call: int) -> Tensor:
            def field(y: Tensor) -> Tensor:
                return 0.3 * x + y.view(-1, 1, 1) / 1000 - 0.5 * times.network_times[call] * torch.sin(3 * x)

            conditional, unconditional = field(labels.float()), field(torch.full_like(labels, null).float())
            return torch.lerp(unconditional, conditional, weight) if weight > 1 else conditional

        with recorded(draws):
            return list(flow.flow_steps(velocity, g.inputs["latents"], times))[-1].x

    noise = g.inputs["noise"]
    return {
        "em": run("euler_maruyama", scale, list(noise[0])),
        "em_uncond_first": run("euler_maruyama", 1.0, list(noise[1])),
        "euler": run("euler", scale, []),
    }


def block_train(g: Any) -> dict[str, Tensor]:
    size, (batch, total, _) = g.config["dim"], g.inputs["x"].shape
    block = Block(
        size,
        g.config["num_heads"],
        int(size * g.config.get("mlp_ratio", 4.0) * 2 / 3),
        attention_dropout=0.0,
        projection_dropout=0.0,
    )
    state = XAR.rename_official({f"block.{key}": value for key, value in g.weights.items()})
    state = {key.removeprefix("block."): value for key, value in state.items()}
    problems = describe_mismatch(block.state_dict(), state)
    assert not problems, problems
    block.load_state_dict(state)
    entities = len(g.inputs["condition"]) // batch
    side, cells = math.isqrt(total), math.isqrt(entities)
    model = XAR.tiny(
        grid=(side, side),
        entity_size=side // cells,
        hidden_size=size,
        encoder_heads=g.config["num_heads"],
        decoder_heads=g.config["num_heads"],
        latent_channels=1,
        attention_dropout=0.0,
    ).train()
    assert torch.equal(model.layout.mask(), g.inputs["mask"][0, 0] == 0)
    x = g.inputs["x"].clone().requires_grad_()
    condition = g.inputs["condition"].clone().requires_grad_()
    activated = functional.silu(condition.view(entities, batch, size).transpose(0, 1))
    attend = model.training_attention(0.0, False)
    rotation = model.rotation(size // g.config["num_heads"])
    y = block(x.unflatten(1, (entities, -1)), activated, None, rotation, attend).flatten(1, 2)
    (y * g.inputs["cotangent"]).sum().backward()
    return {
        "y": y,
        "grad_x": x.grad,
        "grad_condition": condition.grad,
        **{f"grad.{name}": value.grad for name, value in block.named_parameters()},
    }


def train(g: Any) -> dict[str, Tensor]:
    model = build(g).train()
    seen: dict[str, Tensor] = {}

    def listen(module: XAR, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.update(model_input=inputs[0], timestep_index=inputs[1].T.flatten(), velocity=output)

    model.register_forward_hook(listen)
    noise = g.inputs["noise"].transpose(0, 1).flatten(1, 2)  # [B, E T, C]
    batch = {"latents": g.inputs["latents"], "labels": g.inputs["labels"]}
    with recorded([g.inputs["time_normal"], noise], g.inputs["label_drop_u"]):
        loss = model.training_loss(batch)["loss"]
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters()}
    rows = torch.cat([g.inputs["labels"], torch.tensor([model.num_classes])])
    return {
        **seen,
        "loss": loss.view(1),
        **{f"grad.{name}": value for name, value in found.items()},
        "grad.class_emb.rows": found["class_emb.weight"][rows],
    }


def cache_steps(g: Any) -> dict[str, Tensor]:
    """Calls with 2T tokens hold the finished entity first; we read that one alone."""
    model = build(g)
    count = len(g.inputs["entity"])
    labels, batch = g.inputs["labels"], len(g.inputs["labels"])
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        indices = [int(flow.time_index(g.inputs[f"t{call}"])[-1]) for call in range(count)]
        run = EntityRun(model, labels, guided=False, indices=indices, context=True)
        for call in range(count):
            entity, x = int(g.inputs["entity"][call]), g.inputs[f"x{call}"]
            size = model.layout.uniform
            assert size is not None
            if x.shape[1] > size:
                run.remember(x[:, :-size], entity - 1)
            assert bool((flow.time_index(g.inputs[f"t{call}"])[-batch:] == indices[call]).all())
            found[f"velocity{call}"] = run.velocity(x[:, -size:], entity, indices[call])
        done = model.layout.starts[entity]
        first, last = len(model.encoder_blocks), len(run.keys)
        for stack, offset, stop in (("enc", 0, first), ("dec", first, last)):
            for number in range(offset, stop):
                for name, held in (("k", run.keys), ("v", run.values)):
                    value = held[number][:, :, :done]
                    found[f"cache_{stack}{number - offset}_{name}"] = value
                    if number + 1 == stop:
                        found[f"cache_{stack}_last_{name}"] = value
    return found


def sample(g: Any) -> dict[str, Tensor]:
    model = build(g)
    solver = SOLVERS[g.call.get("solver", "euler_maruyama")]
    calls: list[list[Tensor]] = [[] for _ in range(model.layout.num_entities)]

    class Recorder(EntityRun):
        """Keeps raw outputs; where we leave out unconditional rows, a second run makes them."""

        def __init__(self, model: XAR, labels: Tensor, **options: Any) -> None:
            super().__init__(model, labels, **options)
            null = torch.full_like(labels, model.num_classes)
            self.unconditional = EntityRun(model, null, **{**options, "guided": False})

        def velocity(self, x: Tensor, entity: int, index: int, *, guided: bool = False) -> Tensor:
            found = super().velocity(x, entity, index, guided=guided)
            both = found if guided else torch.cat([found, self.unconditional.velocity(x, entity, index)])
            calls[entity].append(both)
            return found

        def remember(self, x: Tensor, entity: int) -> None:
            super().remember(x, entity)
            self.unconditional.remember(x, entity)

    draws: list[Tensor] = []
    for entity, start in enumerate(g.inputs["latents"]):
        draws.append(start)
        if solver == "euler_maruyama":
            draws += list(g.inputs["noise"][entity])
    with recorded(draws), mock.patch.object(xar_model, "EntityRun", Recorder):
        tokens = model.generate(
            g.inputs["labels"],
            guidance_scale=float(g.call["cfg"]),
            num_inference_steps=g.call["num_steps"],
            solver=solver,
        )
    assert tokens.features is not None
    cells = model.layout.to_sequence(tokens.features).unflatten(1, (model.layout.num_entities, -1))
    found = {
        "tokens": unpatchify(tokens.features, model.grid, model.patch_size),
        "cells": cells.transpose(0, 1),
        "calls_per_cell": torch.tensor([len(made) for made in calls]),
    }
    for entity, made in enumerate(calls):
        found |= {f"velocity_cell{entity}_call{call}": value for call, value in enumerate(made)}
    return found


def manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    entry = XAR.published[f"xar-{name.rsplit('-', 1)[-1].lower()}.imagenet256"]
    check_meta_model(XAR, dict(entry.config), keys)
    buffers = {key for key in keys if key == "mask" or ".rope." in key}
    with torch.device("meta"):
        model = XAR(**entry.config)
    assert {key: torch.Size(keys[key][0]) for key in keys.keys() - buffers} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters
    length = model.layout.length
    assert keys["mask"][0] == (1, 1, length, length)


CASES = {
    "cell_layout": cell_layout,
    "schedule": schedule,
    "sampler_toy": sampler_toy,
    "block_train": block_train,
    "train": train,
    "generalised_train": train,
    "cache_steps": cache_steps,
    "sample_": sample,
    "generalised_sample": sample,
}
MANIFESTS = {"xAR": manifest}
