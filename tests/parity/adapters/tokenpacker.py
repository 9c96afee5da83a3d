"""TokenPacker: the projector, its place in LLaVA, and the slicing of pictures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vistok.nn.model import describe_mismatch
from vistok.tokenizers.tokenpacker import (
    TokenPacker,
    choose_grid,
    llava_from_official,
    pad_to_square,
    preprocess,
    slice_picture,
    splice_visual_tokens,
)
from vistok.tokenizers.tokenpacker.llava import IMAGE_TOKEN_ID, empty_llava, multi_level_features, rename_llava

SYSTEM = "tokenpacker"


def build(g: Any) -> TokenPacker:
    return TokenPacker.from_official(g.weights, g.config)


def intermediates(packer: TokenPacker, multi_level: Tensor, features: Tensor) -> dict[str, Tensor]:
    """What the authors' modules see on the way, in their layout (problem m * B + b)."""
    scale, heads = packer.scale_factor, packer.num_heads
    batch, side = len(features), round(features.shape[1] ** 0.5)
    grid = (side, side)
    points = packer.point_query(features, grid, scale)
    projected = packer.query_proj(points)
    key, value = packer.key_value(multi_level)
    query, normed_key = packer.query_norm(projected), packer.key_norm(key)
    attended = packer.region_attention(projected, key, value, grid, scale)
    weights, biases = packer.attention_in.weight.chunk(3), packer.attention_in.bias.chunk(3)
    asked = functional.linear(query, weights[0], biases[0]).flatten(0, 1).unflatten(-1, (heads, -1))
    held = packer.cells(functional.linear(normed_key, weights[1], biases[1]), grid, scale).unflatten(-1, (heads, -1))
    scores = torch.einsum("nhd,nrhd->nhr", asked, held) * asked.shape[-1] ** -0.5
    shares = scores.softmax(-1).mean(1).unflatten(0, (batch, -1)).transpose(0, 1).flatten(0, 1)
    return {
        "point_query": points,
        "ln_q": query,
        "ln_k": normed_key,
        "ln_v": packer.value_norm(value),
        "attention_output": attended.transpose(0, 1).reshape(1, -1, attended.shape[-1]),
        "attention_weights": shares[:, None],
    }


def projector(g: Any) -> dict[str, Tensor]:
    packer = build(g)
    features, multi_level = g.inputs["features"], g.inputs["features_multi"]
    with torch.no_grad():
        outputs = intermediates(packer, multi_level, features)
        outputs["tokens"] = packer(multi_level, features)  # the folded weights of inference
    trained = packer(multi_level, features)
    tolerance = {"rtol": max(g.rtol, 1e-4), "atol": max(g.atol, 1e-5)}
    torch.testing.assert_close(trained.detach(), outputs["tokens"], **tolerance)
    return outputs


def projector_grad(g: Any) -> dict[str, Tensor]:
    packer = build(g).train()
    features = g.inputs["features"].clone().requires_grad_(True)
    multi_level = g.inputs["features_multi"].clone().requires_grad_(True)
    tokens = packer(multi_level, features)
    loss = functional.mse_loss(tokens, g.inputs["target"])
    loss.backward()
    with torch.no_grad():
        for parameter in packer.parameters():
            parameter.copy_(parameter.grad)
    gradients = {f"grad.{name}": value for name, value in packer.to_official().items()}
    return {
        "tokens": tokens,
        "loss": loss,
        "grad.features": features.grad,
        "grad.features_multi": multi_level.grad,
        **gradients,
    }


