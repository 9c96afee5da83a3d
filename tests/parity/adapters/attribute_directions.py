"""Attribute directions: spans, embeddings, sampling with delay, clean estimates, both ways to find a delta."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.parity.check import read_text
from tests.parity.pipelines import clip_tokenizer, part, unet_pipeline
from vistok.controllers.attribute_directions import (
    AttributeDelta,
    AttributeDirections,
    AttributeEdit,
    ContrastivePrompts,
    DirectionLearner,
    Draws,
    LearningSettings,
    add_direction,
    contrast_delta,
    expand_combinations,
)
from vistok.errors import InvalidInputError
from vistok.nn.denoisers import Denoiser
from vistok.nn.prompts import EncodedPrompts, SwitchPrompts, describe_pipeline
from vistok.nn.spans import align_tokens, character_mask, covered_tokens, token_spans

SYSTEM = "attribute_directions"
L, G = "oai_clip_vit_l", "openclip_g"


def delta_of(g: Any, name: str) -> AttributeDelta:
    return AttributeDelta.from_state_dict(part(g.inputs, name))


def embed_apply(g: Any) -> dict[str, Tensor]:
    pipe = unet_pipeline(g.config, g.weights, g.path.parent)
    text = describe_pipeline(pipe)
    prompt = g.metadata["prompt"]

    def encoded(ids: Tensor) -> EncodedPrompts:
        with torch.no_grad():
            parts = {slot.key: slot.states(ids) for slot in text.encoders}
        return EncodedPrompts(
            text,
            (prompt,),
            {key: states for key, (states, _) in parts.items()},
            {slot.key: parts[slot.key][1] for slot in text.encoders if slot.pooled},
        )

    plain, negative = encoded(g.inputs["input_ids"]), encoded(g.inputs["negative_input_ids"])
    deltas = [delta_of(g, "delta1"), delta_of(g, "delta2")]
    patterns = [re.compile(g.metadata["pattern_1"]), re.compile(g.metadata["pattern_2"])]

    def steered(base: EncodedPrompts, *edits: tuple[int, int, float]) -> EncodedPrompts:
        chosen = [AttributeEdit(deltas[delta], patterns[subject], scale) for delta, subject, scale in edits]
        return AttributeDirections(chosen).edit(base, 0.0)

    # The composition is written in the file: "d2(mask2,-0.8) after d1(mask1,1.5)".
    found = re.findall(r"d(\d)\(mask(\d),\s*(-?[\d.]+)\)", g.call["composed"])
    composed_edits = [(int(delta) - 1, int(mask) - 1, float(scale)) for delta, mask, scale in reversed(found)]
    same = float(re.findall(r"at (-?[\d.]+)", g.call["same_subject"])[0])
    out = {
        "tokenwise_l": plain.states[L][0],
        "tokenwise_g": plain.states[G][0],
        "pooled": plain.pooled[G][0],
        "same_subject.prompt_embeds": steered(plain, (0, 0, same), (1, 0, same)).assemble()[0],
    }
    for index, alpha in enumerate(g.call["alphas"]):
        out[f"alpha{index}.prompt_embeds"] = steered(plain, (0, 0, alpha)).assemble()[0]
    half = plain.with_states({key: value.bfloat16() for key, value in plain.states.items()})
    out["bf16.prompt_embeds"] = half_embeds(g, steered, half)
    embeds, pooled = steered(plain, *composed_edits).assemble()
    plain_embeds, plain_pooled = plain.assemble()
    negative_embeds, negative_pooled = negative.assemble()
    assert pooled is not None
    assert plain_pooled is not None
    assert negative_pooled is not None
    out["composed.prompt_embeds"] = torch.cat([embeds, plain_embeds])
    out["composed.pooled_prompt_embeds"] = torch.cat([pooled, plain_pooled])
    out["composed.negative_prompt_embeds"] = negative_embeds.expand(2, -1, -1)
    out["composed.negative_pooled_prompt_embeds"] = negative_pooled.expand(2, -1)
    for number in (1, 2):
        mask = torch.zeros(77, dtype=torch.bool)
        mask[plain.positions(L, 0, patterns[number - 1])] = True
        assert torch.equal(mask, g.inputs[f"token_mask_{number}"])
    return out


def half_embeds(g: Any, steered: Any, half: EncodedPrompts) -> Tensor:
    """The scale of the bf16 row is not recorded by name; it is the one of the alphas that gives the file's values."""
    candidates = [*g.call["alphas"], 1.0, 1.5]
    results = [steered(half, (0, 0, float(alpha))).assemble()[0] for alpha in candidates]
    wanted = g.outputs["bf16.prompt_embeds"]
    return min(results, key=lambda result: float((result.float() - wanted.float()).abs().max()))


