"""FlexTok against the authors' modules: training, tokens, the flow decoder, its parts, preprocessing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vistok.kernels.finite_scalar import bound, finite_scalar, finite_scalar_codes, finite_scalar_quantize
from vistok.nn.flow import interpolate, velocity_target
from vistok.nn.model import describe_mismatch
from vistok.tokenizers.flextok import FlexTok
from vistok.tokenizers.flextok.blocks import (
    Attend,
    Block,
    CrossBlock,
    Modulate,
    Norm,
    PositionTable,
    ProjectionHead,
    TimeEmbedding,
    masked_attention,
    merge_block_keys,
    sinusoids,
    unpatchify,
)
from vistok.tokenizers.flextok.decoder import Registers, _Rows
from vistok.tokenizers.flextok.flow import (
    NormalizedGuidance,
    classifier_free_guidance,
    next_power_of_two,
    noise_levels,
)

SYSTEM = "flextok"


def build(g: Any) -> FlexTok:
    return FlexTok.from_official(g.weights, g.config)


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------------- whole network


def encoder_parts(model: FlexTok, latents: Tensor) -> dict[str, Tensor]:
    encoder, count = model.encoder, model.num_registers
    features = encoder.features(latents, count)
    z = encoder.head(encoder.norm(features))
    quant, tokens = model.quantize(z)
    assert torch.equal(tokens, model.tokenize_latents(latents).ids)
    return {
        "enc_patch_emb": encoder.patch_embedding(latents),
        "enc_patches_in": encoder.embed(latents),
        "enc_registers_out": features,
        "enc_z": z,
        "quant": quant,
        "tokens": tokens,
    }


def spread(registers: Registers, rows: Sequence[Tensor], kept: Sequence[int], total: int) -> Tensor:
    """Register rows of each group as [B, N, D]: the one row that stands for all dropped ones is written N - k times."""
    samples: dict[int, Tensor] = {}
    order = iter(registers.order.tolist())
    for group in rows:
        for own in group:
            sample = next(order)
            length = kept[sample]
            dropped = own[:1].expand(total - length, -1)
            first = len(own) - max(kept_in_group(registers, sample, kept), 0)
            samples[sample] = torch.cat([own[first : first + length], dropped])
    return torch.stack([samples[sample] for sample in sorted(samples)])


def kept_in_group(registers: Registers, sample: int, kept: Sequence[int]) -> int:
    """The longest length in the group of a sample."""
    start = 0
    order = registers.order.tolist()
    for group in registers.groups:
        members = order[start : start + len(group.tokens)]
        if sample in members:
            return max(kept[member] for member in members)
        start += len(group.tokens)
    raise AssertionError(sample)


def decoder_parts(
    model: FlexTok, x_t: Tensor, t: Tensor, codes: Tensor, lengths: Sequence[int], dropped: Sequence[bool]
) -> dict[str, Tensor]:
    decoder, total = model.decoder, model.num_registers
    registers = decoder.registers(codes, lengths, dropped)
    kept = [0 if gone else min(length, total) for length, gone in zip(lengths, dropped)]
    found: dict[str, Tensor] = {}
    inverse = torch.argsort(registers.order)
    grid = tuple(side // model.config.patch_size for side in x_t.shape[2:])

    def observe(index: int, x: Tensor, rows: _Rows) -> None:
        patches = x[: rows.split].unflatten(0, (rows.batch, -1)).index_select(0, inverse).unflatten(1, grid)
        if index == model.config.repa_layer:
            found["dec_patches_repa_layer"] = patches
        if index + 1 == len(decoder.blocks):
            found["dec_patches_out"] = patches
            groups = [x[own].unflatten(0, (len(group.tokens), -1)) for _, own, group in rows._places()]
            found["dec_registers_out"] = spread(registers, groups, kept, total)

    velocity = decoder(x_t, registers, decoder.modulations(t), observe)
    short = decoder(x_t, registers, decoder.modulations(t))  # as it runs without anybody observing
    torch.testing.assert_close(short, velocity, rtol=1e-4, atol=1e-5)
    return found | {
        "dec_registers_in": decoder.embed_codes(codes),
        "dec_registers_masked": spread(registers, [group.tokens for group in registers.groups], kept, total),
        "dec_patches_in": decoder.embed(x_t),
        "dec_temb": decoder.time_embedding(t),
        "velocity": velocity,
    }


def tokenizer_train(g: Any) -> dict[str, Tensor]:
    model = build(g).train()
    config, inputs = model.config, g.inputs
    images = inputs["images"]
    latents = model.encode_latents(images, sample_posterior=config.sample_posterior, noise=inputs.get("vae_noise"))
    posterior = model.vae.encode(images).latent_dist
    sigmas = noise_levels(inputs["sigma_draw"], config.noise_schedule, config.mode_scale)
    lengths = inputs["keep_k"].tolist()
    dropped = (inputs["null_u"] < config.condition_dropout).tolist()
    noise = inputs["flow_noise"]
    losses = model.flow_loss(latents, noise, sigmas, lengths, dropped)
    losses["loss"].backward()
    outputs: dict[str, Tensor] = {"loss": losses["loss"].view(1)}
    with torch.no_grad():
        encoded = encoder_parts(model, latents)
        noised = interpolate(latents, noise, sigmas.view(-1, 1, 1, 1))
        decoded = decoder_parts(model, noised, sigmas, encoded["quant"], lengths, dropped)
        torch.testing.assert_close(
            losses["flow"], functional.mse_loss(decoded["velocity"], velocity_target(latents, noise))
        )
        outputs |= encoded | decoded
        outputs |= {
            "vae_latents": latents,
            "vae_kl": posterior.kl(),
            "sigmas": sigmas,
            "noised": noised,
            "keep_k": inputs["keep_k"],
        }
        # Gradients carry the names of their parameters; move them to the authors' names the way weights go.
        for parameter in model.parameters():
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
        gradients = model.to_official()
    return outputs | {f"grad.{name}": value for name, value in gradients.items()}


@torch.no_grad()
def tokenizer_encode(g: Any) -> dict[str, Tensor]:
    model = build(g)
    images, noise = g.inputs["images"], g.inputs["vae_noise"]
    sampled = model.encode_latents(images, sample_posterior=True, noise=noise)
    mean = model.encode_latents(images)
    outputs = {"mode.vae_latents": mean, "sampled.tokens": model.tokenize_latents(sampled).ids}
    outputs |= {f"mode.{name}": value for name, value in encoder_parts(model, mean).items()}
    assert torch.equal(outputs["mode.tokens"], model.encode(images).ids)
    for index in range(sum(name.startswith("latents_") for name in g.inputs)):
        latents = g.inputs[f"latents_{index}"]
        outputs[f"packed.z_{index}"] = model.encoder(latents, model.num_registers)
        outputs[f"packed.tokens_{index}"] = model.tokenize_latents(latents).ids
        few = model.tokenize_latents(latents, max(1, model.num_registers // 3)).ids
        assert torch.equal(few, outputs[f"packed.tokens_{index}"][:, : few.shape[1]])
    return outputs | {"embedding": finite_scalar_codes(g.inputs["ids"], model.levels)}


@torch.no_grad()
def decoder_step(g: Any) -> dict[str, Tensor]:
    model = build(g)
    codes = finite_scalar_codes(g.inputs["ids"], model.levels)
    count, total = len(codes), model.num_registers
    runs: dict[str, tuple[list[int], list[bool]]] = {
        "full": ([total] * count, [False] * count),
        "keep": (g.call.get("keep_k", [total] * count), [False] * count),
        "uncond": ([total] * count, [True] * count),
        "mixed": (g.call.get("keep_k", [total] * count), g.call.get("drop", [False] * count)),
    }
    outputs = {}
    for name, (lengths, dropped) in runs.items():
        parts = decoder_parts(model, g.inputs["x_t"], g.inputs["t"], codes, lengths, dropped)
        outputs |= {f"{name}.{part}": value for part, value in parts.items()}
    return outputs


def sampler_settings(g: Any) -> dict[str, Any]:
    scale = g.call["guidance_scale"]
    if isinstance(scale, Mapping):
        base, slope = scale["base"], scale["slope"]
        scale = lambda t: base + slope * t  # noqa: E731
    sides = g.call["vae_image_sizes"]
    sides = [sides, sides] if isinstance(sides, int) else sides
    return {
        "num_inference_steps": g.call["timesteps"],
        "guidance_scale": scale,
        "guidance": "normalized" if g.call["perform_norm_guidance"] else "classifier_free",
        "sides": sides,
    }


@torch.no_grad()
def run_sampler(model: FlexTok, g: Any, tokens: Any) -> dict[str, Tensor]:
    settings = sampler_settings(g)
    size = [side * model.downsample_factor for side in settings.pop("sides")]
    noise = g.inputs["noise"]
    states = [noise, *model.denoise(tokens, noise=noise, image_size=size, **settings)]
    images = model.decode(tokens, noise=noise, image_size=size, **settings)
    return {"trajectory": torch.stack(states[:-1]), "latents": states[-1], "images": images}


def detokenize(g: Any) -> dict[str, Tensor]:
    model = build(g)
    sequences = [row[:length] for row, length in zip(g.inputs["ids"], g.call["keep_k"])]
    return run_sampler(model, g, sequences)


@torch.no_grad()
def autoencode(g: Any) -> dict[str, Tensor]:
    model = build(g)
    sampled = model.config.sample_posterior
    latents = model.encode_latents(g.inputs["images"], sample_posterior=sampled, noise=g.inputs.get("vae_noise"))
    tokens = model.tokenize_latents(latents)
    return {"vae_latents": latents, "tokens": tokens.ids, **run_sampler(model, g, tokens)}


# --------------------------------------------------------------------------------------------------------------- parts


def fsq(g: Any) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    for index, levels in enumerate(g.config["levels"]):
        z = g.inputs[f"z_{index}"].clone().requires_grad_(True)
        quant, tokens = finite_scalar_quantize(z, levels)
        (quant * g.inputs[f"w_{index}"]).sum().backward()
        assert torch.equal(finite_scalar(z.flatten(0, -2), levels).view(tokens.shape), tokens)
        ids = g.inputs[f"ids_{index}"]
        codes = finite_scalar_codes(ids, levels)
        half = torch.tensor(levels) // 2
        steps = torch.tensor([math.prod(levels[:channel]) for channel in range(len(levels))])
        outputs |= {
            f"bounded_{index}": bound(z, levels),
            f"quant_{index}": quant,
            f"tokens_{index}": tokens,
            f"grad_{index}": z.grad,
            f"embedding_{index}": codes,
            f"roundtrip_{index}": ((codes * half + half).round().long() * steps).sum(-1),
            f"codebook_{index}": finite_scalar_codes(torch.arange(math.prod(levels)), levels)
            if f"codebook_{index}" in g.outputs
            else codes,
        }
    if "bernoulli" in g.inputs:
        unrounded = g.inputs["bernoulli"].bool()[:, None]
        quant, tokens = finite_scalar_quantize(g.inputs["z_0"], g.config["levels"][0], unrounded)
        outputs |= {"dropq.quant": quant, "dropq.tokens": tokens}
    return outputs


def guidance(g: Any) -> dict[str, Tensor]:
    cond, uncond = g.inputs["cond"], g.inputs["uncond"]
    outputs = {
        "cfg": torch.stack([classifier_free_guidance(c, u, g.call["cfg_scale"]) for c, u in zip(cond, uncond)]),
    }
    for index, setting in enumerate(g.call["settings"]):
        options = dict(setting)
        scale = options.pop("scale")
        guide = NormalizedGuidance(**options)
        outputs[f"apg_{index}"] = torch.stack([guide(c, u, scale) for c, u in zip(cond, uncond)])
    return outputs


def noise_schedule(g: Any) -> dict[str, Tensor]:
    outputs = {}
    for index, setting in enumerate(g.call["settings"]):
        schedule, draws = "mode", g.inputs["u"]
        if setting["ln"]:
            schedule = "stratified" if setting["stratisfied"] else "logit_normal"
            draws = g.inputs["u"] if setting["stratisfied"] else g.inputs["nt"]
        sigmas = noise_levels(draws, schedule, setting["mode_scale"])
        sides = [-1] + [1] * (g.inputs["x"].ndim - 1)
        outputs[f"sigmas_{index}"] = sigmas
        outputs[f"noised_{index}"] = interpolate(g.inputs["x"], g.inputs["noise"], sigmas.view(sides))
    return outputs


@torch.no_grad()
def position_time(g: Any) -> dict[str, Tensor]:
    outputs = {}
    for index, setting in enumerate(g.call["posembs"]):
        table = PositionTable(setting["dim"], setting["max_sizes"], setting["posemb_type"], setting["posemb_scaling"])
        if f"posemb_{index}.posembs" in g.weights:
            table.table.copy_(g.weights[f"posemb_{index}.posembs"])
        outputs[f"table_{index}"] = table.full()
        for number, shape in enumerate(setting["shapes"]):
            outputs[f"posemb_{index}_{number}"] = table(shape)
    for index, setting in enumerate(g.call["time"]):
        size, features, longest = setting["dim"], setting["frequency_embedding_size"], setting["max_timestep"]
        embedding = TimeEmbedding(size, features, longest)
        prefix = f"time_{index}."
        embedding.load_state_dict({k.removeprefix(prefix): v for k, v in g.weights.items() if k.startswith(prefix)})
        t = g.inputs["t"] * setting["t_scale"]
        outputs |= {f"freq_{index}": sinusoids(t, features, longest), f"temb_{index}": embedding(t)}
    return outputs


@torch.no_grad()
def vae(g: Any) -> dict[str, Tensor]:
    overrides, wrapper = g.config["vae_base_cfg_overrides"], g.config["wrapper"]
    model = FlexTok.tiny(
        vae_block_out_channels=overrides["block_out_channels"],
        vae_layers_per_block=overrides["layers_per_block"],
        vae_norm_groups=overrides["norm_num_groups"],
        latent_channels=wrapper["latent_channels"],
        scaling_factor=wrapper["scaling_factor"],
    )
    model.vae.load_state_dict({key.removeprefix("vae."): value for key, value in g.weights.items()})
    images, latents = g.inputs["images"], g.inputs["latents"]
    posterior = model.vae.encode(images).latent_dist
    middle: list[Tensor] = []
    hook = model.vae.decoder.mid_block.register_forward_hook(lambda module, inputs, output: middle.append(output))
    model.vae.decode(latents)
    hook.remove()
    sampled = wrapper.get("sample_posterior", True)
    return {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "std": posterior.std,
        "kl": posterior.kl(),
        "h_enc": model.vae.encoder(images),
        "h_dec_mid": middle[0],
        "latents": model.encode_latents(images, sample_posterior=sampled, noise=g.inputs.get("noise")),
        "decoded": model.decode_latents(latents),
    }


class PackedModulation(Modulate):
    """Modulation of a packed sequence: each row has its own (sample, segment); the padding has none."""

    def __init__(self, lengths: Sequence[Sequence[int]], padding: int) -> None:
        self.lengths, self.padding = lengths, padding

    def rows(self, value: Tensor) -> Tensor:
        """[B, E, D] -> [1, L, D]."""
        parts = [
            value[sample, min(segment, value.shape[1] - 1)].expand(length, -1)
            for sample, lengths in enumerate(self.lengths)
            for segment, length in enumerate(lengths)
        ]
        return torch.cat([*parts, value.new_zeros(self.padding, value.shape[2])])[None]

    def scale(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return x * (1 + self.rows(scale)) + self.rows(shift)

    def add(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return x + self.rows(gate) * branch


def block_arguments(spec: Mapping[str, Any]) -> dict[str, Any]:
    args = dict(spec["args"])
    renamed = {"dim": "size", "act_layer": "activation", "muP_scale": "mup_scale", "adaLN_expansion": "expansion"}
    arguments = {renamed.get(name, name): value for name, value in args.items()}
    return arguments | {"affine_norm": spec.get("affine_norm", False)}


@torch.no_grad()
def blocks(g: Any) -> dict[str, Tensor]:
    x = g.inputs["x"]
    attend: Attend = masked_attention(g.inputs["mask"].bool())
    outputs = {}
    for index, spec in enumerate(g.config["blocks"]):
        prefix = f"block_{index}."
        state = {key.removeprefix(prefix): value for key, value in g.weights.items() if key.startswith(prefix)}
        arguments = block_arguments(spec)
        cross = "Decoder" in spec["cls"]
        block: nn.Module = (CrossBlock if cross else Block)(**arguments)
        block.load_state_dict(merge_block_keys(state))
        inputs: list[Any] = [x, attend]
        if cross:
            inputs = [x, g.inputs["ctx"], attend, masked_attention(g.inputs["xmask"].bool())]
        if arguments.get("expansion") is None:
            outputs[f"y_{index}"] = block(*inputs)
        else:
            lengths = [[math.prod(shape) for shape in shapes] for shapes in spec["subseqs"]]
            padding = x.shape[1] - sum(map(sum, lengths))
            modulation = block.modulations(functional.silu(g.inputs["emb"]))
            outputs[f"y_{index}"] = block(*inputs, modulation, PackedModulation(lengths, padding))
    return outputs


def packing(g: Any) -> dict[str, Tensor]:
    """The packed form of a batch: it never exists here, but who sees whom is the same."""
    count = sum(name.startswith("a_") for name in g.inputs)
    samples = [(g.inputs[f"a_{index}"].flatten(1, -2), g.inputs[f"b_{index}"]) for index in range(count)]
    lengths = [(a.shape[1], b.shape[1]) for a, b in samples]
    side = g.outputs["mask_full"].shape[0]
    masks = {mode: torch.zeros(side, side, dtype=torch.bool) for mode in ("full", "causal", "causal_last")}
    start = 0
    for patches, registers in lengths:
        total = patches + registers
        own = slice(start, start + total)
        masks["full"][own, own] = True
        masks["causal"][own, own] = torch.ones(total, total, dtype=torch.bool).tril()
        masks["causal_last"][own, own] = torch.ones(total, total, dtype=torch.bool).tril()
        masks["causal_last"][own, start : start + patches] = True
        start += total
    assert start == g.call["n_real"]
    packed = torch.cat([part for sample in samples for part in sample], dim=1)
    emb = g.inputs["emb"].unflatten(1, (2, -1))
    expanded = PackedModulation(lengths, 0).rows(emb)
    return {
        "packed": functional.pad(packed, (0, 0, 0, g.outputs["packed"].shape[1] - start)),
        "expanded": expanded,
        **{f"mask_{mode}": mask for mode, mask in masks.items()},
    }


@torch.no_grad()
def nested_dropout(g: Any) -> dict[str, Tensor]:
    x = g.inputs["x"]
    count, total, _ = x.shape
    model = FlexTok.tiny(num_registers=total, decoder_size=32).decoder
    # The decoder's registers are checked on the recorded rows themselves: nothing is added to them.
    model.mask_token.data = g.weights["dropout_mask_token"]
    model.null_token.data = g.weights["nullcond"]
    model.embed_codes = lambda rows: rows  # type: ignore[method-assign]

    def kept(lengths: Sequence[int], dropped: Sequence[bool]) -> Tensor:
        registers = model.registers(x, lengths, dropped)
        shown = [0 if gone else min(length, total) for length, gone in zip(lengths, dropped)]
        return spread(registers, [group.tokens for group in registers.groups], shown, total)

    none = [False] * count
    uniform, pow2 = g.inputs["draw_uniform"].tolist(), g.inputs["draw_pow2"].tolist()
    rounded = [next_power_of_two(length) for length in uniform]
    outputs = {"eval.x": kept(g.call["eval_keep_k"], none)}
    for name, lengths in (("uniform", uniform), ("pow2", pow2), ("uniform_pow2", rounded)):
        outputs |= {f"{name}.keep_k": torch.tensor(lengths), f"{name}.x": kept(lengths, none)}
    outputs["uniform_pow2.map"] = torch.tensor([[k, next_power_of_two(k)] for k in range(1, total + 1)])
    dropped = (g.inputs["null_u"] < 0.5).tolist()
    outputs["null.x"] = kept([total] * count, dropped)
    single = model.registers(x, [total] * count, dropped)
    rows: dict[int, Tensor] = {}
    for sample, own in zip(single.order.tolist(), [row for group in single.groups for row in group.tokens]):
        rows[sample] = own[:1] if dropped[sample] else own[-total:]
    outputs["null_single.lengths"] = torch.tensor([len(rows[sample]) for sample in range(count)])
    outputs["null_single.x"] = torch.cat([rows[sample] for sample in range(count)])[None]
    for order in ("nested", "avg_pool"):
        encoder = FlexTok.tiny(num_registers=total, register_order=order).encoder
        encoder.registers.data = g.weights["registers"]
        for index, number in enumerate(g.call["register_sizes"]):
            outputs[f"registers_{order}_{index}"] = encoder.initial_registers(number)[None]
    return outputs


@torch.no_grad()
def heads(g: Any) -> dict[str, Tensor]:
    size, outputs = g.config["dim"], {}
    norm = Norm(size)
    weights = g.weights
    hidden = sorted(
        {int(key.split(".")[2]) for key in weights if key.startswith("mlp.mlp.") and key.endswith(".weight")}
    )
    head = ProjectionHead(
        size, weights["mlp.mlp.1.weight"].shape[0], weights["mlp.out_proj.weight"].shape[0], len(hidden)
    )
    state = {f"out.{ending}": weights[f"mlp.out_proj.{ending}"] for ending in ("weight", "bias")}
    for index, number in enumerate(hidden):
        state |= {f"layers.{index}.{ending}": weights[f"mlp.mlp.{number}.{ending}"] for ending in ("weight", "bias")}
    head.load_state_dict(state)
    activated = functional.silu(g.inputs["emb"])
    shift, scale = functional.linear(
        activated, weights["patches.adaLN_modulation.1.weight"], weights["patches.adaLN_modulation.1.bias"]
    ).chunk(2, dim=1)
    for index in range(len(activated)):
        x = g.inputs[f"x_{index}"]
        modulated = norm(x) * (1 + scale[index]) + shift[index]
        patches = functional.linear(modulated, weights["patches.proj.weight"], weights["patches.proj.bias"])
        side = g.outputs[f"patches_{index}"].shape[1] // x.shape[1]
        outputs |= {
            f"linear_{index}": functional.linear(norm(x), weights["linear.proj.weight"], weights["linear.proj.bias"]),
            f"mlp_{index}": head(x),
            f"patches_{index}": channels_last(unpatchify(patches, side)),
        }
    return outputs


def preprocess(g: Any) -> dict[str, Tensor]:
    model = FlexTok.tiny()
    outputs = {}
    for index in range(sum(name.startswith("rgb_") for name in g.inputs)):
        image = Image.fromarray(g.inputs[f"rgb_{index}"].numpy())
        outputs[f"tensor_{index}"] = model.preprocess(image, size=g.call["img_size"])
    pixels = model.postprocess(g.inputs["recon"], "uint8")
    return outputs | {"uint8": torch.cat(list(pixels), dim=1)}


# ----------------------------------------------------------------------------------------------------------- manifests

PUBLISHED = {
    "flextok_d12_d12_in1k": "flextok-d12-d12.imagenet",
    "flextok_d18_d18_in1k": "flextok-d18-d18.imagenet",
    "flextok_d18_d28": "flextok-d18-d28.dfn",
}


def meta_state(keys: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (shape, dtype) in keys.items()}


def manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    entry = FlexTok.published[PUBLISHED[name]]
    state = meta_state(keys)
    with torch.device("meta"):
        model = FlexTok(**entry.config)
    problems = describe_mismatch(model.state_dict(), FlexTok.rename_official(state))
    problems += describe_mismatch(model.to_official(), state)
    assert not problems, "; ".join(problems)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters


def vae_manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    channels = int(name.removeprefix("flextok_vae_c"))
    with torch.device("meta"):
        model = FlexTok(latent_channels=channels, encoder_depth=1, decoder_depth=1)
    problems = describe_mismatch(model.vae.state_dict(), meta_state(keys))
    assert not problems, "; ".join(problems)


def published_config(path: Path) -> None:
    """The parser reads the documented structure, and finds the published shape of the network."""
    name = path.name.removeprefix("config_").removesuffix(".json").removesuffix(".reconstructed")
    entry = FlexTok.published[PUBLISHED[name]]
    content = json.loads(path.read_text(encoding="utf-8"))
    with torch.device("meta"):
        models = [FlexTok(**FlexTok.config_from_official(content)), FlexTok(**entry.config)]
    problems = describe_mismatch(models[0].state_dict(), models[1].state_dict())
    assert not problems, "; ".join(problems)


CASES = {
    "tokenizer_train": tokenizer_train,
    "tokenizer_encode": tokenizer_encode,
    "decoder_step": decoder_step,
    "detokenize": detokenize,
    "autoencode": autoencode,
    "fsq": fsq,
    "guidance": guidance,
    "noise_schedule": noise_schedule,
    "position_time": position_time,
    "vae": vae,
    "blocks": blocks,
    "packing": packing,
    "nested_dropout": nested_dropout,
    "heads": heads,
    "preprocess": preprocess,
}
MANIFESTS = {"flextok_d": manifest, "flextok_vae_c": vae_manifest}
FILES = {"config_flextok_": published_config}
