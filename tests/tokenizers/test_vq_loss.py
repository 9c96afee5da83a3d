from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import InvalidInputError
from vistok.nn.discriminator import PatchDiscriminator
from vistok.tokenizers.vq import VQLoss, VQModel


class Half(nn.Module):
    """A distance that is easy to predict."""

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return 0.5 * (images - others).abs().mean(dim=(1, 2, 3), keepdim=True)


class Mean(nn.Module):
    """A discriminator with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.gain * images.mean(dim=(1, 2, 3))


REAL, FAKE = torch.full((2, 3, 4, 4), 0.25), torch.full((2, 3, 4, 4), -0.75)
CODEBOOK = torch.tensor(0.125)


def test_generator_turn_adds_the_weighted_parts() -> None:
    objective = VQLoss(Half(), Mean(), reconstruction_weight=2.0, perceptual_weight=3.0, adversarial_start=10)
    before = objective.generator_turn(REAL, FAKE, CODEBOOK, 9)
    likeness = 2.0 * 1.0 + 3.0 * 0.5
    assert float(before["loss"]) == pytest.approx(likeness + 0.125)
    after = objective.generator_turn(REAL, FAKE, CODEBOOK, 10)
    assert float(after["loss"]) == pytest.approx(likeness + 0.125 + 0.5 * 1.5)
    assert float(after["adversarial"]) == pytest.approx(1.5)
    bare = VQLoss(reconstruction="l1").generator_turn(REAL, FAKE, CODEBOOK, 10**6)
    assert float(bare["loss"]) == pytest.approx(1.125)
    assert set(bare) == {"loss", "reconstruction", "codebook"}


def test_turns_train_one_network_each() -> None:
    objective = VQLoss(None, Mean(), adversarial_start=0)
    fake = FAKE.clone().requires_grad_(True)
    objective.generator_turn(REAL, fake, CODEBOOK, 0)["loss"].backward()
    assert objective.discriminator.gain.grad is None
    assert objective.discriminator.gain.requires_grad
    assert fake.grad.abs().sum() > 0
    fake.grad = None
    objective.discriminator_turn(REAL, fake, 0)["loss"].backward()
    assert fake.grad is None
    assert objective.discriminator.gain.grad is not None


@pytest.mark.parametrize(
    ("kind", "generator", "discriminator"),
    [
        ("hinge", 1.5, 0.5 * (0.5 + 0.0)),
        ("non_saturating", math.log1p(math.exp(1.5)), 0.5 * (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1.5)))),
        (
            "non_saturating_swapped",
            1 + 1.5 + math.log1p(math.exp(-1)),
            0.5 * (1 - 0.5 + math.log1p(math.exp(-1)) + math.log(2)),
        ),
    ],
)
def test_kinds_of_adversarial_loss(kind: str, generator: float, discriminator: float) -> None:
    objective = VQLoss(
        None, Mean(), generator_loss=kind, discriminator_loss=kind, adversarial_weight=1.0, adversarial_start=5
    )
    losses = objective.generator_turn(REAL, FAKE, CODEBOOK, 5)
    assert float(losses["adversarial"]) == pytest.approx(generator, rel=1e-5)
    losses = objective.discriminator_turn(REAL, FAKE, 5)
    assert float(losses["loss"].detach()) == pytest.approx(discriminator, rel=1e-5)
    assert float(losses["real"]) == pytest.approx(0.5)
    assert float(losses["fake"]) == pytest.approx(-1.5)
    assert float(objective.discriminator_turn(REAL, FAKE, 4)["loss"].detach()) == 0.0


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    objective = VQLoss(None, Mean(), adversarial_start=0, adaptive_weight=True)
    last = torch.full((3, 3, 1, 1), 0.1, requires_grad=True)
    x = F.conv2d(FAKE, last)
    losses = objective.generator_turn(REAL, x, CODEBOOK, 0, last)
    (wanted,) = torch.autograd.grad(F.mse_loss(REAL, x), last, retain_graph=True)
    (given,) = torch.autograd.grad(-2.0 * x.mean(), last, retain_graph=True)
    ratio = float(wanted.norm() / (given.norm() + 1e-4))
    assert float(losses["adaptive_weight"]) == pytest.approx(ratio, rel=1e-4)
    losses["loss"].backward()
    torch.testing.assert_close(last.grad, wanted + 0.5 * ratio * given)
    with pytest.raises(InvalidInputError, match="last_layer"):
        objective.generator_turn(REAL, x, CODEBOOK, 0)


def test_both_optimisers_take_turns_on_a_model() -> None:
    torch.manual_seed(0)
    model = VQModel.tiny().train()
    objective = VQLoss(Half(), PatchDiscriminator(3, 8, 2), adversarial_start=1, adaptive_weight=True)
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (model, objective.discriminator)]
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    start = objective.discriminator.main[0].weight.clone()
    for step in range(3):
        output = model(x)
        turns = (
            objective.generator_turn(x, output.sample, output.quantization.loss, step, model.last_layer),
            objective.discriminator_turn(x, output.sample, step),
        )
        for optimizer, losses in zip(optimizers, turns):
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
        assert all(bool(torch.isfinite(value)) for losses in turns for value in losses.values())
    assert not torch.equal(objective.discriminator.main[0].weight, start)


def test_wrong_use_is_named() -> None:
    with pytest.raises(InvalidInputError, match="hinge, non_saturating"):
        VQLoss(generator_loss="wasserstein")
    with pytest.raises(InvalidInputError, match="no discriminator"):
        VQLoss().discriminator_turn(REAL, FAKE, 0)
