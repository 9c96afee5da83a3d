from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vistok.errors import InvalidInputError
from vistok.tokenizers.vq import CodebookReport, VectorQuantizer


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_ids_are_the_nearest_codes(l2_normalize: bool) -> None:
    quantizer = VectorQuantizer(50, 4, l2_normalize=l2_normalize, usage_window=0).eval()
    torch.nn.init.normal_(quantizer.codebook)
    z = torch.randn(2, 4, 3, 5)
    output = quantizer(z)
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 4)
    codes = quantizer.codebook
    if l2_normalize:
        vectors, codes = F.normalize(vectors, dim=-1), F.normalize(codes, dim=-1)
    expected = torch.cdist(vectors, codes).argmin(-1)
    assert torch.equal(output.ids.flatten(), expected)
    chosen = codes[expected].view(2, 3, 5, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(output.quantized, chosen)
    assert output.codebook_loss is None
    with pytest.raises(InvalidInputError, match="training mode"):
        _ = output.loss


def test_gradients_pass_straight_through_the_normalisation() -> None:
    quantizer = VectorQuantizer(16, 4, usage_window=0)
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    weights = torch.randn(1, 4, 2, 2)
    (given,) = torch.autograd.grad((quantizer(z).quantized * weights).sum(), z)
    (wanted,) = torch.autograd.grad((F.normalize(z, dim=1) * weights).sum(), z)
    torch.testing.assert_close(given, wanted)


def test_half_precision_input_gives_the_ids_of_float32() -> None:
    quantizer = VectorQuantizer(512, 8, usage_window=0).eval()
    z = torch.randn(1, 8, 16, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = quantizer(z)
    assert torch.equal(output.ids, quantizer(z.float()).ids)
    assert output.quantized.dtype == torch.float32


def test_usage_counts_the_most_recent_tokens_only() -> None:
    quantizer = VectorQuantizer(8, 4, usage_window=6)
    codes = quantizer.codes().detach()

    def feed(*ids: int) -> float:
        return float(quantizer(codes[list(ids)].t().view(1, 4, 1, -1)).usage)

    assert feed(0, 1, 2) == 3 / 8
    assert feed(3, 3) == 4 / 8
    assert feed(4, 4, 4, 4) == 2 / 8
    assert quantizer.usage_queue.tolist() == [3, 3, 4, 4, 4, 4]
    assert feed(0, 1, 2, 3, 4, 5, 6, 7) == 6 / 8  # more tokens than the window holds


def test_usage_is_not_recorded_in_evaluation() -> None:
    quantizer = VectorQuantizer(8, 4, usage_window=6).eval()
    assert quantizer(torch.randn(1, 4, 2, 2)).usage is None
    assert quantizer.usage_queue.tolist() == [-1] * 6


def test_dead_codes_come_back_from_encoder_outputs_once_the_queue_is_renewed() -> None:
    quantizer = VectorQuantizer(32, 4, usage_window=64, revive_dead_codes=True)
    with torch.no_grad():  # all codes but two lie far from the data
        quantizer.codebook[2:] = -F.normalize(torch.rand(30, 4) + 0.1, dim=-1)
        quantizer.codebook[:2] = F.normalize(torch.rand(2, 4), dim=-1)
    before = quantizer.codebook.detach().clone()
    z = torch.rand(1, 4, 8, 8) + 0.01
    usage = float(quantizer(z).usage)
    assert usage <= 2 / 32
    assert torch.equal(quantizer.codebook, before)
    output = quantizer(z, generator=torch.Generator().manual_seed(0))
    assert float(output.usage) > 0.9
    moved = (quantizer.codebook != before).any(1)
    assert int(moved.sum()) >= 30
    vectors = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, 4), dim=-1)
    assert float(torch.cdist(quantizer.codebook[moved].detach(), vectors).amin(1).max()) < 1e-3
    assert int(quantizer.tokens_since_revival) == 64
    output.loss.backward()  # revival in place does not disturb the graph


def test_revival_repeats_with_the_generator() -> None:
    def run() -> torch.Tensor:
        torch.manual_seed(1)
        quantizer = VectorQuantizer(32, 4, usage_window=16, revive_dead_codes=True)
        z = torch.randn(1, 4, 4, 4)
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            quantizer(z, generator=generator)
        return quantizer.codebook.detach()

    assert torch.equal(run(), run())


def test_revival_needs_a_usage_window() -> None:
    with pytest.raises(InvalidInputError, match="usage_window"):
        VectorQuantizer(8, 4, usage_window=0, revive_dead_codes=True)


def test_entropy_loss_prefers_certain_and_even_assignments() -> None:
    quantizer = VectorQuantizer(4, 4, entropy_weight=1.0, usage_window=0)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.eye(4))
    even = quantizer(torch.eye(4).t().view(1, 4, 1, 4)).entropy_loss.detach()
    collapsed = quantizer(torch.eye(4)[[0, 0, 0, 0]].t().view(1, 4, 1, 4)).entropy_loss.detach()
    assert float(even) == pytest.approx(-math.log(4), abs=1e-3)
    assert float(collapsed) == pytest.approx(0.0, abs=1e-3)


def test_nan_features_end_in_a_nan_loss_not_in_an_index_error() -> None:
    quantizer = VectorQuantizer(8, 4)
    assert torch.isnan(quantizer(torch.full((1, 4, 2, 2), float("nan"))).loss)


def test_report_figures() -> None:
    report = CodebookReport(torch.tensor([4, 4, 0, 0]), 8)
    assert report.usage == 0.5
    assert report.dead_codes.tolist() == [2, 3]
    assert report.entropy == pytest.approx(1.0)
    assert report.perplexity == pytest.approx(2.0)
    assert "usage 50.0% (2 dead), perplexity 2.0" in str(report)
