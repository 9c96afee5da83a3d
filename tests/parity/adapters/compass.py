"""CoMPaSS: the position code, Tenor in UNets and FLUX, training steps, sampling, SCOP and its captions."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from tests.parity.check import read_text
from tests.parity.pipelines import REPOSITORY, part, scheduler, tiny_vae, unet
from vistok.controllers.scop import (
    AnnotationFile,
    ItemDraws,
    ScopDataset,
    ScopEngine,
    Thresholds,
    article,
    caption_of,
    judge,
    object_positions,
    pair_indices,
    relations,
)
from vistok.controllers.tenor import (
    UNET_CONFIGS,
    AttentionMaps,
    FluxLowRankAdapters,
    FluxObjective,
    Tenor,
    UNetObjective,
    flux_config_from_official,
    flux_from_official,
    flux_schedule,
    pack_latents,
    position_code,
    sample_flux,
)
from vistok.controllers.tenor.checkpoints import rename_flux
from vistok.nn.model import describe_mismatch

SYSTEM = "compass"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def tenor_encoding(g: Any) -> dict[str, Tensor]:
    out = {}
    for name in g.outputs:
        _, channels, length, *dtype = name.split("_")
        out[name] = position_code(int(length), int(channels), DTYPES[dtype[0]] if dtype else torch.float32)
    return out


@torch.no_grad()
def unet_tenor(g: Any) -> dict[str, Tensor]:
    network = unet(g.config["unet"], part(g.weights, "unet"))
    inputs = g.inputs

    def run(rows: slice) -> Tensor:
        times = inputs["timestep"]
        return network(
            inputs["sample"][rows],
            times[rows] if times.ndim else times,
            encoder_hidden_states=inputs["encoder_hidden_states"][rows],
            return_dict=False,
        )[0]

    out = {"base": run(slice(None))}
    with Tenor().attached(network):
        out["tenor"] = run(slice(None))
    maps = AttentionMaps()
    with Tenor(maps).attached(network):
        out["train_path"] = run(slice(0, 1))
    for place, layers in maps.maps.items():
        out |= {f"maps.{place}.{index}": layer[0] for index, layer in enumerate(layers)}
    assert torch.equal(run(slice(None)), out["base"]), "detaching left a trace"
    return out


def unet_sample(g: Any) -> dict[str, Tensor]:
    network = unet(g.config["unet"], part(g.weights, "unet"))
    pipe = diffusers.StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=network,
        scheduler=scheduler(g.config["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    side = g.inputs["latents"].shape[-1] * 8
    out = {}
    with Tenor().attached(pipe):
        for name, guidance in g.call["guidance"].items():
            out[name] = pipe(
                prompt_embeds=g.inputs["prompt_embeds"],
                negative_prompt_embeds=g.inputs["negative_prompt_embeds"],
                latents=g.inputs["latents"].clone(),
                guidance_scale=guidance,
                height=side,
                width=side,
                num_inference_steps=g.call["num_inference_steps"],
                output_type="latent",
            ).images
    return out


def unet_train(g: Any) -> dict[str, Tensor]:
    network = unet(g.config["unet"], part(g.weights, "unet"))
    call, inputs = g.call, g.inputs
    objective = UNetObjective(
        network,
        scheduler(g.config["scheduler"]),
        token_scale=call["token_loss_scale"],
        pixel_scale=call["pixel_loss_scale"],
    )
    assert objective.places(inputs["latents"].shape[-1]) == call["layers"]
    count = len(call["token_indices"])
    batch = {
        "latents": inputs["latents"],
        "noise": inputs["noise"],
        "timesteps": inputs["timesteps"],
        "encoder_hidden_states": inputs["encoder_hidden_states"],
        "masks": torch.cat([inputs[f"mask_{index}"] for index in range(count)], dim=1),
        "token_positions": [call["token_indices"]],
    }
    results = objective.training_loss(batch)
    wanted = {name.split(".", 1)[1] for name in g.outputs if name.startswith("grad.")}
    parameters = {name: value for name, value in network.named_parameters() if name in wanted}

    def gradients(loss: Tensor, label: str) -> dict[str, Tensor]:
        values = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        return {f"{label}.{name}": value for name, value in zip(parameters, values, strict=True)}

    return {
        "noisy": results["noisy"],
        "target": results["target"],
        "model_prediction": results["prediction"],
        "denoise_loss": results["denoise"],
        "token_loss": results["token"],
        "pixel_loss": results["pixel"],
        "total": results["loss"],
        **{name: value for name, value in results.items() if name.startswith(("token.", "pixel."))},
        **gradients(results["loss"], "grad"),
        **gradients(results["denoise"] + results["token"] + results["pixel"], "grad_scale1"),
    }


def flux_parts(g: Any) -> tuple[Any, FluxLowRankAdapters]:
    network = flux_from_official(part(g.weights, "flux"), g.config["flux"])
    state = part(g.weights, "lora")
    config = FluxLowRankAdapters.config_from_state(state)
    assert config["rank"] == g.config["rank"]
    return network, FluxLowRankAdapters.from_official(state, config)


@torch.no_grad()
def flux_tenor(g: Any) -> dict[str, Tensor]:
    network, adapters = flux_parts(g)
    inputs = g.inputs
    tokens, ids = pack_latents(inputs["latents"])

    def run() -> Tensor:
        return network(
            hidden_states=tokens,
            timestep=inputs["timesteps"],
            guidance=inputs.get("guidance"),
            pooled_projections=inputs["vec"],
            encoder_hidden_states=inputs["txt"],
            txt_ids=torch.zeros(inputs["txt"].shape[1], 3),
            img_ids=ids,
            return_dict=False,
        )[0]

    out = {
        "img": tokens,
        "img_ids": ids.expand(tokens.shape[0], -1, -1),
        "txt_ids": torch.zeros(*inputs["txt"].shape[:2], 3),
        "base": run(),
    }
    for name, weight in g.call["lora_weight"].items():
        # The authors' loader scales both factors of each pair.
        for merge in (False, True):
            adapters.with_strength(weight, squared=True, merge=merge)
            with adapters.attached(network):
                if "tenor" in name:
                    with Tenor().attached(network):
                        result = run()
                else:
                    result = run()
            assert merge is False or torch.allclose(result, out[name], atol=g.atol, rtol=g.rtol)
            out.setdefault(name, result)
    with Tenor().attached(network):
        out["tenor_only"] = run()
    assert torch.equal(run(), out["base"]), "detaching left a trace"
    return out


def flux_sample(g: Any) -> dict[str, Tensor]:
    network, adapters = flux_parts(g)
    call, inputs = g.call, g.inputs
    schedule = flux_schedule(call["num_steps"], call["image_seq_len_passed"])
    out = {
        "schedule": schedule,
        "schedule_1024": flux_schedule(len(g.outputs["schedule_1024"]) - 1, 1024),
        "schedule_512px": flux_schedule(len(g.outputs["schedule_512px"]) - 1, 512 * 512 // 16384),
    }
    with adapters.attached(network), Tenor().attached(network):
        for name, first in call["timestep_to_start_cfg"].items():
            out[name] = sample_flux(
                network,
                inputs["latents"],
                inputs["txt"],
                inputs["vec"],
                schedule,
                guidance=call["guidance"],
                true_guidance=call["true_gs"],
                negative_text=inputs["neg_txt"],
                negative_pooled=inputs["neg_vec"],
                first_guided_step=first,
            )
    return out


def flux_train(g: Any) -> dict[str, Tensor]:
    network, adapters = flux_parts(g)
    objective = FluxObjective(network, adapters.train(), guidance=g.call["guidance"])
    inputs = g.inputs
    results = objective.training_loss(
        {
            "latents": inputs["latents"],
            "noise": inputs["noise"],
            "time_index": inputs["t_index"],
            "text": inputs["txt"],
            "pooled": inputs["vec"],
        }
    )
    results["loss"].backward()
    return {
        "schedule_999": objective.times,
        "x_t": results["noisy"],
        "prediction": results["prediction"],
        "loss": results["loss"],
        **{f"grad.{name}": value.grad for name, value in adapters.named_parameters() if value.grad is not None},
    }


class RecordedVocabulary:
    """CLIP's tokens of the words that `captions.json` shows; the real vocabulary is not part of the repository."""

    model_max_length = 77
    begin, end = 49406, 49407

    def __init__(self, folder: Path) -> None:
        self.table: dict[str, list[int]] = {}
        for place in (REPOSITORY / "tests" / "golden" / "compass" / "captions.json", folder / "captions.json"):
            if not place.is_file():
                continue
            for row in json.loads(read_text(place))["rows"]:
                ids, words = row["ids"][1:-1], row["prompt"].split()
                for name, positions in ((row["object1"], row["indices1"]), (row["object2"], row["indices2"])):
                    self.table[name] = [row["ids"][position] for position in positions]
                if len(ids) == len(words):
                    self.table |= {word: [number] for word, number in zip(words, ids, strict=True)}

    def __call__(
        self,
        text: str,
        padding: Any = False,
        truncation: bool = False,
        max_length: int = 77,
        add_special_tokens: bool = True,
    ) -> dict[str, list[int]]:
        words, ids = text.split(), []
        while words:
            size = next(size for size in range(len(words), 0, -1) if " ".join(words[:size]) in self.table)
            ids += self.table[" ".join(words[:size])]
            words = words[size:]
        if add_special_tokens:
            ids = [self.begin, *ids, self.end]
        if padding == "max_length":
            ids = ids + [self.end] * (max_length - len(ids))
        return {"input_ids": ids}


