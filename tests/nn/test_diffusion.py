"""Diffusion maths: against diffusers' scheduler, against definitions, and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from vistok.errors import InvalidInputError
from vistok.nn.diffusion import (
    MOST_WEIGHT,
    ancestral_step,
    check_weighting,
    cosine_betas,
    cosine_process,
    gaussian_noise,
    loss_weights,
    respaced_timesteps,
    uniform_timesteps,
)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize(
    ("respacing", "count"),
    [("", 1000), (1, 1), ("2", 2), (100, 100), ("10,15,20", 45), ("6, 5,4,0", 15), ("ddim25", 25)],
)
def test_respacing_takes_what_it_says(respacing: str | int, count: int) -> None:
    steps = respaced_timesteps(respacing)
    assert len(steps) == count
    assert steps == sorted(set(steps))
    assert 0 <= steps[0] <= steps[-1] < 1000


def test_respacing_by_example() -> None:
    assert respaced_timesteps("5") == [0, 250, 500, 749, 999]  # banker's rounding of 249.75, 499.5, 749.25
    assert respaced_timesteps("2,1,3", steps=10) == [0, 3, 4, 7, 8, 9]
    assert respaced_timesteps("ddim4", steps=10) == [0, 3, 6, 9]


@pytest.mark.parametrize("respacing", ["0", "0,0", "-5", "many", "10,", "1001", "600,600", "ddim7.5", "ddim600", 1.5])
def test_bad_respacings_are_named(respacing: str) -> None:
    with pytest.raises(InvalidInputError, match="step"):
        respaced_timesteps(respacing)


@pytest.mark.parametrize("count", [25, 100, 250])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_large"])
def test_steps_agree_with_diffusers(count: int, variance: str) -> None:
    """diffusers keeps its tables in float32, which costs 1e-4 at its last timestep."""
    scheduler = DDPMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        clip_sample=False,
        timestep_spacing="linspace",
        variance_type=variance,
    )
    scheduler.set_timesteps(count)
    steps = cosine_process(count).reverse_steps()
    assert [step.timestep for step in steps] == scheduler.timesteps.tolist()
    draws = torch.Generator().manual_seed(0)
    for number in (0, 1, count // 2, count - 2, count - 1):
        step = steps[number]
        x, eps, logits = (torch.randn(3, 4, 2, 2, generator=draws) for _ in range(3))
        learned = variance == "learned_range"
        output = torch.cat([eps, logits], dim=1) if learned else eps
        again = torch.Generator().manual_seed(number)
        theirs = scheduler.step(output, step.timestep, x, generator=again).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(number))
        ours = ancestral_step(x, step, eps, noise, logits if learned else None)
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))


def test_one_step_for_a_batch_equals_steps_for_samples() -> None:
    process = cosine_process("12")
    draws = torch.Generator().manual_seed(0)
    x, eps, logits, noise = (torch.randn(2, 5, generator=draws) for _ in range(4))
    for step in process.reverse_steps():
        for values in (logits, None):
            index = torch.full((2,), step.number)
            slow = process.ancestral_sample(x, index, eps, noise, values, temperature=0.7)
            fast = ancestral_step(x, step, eps, noise, values, temperature=0.7)
            torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_the_last_step_and_temperature_zero_add_no_noise() -> None:
    steps = cosine_process("12").reverse_steps()
    x, eps, noise = (torch.randn(2, 5) for _ in range(3))
    assert torch.equal(ancestral_step(x, steps[-1], eps, noise), ancestral_step(x, steps[-1], eps, None))
    assert torch.equal(ancestral_step(x, steps[3], eps, noise, temperature=0.0), ancestral_step(x, steps[3], eps, None))


def test_the_true_noise_leads_back_to_the_data() -> None:
    process = cosine_process("40")
    x0, noise = torch.randn(40, 6), torch.randn(40, 6)
    index = torch.arange(40)
    noisy = process.add_noise(x0, index, noise)
    reached = process.predict_x0(noisy, index, noise)[:-1]  # at the last step 20,000 times the rounding error is left
    torch.testing.assert_close(reached, x0[:-1], rtol=1e-3, atol=1e-3)
    level = process.alphas_cumprod[10]
    torch.testing.assert_close(noisy[10], x0[10] * level.sqrt().float() + noise[10] * (1 - level).sqrt().float())
    # Without new noise, a deterministic step keeps to the same path.
    fewer = process.ddim_step(noisy, index, noise, torch.zeros_like(x0))
    torch.testing.assert_close(fewer[1:-1], process.add_noise(x0[1:-1], index[:-2], noise[1:-1]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fewer[0], x0[0], rtol=1e-4, atol=1e-4)


def test_the_tables_fit_each_other() -> None:
    process = cosine_process("64")
    betas = cosine_betas()
    assert betas.dtype == torch.float64
    assert float((1 - betas).prod()) == pytest.approx(2.43e-9, rel=1e-2)
    whole = (1 - betas).cumprod(0)
    torch.testing.assert_close(process.alphas_cumprod, whole[list(process.timesteps)])
    assert (process.posterior_variance[1:] < process.betas[1:]).all()
    assert process.posterior_variance[0] == 0
    # x0 and x_t weigh in with what makes the mean of the data's own noisy version right.
    previous, alphas = process.alphas_cumprod_prev, process.alphas_cumprod
    torch.testing.assert_close(
        process.posterior_mean_x0 + process.posterior_mean_xt * alphas.sqrt(), previous.sqrt(), rtol=1e-9, atol=1e-12
    )


def test_the_bound_is_a_kl_divergence_and_trains_the_variance_alone() -> None:
    process = cosine_process()
    x0, noise = torch.randn(2, 4), torch.randn(2, 4)
    index = torch.tensor([500, 700])
    eps, logits = noise.clone().requires_grad_(), torch.full((2, 4), -1.0, requires_grad=True)
    error, bound = process.losses(x0, index, noise, eps, logits)
    assert error.abs().max() == 0  # the true noise,
    torch.testing.assert_close(bound, torch.zeros(2))  # and the true variance: the same Gaussian
    _, bound = process.losses(x0, index, noise, eps + 0.3, logits)
    moments = process.reverse_moments(process.add_noise(x0, index, noise), index, eps + 0.3, logits)
    model = torch.distributions.Normal(moments.mean, (0.5 * moments.log_variance).exp())
    exact = process.reverse_moments(process.add_noise(x0, index, noise), index, eps, logits)
    truth = torch.distributions.Normal(exact.mean, (0.5 * exact.log_variance).exp())
    expected = torch.distributions.kl_divergence(truth, model).mean(1) / math.log(2)
    torch.testing.assert_close(bound, expected, rtol=1e-3, atol=1e-4)
    (gradient,) = torch.autograd.grad(bound.sum(), eps, retain_graph=True, allow_unused=True)
    assert gradient is None or not gradient.any()
    (gradient,) = torch.autograd.grad(bound.sum(), logits)
    assert gradient.any()


def test_noise_of_an_image_depends_on_its_generator_alone() -> None:
    both = gaussian_noise((2, 3, 4), seeds(5, 6), "cpu")
    assert torch.equal(both[1:], gaussian_noise((1, 3, 4), seeds(6), "cpu"))
    assert torch.equal(gaussian_noise((2, 3), seeds(1)[0], "cpu"), gaussian_noise((2, 3), seeds(1)[0], "cpu"))
    drawn = uniform_timesteps(2000, seeds(0)[0], "cpu", steps=7)
    assert drawn.unique().tolist() == list(range(7))


def test_velocity_weights_turn_errors_of_the_noise_into_errors_of_the_velocity() -> None:
    process = cosine_process()
    timesteps = torch.tensor([0, 300, 600, 999])
    assert torch.equal(loss_weights(process, timesteps, "epsilon"), torch.ones(4))
    weights = loss_weights(process, timesteps, "velocity")
    x0, noise, error = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    for row, step in enumerate(timesteps[:3]):
        kept = process.alphas_cumprod[step].float()
        x_t = kept.sqrt() * x0 + (1 - kept).sqrt() * noise
        wrong = noise + error
        wrong_x0 = (x_t - (1 - kept).sqrt() * wrong) / kept.sqrt()
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * x0
        wrong_velocity = kept.sqrt() * wrong - (1 - kept).sqrt() * wrong_x0
        squared = (wrong_velocity - velocity).square().sum()
        assert torch.allclose(weights[row] * error.square().sum(), squared, rtol=1e-3)
    assert weights[3] == MOST_WEIGHT
    with pytest.raises(InvalidInputError, match="epsilon, velocity; got 'snr'"):
        check_weighting("snr")
