"""TokenPacker inside LLaVA: attaching to a stock model, pictures in prompts, whole checkpoints of the authors.

A sliced picture is written row by row, crop, separator, crop, ..., row end; then, if there is more than one crop, the
overview and a row end. Separator and row end are ordinary words, so a stock LLaVA takes sliced pictures as they are:
its prompt only has to hold the right number of image tokens (`expand_image_tokens`).

Shape letters: B prompts, T ids of a prompt, P pictures, K crops of all pictures, M tokens of a crop, D language width.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vistok.attach import Handle
from vistok.errors import CheckpointError, InvalidInputError
from vistok.files import PACKED_FILE, pack_rows, read_state_dict, save_tensors
from vistok.nn.model import describe_mismatch

if TYPE_CHECKING:
    from .model import TokenPacker

__all__ = [
    "PLACEHOLDER",
    "SplicedInputs",
    "attach_to_llava",
    "attach_to_processor",
    "expand_image_tokens",
    "language_model_of",
    "llava_from_official",
    "multi_level_features",
    "parts_of_llava",
    "picture_layout",
    "splice_visual_tokens",
]

PLACEHOLDER = -200  # where a picture goes, in the authors' prompts
IGNORED = -100
SEPARATOR, ROW_END = -1, -2
SEPARATOR_ID = 29892  # "," in Llama's vocabulary
# The authors look up a newline piece, which Llama's vocabulary lacks, and get <unk>. Released weights know that.
ROW_END_ID = 0
# A byte that no text holds (Llama writes <0x00> for it) marks pictures without a new row in the vocabulary.
IMAGE_TOKEN_ID = 3


# -------------------------------------------------------------------------------------------------------- a stock LLaVA
def parts_of_llava(model: nn.Module) -> tuple[Any, nn.Module]:
    """(the part that holds tower, projector and language model; the encoder of the tower).

    Raises:
        InvalidInputError: if it is no transformers LLaVA, naming what it lacks.
    """
    core = model
    for name in ("model", "base_model"):
        inner = getattr(core, name, None)
        if not hasattr(core, "multi_modal_projector") and isinstance(inner, nn.Module):
            core = parts_of_llava(inner)[0] if name == "base_model" else inner
    lacking = [name for name in ("vision_tower", "multi_modal_projector", "language_model") if not hasattr(core, name)]
    kind = getattr(getattr(core, "config", None), "model_type", "unknown")
    if lacking or kind != "llava":
        raise InvalidInputError(
            f"TokenPacker attaches to LlavaForConditionalGeneration or LlavaModel of transformers; "
            f"{type(model).__name__} is of type {kind!r}" + (f" and lacks {', '.join(lacking)}" if lacking else "")
        )
    tower = getattr(core.vision_tower, "vision_model", core.vision_tower)
    if not isinstance(getattr(getattr(tower, "encoder", None), "layers", None), nn.ModuleList):
        raise InvalidInputError(
            f"the vision tower {type(core.vision_tower).__name__} keeps no blocks under encoder.layers; "
            "CLIP and SigLIP towers do"
        )
    return core, tower


def language_model_of(model: nn.Module) -> nn.Module:
    """The model itself, if it has a language head and so computes a loss."""
    if model.get_output_embeddings() is None:
        raise InvalidInputError(
            f"{type(model).__name__} has no language head; attach to LlavaForConditionalGeneration to train"
        )
    return model


def multi_level_features(vision_tower: nn.Module, images: Tensor, levels: Sequence[int]) -> list[Tensor]:
    """Hidden states of a vision tower at some depths, without the class token: [B, N, C] each.

    Args:
        vision_tower: transformers vision model.
        images: [B, 3, H, W].
        levels: 0 is the embeddings, l the output of block l.
    """
    states = vision_tower(
        images.to(next(vision_tower.parameters()).dtype), output_hidden_states=list(levels), return_dict=True
    ).hidden_states
    if len(states) <= max(levels):
        raise InvalidInputError(f"level {max(levels)} asked of a tower with {len(states) - 1} blocks")
    first = int(_has_class_token(getattr(vision_tower, "vision_model", vision_tower)))
    return [states[level][:, first:].to(images.dtype) for level in levels]


def _has_class_token(tower: nn.Module) -> bool:
    return hasattr(getattr(tower, "embeddings", None), "class_embedding")


def _pass_through(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def attach_to_llava(packer: TokenPacker, model: nn.Module, handle: Handle) -> None:
    """Put `packer` in the place of the projector, and let the tower hand out the levels that it reads.

    Blocks of the tower behind the last level are skipped. The prompt must hold M image tokens a crop: attach to the
    processor, too, or use `expand_image_tokens`.
    """
    core, tower = parts_of_llava(model)
    before = core.multi_modal_projector
    if type(before) is type(packer):
        raise InvalidInputError("another TokenPacker is attached to this model; remove its handle first")
    vision, text, config = core.config.vision_config, core.config.text_config, packer.config
    depth, levels = len(tower.encoder.layers), list(config.feature_levels)
    side = vision.image_size // vision.patch_size
    wanted = {
        "hidden_size": (config.hidden_size, text.hidden_size, "the language model's width"),
        "feature_dim": (config.feature_dim, vision.hidden_size, "the vision tower's width"),
    }
    for name, (given, needed, what) in wanted.items():
        if given != needed:
            raise InvalidInputError(
                f"the projector has {name}={given}, but {what} is {needed}; build one with TokenPacker.for_llava(model)"
            )
    if max(levels) > depth:
        raise InvalidInputError(f"the projector reads level {max(levels)}, but the vision tower has {depth} blocks")
    places = {parameter.device for parameter in (*before.parameters(), *packer.parameters())}
    if len(places) != 1 or next(iter(places)).type == "meta":
        raise InvalidInputError(
            f"the projector and the model's own lie on {', '.join(sorted(map(str, places)))}; move the TokenPacker "
            "with .to(device), and attach before offloading"
        )
    number = packer.num_tokens((side, side))
    handle.undo_with(setattr, core, "multi_modal_projector", before)
    core.multi_modal_projector = packer
    strategy = "default" if _has_class_token(tower) else "full"
    for holder in {id(part.config): part.config for part in (model, core)}.values():
        handle.replace(holder, "vision_feature_layer", levels)
        handle.replace(holder, "vision_feature_select_strategy", strategy)
        handle.replace(holder, "image_seq_length", number)
    # The blocks stay where they are, so that state dicts, hooks and indices of others keep their meaning.
    for block in tower.encoder.layers[max(levels) :]:
        handle.replace(block, "forward", _pass_through)


def attach_to_processor(packer: TokenPacker, processor: Any, handle: Handle) -> None:
    """Let a `LlavaProcessor` write M image tokens a picture."""
    patch = getattr(processor, "patch_size", None)
    if patch is None or not hasattr(processor, "image_token"):
        raise InvalidInputError(
            f"a TokenPacker attaches to a LLaVA or to its processor (with patch_size set); "
            f"got {type(processor).__name__}"
        )
    # The processor counts picture side // patch_size, which this makes the side of the token grid.
    handle.replace(processor, "patch_size", patch * packer.scale_factor)


# -------------------------------------------------------------------------------------------------- pictures in prompts
@lru_cache(maxsize=256)
def picture_layout(tokens_per_crop: int, grid: tuple[int, int] | None = None) -> Tensor:
    """What a picture is written as, int64: numbers of its visual tokens from 0, SEPARATOR (-1) and ROW_END (-2).

    Args:
        tokens_per_crop: M.
        grid: (rows, cols) of crops of a sliced picture; None for a picture that is one crop without separators.
    """
    if grid is None:
        return torch.arange(tokens_per_crop)
    rows, cols = grid
    if tokens_per_crop < 1 or rows < 1 or cols < 1:
        raise InvalidInputError(f"expected at least one token and one crop; got {tokens_per_crop} and {rows}x{cols}")
    crops = torch.arange(rows * cols * tokens_per_crop).view(rows, cols, tokens_per_crop)
    marks = torch.full((rows, cols, 1), SEPARATOR)
    marks[:, -1] = ROW_END
    parts = [torch.cat([crops, marks], dim=2).flatten()]
    if rows * cols > 1:
        parts += [torch.arange(tokens_per_crop) + rows * cols * tokens_per_crop, torch.tensor([ROW_END])]
    return torch.cat(parts)


@dataclass(frozen=True)
class _Plan:
    """Where everything of the spliced prompts comes from, [B, W] each.

    Attributes:
        column: position in the original prompt, -1 for inserted and padded positions.
        visual: number of the visual token, -1 elsewhere.
        mark: SEPARATOR, ROW_END, or 0.
        inside: False for padding.
    """

    column: Tensor
    visual: Tensor
    mark: Tensor
    inside: Tensor


def _plan(
    is_picture: Tensor,
    tokens_per_crop: int,
    grids: Sequence[tuple[int, int]] | None,
    crops_held: Tensor,
    padding_side: str,
    max_length: int | None,
) -> _Plan:
    """Lay out the prompts: one pass over the pictures, everything else vectorised.

    Args:
        is_picture: bool [B, T], where pictures go.
        grids: (rows, cols) of every picture in order; None for pictures of one crop.
        crops_held: int64 [B], crops in the batch before which no picture of this prompt begins (dummies).
    """
    batch, width = is_picture.shape
    number = int(is_picture.sum())
    if grids is not None and len(grids) != number:
        raise InvalidInputError(f"{number} pictures in the prompts, but {len(grids)} grids")
    layouts = [picture_layout(tokens_per_crop, None if grids is None else tuple(grids[n])) for n in range(number)]
    sizes = torch.tensor([len(layout) for layout in layouts], dtype=torch.int64)
    crops = torch.tensor([int(layout.max()) // tokens_per_crop + 1 for layout in layouts], dtype=torch.int64)
    lengths = torch.ones(batch, width, dtype=torch.int64)
    lengths[is_picture] = sizes
    row_of_picture = is_picture.nonzero()[:, 0]
    first_crop = crops.cumsum(0) - crops + crops_held[row_of_picture] if number else crops
    flat = lengths.flatten()
    source = torch.repeat_interleave(torch.arange(batch * width), flat)
    offset = torch.arange(len(source)) - (flat.cumsum(0) - flat)[source]
    row = source // width
    totals = lengths.sum(1)
    before = totals.cumsum(0) - totals
    place = torch.arange(len(source)) - before[row]
    longest = int(totals.max())
    if padding_side == "left":
        place = place + (longest - totals)[row]
    content = torch.zeros(batch * width, dtype=torch.int64)  # number of the picture at each place of the prompts
    content[is_picture.flatten()] = torch.arange(number)
    inserted = is_picture.flatten()[source]
    value = torch.zeros(len(source), dtype=torch.int64)
    visual = torch.full((len(source),), -1)
    if number:
        begin = sizes.cumsum(0) - sizes
        picture = content[source]
        value = torch.where(inserted, torch.cat(layouts)[(begin[picture] + offset).clamp_max(int(sizes.sum()) - 1)], 0)
        visual = torch.where(inserted & (value >= 0), value + first_crop[picture] * tokens_per_crop, -1)

    def spread(values: Tensor, fill: Any) -> Tensor:
        out = torch.full((batch, longest), fill, dtype=values.dtype)
        out[row, place] = values
        return out if max_length is None else out[:, :max_length]

    return _Plan(
        column=spread(torch.where(inserted, -1, source % width), -1),
        visual=spread(visual, -1),
        mark=spread(torch.where(inserted, value.clamp_max(0), 0), 0),
        inside=spread(torch.ones(len(source), dtype=torch.bool), False),
    )


@dataclass(frozen=True)
class SplicedInputs:
    """Prompts with their pictures, ready for a language model; W positions.

    Attributes:
        input_ids: int64 [B, W] or None (after `splice_visual_tokens`).
        inputs_embeds: [B, W, D] or None (after `expand_image_tokens`).
        attention_mask: bool [B, W].
        labels: int64 [B, W], -100 at inserted and padded positions; None without labels.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor
    labels: Tensor | None

    def model_inputs(self) -> dict[str, Tensor]:
        """What is there, by the names of a model's forward."""
        parts = {
            "input_ids": self.input_ids,
            "inputs_embeds": self.inputs_embeds,
            "attention_mask": self.attention_mask,
            "labels": self.labels,
        }
        return {name: part for name, part in parts.items() if part is not None}


