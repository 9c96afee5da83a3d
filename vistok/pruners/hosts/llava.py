"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: one tower, a projector for single tokens, tiles joined with newlines."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from vistok.pruners.hosts.base import Capture, Host, Visual, concatenated

__all__ = ["Llava", "LlavaNext", "LlavaOnevision"]


class Llava(Host):
    """`LlavaForConditionalGeneration`: one view an image, the class token dropped."""

    model_types = ("llava",)
    name = "LLaVA-1.5"

    @property
    def side(self) -> int:
        """Patches along one side of a view."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size

    def project(self, features: Tensor) -> Tensor | None:
        return self.core.multi_modal_projector(features)

    def visuals(self, capture: Capture, output: Any) -> list[Visual]:
        lengths = [len(one) for one in output.pooler_output]
        return [
            Visual("image", length, range(number, number + 1), self.view_grid(length), concatenated)
            for number, length in enumerate(lengths)
        ]

    def view_grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of one view of so many tokens."""
        return (self.side, self.side) if self.side**2 == tokens else (1, tokens)


class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration`: a base view, then tiles joined, unpadded, with a newline ending each row."""

    model_types = ("llava_next",)
    name = "LLaVA-NeXT"

    def view_counts(self, capture: Capture) -> list[int]:
        """Views of each image."""
        module = sys.modules[type(self.core).__module__]
        sizes = capture.arguments["image_sizes"]
        numbers = capture.arguments.get("batch_num_images")
        patched = [True] * len(sizes) if numbers is None else [one == 1 for one in numbers for _ in range(int(one))]
        return [
            module.image_size_to_num_patches(
                size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
            )
            if tiles
            else 1
            for size, tiles in zip(sizes, patched)
        ]

    def pack(self, values: Tensor, size: Tensor, newline: float, arguments: dict[str, Any]) -> Tensor:
        """The library's own packing of [V, N, C] values of one image."""
        packed, _ = self.core.pack_image_features(
            [values],
            [size],
            vision_feature_select_strategy=arguments.get("vision_feature_select_strategy")
            or self.config.vision_feature_select_strategy,
            image_newline=values.new_full((values.shape[-1],), newline),
        )
        return packed[0]

    def visuals(self, capture: Capture, output: Any) -> list[Visual]:
        found, start = [], 0
        # Only what packing needs: the report keeps it, and must not keep the pixels.
        options = {
            name: capture.arguments.get(name) for name in ("vision_feature_select_strategy", "vision_aspect_ratio")
        }
        sizes = capture.arguments["image_sizes"]
        for count, tokens, size in zip(self.view_counts(capture), output.pooler_output, sizes):

            def pack(views: list[Tensor], newline: float, size: Tensor = size) -> Tensor:
                return self.pack(torch.stack(list(views)), size, newline, options)

            found.append(
                Visual("image", len(tokens), range(start, start + count), (self.side, self.side), pack, single=False)
            )
            start += count
        return found

    def pixels(self, capture: Capture) -> Tensor:
        if capture.kind == "video":
            return super().pixels(capture)
        values = capture.arguments["pixel_values"]
        if values.ndim == 5:
            values = torch.cat([image[:count] for image, count in zip(values, self.view_counts(capture))])
        return values


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`: as LLaVA-NeXT, large grids resized; videos pooled frame by frame."""

    model_types = ("llava_onevision",)
    name = "LLaVA-OneVision"
    kinds = ("image", "video")

    def pack(self, values: Tensor, size: Tensor, newline: float, arguments: dict[str, Any]) -> Tensor:
        packed, _ = self.core.pack_image_features(
            [values],
            [size],
            image_newline=values.new_full((values.shape[-1],), newline),
            vision_aspect_ratio=arguments.get("vision_aspect_ratio") or self.config.vision_aspect_ratio,
        )
        return packed[0]

    def visuals(self, capture: Capture, output: Any) -> list[Visual]:
        if capture.kind == "image":
            return super().visuals(capture, output)
        videos, frames = capture.arguments["pixel_values_videos"].shape[:2]

        def pack(views: list[Tensor], newline: float) -> Tensor:
            pooled = self.core.apply_pooling(torch.stack(list(views))).flatten(0, 1)
            return torch.cat([pooled, pooled.new_full((1, pooled.shape[1]), newline)])

        tokens = output.pooler_output.shape[1]
        return [
            Visual(
                "video",
                tokens,
                range(number * frames, (number + 1) * frames),
                (self.side, self.side),
                pack,
                single=False,
                packed_grid=(-(-self.side // 2), -(-self.side // 2)),
            )
            for number in range(videos)
        ]
