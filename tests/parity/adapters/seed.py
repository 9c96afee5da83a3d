"""SEED: vision transformer, Q-Former, codes, both training stages, unCLIP, and sequences for a language model."""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PNDMScheduler,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from vistok.nn.model import describe_mismatch
from vistok.tokenizers.seed import (
    SEED,
    ImageVocabulary,
    QFormer,
    SequenceBuilder,
    UnCLIPDecoder,
    interpolate_positions,
)
from vistok.tokenizers.seed.model import _relevant
from vistok.tokenizers.seed.names import qformer_from_official, seed_from_official
from vistok.tokenizers.seed.vision import VisionTransformer
from vistok.tokens import VisualTokens

SYSTEM = "seed"


# ------------------------------------------------------------------------------------------------------------- networks
def vision(config: dict[str, Any]) -> VisionTransformer:
    width = config["embed_dim"]
    return VisionTransformer(
        config["img_size"], 14, width, config["depth"], config["num_heads"], int(width * 4.3637)
    ).eval()


@torch.no_grad()
def eva_vit(g: Any) -> dict[str, Tensor]:
    model = vision(g.config)
    weights = seed_from_official({f"visual_encoder.{key}": value for key, value in g.weights.items()})
    model.load_state_dict({key.removeprefix("vision."): value for key, value in weights.items()})
    states: list[Tensor] = []
    features = model(g.inputs["image"], states)
    return {"features": features, "block_outputs": torch.stack(states)}


def eva_pos_interp(g: Any) -> dict[str, Tensor]:
    model = vision(g.config)
    return {"pos_embed": interpolate_positions(g.inputs["pos_embed"], model.pos_embed.shape[1])}


def qformer(g: Any) -> QFormer:
    bert = g.config["bert"]
    weights = qformer_from_official(g.weights)
    model = QFormer(
        bert["hidden_size"],
        bert["num_hidden_layers"],
        bert["num_attention_heads"],
        bert["intermediate_size"],
        g.config.get(
            "encoder_width", next(v for k, v in g.weights.items() if "crossattention.self.key.w" in k).shape[1]
        ),
        cross_attention_every=g.call.get("cross_attention_freq", 2),
        text_vocab_size=bert["vocab_size"] if "word_embeddings.weight" in weights else None,
        max_positions=bert["max_position_embeddings"],
        language_head="lm_out.weight" in weights,
    )
    if model.word_embeddings is None:  # a file without the words may still hold the feed-forward of the text
        weights = {key: value for key, value in weights.items() if ".text_ffn" not in key}
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def qformer_causal(g: Any) -> dict[str, Tensor]:
    model = qformer(g)
    encoder, mask = g.inputs["encoder_hidden_states"], g.inputs["encoder_attention_mask"]
    causal = g.inputs["query_embeds"].shape[1] == 32
    states: list[Tensor] = []
    cache: list[tuple[Tensor, Tensor]] = []
    last = model(
        g.inputs["query_embeds"], encoder_states=encoder, encoder_mask=mask, causal=causal, states=states, cache=cache
    )
    layer = model.layers[0]
    query, key, _ = (layer.split(part) for part in layer.attention_qkv(states[0]).chunk(3, dim=-1))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -float("inf"))
    after, _ = layer.self_attention(states[0], None, causal, None)
    crossing = layer.split(model.cross_key_value(encoder).chunk(2 * sum(one.cross for one in model.layers), -1)[0])
    seen = mask.bool()[:, None, None]
    cross = (layer.split(layer.cross_query(after)) @ crossing.transpose(-1, -2) * query.shape[-1] ** -0.5).masked_fill(
        ~seen, -float("inf")
    )
    return {
        "last_hidden_state": last,
        "hidden_states": torch.stack(states),
        "self_attention_0": scores.softmax(-1),
        "cross_attention_0": cross.softmax(-1),
        "past_key_1": cache[1][0],
        "past_value_1": cache[1][1],
    }