def _take(values: Tensor, column: Tensor, fill: Any) -> Tensor:
    """`values[b, column[b, w]]`, and `fill` where the column is -1."""
    return values.gather(1, column.clamp_min(0)).masked_fill(column < 0, fill)


def _prepare(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    image_token_id: int,
    tokens_per_crop: int,
    grids: Sequence[tuple[int, int]] | None,
    dummy_crops: bool,
    padding_side: str,
    max_length: int | None,
) -> tuple[_Plan, Tensor, Tensor | None]:
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
        raise InvalidInputError(f"input_ids must be int64 [B, T]; got {input_ids.dtype} {list(input_ids.shape)}")
    if padding_side not in ("left", "right"):
        raise InvalidInputError(f"padding_side must be 'left' or 'right'; got {padding_side!r}")
    for name, given in (("attention_mask", attention_mask), ("labels", labels)):
        if given is not None and given.shape != input_ids.shape:
            raise InvalidInputError(f"{name} {list(given.shape)} does not fit input_ids {list(input_ids.shape)}")
    is_picture = (input_ids == image_token_id).cpu()
    # Without a picture, a prompt of the authors' batches still holds one crop, which is passed over.
    dummies = (~is_picture.any(1)).long() if dummy_crops else torch.zeros(len(input_ids), dtype=torch.int64)
    plan = _plan(is_picture, tokens_per_crop, grids, dummies.cumsum(0) - dummies, padding_side, max_length)
    device = input_ids.device
    plan = _Plan(*(part.to(device) for part in (plan.column, plan.visual, plan.mark, plan.inside)))
    seen = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    mask = _take(seen, plan.column, True) & plan.inside
    return plan, mask, None if labels is None else _take(labels, plan.column, IGNORED)


