"""MAR's diffusion head."""

from __future__ import annotations

import pytest
import torch

from vistok.nn import diffusion_head
from vistok.nn.diffusion_head import DiffusionHead, modulated_steps, timestep_features


def head() -> DiffusionHead:
    torch.manual_seed(0)
    made = DiffusionHead(token_size=3, condition_size=8, num_layers=2, width=16)
    made.initialise()
    for parameter in made.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_timesteps_are_told_apart() -> None:
    features = timestep_features(torch.arange(1000))
    assert features.shape == (1000, 256)
    assert (features[0, :128] == 1).all()
    assert (features[0, 128:] == 0).all()
    assert torch.cdist(features, features).fill_diagonal_(9.0).min() > 0.1


def test_a_new_head_predicts_no_noise() -> None:
    fresh = DiffusionHead(3, 8, 2, 16)
    fresh.initialise()
    assert not fresh.net(torch.randn(4, 3), torch.arange(4), torch.randn(4, 8)).any()


def test_what_the_sampler_computes_is_the_network() -> None:
    made = head()
    x, condition = torch.randn(4, 3), torch.randn(8, 8)
    draw = made.sampler("5")
    timesteps = torch.full((8,), draw.steps[2].timestep)
    modulations = list(modulated_steps(made.net.modulations, made.net.cond_embed(condition), draw.times))
    assert len(modulations) == 5
    eps, logits = made.net.guided(x, modulations[2], 1.7)
    output = made.net(torch.cat([x, x]), timesteps, condition)
    with_condition, without = output[:, :3].chunk(2)
    torch.testing.assert_close(eps, without + 1.7 * (with_condition - without))
    torch.testing.assert_close(logits, output[:4, 3:])


@pytest.mark.parametrize("size", [0, 500, 2**26])
def test_modulations_do_not_depend_on_how_many_are_made_at_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion_head, "MODULATION_BYTES", size)
    net, condition = head().net, torch.randn(2, 16)
    draw = head().sampler("7")
    calls: list[int] = []

    def counted(embedded: torch.Tensor) -> list[torch.Tensor]:
        calls.append(len(embedded))
        return net.modulations(embedded)

    made = list(modulated_steps(counted, condition, draw.times))
    assert sum(calls) == len(made) == 7
    assert calls[:2] == {0: [1, 1], 500: [1, 1], 2**26: [1, 6]}[size]
    for ours, time in zip(made, draw.times):
        for layer, expected in zip(ours, net.modulations(condition + time)):
            torch.testing.assert_close(layer, expected)


@torch.no_grad()
def test_rows_do_not_depend_on_each_other() -> None:
    draw, condition = head().sampler("6"), torch.randn(4, 8)
    both = draw(condition, num_images=2, generator=[seed(1), seed(2)])
    alone = draw(condition[2:], num_images=1, generator=[seed(2)])
    torch.testing.assert_close(both[2:], alone)
    guided = draw(condition, num_images=1, guidance_scale=1.0, generator=seed(3))
    plain = draw(condition[:2], num_images=1, generator=seed(3))
    torch.testing.assert_close(guided, plain)
    unconditional = draw(condition, num_images=1, guidance_scale=0.0, temperature=0.0, generator=seed(3))
    assert not torch.isclose(unconditional, plain).all()


def test_the_head_learns_a_distribution() -> None:
    """Two conditions, two values: after a short training the samples stand where the data are."""
    torch.manual_seed(0)
    made = DiffusionHead(1, 2, 2, 48)
    made.initialise()
    optimizer = torch.optim.AdamW(made.parameters(), lr=4e-3)
    conditions = torch.eye(2).repeat(64, 1)
    targets = conditions @ torch.tensor([[1.5], [-1.5]])
    losses = []
    for _ in range(250):
        loss = made.loss(targets, conditions, repeats=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    with torch.no_grad():
        # Not from pure noise, where an error of the network counts 1,000 times: that takes long to learn.
        drawn = made.sampler("8,8,8,0")(conditions, num_images=1, generator=seed(0))
    assert ((drawn - targets).abs() < 0.6).float().mean() > 0.9
