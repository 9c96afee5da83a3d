"""The authors' parameter names and ours, both ways.

Joined on loading: queries, keys and values of a self-attention (one matrix); keys and values of all cross-attentions
of a Q-Former (one matrix); the query and value bias of the vision transformer (with zeros for the keys).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["qformer_from_official", "qformer_to_official", "seed_from_official", "seed_to_official"]

LAYER_NAMES = (
    ("attention.output.dense.", "attention_out."),
    ("attention.output.LayerNorm.", "attention_norm."),
    ("crossattention.self.query.", "cross_query."),
    ("crossattention.output.dense.", "cross_out."),
    ("crossattention.output.LayerNorm.", "cross_norm."),
    ("intermediate_query.dense.", "ffn_in."),
    ("output_query.dense.", "ffn_out."),
    ("output_query.LayerNorm.", "ffn_norm."),
    ("intermediate.dense.", "text_ffn_in."),
    ("output.dense.", "text_ffn_out."),
    ("output.LayerNorm.", "text_ffn_norm."),
)
QFORMER_NAMES = (
    ("bert.embeddings.LayerNorm.", "embedding_norm."),
    ("bert.embeddings.word_embeddings.", "word_embeddings."),
    ("bert.embeddings.position_embeddings.", "position_embeddings."),
    ("cls.predictions.transform.dense.", "lm_dense."),
    ("cls.predictions.transform.LayerNorm.", "lm_norm."),
    ("cls.predictions.decoder.", "lm_out."),
)
# Outside the Q-Formers. Beside each head the authors keep blocks of its own name.
MODEL_NAMES = (
    ("visual_encoder.patch_embed.proj.", "vision.patch_embed."),
    ("visual_encoder.", "vision."),
    ("ln_vision.", "vision_norm."),
    ("quantize.embedding.weight", "codebook"),
    ("blocks_image.", "image_blocks."),
    ("blocks.", "reconstruction_blocks."),
    ("pos_embed_image", "image_position"),
    ("pos_embed", "reconstruction_position"),
    ("distill_image_proj.", "embedding_proj."),
    ("temp", "temperature"),
)
TEXT_HEAD_NAMES = (
    ("blocks_text.", "blocks_image."),
    ("pos_embed_text", "pos_embed_image"),
    ("distill_text_proj.", "distill_image_proj."),
)
QFORMERS = (("Reverse_Qformer.", "reverse_qformer."), ("Qformer.", "qformer."))
LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.(.*)")
OWN_LAYER = re.compile(r"layers\.(\d+)\.(.*)")
IGNORED = ("bert.embeddings.position_ids", "cls.predictions.bias")


def _renamed(key: str, table: tuple[tuple[str, str], ...]) -> str | None:
    for theirs, ours in table:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return None


def qformer_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Q-Former's tensors under our names (`bert.` and `cls.` are the authors' first components)."""
    renamed: dict[str, Tensor] = {}
    own: dict[tuple[int, str], dict[str, Tensor]] = {}
    cross: dict[str, dict[tuple[int, str], Tensor]] = {"weight": {}, "bias": {}}
    for key, value in state.items():
        if key in IGNORED:
            continue
        match = LAYER.fullmatch(key)
        if match is None:
            renamed[_renamed(key, QFORMER_NAMES) or key] = value
            continue
        number, rest = int(match[1]), match[2]
        part = re.fullmatch(r"(cross)?attention\.self\.(query|key|value)\.(weight|bias)", rest)
        if part and part[1] is None:
            own.setdefault((number, part[3]), {})[part[2]] = value
        elif part and part[2] != "query":
            cross[part[3]][number, part[2]] = value
        else:
            renamed[f"layers.{number}.{_renamed(rest, LAYER_NAMES) or rest}"] = value
    for (number, kind), parts in own.items():
        if len(parts) == 3:
            renamed[f"layers.{number}.attention_qkv.{kind}"] = torch.cat([parts[p] for p in ("query", "key", "value")])
        else:  # incomplete: keep the official names, so that the difference is reported
            renamed |= {f"layers.{number}.attention.self.{part}.{kind}": value for part, value in parts.items()}
    for kind, pieces in cross.items():
        if pieces:  # by layer, key before value
            renamed[f"cross_key_value.{kind}"] = torch.cat([pieces[place] for place in sorted(pieces)])
    return renamed


