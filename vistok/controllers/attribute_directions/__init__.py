"""Attribute directions: continuous, subject-specific attribute control (Baumann et al., CVPR 2025, arXiv 2403.17064).

A delta is one vector an encoder; added to the states of the subject's tokens it turns one attribute of that subject up
or down, continuously, without touching the diffusion model. In order of reading: `deltas` (vectors, their files, and
the optimisation-free way to find one), `controller` (steering a pipeline), `learning` (distilling a direction from the
denoiser).

Differences from the authors' code: several prompts of a batch with different scales; capitals, accents and repeated
subjects; uncovered encoders keep their states; one pipeline call with a delayed start under any sampler; SD3 and FLUX.
"""

from __future__ import annotations

from vistok.controllers.attribute_directions.controller import AttributeDirections, AttributeEdit
from vistok.controllers.attribute_directions.deltas import (
    AttributeDelta,
    ContrastivePrompts,
    PromptPair,
    add_direction,
    contrast_delta,
    expand_combinations,
)
from vistok.controllers.attribute_directions.learning import (
    DirectionLearner,
    Draws,
    LearningSettings,
    MicroStep,
    TrajectoryBank,
)

__all__ = [
    "AttributeDelta",
    "AttributeDirections",
    "AttributeEdit",
    "ContrastivePrompts",
    "DirectionLearner",
    "Draws",
    "LearningSettings",
    "MicroStep",
    "PromptPair",
    "TrajectoryBank",
    "add_direction",
    "contrast_delta",
    "expand_combinations",
]
