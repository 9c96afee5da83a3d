"""The lab's vision-language model: a small stock LLaVA, trained from scratch on questions about lab scenes.

What comes out is an ordinary `LlavaForConditionalGeneration` of transformers (CLIP tower, two-layer projector, Llama
decoder) with an ordinary `LlavaProcessor`: pruners, projectors and everything else that works on a LLaVA can be tried
on it without a download.

A picture costs many tokens and a question few, so a training sequence holds one picture and as many questions as fit;
each question sees the picture and itself only, as if it were asked alone. Training has stages:

- `tower`: every patch of the vision tower tells what it shows (object, shape, colour, size, shade, where the object's
  centre lies), and the class token tells what the picture holds.
- `language`: projector and decoder learn to answer; the tower is frozen, as in LLaVA.
- `projector`: only the projector learns to answer, as in LLaVA's alignment.
- `all`: everything learns, with both objectives.

In the projector's place a TokenPacker can stand, or one of the plain ways to fewer tokens that it is compared with.

Letters: B pictures, P patches, V = P + 2 tokens before the text, T text tokens of a picture, S = V + T, D channels,
H heads, d channels of a head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from vistok.data.shapes import (
    ANSWERS,
    COLOURS,
    QUESTION_KINDS,
    QUESTION_VOCABULARY,
    SHADES,
    SHAPES,
    SIZES,
    VOCABULARY,
    Question,
    Scene,
    questions,
    render,
    sample_scene,
)
from vistok.data.shapes.render import coverage
from vistok.errors import InvalidInputError
from vistok.nn.model import VistokModel

if TYPE_CHECKING:
    from .recipe import Recipe, ShapesQuestionsRecipe

__all__ = ["LabLlava", "LlavaMonitor", "ShapesQuestions", "answers", "build_processor", "word_ids"]

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
PAD, BEGIN, END, UNKNOWN, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
# Names of the world first; `describe` and `picture` make one more question.
WORDS = tuple(dict.fromkeys((*ANSWERS, *QUESTION_VOCABULARY, *VOCABULARY, "describe", ".")))
# Not the width of a layer: the recipe option `muon` knows the output layer by this number of rows.
VOCABULARY_SIZE = 112
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{% else %}<user>{% endif %}"
    "{% if message['content'] is string %} {{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

STAGES = ("tower", "projector", "language", "all")
PROJECTORS = ("mlp", "tokenpacker", "pooling", "points")

PATCH_FIELDS = 7  # of `patch_targets`
# Shapes are learnt last and matter most.
DENSE_WEIGHTS = {
    "shape": 2.0,
    "colour": 1.0,
    "size": 1.0,
    "shade": 1.0,
    "position": 4.0,
    "centre": 3.0,
    "held": 1.0,
    "number": 0.5,
}
OBJECT_WEIGHT = 4.0  # of a draw of visual tokens
OWNED = 0.3  # share of a patch that an object covers for the patch to belong to it
BACKGROUND_WEIGHT = 0.2  # most patches are background
HELD_OUT_SCENES = 96  # about eight questions each
EVALUATION_BATCH = 32
HELD_OUT_STREAM = 2**40


# ----------------------------------------------------------------------------------------------------------- the words
@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, int]:
    return {word: number for number, word in enumerate([*SPECIAL, *WORDS])}


def word_ids(text: str) -> list[int]:
    """Ids of a text's words; punctuation counts as words. The tokenizer of `build_processor` gives the same."""
    known = _vocabulary()
    return [known.get(word, UNKNOWN) for word in re.findall(r"\w+|[^\w\s]+", text.lower())]


