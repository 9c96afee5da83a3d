"""What every token sampler shares: its steps, its randomness, and the choice of tokens.

Letters: B images, S tokens chosen in one step, V entries of the codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.kernels import guided_sampling
from vistok.tokens import VisualTokens

__all__ = [
    "Generators",
    "Step",
    "TokenChecks",
    "check_sampling",
    "choose_tokens",
    "exponential_noise",
    "uniform",
]

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


@dataclass(frozen=True)
class Step:
    """One model step of a sampler.

    Attributes:
        index: number of the step, from 0.
        total: number of steps of the whole run.
        tokens: all tokens so far, ids [B, N] or features [B, N, D] in raster order; undecided ones are 0 and False in
            `tokens.mask`.
        changed: int64 on the CPU, raster positions decided in this step: [S], or [B, S] where images differ in them.
    """

    index: int
    total: int
    tokens: VisualTokens
    changed: Tensor


def exponential_noise(shape: Sequence[int], generator: Generators, device: torch.device | str) -> Tensor:
    """Exp(1) draws, float32; `argmax(probabilities / noise)` then is an exact draw from the probabilities.

    Args:
        shape: [B, ...]; with a list of generators, image b draws from the b-th alone, whatever else is in the batch.
        generator: one for all images, one an image, or None for torch's default. Draws happen on its device.
    """
    if isinstance(generator, Sequence):
        return torch.stack([exponential_noise(shape[1:], one, device) for one in generator])
    source = torch.device(device) if generator is None else generator.device
    return torch.empty(tuple(shape), device=source).exponential_(generator=generator).to(device)


def uniform(shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Uniform draws in [0, 1), float32; on the generator's device if one is given."""
    source = torch.device(device) if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=source).to(device)


def choose_tokens(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, generator: Generators = None
) -> Tensor:
    """Draw one token for every row of logits.

    Args:
        logits: float32 [B, S, V], guided.
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely (ties with the k-th stay); 0 keeps all.
        top_p: then keep the smallest set whose probability reaches p; 1 keeps all.
        generator: see `exponential_noise`.

    Returns:
        int64 [B, S]; -1 where the logits are not a number (see `TokenChecks`).
    """
    shape = tuple(logits.shape)
    noise = None if temperature == 0.0 else exponential_noise(shape, generator, logits.device).flatten(0, 1)
    return guided_sampling(logits.flatten(0, 1), noise, temperature=temperature, top_k=top_k, top_p=top_p).view(
        shape[:2]
    )


class TokenChecks:
    """Finds tokens that could not be chosen (-1), because their logits were not numbers.

    With CUDA the question is asked once, at the end, so that no step waits for the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.invalid = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, ids: Tensor, *, last: bool) -> Tensor:
        """The ids [B, S] of a step as they are, 0 for -1.

        Raises:
            InvalidOutputError: at the first invalid token; with CUDA after the last step.
        """
        self.invalid |= (ids < 0).any()
        if (last or not ids.is_cuda) and bool(self.invalid):
            raise InvalidOutputError(
                "the model produced NaN logits; its weights are damaged or its floating point type is too narrow: "
                "reload the checkpoint, or load it with dtype=torch.float32"
            )
        return ids.clamp_min(0)


def check_sampling(
    guidance_scale: float,
    guidance_interval: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: Generators,
    batch: int,
) -> None:
    """Raise InvalidInputError, saying what is allowed, if a sampling setting for `batch` images is out of range."""
    if isinstance(generator, Sequence) and len(generator) != batch:
        raise InvalidInputError(f"{len(generator)} generators for {batch} images; give one, or one an image")
    if not 0.0 <= guidance_scale < float("inf"):
        raise InvalidInputError(
            f"guidance_scale must be a number >= 0 (up to 1 means no guidance); got {guidance_scale}"
        )
    if guidance_interval is not None and guidance_interval < 0:
        raise InvalidInputError(
            f"guidance_interval must be >= 0, or None to guide every token; got {guidance_interval}"
        )
    if not 0.0 <= temperature < float("inf"):
        raise InvalidInputError(f"temperature must be a number >= 0 (0 is greedy); got {temperature}")
    if top_k < 0:
        raise InvalidInputError(f"top_k must be >= 0 (0 keeps all tokens); got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise InvalidInputError(f"top_p must lie in (0, 1] (1 keeps all tokens); got {top_p}")