def scop_item(g: Any) -> dict[str, Tensor]:
    records = g.config["metadata"]
    vocabulary = RecordedVocabulary(g.path.parent)
    data = ScopDataset(
        g.path.parent,
        g.call["image_size"],
        tokenizer=vocabulary,
        masks=True,
        caption_dropout=g.call["prompt_dropout"],
        scale_range=tuple(g.call["crop_scale_range"]),
        first_match=True,
        records=records,
    )
    out: dict[str, Tensor] = {}
    for row in g.config.get("rows") or json.loads(g.metadata["rows"]):
        number, name = row["item"], f"item{row['item']}.draw{row['draw']}"
        image = Image.fromarray(g.inputs[f"item{number}.image"].numpy())
        masks = [Image.fromarray(g.inputs[f"item{number}.mask_{index}"].numpy()) for index in (1, 2)]
        item = data.item(records[number], image, masks, ItemDraws(row["scale"], row["choice"], row["dropout"]))
        assert item["text"] == row["text"], (item["text"], row["text"])
        assert item["objects"] == row["objects"] or not row["text"], row
        assert item["token_positions"] == row["token_indices"] or not row["text"], row
        out[f"{name}.input_ids"] = item["input_ids"]
        out[f"{name}.pixel_values"] = item["pixel_values"]
        for index, mask in enumerate(item["masks"]):
            out[f"{name}.mask_{index}"] = mask[None]
    return out


