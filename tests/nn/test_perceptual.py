from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from vistok.errors import CheckpointError, InvalidInputError
from vistok.nn.discriminator import PatchDiscriminator
from vistok.nn.perceptual import LPIPS


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS()


def torchvision_names(lpips: LPIPS) -> dict[str, torch.Tensor]:
    trunk = {key: value for key, value in lpips.state_dict().items() if key.startswith("net.")}
    return {re.sub(r"net\.slice\d\.", "features.", key): value for key, value in trunk.items()}


def test_distance_is_zero_for_equal_images_and_symmetric(lpips: LPIPS) -> None:
    x, y = torch.rand(2, 2, 3, 32, 24) * 2 - 1
    assert torch.equal(lpips(x, x), torch.zeros(2, 1, 1, 1))
    assert torch.all(lpips(x, y) > 0)
    torch.testing.assert_close(lpips(x, y), lpips(y, x))


def test_gradients_reach_the_image_but_not_the_frozen_network(lpips: LPIPS) -> None:
    x = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_(True)
    lpips(x, torch.zeros_like(x)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())
    assert not nn.Sequential(lpips).train()[0].training


def test_published_parts_are_joined_into_the_published_formula(lpips: LPIPS, tmp_path: Path) -> None:
    names = torchvision_names(lpips)
    torch.save({**names, "classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    ours = LPIPS.from_files(tmp_path / "vgg16.pth")  # the heads come from torchmetrics
    vgg = make_layers(cfgs["D"])
    vgg.load_state_dict({key.removeprefix("features."): value for key, value in names.items()})
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    shift, scale = torch.tensor([[-0.03, -0.088, -0.188], [0.458, 0.448, 0.45]]).view(2, 1, 3, 1, 1)
    a, b = (x - shift) / scale, (y - shift) / scale
    expected = 0.0
    for index, layer in enumerate(vgg):
        a, b = layer(a), layer(b)
        if index in (3, 8, 15, 22, 29):
            head = ours.lin_parameters()[(3, 8, 15, 22, 29).index(index)]
            difference = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
            expected = expected + (difference * head).sum(1).mean()
    assert all(bool((head >= 0).all()) for head in ours.lin_parameters())
    assert float(ours(x, y)) == pytest.approx(float(expected), rel=1e-4)


def test_a_wrong_file_is_named(lpips: LPIPS, tmp_path: Path) -> None:
    names = torchvision_names(lpips)
    names["features.0.weight"] = torch.zeros(64, 1, 3, 3)
    del names["features.28.bias"]
    torch.save({**names, "lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"net\.slice5\.28\.bias.*net\.slice1\.0\.weight \[64, 1, 3, 3\]"):
        LPIPS.from_files(tmp_path / "bad.pth")
    with pytest.raises(InvalidInputError, match="at least one file"):
        LPIPS.from_files()


def test_unequal_or_tiny_images_are_refused(lpips: LPIPS) -> None:
    with pytest.raises(InvalidInputError, match="one shape"):
        lpips(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 16))
    with pytest.raises(InvalidInputError, match=">= 16"):
        lpips(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_patch_discriminator_judges_patches() -> None:
    discriminator = PatchDiscriminator(3, 8, 3)
    assert discriminator(torch.randn(2, 3, 32, 48)).shape == (2, 1, 2, 4)
    assert {key.split(".")[1] for key in discriminator.state_dict()} == {"0", "2", "3", "5", "6", "8", "9", "11"}
    assert discriminator.main[8].weight.shape == (64, 32, 4, 4)
    assert discriminator.main[8].bias is None
    # One output depends on 70x70 pixels at three strided layers.
    image = torch.zeros(1, 3, 128, 128, requires_grad=True)
    discriminator.eval()(image)[0, 0, 7, 7].backward()
    rows = image.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70
