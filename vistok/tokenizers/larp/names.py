"""Names of the authors' code (hywang66/LARP) and ours: arguments, prior sizes, state-dict keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.errors import InvalidInputError

__all__ = ["arguments_from_official", "to_official", "to_ours"]

# name -> (layers, heads, width)
PRIORS = {
    "gptc-L": (24, 16, 1024),
    "gptc-B": (12, 12, 768),
    "gptc-M": (12, 8, 512),
    "gptc-S": (12, 6, 384),
    "gptc-XS": (6, 6, 384),
    "gptc-XXS": (6, 4, 256),
}
NOTHING = ("none", "no", "null", "")
ARGUMENTS = {
    "bottleneck_token_num": "num_tokens",
    "input_size": "image_size",
    "frame_num": "num_frames",
    "temporal_patch_size": "temporal_patch_size",
    "patch_size": "patch_size",
    "decoder_temporal_patch_size": "decoder_temporal_patch_size",
    "decoder_patch_size": "decoder_patch_size",
    "in_channels": "in_channels",
    "encoder_hidden_size": "encoder_hidden_size",
    "decoder_hidden_size": "decoder_hidden_size",
    "encoder_num_heads": "encoder_heads",
    "decoder_num_heads": "decoder_heads",
    "encoder_depth": "encoder_layers",
    "decoder_depth": "decoder_layers",
    "latent_pe_scale_factor": "latent_position_base",
    "learned_encoder_patch_pe": "learned_encoder_positions",
    "learned_encoder_latent_query_embed": "learned_encoder_queries",
    "learned_decoder_latent_pe": "learned_decoder_positions",
    "learned_decoder_patch_query_embed": "learned_decoder_queries",
    "use_encoder_patch_token_type_embed": "encoder_position_kind",
    "use_encoder_latent_query_token_type_embed": "encoder_query_kind",
    "use_decoder_latent_token_type_embed": "decoder_position_kind",
    "use_decoder_patch_query_token_type_embed": "decoder_query_kind",
}
# Where the defaults of the authors' code differ from ours (those of the published tokenizer).
DEFAULTS = {"encoder_depth": 6, "decoder_depth": 6, "use_decoder_patch_query_token_type_embed": False}
# Initial weights alone.
IGNORED = {"encoder_query_gaussian_init", "query_init_std"}
QUANTIZER_ARGUMENTS = {
    "codebook_size": "codebook_size",
    "commitment_loss_weight": "commitment_weight",
    "codebook_loss_weight": "codebook_weight",
    "l2_normalized": "l2_normalize",
    "stochastic": "stochastic",
    "stochastic_temperature": "stochastic_temperature",
}
QUANTIZER_DEFAULTS = {"l2_normalized": False, "stochastic": False, "stochastic_temperature": 1.0}

KEYS = {
    "x_embedder.proj.": "patch_embedding.",
    "encoder_patch_pe": "encoder_positions.table",
    "encoder_h_embed": "encoder_positions.rows",
    "encode_w_embed": "encoder_positions.cols",
    "encoder_t_embed": "encoder_positions.frames",
    "encoder_patch_token_type_embed": "encoder_positions.kind",
    "encoder_latent_query_embed": "encoder_queries",
    "encoder_latent_query_token_type_embed": "encoder_queries_kind",
    "decoder_latent_pe": "decoder_positions",
    "decoder_latent_token_type_embed": "decoder_positions_kind",
    "decoder_patch_query_embed": "decoder_queries.table",
    "decoder_h_embed": "decoder_queries.rows",
    "decoder_w_embed": "decoder_queries.cols",
    "decoder_t_embed": "decoder_queries.frames",
    "decoder_patch_query_token_type_embed": "decoder_queries.kind",
    "encoder.blocks.": "encoder.",
    "decoder.blocks.": "decoder.",
    "bottleneck.in_linear.": "bottleneck_in.",
    "bottleneck.out_linear.": "bottleneck_out.",
    "bottleneck.regularizer.embedding.weight": "quantizer.codebook",
    "bottleneck.regularizer.stochastic_temperature_inv": "quantizer.inverse_temperature",
    "final_layer.norm_final.": "output_norm.",
    "final_layer.linear.": "output.",
    "prior_model.": "prior.",
}
MLP_KEYS = (("mlp.0.", "mlp.fc1."), ("mlp.2.", "mlp.fc2."))
PARTS = ("query", "key", "value")


def _renamed(key: str, table: Mapping[str, str]) -> str:
    for start, replacement in table.items():
        if key == start or (key.startswith(start) and start.endswith(".")):
            return replacement + key.removeprefix(start)
    return key


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names. The prior's queries, keys and values are joined; patches of single frames get a time axis."""
    renamed = {}
    for key, value in state.items():
        key = _renamed(key, KEYS)
        if key.startswith("prior."):
            for theirs, ours in MLP_KEYS:
                key = key.replace(theirs, ours)
        renamed[key] = value.unsqueeze(2) if key == "patch_embedding.weight" and value.ndim == 4 else value
    joined = {}
    for key, value in renamed.items():
        match = re.fullmatch(r"(prior\.blocks\.\d+\.attn\.)(query|key|value)\.(weight|bias)", key)
        names = [f"{match[1]}{part}.{match[3]}" for part in PARTS] if match else []
        if not match or any(name not in renamed for name in names):
            joined[key] = value
        elif match[2] == PARTS[0]:
            joined[f"{match[1]}qkv.{match[3]}"] = torch.cat([renamed[name] for name in names])
    return joined


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names, from a state dict or from gradients by our names."""
    table = {ours: theirs for theirs, ours in KEYS.items()}
    official = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(prior\.blocks\.\d+\.attn\.)qkv\.(weight|bias)", key)
        parts = {key: value}
        if match:
            parts = {f"{match[1]}{part}.{match[2]}": chunk for part, chunk in zip(PARTS, value.chunk(3), strict=True)}
        elif key.startswith("prior."):
            for theirs, ours in MLP_KEYS:
                key = key.replace(ours, theirs)
            parts = {key: value}
        official.update({_renamed(name, table): part for name, part in parts.items()})
    return official


def arguments_from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments from the authors'.

    Raises:
        InvalidInputError: for parts that the published tokenizers do not have (other bottlenecks, other transformers).
    """
    given = {**DEFAULTS, **config}
    arguments = _quantizer_arguments(given.pop("bottleneck"))
    arguments.update(_prior_arguments(given.pop("prior_model", None) or {}))
    for key in ("transformer_name", "encoder_name", "decoder_name"):
        name = given.pop(key, None)
        if str(name).lower() not in (*NOTHING, "transformer_encoder_parallel"):
            raise InvalidInputError(f"{key} {name!r} is not supported; expected 'transformer_encoder_parallel'")
    arguments.update({ARGUMENTS.get(key, key): value for key, value in given.items() if key not in IGNORED})
    return arguments