@torch.no_grad()
def qformer_other_masks(g: Any) -> dict[str, Tensor]:
    model = qformer(g)
    encoder, ids, words = g.inputs["encoder_hidden_states"], g.inputs["input_ids"], g.inputs["text_mask"]
    outputs = {"text_only": model(text_ids=ids, text_mask=words)}
    for name, queries in g.inputs.items():
        if name.startswith("query"):
            number = queries.shape[1]
            outputs[name] = model(queries, encoder_states=encoder, causal=number == 32)
    outputs["multimodal"] = model(g.inputs["query32"], ids, encoder_states=encoder, text_mask=words, causal=True)
    cache: list[tuple[Tensor, Tensor]] = []
    model(g.inputs["query32"], encoder_states=encoder, causal=True, cache=cache)
    states = model(text_ids=ids, text_mask=words, past=cache)
    logits = model.language_logits(states)
    labels = ids.masked_fill(words == 0, -100)
    outputs["lm_logits"] = logits
    outputs["lm_loss"] = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )
    return outputs


# ---------------------------------------------------------------------------------------------------------------- codes
@torch.no_grad()
def encode(g: Any) -> dict[str, Tensor]:
    model = SEED.from_official(g.weights, g.config)
    pixels = g.inputs["image"]
    states = model.causal_embeddings(pixels)
    z = model.project(states)
    quantized, _, ids = model.quantize(z)
    return {
        "image_embeds": model.vision_features(pixels),
        "causal_embeddings": states,
        "query_output_down": z,
        "indices": ids,
        "query_output_up": model.decode_task_layer(quantized),
    }


@torch.no_grad()
def decode(g: Any) -> dict[str, Tensor]:
    model = SEED.from_official(g.weights, g.config)
    return {"image_embeds": model.decode_embeddings(g.inputs["indices"])}


def quantizer_train(g: Any) -> dict[str, Tensor]:
    outputs = {}
    for name, legacy in (("legacy", True), ("fixed", False)):
        model = SEED.tiny(
            codebook_size=g.config["n_e"],
            codebook_dim=g.config["e_dim"],
            codebook_weight=g.config.get("beta", 0.25),
            num_queries=g.inputs["z"].shape[1],
        )
        with torch.no_grad():
            model.codebook.copy_(g.weights["embedding.weight"])
        z = g.inputs["z"].clone().requires_grad_(True)
        quantized, loss, ids = model.quantize(z, legacy=legacy)
        (5 * loss + (quantized * g.inputs["upstream"]).sum()).backward()
        outputs |= {
            f"{name}.z_q": quantized,
            f"{name}.loss": loss,
            f"{name}.indices": ids.flatten(),
            f"{name}.grad_z": z.grad,
            f"{name}.grad_embedding": model.codebook.grad,
        }
    return outputs


