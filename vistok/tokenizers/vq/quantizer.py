"""The vector quantiser, and the report on how its codebook is used.

Shape letters: B images, h, w token grid, N = h * w, C code dimension, K codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import InvalidInputError
from vistok.kernels.nearest_code import nearest_code

__all__ = ["CodebookReport", "QuantizerOutput", "VectorQuantizer"]

EMPTY = -1  # a slot of the usage queue that no token has reached yet
ENTROPY_TEMPERATURE = 0.01
ENTROPY_EPS = 1e-5


@dataclass
class QuantizerOutput:
    """What the quantiser returns. The losses and the usage are None outside training.

    Attributes:
        quantized: [B, C, h, w] chosen codes; gradients pass straight through to the input.
        ids: int64 [B, N] in raster order.
        codebook_loss: mean squared distance that pulls the codes towards the encoder.
        commitment_loss: the same pulling the encoder towards the codes, times `commitment_weight`.
        entropy_loss: sample entropy minus entropy of the average assignment, times `entropy_weight`.
        usage: part of the codebook among the most recent `usage_window` tokens, in [0, 1].
    """

    quantized: Tensor
    ids: Tensor
    codebook_loss: Tensor | None = None
    commitment_loss: Tensor | None = None
    entropy_loss: Tensor | None = None
    usage: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Sum of the three losses."""
        if self.codebook_loss is None or self.commitment_loss is None or self.entropy_loss is None:
            raise InvalidInputError("the quantiser computes losses in training mode only; call model.train() first")
        return self.codebook_loss + self.commitment_loss + self.entropy_loss


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class VectorQuantizer(nn.Module):
    """Replace every vector by the nearest of K codes. At least in float32: half precision flips indices.

    Args:
        codebook_size: K.
        codebook_dim: C.
        commitment_weight: weight of the commitment loss.
        entropy_weight: weight of the entropy loss; 0 leaves it out.
        l2_normalize: compare unit vectors, and return unit vectors.
        usage_window: length of the queue of recent ids that usage is computed from; 0 for none.
        revive_dead_codes: in training, replace the codes that are absent from the queue each time that the queue has
            been renewed. A revived code becomes one of the current batch's encoder outputs, drawn with a probability
            in proportion to its squared quantisation error. Keeps small codebooks in use.
    """

    def __init__(
        self,
        codebook_size: int,
        codebook_dim: int,
        *,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        l2_normalize: bool = True,
        usage_window: int = 65536,
        revive_dead_codes: bool = False,
    ) -> None:
        super().__init__()
        if revive_dead_codes and not usage_window:
            raise InvalidInputError("revive_dead_codes needs a usage_window > 0 to know which codes are dead")
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.l2_normalize = l2_normalize
        self.revive_dead_codes = revive_dead_codes
        codebook = torch.empty(codebook_size, codebook_dim).uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
        self.codebook = nn.Parameter(F.normalize(codebook, dim=-1) if l2_normalize else codebook)
        self.usage_queue: Tensor | None
        # Integers, so that casting the model to bf16 leaves them exact.
        self.register_buffer(
            "usage_queue", torch.full((usage_window,), EMPTY, dtype=torch.int32) if usage_window else None
        )
        if revive_dead_codes:
            self.register_buffer("tokens_since_revival", torch.zeros((), dtype=torch.int64))

    @property
    def codebook_size(self) -> int:
        """Number of codes, K."""
        return self.codebook.shape[0]

    def codes(self) -> Tensor:
        """The table that is compared with and decoded from: [K, C], unit rows if `l2_normalize`."""
        table = _at_least_float32(self.codebook)
        return F.normalize(table, dim=-1) if self.l2_normalize else table

    def forward(self, z: Tensor, *, generator: torch.Generator | None = None) -> QuantizerOutput:
        """Quantise a feature map.

        Args:
            z: [B, C, h, w].
            generator: source of the draws of `revive_dead_codes`.
        """
        with torch.autocast(z.device.type, enabled=False):
            return self._quantize(_at_least_float32(z), generator)

    def _quantize(self, z: Tensor, generator: torch.Generator | None) -> QuantizerOutput:
        batch, dim, rows, cols = z.shape
        vectors = z.permute(0, 2, 3, 1).reshape(-1, dim)
        if self.l2_normalize:
            vectors = F.normalize(vectors, dim=-1)
        if self.training and self.revive_dead_codes:
            self._revive(vectors.detach(), generator)
        with torch.no_grad():
            # Features that are not finite have no nearest code (-1); code 0 keeps the loss NaN instead of failing here.
            ids = nearest_code(vectors, self.codes()).clamp_min(0)
        chosen = F.embedding(ids, _at_least_float32(self.codebook))
        if self.l2_normalize:  # normalising the chosen rows alone has the same value and gradient as the whole table
            chosen = F.normalize(chosen, dim=-1)
        quantized = vectors + (chosen - vectors).detach()
        output = QuantizerOutput(
            quantized.unflatten(0, (batch, rows, cols)).permute(0, 3, 1, 2), ids.view(batch, rows * cols)
        )
        if self.training:
            output.codebook_loss = F.mse_loss(chosen, vectors.detach())
            output.commitment_loss = self.commitment_weight * F.mse_loss(vectors, chosen.detach())
            output.entropy_loss = self._entropy_loss(vectors) if self.entropy_weight else vectors.new_zeros(())
            output.usage = self._record(ids)
        return output

    def _entropy_loss(self, vectors: Tensor) -> Tensor:
        """Sample entropy minus entropy of the average, of softmax(-distance / 0.01) over the codes."""
        codes = self.codes()
        distance = vectors.square().sum(1, keepdim=True) + codes.square().sum(1) - 2.0 * vectors @ codes.t()
        logits = distance / -ENTROPY_TEMPERATURE
        probabilities = logits.softmax(-1)
        sample = -(probabilities * (logits + ENTROPY_EPS).log_softmax(-1)).sum(-1).mean()
        average = probabilities.mean(0)
        return self.entropy_weight * (sample + (average * (average + ENTROPY_EPS).log()).sum())

    @torch.no_grad()
    def _record(self, ids: Tensor) -> Tensor | None:
        """Append ids to the queue, dropping the oldest, and return the usage."""
        queue = self.usage_queue
        if queue is None:
            return None
        new = ids[-queue.numel() :].to(queue.dtype)
        kept = queue[new.numel() :].clone()
        queue[: kept.numel()] = kept
        queue[kept.numel() :] = new
        if self.revive_dead_codes:
            self.tokens_since_revival += ids.numel()
        return self._used().float().mean()

    def _used(self) -> Tensor:
        """bool [K]: the codes in the queue."""
        assert self.usage_queue is not None
        seen = torch.zeros(self.codebook_size + 1, dtype=torch.bool, device=self.usage_queue.device)
        seen[self.usage_queue.long() - EMPTY] = True  # slot 0 takes the empty entries: no filtering, no device sync
        return seen[1:]

    @torch.no_grad()
    def _revive(self, vectors: Tensor, generator: torch.Generator | None) -> None:
        assert self.usage_queue is not None
        if int(self.tokens_since_revival) < self.usage_queue.numel():
            return
        self.tokens_since_revival.zero_()
        dead = (~self._used()).nonzero().flatten()
        if dead.numel():
            codes = self.codes()
            error = (vectors - codes[nearest_code(vectors, codes).clamp_min(0)]).square().sum(1) + 1e-12
            count = min(dead.numel(), vectors.shape[0])
            source = generator.device if generator is not None else error.device
            drawn = torch.multinomial(error.to(source), count, generator=generator).to(error.device)
            self.codebook[dead[:count]] = vectors[drawn].to(self.codebook.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(self.codebook, 0)  # the draws differ between processes; the codebook must not


@dataclass(frozen=True)
class CodebookReport:
    """How a codebook is used by a set of tokens.

    Attributes:
        counts: int64 [K] occurrences of each code.
        num_tokens: tokens counted.
    """

    counts: Tensor
    num_tokens: int

    @property
    def codebook_size(self) -> int:
        """Number of codes, K."""
        return self.counts.numel()

    @property
    def dead_codes(self) -> Tensor:
        """int64 indices of the codes that never occur."""
        return (self.counts == 0).nonzero().flatten()

    @property
    def usage(self) -> float:
        """Part of the codes that occur, in [0, 1]."""
        return float((self.counts > 0).float().mean())

    @property
    def entropy(self) -> float:
        """Entropy of the code distribution in bits; at most log2(K)."""
        p = self.counts.double() / max(self.num_tokens, 1)
        return float(-torch.special.xlogy(p, p).sum() / math.log(2.0))

    @property
    def perplexity(self) -> float:
        """2^entropy: the size of an evenly used codebook with the same entropy."""
        return 2.0**self.entropy

    def __str__(self) -> str:
        return (
            f"codebook {self.codebook_size}: usage {self.usage:.1%} ({self.dead_codes.numel()} dead), "
            f"perplexity {self.perplexity:.1f}, "
            f"entropy {self.entropy:.2f} of {math.log2(self.codebook_size):.2f} bits, {self.num_tokens} tokens"
        )
