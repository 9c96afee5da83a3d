"""The authors' files: their configuration read as data, and the table of key names.

A published configuration is a tree of `_target_` class paths with arguments. Nothing in it is imported or called: class
names are looked up in the table below, arguments that shape the network are translated, and the names of dictionary
keys (`*_read_key`, `*_write_key`), which only wire modules together, are ignored.
"""

from __future__ import annotations

import ast
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vistok.errors import CheckpointError, InvalidInputError
from vistok.registry import Published

from .blocks import merge_block_keys, split_block_keys

__all__ = ["config_from_official", "from_official_keys", "is_official", "parse_metadata", "to_official_keys"]

SECTIONS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")

# Modules that compute something, by the last part of their class path, and those that only move tensors about.
COMPUTING = {
    "PatchEmbedder",
    "PositionalEmbeddingAdder",
    "Registers1D",
    "FlexTransformer",
    "LinearHead",
    "LinearLayer",
    "MaskedNestedDropout",
    "LearnedNullCond",
    "TimestepEmbedder",
    "ToPatchesLinearHead",
    "BlockWiseSequencePacker",
}
WIRING = {"PerSampleOp", "SequenceUnpacker", "SequentialModuleDictWrapper"}
KNOWN_SECTION_CLASSES = {
    "vae": {"StableDiffusionVAE"},
    "regularizer": {"FSQ"},
    "flow_matching_noise_module": {"MinRFNoiseModule"},
    "pipeline": {"MinRFPipeline"},
}
# Arguments that give a module weights begin so.
SIZES = ("dim", "channels", "max_sizes", "n_max", "hidden", "size", "num_", "depth", "patch")
PERMUTATIONS = {"channels_first_to_last", "channels_last_to_first"}


def is_official(config: Mapping[str, Any]) -> bool:
    """Whether this is the authors' tree (or one that holds it), and not our own arguments."""
    return any(key in config for key in ("flextok", "config", *SECTIONS, "vae_base_cfg_overrides"))


def parse_metadata(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The configuration in a safetensors header, whose values are Python or JSON literals; None if there is none.

    Raises:
        CheckpointError: if a section is there but no literal.
    """
    found: dict[str, Any] = {}
    for name in (*SECTIONS, "config"):
        if name not in metadata:
            continue
        text = metadata[name]
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            try:
                found[name] = ast.literal_eval(text)  # literals only: no name is looked up, nothing is called
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise CheckpointError(f"the file's metadata entry {name!r} is no literal ({error})") from error
    return found or None


def find_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    config: str | os.PathLike[str] | Mapping[str, Any] | None,
) -> tuple[Path | Mapping[str, Any], str | Mapping[str, Any]]:
    """File and configuration of a published tokenizer, from what `FlexTok.from_official` was given.

    Raises:
        CheckpointError: no configuration anywhere.
    """
    own: Mapping[str, Any] | None = None
    if not isinstance(source, Mapping):
        path = Path(source)
        path = path / "model.safetensors" if path.is_dir() else path
        source, own = path, own_config(path)
    if isinstance(config, (str, os.PathLike)) and str(config).endswith(".json"):
        config = read_json(Path(config))
    if isinstance(config, str) and config in PUBLISHED and own is not None:
        return source, {**PUBLISHED[config].config, **config_from_official(own)}
    if config is None:
        if own is None:
            raise CheckpointError(
                f"{source if isinstance(source, Path) else 'the state dict'} holds no configuration: give the name "
                f"of a published checkpoint ({', '.join(PUBLISHED)}) or a config.json"
            )
        config = own
    return source, config if isinstance(config, Mapping) else str(config)


def own_config(path: Path) -> Mapping[str, Any] | None:
    """The authors' configuration in the header of a file, or in a `config.json` beside it; None if there is neither."""
    own: Mapping[str, Any] | None = None
    if path.suffix == ".safetensors" and path.is_file():
        own = parse_metadata(_safetensors_metadata(path))
    beside = path.with_name("config.json")
    if own is None and beside.is_file():
        content = read_json(beside)
        own = content if is_official(content) else None
    return own


def read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is no readable configuration ({error})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} must hold a dictionary; it holds a {type(content).__name__}")
    return content


def _safetensors_metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error})") from error