CASES = {
    "tenor_encoding": tenor_encoding,
    "unet_sd15_tenor": unet_tenor,
    "unet_sd21_tenor": unet_tenor,
    "unet_sd15_sample": unet_sample,
    "unet_sd15_train": unet_train,
    "unet_sd21_train": unet_train,
    "flux_tenor": flux_tenor,
    "flux_sample": flux_sample,
    "flux_train": flux_train,
    "scop_item": scop_item,
}


def scop_filter(path: Path) -> None:
    import numpy as np

    content = json.loads(read_text(path))
    identities = {number: entry["id"] for number, entry in enumerate(content["coco"]["annotations"])}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "instances.json"
        source.write_text(json.dumps(content["coco"]))
        for label, result in content["results"].items():
            values = result["parameters"]
            thresholds = Thresholds(
                min_area=values["min_bbox_area"],
                visual_significance=values["visual_significance"],
                spatial_clarity=values["spatial_clarity"],
                minimal_overlap=values["minimal_overlap"],
                size_balance=values["size_balance"],
            )
            file = AnnotationFile(source, outside="keep")
            images = file.images()
            boxes = [
                [box for box in image.boxes if box.bbox[2] * box.bbox[3] >= thresholds.min_area] for image in images
            ]
            flat = [box for row in boxes for box in row]
            first, second, where = pair_indices([len(row) for row in boxes])
            areas = np.array([image.width * image.height for image in images], dtype=np.float64)
            table = judge(
                np.array([box.bbox for box in flat], dtype=np.float64),
                np.array([box.category for box in flat]),
                first,
                second,
                areas[where],
                thresholds,
            )
            ours = [
                [
                    identities[flat[one].number],
                    identities[flat[two].number],
                    *map(int, verdicts),
                    [phrase for phrases in relations(flat[one].bbox, flat[two].bbox) for phrase in phrases],
                ]
                for one, two, verdicts in zip(first, second, table.verdicts, strict=True)
            ]
            assert len(ours) == len(result["decisions"]), label
            for mine, theirs in zip(ours, result["decisions"], strict=True):
                assert mine == theirs, f"{label}: {mine} instead of {theirs}"
            out = Path(name) / label
            ScopEngine(file, thresholds=thresholds, images_per_part=100).run(out, progress=False)
            lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
            for line in lines:
                line["annots"] = [entry["id"] for entry in line["annots"]]
            assert lines == result["metadata"], label


