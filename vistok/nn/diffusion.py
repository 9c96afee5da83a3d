"""Gaussian diffusion (DDPM) with a cosine schedule: tables, respacing, reverse steps and losses.

Sources: Ho et al. (arXiv 2006.11239) for the process; Nichol and Dhariwal (arXiv 2102.09672) for the cosine schedule,
respacing, the learned range of variances and the variational bound; Song et al. (arXiv 2010.02502) for `ddim_step`.
The tables are float64: near pure noise 1 / sqrt(alphas_cumprod) is about 20,000, which float32 sums do not survive.

Letters: T steps of the training process, S steps of a respaced one, N samples, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.nn.sampling import Generators

__all__ = [
    "DiffusionProcess",
    "ReverseMoments",
    "ReverseStep",
    "ancestral_step",
    "check_weighting",
    "cosine_betas",
    "cosine_process",
    "gaussian_noise",
    "loss_weights",
    "respaced_timesteps",
    "uniform_timesteps",
]

TRAINING_STEPS = 1000
WEIGHTINGS = ("epsilon", "velocity")
MOST_WEIGHT = 10.0
# Half the width of a bin of 8-bit images scaled to [-1, 1], and the smallest probability whose logarithm is taken.
HALF_BIN = 1.0 / 255.0
SMALLEST = 1e-12


# ---------------------------------------------------------------------------------------------------------------- draws
def gaussian_noise(shape: Sequence[int], generator: Generators, device: torch.device | str) -> Tensor:
    """Standard normal draws, float32.

    Args:
        shape: [B, ...]; with a list of generators, image b draws from the b-th alone, whatever else is in the batch.
        generator: one for all images, one an image, or None for torch's default. Draws happen on its device.
    """
    if isinstance(generator, Sequence):
        return torch.stack([gaussian_noise(shape[1:], one, device) for one in generator])
    source = torch.device(device) if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source).to(device)


def uniform_timesteps(
    count: int, generator: torch.Generator | None, device: torch.device | str, steps: int = TRAINING_STEPS
) -> Tensor:
    """int64 [count], uniform in 0..steps-1."""
    source = torch.device(device) if generator is None else generator.device
    return torch.randint(steps, (count,), generator=generator, device=source).to(device)


def loss_weights(process: DiffusionProcess, timesteps: Tensor, weighting: str) -> Tensor:
    """Weights float32 [N] of the squared errors of the noise at `timesteps` int64 [N].

    Args:
        process: the process of training.
        timesteps: noise levels.
        weighting: "epsilon" weighs all alike, as MAR and Hi-MAR do; "velocity" as if the network predicted the velocity
            (arXiv 2202.00512, section 4), which is 1 / alpha_bar, at most `MOST_WEIGHT`: high noise levels, where the
            condition says what the data cannot, count for more.
    """
    if weighting == "epsilon":
        return torch.ones(len(timesteps), device=timesteps.device)
    kept = process.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return 1 / kept.clamp_min(1 / MOST_WEIGHT)


def check_weighting(weighting: str) -> None:
    """Raise InvalidInputError unless `loss_weights` knows it."""
    if weighting not in WEIGHTINGS:
        raise InvalidInputError(f"loss_weighting must be one of {', '.join(WEIGHTINGS)}; got {weighting!r}")


# --------------------------------------------------------------------------------------------------------------- tables
def cosine_betas(steps: int = TRAINING_STEPS) -> Tensor:
    """float64 [T]: 1 - level((i + 1) / T) / level(i / T), at most 0.999 (arXiv 2102.09672, equation 17).

    level(u) = cos^2((u + s) / (1 + s) pi / 2) with s = 0.008.
    """

    def level(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - level((i + 1) / steps) / level(i / steps), 0.999) for i in range(steps)]
    return torch.tensor(betas, dtype=torch.float64, device="cpu")


def respaced_timesteps(respacing: str | int, steps: int = TRAINING_STEPS) -> list[int]:
    """Which steps of the training process a shorter one takes, ascending.

    Args:
        respacing: `""` for all; a count, evenly spaced with both ends; counts separated by commas, one for each of as
            many equal sections ("10,15,20"; 0 leaves a section out); or `"ddimN"` for every k-th step with N in all.
        steps: T.

    Raises:
        InvalidInputError: anything else, more steps than a section has, or none at all.
    """
    text = str(respacing).replace(" ", "")
    if text == "":
        return list(range(steps))
    if text.startswith("ddim"):
        wanted = text.removeprefix("ddim")
        for stride in range(1, steps):
            if wanted.isdigit() and len(range(0, steps, stride)) == int(wanted):
                return list(range(0, steps, stride))
        raise InvalidInputError(f"no whole stride through {steps} steps takes {wanted!r} of them (given {respacing!r})")
    counts = text.split(",")
    if not all(count.isdigit() for count in counts):
        raise InvalidInputError(
            f"diffusion steps must be a count such as 100, counts of sections such as '10,15,20', or 'ddim50'; "
            f"got {respacing!r}"
        )
    chosen: set[int] = set()
    start = 0
    for section, count in enumerate(map(int, counts)):
        size = steps // len(counts) + (section < steps % len(counts))
        if count > size:
            raise InvalidInputError(f"a section of {size} steps has no {count} of them (given {respacing!r})")
        distance = (size - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            chosen.add(start + round(place))
            place += distance
        start += size
    if not chosen:
        raise InvalidInputError(f"at least one diffusion step is needed; got {respacing!r}")
    return sorted(chosen)


class ReverseStep(NamedTuple):
    """Numbers of one sampling step, so that no table has to be read on the device.

    Attributes:
        number: of the step in the respaced process; S - 1 is the noisiest and comes first.
        timestep: what the network is told, 0..T-1.
        state_weight, eps_weight: the mean is `state_weight * x - eps_weight * eps`.
        log_beta, log_posterior: ends of the learned range of log variances.
        std: standard deviation of the fixed large variance.
        signal, noise: sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod), which noise clean values to this level.
    """

    number: int
    timestep: int
    state_weight: float
    eps_weight: float
    log_beta: float
    log_posterior: float
    std: float
    signal: float
    noise: float


class ReverseMoments(NamedTuple):
    """The Gaussian of x_{t-1} given x_t: mean, log variance, and the clean sample that it aims at."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