def expand_image_tokens(
    input_ids: Tensor,
    tokens_per_crop: int,
    *,
    grids: Sequence[tuple[int, int]] | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    placeholder_id: int = PLACEHOLDER,
    image_token_id: int = IMAGE_TOKEN_ID,
    separator_id: int = SEPARATOR_ID,
    row_end_id: int = ROW_END_ID,
    pad_token_id: int = 0,
    padding_side: str = "right",
    max_length: int | None = None,
) -> SplicedInputs:
    """Prompts with one placeholder a picture become prompts for a stock LLaVA with a TokenPacker attached.

    Args:
        input_ids: int64 [B, T].
        tokens_per_crop: M (`packer.num_tokens()`).
        grids: (rows, cols) of every sliced picture, in order of appearance; None if no picture is sliced.
        attention_mask: bool or integer [B, T]; None sees everything.
        labels: int64 [B, T].
        placeholder_id: id of the placeholder in `input_ids`.
        image_token_id: id that the model replaces by visual tokens (`model.config.image_token_id`).
        separator_id, row_end_id: between the crops of a row, and after each row (defaults: the released checkpoints').
        pad_token_id: fills prompts that are shorter than the longest.
        padding_side: where to fill; "left" for generating.
        max_length: cut prompts after this many positions.

    Raises:
        InvalidInputError: if shapes, or pictures and grids, do not fit each other.
    """
    plan, mask, new_labels = _prepare(
        input_ids, attention_mask, labels, placeholder_id, tokens_per_crop, grids, False, padding_side, max_length
    )
    ids = _take(input_ids, plan.column, pad_token_id)
    ids = torch.where(plan.visual >= 0, image_token_id, ids)
    ids = torch.where(plan.mark == SEPARATOR, separator_id, torch.where(plan.mark == ROW_END, row_end_id, ids))
    return SplicedInputs(ids, None, mask, new_labels)


