"""Frechet distance between two sets of images (Heusel et al. 2017), on torchmetrics, with any feature extractor.

    metric = FrechetDistance("features-shapes", reference="2,000 held-out scenes, seed 7")
    metric.add_reference(scenes)
    metric.add_samples(generated)
    print(metric.compute(sampler="guidance 3.0, top-k 0"))

A Frechet distance means nothing without the network that read the images, the reference set, the sample count, the
resizing and the sampler's settings, so `FrechetResult` carries and prints all of them. Figures of different evaluators
cannot be compared. In particular torchmetrics' Inception does not reproduce the TensorFlow evaluator of the ADM paper
that publications quote.

Shape letters: B images, H rows and W columns of pixels, D feature channels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistok.errors import InvalidInputError, InvalidOutputError, require

__all__ = ["FrechetDistance", "FrechetResult"]

LAB_EXTRACTOR = "features-shapes"


@dataclass(frozen=True)
class FrechetResult:
    """A Frechet distance and everything it depends on.

    Attributes:
        value: the distance, >= 0; 0 for equal means and covariances.
        evaluator: the feature extractor.
        reference: what the reference images are.
        reference_samples: their number.
        samples: number of judged images.
        resize: what was done to the images before the extractor read them.
        sampler: settings that produced the judged images.
    """

    value: float
    evaluator: str
    reference: str
    reference_samples: int
    samples: int
    resize: str
    sampler: str

    def __str__(self) -> str:
        return (
            f"FID {self.value:.3f} (evaluator: {self.evaluator}; reference: {self.reference}, "
            f"n={self.reference_samples}; samples: n={self.samples}; resize: {self.resize}; sampler: {self.sampler})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class _Features(nn.Module):
    """The extractor as torchmetrics wants it: [B, D] in float64, so that covariances keep their digits."""

    def __init__(self, extractor: nn.Module, num_features: int) -> None:
        super().__init__()
        self.extractor = extractor
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        features = self.extractor(images)
        if not isinstance(features, Tensor) or features.ndim != 2:
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InvalidInputError(f"a feature extractor must return [B, D]; {type(self.extractor).__name__}: {got}")
        if not features.isfinite().all():
            raise InvalidOutputError(f"{type(self.extractor).__name__} returned NaN or infinite features")
        return features.double()


class _Inception(nn.Module):
    """Inception v3 with the FID weights (torch-fidelity's port), behind the common interface."""

    num_features = 2048
    resize = "to 299x299, bilinear without antialias (as the original TensorFlow graph)"

    def __init__(self) -> None:
        super().__init__()
        # Its absence makes torchmetrics raise a bare ModuleNotFoundError much later.
        require("torch_fidelity", "eval")
        from torchmetrics.image.fid import NoTrainInceptionV3

        self.network = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
        self.network.use_antialias = False  # newer torchmetrics resizes as nobody else does unless told so

    def forward(self, images: Tensor) -> Tensor:
        return self.network(((images + 1) * 127.5).round().byte())


def _load_extractor(extractor: str | nn.Module) -> tuple[nn.Module, str]:
    if isinstance(extractor, nn.Module):
        return extractor, getattr(extractor, "evaluator", type(extractor).__name__)
    if extractor == "inception":
        try:
            return _Inception(), "Inception v3 pool3, 2048 features (torch-fidelity weights, torchmetrics)"
        except OSError as error:  # URLError is one: the weights are downloaded on first use
            raise InvalidInputError(
                f"the Inception weights could not be downloaded ({error}); connect to the network once, or use the "
                f"shipped extractor {LAB_EXTRACTOR!r}"
            ) from error
    from vistok.hub import load

    model = load(extractor)
    return model, f"{extractor} ({model.evaluator})" if hasattr(model, "evaluator") else extractor


class FrechetDistance:
    """Accumulates features of a reference set and of judged images.

    Args:
        extractor: `"features-shapes"` (shipped, for the lab world), `"inception"` (the usual FID; downloads weights),
            any other name that `vistok.load` knows, or a module that maps images [B, 3, H, W] in [-1, 1] to features
            [B, D]. A module may say what it is in attributes `num_features`, `evaluator` and `resize`.
        reference: what the reference images are, in words; printed with the result.
        device: where features are computed.

    Raises:
        MissingExtraError: without torchmetrics (extra `eval`).
        InvalidInputError: if the extractor is unusable.
    """

    def __init__(
        self,
        extractor: str | nn.Module = LAB_EXTRACTOR,
        *,
        reference: str,
        device: torch.device | str | None = None,
    ) -> None:
        fid = require("torchmetrics.image.fid", "eval")
        network, self.evaluator = _load_extractor(extractor)
        network = network.to(device).eval().requires_grad_(False)
        self.device = next((parameter.device for parameter in network.parameters()), torch.device(device or "cpu"))
        self.reference = reference
        self.resize = getattr(network, "resize", "none")
        num_features = getattr(network, "num_features", None)
        if num_features is None:
            with torch.inference_mode():
                num_features = network(torch.zeros(1, 3, 64, 64, device=self.device)).shape[-1]
        self.num_features = int(num_features)
        self._metric = fid.FrechetInceptionDistance(
            feature=_Features(network, self.num_features), normalize=True, reset_real_features=False
        ).to(self.device)

    def _add(self, images: Tensor, real: bool, batch_size: int) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InvalidInputError(
                f"images must be float [B, 3, H, W] in [-1, 1]; got {images.dtype} {list(images.shape)}"
            )
        if not images.isfinite().all():
            raise InvalidOutputError("cannot compare images with NaN or infinite pixels")
        with torch.inference_mode():
            for batch in images.split(batch_size):
                # Pictures are judged as they would be saved: overshoot cut, 256 levels.
                batch = ((batch.to(self.device).float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
                self._metric.update(batch, real=real)

    def add_reference(self, images: Tensor, batch_size: int = 64) -> None:
        """Add reference images [B, 3, H, W] in [-1, 1]."""
        self._add(images, True, batch_size)

    def add_samples(self, images: Tensor, batch_size: int = 64) -> None:
        """Add judged images [B, 3, H, W] in [-1, 1] (clamped, rounded to 256 levels)."""
        self._add(images, False, batch_size)

    def reset_samples(self) -> None:
        """Forget the judged images and keep the reference, to judge another set."""
        self._metric.reset()

    def compute(self, *, sampler: str = "none") -> FrechetResult:
        """The distance between the two sets so far.

        Args:
            sampler: settings that produced the judged images, printed with the result.

        Raises:
            InvalidInputError: with fewer than two images on either side.
        """
        counts = int(self._metric.real_features_num_samples), int(self._metric.fake_features_num_samples)
        if min(counts) < 2:
            raise InvalidInputError(
                f"a Frechet distance needs at least 2 images a side; got {counts[0]} reference and {counts[1]} judged"
            )
        # Equal sets give +-1e-13 by rounding.
        value = max(0.0, float(self._metric.compute()))
        return FrechetResult(
            value=value,
            evaluator=self.evaluator,
            reference=self.reference,
            reference_samples=counts[0],
            samples=counts[1],
            resize=self.resize,
            sampler=sampler,
        )
