"""Flow matching: straight paths between data and noise, the velocity along them, and samplers that follow it.

    x_t = (1 - t) x_0 + t eps,   v = eps - x_0,   t = 1 is noise, t = 0 is data

Sources: Lipman et al. (arXiv 2210.02747) and Liu et al. (arXiv 2209.03003) for the path, SiT (arXiv 2401.08740) for the
stochastic sampler, Stable Diffusion 3 (arXiv 2403.03206) for logit-normal times.

Letters: B images, S solver steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.nn import diffusion
from vistok.nn.sampling import Generators

__all__ = [
    "SOLVERS",
    "FlowSchedule",
    "FlowStep",
    "clean_from_velocity",
    "flow_schedule",
    "flow_steps",
    "interpolate",
    "logit_normal_times",
    "score_from_velocity",
    "solver_dtype",
    "time_index",
    "velocity_target",
]

SOLVERS = ("euler_maruyama", "euler")
LAST_TIME = 0.04  # where the stochastic sampler stops adding noise and goes straight to the data
TIME_STEPS = 1000  # t in [0, 1] is embedded as trunc(1000 t)


# ---------------------------------------------------------------------------------------------------------------- draws
def logit_normal_times(
    shape: Sequence[int],
    generator: torch.Generator | None,
    device: torch.device | str,
    *,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Times sigmoid(n), n ~ N(mean, std^2), as float32: dense in the middle of the path, never 0 or 1 exactly."""
    normal = diffusion.gaussian_noise(shape, generator, device)
    # In float64 where there is one: sigmoid rounds to 1 from n = 17 on in float32.
    return torch.sigmoid(mean + std * normal.to(solver_dtype(normal.device))).float()


# ------------------------------------------------------------------------------------------------------------- the path
def interpolate(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps; `time` broadcasts."""
    return (1.0 - time) * clean + time * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """v = dx_t / dt = eps - x_0, what the network learns."""
    return noise - clean


def clean_from_velocity(x: Tensor, velocity: Tensor, time: Tensor | float) -> Tensor:
    """The data at the end of a straight line: x_0 = x_t - t v."""
    return x - time * velocity


def score_from_velocity(velocity: Tensor, x: Tensor, time: Tensor | float) -> Tensor:
    """Gradient of the log density, (-(1 - t) v - x) / t, for t > 0."""
    return (-(1.0 - time) * velocity - x) / time


def time_index(time: Tensor) -> Tensor:
    """trunc(1000 t), int64, computed in the type of `time`: float32 and float64 differ for some times (0.28)."""
    return (time * TIME_STEPS).long()


# -------------------------------------------------------------------------------------------------------------- solvers
@dataclass(frozen=True)
class FlowSchedule:
    """The network calls of one sampling run.

    Attributes:
        solver: one of `SOLVERS`.
        times: S + 1 times, from 1 down to 0; call i happens at `times[i]`.
        indices: S integer times, what the network is told.
    """

    solver: str
    times: tuple[float, ...]
    indices: tuple[int, ...]

    def __len__(self) -> int:
        """S."""
        return len(self.indices)

    @property
    def network_times(self) -> tuple[float, ...]:
        """S times as the network sees them: the first as it is, the others rounded to float32."""
        return (self.times[0], *(float(torch.tensor(time, dtype=torch.float32)) for time in self.times[1:-1]))


def flow_schedule(num_steps: int, solver: str = "euler_maruyama", *, last_time: float = LAST_TIME) -> FlowSchedule:
    """Times of a solver.

    Args:
        num_steps: network calls S; at least 2 for Euler-Maruyama, 1 for Euler.
        solver: `"euler_maruyama"` on the reverse SDE: S times from 1 to `last_time`, then 0; or `"euler"` on the ODE:
            S + 1 times from 1 to 0.
        last_time: time of the last stochastic call.

    Raises:
        InvalidInputError: for another solver or too few steps.
    """
    if solver not in SOLVERS:
        raise InvalidInputError(f"solver must be one of {', '.join(SOLVERS)}; got {solver!r}")
    least = 2 if solver == "euler_maruyama" else 1
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < least:
        raise InvalidInputError(f"the {solver} solver needs at least {least} steps (an integer); got {num_steps!r}")
    if solver == "euler":
        times = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64, device="cpu")
    else:
        times = torch.linspace(1.0, last_time, num_steps, dtype=torch.float64, device="cpu")
        times = torch.cat([times, times.new_zeros(1)])
    # Published checkpoints were sampled with float32 products after the first call; 0.28 is 280 there, 279 in float64.
    indices = [int(time_index(times[0])), *time_index(times[1:-1].float()).tolist()]
    return FlowSchedule(solver, tuple(times.tolist()), tuple(indices))


def solver_dtype(device: torch.device) -> torch.dtype:
    """float64, as the published samplers keep their state, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class FlowStep:
    """One solver step.

    Attributes:
        index: number of the step, from 0.
        x: the state after it.
        clean: where the velocity at this step points to, x_t - t v: a preview of the result.
    """

    index: int
    x: Tensor
    clean: Tensor


def flow_steps(
    velocity: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    schedule: FlowSchedule,
    generator: Generators = None,
) -> Iterator[FlowStep]:
    """Follow the velocity from noise to data.

    Euler-Maruyama integrates the reverse SDE whose diffusion is w(t) = 2t. With the score s of the velocity, its drift
    v - t s is (2 - t) v + x, and each step but the last adds sqrt(2 t |dt|) N(0, 1).

    Args:
        velocity: (state float32 [B, ...], number of the call) -> velocity of the same shape.
        noise: [B, ...], the state at t = 1.
        schedule: times.
        generator: draws of the stochastic solver; a list holds one an image.

    Yields:
        S steps; the state of the last one is the sample.
    """
    x = noise.to(solver_dtype(noise.device))
    stochastic = schedule.solver == "euler_maruyama"
    for index in range(len(schedule)):
        time, step = schedule.times[index], schedule.times[index + 1] - schedule.times[index]
        predicted = velocity(x.float(), index).to(x.dtype)
        clean = clean_from_velocity(x, predicted, time)
        drift = torch.add(x, predicted, alpha=2.0 - time) if stochastic else predicted
        x = torch.add(x, drift, alpha=step)
        if stochastic and index + 1 < len(schedule):
            draws = diffusion.gaussian_noise(x.shape, generator, x.device)
            x = x.add_(draws.to(x.dtype), alpha=math.sqrt(2.0 * time) * math.sqrt(-step))
        yield FlowStep(index, x, clean)
