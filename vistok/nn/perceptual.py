"""LPIPS: how different two images look, from the features of VGG16 (Zhang et al., arXiv 1801.03924).

The weights are not ours to ship. `LPIPS.from_files` reads the published ones (the trunk as torchvision publishes it,
the linear heads as torchmetrics ships them, or one file with both); a random `LPIPS()` runs everywhere, for tests. Any
module that maps two batches of images to [B, 1, 1, 1] can take its place in a training loss.

Shape letters: B images, C channels, H, W pixels.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import CheckpointError, InvalidInputError, require
from vistok.files import read_state_dict
from vistok.nn.model import describe_mismatch

__all__ = ["LPIPS"]

WIDTHS = (64, 128, 256, 512, 512)
# Convolutions of each slice, by their index in torchvision's `vgg16().features`; a slice ends at relu1_2, ... relu5_3.
SLICES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class _Trunk(nn.Module):
    """VGG16 up to relu5_3, cut into five slices; module names are torchvision's layer indices."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for number, indices in enumerate(SLICES, start=1):
            layers = nn.Module()
            for index in indices:
                layers.add_module(str(index), nn.Conv2d(width, WIDTHS[number - 1], 3, padding=1))
                width = WIDTHS[number - 1]
            self.add_module(f"slice{number}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for number, layers in enumerate(self.children()):
            if number:
                x = F.max_pool2d(x, 2)
            for convolution in layers.children():
                x = F.relu(convolution(x))
            features.append(x)
        return features


class _Head(nn.Module):
    """Non-negative weights of the channels, as a 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Position 0 is a dropout in the authors' network; it is inactive in evaluation mode, the only one used here.
        self.model = nn.ModuleDict({"1": nn.Conv2d(channels, 1, 1, bias=False)})

    def forward(self, difference: Tensor) -> Tensor:
        return self.model["1"](difference)


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, random unless loaded; frozen, and always in evaluation mode.

    (The published tokenizer trainer switches the heads' dropout on by accident; here `train()` has no effect.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = _Trunk()
        for index, width in enumerate(WIDTHS):
            self.add_module(f"lin{index}", _Head(width))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        for parameter in self.lin_parameters():  # distances are sums of non-negative terms
            nn.init.uniform_(parameter, 0.0, 1.0 / parameter.shape[1])
        self.requires_grad_(False)
        self.eval()

    def lin_parameters(self) -> list[nn.Parameter]:
        """Weights [1, C, 1, 1] of the five heads."""
        return [self.get_submodule(f"lin{index}.model.1").weight for index in range(len(WIDTHS))]

    def train(self, mode: bool = True) -> LPIPS:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distances [B, 1, 1, 1] of two batches of images [B, 3, H, W] in [-1, 1] with H, W >= 16.

        Raises:
            InvalidInputError: if the shapes differ or do not suit.
        """
        if images.shape != others.shape or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[-2:]) < 16:
            raise InvalidInputError(
                f"LPIPS compares two batches [B, 3, H, W] of one shape with H, W >= 16; "
                f"got {list(images.shape)} and {list(others.shape)}"
            )
        both = (torch.cat([images, others]) - self.shift) / self.scale
        total = images.new_zeros(images.shape[0], 1, 1, 1)
        for index, features in enumerate(self.net(both.contiguous(memory_format=torch.channels_last))):
            unit = features / (features.norm(dim=1, keepdim=True) + 1e-10)
            ours, theirs = unit.chunk(2)
            weighted = self.get_submodule(f"lin{index}")((ours - theirs).square())
            total = total + weighted.mean(dim=(2, 3), keepdim=True)
        return total

    @classmethod
    def from_official(cls, state: Mapping[str, Any]) -> LPIPS:
        """Load official names: VQGAN's `vgg.pth` joined with a trunk, `net.slice*`, or torchvision's `features.*`.

        Raises:
            CheckpointError: naming missing, unexpected and misshapen keys.
        """
        slice_of = {str(index): number for number, indices in enumerate(SLICES, start=1) for index in indices}
        renamed = {}
        for key, value in state.items():
            if key.startswith(
                ("scaling_layer.", "lins.", "classifier.")
            ):  # constants, and duplicates of the lpips package
                continue
            match = re.fullmatch(r"features\.(\d+)\.(weight|bias)", key)
            if match and match[1] in slice_of:
                key = f"net.slice{slice_of[match[1]]}.{match[1]}.{match[2]}"
            renamed[key] = value
        model = cls()
        problems = describe_mismatch(model.state_dict(), renamed)
        if problems:
            raise CheckpointError("these weights do not fit LPIPS (VGG16): " + "; ".join(problems))
        model.load_state_dict(renamed)
        return model

    @classmethod
    def from_files(cls, *paths: str | os.PathLike[str]) -> LPIPS:
        """Load weights from one file, or from trunk and heads in two (for example torchvision's `vgg16-397923af.pth`).

        If no file holds the heads, those that the installed torchmetrics ships are taken.

        Raises:
            CheckpointError: unreadable or unsuitable files.
            MissingExtraError: no file holds the heads, and torchmetrics is not installed.
        """
        if not paths:
            raise InvalidInputError("from_files needs at least one file; a random LPIPS is LPIPS()")
        state: dict[str, Any] = {}
        for path in paths:
            state.update(read_state_dict(path))
        if not any(key.startswith("lin") for key in state):
            state.update(read_state_dict(_shipped_heads()))
        return cls.from_official(state)


def _shipped_heads() -> Path:
    # The package is located, not imported: importing it takes seconds.
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        require("torchmetrics", "eval")
        raise CheckpointError("the installed torchmetrics has no folder")
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
