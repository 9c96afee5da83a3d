"""What a sampler of FlexTok's tokens keeps while it writes, branches and searches.

Letters: B images, R rows (samples of an image, side by side), M branches, n tokens so far, D channels, V codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.kernels import filter_logits
from vistok.nn import sampling
from vistok.nn.cache import KVCache
from vistok.nn.sampling import Generators, TokenChecks
from vistok.nn.text import TextCondition
from vistok.tokens import VisualTokens

from .network import Caption

if TYPE_CHECKING:
    from .model import FlexTokAR

__all__ = ["Branches", "SearchResult", "Writer"]


@dataclass(frozen=True)
class Branches:
    """Continuations of common beginnings.

    Attributes:
        tokens: ids [B * M, n], the M branches of an image side by side.
        log_probs: float32 [B * M], of the written tokens under the guided and filtered distribution (at temperature 0:
            under that of temperature 1).
    """

    tokens: VisualTokens
    log_probs: Tensor


@dataclass(frozen=True)
class SearchResult:
    """Result of `FlexTokAR.search`.

    Attributes:
        tokens: ids [B, n], the best candidate of each image.
        scores: float [B].
        history: for each stop, the surviving prefixes [B * beams, length] and their scores, best first.
    """

    tokens: VisualTokens
    scores: Tensor
    history: list[tuple[VisualTokens, Tensor]]


class Writer:
    """What a sampler keeps while it writes: tokens, cache, captions, the last hidden state.

    The conditional rows come first, image by image; with guidance, as many unconditional rows follow.

    Args:
        model: the generator.
        condition: checked condition of B images.
        ids: int64 [B, n], the prefix.
        total: tokens an image will have.
        guidance_scale: up to 1 is no guidance.
        null: one empty caption; None takes the model's.
        class_zero: see `FlexTokAR.sample`.

    Attributes:
        rows: samples of an image, side by side.
        log_probs: float32 [B * rows], of the tokens written with `extend` or with their choice given.
    """

    def __init__(
        self,
        model: FlexTokAR,
        condition: Tensor | TextCondition,
        ids: Tensor,
        total: int,
        guidance_scale: float,
        null: TextCondition | None,
        class_zero: bool,
    ) -> None:
        self.model, self.ids, self.total, self.rows = model, ids, total, 1
        self.images, self.scale, self.guided = len(condition), guidance_scale, guidance_scale > 1.0
        self.checks = TokenChecks(ids.device)
        bias = model.head.bias
        self.head = (model.head.weight.float(), None if bias is None else bias.float())
        self._logits: Tensor | None = None
        self.log_probs = torch.zeros(self.images, device=ids.device)
        self.captions: list[Caption] | None = None
        if isinstance(condition, TextCondition):
            self.captions = self._read(condition, null)
            self.first = model.start.new_zeros(len(condition) * (1 + self.guided), model.start.shape[2])
        else:
            self.first = model.class_embedding(condition)
            if self.guided:
                self.first = torch.cat([self.first, torch.zeros_like(self.first)])
        self.class_zero = class_zero and self.guided
        if ids.shape[1] < total:
            self._prefill()

    def _read(self, text: TextCondition, null: TextCondition | None) -> list[Caption]:
        """Keys and values of the captions, and with guidance of as many empty ones."""
        features, mask = text.features.to(self.model.null_text.dtype), text.mask
        if self.guided:
            empty = self.model.null_text[None] if null is None else null.features.to(features.dtype)
            empty_mask = torch.ones(empty.shape[:2], dtype=torch.bool, device=empty.device)
            if null is not None and null.mask is not None:
                empty_mask = null.mask
            if mask is None:
                mask = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
            length = max(features.shape[1], empty.shape[1])

            def padded(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
                missing = length - values.shape[1]
                return functional.pad(values, (0, 0, 0, missing)), functional.pad(valid, (0, missing))

            features, mask = padded(features, mask)
            empty, empty_mask = padded(empty, empty_mask)
            features, mask = torch.cat([features, empty]), torch.cat([mask, empty_mask])
        if mask is not None and bool(mask.all()):
            mask = None
        captions = self.model.captions(self.model.embed_text(features), mask)
        if not self.guided:
            return captions
        # The empty caption was read once; its rows are copies.
        rows = torch.arange(self.images + 1, device=features.device)
        rows = torch.cat([rows[:-1], rows[-1:].expand(self.images)])
        return [caption.select(rows) for caption in captions]

    def _prefill(self) -> None:
        """Run start token and prefix."""
        model = self.model
        ids = torch.cat([self.ids, self.ids]) if self.guided else self.ids
        x = model.embed(ids, self.first)
        # The last token is never fed, so there are as many slots as tokens.
        self.cache = KVCache(
            len(model.layers), len(x), model.num_heads, self.total, model.head_dim, dtype=x.dtype, device=x.device
        )
        self.hidden, self._logits = model.run_blocks(x, self.captions, self.cache)[:, -1], None

    def logits(self) -> Tensor:
        """Guided float32 [B * rows, V] of the next token."""
        if self._logits is None:
            hidden = self.hidden.float()
            if self.guided:
                cond, uncond = hidden.chunk(2)
                hidden = torch.lerp(uncond, cond, self.scale)
            self._logits = functional.linear(hidden, *self.head)
        return self._logits

    def choose(self, **choice: Any) -> Tensor:
        """The next token of each row, int64 [B * rows]."""
        logits = self.logits().unflatten(0, (self.images, self.rows))
        return sampling.choose_tokens(logits, **choice).flatten()

    def choose_distinct(
        self, count: int, *, temperature: float, top_k: int, top_p: float, generator: Generators
    ) -> Tensor:
        """The next token of each row, where the `count` rows of an image (equal so far) get different ones."""
        logits = self.logits().unflatten(0, (self.images, self.rows))[:, 0]
        probabilities = _filtered(logits, temperature, top_k, top_p).softmax(-1)
        possible = int((probabilities > 0).sum(1).min())
        if possible < count and not bool(probabilities.isnan().any()):
            raise InvalidInputError(
                f"only {possible} tokens are left to choose from by top_k and top_p, and {count} distinct branches are "
                "asked for; loosen them, or give distinct=False"
            )
        race = probabilities
        if temperature > 0:  # the first ones of an exponential race are draws without replacement
            race = race / sampling.exponential_noise(tuple(race.shape), generator, race.device)
        chosen = race.topk(count, dim=1).indices
        return torch.where(race.isnan().any(1, keepdim=True), -1, chosen).flatten()

    def write(self, chosen: Tensor, *, last: bool, choice: Mapping[str, Any] | None = None) -> None:
        """Append tokens int64 [B * rows], and run them unless they are the last.

        Args:
            chosen: -1 where the logits were no numbers.
            last: nothing will follow.
            choice: how they were chosen, to add up their log-probabilities; None does not.
        """
        chosen = self.checks(chosen, last=last)
        if choice is not None:
            filtered = _filtered(self.logits(), choice["temperature"], choice["top_k"], choice["top_p"])
            picked = filtered.gather(1, chosen[:, None])[:, 0]
            self.log_probs = self.log_probs + picked - filtered.logsumexp(1)
        self.ids = torch.cat([self.ids, chosen[:, None]], dim=1)
        if last:
            return
        if self.class_zero:
            self._become_class_zero()
            return
        model = self.model
        x = model.embed(chosen[:, None], None)
        if self.guided:
            x = torch.cat([x, x])
        if model.position_table is not None:
            x = x + model.position_table[self.cache.length].to(x.dtype)
        self.hidden, self._logits = model.run_blocks(x, self.captions, self.cache)[:, -1], None

    def _become_class_zero(self) -> None:
        """Read everything again, with class 0 in the unconditional rows."""
        self.class_zero = False
        cond = self.first.chunk(2)[0]
        zero = self.model.class_embedding.weight[0].to(cond.dtype).expand_as(cond)
        self.first = torch.cat([cond, zero])
        self._prefill()

    def extend(self, length: int, choice: Mapping[str, Any], log_probs: bool = False) -> None:
        """Write until each row has `length` tokens; `log_probs` adds up their log-probabilities."""
        while self.ids.shape[1] < length:
            last = self.ids.shape[1] + 1 == self.total
            self.write(self.choose(**choice), last=last, choice=choice if log_probs else None)

    def fork(self, copies: int) -> None:
        """Each row `copies` times, side by side."""
        rows = torch.arange(self.images * self.rows, device=self.ids.device).repeat_interleave(copies)
        self.select(rows, self.rows * copies)

    def select(self, rows: Tensor, per_image: int) -> None:
        """Go on with the rows at `rows`, int64 [B * per_image], of the same images."""
        held = self.images * self.rows
        self.ids, self.log_probs = self.ids.index_select(0, rows), self.log_probs.index_select(0, rows)
        self.rows = per_image
        everything = torch.cat([rows, rows + held]) if self.guided else rows
        self.first = self.first.index_select(0, everything)
        if self.ids.shape[1] == self.total:
            return
        self.cache.select_rows(everything)
        self.hidden, self._logits = self.hidden.index_select(0, everything), None
        if self.captions is not None:
            self.captions = [caption.select(everything) for caption in self.captions]


def _filtered(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits after temperature (0 counts as 1), top-k and top-p; -inf for what is left out."""
    return filter_logits(logits / (temperature or 1.0), top_k, top_p)
