"""What the plain samplers of MAR and Hi-MAR share: the schedule, and one diffusion step as textbooks write it.

Letters: B images, N rows, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vistok.nn.diffusion import DiffusionProcess

__all__ = ["known_after", "reverse_step"]


def known_after(total: int, index: int, num_steps: int, masked: int) -> int:
    """How many of `total` tokens stay unknown after a step, of `masked` before it (cosine schedule)."""
    return max(1, min(masked - 1, math.floor(total * math.cos(math.pi / 2 * (index + 1) / num_steps))))


def reverse_step(
    process: DiffusionProcess,
    x: Tensor,
    index: Tensor,
    eps: Tensor,
    logits: Tensor | None,
    noise: Tensor,
    temperature: float,
) -> Tensor:
    """x_{t-1} by way of the clean sample: predict it, take the posterior's mean and the variance, add noise.

    Args:
        process: respaced process.
        x: [N, ...].
        index: int64 [N], the step.
        eps: predicted noise.
        logits: variance logits; None for the fixed large variance.
        noise: normal draws.
        temperature: scales them.
    """

    def at(table: Tensor) -> Tensor:
        return table[index].float().view(-1, *[1] * (x.ndim - 1)).expand_as(x)

    alphas = process.alphas_cumprod
    x0 = at((1 / alphas).sqrt()) * x - at((1 / alphas - 1).sqrt()) * eps
    mean = at(process.posterior_mean_x0) * x0 + at(process.posterior_mean_xt) * x
    if logits is None:
        log_variance = at(process.fixed_large_variance.log())
    else:
        share = (logits + 1) / 2
        log_variance = share * at(process.betas.log()) + (1 - share) * at(process.posterior_log_variance)
    moving = (index != 0).float().view(-1, *[1] * (x.ndim - 1))
    return mean + moving * torch.exp(0.5 * log_variance) * noise * temperature
