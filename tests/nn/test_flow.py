"""Flow matching: the path, times, and solvers against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.nn import flow


def test_the_path_and_its_inverse() -> None:
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    times = torch.tensor([0.3, 0.8])[:, None, None]
    x = flow.interpolate(clean, noise, times)
    velocity = flow.velocity_target(clean, noise)
    torch.testing.assert_close(flow.clean_from_velocity(x, velocity, times), clean)
    torch.testing.assert_close(x + (1 - times) * velocity, noise)
    step = 1e-3
    moved = flow.interpolate(clean, noise, times + step)
    torch.testing.assert_close((moved - x) / step, velocity, rtol=1e-2, atol=1e-2)


def test_the_score_of_gaussian_data() -> None:
    """For data N(0, s^2), x_t is N(0, (1-t)^2 s^2 + t^2): both velocity and score are known."""
    s, time = 0.7, 0.6
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    variance = (1 - time) ** 2 * s**2 + time**2
    clean, noise = (1 - time) * s**2 / variance * x, time / variance * x  # posterior means
    torch.testing.assert_close(flow.score_from_velocity(noise - clean, x, time), -x / variance)


def test_times_are_logit_normal() -> None:
    times = flow.logit_normal_times((20000,), torch.Generator().manual_seed(0), "cpu", mean=0.5, std=2.0)
    assert times.dtype == torch.float32
    logits = torch.logit(times.double())
    assert float(logits.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(logits.std()) == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("solver", flow.SOLVERS)
@pytest.mark.parametrize("steps", [2, 5, 50])
def test_schedules(solver: str, steps: int) -> None:
    schedule = flow.flow_schedule(steps, solver)
    assert len(schedule) == len(schedule.indices) == steps
    assert len(schedule.times) == steps + 1
    assert schedule.times[0] == 1.0
    assert schedule.times[-1] == 0.0
    assert schedule.indices[0] == 1000
    assert all(first > second for first, second in zip(schedule.times, schedule.times[1:], strict=False))
    assert all(abs(index - 1000 * time) <= 1 for index, time in zip(schedule.indices, schedule.times, strict=False))


def test_indices_are_cut_in_float32_after_the_first_call() -> None:
    """0.28 times 1000 is 280 in float32 and 279.999... in float64."""
    schedule = flow.flow_schedule(25)
    assert any(abs(time - 0.28) < 1e-12 for time in schedule.times)
    assert 280 in schedule.indices
    assert 279 not in schedule.indices


def test_few_steps_and_unknown_solvers_are_refused() -> None:
    assert len(flow.flow_schedule(1, "euler")) == 1
    for steps, solver in ((1, "euler_maruyama"), (0, "euler"), (-3, "euler"), (2.5, "euler")):
        with pytest.raises(InvalidInputError, match="at least"):
            flow.flow_schedule(steps, solver)
    with pytest.raises(InvalidInputError, match="heun"):
        flow.flow_schedule(4, "heun")


def field(clean: Tensor, schedule: flow.FlowSchedule):
    """The exact velocity when all data is one point: every path is straight, so any solver lands on it."""
    return lambda x, call: (x - clean) / schedule.times[call]


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_straight_paths_end_at_the_data(solver: str) -> None:
    clean = torch.randn(2, 3, 4)
    schedule = flow.flow_schedule(7, solver)
    noise = torch.randn(2, 3, 4)
    steps = list(flow.flow_steps(field(clean, schedule), noise, schedule, torch.Generator().manual_seed(0)))
    assert [step.index for step in steps] == list(range(7))
    for step in steps:
        torch.testing.assert_close(step.clean.float(), clean, rtol=1e-4, atol=1e-4)
    if solver == "euler":
        torch.testing.assert_close(steps[-1].x.float(), clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_gaussian_data_keeps_its_spread(solver: str) -> None:
    s = 0.5
    schedule = flow.flow_schedule(100, solver)

    def velocity(x: Tensor, call: int) -> Tensor:
        time = schedule.times[call]
        return (time - (1 - time) * s**2) / ((1 - time) ** 2 * s**2 + time**2) * x

    noise = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0))
    *_, last = flow.flow_steps(velocity, noise, schedule, torch.Generator().manual_seed(1))
    assert float(last.x.std()) == pytest.approx(s, rel=0.05)


def test_one_stochastic_step_against_its_formula() -> None:
    schedule = flow.flow_schedule(3)
    x = torch.randn(1, 2, 2)
    first = next(iter(flow.flow_steps(lambda x, call: 0.3 * x, x, schedule, torch.Generator().manual_seed(3))))
    noise = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(3))
    step = schedule.times[1] - 1.0
    expected = x + step * ((2 - 1.0) * 0.3 * x + x) + math.sqrt(2.0) * math.sqrt(-step) * noise
    torch.testing.assert_close(first.x.float(), expected)


def test_images_draw_from_their_own_generators() -> None:
    schedule = flow.flow_schedule(4)
    noise = torch.randn(2, 3, 1)

    def run(rows: slice, *numbers: int) -> Tensor:
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        *_, last = flow.flow_steps(lambda x, call: x, noise[rows], schedule, generators)
        return last.x

    assert torch.equal(run(slice(2), 1, 2)[1:], run(slice(1, 2), 2))
