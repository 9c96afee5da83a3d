"""LlamaGen's GPT cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.replay import check_meta_model, recorded_draws, sampler_settings
from vistok.generators.llamagen import LlamaGen
from vistok.kernels import filter_logits
from vistok.nn import sampling
from vistok.nn.cache import KVCache
from vistok.nn.llama import caption_mask
from vistok.nn.text import TextCondition, clean_caption, left_pad

SYSTEM = "llamagen"


def condition(g: Any) -> Tensor | TextCondition:
    """The recorded condition: labels, or captions with their padding."""
    cond = g.inputs["cond"]
    if not cond.is_floating_point():
        return cond
    mask = g.inputs.get("emb_masks")
    return TextCondition(cond, None if mask is None else mask.bool())


def train(g: Any) -> dict[str, Tensor]:
    model = LlamaGen.from_official(g.weights, g.config).train()
    cond = g.inputs["cond"]
    if cond.is_floating_point():
        # The recorded mask closes the padded caption columns for the row of the last image token, too.
        visible = g.inputs["mask"][:, 0, -1, : cond.shape[1]]
        cond = TextCondition(cond, visible)
    with recorded_draws(drop_rand=g.inputs["drop_rand"]):
        logits = model(g.inputs["targets"], cond)
        batch = {"ids": g.inputs["targets"], "valid": g.inputs.get("valid")}
        if isinstance(cond, TextCondition):
            batch |= {"text_features": cond.features, "text_mask": cond.mask}
        else:
            batch["labels"] = cond
        loss = model.training_loss(batch)["loss"]
    loss.backward()
    gradients = {f"grad.{name}": value.grad for name, value in model.named_parameters()}
    return {"logits": logits, "loss": loss, **gradients}


def condition_states(model: Any, g: Any) -> tuple[tuple[Tensor, ...], KVCache, Tensor | None]:
    """States at every condition position, a cache with room for the image, and the visible keys [B, 1, 1, L].

    Sampling leaves out what this computes: padding, repeated rows, and every condition position but the last. Null
    labels are part of the recorded batches, while sampling adds them by itself.
    """
    cond, size = g.inputs["cond"], model.grid[0] * model.grid[1]
    total = model.num_condition_tokens
    x = model.cls_embedding(cond, None)
    mask = visible = None
    if "emb_masks" in g.inputs:
        valid = g.inputs["emb_masks"].bool()
        mask = caption_mask(valid)
        visible = torch.cat([valid, valid.new_ones(len(valid), size)], dim=1)[:, None, None]
    cache = KVCache(
        len(model.layers), len(x), model.num_kv_heads, total + size, model.head_dim, dtype=x.dtype, device=x.device
    )
    hidden = model.hidden_states(x, model.rotation_table(model.grid)[:total], mask, mask is None, cache)
    return hidden, cache, visible


@torch.no_grad()
def cached(g: Any) -> dict[str, Tensor]:
    """Teacher-forced steps on the cache."""
    model = LlamaGen.from_official(g.weights, g.config)
    tokens = g.inputs["tokens"]
    hidden, cache, visible = condition_states(model, g)
    rotation = model.rotation_table(model.grid)[model.num_condition_tokens :]
    steps = []
    for s in range(tokens.shape[1]):
        x = model.tok_embeddings(tokens[:, s : s + 1])
        mask = None if visible is None else visible[..., : cache.length + 1]
        steps.append(model.output(model.hidden_states(x, rotation[s : s + 1], mask, False, cache)[0]).float())
    return {"prefill_logits": model.output(hidden[0]).float(), "step_logits": torch.cat(steps, 1)}


def generate(g: Any) -> dict[str, Tensor]:
    model = LlamaGen.from_official(g.weights, g.config)
    logits: list[Tensor] = []
    cond = condition(g)
    computed = {}
    if "raw_caption_embs" in g.inputs:
        features, mask = left_pad(g.inputs["raw_caption_embs"], g.inputs["raw_emb_masks"])
        assert torch.equal(features, g.inputs["cond"])
        assert torch.equal(mask, g.inputs["emb_masks"].bool())
    with recorded_draws(g.inputs.get("exp_noise"), logits=logits):
        computed["tokens"] = model.generate(cond, **sampler_settings(g.call)).ids
    return {**computed, "logits": torch.cat(logits, 1)}


def filters(g: Any) -> dict[str, Tensor]:
    logits = g.inputs["logits"]
    outputs = {
        f"filtered_{index}": filter_logits(logits, top_k=top_k, top_p=top_p)
        for index, (top_k, top_p) in enumerate(g.call["settings"])
    }
    settings = g.call["sample"]
    with recorded_draws(g.inputs["exp_noise"]):
        outputs["sample_idx"] = sampling.choose_tokens(logits[:, None], **settings)
    tempered = logits / settings["temperature"]
    outputs["sample_probs"] = filter_logits(tempered, top_k=settings["top_k"], top_p=settings["top_p"]).softmax(-1)
    return outputs


def captions(g: Any) -> dict[str, Tensor]:
    cleaned = [clean_caption(text).encode() for text in g.call["texts"]]
    return {
        "utf8": torch.tensor(list(b"".join(cleaned)), dtype=torch.uint8),
        "lengths": torch.tensor([len(text) for text in cleaned]),
    }


CASES = {
    "gpt_c2i_train": train,
    "gpt_t2i_train": train,
    "gpt_c2i_cache": cached,
    "gpt_t2i_cache": cached,
    "gpt_c2i_generate": generate,
    "gpt_t2i_generate": generate,
    "sampling_filters": filters,
    "t5_clean_caption": captions,
}

PUBLISHED = {
    "c2i_B": "llamagen-b.imagenet256",
    "c2i_L": "llamagen-l.imagenet256",
    "c2i_XL": "llamagen-xl.imagenet384",
    "c2i_XXL": "llamagen-xxl.imagenet384",
    "c2i_3B": "llamagen-3b.imagenet384",
    "t2i_XL": "llamagen-xl.t2i256",
}


def manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    longest = max((known for known in PUBLISHED if name.startswith(known)), key=len)
    check_meta_model(LlamaGen, dict(LlamaGen.published[PUBLISHED[longest]].config), keys)


MANIFESTS = {"c2i_": manifest, "t2i_": manifest}
