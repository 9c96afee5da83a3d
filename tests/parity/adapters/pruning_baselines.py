"""Baselines of visual-token pruning: the rules on recorded tensors."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from vistok.pruners.divprune import diverse_tokens
from vistok.pruners.hosts.base import TowerAttention
from vistok.pruners.sparsevlm import SETTINGS, cluster_and_merge, rater_scores
from vistok.pruners.stages import best
from vistok.pruners.visionzip import contextual_tokens

SYSTEM = "pruning_baselines"


def tower(g: Any) -> tuple[Tensor, Tensor, TowerAttention]:
    """Patch hidden states, all hidden states and the attention of the layer that makes them."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**g.config["clip_vision_config"])).eval()
    state = {key.removeprefix("vision_model."): value for key, value in g.weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert all("position_ids" in key for key in unexpected), unexpected
    layer = model.encoder.layers[len(model.encoder.layers) + g.call.get("select_layer", -2)]
    held: dict[str, Tensor] = {}
    hook = layer.layer_norm1.register_forward_hook(lambda module, args, output: held.update(input=output))
    second = layer.register_forward_hook(lambda module, args, output: held.update(output=output))
    with torch.no_grad():
        model(g.inputs["pixel_values"])
        hook.remove()
        second.remove()
        module = layer.self_attn

        def heads(states: Tensor) -> Tensor:
            return states.view(*states.shape[:2], -1, module.head_dim).transpose(1, 2)

        attention = TowerAttention(
            heads(module.q_proj(held["input"])), heads(module.k_proj(held["input"])), module.scale, class_tokens=1
        )
    return held["output"][:, 1:], held["output"], attention


def fastervlm(g: Any) -> dict[str, Tensor]:
    patches, _, attention = tower(g)
    score = attention.received("cls")
    kept = torch.stack([best(row, g.call["visual_token_num"]) for row in score])
    hidden = torch.stack([row[index] for row, index in zip(patches, kept)])
    return {"cls_attention": score, "kept": kept, "kept_hidden": hidden}


def visionzip(g: Any) -> dict[str, Tensor]:
    _, hidden, attention = tower(g)
    dominant, contextual = g.call["dominant"], g.call["contextual"]
    metric = attention.key.mean(dim=1)
    tokens, indices = [], []
    for score, keys, features in zip(attention.received("cls"), metric, hidden):
        order = score.topk(dominant - 1).indices
        indices.append(torch.cat([order.new_zeros(1), order + 1]))
        mask = torch.zeros(len(score), dtype=torch.bool)
        mask[order] = True
        _, merged = contextual_tokens((~mask).nonzero()[:, 0], keys[1:], features[1:], contextual)
        tokens.append(torch.cat([features[:1], features[1:][mask], merged]))
    return {"dominant_indices": torch.stack(indices), "key_metric": metric, "tokens": torch.stack(tokens)}


def divprune(g: Any) -> dict[str, Tensor]:
    features = g.inputs["features"]
    order = diverse_tokens(features, round(g.call["threshold_ratio"] * len(features)))
    return {"order": order, "kept": order.sort().values}


def fastv(g: Any) -> dict[str, Tensor]:
    start, count = g.call["sys_length"], g.call["image_token_length"]
    row = g.inputs["attention"].mean(dim=1)[0, -1]
    kept = best(row[start : start + count], g.call["attention_rank"]) + start
    index = torch.cat([torch.arange(start), kept, torch.arange(start + count, len(row))])
    return {"keep_index": index, "position_ids": index[None]}


def sparsevlm(g: Any) -> dict[str, Tensor]:
    start, count, text = (g.call[name] for name in ("v_token_start", "v_token_num", "text_token_start"))
    hidden = g.inputs["hidden_states"][0]
    scores = rater_scores(hidden[start : start + count], hidden[text:])
    raters = (scores > scores.mean()).nonzero()[:, 0]
    rows = g.inputs["attention"].mean(dim=1)[0, text:][raters]
    relation = rows.mean(dim=0)[start : start + count]
    entry = g.call["entry"]  # "attn_postprocess_topk (layer 2, RETAIN_TOKN=64) ..."
    layer, budget = (int(re.search(pattern, entry)[1]) for pattern in (r"layer (\d+)", r"RETAIN_TOKN=(\d+)"))
    kept = best(relation, min(SETTINGS[budget][(2, 6, 15).index(layer)], count - 1))
    merged = cluster_and_merge(g.inputs["cluster_tokens"][0], g.call["cluster_num"], g.inputs["cluster_noise"][0])
    return {
        "kept": kept,
        "raters": raters,
        "merged": merged[None],
        "rater_scores": scores[None],
        "relation": relation[None],
    }


CASES = {
    "fastervlm": fastervlm,
    "visionzip": visionzip,
    "divprune": divprune,
    "fastv": fastv,
    "sparsevlm": sparsevlm,
}
