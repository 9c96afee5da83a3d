"""The adversarial objective of tokenizer training: two optimisers take turns (VQGAN, arXiv 2012.09841, section 3.1).

Every tokenizer with a decoder trains on it; what differs is the loss of the bottleneck (codebook, or KL divergence).

Shape letters: B images, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import InvalidInputError

__all__ = ["AdversarialLoss"]

RECONSTRUCTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}


def _swapped(constant: float, logits: Tensor) -> Tensor:
    """Cross-entropy with the constant as the logit and the network's output as the target."""
    return F.binary_cross_entropy_with_logits(torch.full_like(logits, constant), logits)


GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": lambda fake: -fake.mean(),
    "non_saturating": lambda fake: F.softplus(-fake).mean(),
    "non_saturating_swapped": lambda fake: _swapped(1.0, fake),
}
DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": lambda real, fake: 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()),
    "non_saturating": lambda real, fake: 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean()),
    "non_saturating_swapped": lambda real, fake: 0.5 * (_swapped(1.0, real) + _swapped(0.0, fake)),
}


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Record no gradients for the module's parameters (they still flow through it)."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class AdversarialLoss(nn.Module):
    """Reconstruction + perceptual + adversarial losses, and that of the bottleneck.

    One training step:

        output = model(images)
        losses = objective.generator_turn(images, output.sample, output.bottleneck_loss, step, model.last_layer)
        losses["loss"].backward()                 # then step the optimiser of the model
        losses = objective.discriminator_turn(images, output.sample, step)
        losses["loss"].backward()                 # then step the optimiser of objective.discriminator

    Subclasses say in `bottleneck` under which name that loss is logged.

    Args:
        perceptual: module of two image batches to distances, such as `vistok.nn.perceptual.LPIPS`; None for none.
        discriminator: module of images to logits, such as `vistok.nn.discriminator.PatchDiscriminator`; None for none.
        reconstruction: `"l2"` or `"l1"`.
        reconstruction_weight: its weight.
        perceptual_weight: weight of the perceptual distance.
        generator_loss: `"hinge"`, `"non_saturating"`, or `"non_saturating_swapped"`: the authors' variant, which passes
            the arguments of the cross-entropy in swapped order and so is linear in the logits.
        discriminator_loss: the same choices (swapped: fakes have no gradient; only for comparison with the authors').
        adversarial_weight: weight of the adversarial loss, of both networks, once it has started.
        adversarial_start: first step with an adversarial loss.
        adaptive_weight: balance the gradients of the adversarial and the other losses at the decoder's last layer.

    Raises:
        InvalidInputError: for an unknown kind of loss.
    """

    bottleneck: ClassVar[str] = "bottleneck"

    def __init__(
        self,
        perceptual: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        *,
        reconstruction: str = "l2",
        reconstruction_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        generator_loss: str = "hinge",
        discriminator_loss: str = "hinge",
        adversarial_weight: float = 0.5,
        adversarial_start: int = 20000,
        adaptive_weight: bool = False,
    ) -> None:
        super().__init__()
        for name, given, known in (
            ("reconstruction", reconstruction, RECONSTRUCTION_LOSSES),
            ("generator_loss", generator_loss, GENERATOR_LOSSES),
            ("discriminator_loss", discriminator_loss, DISCRIMINATOR_LOSSES),
        ):
            if given not in known:
                raise InvalidInputError(f"{name} must be one of {', '.join(known)}; got {given!r}")
        self.perceptual = perceptual
        self.discriminator = discriminator
        self.reconstruction = RECONSTRUCTION_LOSSES[reconstruction]
        self.reconstruction_weight = reconstruction_weight
        self.perceptual_weight = perceptual_weight
        self.generator_loss = GENERATOR_LOSSES[generator_loss]
        self.discriminator_loss = DISCRIMINATOR_LOSSES[discriminator_loss]
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.adaptive_weight = adaptive_weight

    def generator_turn(
        self,
        images: Tensor,
        reconstruction: Tensor,
        bottleneck_loss: Tensor,
        step: int,
        last_layer: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The tokenizer's loss.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            reconstruction: the same from the model, with its graph.
            bottleneck_loss: scalar, added as it is.
            step: number of the optimiser step, from 0.
            last_layer: weight of the decoder's last layer; needed for `adaptive_weight`.

        Returns:
            `loss` to minimise, and for logging `reconstruction`, `perceptual`, `adversarial`, `adaptive_weight` and
            the bottleneck's as far as they exist.
        """
        images, reconstruction = images.float(), reconstruction.float()
        error = self.reconstruction(images, reconstruction)
        losses = {"reconstruction": error.detach(), self.bottleneck: bottleneck_loss.detach()}
        likeness = self.reconstruction_weight * error
        if self.perceptual is not None:
            distance = self.perceptual(images, reconstruction).mean()
            losses["perceptual"] = distance.detach()
            likeness = likeness + self.perceptual_weight * distance
        loss = likeness + bottleneck_loss
        if self.discriminator is not None:
            started = step >= self.adversarial_start
            # Before the start the network runs without a graph, for its running statistics only.
            with torch.set_grad_enabled(started and torch.is_grad_enabled()), _frozen(self.discriminator):
                adversarial = self.generator_loss(self.discriminator(reconstruction).float())
            losses["adversarial"] = adversarial.detach()
            if started:
                weight: float | Tensor = self.adversarial_weight
                if self.adaptive_weight:
                    losses["adaptive_weight"] = self._balance(likeness, adversarial, last_layer)
                    weight = weight * losses["adaptive_weight"]
                loss = loss + weight * adversarial
        return {"loss": loss, **losses}

    def discriminator_turn(self, images: Tensor, reconstruction: Tensor, step: int) -> dict[str, Tensor]:
        """The discriminator's loss; 0 times its value before `adversarial_start`.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            reconstruction: the same from the model; its graph is cut.
            step: number of the optimiser step, from 0.

        Returns:
            `loss` to minimise, and the mean logits `real` and `fake` for logging.

        Raises:
            InvalidInputError: without a discriminator.
        """
        if self.discriminator is None:
            raise InvalidInputError(
                f"this {type(self).__name__} has no discriminator to train; give one to its constructor"
            )
        real = self.discriminator(images.float()).float()
        fake = self.discriminator(reconstruction.detach().float()).float()
        weight = self.adversarial_weight if step >= self.adversarial_start else 0.0
        loss = weight * self.discriminator_loss(real, fake)
        return {"loss": loss, "real": real.detach().mean(), "fake": fake.detach().mean()}

    @staticmethod
    def _balance(likeness: Tensor, adversarial: Tensor, last_layer: Tensor | None) -> Tensor:
        if last_layer is None:
            raise InvalidInputError("adaptive_weight compares gradients at the decoder's last layer: pass last_layer")
        (wanted,) = torch.autograd.grad(likeness, last_layer, retain_graph=True)
        (given,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
        return (wanted.norm() / (given.norm() + 1e-4)).clamp(0.0, 1e4).detach()