def splice_visual_tokens(
    embedding: nn.Module,
    input_ids: Tensor,
    visual_tokens: Tensor,
    *,
    grids: Sequence[tuple[int, int]] | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    placeholder_id: int = PLACEHOLDER,
    separator_id: int = SEPARATOR_ID,
    row_end_id: int = ROW_END_ID,
    dummy_crops: bool = False,
    padding_side: str = "right",
    max_length: int | None = None,
) -> SplicedInputs:
    """Prompts with one placeholder a picture become embeddings with the pictures in place.

    Args:
        embedding: the language model's, ids to [..., D].
        input_ids: int64 [B, T].
        visual_tokens: [K, M, D] of all crops in order of appearance, overviews after the crops of their picture.
        dummy_crops: prompts without a picture have one crop in `visual_tokens`, as in the authors' batches.
        grids, attention_mask, labels, placeholder_id, separator_id, row_end_id, padding_side, max_length: see
            `expand_image_tokens`.

    Returns:
        Embeddings that are zero at padded positions.

    Raises:
        InvalidInputError: if shapes do not fit, or there are more or fewer crops than the prompts name.
    """
    crops, per_crop, width = visual_tokens.shape
    plan, mask, new_labels = _prepare(
        input_ids, attention_mask, labels, placeholder_id, per_crop, grids, dummy_crops, padding_side, max_length
    )
    pictures = input_ids == placeholder_id
    needed = int(pictures.sum()) if grids is None else sum(r * c + (r * c > 1) for r, c in grids)
    needed += int((~pictures.any(1)).sum()) if dummy_crops else 0
    if needed != crops:
        raise InvalidInputError(f"the prompts need {needed} crops; visual_tokens holds {crops}")
    ids = _take(input_ids, plan.column, 0)
    ids = torch.where(plan.mark == SEPARATOR, separator_id, torch.where(plan.mark == ROW_END, row_end_id, ids))
    embedded = embedding(ids)
    flat = visual_tokens.reshape(crops * per_crop, width).to(embedded.dtype)
    chosen = flat.index_select(0, plan.visual.clamp_min(0).flatten()).view(embedded.shape) if crops else embedded
    embedded = torch.where((plan.visual >= 0)[..., None], chosen, embedded)
    return SplicedInputs(None, embedded.masked_fill(~plan.inside[..., None], 0), mask, new_labels)


