"""NAR's video cases, and those of the LARP tokenizer that it writes for."""

from __future__ import annotations

import copy
import re
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.parity.replay import check_meta_model, recorded_draws, sampler_settings
from vistok.generators.nar_video import NARVideo
from vistok.nn.cache import KVCache
from vistok.nn.positions import sinusoids
from vistok.nn.proximity import ProximityOrder, proximity_order
from vistok.tokenizers.larp import LARP
from vistok.tokenizers.larp.names import to_official
from vistok.tokenizers.larp.quantizer import Quantization
from vistok.tokens import VisualTokens

SYSTEM = "nar"
CPU = torch.device("cpu")


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


# ------------------------------------------------------------------------------------------------------------ generator
def condition(g: Any) -> Tensor:
    """Labels, or the tokens of a frame prediction without their separator, which the model adds."""
    cond = g.inputs["cond"]
    return cond[:, :-1] if cond.ndim == 2 else cond


def train(g: Any) -> dict[str, Tensor]:
    model = NARVideo.from_official(g.weights, g.config)
    if g.call.get("mode", "train") == "train":
        model.train()
    ids, cond = g.inputs["idx"], condition(g)
    batch = {"ids": ids, "frames" if model.predicts_frames else "labels": cond, "valid": g.inputs.get("valid")}
    with recorded_draws(drop_rand=g.inputs.get("drop_rand")):
        logits = model(ids, cond)
        loss = model.training_loss(batch)["loss"]
    loss.backward()
    official = NARVideo.names_to_official(gradients(model))
    return {"logits": logits, "loss": loss, **{f"grad.{name}": value for name, value in official.items()}}


def mixed_logits(model: NARVideo, states: tuple[Tensor, ...], plane: int, order: ProximityOrder) -> Tensor:
    """Logits of a plane from the hidden states of the one before, head by head."""
    start, stop = order.starts[plane : plane + 2]
    offset = -order.starts[plane - 1] if plane else 1
    logits = torch.zeros(())
    for state, neighbour, share, head in zip(states, order.neighbours, order.shares, model.heads, strict=True):
        rows = (neighbour[start:stop] + offset).clamp_min(0)
        logits = logits + functional.linear(state, head.weight).float()[:, rows] * share[start:stop]
    return logits


@torch.no_grad()
def cached(g: Any) -> dict[str, Tensor]:
    """Teacher-forced planes on the cache."""
    model = NARVideo.from_official(g.weights, g.config)
    tokens, total = g.inputs["tokens"], model.num_condition_tokens
    order, positions = proximity_order(model.grid, CPU), model.positions(model.grid)
    x = model.embed_condition(condition(g))
    slots = total + prod(model.grid)
    cache = KVCache(len(model.layers), len(x), model.num_kv_heads, slots, model.head_dim, dtype=x.dtype, device=CPU)
    states = model.hidden_states(x, model.condition_positions(total), None, total > 1, cache)
    states = tuple(state[:, -1:] for state in states)
    outputs = {"prefill_logits": mixed_logits(model, states, 0, order)}
    for plane in range(len(order.starts) - 2):
        start, stop = order.starts[plane : plane + 2]
        places = order.order[start:stop]
        states = model.hidden_states(model.tok_embeddings(tokens[:, places]), positions[places], None, False, cache)
        outputs[f"logits_plane_{plane + 1}"] = mixed_logits(model, states, plane + 1, order)
    return outputs


def generate(g: Any) -> dict[str, Tensor]:
    model = NARVideo.from_official(g.weights, g.config)
    settings = sampler_settings(g.call)
    if g.call.get("greedy"):
        settings["temperature"] = 0.0
    logits: list[Tensor] = []
    with recorded_draws(g.inputs.get("exp_noise"), logits=logits):
        tokens = model.generate(condition(g), **settings).ids
    return {"tokens": tokens, "logits": torch.cat(logits, 1)}