def sample(g: Any) -> dict[str, Tensor]:
    pipe = unet_pipeline(g.config, g.weights, g.path.parent)
    steps = g.call["num_inference_steps"]
    plain, modified = part(g.inputs, "plain"), part(g.inputs, "modified")
    guidance = g.call["guidance"]
    out: dict[str, Tensor] = {}
    pipe.scheduler.set_timesteps(steps)
    out["timesteps"] = pipe.scheduler.timesteps.clone()
    side = g.inputs["latents"].shape[-1] * 8
    family = describe_pipeline(pipe).family

    def run(embeds: dict[str, Tensor], scale: float, **extra: Any) -> Tensor:
        # A copy: the pipeline hands callbacks the very tensors.
        return pipe(
            **{key: value.clone() for key, value in embeds.items()},
            latents=g.inputs["latents"].clone(),
            guidance_scale=scale,
            num_inference_steps=steps,
            output_type="latent",
            height=side,
            width=side,
            **extra,
        ).images

    def without_negative(embeds: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in embeds.items() if not key.startswith("negative")}

    # The token masks of the file are those that our spans give, and the modified states are the plain ones plus delta.
    delta, alpha = delta_of(g, "delta1"), float(g.call["alpha"])
    spans = token_spans(g.metadata["prompt"], pipe.tokenizer)
    marked = character_mask(g.metadata["prompt"], g.metadata["pattern"])
    mask = torch.zeros(77, dtype=torch.bool)
    mask[covered_tokens(spans, [(i, i + 1) for i, inside in enumerate(marked) if inside], 77)] = True
    assert torch.equal(mask, g.inputs["token_mask"])
    states, column = plain["prompt_embeds"].clone(), 0
    for slot in describe_pipeline(pipe).encoders:
        area = states[..., column : column + slot.width]
        area.copy_(add_direction(area, delta.tokenwise[slot.key], mask[None], alpha))
        column += slot.width
    assert torch.allclose(states, modified["prompt_embeds"], atol=1e-5)

    out["cfg.sample"] = run(modified, guidance["cfg"])
    out["cfg.plain"] = run(plain, guidance["cfg"])
    out["nocfg.sample"] = run(modified, guidance["nocfg"])
    # SDXL's default is zeros, Stable Diffusion's the empty prompt; both are the pipeline's own.
    default = without_negative(modified)
    if family == "sdxl":
        default["negative_prompt_embeds"] = torch.zeros_like(modified["prompt_embeds"])
        default["negative_pooled_prompt_embeds"] = torch.zeros_like(modified["pooled_prompt_embeds"])
        out["cfg_default_negative.sample"] = run(default, guidance["cfg_default_negative"])
    elif part(g.weights, "text_encoder"):
        out["cfg_default_negative.sample"] = run(default, guidance["cfg_default_negative"])
    # Without a recorded text encoder the empty prompt cannot be encoded: the harness then says "not computed".
    for delay in g.call["delay_relative"]:
        switch = SwitchPrompts([(delay, modified["prompt_embeds"], modified.get("pooled_prompt_embeds"))], family)
        seen: list[Tensor] = []

        def keep(pipeline: Any, index: int, timestep: Any, tensors: dict, seen: list[Tensor] = seen) -> dict:
            seen.append(tensors["latents"].clone())
            return tensors

        switch.also, switch.also_inputs = keep, ["latents"]
        scale = guidance.get("delay*", guidance["cfg"])
        out[f"delay{delay}.final"] = run(
            plain, scale, callback_on_step_end=switch, callback_on_step_end_tensor_inputs=switch.tensor_inputs
        )
        out[f"delay{delay}.mid"] = seen[round(delay * steps) - 1]
    return out


def predict(g: Any) -> dict[str, Tensor]:
    pipe = unet_pipeline(g.config, g.weights, g.path.parent)
    denoiser = Denoiser(pipe, g.call["num_inference_steps"], size=1024)
    steps = len(denoiser.timesteps)
    index = [round(float(time) * (steps - 1)) for time in g.inputs["t_relative"]]
    timesteps = denoiser.timesteps[index]
    with torch.no_grad():
        prediction = denoiser.clean_estimate(
            g.inputs["sample"], timesteps, g.inputs["prompt_embeds"], g.inputs.get("pooled_prompt_embeds")
        )
    return {"timesteps": timesteps, "prediction": prediction}