def _class_of(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_", "")).rpartition(".")[2]


def _without_none(node: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: node[name] for name in names if node.get(name) is not None}


def _check_known(section: str, modules: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Modules of a section by class, in their order.

    Raises:
        InvalidInputError: naming the classes that are not known.
    """
    by_class: dict[str, list[Mapping[str, Any]]] = {}
    unknown = []
    for name, node in modules.items():
        if not isinstance(node, Mapping):
            raise InvalidInputError(f"{section}.module_dict.{name} must be a dictionary; got {node!r}")
        kind = _class_of(node)
        if kind in COMPUTING:
            by_class.setdefault(kind, []).append(node)
        elif kind == "PerSampleOp" and _class_of(node.get("per_sample_op") or {}) not in PERMUTATIONS:
            unknown.append(f"{name}: {(node.get('per_sample_op') or {}).get('_target_', '(none)')}")
        elif kind in WIRING or name.startswith(("dec_repa", "enc_repa")):
            continue
        elif not any(argument.startswith(SIZES) for argument in node):
            warnings.warn(
                f"{section}.{name} is a {node.get('_target_', 'module without _target_')}, unknown to FlexTok: "
                "it has no size, so no weights, and is left out",
                stacklevel=5,
            )
        else:
            unknown.append(f"{name}: {node.get('_target_', '(no _target_)')}")
    if unknown:
        raise InvalidInputError(
            f"the configuration's {section} names modules that FlexTok does not know ({'; '.join(unknown)}); "
            "nothing was imported or run. Known: " + ", ".join(sorted(COMPUTING | WIRING))
        )
    return by_class


def _one(section: str, by_class: Mapping[str, list[Mapping[str, Any]]], kind: str) -> Mapping[str, Any]:
    found = by_class.get(kind, [])
    if len(found) != 1:
        raise InvalidInputError(f"the configuration's {section} needs exactly one {kind}; it has {len(found)}")
    return found[0]


def _same(what: str, values: Mapping[str, Any]) -> Any:
    """The one value that all sources agree on."""
    distinct = {json.dumps(value) for value in values.values()}
    if len(distinct) > 1:
        raise InvalidInputError(
            f"the configuration disagrees on {what}: {', '.join(f'{k} {v}' for k, v in values.items())}"
        )
    return next(iter(values.values()))


def _single(what: str, values: Sequence[int]) -> int:
    if len(set(values)) != 1:
        raise InvalidInputError(f"{what} must be square; got {list(values)}")
    return int(values[0])


def _block_arguments(node: Mapping[str, Any], section: str) -> dict[str, Any]:
    if node.get("drop_path_rate") or node.get("drop_path"):
        warnings.warn(f"the {section}'s drop_path is training only and is ignored", stacklevel=4)
    norm = _class_of(node["norm_layer"]) if isinstance(node.get("norm_layer"), Mapping) else "Fp32LayerNorm"
    if norm not in ("Fp32LayerNorm", "LayerNorm"):
        raise InvalidInputError(f"the configuration's {section} asks for the norm {norm}; FlexTok knows LayerNorm only")
    activation = node.get("act_layer") or "silu"
    name = (_class_of(activation) if isinstance(activation, Mapping) else str(activation).rpartition(".")[2]).lower()
    return {
        "gated_mlp": bool(node.get("gated_mlp", True)),
        "activation": name,
        "qk_norm": bool(node.get("qk_norm", True)),
        "qkv_bias": bool(node.get("qkv_bias", False)),
        "proj_bias": bool(node.get("proj_bias", False)),
        "mlp_bias": bool(node.get("mlp_bias", False)),
        "mup_scale": bool(node.get("muP_scale", True)),
    }


def _modules(tree: Mapping[str, Any], section: str) -> dict[str, list[Mapping[str, Any]]]:
    node = tree.get(section)
    if not isinstance(node, Mapping) or not isinstance(node.get("module_dict"), Mapping):
        raise InvalidInputError(f"the configuration has no {section} with a module_dict; it has: {', '.join(tree)}")
    return _check_known(section, node["module_dict"])


def config_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments from the authors' tree.

    Raises:
        InvalidInputError: unknown modules, contradictions, missing parts.
    """
    tree: Mapping[str, Any] = config
    overrides = dict(config.get("vae_base_cfg_overrides") or {})
    for wrapper in ("flextok", "config"):
        if isinstance(tree.get(wrapper), Mapping) and "encoder" not in tree:
            tree = tree[wrapper]
    for section, classes in KNOWN_SECTION_CLASSES.items():
        kind = _class_of(tree.get(section) or {})
        if kind and kind not in classes:
            raise InvalidInputError(
                f"the configuration's {section} is {tree[section]['_target_']!r}, which FlexTok does not know; "
                f"nothing was imported or run. Known: {', '.join(classes)}"
            )
    encoder, decoder = _modules(tree, "encoder"), _modules(tree, "decoder")
    vae, regularizer = tree.get("vae") or {}, tree.get("regularizer") or {}
    noise = tree.get("flow_matching_noise_module") or {}

    arguments: dict[str, Any] = {}
    names = {
        "block_out_channels": "vae_block_out_channels",
        "layers_per_block": "vae_layers_per_block",
        "norm_num_groups": "vae_norm_groups",
    }
    unknown = sorted(set(overrides) - set(names))
    if unknown:
        raise InvalidInputError(f"unknown VAE settings {unknown}; known: {', '.join(names)}")
    arguments |= {names[name]: value for name, value in overrides.items()}
    arguments |= _without_none(vae, ["latent_channels", "scaling_factor", "sample_posterior"])
    if vae.get("scaling_factor") is None:
        warnings.warn(
            "the configuration gives no scaling_factor: it is that of the VAE "
            f"{vae.get('hf_hub_path') or '(not named)'}; until you pass scaling_factor=, 1.0 is used",
            stacklevel=3,
        )

    patching = {
        "encoder": _one("encoder", encoder, "PatchEmbedder"),
        "decoder": _one("decoder", decoder, "PatchEmbedder"),
    }
    arguments["patch_size"] = _single(
        "patch_sizes", _same("patch_sizes", {name: node["patch_sizes"] for name, node in patching.items()})
    )
    arguments["latent_channels"] = _same(
        "the latent channels", {name: node["channels_in"] for name, node in patching.items()}
    )

    transformers = {
        "encoder": _one("encoder", encoder, "FlexTransformer"),
        "decoder": _one("decoder", decoder, "FlexTransformer"),
    }
    for section, node in transformers.items():
        arguments |= {
            f"{section}_size": node["dim"],
            f"{section}_depth": node.get("depth", 12),
            f"{section}_head_dim": node.get("head_dim", 64),
            f"{section}_mlp_ratio": node.get("mlp_ratio", 4.0),
        }
    blocks = {name: _block_arguments(node, name) for name, node in transformers.items()}
    arguments |= {
        what: _same(what, {name: block[what] for name, block in blocks.items()}) for what in blocks["encoder"]
    }
    arguments["modulation_segments"] = transformers["decoder"].get("adaLN_expansion") or 1
    layers = transformers["decoder"].get("intermediate_layers")
    arguments["repa_layer"] = None if not layers else int(layers[0])

    for section, modules, mode in (("encoder", encoder, "causal_last"), ("decoder", decoder, "full")):
        for packer in modules.get("BlockWiseSequencePacker", []):
            if packer.get("mask_mode", mode) != mode:
                raise InvalidInputError(
                    f"the {section}'s mask_mode is {packer['mask_mode']!r}; FlexTok's is {mode!r} and no other is known"
                )
    tables = {name: _positions(modules) for name, modules in (("encoder", encoder), ("decoder", decoder))}
    grids = {name: table[2]["max_sizes"] for name, table in tables.items() if 2 in table}
    if set(grids) != {"encoder", "decoder"} or 1 not in tables["decoder"]:
        raise InvalidInputError("the configuration needs positions for the patches of both parts and for registers")
    arguments["grid"] = tuple(_same("the position grid", grids))
    for section, table in tables.items():
        arguments[f"{section}_positions"] = table[2].get("posemb_type") or "sincos"
    arguments["register_positions"] = tables["decoder"][1].get("posemb_type") or "learnable_sum"
    arguments["position_scaling"] = _same(
        "posemb_scaling", {name: table[2].get("posemb_scaling") or "absolute" for name, table in tables.items()}
    )

    registers = _one("encoder", encoder, "Registers1D")
    arguments["num_registers"] = int(registers["n_max"])
    arguments["register_order"] = registers.get("ordering_mode") or "nested"
    if regularizer.get("levels"):
        arguments["levels"] = tuple(regularizer["levels"])
    arguments["quantization_dropout"] = float(regularizer.get("drop_quant_p") or 0.0)
    dropout = _one("decoder", decoder, "MaskedNestedDropout")
    arguments["nested_dropout"] = dropout.get("size_sampling_mode") or "uniform"
    null = decoder.get("LearnedNullCond", [])
    arguments["condition_dropout"] = float((null[0].get("dropout_prob") if null else 0.0) or 0.0)
    if noise.get("ln", True):
        arguments["noise_schedule"] = "stratified" if noise.get("stratisfied") else "logit_normal"
    else:
        arguments["noise_schedule"] = "mode"
    arguments["mode_scale"] = float(noise.get("mode_scale") or 0.0)
    time = _one("decoder", decoder, "TimestepEmbedder")
    arguments["frequency_size"] = int(time.get("frequency_embedding_size") or 256)
    arguments["max_timestep"] = float(time.get("max_timestep") or 1000.0)
    return arguments


def _positions(modules: Mapping[str, list[Mapping[str, Any]]]) -> dict[int, Mapping[str, Any]]:
    """Position tables by their number of axes."""
    return {len(node["max_sizes"]): node for node in modules.get("PositionalEmbeddingAdder", [])}


# ------------------------------------------------------------------------------------------------------------- the keys

OFFICIAL_TO_OURS = (
    ("vae.vae.", "vae."),
    ("encoder.module_dict.enc_patch_emb.patch_proj.", "encoder.patch_embedding."),
    ("encoder.module_dict.enc_posemb_module.posembs", "encoder.positions.table"),
    ("encoder.module_dict.enc_register_module.registers", "encoder.registers"),
    ("encoder.module_dict.enc_transformer.blocks.", "encoder.blocks."),
    ("encoder.module_dict.enc_to_latents.proj.", "encoder.head."),
    ("decoder.module_dict.dec_from_latents.proj.", "decoder.code_embedding."),
    ("decoder.module_dict.dec_registers_posemb_module.posembs", "decoder.register_positions.table"),
    ("decoder.module_dict.dec_nested_dropout.dropout_mask_token", "decoder.mask_token"),
    ("decoder.module_dict.dec_latent_dropout.nullcond", "decoder.null_token"),
    ("decoder.module_dict.dec_noise_patch_emb.patch_proj.", "decoder.patch_embedding."),
    ("decoder.module_dict.dec_patches_posemb_module.posembs", "decoder.positions.table"),
    ("decoder.module_dict.dec_time_embedder.", "decoder.time_embedding."),
    ("decoder.module_dict.dec_transformer.blocks.", "decoder.blocks."),
    ("decoder.module_dict.dec_to_patches.adaLN_modulation.1.", "decoder.head_modulation."),
    ("decoder.module_dict.dec_to_patches.proj.", "decoder.head."),
)
_IGNORED = re.compile(r"^decoder\.module_dict\.dec_repa")


def from_official_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under our names; heads of the representation loss are left out with a warning."""
    renamed: dict[str, Tensor] = {}
    ignored = [key for key in state if _IGNORED.match(key)]
    if ignored:
        warnings.warn(f"{len(ignored)} weights of the representation loss are left out: {ignored[0]} ...", stacklevel=3)
    for key, value in state.items():
        if key in ignored:
            continue
        for theirs, ours in OFFICIAL_TO_OURS:
            if key.startswith(theirs):
                key = ours + key.removeprefix(theirs)
                break
        renamed[key] = value
    return merge_block_keys(renamed)


def to_official_keys(state: Mapping[str, Tensor], gated: bool = True) -> dict[str, Tensor]:
    """The inverse of `from_official_keys`."""
    official: dict[str, Tensor] = {}
    for key, value in split_block_keys(state, gated).items():
        for theirs, ours in OFFICIAL_TO_OURS:
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
                break
        official[key] = value
    return official


# ---------------------------------------------------------------------------------------------- published checkpoints
def _published(name: str, hub: str, encoder: tuple[int, int], decoder: tuple[int, int], parameters: int) -> Published:
    return Published(
        name=name,
        system="flextok",
        config={
            "encoder_depth": encoder[0],
            "encoder_size": encoder[1],
            "decoder_depth": decoder[0],
            "decoder_size": decoder[1],
        },
        hub_id=f"EPFL-VILAB/{hub}",
        hub_file="model.safetensors",
        licence="Apple Machine Learning Research Model",
        paper="arXiv:2502.13967",
        origin="apple/ml-flextok",
        image_size=256,
        num_tokens=256,
        codebook_size=64000,
        preprocessing="short side to 256 (bilinear), centre crop, [-1, 1]",
        parameters=parameters,
    )


PUBLISHED: dict[str, Published] = {
    entry.name: entry
    for entry in (
        _published("flextok-d12-d12.imagenet", "flextok_d12_d12_in1k", (12, 768), (12, 768), 341_258_521),
        _published("flextok-d18-d18.imagenet", "flextok_d18_d18_in1k", (18, 1152), (18, 1152), 949_144_729),
        _published("flextok-d18-d28.imagenet", "flextok_d18_d28_in1k", (18, 1152), (28, 1792), 2_540_129_177),
        _published("flextok-d18-d28.dfn", "flextok_d18_d28_dfn", (18, 1152), (28, 1792), 2_540_129_177),
    )
}
