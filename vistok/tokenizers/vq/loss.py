"""The adversarial objective of VQ training (VQGAN, arXiv 2012.09841, section 3.1); see `vistok.nn.adversarial`."""

from __future__ import annotations

from vistok.nn.adversarial import AdversarialLoss

__all__ = ["VQLoss"]


class VQLoss(AdversarialLoss):
    """Reconstruction + perceptual + adversarial + codebook losses (arguments: `AdversarialLoss`).

    One training step:

        output = model(images)
        losses = objective.generator_turn(images, output.sample, output.quantization.loss, step, model.last_layer)
        losses["loss"].backward()                 # then step the optimiser of the model
        losses = objective.discriminator_turn(images, output.sample, step)
        losses["loss"].backward()                 # then step the optimiser of objective.discriminator
    """

    bottleneck = "codebook"