def masks(g: Any) -> dict[str, Tensor]:
    """Our masks, brought from decoding order to the authors' raster order."""
    outputs = {}
    for setting in g.call["settings"]:
        grid = tuple(setting)
        name = "x".join(map(str, grid))
        order = proximity_order(grid, CPU)
        place = torch.cat([torch.zeros(1, dtype=torch.int64), torch.argsort(order.order) + 1])
        mask = order.mask(1)[place][:, place]
        length = len(mask)
        padded = -(-length // 8) * 8
        # The authors' cache has rows and columns beyond the sequence, which see the class alone; ours has none.
        cache = torch.zeros(padded, padded, dtype=torch.bool)
        cache[:, 0] = True
        cache[:length, :length] = mask
        size = g.outputs[f"fixed_pe_{name}"].shape[-1]
        outputs |= {
            f"train_{name}": mask,
            f"cache_{name}": cache,
            f"order_{name}": order.order + 1,
            f"plane_sizes_{name}": torch.tensor(order.starts).diff(),
            f"fixed_pe_{name}": sinusoids(torch.arange(length), size)[None],
        }
    return outputs


# ------------------------------------------------------------------------------------------------------------ tokenizer
def tokenizer(g: Any) -> LARP:
    """The recorded tokenizer. A prior that only the test has is described by its weights and the notes."""
    config = copy.deepcopy(g.config)
    prior = config["prior_model"]
    embedding = g.weights.get("prior_model.pos_emb")
    if embedding is not None:
        heads = re.search(rf"{re.escape(prior['name'])} = GPTC\(.*?n_head=(\d+)", g.metadata.get("notes", ""))
        described = {
            "n_layer": sum(key.startswith("prior_model.blocks.") and key.endswith("ln1.weight") for key in g.weights),
            "n_embd": embedding.shape[2],
            "max_seq_len": embedding.shape[1],
            **({"n_head": int(heads[1])} if heads else {}),
        }
        prior["args"] = {**described, **prior.get("args", {})}
    return LARP.from_official(g.weights, config)


def by_token(noise: Tensor, batch: int) -> Tensor:
    """Draws [B * n, K] as `recorded_draws` takes them: [n, B, K]."""
    return noise.unflatten(0, (batch, -1)).transpose(0, 1)


@torch.no_grad()
def code(g: Any) -> dict[str, Tensor]:
    model = tokenizer(g)
    outputs = {}
    videos = g.inputs["video"]
    projected = model.encode_features(videos)
    runs: dict[str, Quantization] = {"det": model.quantizer(projected, stochastic=False)}
    if "exp_noise" in g.inputs:
        noise = by_token(g.inputs["exp_noise"].flatten(0, 1), len(videos))
        with recorded_draws(noise):
            runs["sto"] = model.quantizer(projected, stochastic=True)
    for name, run in runs.items():
        encoded = model.bottleneck_out(run.quantized)
        outputs |= {
            f"{name}.bottleneck_rep": run.ids,
            f"{name}.encoded": encoded,
            f"{name}.projected_z": projected,
            f"{name}.regularized_z": run.quantized,
            f"{name}.unregularized_z": run.vectors,
            f"{name}.loss_codebook": run.codebook_loss,
            f"{name}.loss_commit": run.commitment_loss,
            f"{name}.loss_q": run.loss,
        }
    assert torch.equal(model.encode(videos).ids, runs["det"].ids)
    outputs["recon"] = model.decode_features(runs["det"].quantized)
    outputs["video_from_tokens"] = model.decode(VisualTokens(ids=g.inputs["tokens"]))
    return outputs


def train_tokenizer(g: Any) -> dict[str, Tensor]:
    model = tokenizer(g).train()
    videos = g.inputs["video"]
    recorded = [g.inputs[name] for name in ("exp_noise_vq", "exp_noise_prior") if name in g.inputs]
    # More than two rounds of the prior draw once between each.
    noise = [by_token(one, len(videos)) for part in recorded for one in (part if part.ndim == 3 else part[None])]
    progress = g.call.get("global_step", 0) / g.call.get("max_steps", 1)
    draws = {"exp_noise": torch.cat(noise) if noise else None, "drop_rand": g.inputs.get("mask_rand")}
    with recorded_draws(**draws):
        output = model(videos)
    with recorded_draws(**draws):
        losses = model.training_loss({"videos": videos, "progress": progress})
    losses["loss"].backward()
    official = to_official(gradients(model))
    outputs = {
        "pred_frames": output.sample,
        "bottleneck_rep": output.quantization.ids,
        "loss_codebook": losses["codebook"],
        "loss_commit": losses["commitment"],
        "loss_q": losses["quantizer"],
        "total": losses["loss"],
        # Patches of single frames have no time axis in the authors' code.
        **{f"grad.{name}": value.view_as(g.weights[name]) for name, value in official.items()},
    }
    return {**outputs, "loss_latent_ce": losses["prior"]} if "prior" in losses else outputs


CASES = {
    "nar_video_train": train,
    "nar_video_cache": cached,
    "nar_video_generate": generate,
    "nar_video_masks": masks,
    "larp_tokenizer": code,
    "larp_tokenizer_train": train_tokenizer,
}


def manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    size = name.removeprefix("ucf101_").split(".")[0].lower()
    check_meta_model(NARVideo, dict(NARVideo.published[f"nar-{size}.ucf101"].config), keys)


def tokenizer_manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    prior = {"prior_layers": 12, "prior_heads": 6, "prior_hidden_size": 384} if "with_prior" in name else {}
    check_meta_model(LARP, {**LARP.published["larp-l-long.ucf101"].config, **prior}, keys)


MANIFESTS = {"ucf101_": manifest, "larp_": tokenizer_manifest}