@dataclass(frozen=True)
class DiffusionProcess:
    """A noising process of S steps out of T, predicted through its noise (eps).

    Steps are given by their index 0..S-1 in this process; `timesteps[index]` is what the network is told.

    Attributes:
        betas: float64 [S], and so are the other tables.
        timesteps: ascending, which steps of the training process these are.
        alphas_cumprod, alphas_cumprod_prev: share of the signal's variance at a step and at the one before.
        posterior_variance, posterior_log_variance: of x_{t-1} given x_t and x_0; the logarithm of the first is replaced
            by that of the second.
        posterior_mean_x0, posterior_mean_xt: weights of x_0 and x_t in its mean.
        fixed_large_variance: betas, but for the first.
    """

    betas: Tensor
    timesteps: tuple[int, ...]
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    posterior_variance: Tensor
    posterior_log_variance: Tensor
    posterior_mean_x0: Tensor
    posterior_mean_xt: Tensor
    fixed_large_variance: Tensor

    @classmethod
    def build(cls, betas: Tensor, timesteps: Sequence[int]) -> DiffusionProcess:
        """The process that visits `timesteps` of the one with these betas [T]."""
        kept = (1.0 - betas).cumprod(0)[list(timesteps)]
        one = torch.ones(1, dtype=torch.float64, device=betas.device)
        betas = 1.0 - kept / torch.cat([one, kept[:-1]])
        alphas = (1.0 - betas).cumprod(0)
        previous = torch.cat([one, alphas[:-1]])
        variance = betas * (1.0 - previous) / (1.0 - alphas)
        second = variance[1] if len(variance) > 1 else betas[0]  # the first is 0, which has no logarithm
        clipped = torch.cat([second[None], variance[1:]])
        return cls(
            betas=betas,
            timesteps=tuple(timesteps),
            alphas_cumprod=alphas,
            alphas_cumprod_prev=previous,
            posterior_variance=variance,
            posterior_log_variance=clipped.log(),
            posterior_mean_x0=betas * previous.sqrt() / (1.0 - alphas),
            posterior_mean_xt=(1.0 - previous) * (1.0 - betas).sqrt() / (1.0 - alphas),
            fixed_large_variance=torch.cat([second[None], betas[1:]]),
        )

    def __len__(self) -> int:
        """Number of steps, S."""
        return len(self.timesteps)

    def at(self, table: Tensor, index: Tensor, like: Tensor) -> Tensor:
        """Entries of a table at `index` [N] as float32, shaped to multiply `like` [N, ...]."""
        values = table.float().to(index.device)[index]
        return values.view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x0: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """x_t [N, ...]: sqrt(a) x0 + sqrt(1 - a) noise."""
        alphas = self.alphas_cumprod
        return self.at(alphas.sqrt(), index, x0) * x0 + self.at((1.0 - alphas).sqrt(), index, x0) * noise

    def predict_x0(self, x: Tensor, index: Tensor, eps: Tensor) -> Tensor:
        """The clean sample [N, ...] that this noise implies; not clipped."""
        alphas = self.alphas_cumprod
        scale, shift = (1.0 / alphas).sqrt(), (1.0 / alphas - 1.0).sqrt()
        return self.at(scale, index, x) * x - self.at(shift, index, x) * eps

    def log_variance(self, index: Tensor, logits: Tensor | None, like: Tensor) -> Tensor:
        """Learned range from variance logits [N, C, ...]; the fixed large variance without them."""
        if logits is None:
            return self.at(self.fixed_large_variance.log(), index, like).expand_as(like)
        share = (logits + 1.0) / 2.0
        low, high = self.at(self.posterior_log_variance, index, like), self.at(self.betas.log(), index, like)
        return share * high + (1.0 - share) * low

    def reverse_moments(
        self, x: Tensor, index: Tensor, eps: Tensor, logits: Tensor | None = None, *, clip: bool = False
    ) -> ReverseMoments:
        """Moments of x_{t-1}.

        Args:
            x: [N, C, ...], x_t.
            index: int64 [N].
            eps: predicted noise, like `x`.
            logits: variance logits like `x`; None takes the fixed large variance.
            clip: clip the implied clean sample to [-1, 1].
        """
        x0 = self.predict_x0(x, index, eps)
        log_variance = self.log_variance(index, logits, x)
        if clip:
            x0 = x0.clamp(-1.0, 1.0)
            mean = self.at(self.posterior_mean_x0, index, x) * x0 + self.at(self.posterior_mean_xt, index, x) * x
        else:
            mean = self.at(self._state_weight, index, x) * x - self.at(self._eps_weight, index, x) * eps
        return ReverseMoments(mean, log_variance, x0)

    @property
    def _state_weight(self) -> Tensor:
        return (1.0 - self.betas).rsqrt()

    @property
    def _eps_weight(self) -> Tensor:
        """beta / sqrt((1 - a) (1 - beta)): the posterior mean without the detour over x0, which is huge near T."""
        return self.betas * ((1.0 - self.alphas_cumprod) * (1.0 - self.betas)).rsqrt()

    def ancestral_sample(
        self,
        x: Tensor,
        index: Tensor,
        eps: Tensor,
        noise: Tensor,
        logits: Tensor | None = None,
        *,
        temperature: float = 1.0,
    ) -> Tensor:
        """x_{t-1} for samples at different steps; `temperature` scales the noise. See `ancestral_step` for loops."""
        mean, log_variance, _ = self.reverse_moments(x, index, eps, logits)
        moving = (index > 0).view(-1, *[1] * (x.ndim - 1))
        return mean + moving * torch.exp(0.5 * log_variance) * noise * temperature

    def ddim_step(self, x: Tensor, index: Tensor, eps: Tensor, noise: Tensor, *, eta: float = 0.0) -> Tensor:
        """x_{t-1} of the non-Markovian process (arXiv 2010.02502, equation 12); eta 0 is deterministic."""
        alphas, previous = self.alphas_cumprod, self.alphas_cumprod_prev
        sigma = eta * ((1.0 - previous) / (1.0 - alphas)).sqrt() * (1.0 - alphas / previous).sqrt()
        direction = (1.0 - previous - sigma**2).clamp_min(0.0).sqrt()
        mean = self.at(previous.sqrt(), index, x) * self.predict_x0(x, index, eps)
        mean = mean + self.at(direction, index, x) * eps
        moving = (index > 0).view(-1, *[1] * (x.ndim - 1))
        return mean + moving * self.at(sigma, index, x) * noise

    def losses(
        self, x0: Tensor, index: Tensor, noise: Tensor, eps: Tensor, logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(mean squared error of the noise, variational bound in bits), each float32 [N], averaged over a sample.

        The bound trains the variance alone: it sees `eps` detached (arXiv 2102.09672, section 3.1). It compares the
        model with the true posterior; their means differ by `eps_weight * (eps - noise)`, also at the last step, where
        the bound is the likelihood of 8-bit data instead. Without variance logits it is 0.
        """
        eps = eps.float()
        squared = (noise - eps) ** 2
        error = squared.flatten(1).mean(1)
        if logits is None:
            return error, torch.zeros_like(error)
        model_log = self.log_variance(index, logits.float(), x0)
        true_log = self.at(self.posterior_log_variance, index, x0)
        shift = self.at(self._eps_weight, index, x0) * (eps.detach() - noise)  # true mean - model mean
        divergence = 0.5 * (
            -1.0 + model_log - true_log + torch.exp(true_log - model_log) + shift**2 * torch.exp(-model_log)
        )
        last = (index == 0).view(-1, *[1] * (x0.ndim - 1))
        bound = torch.where(last, _negative_log_likelihood(x0, shift, model_log), divergence)
        return error, bound.flatten(1).mean(1) / math.log(2.0)

    def reverse_steps(self) -> list[ReverseStep]:
        """The numbers of every sampling step, noisiest first."""
        columns = (
            self._state_weight,
            self._eps_weight,
            self.betas.log(),
            self.posterior_log_variance,
            self.fixed_large_variance.sqrt(),
            self.alphas_cumprod.sqrt(),
            (1.0 - self.alphas_cumprod).sqrt(),
        )
        rows = zip(range(len(self)), self.timesteps, *(column.tolist() for column in columns))
        return [ReverseStep(*row) for row in rows][::-1]


def _negative_log_likelihood(x0: Tensor, shift: Tensor, log_variance: Tensor) -> Tensor:
    """Of 8-bit values x0 in [-1, 1] under a Gaussian whose mean is x0 - shift, with a tanh approximation of its
    cumulative distribution (arXiv 2006.11239, equation 13)."""

    def cumulative(value: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))

    scale = torch.exp(-0.5 * log_variance)
    below, above = cumulative(scale * (shift - HALF_BIN)), cumulative(scale * (shift + HALF_BIN))
    share = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1.0 - below, above - below))
    return -share.clamp_min(SMALLEST).log()


def ancestral_step(
    x: Tensor,
    step: ReverseStep,
    eps: Tensor,
    noise: Tensor | None,
    logits: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """One sampling step for a whole batch, as one affine combination.

    Args:
        x: state, float32 of any shape.
        step: from `DiffusionProcess.reverse_steps`.
        eps: predicted noise, like `x`.
        noise: normal draws like `x`; None for none (temperature 0, and the last step, which adds none).
        logits: variance logits like `x`; None takes the fixed large variance.
        temperature: scales the noise.

    Returns:
        The next state, float32.
    """
    mean = torch.add(x * step.state_weight, eps.float(), alpha=-step.eps_weight)
    if noise is None or step.number == 0 or temperature == 0.0:
        return mean
    if logits is None:
        return mean.add_(noise, alpha=step.std * temperature)
    # log std = v (log beta - log posterior) / 4 + (log beta + log posterior) / 4
    half_range, middle = (step.log_beta - step.log_posterior) / 4, (step.log_beta + step.log_posterior) / 4
    return mean.addcmul_(torch.exp(logits.float() * half_range + middle), noise, value=temperature)


@lru_cache(maxsize=32)
def cosine_process(respacing: str | int = "", steps: int = TRAINING_STEPS) -> DiffusionProcess:
    """The cosine process, whole or respaced (see `respaced_timesteps`); the last few are kept."""
    with torch.inference_mode(False):  # what is made while sampling must serve training, too
        return DiffusionProcess.build(cosine_betas(steps), respaced_timesteps(respacing, steps))