def captions(path: Path) -> None:
    content = json.loads(read_text(path))
    for name, expected in content["articles"].items():
        assert article(name) == expected, name
    for row in content["rows"]:
        assert caption_of(row["object1"], row["relation"], row["object2"]) == row["prompt"], row
        names = [[row["ids"][position] for position in row[key]] for key in ("indices1", "indices2")]
        assert object_positions(row["ids"], names, first_match=True) == [row["indices1"], row["indices2"]], row


FILES = {"scop_filter.json": scop_filter, "captions.json": captions}


def adapter_manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    config = FluxLowRankAdapters.published["compass-flux.dev"].config
    with torch.device("meta"):
        model = FluxLowRankAdapters(**config)
    theirs = {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}
    problems = describe_mismatch(model.state_dict(), FluxLowRankAdapters.rename_official(theirs))
    assert not problems, "; ".join(problems)
    assert {
        k: tuple(v) if isinstance(v, list) else v for k, v in FluxLowRankAdapters.config_from_state(theirs).items()
    } == dict(config)


def unet_manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    config = UNET_CONFIGS[f"compass-unet.{name.removeprefix('CoMPaSS-').lower()}"]
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**config)
    theirs = {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}
    problems = describe_mismatch(model.state_dict(), theirs)
    assert not problems, "; ".join(problems)


def flux_manifest(name: str, keys: dict[str, tuple[tuple[int, ...], str]]) -> None:
    config = {
        "hidden_size": 3072,
        "num_heads": 24,
        "depth": 19,
        "depth_single_blocks": 38,
        "axes_dim": [16, 56, 56],
        "in_channels": 64,
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "guidance_embed": True,
    }
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**flux_config_from_official(config))
    theirs = {key: torch.empty(shape, device="meta") for key, (shape, _) in keys.items()}
    problems = describe_mismatch(model.state_dict(), rename_flux(theirs, config["hidden_size"]))
    assert not problems, "; ".join(problems)


MANIFESTS = {"CoMPaSS-FLUX": adapter_manifest, "CoMPaSS-SD": unet_manifest, "flux1-dev": flux_manifest}
