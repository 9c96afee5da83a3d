"""Leakage fixes: patched states of every model, selectors, the two fixes with sampling, DeLeaker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.parity.check import read_text
from tests.parity.pipelines import (
    clip_encoder,
    clip_tokenizer,
    load_strictly,
    part,
    scheduler,
    t5_encoder,
    t5_tokenizer,
    tiny_vae,
)
from vistok.controllers.leakage import DeLeaker, DeLeakerSettings, kept_positions, patch_states, replace_item
from vistok.nn.prompts import PipelineText, TextEncoderSlot, clip_states, t5_states

SYSTEM = "leakage"


def all_but(dropped: list[int], length: int) -> list[int]:
    return [position for position in range(length) if position not in set(dropped)]


@torch.no_grad()
def t5_patch(g: Any) -> dict[str, Tensor]:
    model = t5_encoder(g.config["text_encoder_2"], part(g.weights, "text_encoder_2"))
    ids, pad_ids = g.inputs["input_ids"], g.inputs["pad_input_ids"]
    pads = t5_states(model, pad_ids)
    out: dict[str, Tensor] = {}
    for name in g.outputs:
        stem, _, skip = name.partition("_skip")
        states = t5_states(model, ids, skip=int(skip) if skip else None)
        if stem == "full":
            out[name] = states
            continue
        keep = g.call["keep"][int(stem.split("keep")[1].split("_")[0])]
        patched = patch_states(states, pads, keep)
        if stem.endswith("_two_images"):
            patched = patched.expand(2, -1, -1)
        elif stem.startswith("batch2"):
            # The authors' code edits the first row only and returns zeros for the others; ours edits every row.
            patched = torch.cat([patched, torch.zeros_like(patched)])
        out[name] = patched
    return out


@torch.no_grad()
def flux_clip_pooled(g: Any) -> dict[str, Tensor]:
    model = clip_encoder(g.config["text_encoder"], part(g.weights, "text_encoder"), projection=False)
    return {
        "pooled": clip_states(model, g.inputs["input_ids"], layer="final")[1],
        "pooled_patched": clip_states(model, g.inputs["pad_input_ids"], layer="final")[1],
    }


@torch.no_grad()
def sdxl_patch(g: Any) -> dict[str, Tensor]:
    models = [
        clip_encoder(g.config["text_encoder"], part(g.weights, "text_encoder"), projection=False),
        clip_encoder(g.config["text_encoder_2"], part(g.weights, "text_encoder_2"), projection=True),
    ]
    ids = [g.inputs["input_ids"], g.inputs["input_ids_2"]]
    pads = [
        clip_states(
            model,
            g.inputs[f"pad_input_ids{suffix}"],
            layer="penultimate",
            attention_mask=g.inputs[f"pad_attention_mask{suffix}"],
        )
        for model, suffix in zip(models, ("", "_2"), strict=True)
    ]
    length = ids[0].shape[1]
    out: dict[str, Tensor] = {}
    for name in dict.fromkeys(key.split(".")[0] for key in g.outputs):
        lists = g.call["skip_tokens"].get(name)
        skip = 1 if name.endswith("clip_skip1") else None
        if name == "full":
            dropped: list[list[int]] = [[], []]
        elif isinstance(lists, list) and all(isinstance(entry, list) for entry in lists):
            dropped = lists
        else:  # "all but call.keep"
            dropped = [all_but(g.call["keep"], length)] * 2
        parts, pooled = [], None
        for index, model in enumerate(models):
            states, pooled = clip_states(model, ids[index], layer="penultimate", skip=skip)
            parts.append(patch_states(states, pads[index][0], all_but(dropped[index], length)))
        out[f"{name}.prompt_embeds"] = torch.cat(parts, dim=-1)
        out[f"{name}.pooled"] = pads[1][1] if dropped[1] else pooled  # type: ignore[assignment]
        out[f"{name}.negative_prompt_embeds"] = torch.zeros_like(out[f"{name}.prompt_embeds"])
        out[f"{name}.negative_pooled"] = torch.zeros_like(out[f"{name}.pooled"])
    return out


@torch.no_grad()
def sd3_patch(g: Any) -> dict[str, Tensor]:
    models = [
        clip_encoder(g.config["text_encoder"], part(g.weights, "text_encoder"), projection=True),
        clip_encoder(g.config["text_encoder_2"], part(g.weights, "text_encoder_2"), projection=True),
    ]
    t5 = t5_encoder(g.config["text_encoder_3"], part(g.weights, "text_encoder_3"))
    width, t5_length = g.config["text_encoder_3"]["d_model"], g.call["max_sequence_length"]
    slots = (
        TextEncoderSlot("oai_clip_vit_l", models[0], None, 77, pooled=True),
        TextEncoderSlot("openclip_g", models[1], None, 77, pooled=True),
        TextEncoderSlot("t5_xxl", t5, None, t5_length, kind="t5"),
    )
    text = PipelineText("sd3", slots, joint_width=width, t5_length=t5_length)
    ids = [g.inputs["input_ids"], g.inputs["input_ids_2"], g.inputs["input_ids_3"]]
    pads = [
        slot.states(g.inputs[f"pad_input_ids{suffix}"]) for slot, suffix in zip(slots, ("", "_2", "_3"), strict=True)
    ]
    replaced = [g.inputs["pad_input_ids"], g.inputs["pad_encoder_input_ids_2"], g.inputs["pad_encoder_input_ids_3"]]
    keep = {"clip": g.call["keep_clip"], "t5": g.call["keep_t5"]}

    def encoded(patched: bool, padded: tuple[int, ...], clip: bool) -> tuple[Tensor, Tensor]:
        """Patched or not, with whole encoders replaced by the pad text (1-based numbers)."""
        states, pooled = {}, {}
        for number, slot in enumerate(slots):
            tokens, vector = slot.states(replaced[number] if number + 1 in padded else ids[number])
            if patched and (slot.kind == "t5" or clip):
                tokens = patch_states(tokens, pads[number][0], keep[slot.kind])
                vector = pads[number][1]
            states[slot.key] = tokens
            if vector is not None:
                pooled[slot.key] = vector
        embeds, vectors = text.assemble(states, pooled)
        assert vectors is not None
        return embeds, vectors

    variants = {
        "full": (False, (), True),
        "keep": (True, (), True),
        "keep_t5_only_clip_padded": (True, (1, 2), False),
        "t5_padded": (False, (3,), True),
    }
    out: dict[str, Tensor] = {}
    for name in dict.fromkeys(key.split(".")[0] for key in g.outputs):
        out[f"{name}.prompt_embeds"], out[f"{name}.pooled"] = encoded(*variants[name])
    return out


@torch.no_grad()
def sd_patch(g: Any) -> dict[str, Tensor]:
    model = clip_encoder(g.config["text_encoder"], part(g.weights, "text_encoder"), projection=False)
    out: dict[str, Tensor] = {}
    for key in g.outputs:
        version, name = key.split(".")
        ids = g.inputs[f"{version}.input_ids"]
        skip = int(name.rsplit("clip_skip", 1)[1]) if "clip_skip" in name else None
        states = clip_states(model, ids, layer="final", skip=skip)[0]
        if name.startswith("keep"):
            custom = "custom_" if "custom" in name else ""
            pads = clip_states(model, g.inputs[f"{version}.{custom}pad_input_ids"], layer="final")[0]
            states = patch_states(states, pads, g.call["keep"])
        out[key] = states
    return out


@torch.no_grad()
def reference_fixes(g: Any) -> dict[str, Tensor]:
    clip = clip_encoder(g.config["text_encoder"], part(g.weights, "text_encoder"), projection=False)
    t5 = t5_encoder(g.config["text_encoder_2"], part(g.weights, "text_encoder_2"))
    call = g.call
    ids = [g.inputs[name] for name in ("input_ids", "item_input_ids", "empty_input_ids")]
    states, lone, pads = t5_states(t5, torch.cat(ids)).split(1)
    span, source, carrying = call["span_t5"], call["source_t5"], call["representative_t5"]
    redundant = [position for position in span if position != carrying]
    length = states.shape[1]
    replaced = replace_item(states, lone[0], span, source)
    edits = {
        "contextual": states,
        "uncontextual": replaced,
        "redundancy_removed": patch_states(states, pads, all_but(redundant, length)),
        "both": patch_states(replaced, pads, all_but(redundant, length)),
        "single_token": patch_states(states, pads, [carrying]),
    }
    network = diffusers.FluxTransformer2DModel(**g.config["transformer"])
    load_strictly(network, part(g.weights, "transformer"))
    pipe = diffusers.FluxPipeline(
        scheduler=scheduler(g.config["scheduler"]),
        vae=tiny_vae(),
        text_encoder=clip,
        text_encoder_2=t5,
        tokenizer=clip_tokenizer(g.path.parent),
        tokenizer_2=t5_tokenizer(g.path.parent),
        transformer=network,
    )
    pipe.set_progress_bar_config(disable=True)
    out: dict[str, Tensor] = {}
    for name, embeds in edits.items():
        out[f"{name}.prompt_embeds"] = embeds
        out[f"{name}.latents"] = pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=g.inputs["pooled_prompt_embeds"],
            latents=g.inputs["latents"].clone(),
            num_inference_steps=call["num_inference_steps"],
            guidance_scale=call["guidance_scale"],
            height=call["height"],
            width=call["width"],
            output_type="latent",
        ).images
    clip_ids = torch.cat([g.inputs["clip_input_ids"], g.inputs["clip_item_input_ids"]])
    contextual, lone_clip = clip_states(clip, clip_ids, layer="penultimate")[0].split(1)
    out["clip.contextual"] = contextual
    out["clip.uncontextual"] = replace_item(contextual, lone_clip[0], call["span_clip"], call["source_clip"])
    return out


def settings_of(variant: dict[str, Any]) -> DeLeakerSettings:
    if variant.get("use_binary_history"):
        raise ValueError("use_binary_history has no published definition")
    return DeLeakerSettings(
        aggregate_from=variant["start_aggregating_from"],
        aggregate_until=variant["stop_aggregating_at"],
        intervene_from=variant["start_intervention_from"],
        intervene_until=variant["stop_intervention_at"],
        text_threshold=variant["std_mul_text"],
        image_threshold=variant["std_mul_image_image"],
        strength=variant["k_strength"],
        history=variant["use_history"],
        smoothing=variant["do_smoothing"],
        cut_image_image=variant["do_image_image"],
        strengthen=variant["do_image_text_strengthening"],
        weaken=variant["do_image_text_weakening"],
        cut_text_text=variant["do_text_text_weakening"],
    )


@torch.no_grad()
def deleaker_flux(g: Any) -> dict[str, Tensor]:
    network = diffusers.FluxTransformer2DModel(**g.config["transformer"])
    load_strictly(network, part(g.weights, "transformer"))
    entities = {name: tuple(span) for name, span in g.call["entities"].items()}

    def both_steps() -> list[Tensor]:
        return [
            network(
                hidden_states=g.inputs[f"hidden_states_{step}"],
                encoder_hidden_states=g.inputs["encoder_hidden_states"],
                pooled_projections=g.inputs["pooled_projections"],
                timestep=timestep[None],
                img_ids=g.inputs["img_ids"],
                txt_ids=g.inputs.get("txt_ids", torch.zeros(g.inputs["encoder_hidden_states"].shape[1], 3)),
                guidance=g.inputs.get("guidance"),
                return_dict=False,
            )[0]
            for step, timestep in enumerate(g.inputs["timesteps"])
        ]

    results = {"base": both_steps()}
    for name, variant in g.call["variants"].items():
        if not variant["use_deleaker"]:
            results[name] = both_steps()
            continue
        with DeLeaker(None, "", entities, settings_of(variant)).attached(network):
            results[name] = both_steps()
    return {f"{name}.step{step}": value for name, values in results.items() for step, value in enumerate(values)}


CASES = {
    "t5_patch": t5_patch,
    "flux_clip_pooled": flux_clip_pooled,
    "sdxl_patch": sdxl_patch,
    "sd3_patch": sd3_patch,
    "sd_patch": sd_patch,
    "reference_fixes": reference_fixes,
    "deleaker_flux": deleaker_flux,
}


def ranges(path: Path) -> None:
    for row in json.loads(read_text(path))["rows"]:
        tokenizer = t5_tokenizer(path.parent) if "t5" in row["tokenizer"] else clip_tokenizer(path.parent)
        count, length = len(tokenizer(row["prompt"])["input_ids"]), row["max_length"]
        assert count == row["token_count"], row["prompt"]
        expected = row["positions_to_replace"]
        lists = row["arguments"].get("specific_token_idx_to_keep_per_prompt_lists")
        if lists is not None:
            ours = [all_but(kept_positions(keep, count, length), length) for keep in lists]
            assert ours == list(expected.values()), row
        elif "specific_tokens" not in row["arguments"]:  # those rows record a defect that replaces everything
            for selector in row["ranges_to_keep"]:
                assert all_but(kept_positions(selector, count, length), length) == expected[selector], row


def clip_file(path: Path) -> None:
    """The tokenizer of the other cases builds and reads its own vocabulary back."""
    assert clip_tokenizer(path.parent).get_vocab() == json.loads(read_text(path))["vocab"]


def t5_file(path: Path) -> None:
    vocabulary = t5_tokenizer(path.parent).get_vocab()
    assert [piece for piece, _ in json.loads(read_text(path))["vocab"]] == sorted(
        vocabulary, key=vocabulary.__getitem__
    )


FILES = {"ranges.json": ranges, "tiny_clip_tokenizer.json": clip_file, "tiny_t5_tokenizer.json": t5_file}
