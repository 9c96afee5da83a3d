"""VFlowOpt: the pruner on stock transformers models; the released code's one non-causal layer is put back by a hook."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.adapters.transprune import expand, free_token, manifest
from vistok import kernels
from vistok.pruners.hosts import find_host
from vistok.pruners.hosts.base import TowerAttention
from vistok.pruners.hosts.original import from_original
from vistok.pruners.vflowopt import Settings, VFlowOpt, global_attention, last_ratio, patch_entropy, recycle

SYSTEM = "vflowopt"


def without_newlines(model: Any) -> Callable[..., Any]:
    """The authors add no newline to single views; transformers does."""

    def pack(image_features: list[Tensor], *args: Any, **kwargs: Any) -> tuple[list[Tensor], Tensor]:
        assert all(len(one) == 1 for one in image_features)
        return [one[0] for one in image_features], torch.tensor([one.shape[1] for one in image_features])

    return pack


def inputs_of(g: Any, pixels: Tensor) -> dict[str, Tensor]:
    kind = g.call["kind"]
    if kind == "video":
        return {"pixel_values_videos": pixels[None]}
    if kind == "multi":
        sizes = torch.tensor([list(pixels.shape[-2:])] * len(pixels))
        return {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": torch.tensor([len(pixels)])}
    width, height = g.call["image_size_wh"]
    return {"pixel_values": pixels[None], "image_sizes": torch.tensor([[height, width]])}


def pruner_of(options: dict[str, Any]) -> VFlowOpt:
    ratios = [options["illava_vit_r"] if options.get("enable_illava_vit", True) else 1.0]
    layers = []
    if options.get("enable_illava_llm", True):
        layers = list(options["illava_llm_k"])
        ratios += list(options["illava_llm_r"])
    settings = Settings(tuple(ratios), options["illava_vit_t"], options["illava_vit_m"], options["illava_vit_alpha_v"])
    return VFlowOpt(settings, layers=layers, tower_layer=options["illava_vit_k"][0], entropy_input="normalized")


class Decoder:
    """What the decoder sees in prefill."""

    def __init__(self) -> None:
        self.embeddings: Tensor | None = None
        self.positions: Tensor | None = None
        self.last: Tensor | None = None

    def listen(self, model: Any, stack: ExitStack) -> None:
        language = model.model.language_model

        def first(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.embeddings is None:
                self.embeddings = args[0] if args else kwargs["hidden_states"]

        def final(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.positions is None:
                self.positions = kwargs["position_ids"]

        def norm(module: nn.Module, args: tuple, output: Tensor) -> None:
            if self.last is None:
                self.last = output[0, -1]

        for hook in (
            language.layers[0].register_forward_pre_hook(first, with_kwargs=True),
            language.layers[-1].register_forward_pre_hook(final, with_kwargs=True),
            language.norm.register_forward_hook(norm),
        ):
            stack.callback(hook.remove)


def see_everything(layer: nn.Module, stack: ExitStack) -> None:
    """One layer without causal mask in prefill, as the released code runs under SDPA."""

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        size = hidden.shape[1]
        if size == 1:
            return None
        return args, {**kwargs, "attention_mask": torch.ones(1, 1, size, size, dtype=torch.bool)}

    stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)


def generate(model: Any, inputs: dict[str, Tensor], steps: int) -> Any:
    return model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=steps,
        min_new_tokens=steps,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )


@torch.no_grad()
def onevision(g: Any) -> dict[str, Tensor]:
    options, kind = g.call["illava_config"], g.call["kind"]
    ids = g.inputs["input_ids"]
    token = free_token(ids, g.config["llava_qwen_config"]["vocab_size"])
    model = from_original(g.weights, g.config, image_token_id=token)
    video_token = free_token(torch.cat([ids, torch.tensor([[token]])], dim=1), model.config.text_config.vocab_size)
    model.config.video_token_id = video_token
    # Neighbours in `low_k` differ by 1e-9: the recorded tower ran eager attention, and another order of sums
    # swaps them.
    model.model.vision_tower.config._attn_implementation = "eager"
    pixels = g.inputs["pixels_u8"].repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2).float() / 255
    images = inputs_of(g, pixels)
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(kernels.use("reference"))
        if kind == "multi":
            model.model.__dict__["pack_image_features"] = without_newlines(model)
        if kind == "video":
            counts = [model.get_video_features(**images, return_dict=True).pooler_output.shape[1]]
        else:
            counts = [len(one) for one in model.get_image_features(**images, return_dict=True).pooler_output]
        prompt = expand(ids, token, counts, fill=video_token if kind == "video" else None)
        inputs = {"input_ids": prompt, **images}
        steps, length = g.call["max_new_tokens"], prompt.shape[1]
        lasts = {}
        for variant in ("unpruned", "causal", "official"):
            pruner = pruner_of(options)
            decoder = Decoder()
            with ExitStack() as inner:
                if variant != "unpruned":
                    inner.enter_context(pruner.attached(model))
                decoder.listen(model, inner)
                if variant == "official" and options.get("enable_illava_llm", True):
                    see_everything(model.model.language_model.layers[options["illava_llm_k"][0] - 1], inner)
                result = generate(model, inputs, steps)
            outputs[f"step_logits_{variant}"] = torch.stack(result.logits, dim=1)
            lasts[variant] = outputs[f"last_hidden_{variant}"] = decoder.last
            if variant != "unpruned":
                outputs[f"generated_ids_{variant}"] = result.sequences[:, length:]
                similarity = torch.cosine_similarity(lasts["unpruned"], lasts[variant], dim=0)
                outputs[f"objective_{variant}"] = similarity[None]
        outputs["kv_lengths"] = torch.tensor([layer.get_seq_length() for layer in result.cache.layers])
        outputs["prefill_position_ids_last"] = decoder.positions
        outputs |= importance_outputs(model, images, options, pixels)
        outputs |= stage_outputs(pruner, decoder, options, kind)
    return outputs


def importance_outputs(
    model: Any, images: dict[str, Tensor], options: dict[str, Any], pixels: Tensor
) -> dict[str, Tensor]:
    """Maps of the single views."""
    host = find_host(model)
    held: list[TowerAttention] = []

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        held.extend(host.read_attention(module, {**kwargs, **({"hidden_states": args[0]} if args else {})}))

    hook = host.tower_attention(options["illava_vit_k"][0]).register_forward_pre_hook(before, with_kwargs=True)
    (model.get_video_features if "pixel_values_videos" in images else model.get_image_features)(**images)
    hook.remove()
    attention_map = global_attention(held[0], options["illava_vit_t"])
    entropy = patch_entropy(pixels, model.config.vision_config.patch_size).flatten(1)
    importance = attention_map + options["illava_vit_alpha_v"] * entropy.softmax(dim=1)
    return {"attention_map": attention_map, "entropy": entropy, "importance_views": importance}


def stage_outputs(pruner: VFlowOpt, decoder: Decoder, options: dict[str, Any], kind: str) -> dict[str, Tensor]:
    report = pruner.last_report
    assert report is not None
    assert decoder.embeddings is not None
    first = report.stages[0].visuals
    outputs = {"n_visual_after_vit": torch.tensor([sum(len(one.kept) for one in first)])}
    start = options["illava_llm_image_token_start_index"]
    total = int(outputs["n_visual_after_vit"])
    features = decoder.embeddings[0, start : start + total]
    outputs["kept_importance"] = torch.cat([one.scores[one.kept] for one in first])
    if kind == "multi":
        outputs["kept_after_vit"] = torch.cat(
            [torch.stack([torch.full_like(one.kept, number), one.kept], dim=1) for number, one in enumerate(first)]
        )
        outputs["kept_features"] = features.view(len(first), -1, features.shape[-1])
    else:
        (visual,) = first
        outputs |= {"kept_after_vit": visual.kept, "kept_features": features}
    if kind == "anyres":
        blocks = visual.visual.blocks()
        settings = pruner.settings
        dummy = torch.zeros(visual.tokens, 1)
        kept, _, low, cell = recycle(dummy, visual.scores, blocks, settings.ratios[0], settings.cell_size)
        assert torch.equal(kept, visual.kept)
        mask = torch.zeros(visual.tokens, dtype=torch.uint8)
        mask[kept] = 1
        dropped = round(visual.tokens * (1 - settings.ratios[0]))
        merged = int(visual.tokens / settings.cell_size**2)
        outputs |= {
            "low_k": low,
            "group_members": low[torch.argsort(cell, stable=True)],
            "group_sizes": cell.bincount(),
            "keep_mask": mask,
            "numbers": torch.tensor([dropped, merged, blocks[-1].columns, len(kept)]),
        }
    for number, stage in enumerate(report.stages[1:]):
        within, offset = [], 0
        for before, after in zip(first, stage.visuals):
            within.append(torch.searchsorted(before.kept, after.kept) + offset)
            offset += len(before.kept)
        outputs[f"llm_stage{number}.kept"] = torch.cat(within)
    return outputs


@torch.no_grad()
def importance_unit(g: Any) -> dict[str, Tensor]:
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

    config = SiglipVisionConfig(**g.config)
    config._attn_implementation = "eager"
    layer = SiglipEncoderLayer(config).eval()
    layer.load_state_dict(g.weights)
    hidden = g.inputs["hidden_states"]
    normed, module = layer.layer_norm1(hidden), layer.self_attn

    def heads(states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], -1, module.head_dim).transpose(1, 2)

    attention = TowerAttention(heads(module.q_proj(normed)), heads(module.k_proj(normed)), module.scale)
    attention_map = global_attention(attention, g.call["t"])
    return {
        "attention": (attention.query @ attention.key.transpose(2, 3) * attention.scale).softmax(dim=-1),
        "hidden": layer(hidden, None),
        "attention_map": attention_map,
        "importance": attention_map + g.call["alpha_v"] * g.inputs["entropy"].softmax(dim=-1),
    }


def entropy_unit(g: Any) -> dict[str, Tensor]:
    return {"entropy": patch_entropy(g.inputs["pixels_u8"].float() / 255, g.config["patch_size"])[:, None]}


def budget_unit(g: Any) -> dict[str, Tensor]:
    target, layers = g.call["target"], g.call["stage_layers"]
    pairs = zip(g.inputs["r1"].double().tolist(), g.inputs["r2"].double().tolist())
    return {"r3": torch.tensor([last_ratio(target, first, second, layers) for first, second in pairs])}


CASES = {
    "ov_": onevision,
    "importance_unit": importance_unit,
    "entropy_unit": entropy_unit,
    "budget_unit": budget_unit,
}
MANIFESTS = {"llava-onevision": manifest}
