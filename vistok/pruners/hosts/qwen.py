"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: four patches a token, rotary positions on three axes that are never renumbered."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import InvalidInputError
from vistok.pruners.hosts.base import Capture, Host, TowerAttention, Visual, concatenated

__all__ = ["Qwen2VL", "Qwen2_5VL", "Qwen3VL"]


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [P, H, d] by tables [P, d], in float32 as the tower does it."""
    left, right = states.float().chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return (states.float() * cos[:, None].float() + turned * sin[:, None].float()).to(states.dtype)


class Qwen3VL(Host):
    """`Qwen3VLForConditionalGeneration`: tower features are added again after the first decoder layers (deepstack)."""

    model_types = ("qwen3_vl",)
    name = "Qwen3-VL"
    several_axes = True
    kinds = ("image", "video")

    @property
    def tower(self) -> nn.Module:
        return self.core.visual

    def tower_layers(self) -> Any:
        return self.tower.blocks

    def tower_attention(self, layer: int) -> nn.Module:
        return self.tower.blocks[layer].attn

    def feature_layer(self) -> int:
        return len(self.tower.blocks) - 1

    @property
    def first_decoder_layer(self) -> int:
        return max(1, len(getattr(self.config.vision_config, "deepstack_visual_indexes", None) or ()))

    @property
    def unit(self) -> int:
        """Patches that make one token."""
        return self.tower.spatial_merge_size**2

    def grids(self, capture: Capture) -> list[list[int]]:
        """Frames, rows and columns of patches of every image or video."""
        name = "video_grid_thw" if capture.kind == "video" else "image_grid_thw"
        given = capture.arguments
        return given[name if name in given else "image_grid_thw"].tolist()

    def read_attention(self, module: nn.Module, arguments: dict[str, Any]) -> list[TowerAttention]:
        hidden = arguments["hidden_states"]
        count = hidden.shape[0]
        query, key, _ = module.qkv(hidden).reshape(count, 3, module.num_heads, -1).unbind(1)
        cos, sin = arguments["position_embeddings"]
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        bounds = arguments["cu_seqlens"].tolist()
        return [
            TowerAttention(
                query[start:stop].transpose(0, 1)[None], key[start:stop].transpose(0, 1)[None], module.scaling
            )
            for start, stop in itertools.pairwise(bounds)
        ]

    def token_order(self, capture: Capture) -> Tensor | None:
        """Where each token stands in the tower's order, or None if it is the order of the prompt."""
        return None

    def merge_patches(self, values: list[Tensor], capture: Capture) -> list[Tensor]:
        joined = torch.cat([call[0] for call in values])
        merged = joined.view(-1, self.unit, *joined.shape[1:]).mean(dim=1)
        order = self.token_order(capture)
        if order is not None:
            merged = merged[order.to(merged.device)]
        side = self.tower.spatial_merge_size
        lengths = [
            (rows // side) * (columns // side) for frames, rows, columns in self.grids(capture) for _ in range(frames)
        ]
        return list(merged.split(lengths))

    def visuals(self, capture: Capture, output: Any) -> list[Visual]:
        side = self.tower.spatial_merge_size
        found, start = [], 0
        for frames, rows, columns in self.grids(capture):
            grid = (rows // side, columns // side)
            found.append(
                Visual(capture.kind, frames * grid[0] * grid[1], range(start, start + frames), grid, concatenated)
            )
            start += frames
        return found

    def pixels(self, capture: Capture) -> Tensor:
        raise InvalidInputError(
            f"{self.name} receives patches instead of pictures, so the entropy of pixels is not available; use "
            "entropy_weight=0"
        )


class Qwen2VL(Qwen3VL):
    """`Qwen2VLForConditionalGeneration`: full attention in every tower layer, no deepstack."""

    model_types = ("qwen2_vl",)
    name = "Qwen2-VL"


class Qwen2_5VL(Qwen3VL):
    """`Qwen2_5_VLForConditionalGeneration`: windows in most tower layers; scores come from the last full one."""

    model_types = ("qwen2_5_vl",)
    name = "Qwen2.5-VL"

    @property
    def first_decoder_layer(self) -> int:
        return 1

    def feature_layer(self) -> int:
        return max(self.tower.fullatt_block_indexes)

    def tower_layer(self, layer: int | None) -> int:
        index = super().tower_layer(layer)
        if index not in self.tower.fullatt_block_indexes:
            raise InvalidInputError(
                f"tower layer {index} of {self.name} attends inside windows, so its scores cannot be compared; choose "
                f"one of {list(self.tower.fullatt_block_indexes)}"
            )
        return index

    def token_order(self, capture: Capture) -> Tensor | None:
        grid = torch.tensor(self.grids(capture))
        side, per_window = self.tower.spatial_merge_size, self.tower.window_size // self.tower.patch_size
        return torch.argsort(window_order(grid.tolist(), side, per_window // side))


def window_order(grids: list[list[int]], side: int, window: int) -> Tensor:
    """int64 [tokens]: the raster number of each token in the order in which the tower walks its windows.

    Args:
        grids: frames, rows and columns of patches of every image.
        side: patches along one side of a token.
        window: tokens along one side of a window.
    """
    orders, start = [], 0
    for frames, rows, columns in grids:
        rows, columns = rows // side, columns // side
        numbers = torch.arange(frames * rows * columns).view(frames, rows, columns) + start
        for frame in numbers:
            for top in range(0, rows, window):
                for left in range(0, columns, window):
                    orders.append(frame[top : top + window, left : left + window].flatten())
        start += numbers.numel()
    return torch.cat(orders)
