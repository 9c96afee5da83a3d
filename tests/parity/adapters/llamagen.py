"""LlamaGen's GPT cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.adapters.replay import check_meta_model, recorded_draws, sampler_settings
from vistok.generators.llamagen import LlamaGen
from vistok.kernels import filter_logits
from vistok.nn import sampling
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


def cached(g: Any) -> dict[str, Tensor]:
    """Teacher-forced steps on the cache. Condition rows before the last are not computed for classes."""
    model = LlamaGen.from_official(g.weights, g.config)
    cond, tokens = g.inputs["cond"], g.inputs["tokens"]
    total = model.num_condition_tokens
    size = model.grid[0] * model.grid[1]
    with torch.no_grad():
        if cond.is_floating_point():
            text = condition(g)
            prefill = prefill_logits(model, text)
            hidden, cache, visible = model.prefill(text, total + size, False)
        else:
            # Null labels are part of the batch here, which `sample` adds by itself.
            x = model.cls_embedding(cond, None)
            hidden, cache, visible = prefill_rows(model, x, total + size)
            prefill = model.output(hidden[0]).float()
        rotation = model.rotation_table(model.grid)[total:]
        steps = [
            model.output(model._feed(tokens[:, s : s + 1], s, rotation, cache, visible, False)).float()
            for s in range(tokens.shape[1])
        ]
    return {"prefill_logits": prefill, "step_logits": torch.cat(steps, 1)}


def prefill_rows(model: Any, x: Tensor, slots: int) -> tuple[Any, Any, None]:
    """Prefill from embedded class tokens [B, 1, D]."""
    from vistok.nn.cache import KVCache

    cache = KVCache(
        len(model.layers), len(x), model.num_kv_heads, slots, model.head_dim, dtype=x.dtype, device=x.device
    )
    rotation = model.rotation_table(model.grid)[:1]
    return model.hidden_states(x, rotation, None, False, cache), cache, None


def prefill_logits(model: LlamaGen, text: TextCondition) -> Tensor:
    """Logits of every caption position: each equals the last position of a prefill over the caption's first tokens."""
    captured: list[Tensor] = []
    original = model.hidden_states

    def listen(*arguments: Any) -> Any:
        states = original(*arguments)
        captured.append(states[0])
        return states

    model.hidden_states = listen  # type: ignore[method-assign]
    try:
        model.prefill(text, model.num_condition_tokens, False)
    finally:
        del model.hidden_states
    return model.output(captured[0]).float()


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

PUBLISHED = {"c2i_B": "b.imagenet256", "c2i_L": "l.imagenet256", "c2i_XXL": "xxl.imagenet384", "c2i_3B": "3b.imagenet384"}
PUBLISHED |= {"c2i_XL": "xl.imagenet384", "t2i_XL": "xl.t2i256"}


def manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    longest = max((known for known in PUBLISHED if name.startswith(known)), key=len)
    check_meta_model(LlamaGen, dict(LlamaGen.published[f"llamagen-{PUBLISHED[longest]}"].config), keys)


MANIFESTS = {"c2i_": manifest, "t2i_": manifest}
