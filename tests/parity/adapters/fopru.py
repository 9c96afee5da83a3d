"""FoPru: the pruner on tiny transformers models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.pruners.fopru import FoPru, select_rank, select_rows
from vistok.pruners.hosts import find_host
from vistok.pruners.hosts.base import TowerAttention

SYSTEM = "fopru"


def build(g: Any, name: str) -> Any:
    import transformers

    model = getattr(transformers, f"{name}ForConditionalGeneration")(
        getattr(transformers, f"{name}Config")(**g.config)
    ).eval()
    model.load_state_dict(g.weights)
    return model


def run(model: Any, inputs: dict[str, Tensor], pruner: FoPru, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """(prefill logits, generated ids, logits of each step)."""
    length = inputs["input_ids"].shape[1]
    with pruner.attached(model):
        logits = model(**inputs).logits
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
    return logits, result.sequences[:, length:], torch.stack(result.logits, dim=1)


def attention_of(model: Any, layer: int, inputs: dict[str, Tensor]) -> tuple[list[TowerAttention], Any]:
    """Queries and keys of a tower layer, and the features call's output."""
    host = find_host(model)
    held: list[TowerAttention] = []

    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(kwargs)
        if args:
            given["hidden_states"] = args[0]
        held.extend(host.read_attention(module, given))

    hook = host.tower_attention(host.tower_layer(layer)).register_forward_pre_hook(before, with_kwargs=True)
    output = model.get_image_features(**inputs, return_dict=True)
    hook.remove()
    return held, output


@torch.no_grad()
def llava15(g: Any) -> dict[str, Tensor]:
    model = build(g, "Llava")
    call, pixels = g.call, g.inputs["pixel_values"]
    grid, ratio = tuple(call["grid"]), call["ratio"]
    layer = call["attention_layer"]
    (attention,), output = attention_of(model, layer, {"pixel_values": pixels})
    logits = attention.query @ attention.key.transpose(2, 3) * attention.scale
    outputs = {"attention": logits.softmax(dim=-1), "projected_features": torch.stack(list(output.pooler_output))}
    for queries in ("all", "patch", "cls"):
        significance = attention.received(queries)
        rows = torch.stack([select_rows(one, grid, ratio) for one in significance])
        outputs |= {
            f"significance_{queries}": significance,
            f"rank_{queries}": torch.stack([select_rank(one, ratio) for one in significance]),
            f"rows_{queries}": rows,
            f"row_{queries}": (rows[..., None] * grid[1] + torch.arange(grid[1])).flatten(1),
        }
    inputs = {"input_ids": g.inputs["input_ids"], "pixel_values": pixels[:1]}
    for strategy in ("rank", "row"):
        pruner = FoPru(ratio, strategy, layer=layer)
        result = run(model, inputs, pruner, call["decode_steps"])
        assert torch.equal(pruner.last_report.kept()[0], outputs[f"{strategy}_all"][0])
        for name, value in zip(("logits", "generated_ids", "step_logits"), result):
            outputs[f"{strategy}_{name}"] = value
    return outputs


@torch.no_grad()
def llava_next(g: Any) -> dict[str, Tensor]:
    model = build(g, "LlavaNext")
    call = g.call
    width, height = call["image_size_wh"]
    images = {"pixel_values": g.inputs["pixel_values"], "image_sizes": torch.tensor([[height, width]])}
    (attention,), _ = attention_of(model, call["attention_layer"], images)
    held: dict[str, Tensor] = {}
    hook = model.model.multi_modal_projector.register_forward_hook(lambda m, a, o: held.update(features=o))
    model.get_image_features(**images)
    hook.remove()
    outputs = {"significance": attention.received("all"), "projected_features": held["features"]}
    inputs = {"input_ids": g.inputs["input_ids"], **images}
    for strategy in ("rank", "row"):
        scope = call.get("scope", "per_view")
        pruner = FoPru(call["ratio"], strategy, layer=call["attention_layer"], newline=call["newline"], scope=scope)
        result = run(model, inputs, pruner, call["decode_steps"])
        for name, value in zip(("logits", "generated_ids", "step_logits"), result):
            outputs[f"{strategy}_{name}"] = value
        outputs[f"{strategy}_kept"] = pruner.last_report.kept()[0]
    return outputs


@torch.no_grad()
def qwen(g: Any) -> dict[str, Tensor]:
    model = build(g, "Qwen2_5_VL")
    ids = g.inputs["input_ids"]
    inputs = {
        **{name: g.inputs[name] for name in ("input_ids", "pixel_values", "image_grid_thw")},
        "mm_token_type_ids": (ids == g.config["image_token_id"]).int(),
    }
    block = g.call.get("attention_block", -1)  # -1: the last block of full attention
    pruner = FoPru(g.call["ratio"], layer=None if block == -1 else block)
    logits, generated, steps = run(model, inputs, pruner, g.call["decode_steps"])
    outputs = {"logits": logits, "generated_ids": generated, "step_logits": steps}
    keep = torch.ones(ids.shape[1], dtype=torch.bool)
    places = (ids[0] == g.config["image_token_id"]).nonzero()[:, 0]
    start = 0
    for number, visual in enumerate(pruner.last_report.stages[0].visuals):
        outputs |= {f"rank_image{number}": visual.kept, f"significance_image{number}": visual.scores}
        own = places[start : start + visual.tokens]
        keep[own] = False
        keep[own[visual.kept]] = True
        start += visual.tokens
    positions, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=g.inputs["image_grid_thw"]
    )
    outputs |= {"keep_mask": keep.to(torch.uint8), "mrope_positions": positions[:, :, keep]}
    return outputs


CASES = {"llava15": llava15, "llava_next": llava_next, "qwen2_5_vl": qwen}
