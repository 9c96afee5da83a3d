"""TransPrune: the pruner on stock transformers models, listened to through hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vistok.pruners import transprune
from vistok.pruners.hosts.original import PUBLISHED, config_from_original, from_original, rename_original
from vistok.pruners.transprune import TransPrune, transition

SYSTEM = "transprune"


def free_token(ids: Tensor, vocabulary: int) -> int:
    """A token id that the prompt does not use, for the placeholder."""
    return next(token for token in range(vocabulary - 1, 0, -1) if not bool((ids == token).any()))


def expand(ids: Tensor, token: int, counts: list[int], fill: int | None = None) -> Tensor:
    """Replace the authors' placeholder -200 by as many placeholders as the image has tokens."""
    parts, images = [], iter(counts)
    for value in ids[0].tolist():
        parts += [token if fill is None else fill] * next(images) if value == -200 else [value]
    return torch.tensor([parts])


def pruner_of(call: dict[str, Any]) -> TransPrune:
    return TransPrune(
        accumulate=call["accmulating_layer_list"],
        prune=call["pruning_layer_list"],
        ratios=call["image_token_ratio_list"],
    )


class Listener:
    """What the decoder's layers see, step by step."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = model.model.language_model.layers
        self.hidden: list[dict[int, Tensor]] = []
        self.positions: list[list[int]] = []
        self.rotary: list[dict[int, Tensor]] = []
        self.values: list[Tensor] = []
        self.tables: dict[int, Any] = {}  # rotary tables of the prefill

    @contextmanager
    def listening(self) -> Iterator[Listener]:
        hooks = []
        for number, layer in enumerate(self.layers):

            def before(module: Any, args: tuple, kwargs: dict[str, Any], number: int = number) -> None:
                if number == 0:
                    self.hidden.append({})
                    self.positions.append([])
                    self.rotary.append({})
                hidden = args[0] if args else kwargs["hidden_states"]
                self.hidden[-1][number] = hidden.detach()
                self.rotary[-1][number] = kwargs["position_embeddings"][0]
                positions = kwargs.get("position_ids")
                self.positions[-1].append(-1 if positions is None else int(positions[0, -1]))

            hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            value = transition(*args, **kwargs)
            self.values.append(value)
            return value

        with mock.patch.object(transprune, "transition", recorded):
            try:
                yield self
            finally:
                for hook in hooks:
                    hook.remove()


def stage_outputs(pruner: TransPrune, listener: Listener, accumulate: list[int], prune: list[int]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    report = pruner.last_report
    assert report is not None
    for number, (stage, layer) in enumerate(zip(report.stages, prune)):
        (visual,) = stage.visuals
        name = f"stage{number}"
        outputs |= {
            f"{name}.kept_orig": visual.kept,
            f"{name}.kept_rel": torch.searchsorted(visual.before, visual.kept),
            f"{name}.hidden": listener.hidden[0][layer],
            f"{name}.ttv_norm": visual.terms["transition"],
            f"{name}.iga_norm": visual.terms["instruction"],
            f"{name}.score": visual.scores,
        }
    outputs["prefill_lengths"] = torch.tensor(report.tokens_per_layer[0])
    return outputs


def keeping(held: dict[str, Tensor], name: str) -> Callable[..., None]:
    """A forward hook that keeps a module's output."""

    def hook(module: Any, args: tuple, output: Any) -> None:
        held[name] = output[0] if isinstance(output, tuple) else output

    return hook


def transitions(model: Any, listener: Listener, numbers: list[int]) -> dict[str, Tensor]:
    """Transition values of every accumulation layer, those after the last pruning included: the pruner skips them."""
    outputs = {}
    for number in numbers:
        layer, hidden = model.model.language_model.layers[number - 1], listener.hidden[0][number - 1]
        held: dict[str, Tensor] = {}
        parts = {
            "b1": layer.input_layernorm,
            "a1": layer.self_attn,
            "b2": layer.post_attention_layernorm,
            "a2": layer.mlp,
        }
        hooks = [part.register_forward_hook(keeping(held, name)) for name, part in parts.items()]
        size = hidden.shape[1]
        rotary = listener.tables[number - 1]
        layer(hidden, attention_mask=torch.ones(1, 1, size, size).tril().bool(), position_embeddings=rotary)
        for hook in hooks:
            hook.remove()
        outputs[f"ttv_layer{number}.attn"] = transition(held["b1"], held["a1"])
        outputs[f"ttv_layer{number}.ffn"] = transition(held["b2"], held["a2"])
    return outputs


def prepared(g: Any) -> tuple[Any, dict[str, Tensor], Tensor | None, int]:
    """(model, inputs, labels, number of image tokens) of a case in the original layout."""
    ids = g.inputs["input_ids"]
    token = free_token(ids, g.config["llava_config"]["vocab_size"])
    model = from_original(g.weights, g.config, image_token_id=token)
    inputs: dict[str, Tensor] = {}
    count = 0
    if "pixel_values" in g.inputs and bool((ids == -200).any()):
        inputs["pixel_values"] = g.inputs["pixel_values"]
        if g.call.get("image_sizes_wh") is not None:
            width, height = g.call["image_sizes_wh"]
            inputs["image_sizes"] = torch.tensor([[height, width]])
        features = model.get_image_features(**inputs, return_dict=True).pooler_output
        count = sum(len(one) for one in features)
    inputs["input_ids"] = expand(ids, token, [count])
    labels = g.inputs.get("labels")
    if labels is not None:
        joined = torch.stack([ids[0], labels[0]], dim=1)
        parts = []
        for value, label in joined.tolist():
            parts += [-100] * count if value == -200 else [label]
        labels = torch.tensor([parts])
    return model, inputs, labels, count


