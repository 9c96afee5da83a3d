from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor, nn

from vistok.data.shapes import sample_scene
from vistok.errors import InvalidInputError, InvalidOutputError, MissingExtraError
from vistok.metrics import FrechetDistance, ShapesFeatures
from vistok.metrics.evaluate import held_out_images


class Means(nn.Module):
    """Mean of each channel: three features that tests can compute by hand."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def flat_images(values: Tensor) -> Tensor:
    """One-coloured pictures [B, 3, 4, 4] of the given colours [B, 3]."""
    return values[:, :, None, None].expand(-1, -1, 4, 4)


def closed_form(first: Tensor, second: Tensor) -> float:
    one, two = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(one)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    distance = (first.mean(0) - second.mean(0)).square().sum() + one.trace() + two.trace() - 2 * mixed
    return distance.item()


def test_distance_is_the_closed_form_of_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(200, 3, generator=generator) - 0.5
    second = 0.5 * torch.rand(150, 3, generator=generator) + 0.2
    levels = [((part + 1) * 127.5).round() / 127.5 - 1 for part in (first, second)]
    metric = FrechetDistance(Means(), reference="test colours")
    metric.add_reference(flat_images(first))
    metric.add_samples(flat_images(second[:70]))
    metric.add_samples(flat_images(second[70:]))
    result = metric.compute(sampler="uniform")
    assert result.value == pytest.approx(closed_form(*[part.double() for part in levels]), abs=1e-6)


def test_result_says_everything_that_it_depends_on() -> None:
    metric = FrechetDistance(ShapesFeatures.tiny(), reference="noise")
    images = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    metric.add_reference(images)
    metric.add_samples(images[:4])
    text = str(metric.compute(sampler="guidance 3.0"))
    for part in ("ShapesFeatures", "16", "noise, n=6", "samples: n=4", "64x64", "antialias", "guidance 3.0"):
        assert part in text
    assert set(metric.compute().to_dict()) == {
        "value",
        "evaluator",
        "reference",
        "reference_samples",
        "samples",
        "resize",
        "sampler",
    }


def test_equal_sets_are_at_distance_zero_and_other_scenes_further_than_like_ones() -> None:
    torch.manual_seed(0)
    like = held_out_images([sample_scene(1, index, 1, colour="red") for index in range(40)], 64)
    more = held_out_images([sample_scene(2, index, 1, colour="red") for index in range(40)], 64)
    other = held_out_images([sample_scene(3, index, 3, colour="blue") for index in range(40)], 64)
    metric = FrechetDistance(ShapesFeatures.tiny(), reference="red scenes")
    metric.add_reference(like)
    metric.add_samples(like)
    assert metric.compute().value == pytest.approx(0.0, abs=1e-6)
    metric.reset_samples()
    metric.add_samples(more)
    near = metric.compute().value
    metric.reset_samples()
    metric.add_samples(other)
    assert metric.compute().value > near > 0


def test_wrong_input_is_refused() -> None:
    metric = FrechetDistance(Means(), reference="nothing")
    with pytest.raises(InvalidInputError, match="at least 2 images"):
        metric.compute()
    with pytest.raises(InvalidInputError, match="float"):
        metric.add_samples(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(InvalidOutputError, match="NaN"):
        metric.add_samples(torch.full((2, 3, 4, 4), math.nan))
    with pytest.raises(InvalidInputError, match="must return"):
        FrechetDistance(nn.Identity(), reference="maps").add_samples(torch.zeros(2, 3, 4, 4))


def test_inception_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingExtraError, match=r"vistok\[eval\]"):
        FrechetDistance("inception", reference="photographs")
