"""Attention rows of decoder layers for scorers, without attention matrices.

Shape letters: B batch, S tokens now, T rows, G key heads, n cached columns, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.kernels.attention_rows import attention_received
from vistok.pruners.engine.flow import Flow
from vistok.pruners.hosts import Host
from vistok.pruners.stages import Context

__all__ = ["AttentionRows"]


class AttentionRows:
    """What the tokens of a prompt receive from some of its rows, by a decoder layer's own weights."""

    host: Host
    flow: Flow | None

    def text_rows(self, context: Context) -> tuple[Tensor, Tensor]:
        """Rows int64 [B, T] after each sample's last visual token, and weights [B, T] that make their mean.

        A prompt that ends with its image is asked by its last token.
        """
        batch, size = context.valid.shape
        last = torch.zeros(batch, dtype=torch.int64, device=context.valid.device)
        for span in context.spans:
            if len(span):
                last[span.sample] = torch.maximum(last[span.sample], span.index[-1])
        start = int(last.min()) + 1 if size else 0
        rows = torch.arange(min(start, size - 1), size, device=context.valid.device).expand(batch, -1)
        chosen = (rows > last[:, None]) & context.valid.gather(1, rows)
        final, _ = self.last_row(context)
        chosen = chosen | (~chosen.any(dim=1, keepdim=True) & (rows == final))
        weights = chosen.float()
        return rows.contiguous(), weights / weights.sum(dim=1, keepdim=True)

    def last_row(self, context: Context) -> tuple[Tensor, Tensor]:
        """Row int64 [B, 1] of each sample's last token, with weight 1."""
        numbers = torch.arange(context.valid.shape[1], device=context.valid.device)
        rows = (numbers * context.valid).amax(dim=1, keepdim=True)
        return rows, torch.ones_like(rows, dtype=torch.float32)

    def received(self, context: Context, rows: Tensor, weights: Tensor, *, by: str = "next") -> Tensor:
        """Mean attention float32 [B, S] that some rows pay to every token of the sequence, causal, over all keys.

        Args:
            by: `"next"`: queries and keys of the layer before which the stage acts, made from the hidden states now;
                `"last"`: those of the layer that has just run.
        """
        flow = self.flow
        assert flow is not None
        assert context.layer is not None
        assert flow.tables is not None
        host, number = self.host, flow.level
        index = context.layer if by == "next" else context.layer - 1
        layer = host.layers[index]
        hidden, tables = (context.hidden, flow.tables) if by == "next" else flow.inputs[index]
        stored = self.cached_keys(flow, index)
        columns = 0
        if by == "last" and stored is not None:
            query, key = host.queries_and_keys(layer, hidden, tables, rows, key=stored)
            columns = stored.shape[2] - hidden.shape[1]
        else:
            query, key = host.queries_and_keys(layer, hidden, tables, rows)
            if by == "next" and stored is not None and stored.shape[2]:
                columns = stored.shape[2]
                key = torch.cat([stored, key], dim=2)
        valid = context.valid
        if columns:
            past = flow.record.levels[number].valid[:, :columns]
            valid = torch.cat([past, valid], dim=1)
        return attention_received(
            query, key, weights.to(query.device), scale=layer.self_attn.scaling, rows=rows + columns, valid=valid
        )[:, columns:]

    @staticmethod
    def cached_keys(flow: Flow, index: int) -> Tensor | None:
        """Rotated keys [B, G, n, d] that a plain cache layer holds."""
        cache = flow.cache
        if cache is None or index >= len(cache.layers) or getattr(cache, "offloading", False):
            return None
        layer = cache.layers[index]
        if type(layer).__name__ != "DynamicLayer" or not layer.get_seq_length():
            return None
        return layer.keys
