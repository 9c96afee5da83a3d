"""Training a tokenizer against a discriminator: two losses, two optimisers, one Accelerate loop.

Shape letters: B images, H, W pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vistok.nn.adversarial import AdversarialLoss
from vistok.nn.discriminator import PatchDiscriminator
from vistok.nn.model import VistokModel
from vistok.nn.perceptual import LPIPS
from vistok.tokenizers.kl import KLLoss
from vistok.tokenizers.vq import VQLoss

from .recipe import DiscriminatorRecipe

__all__ = ["AdversarialObjective", "Judge", "make_loss"]


# system -> (objective, published error of the pixels)
LOSSES: dict[str, tuple[type[AdversarialLoss], str]] = {"vq": (VQLoss, "l2"), "kl": (KLLoss, "l1")}


def make_loss(system: str, recipe: DiscriminatorRecipe) -> AdversarialLoss:
    """The objective of a recipe, with a fresh discriminator.

    Args:
        system: what is trained, a key of `LOSSES`.
        recipe: how.

    Raises:
        CheckpointError: the perceptual weights cannot be read.
    """
    perceptual = None
    if recipe.perceptual_weights:
        perceptual = LPIPS.from_files(*recipe.perceptual_weights).eval().requires_grad_(False)
    objective, reconstruction = LOSSES[system]
    return objective(
        perceptual,
        PatchDiscriminator(),
        reconstruction=reconstruction,
        perceptual_weight=recipe.perceptual_weight,
        adversarial_weight=recipe.weight,
        adversarial_start=recipe.start_step,
        adaptive_weight=recipe.adaptive_weight,
    )


class AdversarialObjective(nn.Module):
    """The tokenizer's turn. It reaches the discriminator without holding it: those weights are not its own to train."""

    def __init__(self, model: VistokModel, loss: AdversarialLoss) -> None:
        super().__init__()
        self.model = model
        self._turn = loss.generator_turn

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Scalars, and the reconstruction [B, 3, H, W] as `sample`.

        Args:
            batch: `images` [B, 3, H, W] and `step`, the number of the optimiser step.
        """
        model: Any = self.model
        output = model(batch["images"])
        found = self._turn(batch["images"], output.sample, output.bottleneck_loss, batch["step"], model.last_layer)
        usage = getattr(output, "usage", None)  # of a codebook
        if usage is not None:
            found["usage"] = usage
        return {**found, "sample": output.sample.detach()}


class Judge(nn.Module):
    """The discriminator's turn."""

    def __init__(self, loss: AdversarialLoss) -> None:
        super().__init__()
        assert loss.discriminator is not None
        self.discriminator = loss.discriminator
        self._turn = loss.discriminator_turn

    def forward(self, images: Tensor, sample: Tensor, step: int) -> dict[str, Tensor]:
        """Scalars.

        Args:
            images: originals [B, 3, H, W].
            sample: reconstructions [B, 3, H, W].
            step: number of the optimiser step.
        """
        return self._turn(images, sample, step)
