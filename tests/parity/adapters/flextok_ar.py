"""FlexTok's autoregressive generators against the authors' classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from vistok.generators.flextok_ar import FlexTokAR, sincos_positions
from vistok.kernels import filter_logits
from vistok.nn import sampling
from vistok.nn.text import TextCondition
from vistok.nn.transformer import feed_forward_size
from vistok.tokens import VisualTokens

SYSTEM = "flextok"


def arguments(g: Any) -> dict[str, Any]:
    """Our constructor arguments from the recorded ones; the rest is read from the weights."""
    config = g.config
    size, rms = config["dim"], config.get("norm", "ln") == "rms"
    given: dict[str, Any] = {
        "hidden_size": size,
        "num_layers": config["depth"],
        "num_heads": config["heads"],
        "num_tokens": config["n_tokens"],
        "vocab_size": config["codebook"],
        "norm_type": "rms" if rms else "layer",
        "norm_eps": config.get("norm_eps", 1e-6 if rms else 1e-5),
        "positions": config.get("pos") or "none",
    }
    if config.get("ffn", "swiglu") == "swiglu" and "multiple_of" in config:
        given["mlp_hidden_size"] = feed_forward_size(size, config["multiple_of"])
    return given


def condition_of(g: Any) -> Tensor | TextCondition:
    if "labels" in g.inputs:
        return g.inputs["labels"]
    rows = [g.config["prompts"].index(text) for text in g.call["texts"]]
    return TextCondition(g.inputs["t5_hidden"][rows], g.inputs["t5_mask"][rows].bool())


def null_of(g: Any) -> TextCondition | None:
    if "labels" in g.inputs:
        return None
    row = g.config["prompts"].index("")
    return TextCondition(g.inputs["t5_hidden"][row : row + 1], g.inputs["t5_mask"][row : row + 1].bool())


@contextmanager
def heard(model: FlexTokAR) -> Iterator[list[Tensor]]:
    """Collects the logits [R, V] of the last position of every step, conditional rows first, before guidance."""
    collected: list[Tensor] = []

    def listen(module: Any, inputs: Any, hidden: Tensor) -> None:
        collected.append(functional.linear(hidden[:, -1].float(), model.head.weight, model.head.bias))

    hook = model.output_norm.register_forward_hook(listen)
    try:
        yield collected
    finally:
        hook.remove()


@contextmanager
def inverse_cdf(draws: Tensor) -> Iterator[None]:
    """Tokens are the recorded uniforms [steps, B] through the inverse of the distribution function."""
    used = 0

    def choose_tokens(logits: Tensor, *, temperature: float, top_k: int, top_p: float, generator: Any) -> Tensor:
        nonlocal used
        assert temperature > 0
        probabilities = filter_logits(logits[:, 0] / temperature, top_k, top_p).softmax(-1)
        cumulative = probabilities.cumsum(-1)
        cumulative = cumulative / cumulative[:, -1:]
        chosen = (cumulative < draws[used][:, None]).sum(-1)
        used += 1
        return chosen[:, None]

    with mock.patch.object(sampling, "choose_tokens", choose_tokens):
        yield


@torch.no_grad()
def generator(g: Any) -> dict[str, Tensor]:
    model = FlexTokAR.from_official(g.weights, arguments(g))
    kind = g.config.get("pos")
    if kind in ("sincos1d", "sincos2d"):
        torch.testing.assert_close(model.position_table, sincos_positions(g.config["dim"], g.config["n_tokens"], kind))
    condition, null, call = condition_of(g), null_of(g), g.call
    ids = g.inputs["token_ids"]
    logits = model(ids, condition)
    total, prefix = call["num_keep_tokens"], call["prefix"]
    classes = isinstance(condition, Tensor)
    # The authors' sampler turns its null class into class 0 after the first token.
    bug: dict[str, Any] = {"class_zero_guidance": True} if classes else {"null_condition": null}
    fixed: dict[str, Any] = {} if classes else {"null_condition": null}
    guided = {"guidance_scale": call["cfg_factor"], "num_tokens": total, "temperature": 0.0}
    first = model.class_embedding(condition) if classes else model.start.new_zeros(len(ids), model.config.hidden_size)
    outputs: dict[str, Tensor] = {
        "tf.input_embeddings": model.embed(ids[:, :-1], first),
        "tf.logits": logits,
        "tf.loss": functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).view(1),
    }
    if not classes:
        outputs["text_embeddings"] = model.embed_text(condition.features)
        caption = model.captions(outputs["text_embeddings"], condition.mask)[0]
        outputs["text_bias"] = torch.zeros(caption.mask.shape).masked_fill(~caption.mask, -torch.inf)[:, 0]

    def run(name: str, **settings: Any) -> None:
        with heard(model) as steps:
            outputs[f"{name}.ids"] = model.generate(condition, **settings).ids
        # Re-reading for class 0 is a step of its own only in name: the authors read everything in every step.
        outputs[f"{name}.last_logits"] = torch.stack(steps, dim=1)

    run("greedy_nocfg", num_tokens=total, temperature=0.0)
    run("greedy_cfg", **guided, **bug)
    run("greedy_cfg_fixed", **guided, **fixed)
    choice = {name: call[name] for name in ("temperature", "top_k")}
    # The authors call "keep everything" 0, we call it 1; elsewhere both keep the smallest set that reaches p.
    choice["top_p"] = call["top_p"] or 1.0
    if "sample_u" in g.inputs:
        with inverse_cdf(g.inputs["sample_u"]):
            run("sampled", **(guided | choice), **bug)
    known = VisualTokens(ids=ids[:, :prefix])
    outputs["continued.ids"] = model.generate(condition, **guided, **bug, prefix=known).ids
    rows = len(outputs["branch.ids"]) if "branch.ids" in outputs else len(g.outputs["branch.ids"])
    length = g.outputs["branch.ids"].shape[1]
    branches = model.branch(condition, rows // len(ids), **(guided | {"num_tokens": length}), **bug)
    outputs |= {"branch.ids": branches.tokens.ids, "branch.logprob": branches.log_probs[:, None]}
    filtered = filter_logits(g.inputs["filter_logits"][:, -1] / choice["temperature"], choice["top_k"], choice["top_p"])
    return outputs | {"filter.probs": filtered.softmax(-1)}


CASES = {"ar_c2i": generator, "ar_t2i": generator}
