"""The lab's text encoder: a small T5 encoder trained to understand captions of the lab world.

LlamaGen and NAR see the *average* of their caption tokens (condition tokens have zero attention keys), so a useful
encoder puts the whole description into every token. The objective asks just that: from the output at every word, linear
heads must read shape, colour, size and shade of each object, and the relation between the first two.

The result is a stock transformers `T5EncoderModel` with a stock word-level tokenizer, used exactly like the FLAN-T5 of
the published models.

Letters: B captions, T tokens a caption, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config, T5EncoderModel

from vistok.data.shapes import COLOURS, RELATIONS, SHAPES, SIZES, caption, parse_caption, sample_scene
from vistok.data.shapes.captions import SPOKEN_SHADES, Description
from vistok.data.shapes.words import caption_tokenizer
from vistok.nn.model import VistokModel

from .recipe import Recipe, ShapesMeaningsRecipe
from .sources import HELD_OUT_STREAM

__all__ = ["CaptionEncoder", "CaptionMeanings", "CaptionMonitor", "description_targets"]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "shade": SPOKEN_SHADES,
}
MAX_OBJECTS = 3
HELD_OUT_CAPTIONS = 2000


def description_targets(description: Description) -> list[int]:
    """Class of every head for one caption; the last class of each head means "not said"."""
    targets = []
    for number in range(MAX_OBJECTS):
        item = description.objects[number] if number < len(description.objects) else None
        for name, values in ATTRIBUTES.items():
            value = getattr(item, name, None)
            targets.append(values.index(value) if value in values else len(values))
    relation = description.relation
    targets.append(RELATIONS.index(relation) if relation in RELATIONS else len(RELATIONS))
    return targets


class CaptionEncoder(VistokModel):
    """T5 encoder with the heads that train it.

    Args:
        hidden_size: channels D.
        num_layers: transformer layers.
        num_heads: attention heads.
        ffn_size: width of the gated feed-forward layers.
        max_length: tokens a caption, end mark included.
    """

    system = "caption-encoder"
    kind = "text encoder"
    is_stock = True

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        ffn_size: int = 256,
        max_length: int = 24,
    ) -> None:
        super().__init__()
        self.tokenizer = caption_tokenizer(max_length, begin=False)
        self.encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(self.tokenizer),
                d_model=hidden_size,
                d_kv=hidden_size // num_heads,
                d_ff=ffn_size,
                num_layers=num_layers,
                num_heads=num_heads,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                relative_attention_num_buckets=16,
                relative_attention_max_distance=24,
                pad_token_id=0,
                eos_token_id=1,
            )
        )
        sizes = [len(values) + 1 for _ in range(MAX_OBJECTS) for values in ATTRIBUTES.values()] + [len(RELATIONS) + 1]
        self.heads = nn.ModuleList(nn.Linear(hidden_size, size) for size in sizes)

    @classmethod
    def tiny(cls, **overrides: int) -> CaptionEncoder:
        """A flavour that builds in milliseconds."""
        return cls(**{"hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 16, **overrides})

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Cross-entropy of every head at every valid token.

        Args:
            batch: `input_ids` int64 [B, T], `attention_mask` int64 [B, T], `targets` int64 [B, heads].
            generator: unused (the objective draws nothing).
        """
        mask = batch["attention_mask"].bool()
        hidden = self.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state[mask]
        owner = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]
        targets = batch["targets"][owner]
        losses, correct = [], torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        for head, target in zip(self.heads, targets.unbind(1), strict=True):
            logits = head(hidden).float()
            losses.append(functional.cross_entropy(logits, target))
            correct &= logits.argmax(1) == target
        return {"loss": torch.stack(losses).mean(), "whole_description_accuracy": correct.float().mean()}

    def shipped_keys(self) -> list[str]:
        """The tensors that ship: the heads stay behind."""
        return [key for key in self.state_dict() if key.startswith("encoder.")]

    def save_transformers(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the encoder and its tokenizer as transformers files.

        Args:
            folder: to write.
            tensors: weights under this network's names.
        """
        weights = {key.removeprefix("encoder."): tensors[key] for key in self.shipped_keys()}
        self.encoder.load_state_dict(weights)
        self.encoder.to(next(iter(weights.values())).dtype).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def facts(self) -> dict[str, Any]:
        """What `vistok.json` says of it."""
        return {
            "system": "text-encoder",
            "kind": self.kind,
            "parameters": sum(parameter.numel() for parameter in self.encoder.parameters()),
        }


class CaptionMeanings:
    """Captions of lab scenes with what they say (see `ShapesMeaningsRecipe`); sample n is a function of (seed, n)."""

    def __init__(self, recipe: ShapesMeaningsRecipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        self.tokenizer = caption_tokenizer(begin=False)

    def batch(self, numbers: np.ndarray) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` int64 [B, T] and `targets` int64 [B, heads]."""
        texts = []
        for number in numbers.tolist():
            rng = np.random.default_rng((self.seed, number))
            scene = sample_scene(self.seed, number, self.recipe.objects)
            text = caption(scene, rng, attribute_dropout=float(rng.choice([0.0, 0.25, 0.6])))
            if rng.random() < self.recipe.bare:  # "red circle" is understood like "a red circle"
                text = " ".join(word for word in text.split() if word not in ("a", "an"))
            texts.append(text)
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt")
        targets = torch.tensor([description_targets(parse_caption(text)) for text in texts])
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "targets": targets,
        }


class CaptionMonitor:
    """Held-out captions: the share of words at which the whole description is read."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert isinstance(recipe.data, ShapesMeaningsRecipe)
        source = CaptionMeanings(recipe.data, recipe.seed + HELD_OUT_STREAM)
        batch = source.batch(np.arange(HELD_OUT_CAPTIONS, dtype=np.int64))
        self.batch = {name: value.to(device) for name, value in batch.items()}

    @torch.no_grad()
    def validate(self, model: Any) -> dict[str, float]:
        """`val/loss` and `val/whole_description_accuracy`."""
        return {f"val/{name}": value.item() for name, value in model.training_loss(self.batch).items()}

    def sample(self, model: Any, seed: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Nothing: captions are no pictures."""
        return {}, {}
