"""The lab's text encoder: a small T5 encoder trained to understand captions of the lab world.

LlamaGen and NAR see the *average* of their caption tokens (condition tokens have zero attention keys), so a useful
encoder puts the whole description into every token. The objective asks just that: from the output at every word, linear
heads must read shape, colour, size and shade of each object, and the relation between the first two.

The result is a stock transformers `T5EncoderModel` with a stock word-level tokenizer, used exactly like the FLAN-T5 of
the published models.

Letters: B captions, T tokens a caption, D channels.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from vistok.data.shapes import COLOURS, RELATIONS, SHAPES, SIZES, VOCABULARY, caption, parse_caption, sample_scene
from vistok.data.shapes.captions import SPOKEN_SHADES, Description
from vistok.nn.model import VistokModel

__all__ = ["CaptionEncoder", "CaptionSource", "build_tokenizer", "description_targets"]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "shade": SPOKEN_SHADES,
}
MAX_OBJECTS = 3


def build_tokenizer(max_length: int = 24) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of the caption grammar; ends every caption with `</s>`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


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
        self.tokenizer = build_tokenizer(max_length)
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

    def export(self, folder: Path) -> None:
        """Write the encoder (bf16) and its tokenizer as transformers files."""
        self.encoder.to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class CaptionSource:
    """Captions of sampled scenes with their meaning; batch `step` is a pure function of (seed, step)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int) -> None:
        self.tokenizer, self.seed, self.batch_size = tokenizer, seed, batch_size

    def batch(self, step: int) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` int64 [B, T] and `targets` int64 [B, heads]."""
        rng = np.random.default_rng([self.seed, step])
        texts = []
        for index in range(self.batch_size):
            scene = sample_scene(self.seed, step * self.batch_size + index)
            text = caption(scene, rng, attribute_dropout=float(rng.choice([0.0, 0.25, 0.6])))
            if rng.random() < 0.15:  # "red circle" is understood like "a red circle"
                text = " ".join(word for word in text.split() if word not in ("a", "an"))
            texts.append(text)
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt")
        targets = torch.tensor([description_targets(parse_caption(text)) for text in texts])
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "targets": targets,
        }


def train_caption_encoder(
    output: Path, *, steps: int = 3000, batch_size: int = 64, lr: float = 2e-3, seed: int = 0
) -> dict[str, float]:
    """Train the lab's text encoder on the CPU and export it.

    Args:
        output: folder for the transformers files, and for `training.jsonl` with the progress.
        steps: optimiser steps; the learning rate warms up over 100 and falls to zero along a cosine.
        batch_size: captions a step.
        lr: peak learning rate of AdamW.
        seed: of weights and captions.

    Returns:
        The figures on 2,000 held-out captions.
    """
    torch.manual_seed(seed)
    model = CaptionEncoder()
    source = CaptionSource(model.tokenizer, seed, batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    output.mkdir(parents=True, exist_ok=True)
    with (output / "training.jsonl").open("w", encoding="utf-8") as log:
        for step in range(steps):
            losses = model.training_loss(source.batch(step))
            optimizer.zero_grad()
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (step + 1) % 100 == 0:
                figures = {name: round(float(value.detach()), 5) for name, value in losses.items()}
                log.write(json.dumps({"step": step + 1, **figures}) + "\n")
                log.flush()
    model.eval()
    held_out = CaptionSource(model.tokenizer, seed + 1, 2000)
    with torch.no_grad():
        figures = {name: float(value) for name, value in model.training_loss(held_out.batch(0)).items()}
    model.export(output)
    return figures


if __name__ == "__main__":
    print(json.dumps(train_caption_encoder(Path(sys.argv[1]))))