def build_processor(image_size: int = 64, patch_size: int = 4) -> Any:
    """A stock `LlavaProcessor`: CLIP's image processor, a word-level tokenizer over the question grammar, a template.

    Args:
        image_size: side in pixels that pictures are brought to.
        patch_size: side of a patch; (image_size / patch_size)^2 image tokens.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel(_vocabulary(), unk_token="<unk>"))
    plain.normalizer = normalizers.Lowercase()
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    size = {"height": image_size, "width": image_size}
    images = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


# ------------------------------------------------------------------------------------------------------------ the data
def patch_targets(scene: Scene, image_size: int, patch_size: int) -> np.ndarray:
    """What each patch shows.

    Returns:
        float32 [P, 7]: shape (0 is background), colour, size and shade by their numbers (-1 on background), x and y
        of its object's centre as fractions of the side (0 on background), and 1 to 0 for the distance
        to the nearest object's centre, 0 from one and a half patches on.
    """
    side = image_size // patch_size
    targets = np.zeros((side * side, PATCH_FIELDS), dtype=np.float32)
    targets[:, 1:4] = -1.0
    grid = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = np.tile(grid, side), np.repeat(grid, side)
    for item in scene.objects:
        rows, columns, share = coverage(item, image_size)
        canvas = np.zeros((image_size, image_size), dtype=np.float32)
        canvas[rows, columns] = share
        covered = canvas.reshape(side, patch_size, side, patch_size).mean((1, 3)).ravel()
        own = covered > OWNED
        across, down = item.centre[0] - x, item.centre[1] - y
        numbers = (
            SHAPES.index(item.shape) + 1,
            COLOURS.index(item.colour),
            SIZES.index(item.size),
            SHADES.index(item.shade),
        )
        targets[own, :4] = numbers
        targets[own, 4:6] = item.centre
        near = 1.0 - np.sqrt(across * across + down * down) * (side / 1.5)
        np.maximum(targets[:, 6], near, out=targets[:, 6])
    return targets


def picture_targets(scene: Scene) -> list[float]:
    """16 numbers of 0 or 1: which shapes and which colours the picture holds; then the number of objects minus one."""
    shapes, colours = {item.shape for item in scene.objects}, {item.colour for item in scene.objects}
    held = [float(name in shapes) for name in SHAPES] + [float(name in colours) for name in COLOURS]
    return [*held, len(scene.objects) - 1.0]


def inventory(scene: Scene) -> str:
    """Every object from left to right: "large plain red circle , small light blue star"."""
    items = sorted(scene.objects, key=lambda item: item.centre)
    return " , ".join(f"{item.size} {item.shade} {item.colour} {item.shape}" for item in items)


class ShapesQuestions:
    """Fresh scenes with questions, packed into one text row each (see `ShapesQuestionsRecipe`)."""

    order = None  # scenes never repeat

    def __init__(self, recipe: ShapesQuestionsRecipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed

    def scene(self, number: int) -> Scene:
        """Scene `number` of this training's stream."""
        return sample_scene(self.seed, number, self.recipe.objects)

    def asked(self, number: int) -> list[tuple[str, str, str]]:
        """(question, answer, kind) in the order in which they fill the row: kinds take turns, in random order."""
        scene, rng = self.scene(number), np.random.default_rng((self.seed, number))
        by_kind: dict[str, list[Question]] = {}
        for item in questions(scene):
            by_kind.setdefault(item.kind, []).append(item)
        for found in by_kind.values():
            rng.shuffle(found)
        listed = []
        while by_kind:
            kinds = list(by_kind)
            rng.shuffle(kinds)
            for kind in kinds:
                for _ in range(self.recipe.relations if kind == "relation" else 1):
                    item = by_kind[kind].pop()
                    listed.append((item.text, item.answer, kind))
                    if not by_kind[kind]:
                        del by_kind[kind]
                        break
        if rng.random() < self.recipe.descriptions:
            listed.insert(0, ("describe the picture .", inventory(scene), "description"))
        return listed

    def batch(self, numbers: np.ndarray) -> dict[str, Any]:
        """`images` uint8 [B, 3, H, W]; `text`, `labels`, `segments` int64 [B, T] (-100 where nothing is learnt, -1
        segments are padding); `patches` float32 [B, P, 7] and `pictures` float32 [B, 17]."""
        recipe, size = self.recipe, self.recipe.image_size
        pictures, patches, whole = [], [], []
        shape = (len(numbers), recipe.text_tokens)
        text, labels, segments = np.full(shape, PAD), np.full(shape, -100), np.full(shape, -1)
        for row, number in enumerate(numbers.tolist()):
            scene = self.scene(number)
            pictures.append(render(scene, size))
            patches.append(patch_targets(scene, size, recipe.patch_size))
            whole.append(picture_targets(scene))
            pack(self.asked(number), text[row], labels[row], segments[row])
        return {
            "images": torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(),
            "text": torch.from_numpy(text),
            "labels": torch.from_numpy(labels),
            "segments": torch.from_numpy(segments),
            "patches": torch.from_numpy(np.stack(patches)),
            "pictures": torch.tensor(whole),
        }