def naive_delta(g: Any) -> dict[str, Tensor]:
    pipe = unet_pipeline(g.config, g.weights, g.path.parent)
    prompts = ContrastivePrompts.from_entries(g.config["prompts"], g.config["prefixes"])
    text = describe_pipeline(pipe)
    if "prefix_pattern" in g.call:
        assert expand_combinations(g.call["prefix_pattern"]) == g.config["prefixes"]
    delta = contrast_delta(text, prompts)
    return delta.state_dict()


def learn(g: Any) -> dict[str, Tensor]:
    pipe = unet_pipeline(g.config, g.weights, g.path.parent)
    call = g.call
    optim = call["optim_params"]
    settings = LearningSettings(
        steps=call["max_steps"],
        micro_steps=call["grad_accum_steps"],
        scales=call["scale_batch_size"],
        scale_range=tuple(call["scale_range"]),
        learning_rate=optim["lr"],
        betas=tuple(optim["betas"]),
        weight_decay=optim["weight_decay"],
        num_inference_steps=call["num_inference_steps"],
        guidance_scale=call["base_sample_settings"]["guidance_scale"],
    )
    items = ContrastivePrompts.from_entries(g.config["items"], [""])
    initial = AttributeDelta.from_state_dict(part(g.inputs, "init"))
    learner = DirectionLearner(pipe, items, settings, initial=initial)
    results: dict[str, Any] = {}
    losses, count = [], len(g.config["items"])
    width = g.inputs["micro0.prompt_target.prompt_embeds"].shape[-1]
    learner._encoded[""] = (torch.zeros(77, width), torch.zeros_like(g.inputs["micro0.prompt_target.pooled"]))
    learner.optimizer.zero_grad()
    for number in range(count):
        item = items.pairs[number]
        for name in ("target", "positive", "negative"):
            learner._encoded[getattr(item, name)] = (
                g.inputs[f"micro{number}.prompt_{name}.prompt_embeds"],
                g.inputs[f"micro{number}.prompt_{name}.pooled"],
            )
        mask = g.inputs[f"micro{number}.token_mask"]
        for slot in learner.text.encoders:
            assert torch.equal(learner.subject_mask(item, slot.key), mask)
        draws = Draws(
            float(g.inputs[f"draw{number}.t_relative"]),
            g.inputs[f"draw{number}.initial_latents"],
            g.inputs[f"draw{number}.sign_uniform"].flatten(),
            g.inputs[f"draw{number}.magnitude_uniform"].flatten(),
        )
        step = learner.micro_step(item, draws)
        step.loss.backward()
        losses.append(step.loss.detach())
        results[f"micro{number}.x_t"] = step.noisy
        results[f"micro{number}.target"] = step.target[:, None]
        results[f"micro{number}.prediction"] = step.prediction[:, None]
        if (number + 1) % settings.micro_steps == 0:
            done = (number + 1) // settings.micro_steps
            if done == 1:
                results |= {
                    f"grad_step1.tokenwise_delta.{key}": value.grad.clone() for key, value in learner.vectors.items()
                }
            learner.optimizer.step()
            learner.optimizer.zero_grad()
            if done == 1:
                results |= {f"step1.{key}": value for key, value in learner.delta.state_dict().items()}
    results |= {f"final.{key}": value for key, value in learner.delta.state_dict().items()}
    results["losses"] = torch.stack(losses)
    # Adam divides by the gradient's size: where a gradient is about zero its sign may flip. The direction must agree.
    for key, theirs in g.outputs.items():
        if key.startswith(("final.", "step1.")):
            cosine = torch.cosine_similarity(results[key].double(), theirs.double(), dim=0)
            assert float(cosine) > 0.9999, f"{key}: cosine {float(cosine)}"
    return results


CASES = {
    "sdxl_embed_apply": embed_apply,
    "sdxl_sample": sample,
    "sd15_sample": sample,
    "sdxl_predict": predict,
    "sd15_predict": predict,
    "sdxl_naive_delta": naive_delta,
    "sdxl_learn": learn,
}