@torch.no_grad()
def original(g: Any) -> dict[str, Tensor]:
    model, inputs, labels, count = prepared(g)
    call = g.call
    pruner = pruner_of(call)
    listener = Listener(model)
    outputs: dict[str, Tensor] = {"n_image_tokens": torch.tensor([count])}
    length = inputs["input_ids"].shape[1]

    def tables(number: int) -> Any:
        def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            listener.tables.setdefault(number, kwargs["position_embeddings"])

        return before

    with pruner.attached(model), listener.listening():
        hooks = [
            layer.register_forward_pre_hook(tables(number), with_kwargs=True)
            for number, layer in enumerate(listener.layers)
        ]
        if call.get("max_new_tokens"):
            result = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=call["max_new_tokens"],
                min_new_tokens=call["max_new_tokens"],
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            outputs["generated_ids"] = result.sequences[:, length:]
            outputs["step_logits"] = torch.stack(result.logits, dim=1)
            cache = result.cache
            outputs["decode_positions"] = torch.tensor(listener.positions[1:])
        else:
            result = model(**inputs, labels=labels, use_cache=True)
            outputs["logits"], cache = result.logits, result.cache
            if result.loss is not None:
                outputs["loss"] = result.loss[None]
        for hook in hooks:
            hook.remove()
    outputs["kv_lengths"] = torch.tensor([layer.get_seq_length() for layer in cache.layers])
    if count:
        outputs |= stage_outputs(pruner, listener, call["accmulating_layer_list"], call["pruning_layer_list"])
    else:
        outputs["prefill_lengths"] = torch.full((len(listener.layers),), length)
    outputs |= transitions(model, listener, call["accmulating_layer_list"])
    used = [number for number in call["accmulating_layer_list"] if count and number <= max(call["pruning_layer_list"])]
    expected = [outputs[f"ttv_layer{number}.{part}"] for number in used for part in ("attn", "ffn")]
    assert len(expected) == len(listener.values), "the pruner gathered other layers than those asked for"
    assert all(torch.allclose(one, two, rtol=1e-5) for one, two in zip(expected, listener.values))
    return outputs


@torch.no_grad()
def qwen(g: Any) -> dict[str, Tensor]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**g.config)).eval()
    model.load_state_dict(g.weights)
    ids = g.inputs["input_ids"]
    inputs = {
        **{name: g.inputs[name] for name in ("input_ids", "pixel_values", "image_grid_thw")},
        "mm_token_type_ids": (ids == g.config["image_token_id"]).int(),
    }
    outputs = {"logits_unpruned": model(**inputs).logits}
    pruner = pruner_of(g.call)
    listener = Listener(model)
    with pruner.attached(model), listener.listening():
        hooks = []
        for number, layer in enumerate(listener.layers):

            def before(module: Any, args: tuple, kwargs: dict[str, Any], number: int = number) -> None:
                listener.tables.setdefault(number, kwargs["position_embeddings"])

            hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        outputs["logits"] = model(**inputs).logits
        steps = g.call["decode_steps"]
        listener.values.clear()
        result = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=steps,
            min_new_tokens=steps,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for hook in hooks:
            hook.remove()
    positions, deltas = model.model.get_rope_index(
        ids, mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=g.inputs["image_grid_thw"]
    )
    outputs |= {"position_ids": positions, "rope_deltas": deltas}
    outputs["generated_ids"] = result.sequences[:, ids.shape[1] :]
    outputs["step_logits"] = torch.stack(result.logits, dim=1)
    # The recording's cache holds the prompt and every generated token but the last.
    outputs["kv_lengths"] = torch.tensor([layer.get_seq_length() for layer in result.cache.layers])
    call = g.call
    outputs |= stage_outputs(pruner, listener, call["accmulating_layer_list"], call["pruning_layer_list"])
    outputs |= transitions(model, listener, call["accmulating_layer_list"])
    places = (ids[0] == g.config["image_token_id"]).nonzero()[:, 0]
    text = (ids[0] != g.config["image_token_id"]).nonzero()[:, 0]
    for number, stage in enumerate(pruner.last_report.stages):
        alive = torch.cat([text, places[stage.visuals[0].kept]]).sort().values
        outputs[f"stage{number}.mrope_positions"] = positions[:, :, alive]
    return outputs


def unit(g: Any) -> dict[str, Tensor]:
    before, after = g.inputs["before"], g.inputs["after"]
    return {
        "cosine": torch.cosine_similarity(before, after, dim=-1),
        "magnitude": after.norm(dim=-1) / before.norm(dim=-1),
        "ttv_code": transition(before, after),
        "ttv_paper": transition(before, after, direction="abs"),
    }


CASES = {
    "llava15": original,
    "llava_next": original,
    "edge": original,
    "text_only": original,
    "qwen2_5_vl": qwen,
    "ttv_unit": unit,
}


def manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """The published-size model on the meta device has exactly the renamed keys and shapes."""
    import transformers

    from vistok.nn.model import describe_mismatch

    config = config_from_original(PUBLISHED[name])
    classes = {
        "llava": transformers.LlavaForConditionalGeneration,
        "llava_next": transformers.LlavaNextForConditionalGeneration,
        "llava_onevision": transformers.LlavaOnevisionForConditionalGeneration,
    }
    with torch.device("meta"):
        model = classes[config.model_type](config)
    renamed = rename_original({key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()})
    problems = describe_mismatch(model.state_dict(), renamed)
    assert not problems, "; ".join(problems)


MANIFESTS = {"llava": manifest}