def hashed(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values of a tensor by the rule of the parity files."""
    salt = np.uint32(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    count = int(np.prod(shape))
    k = (np.arange(count, dtype=np.uint64) * np.uint64(2654435761)).astype(np.uint32) + salt
    k ^= k >> np.uint32(15)
    k *= np.uint32(2246822519)
    k ^= k >> np.uint32(13)
    unit = k.astype(np.float64) / 2**32 * 2 - 1
    one = 0.0
    if name in ("features", "features_multi"):
        scale = np.sqrt(3.0)
    elif len(shape) == 2:
        scale = np.sqrt(3.0 / shape[-1])
    elif name.startswith("ln_") and name.endswith(".weight"):
        scale, one = 0.2, 1.0
    else:
        scale = 0.1
    return torch.from_numpy((unit * scale + one).astype(np.float32)).view(shape)


@torch.no_grad()
def projector_published(g: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        skeleton = TokenPacker(**TokenPacker.config_from_official(g.config)).to_official()
    weights = {name: hashed(name, tuple(value.shape)) for name, value in skeleton.items()}
    packer = TokenPacker.from_official(weights, g.config)
    patches = packer.config.grid_size**2
    features = hashed("features", (1, patches, packer.config.feature_dim))
    multi_level = hashed("features_multi", (1, patches, packer.key_value_in.in_features))
    tokens = packer(multi_level, features)
    grid = (packer.config.grid_size,) * 2
    key, value = packer.key_value(multi_level)
    points = packer.query_proj(packer.point_query(features, grid, packer.scale_factor))
    attended = packer.region_attention(points, key, value, grid, packer.scale_factor)
    stride = int(g.inputs["stride"]) if "stride" in g.inputs else 12
    mean = attended.mean(-1).transpose(0, 1).reshape(1, -1)
    return {
        "tokens_stride": tokens[:, ::stride],
        "tokens_norm": tokens.norm(dim=-1),
        "attention_output_mean": mean.view(g.outputs["attention_output_mean"].shape),
    }


def clip_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    kept = {key: value for key, value in weights.items() if not key.endswith("position_ids")}
    return {key.split("vision_model.", 1)[1]: value for key, value in kept.items()}


@torch.no_grad()
def vision_tower(g: Any) -> dict[str, Tensor]:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tower = CLIPVisionModel(CLIPVisionConfig(**g.config["clip"])).eval()
    inner = getattr(tower, "vision_model", tower)
    inner.load_state_dict(clip_weights(g.weights))
    images = g.inputs["images"]
    depth = g.config["clip"]["num_hidden_layers"]
    level = g.config.get("mm_vision_select_layer", -2) % (depth + 1)
    features, *levels = multi_level_features(tower, images, [level, *g.call["layers"]])
    states = tower(images, output_hidden_states=True).hidden_states
    if g.config.get("mm_vision_select_feature", "patch") != "patch":
        features = states[level]
    return {
        "features": features,
        "features_multi": torch.cat(levels, dim=-1),
        "hidden_0": states[0],
        "hidden_23": states[23],
    }


def image_grid(g: Any) -> dict[str, Tensor]:
    sizes = g.inputs["sizes"].tolist()

    def grids(max_crops: int, crop_size: int) -> Tensor:
        return torch.tensor([choose_grid(h, w, max_crops=max_crops, crop_size=crop_size) for h, w in sizes])

    numbers = g.config["patch_num"]
    outputs = {f"grid_{n}": grids(n, g.config["image_size"]) for n in numbers}
    # The authors' demo hands the number of crops over as the crop size, and so always chooses among nine crops.
    outputs["grid_cli"] = grids(9, 9)
    return outputs


def picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.numpy())


def hd_slice(g: Any) -> dict[str, Tensor]:
    outputs = {}
    settings = {"max_crops": g.config["patch_num"], "crop_size": g.config["block_size"]}
    for name, pixels in g.inputs.items():
        crops, grid = slice_picture(picture(pixels), **settings)
        number = name.removeprefix("image_")
        outputs |= {f"crops_{number}": crops, f"grid_{number}": torch.tensor(grid)}
    return outputs


def hd_slice_336(g: Any) -> dict[str, Tensor]:
    crops, grid = slice_picture(
        picture(g.inputs["image"]), max_crops=g.config["patch_num"], crop_size=g.config["block_size"]
    )
    stride = -(-crops.shape[-1] // g.outputs["crops_stride"].shape[-1])
    return {
        "grid": torch.tensor(grid),
        "shape": torch.tensor(crops.shape),
        "crop_mean": crops.mean((2, 3)),
        "crop_std": crops.std((2, 3)),
        "crops_stride": crops[:, :, ::stride, ::stride],
    }


def pad_preprocess(g: Any) -> dict[str, Tensor]:
    outputs = {}
    for name, pixels in g.inputs.items():
        image, number = picture(pixels), name.removeprefix("image_")
        size = g.config["image_size"]
        outputs[f"pad_{number}"] = preprocess(image, mode="pad", image_size=size)[0][0]
        outputs[f"square_{number}"] = preprocess(image, mode="crop", image_size=size)[0][0]
        outputs[f"squared_{number}"] = torch.from_numpy(np.array(pad_to_square(image)))
    return outputs


def grids_of(input_ids: Tensor, rows: Tensor, cols: Tensor) -> list[tuple[int, int]]:
    """The grid of every picture: the authors give one a prompt."""
    counts = (input_ids == -200).sum(1).tolist()
    return [(int(h), int(w)) for h, w, count in zip(rows, cols, counts) for _ in range(count)]


def assemble(g: Any) -> dict[str, Tensor]:
    embedding = torch.nn.Embedding.from_pretrained(g.weights["embed_tokens.weight"])
    words = {"separator_id": g.config["sep_id"], "row_end_id": g.config["ret_id"]}
    ids, mask, labels = g.inputs["input_ids"], g.inputs["attention_mask"], g.inputs["labels"]
    shared = {"attention_mask": mask, "labels": labels, "dummy_crops": True}
    runs = {
        "single": splice_visual_tokens(embedding, ids, g.inputs["features_single"], **shared),
        "slice": splice_visual_tokens(
            embedding,
            ids,
            g.inputs["features_slice"],
            grids=grids_of(ids, g.inputs["h_block"], g.inputs["w_block"]),
            **words,
            **shared,
        ),
    }
    one = g.inputs["input_ids_one"]
    named = re.search(r"\((\d+)x(\d+)", " ".join(g.call.get("modes", [])))
    crops = len(g.inputs["features_row"])
    row = (int(named[1]), int(named[2])) if named else (1, max(1, crops - 1))  # one row, and its overview
    runs["slice_inference"] = splice_visual_tokens(embedding, one, g.inputs["features_row"], grids=[row], **words)
    two = g.inputs["input_ids_two"]
    number = int((two == -200).sum())
    runs["two_images"] = splice_visual_tokens(embedding, two, g.inputs["features_single"][:number])
    outputs = {}
    for name, run in runs.items():
        outputs[f"{name}.inputs_embeds"] = run.inputs_embeds
        outputs[f"{name}.attention_mask"] = run.attention_mask
        if run.labels is not None:
            outputs[f"{name}.labels"] = run.labels
    return outputs


def llava_end_to_end(g: Any) -> dict[str, Tensor]:
    weights = {key.removeprefix("model.mm_projector."): value for key, value in g.weights.items()}
    model = llava_from_official(
        g.weights,
        g.config["llama"],
        g.config["clip"],
        scale_factor=g.config["scale_factor"],
        num_heads=g.config["proj_heads"],
        embed_dim=weights["q_proj_1.weight"].shape[0],
    )
    packer, embedding = model.model.multi_modal_projector, model.get_input_embeddings()
    ids, mask, labels = g.inputs["input_ids"], g.inputs["attention_mask"], g.inputs["labels"]
    words = {"separator_id": g.config["sep_id"], "row_end_id": g.config.get("ret_id", 0)}

    def visual(images: Tensor) -> Tensor:
        return torch.stack(list(model.get_image_features(images).pooler_output))

    tokens = visual(g.inputs["images"])
    single = splice_visual_tokens(
        embedding, ids, tokens, attention_mask=mask, labels=labels, dummy_crops=len(tokens) == len(ids)
    )
    run = model(**single.model_inputs())
    run.loss.backward()
    outputs = {
        "visual_tokens": tokens,
        "single.logits": run.logits,
        "single.loss": run.loss,
        "single.grad_mlp2": packer.mlp_out.weight.grad,
        "single.grad_qproj": packer.query_proj.weight.grad,
    }
    with torch.no_grad():
        rows, cols = g.inputs["h_block"], g.inputs["w_block"]
        crops = visual(g.inputs["slice_images"])
        grids = grids_of(ids, rows, cols)
        sliced = splice_visual_tokens(
            embedding, ids, crops, grids=grids, attention_mask=mask, labels=labels, dummy_crops=True, **words
        )
        run = model(**sliced.model_inputs())
        outputs |= {"slice.logits": run.logits, "slice.loss": run.loss}
        needed = grids[0][0] * grids[0][1] + (grids[0][0] * grids[0][1] > 1)
        first = splice_visual_tokens(embedding, ids[:1], crops[:needed], grids=grids[:1], **words)
        length = g.outputs["generated"].shape[1]
        settings = {"do_sample": False, "max_new_tokens": length, "use_cache": True}
        generated = model.generate(
            inputs_embeds=first.inputs_embeds, attention_mask=first.attention_mask, pad_token_id=0, **settings
        )
        outputs["generated"] = generated
    return outputs


def projector_manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    published = TokenPacker.published[f"tokenpacker-{name.rsplit('_', 1)[1]}.144tokens"]
    official = {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}
    with torch.device("meta"):
        model = TokenPacker(**published.config)
    flat = TokenPacker.unwrap_official(official)
    problems = describe_mismatch(model.state_dict(), TokenPacker.rename_official(flat))
    problems += describe_mismatch(model.to_official(), flat)
    assert not problems, "; ".join(problems)
    assert sum(parameter.numel() for parameter in model.parameters()) == published.parameters


def llava_manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    layers, width, ffn, heads = {"7b": (32, 4096, 11008, 32), "13b": (40, 5120, 13824, 40)}[name.rsplit("_", 1)[1]]
    language = {
        "vocab_size": 32000,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    model = empty_llava(language, image_token_id=IMAGE_TOKEN_ID)
    official = {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}
    problems = describe_mismatch(model.state_dict(), rename_llava(official))
    assert not problems, "; ".join(problems)


CASES = {
    "projector_s": projector,
    "projector_bf16": projector,
    "projector_grad": projector_grad,
    "projector_published_dims": projector_published,
    "vision_tower": vision_tower,
    "image_grid": image_grid,
    "hd_slice": hd_slice,
    "hd_slice_336": hd_slice_336,
    "pad_preprocess": pad_preprocess,
    "assemble": assemble,
    "llava_end_to_end": llava_end_to_end,
}
MANIFESTS = {"mm_projector": projector_manifest, "llava_tokenpacker": llava_manifest}
