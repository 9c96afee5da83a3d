from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.metrics import psnr, ssim


def pictures(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(3, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(smooth, (40, 48), mode="bicubic").clamp(-1, 1)


def test_psnr_agrees_with_scikit_image() -> None:
    originals = pictures(0)
    noisy = (originals + 0.1 * torch.randn(originals.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    expected = [peak_signal_noise_ratio(one.numpy(), two.numpy(), data_range=2.0) for one, two in zip(originals, noisy)]
    assert psnr(noisy, originals).tolist() == pytest.approx(expected, abs=1e-4)


def test_psnr_has_the_textbook_value_and_is_infinite_for_equal_images() -> None:
    originals = torch.zeros(2, 3, 8, 8)
    others = originals.clone()
    others[1] += 0.2
    assert psnr(others, originals).tolist() == [math.inf, pytest.approx(20.0, abs=1e-4)]


def test_overshoot_is_judged_as_it_would_be_saved() -> None:
    originals = torch.ones(1, 3, 16, 16)
    assert psnr(originals + 3.0, originals).item() == math.inf
    assert ssim(originals + 3.0, originals).item() == pytest.approx(1.0)


def test_ssim_agrees_with_scikit_image() -> None:
    originals = pictures(2)
    blurred = torch.nn.functional.avg_pool2d(originals, 3, stride=1, padding=1, count_include_pad=False)
    expected = [
        structural_similarity(
            one.numpy() / 2 + 0.5,
            two.numpy() / 2 + 0.5,
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for one, two in zip(originals, blurred)
    ]
    # Borders are treated differently (torchmetrics leaves them out), hence the width.
    assert np.allclose(ssim(blurred, originals).numpy(), expected, atol=0.03)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="one shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(InvalidInputError, match="at least 11x11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(InvalidOutputError, match="NaN"):
        psnr(torch.full((1, 3, 8, 8), math.nan), torch.zeros(1, 3, 8, 8))
