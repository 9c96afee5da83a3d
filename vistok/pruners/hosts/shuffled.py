"""InternVL and SmolVLM: square tiles whose patches are folded into fewer tokens (pixel shuffle)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vistok.pruners.hosts.base import Capture, Host, TowerAttention, Visual, concatenated

__all__ = ["InternVL", "SmolVLM"]


def fold(values: Tensor, factor: int) -> Tensor:
    """Means [V, N, ...] of the `factor` x `factor` patches that become one token, of values [V, patches, ...]."""
    side = int(values.shape[1] ** 0.5)
    rest = values.shape[2:]
    cells = values.view(values.shape[0], side // factor, factor, side // factor, factor, *rest)
    return cells.mean(dim=(2, 4)).flatten(1, 2)


class InternVL(Host):
    """`InternVLForConditionalGeneration`: every tile is a visual of its own, the thumbnail comes last."""

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    name = "InternVL"

    @property
    def factor(self) -> int:
        """Patches along one side of a token."""
        return round(1 / self.config.downsample_ratio)

    def tower_layers(self) -> Any:
        return self.tower.encoder.layer

    def tower_attention(self, layer: int) -> nn.Module:
        return self.tower_layers()[layer].attention

    def class_tokens(self, count: int) -> int:
        return 1 if self.config.vision_feature_select_strategy == "default" else 0

    def read_attention(self, module: nn.Module, arguments: dict[str, Any]) -> list[TowerAttention]:
        hidden = arguments["hidden_states"]
        views, count = hidden.shape[:2]

        def heads(states: Tensor) -> Tensor:
            return states.reshape(views, count, module.num_heads, module.head_dim).transpose(1, 2)

        query, key = module.q_norm(module.q_proj(hidden)), module.k_norm(module.k_proj(hidden))
        return [TowerAttention(heads(query), heads(key), module.scale, self.class_tokens(count))]

    def merge_patches(self, values: list[Tensor], capture: Capture) -> list[Tensor]:
        return [view for call in values for view in fold(call, self.factor)]

    def visuals(self, capture: Capture, output: Any) -> list[Visual]:
        lengths = [len(one) for one in output.pooler_output]
        return [
            Visual("image", length, range(number, number + 1), (round(length**0.5), round(length**0.5)), concatenated)
            for number, length in enumerate(lengths)
        ]


class SmolVLM(InternVL):
    """`SmolVLMForConditionalGeneration` and Idefics3: tiles stand apart in the prompt, each with its own place tag."""

    model_types = ("smolvlm", "idefics3")
    name = "SmolVLM"
    language_path = "text_model"

    @property
    def factor(self) -> int:
        return self.config.scale_factor

    @property
    def tower(self) -> nn.Module:
        return self.core.vision_model

    def tower_layers(self) -> Any:
        return self.tower.encoder.layers

    def tower_attention(self, layer: int) -> nn.Module:
        return self.tower_layers()[layer].self_attn

    def feature_layer(self) -> int:
        return len(self.tower_layers()) - 1

    def class_tokens(self, count: int) -> int:
        return 0

    def read_attention(self, module: nn.Module, arguments: dict[str, Any]) -> list[TowerAttention]:
        (attention,) = Host.read_attention(self, module, arguments)
        mask = arguments.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4:
            attention.valid = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0].any(dim=1)
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            attention.valid = mask.bool()
        return [attention]

    def visuals(self, capture: Capture, output: Any) -> list[Visual]:
        tiles = sum(len(one) for one in output.pooler_output)
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size // self.factor
        return [
            Visual("image", side * side, range(number, number + 1), (side, side), concatenated)
            for number in range(tiles // (side * side))
        ]

    def pixels(self, capture: Capture) -> Tensor:
        values = capture.arguments["pixel_values"].flatten(0, 1)
        real = (values != 0).flatten(1).any(dim=1)
        if not bool(real.any()):
            real[0] = True
        return values[real]