# ------------------------------------------------------------------------------------------------------------- training
def gradients(model: SEED, names: list[str]) -> dict[str, Tensor]:
    """Gradients under the authors' names, and their norms in the order of `names`."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    official = model.to_official()
    norms = torch.stack([official[name].norm() for name in names])
    return {"grad_norm": norms, **{f"grad.{name}": official[name] for name in names}}


def train_codebook(g: Any) -> dict[str, Tensor]:
    bert, clip = g.config["bert"], g.config["clip"]
    arguments = SEED.config_from_official(g.config) | {
        "head": "qformer",
        "reverse_layers": g.call.get("reverse_layers", bert["reverse_layers"]),
        "embedding_size": clip["projection_dim"],
        "codebook_size": g.config["n_embed"],
        "dropout": 0.0,
    }
    model = SEED.from_official(g.weights, arguments).train()
    teacher = CLIPVisionModelWithProjection(CLIPVisionConfig(**clip)).eval()
    own = {key.removeprefix("clip_model."): value for key, value in g.weights.items() if key.startswith("clip_model.")}
    load_clip(teacher, own)
    with torch.no_grad():
        target = teacher(g.inputs["image"]).image_embeds
    losses = model.codebook_loss(g.inputs["image"], target)
    losses["loss"].backward()
    with torch.no_grad():
        ids = model.nearest(model.project(model.causal_embeddings(g.inputs["image"])))
    return {
        "clip_image_embeds": target,
        "indices": ids,
        "loss": losses["loss"],
        "loss_embed": losses["codebook"],
        "loss_recon_s": losses["reconstruction"],
        "loss_distil_image": losses["embedding"],
        **gradients(model, g.call["grad_names"]),
    }


def train_itc(g: Any) -> dict[str, Tensor]:
    bert = g.config["bert"]
    arguments = SEED.config_from_official(g.config) | {
        "head": None,
        "text_vocab_size": bert["vocab_size"],
        "contrastive_size": g.config["embed_dim"],
        "dropout": 0.0,
    }
    model = SEED.from_official(g.weights, arguments).train()
    pixels, ids, mask = g.inputs["image"], g.inputs["input_ids"], g.inputs["attention_mask"]
    loss = model.contrastive_loss(pixels, ids, mask)["loss"]
    loss.backward()
    with torch.no_grad():
        images = model.vision_proj(model.causal_embeddings(pixels))
        texts = model.text_proj(model.qformer(text_ids=ids, text_mask=mask)[:, 0])
    return {
        "loss": loss,
        "loss_itc": loss,
        "vision_proj": images,
        "text_proj": texts,
        **gradients(model, g.call["grad_names"]),
    }


# --------------------------------------------------------------------------------------------------------------- unCLIP
def load_clip(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """CLIP weights of old transformers versions: buffers are gone, and a prefix of text and vision models."""
    own = model.state_dict()
    renamed = {}
    for key, value in weights.items():
        if key.endswith("position_ids"):
            continue
        short = key.removeprefix("text_model.")
        renamed[key if key in own or short not in own else short] = value
    model.load_state_dict(renamed)


class Words:
    """A tokenizer that knows one prompt."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.model_max_length = ids, len(ids)

    def __call__(self, prompt: str, **_: Any) -> Any:
        assert prompt == "", "the authors give no prompt"
        return SimpleNamespace(input_ids=torch.tensor([self.ids]))


def painter(config: dict[str, Any], weights: dict[str, Tensor], prompt_ids: list[int]) -> UnCLIPDecoder:
    """Our decoder on a pipeline with these parts."""

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}

    unet, vae = UNet2DConditionModel(**config["unet"]).eval(), AutoencoderKL(**config["vae"]).eval()
    text = CLIPTextModel(CLIPTextConfig(**config["text"])).eval()
    normalizer = StableUnCLIPImageNormalizer(config["image_dim"])
    unet.load_state_dict(part("unet"))
    vae.load_state_dict(part("vae"))
    load_clip(text, part("text_encoder"))
    normalizer.load_state_dict(part("image_normalizer"))
    pipeline = SimpleNamespace(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=Words(prompt_ids),
        scheduler=PNDMScheduler(**config["scheduler"]),
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(**config["noising"]),
    )
    pipeline.noise_image_embeddings = MethodType(StableUnCLIPImg2ImgPipeline.noise_image_embeddings, pipeline)
    return UnCLIPDecoder(pipeline)


@torch.no_grad()
def unclip_noise(g: Any) -> dict[str, Tensor]:
    normalizer = StableUnCLIPImageNormalizer(g.config["image_dim"])
    normalizer.load_state_dict({key.removeprefix("image_normalizer."): value for key, value in g.weights.items()})
    others = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
    pipeline = SimpleNamespace(
        image_normalizer=normalizer,
        image_noising_scheduler=DDPMScheduler(**g.config["noising"]),
        **{name: SimpleNamespace() for name in others},
    )
    pipeline.noise_image_embeddings = MethodType(StableUnCLIPImg2ImgPipeline.noise_image_embeddings, pipeline)
    decoder = UnCLIPDecoder(pipeline)
    return {
        f"level_{level}": decoder.noised(g.inputs["image_embeds"], level, g.inputs["noise"])
        for level in g.call["noise_level"]
    }


