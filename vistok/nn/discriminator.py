"""PatchGAN: a small convolutional network that judges overlapping patches (Isola et al., arXiv 1611.07004).

Shape letters: B images, H, W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PatchDiscriminator"]


class PatchDiscriminator(nn.Module):
    """4x4 convolutions with LeakyReLU(0.2) and batch normalisation; state-dict names are the authors' (`main.{i}`).

    Args:
        in_channels: channels of the images.
        base_channels: width of the first layer; doubled by each further one, at most 8 times.
        num_layers: strided layers.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = base_channels
        for index in range(1, num_layers + 1):
            wider = base_channels * min(2**index, 8)
            stride = 2 if index < num_layers else 1
            # Batch normalisation has a bias of its own.
            layers += [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(wider), nn.LeakyReLU(0.2)]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> a logit per patch [B, 1, H', W'], larger for images that look real."""
        return self.main(images.contiguous(memory_format=torch.channels_last))