def _quantizer_arguments(bottleneck: Mapping[str, Any]) -> dict[str, Any]:
    inside = dict(bottleneck["args"])
    regularizer = inside.get("regularizer") or {}
    norm = str(inside.get("norm") or "none").lower()
    if norm not in NOTHING or str(regularizer.get("name", "")).lower() != "vq":
        raise InvalidInputError(
            f"this bottleneck is not supported: norm {inside.get('norm')!r}, regularizer {regularizer.get('name')!r}; "
            "expected norm 'none' and regularizer 'vq'"
        )
    values = {**QUANTIZER_DEFAULTS, **regularizer["args"]}
    if values.get("entropy_loss_weight"):
        raise InvalidInputError(
            f"entropy_loss_weight {values['entropy_loss_weight']} is not supported; the published tokenizers have 0"
        )
    arguments = {ours: values[theirs] for theirs, ours in QUANTIZER_ARGUMENTS.items() if theirs in values}
    if arguments["stochastic_temperature"] <= 0:
        arguments["stochastic_temperature"] = None  # learned
    return {"codebook_dim": inside["bottleneck_dim"], **arguments}


def _prior_arguments(prior: Mapping[str, Any]) -> dict[str, Any]:
    name = str(prior.get("name") or "none")
    if name.lower() in NOTHING:
        return {}
    inside = dict(prior.get("args") or {})
    size = PRIORS.get(name, (None, None, None))
    layers, heads, width = (
        inside.get(key, value) for key, value in zip(("n_layer", "n_head", "n_embd"), size, strict=True)
    )
    if layers is None or heads is None or width is None:
        raise InvalidInputError(
            f"unknown prior {name!r}; known: {', '.join(PRIORS)} (or give n_layer, n_head and n_embd in its args)"
        )
    mixes = prior.get("use_mix_ss", True)
    return {
        "prior_layers": layers,
        "prior_heads": heads,
        "prior_hidden_size": width,
        "prior_max_tokens": inside.get("max_seq_len", 1024),
        "prior_dropout": 0.0 if prior.get("no_dropout", False) else inside.get("resid_pdrop", 0.1),
        "prior_l2_normalize": inside.get("l2_normalized", True),
        "prior_rounds": prior.get("n_rounds", 2),
        "prior_averages_rounds": prior.get("avg_loss_over_rounds", True)
        and not prior.get("no_grad_before_last_round", False),
        "prior_temperature": prior.get("latent_ce_temperature", 1.0),
        "prior_mix_ratio": prior.get("mix_ss_max_ratio", 0.5) if mixes else 1.0,
        "prior_mix_peak": prior.get("mix_ss_peak_steps_ratio", 0.3) if mixes else 0.0,
    }