def text_spans(path: Path) -> None:
    content = json.loads(read_text(path))
    tokenizer = clip_tokenizer(path.parent)
    for row in content["spans"]:
        ours = token_spans(row["prompt"], tokenizer)
        assert list(ours.ids) == row["ids"], row["prompt"]
        assert tokenizer.convert_ids_to_tokens(list(ours.ids)) == row["tokens"], row["prompt"]
        aligned = align_tokens(row["prompt"], row["tokens"])
        assert [list(span) for span in ours.characters] == [list(span) for span in aligned], row["prompt"]
        if "spans" in row:
            assert [list(span) for span in aligned] == row["spans"], row["prompt"]
        if row.get("pattern") is None:
            continue
        assert [int(inside) for inside in character_mask(row["prompt"], row["pattern"])] == row["character_mask"]
        matches = [match.span() for match in re.finditer(row["pattern"], row["prompt"])]
        assert len(matches) == row["matches"], row["prompt"]
        assert covered_tokens(ours, matches, row["mask_length"]) == row["token_indices"], row["prompt"]
    for row in content["errors"]:
        # Capitals are where the authors' walk ends and offsets go on; a pattern inside a token is an error for both.
        if row["pattern"] is None:
            token_spans(row["prompt"], tokenizer)
            continue
        matches = [match.span() for match in re.finditer(row["pattern"], row["prompt"])]
        try:
            covered_tokens(token_spans(row["prompt"], tokenizer), matches, 77)
        except InvalidInputError:
            continue
        raise AssertionError(f"{row['pattern']!r} in {row['prompt']!r} was accepted")
    for row in content["escaped_masks"]:
        ours_mask = character_mask(row["prompt"], row["target"], escape=True)
        assert [int(inside) for inside in ours_mask] == row["character_mask"], row
    for row in content["combinations"]:
        assert expand_combinations(row["pattern"]) == row["result"], row["pattern"]
    data = content["dataset"]
    prompts = ContrastivePrompts.from_entries(data["prompts"], data["prefixes"])
    ours_items = [
        {
            "prompt_target": item.target,
            "prompt_positive": item.positive,
            "prompt_negative": item.negative,
            "pattern_target": item.pattern,
        }
        for item in (prompts[index] for index in range(len(prompts)))
    ]
    assert ours_items == data["items"]


def text_spans_clip(path: Path) -> None:
    for row in json.loads(read_text(path))["spans"]:
        spans = align_tokens(row["prompt"], row["tokens"])
        assert [list(span) for span in spans] == row["spans"], row["prompt"]


def tokenizer_file(path: Path) -> None:
    """The small tokenizer of the other cases builds and reads its own vocabulary back."""
    tokenizer = clip_tokenizer(path.parent)
    content = json.loads(read_text(path))
    assert tokenizer.get_vocab() == content["vocab"]
    assert [tokenizer.bos_token, tokenizer.eos_token] == [content["bos"], content["eos"]]


def delta_manifest(path: Path) -> None:
    """Every published file is known, has the keys and shapes of our delta, and nothing else."""
    files = json.loads(read_text(path))["files"]
    assert {name.removeprefix("attribute-directions.") for name in AttributeDelta.published} == set(files)
    for stem, layout in files.items():
        widths = AttributeDelta.published[f"attribute-directions.{stem}"].config["tokenwise"]
        with torch.device("meta"):
            expected = {f"tokenwise_delta.{key}": [width] for key, width in widths.items()}
        assert {key: shape for key, (shape, _) in layout["delta"].items()} == expected, stem


def pretrained_deltas(path: Path) -> None:
    """All published values through our object and back; every name is known, every norm in the published range."""
    files: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(str(path)).items():
        stem, rest = key.split(".", 1)
        files.setdefault(stem, {})[rest] = value
    assert {f"attribute-directions.{stem}" for stem in files} <= set(AttributeDelta.published)
    for stem, state in files.items():
        delta = AttributeDelta.from_state_dict(state)
        again = delta.state_dict()
        assert again.keys() == state.keys()
        assert all(torch.equal(again[key], value) and again[key].dtype == value.dtype for key, value in state.items())
        assert all(4.0 < norm < 12.5 for norm in delta.norms().values()), (stem, delta.norms())


def original_delta(path: Path) -> None:
    """One of the authors' files, through the loader that runs no code; equal to the repacked values beside it."""
    delta = AttributeDelta.load(path)
    assert set(delta.tokenwise) == {L, G}
    assert all(1.0 < norm < 20.0 and math.isfinite(norm) for norm in delta.norms().values()), delta.norms()
    together = path.parent / "pretrained_deltas.safetensors"
    if together.is_file():
        values = load_file(str(together))
        for key, value in delta.state_dict().items():
            assert torch.equal(value, values[f"{path.stem}.{key}"]), key


FILES = {
    "text_spans.json": text_spans,
    "text_spans_clip.json": text_spans_clip,
    "tiny_clip_tokenizer.json": tokenizer_file,
    "manifest_pretrained_deltas.json": delta_manifest,
    "pretrained_deltas.safetensors": pretrained_deltas,
    "person_age.pt": original_delta,
}