# ---------------------------------------------------------------------------------------------------- whole checkpoints
# Buffers of old transformers versions, which newer ones compute.
IGNORED_KEYS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
LLAVA_NAMES = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.mm_projector\.", "model.multi_modal_projector."),
    (r"^model\.(embed_tokens|layers|norm)\b", r"model.language_model.\1"),
)
CLIP_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def rename_llava(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names of a whole checkpoint to those of `LlavaForConditionalGeneration` with a TokenPacker in it."""
    from .model import TokenPacker

    renamed, projector = {}, {}
    for key, value in state.items():
        if IGNORED_KEYS.search(key):
            continue
        if key.startswith("model.mm_projector."):
            projector[key.removeprefix("model.mm_projector.")] = value
            continue
        for pattern, replacement in LLAVA_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    own = TokenPacker.rename_official(projector)
    return renamed | {f"model.multi_modal_projector.{key}": value for key, value in own.items()}


def empty_llava(
    language: Mapping[str, Any],
    vision: Mapping[str, Any] | None = None,
    *,
    scale_factor: int = 2,
    image_token_id: int = IMAGE_TOKEN_ID,
    **projector: Any,
) -> Any:
    """`LlavaForConditionalGeneration` with a TokenPacker as its projector, all on the meta device.

    Args:
        language: `LlamaConfig` arguments; vision: `CLIPVisionConfig` arguments (None: CLIP-ViT-L/14 at 336 pixels).
        scale_factor: s.
        image_token_id: id that stands for a visual token; its own embedding is never used.
        projector: further arguments of `TokenPacker`.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from .model import TokenPacker

    tower = CLIPVisionConfig(**{**CLIP_LARGE_336, **(vision or {})})
    text = LlamaConfig(**language)
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=image_token_id,
        vision_feature_select_strategy="default",
        tie_word_embeddings=bool(language.get("tie_word_embeddings", False)),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
        arguments = {
            "hidden_size": text.hidden_size,
            "scale_factor": scale_factor,
            "grid_size": tower.image_size // tower.patch_size,
            "feature_dim": tower.hidden_size,
        }
        packer = TokenPacker(**{**arguments, **projector})
    install(packer, model)
    return model


def install(packer: TokenPacker, model: Any) -> None:
    """Make `packer` the projector of a LLaVA for good; blocks of the tower behind its last level are skipped."""
    model.model.multi_modal_projector = packer
    model.config.vision_feature_layer = list(packer.config.feature_levels)
    model.config.image_seq_length = packer.num_tokens()
    tower = model.model.vision_tower
    for block in getattr(tower, "vision_model", tower).encoder.layers[max(packer.config.feature_levels) :]:
        block.forward = _pass_through


# ---------------------------------------------------------------------------------------------------------- our folders
PROJECTOR_FOLDER = "projector"
WEIGHTS_FILE = "model.safetensors"


def save_llava(model: Any, folder: str | os.PathLike[str], *, packed: bool = False) -> None:
    """Write a LLaVA whose projector is a TokenPacker: its configuration, `projector/config.json` and all weights.

    Args:
        model: the LLaVA.
        folder: to write.
        packed: int8 rows instead of the model's own type (see `vistok.files.pack_rows`).
    """
    folder = Path(folder)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    model.model.multi_modal_projector.save_config(folder / PROJECTOR_FOLDER)
    state = model.state_dict()
    if packed:
        save_tensors(folder / PACKED_FILE, pack_rows(state), metadata={"format": "pt"})
    else:
        save_tensors(folder / WEIGHTS_FILE, state, metadata={"format": "pt"})


def load_llava(folder: str | os.PathLike[str]) -> Any:
    """Read what `save_llava` wrote, strictly, in the floating point type of the file.

    Raises:
        CheckpointError: a file is missing, or the weights do not fit.
    """
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

    from .model import TokenPacker

    folder = Path(folder)
    file = folder / PACKED_FILE
    state = read_state_dict(file if file.is_file() else folder / WEIGHTS_FILE)
    try:
        config = LlavaConfig.from_pretrained(folder)
        arguments = json.loads((folder / PROJECTOR_FOLDER / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no LLaVA with a TokenPacker ({error})") from error
    model = LlavaForConditionalGeneration(config)
    install(TokenPacker(**{key: value for key, value in arguments.items() if not key.startswith("_")}), model)
    problems = describe_mismatch(model.state_dict(), state)
    if problems:
        raise CheckpointError(f"{folder}: the weights do not fit a LLaVA with a TokenPacker: " + "; ".join(problems))
    model.load_state_dict(state, strict=True)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(next(iter(state.values())).dtype).eval()


def llava_from_official(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    language: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    *,
    scale_factor: int | None = None,
    **projector: Any,
) -> Any:
    """A whole LLaVA-TokenPacker checkpoint of the authors as a transformers model.

    The model generates, trains and quantises like any `LlavaForConditionalGeneration`; prompts are made with
    `expand_image_tokens`, pictures with `preprocess`.

    Args:
        source: folder with `config.json` and (sharded) weights as published, or a state dict.
        language: `LlamaConfig` arguments; needed for a state dict, read from `config.json` otherwise.
        vision: `CLIPVisionConfig` arguments that differ from CLIP-ViT-L/14 at 336 pixels.
        scale_factor: s; None takes the folder's `scale_factor`, or 2.
        projector: further arguments of `TokenPacker`.

    Returns:
        The model in eval mode, in the checkpoint's floating point type. Parameters keep the checkpoint's memory.

    Raises:
        CheckpointError: naming every missing, unexpected or misshapen key.
    """
    if isinstance(source, Mapping):
        if language is None:
            raise InvalidInputError(
                "a state dict says nothing about heads: give language={...} (LlamaConfig arguments)"
            )
        state, name = dict(source), "the given state dict"
    else:
        folder, name = Path(source), str(source)
        config = _read_config(folder)
        scale_factor = config.get("scale_factor") if scale_factor is None else scale_factor
        if language is None:
            language = {
                key: value for key, value in config.items() if not key.startswith("mm_") and key in _TEXT_FIELDS
            }
        state = _read_shards(folder)
    model = empty_llava(language, vision, scale_factor=scale_factor or 2, **projector)
    renamed = rename_llava(state)
    problems = describe_mismatch(model.state_dict(), renamed)
    if problems:
        raise CheckpointError(f"{name} does not fit LLaVA-TokenPacker: " + "; ".join(problems))
    model.load_state_dict(renamed, strict=True, assign=True)
    for part in model.modules():  # tables outside the state dict: rotary frequencies and position numbers
        if any(buffer.is_meta for buffer in part.buffers(recurse=False)):
            for key, buffer in type(part)(part.config).named_buffers(recurse=False):
                setattr(part, key, buffer)
    return model.eval()


_TEXT_FIELDS = frozenset(
    {
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "rope_theta",
        "tie_word_embeddings",
    }
)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no config.json; give the folder of a LLaVA-TokenPacker checkpoint")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error


def _read_shards(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for pattern in ("pytorch_model*.bin", "model*.safetensors"):
        for shard in sorted(folder.glob(pattern)):
            state.update(read_state_dict(shard))
        if state:
            return state
    raise CheckpointError(f"{folder} holds no pytorch_model*.bin and no model*.safetensors")
