"""The mathematics of FlexTok's rectified flow: noise levels, guidance, prefix lengths.

x_t = t * noise + (1 - t) * x_0, velocity = noise - x_0; sampling goes from t = 1 to 0 in equal Euler steps.

Letters: B images, Z channels, h, w sides of the latents, N registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from vistok.errors import InvalidInputError

__all__ = [
    "NOISE_SCHEDULES",
    "PREFIX_MODES",
    "GuidanceScale",
    "NormalizedGuidance",
    "classifier_free_guidance",
    "next_power_of_two",
    "noise_levels",
    "prefix_lengths",
    "representation_loss",
    "scale_at",
    "shift_levels",
]

NOISE_SCHEDULES = ("mode", "logit_normal", "stratified")
PREFIX_MODES = ("uniform", "pow2", "uniform_pow2", "none")

GuidanceScale: TypeAlias = float | Callable[[float], float]
"""A number, or a function of t in (0, 1]."""


def noise_levels(draws: Tensor, schedule: str = "mode", mode_scale: float = 0.25) -> Tensor:
    """Moments t in 0..1 at which to train.

    Args:
        draws: float [B], standard normal for `"logit_normal"`, uniform in 0..1 for the others.
        schedule: `"mode"` is the mode sampling of Stable Diffusion 3 (arXiv 2403.03206), 1 - u - m (cos^2(pi u / 2) - 1
            + u); `"logit_normal"` the sigmoid of a normal draw; `"stratified"` the same with one draw in each B-th of
            its distribution.
        mode_scale: m of `"mode"`; 0 takes the draws as they are.
    """
    if schedule == "logit_normal":
        return torch.sigmoid(draws)
    if schedule == "stratified":
        count = draws.shape[0]
        quantile = (torch.arange(count, device=draws.device) + draws) / count
        return torch.sigmoid(torch.special.ndtri(quantile))
    if schedule != "mode":
        raise InvalidInputError(f"noise_schedule must be one of {', '.join(NOISE_SCHEDULES)}; got {schedule!r}")
    if mode_scale == 0:
        return draws
    return 1 - draws - mode_scale * (torch.cos(math.pi / 2 * draws).square() - 1 + draws)


def shift_levels(t: Tensor, shift: float) -> Tensor:
    """Moments moved towards noise (s > 1) or towards the image (s < 1): s t / (1 + (s - 1) t).

    Stable Diffusion 3 shifts for the resolution (arXiv 2403.03206, eq. 23); here it is because what tokens say matters
    most while the image is mostly noise.
    """
    return t if shift == 1.0 else shift * t / (1 + (shift - 1) * t)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not less than `number`, at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def prefix_lengths(count: int, longest: int, mode: str, generator: torch.Generator | None = None) -> list[int]:
    """How many registers each sample keeps in training (nested dropout).

    Args:
        count: samples.
        longest: registers N.
        mode: `"uniform"` over 1..N; `"pow2"` over 1, 2, 4, ... up to N; `"uniform_pow2"` rounds a uniform draw up to a
            power of two (and to N, if that is none); `"none"` keeps all, by which the tokens get no order.
        generator: source of the draws.
    """
    if mode not in PREFIX_MODES:
        raise InvalidInputError(f"nested_dropout must be one of {', '.join(PREFIX_MODES)}; got {mode!r}")
    if mode == "none":
        return [longest] * count
    device = "cpu" if generator is None else generator.device
    choices = [1 << power for power in range(longest.bit_length())] if mode == "pow2" else list(range(1, longest + 1))
    drawn = torch.randint(len(choices), (count,), generator=generator, device=device).tolist()
    kept = [choices[index] for index in drawn]
    return [min(next_power_of_two(length), longest) for length in kept] if mode == "uniform_pow2" else kept


def representation_loss(projected: Tensor, features: Tensor) -> Tensor:
    """1 - cosine similarity of projected patches [B, rows, columns, F] with features [B, F, rows', columns'].

    Raises:
        InvalidInputError: if the teacher has other channels.
    """
    projected = projected.permute(0, 3, 1, 2).float()
    if projected.shape[:2] != features.shape[:2]:
        raise InvalidInputError(
            f"teacher features must be [{len(projected)}, {projected.shape[1]}, rows, columns]; "
            f"got {list(features.shape)}"
        )
    if projected.shape[2:] != features.shape[2:]:
        projected = functional.interpolate(projected, features.shape[2:], mode="bilinear", antialias=False)
    return 1 - functional.cosine_similarity(projected, features.float(), dim=1).mean()


def scale_at(scale: GuidanceScale, t: float) -> float:
    """The guidance scale at the moment t."""
    return float(scale(t)) if callable(scale) else float(scale)


def classifier_free_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """u + s (c - u)."""
    return torch.lerp(uncond, cond, scale)


class NormalizedGuidance:
    """Adaptive projected guidance (arXiv 2410.02416): no over-saturation at large scales.

    The difference of the two velocities gets momentum, its norm is limited, and of its part parallel to the conditional
    velocity only `eta` remains. One object serves one run, because momentum carries over from step to step.

    Args:
        momentum: share of the running difference that is added to the next; None has none.
        eta: share of the parallel part that remains.
        norm_threshold: largest norm of the difference of a sample; 0 does not limit it.
    """

    def __init__(self, momentum: float | None = -0.5, eta: float = 0.0, norm_threshold: float = 2.5) -> None:
        self.momentum, self.eta, self.norm_threshold = momentum, eta, norm_threshold
        self.running: Tensor | float = 0.0

    def __call__(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """Guided velocity [B, Z, h, w], float32, for one step."""
        difference = cond - uncond
        if self.momentum is not None:
            difference = self.running = difference + self.momentum * self.running
        if self.norm_threshold > 0:
            norm = difference.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            # A difference of zero stays zero: the quotient is infinite, and the limit 1.
            difference = difference * (self.norm_threshold / norm).clamp(max=1.0)
        # In float64 as published (the MPS backend has none): the projection is a difference of large numbers.
        wide = torch.float32 if cond.device.type == "mps" else torch.float64
        direction = functional.normalize(cond.to(wide).flatten(1), dim=1)
        flat = difference.to(wide).flatten(1)
        parallel = (flat * direction).sum(1, keepdim=True) * direction
        kept = (flat - parallel + self.eta * parallel).to(cond.dtype).view_as(cond)
        return cond + (scale - 1) * kept