def pack(asked: Sequence[tuple[str, str, str]], text: np.ndarray, labels: np.ndarray, segments: np.ndarray) -> int:
    """Write as many (question, answer, kind) as fit into three rows [T]; how many did."""
    start = 0
    for number, (question, answer, _) in enumerate(asked):
        question_ids, answer_ids = word_ids(question), word_ids(answer)
        ids = [*question_ids, ASSISTANT, *answer_ids]
        stop = start + len(ids)
        if stop > len(text):
            return number
        text[start:stop], segments[start:stop] = ids, number
        labels[start + len(question_ids) : stop] = [*answer_ids, END]
        start = stop
    return len(asked)


# --------------------------------------------------------------------------------------------------------- the network
class LabLlava(VistokModel):
    """A LLaVA of transformers with the objectives and heads that train it.

    Args:
        stage: what learns: `tower`, `projector`, `language` (all but the tower) or `all`.
        image_size, patch_size: sides in pixels.
        vision_hidden_size, vision_layers, vision_heads, vision_ffn_size: of the CLIP tower.
        hidden_size, num_layers, num_heads, ffn_size: of the Llama decoder.
        dense_weight: of the tower's objective in stage `all`.
        alignment_weight: of a loss that draws visual tokens to the words for what they show.
        projector: `mlp` (LLaVA's own), `tokenpacker`, or LLaVA's own on a coarser grid: `pooling` averages the patches
            of each cell, `points` interpolates (TokenPacker's query alone).
        scale_factor: patches a visual token stands for in each direction (not for `mlp`).
        feature_levels, projector_size: hidden states that a TokenPacker reads, and its width.
        visual_keep_ratio, all_tokens_from: before optimiser step `all_tokens_from`, the decoder learns from a random
            part of each picture's tokens, which takes a fraction of the time.
    """

    system = "lab-llava"
    kind = "language model"

    @register_to_config
    def __init__(
        self,
        stage: Literal["tower", "projector", "language", "all"] = "language",
        image_size: int = 64,
        patch_size: int = 4,
        vision_hidden_size: int = 128,
        vision_layers: int = 4,
        vision_heads: int = 4,
        vision_ffn_size: int = 256,
        hidden_size: int = 128,
        num_layers: int = 8,
        num_heads: int = 4,
        ffn_size: int = 256,
        dense_weight: float = 0.3,
        alignment_weight: float = 0.0,
        projector: Literal["mlp", "tokenpacker", "pooling", "points"] = "mlp",
        scale_factor: int = 1,
        feature_levels: Sequence[int] = (2, 3, 4),
        projector_size: int = 96,
        visual_keep_ratio: float = 1.0,
        all_tokens_from: int = 0,
        vocab_size: int = VOCABULARY_SIZE,
    ) -> None:
        super().__init__()
        if stage not in STAGES:
            raise InvalidInputError(f"stage is one of {', '.join(STAGES)}; got {stage!r}")
        if projector not in PROJECTORS:
            raise InvalidInputError(f"projector is one of {', '.join(PROJECTORS)}; got {projector!r}")
        if (projector == "mlp") != (scale_factor == 1):
            raise InvalidInputError(
                f"scale_factor is 1 for the projector mlp and more for the others; got {scale_factor} for {projector}"
            )
        if image_size % patch_size:
            raise InvalidInputError(f"image_size {image_size} is no multiple of patch_size {patch_size}")
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        self.stage = stage
        vision = CLIPVisionConfig(
            hidden_size=vision_hidden_size,
            intermediate_size=vision_ffn_size,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=vision_hidden_size,
            hidden_act="gelu",
        )
        text = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=ffn_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            max_position_embeddings=1024,
            # Pictures say in their features where things lie, so that most pairs of channels should match by content.
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            initializer_range=0.06,  # near 1 / sqrt(D): small networks start slowly from 0.02
            pad_token_id=PAD,
            bos_token_id=BEGIN,
            eos_token_id=END,
            tie_word_embeddings=False,
        )
        side = image_size // patch_size
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=IMAGE,
            image_seq_length=side * side,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )
        self.llava = LlavaForConditionalGeneration(config)
        self.llava.model.vision_tower.set_attn_implementation("eager")  # see `_block`
        self.side = side
        if side % scale_factor:
            raise InvalidInputError(f"scale_factor {scale_factor} does not divide the grid of {side}x{side} patches")
        if projector == "tokenpacker":
            from vistok.tokenizers.tokenpacker import TokenPacker
            from vistok.tokenizers.tokenpacker.llava import install

            packer = TokenPacker(
                hidden_size=hidden_size,
                scale_factor=scale_factor,
                grid_size=side,
                feature_dim=vision_hidden_size,
                feature_levels=tuple(feature_levels),
                embed_dim=projector_size,
                num_heads=num_heads,
            )
            install(packer, self.llava)
        self.sizes = {"shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(SIZES), "shade": len(SHADES)}
        self.patch_head = nn.Linear(vision_hidden_size, sum(self.sizes.values()) + 3)
        self.picture_head = nn.Linear(vision_hidden_size, len(SHAPES) + len(COLOURS) + 3)
        self._start(side)
        core = self.llava.model
        if stage == "tower":
            self.llava.requires_grad_(False)
            core.vision_tower.requires_grad_(True)
        elif stage != "all":
            self.requires_grad_(False)
            self.llava.requires_grad_(stage == "language")
            core.vision_tower.requires_grad_(False)
            core.multi_modal_projector.requires_grad_(True)
        self.llava.model.vision_tower.post_layernorm.requires_grad_(False)  # LLaVA reads the states before it

    @torch.no_grad()
    def _start(self, side: int) -> None:
        """Patches know where they are from the start: sines of rows and columns as first position embeddings."""
        embeddings = self.llava.model.vision_tower.embeddings
        table = embeddings.position_embedding.weight
        quarter = table.shape[1] // 4
        frequencies = math.pi / side * side ** (torch.arange(quarter) / max(1, quarter - 1))
        angles = torch.arange(side)[:, None] * frequencies[None]
        waves = torch.cat([angles.sin(), angles.cos()], dim=1) * 0.5
        width = waves.shape[1]
        table.zero_()
        table[1:, :width] = waves.repeat_interleave(side, 0)
        table[1:, width : 2 * width] = waves.repeat(side, 1)
        embeddings.patch_embedding.weight.normal_(std=0.15)
        embeddings.class_embedding.normal_(std=0.5)
        # Keys start as queries: a word then looks at what resembles it, which is how a question finds its object.
        for layer in self.llava.model.language_model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)

    @classmethod
    def tiny(cls, **overrides: Any) -> LabLlava:
        """16 pixels, 16 patches, 16 channels, two layers each."""
        return cls(
            **{
                "image_size": 16,
                "vision_hidden_size": 16,
                "vision_layers": 2,
                "vision_heads": 2,
                "vision_ffn_size": 16,
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "ffn_size": 16,
                **overrides,
            }
        )

    # ---- files

    @staticmethod
    def arguments_of(llava: Any) -> dict[str, Any]:
        """The sizes of a stock LLaVA of the lab, as arguments of this class."""
        vision, text = llava.config.vision_config, llava.config.text_config
        return {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "vision_hidden_size": vision.hidden_size,
            "vision_layers": vision.num_hidden_layers,
            "vision_heads": vision.num_attention_heads,
            "vision_ffn_size": vision.intermediate_size,
            "hidden_size": text.hidden_size,
            "num_layers": text.num_hidden_layers,
            "num_heads": text.num_attention_heads,
            "ffn_size": text.intermediate_size,
            "vocab_size": text.vocab_size,
        }

    @classmethod
    def around(cls, llava: Any) -> LabLlava:
        """A loaded LLaVA of the lab (its own projector or a TokenPacker) with this class around it, in eval mode."""
        projector = llava.model.multi_modal_projector
        arguments = cls.arguments_of(llava)
        if hasattr(projector, "scale_factor"):
            arguments |= {
                "projector": "tokenpacker",
                "scale_factor": projector.scale_factor,
                "feature_levels": tuple(projector.config.feature_levels),
                "projector_size": projector.config.embed_dim,
            }
        model = cls(**arguments)
        model.llava.load_state_dict(llava.state_dict())
        return model.eval()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return (self.side // self.config.scale_factor,) * 2

    @property
    def is_stock(self) -> bool:
        """Whether `save_transformers` can write it."""
        return self.config.projector in ("mlp", "tokenpacker")

    @property
    def ships_packed(self) -> bool:
        """Whether its file is read by `vistok.load` alone, so that it may be packed."""
        return self.config.projector == "tokenpacker"

    def shipped_keys(self) -> list[str]:
        """The tensors that belong to the LLaVA; all of them where no LLaVA is written."""
        return [key for key in self.state_dict() if not self.is_stock or key.startswith("llava.")]

    def save_transformers(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the LLaVA and its processor as transformers does; with a TokenPacker, for `vistok.load`.

        Args:
            folder: to write.
            tensors: weights under this network's names.
        """
        from vistok.tokenizers.tokenpacker.llava import save_llava

        self.llava.load_state_dict(
            {key.removeprefix("llava."): value for key, value in tensors.items() if key.startswith("llava.")}
        )
        self.llava.to(next(iter(tensors.values())).dtype)
        if self.config.projector == "tokenpacker":
            save_llava(self.llava, folder, packed=self.llava.dtype == torch.bfloat16)
        else:
            self.llava.save_pretrained(folder)
        build_processor(self.config.image_size, self.config.patch_size * self.config.scale_factor).save_pretrained(
            folder
        )

    def rename_initial(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a stock LLaVA under this network's names; the projector for all tokens does not fit fewer."""
        inside = any(key.startswith("llava.") for key in weights)
        renamed = {key if inside else f"llava.{key}": value for key, value in weights.items()}
        mlp = "llava.model.multi_modal_projector.linear_1.weight" in renamed
        if self.config.scale_factor > 1 and mlp and not inside:
            return {key: value for key, value in renamed.items() if "multi_modal_projector" not in key}
        return renamed

    # ---- the tower's objective

    def tower(self, images: Tensor) -> list[Tensor]:
        """All hidden states [B, 1 + P, D] of the tower, class token first, for images in [-1, 1]."""
        tower = self.llava.model.vision_tower
        states = [tower.pre_layrnorm(tower.embeddings(images))]
        for layer in tower.encoder.layers:
            states.append(layer(states[-1], attention_mask=None))
        return states

    def dense_losses(self, states: Sequence[Tensor], batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """How well patches tell what they show, and the class token what the picture holds."""
        final = states[-1]
        targets = batch["patches"].flatten(0, 1)
        parts = self.patch_head(final[:, 1:]).float().flatten(0, 1).split([*self.sizes.values(), 2, 1], dim=1)
        labels = targets[:, :4].long()
        owned = labels[:, 0] > 0
        weight = torch.ones(self.sizes["shape"], device=final.device)
        weight[0] = BACKGROUND_WEIGHT
        losses = {"shape": functional.cross_entropy(parts[0], labels[:, 0], weight=weight)}
        for number, name in enumerate(("colour", "size", "shade"), 1):
            losses[name] = functional.cross_entropy(parts[number][owned], labels[owned, number])
        losses["position"] = functional.smooth_l1_loss(parts[4][owned], targets[owned, 4:6], beta=0.05)
        losses["centre"] = functional.binary_cross_entropy_with_logits(parts[5][:, 0], targets[:, 6])
        whole = batch["pictures"]
        seen = self.picture_head(final[:, 0]).float()
        losses["held"] = functional.binary_cross_entropy_with_logits(seen[:, :-3], whole[:, :-1])
        losses["number"] = functional.cross_entropy(seen[:, -3:], whole[:, -1].long())
        with torch.no_grad():
            right = (parts[0].argmax(1) == labels[:, 0])[owned] & (parts[1].argmax(1) == labels[:, 1])[owned]
        total = sum(DENSE_WEIGHTS[name] * value for name, value in losses.items())
        return {"loss": total, **losses, "patch_accuracy": right.float().mean()}

    # ---- the language objective

    def middle_patches(self, patches: Tensor) -> Tensor:
        """Of the targets [B, P, 7] those [B, M, 7] in the middle of each visual token's cell."""
        s = self.config.scale_factor
        cells = patches.unflatten(1, (self.grid[0], s, self.grid[1], s))
        return cells[:, :, s // 2, :, s // 2].flatten(1, 2)

    def alignment_loss(self, visual: Tensor, patches: Tensor) -> Tensor:
        """How near visual tokens lie to the words for what they show, among the words of the same kind.

        The decoder then finds "star" in a picture by a word's own embedding, which it would otherwise have to learn
        from answers alone.

        Args:
            visual: [B, M, D] visual tokens.
            patches: float [B, P, 7] of `patch_targets`.
        """
        middle = self.middle_patches(patches)
        owned = middle[..., 0] > 0
        shown, middle = visual[owned].float(), middle[owned]
        left, top = middle[:, 4] < 0.5, middle[:, 5] < 0.5
        labels = (middle[:, 0] - 1, middle[:, 1], middle[:, 2], middle[:, 3], 1.0 - left.float(), 1.0 - top.float())
        table = self.llava.model.language_model.embed_tokens.weight.float()
        names = (SHAPES, COLOURS, SIZES, SHADES, ("left", "right"), ("top", "bottom"))
        losses = []
        for words, label in zip(names, labels, strict=True):
            likeness = shown @ table[[word_ids(word)[0] for word in words]].T
            losses.append(functional.cross_entropy(likeness, label.long()))
        return torch.stack(losses).mean()

    def visual_tokens(self, states: Sequence[Tensor]) -> Tensor:
        """Visual tokens [B, M, D] from the tower's hidden states."""
        projector, config = self.llava.model.multi_modal_projector, self.config
        patches = states[-1][:, 1:]
        if config.projector == "tokenpacker":
            return projector([states[level][:, 1:] for level in projector.config.feature_levels])
        if config.projector == "pooling":
            cells = self.side // config.scale_factor
            grid = patches.unflatten(1, (cells, config.scale_factor, cells, config.scale_factor))
            patches = grid.mean((2, 4)).flatten(1, 2)
        elif config.projector == "points":
            from vistok.tokenizers.tokenpacker import TokenPacker

            patches = TokenPacker.point_query(patches, (self.side, self.side), config.scale_factor)
        return projector(patches)

    def prefix(self, states: Sequence[Tensor]) -> Tensor:
        """Embeddings [B, V, D] of what comes before the text: `<s> <user>` and the picture."""
        visual = self.visual_tokens(states)
        table = self.llava.model.language_model.embed_tokens.weight
        opening = table[[BEGIN, USER]].expand(len(visual), -1, -1)
        return torch.cat([opening, visual.to(table.dtype)], dim=1)

    def text_states(self, prefix: Tensor, text: Tensor, segments: Tensor, kept: Tensor | None = None) -> Tensor:
        """Final states [B, T, D] of packed questions: each sees the prefix and, causally, itself.

        Equal to the decoder's own forward on each question alone; the picture's tokens are computed once, and not at
        all where nobody reads them (the last layer).

        Args:
            prefix: [B, V, D].
            text, segments: int64 [B, T].
            kept: int64 [B, K], ascending: only these tokens of the prefix are there, at the positions that they had.
        """
        decoder = self.llava.model.language_model
        places = torch.arange(prefix.shape[1], device=text.device).expand(len(text), -1)
        stop = prefix.shape[1]
        if kept is not None:
            prefix, places = prefix.gather(1, kept[..., None].expand(-1, -1, prefix.shape[2])), kept
        before, length = prefix.shape[1], text.shape[1]
        hidden = torch.cat([prefix, decoder.embed_tokens(text)], dim=1)
        index = torch.arange(length, device=text.device)
        same = segments[:, :, None] == segments[:, None, :]
        first = same.int().argmax(2)  # where the segment begins
        seen = torch.ones(len(text), before + length, before + length, dtype=torch.bool, device=text.device).tril()
        seen[:, before:, before:] &= same
        bias = torch.zeros(seen.shape, device=text.device).masked_fill_(~seen, -1e4)[:, None]
        cos, sin = decoder.rotary_emb(hidden, position_ids=torch.cat([places, index - first + stop], 1))
        cos, sin = cos[:, None], sin[:, None]
        last = len(decoder.layers) - 1
        for number, layer in enumerate(decoder.layers):
            hidden = _block(layer, hidden, cos, sin, bias, before if number == last else 0)
        return _rms(decoder.norm, hidden)

    def drawn_tokens(self, patches: Tensor) -> Tensor:
        """int64 [B, K]: the opening words and a random part of the picture's tokens, ascending.

        Tokens of objects are drawn more often than background: few of them then still show every object.

        Args:
            patches: float [B, P, 7] of `patch_targets`.
        """
        shown, device = self.middle_patches(patches)[..., 0] > 0, patches.device
        count, number = len(shown), max(1, round(self.config.visual_keep_ratio * shown.shape[1]))
        weight = torch.where(shown, OBJECT_WEIGHT, 1.0)
        # The largest of u^(1 / w) are a weighted draw without replacement (Efraimidis and Spirakis, 2006).
        drawn = torch.rand(shown.shape, device=device) ** (1 / weight)
        chosen = drawn.topk(number, dim=1).indices.sort(dim=1).values
        return torch.cat([torch.arange(2, device=device).expand(count, -1), chosen + 2], dim=1)

    def answer_logits(self, images: Tensor, text: Tensor, segments: Tensor) -> Tensor:
        """Logits [B, T, words] of the next word at every text position, for images in [-1, 1]."""
        return self.llava.lm_head(self.text_states(self.prefix(self.tower(images)), text, segments))

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The objective of the stage.

        Args:
            batch: what `ShapesQuestions` gives, images as floats in [-1, 1].
            generator: unused, nothing is drawn.

        Returns:
            `loss`; the parts of the tower's objective; `answers` (cross-entropy of the answers' words) and `accuracy`
            (share of the questions' first words that are right).
        """
        if self.stage == "tower":
            return self.dense_losses(self.tower(batch["images"]), batch)
        with torch.set_grad_enabled(self.stage == "all" and torch.is_grad_enabled()):
            states = self.tower(batch["images"])
        prefix = self.prefix(states)
        few = self.config.visual_keep_ratio < 1 and batch.get("step", 0) < self.config.all_tokens_from
        kept = self.drawn_tokens(batch["patches"]) if few else None
        hidden = self.text_states(prefix, batch["text"], batch["segments"], kept)
        labels = batch["labels"]
        chosen = labels != -100
        logits = self.llava.lm_head(hidden[chosen]).float()
        wanted = labels[chosen]
        loss = functional.cross_entropy(logits, wanted)
        with torch.no_grad():
            asked = batch["text"][chosen] == ASSISTANT
            accuracy = (logits[asked].argmax(1) == wanted[asked]).float().mean()
        found = {"loss": loss, "answers": loss.detach(), "accuracy": accuracy}
        if self.config.alignment_weight:
            found["alignment"] = self.alignment_loss(prefix[:, 2:], batch["patches"])
            found["loss"] = found["loss"] + self.config.alignment_weight * found["alignment"]
        if self.stage == "all":
            dense = self.dense_losses(states, batch)
            found["loss"] = found["loss"] + self.config.dense_weight * dense["loss"]
            found["patch_accuracy"] = dense["patch_accuracy"]
        return found


def _rms(norm: nn.Module, hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, (hidden.shape[-1],), norm.weight, norm.variance_epsilon)


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-right, left], dim=-1) * sin


def _block(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, start: int) -> Tensor:
    """A Llama layer; the rows from `start` on come out.

    Scores are written out: at these sizes that takes half the time of the CPU's fused attention, forward and back.
    """
    attention = layer.self_attn
    normed = _rms(layer.input_layernorm, hidden)

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    key, value = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
    dtype = key.dtype
    query = _turn(heads(attention.q_proj(normed[:, start:])), cos[:, :, start:], sin[:, :, start:])
    key = _turn(key, cos, sin).to(dtype)
    scores = (query * attention.scaling).to(dtype) @ key.transpose(-1, -2) + bias[:, :, start:].to(dtype)
    answers = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    hidden = hidden[:, start:] + attention.o_proj(answers)
    mlp = layer.mlp
    normed = _rms(layer.post_attention_layernorm, hidden)
    return hidden + mlp.down_proj(functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


# ------------------------------------------------------------------------------------------------------------ watching
@dataclass(frozen=True)
class Answered:
    """One question of `answers`: the scene's number, the kind of question, and whether the answer was right."""

    scene: int
    kind: str
    right: bool


def answers(
    model: Any,
    source: ShapesQuestions,
    scenes: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answered]:
    """Questions about scenes 0.. of a source, answered by the most likely first word.

    Args:
        model: a `LabLlava` in eval mode.
        source: held-out scenes.
        scenes: how many.
        device: of the model.
        on_progress: called with (scenes done, scenes).
    """
    found = []
    for first in range(0, scenes, EVALUATION_BATCH):
        numbers = np.arange(first, min(first + EVALUATION_BATCH, scenes), dtype=np.int64)
        batch = source.batch(numbers)
        images = batch["images"].to(device).float() / 127.5 - 1
        with torch.no_grad():
            logits = model.answer_logits(images, batch["text"].to(device), batch["segments"].to(device))
        said = logits.argmax(-1).cpu()
        text, labels, segments = batch["text"], batch["labels"], batch["segments"]
        for row, number in enumerate(numbers.tolist()):
            kinds = [kind for _, _, kind in source.asked(number)]
            for place in (text[row] == ASSISTANT).nonzero()[:, 0].tolist():
                right = bool(said[row, place] == labels[row, place])
                found.append(Answered(number, kinds[int(segments[row, place])], right))
        if on_progress is not None:
            on_progress(int(numbers[-1]) + 1, scenes)
    return found


class LlavaMonitor:
    """Held-out scenes: how the tower reads its patches, and how many questions of each kind are answered."""

    scenes = HELD_OUT_SCENES

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.device = device
        self.source = ShapesQuestions(recipe.data, recipe.seed + HELD_OUT_STREAM)  # type: ignore[arg-type]

    def validate(self, model: Any) -> dict[str, float]:
        """`val/patch_accuracy`, or `val/accuracy` over all questions and `val/accuracy_KIND`."""
        if model.stage == "tower":
            batch = {
                name: value.to(self.device) for name, value in self.source.batch(np.arange(EVALUATION_BATCH)).items()
            }
            with torch.no_grad():
                states = model.tower(batch["images"].float() / 127.5 - 1)
                return {"val/patch_accuracy": float(model.dense_losses(states, batch)["patch_accuracy"])}
        listed = answers(model, self.source, self.scenes, self.device)
        by_kind = {kind: [one.right for one in listed if one.kind == kind] for kind in QUESTION_KINDS}
        figures = {"val/accuracy": float(np.mean([one for found in by_kind.values() for one in found]))}
        return figures | {f"val/accuracy_{kind}": float(np.mean(found)) for kind, found in by_kind.items() if found}

    def sample(self, model: Any, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Nothing to draw."""
        return {}, {}