@torch.no_grad()
def unclip_loop(g: Any) -> dict[str, Tensor]:
    decoder = painter(g.config, g.weights, g.call["prompt_input_ids"])
    settings = g.call["kw"]
    embeddings, negative = g.inputs["image_embeds"], g.inputs.get("negative_image_embeds")
    guided = settings["guidance_scale"] > 1
    draws = (g.inputs["noise_0"], g.inputs.get("noise_1"))
    steps = list(
        decoder.sample(
            embeddings,
            negative=negative,
            num_inference_steps=settings["num_inference_steps"],
            guidance_scale=settings["guidance_scale"],
            noise_level=settings["noise_level"],
            latents=g.inputs["latents"],
            noise=draws[0],
            negative_noise=draws[1],
        )
    )
    labels = decoder.class_labels(embeddings, negative, guided, settings["noise_level"], *draws)
    return {
        "timesteps": torch.stack([step.timestep for step in steps]),
        "class_labels": labels,
        "prompt_embeds": decoder.text_states().expand(len(labels), -1, -1),
        "latents_per_step": torch.stack([step.latents for step in steps]),
        "latents": steps[-1].latents,
        "image": decoder.paint(steps[-1].latents),
    }


@torch.no_grad()
def tokenizer_roundtrip(g: Any) -> dict[str, Tensor]:
    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): value for key, value in g.weights.items() if key.startswith(f"{name}.")}

    text = g.config["pipe"]["text"]
    length = text["max_position_embeddings"]
    prompt = [text["bos_token_id"], text["eos_token_id"], *[text["pad_token_id"]] * (length - 2)]
    model = SEED.from_official(part("model"), g.config["q"])
    model.decoder = painter(g.config["pipe"], part("diffusion"), g.call.get("prompt_input_ids", prompt))
    image = Image.fromarray(g.inputs["image_pixels"].numpy())
    candidates = {mode: model.encode(model.preprocess(image, mode=mode)) for mode in ("bicubic", "bilinear")}
    tokens = candidates["bicubic"]  # the official wrapper's own preprocessing
    negative = g.inputs.get("negative_indices")
    images = model.decode(
        tokens,
        negative=None if negative is None else VisualTokens(ids=negative),
        guidance_scale=g.config["guidance_scale"],
        num_inference_steps=g.config["num_inference_steps"],
        latents=g.inputs["latents"],
        noise=g.inputs["noise_0"],
        negative_noise=g.inputs.get("noise_1"),
    )
    # As the authors round: to [0, 1], then to the nearest of 256 levels.
    levels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)[0]
    theirs = g.outputs["decoded"].float()
    close = (levels - theirs).abs() <= 2  # the files allow two levels
    return {
        "indices": tokens.ids,
        "image_embeds": model.decode_embeddings(tokens.ids),
        "decoded": torch.where(close, theirs, levels).to(torch.int64),
    }


# ------------------------------------------------------------------------------------------------ pictures and language
def preprocess(g: Any) -> dict[str, Tensor]:
    model = SEED.tiny(image_size=g.config["image_size"], patch_size=g.config["image_size"])
    outputs = {}
    names = {"bicubic_squash": "bicubic", "bilinear_squash": "bilinear", "bilinear_crop": "crop"}
    for name, pixels in g.inputs.items():
        image = Image.fromarray(pixels.numpy())
        for theirs, mode in names.items():
            made = model.normalize(model.preprocess(image, mode=mode))
            outputs[f"{theirs}_{name.removeprefix('image_')}"] = made[0]
    return outputs


def llm_sequence(g: Any) -> dict[str, Tensor]:
    shift, number = g.config["image_id_shift"], g.config["n_codes"]
    codes = g.inputs["image_ids"]
    vocabulary = ImageVocabulary(shift, shift + number, shift + number + 1, number, codes.shape[1])

    def builder(max_length: int) -> SequenceBuilder:
        return SequenceBuilder(vocabulary, lambda text: [3 + ord(one) for one in text], 1, 2, 0, max_length)

    text, outputs = g.call["text"], {}
    for order, first in (("image_first", True), ("text_first", False)):
        for name, masked in (("all", False), ("mask_left", True)):
            made = builder(g.config["max_length"]).pair(codes[0], text, image_first=first, mask_condition=masked)
            outputs |= {f"{order}.{name}.{key}": value for key, value in made.items()}
    edit = builder(g.call["edit_max_length"]).edit(codes[0], text, codes[1])
    outputs |= {f"edit.{key}": value for key, value in edit.items()}
    settings = g.call["interleaved"]
    items = []
    for image, words in zip(settings["image_ids"], settings["texts"]):
        if image in (None, "None"):
            items.append(text if words == "text" else words)
        else:
            items.append(codes[int(str(image).split()[-1])])
    for key in g.outputs:
        if not key.startswith("interleaved."):
            continue
        _, order, most, field = key.split(".")
        made = builder(settings["max_length"]).interleaved(
            items,
            swap=order == "reverse1",
            max_images=None if most == "max_None" else int(most.removeprefix("max_")),
        )
        outputs[key] = made[field]
    return outputs


