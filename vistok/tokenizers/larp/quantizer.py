"""LARP's quantiser: a code is drawn with a probability that falls off with its angle to the vector.

Letters: B videos, N tokens, C code dimension, K codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import InvalidInputError
from vistok.kernels.nearest_code import nearest_code
from vistok.nn import sampling
from vistok.nn.sampling import Generators

__all__ = ["Quantization", "StochasticQuantizer"]


@dataclass
class Quantization:
    """What the quantiser returns.

    Attributes:
        ids: int64 [B, N]; -1 where the vector was not a number.
        vectors: float32 [B, N, C], what was quantised (of unit length if the codes are).
        quantized: float32 [B, N, C] chosen codes; gradients pass straight through to the vectors.
        codebook_loss: mean squared distance that pulls the codes towards the vectors.
        commitment_loss: the same pulling the vectors towards the codes; neither is weighted.
        loss: their weighted sum.
    """

    ids: Tensor
    vectors: Tensor
    quantized: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    loss: Tensor


class StochasticQuantizer(nn.Module):
    """Replace vectors by codes, in float32: half precision flips indices.

    Args:
        codebook_size: K.
        codebook_dim: C.
        commitment_weight, codebook_weight: weights of the two losses.
        l2_normalize: compare and return unit vectors.
        stochastic: draw codes from softmax(cosine / temperature); else take the nearest. Needs `l2_normalize`.
        temperature: of the draw; None learns its inverse.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        commitment_weight: float,
        codebook_weight: float,
        l2_normalize: bool,
        stochastic: bool,
        temperature: float | None,
    ) -> None:
        super().__init__()
        if stochastic and not l2_normalize:
            raise InvalidInputError("drawing codes by their cosine needs unit vectors: l2_normalize must be True")
        if temperature is not None and not temperature > 0.0:
            raise InvalidInputError(f"the temperature must be above 0, or None to learn it; got {temperature}")
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        self.l2_normalize, self.stochastic, self.temperature = l2_normalize, stochastic, temperature
        self.codebook = nn.Parameter(torch.empty(codebook_size, codebook_dim))
        nn.init.kaiming_uniform_(self.codebook)
        if stochastic and temperature is None:
            self.inverse_temperature = nn.Parameter(torch.tensor(10.0))

    def codes(self) -> Tensor:
        """The table that is compared with and decoded from: float32 [K, C], unit rows if `l2_normalize`."""
        table = self.codebook.float()
        return F.normalize(table, dim=-1) if self.l2_normalize else table

    def lookup(self, ids: Tensor) -> Tensor:
        """float32 codes [..., C] of int64 ids."""
        chosen = F.embedding(ids, self.codebook).float()  # normalising these rows alone equals doing so for the table
        return F.normalize(chosen, dim=-1) if self.l2_normalize else chosen

    def forward(self, z: Tensor, *, stochastic: bool, generator: Generators = None) -> Quantization:
        """Quantise vectors [B, N, C].

        Args:
            z: the vectors.
            stochastic: draw the codes (if the quantiser is a stochastic one) instead of taking the best.
            generator: draws them.
        """
        with torch.autocast(z.device.type, enabled=False):
            vectors = F.normalize(z.float(), dim=-1) if self.l2_normalize else z.float()
            with torch.no_grad():
                if stochastic and self.stochastic:
                    inverse = self.inverse_temperature.float() if self.temperature is None else 1.0 / self.temperature
                    ids = sampling.choose_tokens(F.linear(vectors, self.codes()) * inverse, generator=generator)
                else:
                    # Of unit vectors the nearest has the largest cosine, too.
                    ids = nearest_code(vectors.flatten(0, 1), self.codes()).view(vectors.shape[:2])
            chosen = self.lookup(ids.clamp_min(0))
            codebook_loss = F.mse_loss(chosen, vectors.detach())
            commitment_loss = F.mse_loss(vectors, chosen.detach())
            loss = self.commitment_weight * commitment_loss + self.codebook_weight * codebook_loss
            quantized = vectors + (chosen - vectors).detach()
        return Quantization(ids, vectors, quantized, codebook_loss, commitment_loss, loss)