def qformer_to_official(state: Mapping[str, Tensor], cross_layers: list[int]) -> dict[str, Tensor]:
    """The reverse, without the buffers of `IGNORED`."""
    official: dict[str, Tensor] = {}
    back = {ours: theirs for theirs, ours in LAYER_NAMES}
    outer = {ours: theirs for theirs, ours in QFORMER_NAMES}
    for key, value in state.items():
        match = OWN_LAYER.fullmatch(key)
        if key.startswith("cross_key_value."):
            kind = key.removeprefix("cross_key_value.")
            pieces = iter(value.chunk(2 * len(cross_layers)))
            for number in cross_layers:
                for part in ("key", "value"):
                    official[f"bert.encoder.layer.{number}.crossattention.self.{part}.{kind}"] = next(pieces)
        elif match and match[2].startswith("attention_qkv."):
            kind = match[2].removeprefix("attention_qkv.")
            for part, piece in zip(("query", "key", "value"), value.chunk(3)):
                official[f"bert.encoder.layer.{match[1]}.attention.self.{part}.{kind}"] = piece
        elif match:
            name = _renamed(match[2], tuple(back.items())) or match[2]
            official[f"bert.encoder.layer.{match[1]}.{name}"] = value
        else:
            official[_renamed(key, tuple(outer.items())) or key] = value
    return official


def seed_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole tokenizer's tensors under our names."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name = _renamed(key, TEXT_HEAD_NAMES) or key
        found = next(((theirs, ours) for theirs, ours in QFORMERS if name.startswith(theirs)), None)
        if found:
            parts.setdefault(found[1], {})[name.removeprefix(found[0])] = value
        else:
            renamed[_renamed(name, MODEL_NAMES) or name] = value
    for prefix, part in parts.items():
        renamed |= {prefix + key: value for key, value in qformer_from_official(part).items()}
    for key in [key for key in renamed if key.startswith("vision.") and key.endswith(".attn.q_bias")]:
        stem = key.removesuffix("q_bias")
        if f"{stem}v_bias" in renamed:
            query, value = renamed.pop(key), renamed.pop(f"{stem}v_bias")
            renamed[f"{stem}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return renamed


def seed_to_official(
    state: Mapping[str, Tensor], cross_layers: Mapping[str, list[int]], text_head: bool = False
) -> dict[str, Tensor]:
    """The reverse.

    Args:
        state: under our names.
        cross_layers: Q-Former prefix ("qformer.", "reverse_qformer.") -> its layers with cross-attention.
        text_head: use the names of SEED-1's head.
    """
    official: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    back = tuple((ours, theirs) for theirs, ours in MODEL_NAMES)
    text = tuple((theirs, text) for text, theirs in TEXT_HEAD_NAMES)
    for key, value in state.items():
        found = next(((theirs, ours) for theirs, ours in QFORMERS if key.startswith(ours)), None)
        if found:
            parts.setdefault(found[1], {})[key.removeprefix(found[1])] = value
        elif key.startswith("vision.") and key.endswith(".attn.qkv.bias"):
            stem = "visual_encoder." + key.removeprefix("vision.").removesuffix("qkv.bias")
            official[f"{stem}q_bias"], _, official[f"{stem}v_bias"] = value.chunk(3)
        else:
            name = _renamed(key, back) or key
            official[(_renamed(name, text) or name) if text_head else name] = value
    for theirs, ours in QFORMERS:
        if ours in parts:
            converted = qformer_to_official(parts[ours], cross_layers[ours])
            official |= {theirs + key: value for key, value in converted.items()}
    return official