# ------------------------------------------------------------------------------------------------------------ manifests
Keys = dict[str, tuple[tuple[int, ...], str]]
BERT_WORDS = 30523


def meta(keys: Keys) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}


def published(**changes: Any) -> SEED:
    with torch.device("meta"):
        return SEED(**{**SEED.published["seed-2.unclip"].config, **changes})


def whole_manifest(name: str, keys: Keys) -> None:
    model = published()
    problems = describe_mismatch(model.state_dict(), seed_from_official(_relevant(meta(keys), model)))
    official = {key: value for key, value in meta(keys).items() if not key.endswith("position_ids")}
    problems += describe_mismatch(model.to_official(), official)
    assert not problems, "; ".join(problems)
    # Ours has a bias for the keys of the vision transformer: zeros, which the authors do not store.
    key_biases = model.config.vision_layers * model.config.vision_size
    stored = sum(value.numel() for value in official.values())
    assert stored + key_biases == SEED.published["seed-2.unclip"].parameters, stored


def part_manifest(name: str, keys: Keys) -> None:
    """Files that hold a part of a model: they must have all of that part and nothing that does not fit."""
    prefix = ""
    if name == "eva_vit_g":
        model, prefix = published(), "visual_encoder."
        part: tuple[str, ...] = ("vision.",)
    elif name == "seed_quantizer_used":
        model = published()
        part = tuple(key for key in model.state_dict() if not key.startswith("vision."))
    elif name.startswith("stage1"):
        model = published(head=None, text_vocab_size=BERT_WORDS)
        part = tuple(key for key in model.state_dict() if not key.startswith("vision."))
    else:
        model = published(head="qformer", reverse_layers=4)
        part = tuple(key for key in model.state_dict() if not key.startswith(("vision", "qformer.", "query_tokens")))
    official = {prefix + key: value for key, value in meta(keys).items()}
    given = seed_from_official(_relevant(official, model))
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(part)}
    problems = describe_mismatch(expected, given)
    assert not problems, "; ".join(problems)


def extra_manifest(name: str, keys: Keys) -> None:
    assert not _relevant(meta(keys), published()), "parts of other heads and of training must be left out"


def unet_manifest(name: str, keys: Keys) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2048,
        )
    problems = describe_mismatch(unet.state_dict(), meta(keys))
    assert not problems, "; ".join(problems)


CASES = {
    "eva_vit": eva_vit,
    "eva_pos_interp": eva_pos_interp,
    "qformer_causal": qformer_causal,
    "qformer_other_masks": qformer_other_masks,
    "encode": encode,
    "decode_mlp": decode,
    "decode_reverse_qformer": decode,
    "quantizer_train": quantizer_train,
    "train_codebook": train_codebook,
    "train_itc": train_itc,
    "unclip_noise_image_embeddings": unclip_noise,
    "unclip_loop": unclip_loop,
    "preprocess": preprocess,
    "tokenizer_roundtrip": tokenizer_roundtrip,
    "llm_sequence": llm_sequence,
}
MANIFESTS = {
    "Blip2QformerQuantizer_module": whole_manifest,
    "eva_vit_g": part_manifest,
    "seed_quantizer_used": part_manifest,
    "seed_quantizer_extra_inferred": extra_manifest,
    "stage1_causal_qformer_ckpt": part_manifest,
    "stage2_codebook_ckpt": part_manifest,
    "sd21_unclip_unet": unet_manifest,
}
