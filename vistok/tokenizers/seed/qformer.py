"""The Q-Former: BERT whose query positions also attend to the features of a picture.

Source: BLIP-2 (arXiv 2301.12597, section 3.1); SEED makes the queries causal (arXiv 2310.01218, section 3.1).

Shape letters: B pictures, n queries, T text positions, S positions of the encoder, D width, h heads, d = D / h,
X layers with cross-attention, V words.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.nn.attention import attention

__all__ = ["KeysValues", "QFormer"]

NORM_EPS = 1e-12
KeysValues: TypeAlias = tuple[Tensor, Tensor]  # [B, h, L, d] each


class _Layer(nn.Module):
    """Self-attention, cross-attention in some layers, feed-forward; LayerNorm after each residual sum."""

    def __init__(self, size: int, num_heads: int, ffn_size: int, dropout: float, cross: bool, text: bool) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.cross = num_heads, dropout, cross
        self.attention_qkv = nn.Linear(size, 3 * size)
        self.attention_out = nn.Linear(size, size)
        self.attention_norm = nn.LayerNorm(size, NORM_EPS)
        if cross:
            self.cross_query = nn.Linear(size, size)
            self.cross_out = nn.Linear(size, size)
            self.cross_norm = nn.LayerNorm(size, NORM_EPS)
        self.ffn_in = nn.Linear(size, ffn_size)
        self.ffn_out = nn.Linear(ffn_size, size)
        self.ffn_norm = nn.LayerNorm(size, NORM_EPS)
        if text:
            self.text_ffn_in = nn.Linear(size, ffn_size)
            self.text_ffn_out = nn.Linear(ffn_size, size)
            self.text_ffn_norm = nn.LayerNorm(size, NORM_EPS)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)

    def split(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, h, L, d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        attended = attention(query, key, value, mask, dropout_p=dropout, is_causal=is_causal)
        return attended.transpose(1, 2).flatten(2)

    def self_attention(
        self, x: Tensor, mask: Tensor | None, is_causal: bool, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """New states, and the keys and values of these positions."""
        query, key, value = (self.split(part) for part in self.attention_qkv(x).chunk(3, dim=-1))
        own = (key, value)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        attended = self._attend(query, key, value, mask, is_causal)
        return self.attention_norm(self._drop(self.attention_out(attended)) + x), own

    def cross_attention(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[B or 1, n, D] and keys, values [B, h, S, d] to [B, n, D]."""
        query = self.split(self.cross_query(x)).expand(len(key), -1, -1, -1)
        return self.cross_norm(self._drop(self.cross_out(self._attend(query, key, value, mask, False))) + x)

    def feed_forward(self, x: Tensor, text: bool) -> Tensor:
        """[B, L, D] -> [B, L, D], with the weights of the text positions or of the queries."""
        if text:
            hidden = self.text_ffn_out(functional.gelu(self.text_ffn_in(x)))
            return self.text_ffn_norm(self._drop(hidden) + x)
        return self.ffn_norm(self._drop(self.ffn_out(functional.gelu(self.ffn_in(x)))) + x)


class QFormer(nn.Module):
    """BERT with cross-attention of its queries.

    Args:
        size: width D.
        num_layers: layers.
        num_heads: attention heads.
        ffn_size: hidden width of the feed-forward networks.
        encoder_size: channels of the encoder states.
        cross_attention_every: layers 0, c, 2c, ... attend to the encoder.
        dropout: of embeddings, attention and residual branches, in training only.
        text_vocab_size: words V of the text branch; None has none.
        max_positions: longest text.
        language_head: whether the text branch predicts words, too.
    """

    def __init__(
        self,
        size: int,
        num_layers: int,
        num_heads: int,
        ffn_size: int,
        encoder_size: int,
        *,
        cross_attention_every: int = 2,
        dropout: float = 0.1,
        text_vocab_size: int | None = None,
        max_positions: int = 512,
        language_head: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        text = text_vocab_size is not None
        self.layers = nn.ModuleList(
            _Layer(size, num_heads, ffn_size, dropout, number % cross_attention_every == 0, text)
            for number in range(num_layers)
        )
        crossing = sum(layer.cross for layer in self.layers)
        # The encoder states are the same for all layers: one matrix for all their keys and values.
        self.cross_key_value = nn.Linear(encoder_size, 2 * size * crossing)
        self.embedding_norm = nn.LayerNorm(size, NORM_EPS)
        self.word_embeddings: nn.Embedding | None = None
        if text_vocab_size is not None:
            self.word_embeddings = nn.Embedding(text_vocab_size, size)
            self.position_embeddings = nn.Embedding(max_positions, size)
        if language_head:
            if text_vocab_size is None:
                raise InvalidInputError("a language head needs a text branch: give text_vocab_size")
            self.lm_dense = nn.Linear(size, size)
            self.lm_norm = nn.LayerNorm(size, NORM_EPS)
            self.lm_out = nn.Linear(size, text_vocab_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def embed(self, queries: Tensor | None, text_ids: Tensor | None) -> Tensor:
        """Input states [B, n + T, D]: queries have no positions, text has absolute ones from 0."""
        parts = [] if queries is None else [queries]
        if text_ids is not None:
            if self.word_embeddings is None:
                raise InvalidInputError("this Q-Former has no text branch; build it with text_vocab_size")
            if text_ids.shape[1] > self.position_embeddings.num_embeddings:
                raise InvalidInputError(
                    f"texts have at most {self.position_embeddings.num_embeddings} tokens; got {text_ids.shape[1]}"
                )
            words = self.word_embeddings(text_ids) + self.position_embeddings.weight[: text_ids.shape[1]]
            parts = [part.expand(len(words), -1, -1) for part in parts] + [words]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return functional.dropout(self.embedding_norm(x), self.dropout, self.training)

    def forward(
        self,
        queries: Tensor | None = None,
        text_ids: Tensor | None = None,
        *,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        causal: bool = False,
        past: list[KeysValues] | None = None,
        states: list[Tensor] | None = None,
        cache: list[KeysValues] | None = None,
    ) -> Tensor:
        """Last hidden states of queries, then text.

        Args:
            queries: [B, n, D], or [1, n, D] for all pictures alike (what does not depend on the picture is then
                computed once).
            text_ids: int64 [B, T].
            encoder_states: [B, S, encoder_size].
            encoder_mask: bool or integer [B, S].
            text_mask: bool or integer [B, T], valid words.
            causal: query i sees queries 0..i (and all text). With `past`, text is causal instead.
            past: keys and values of earlier positions, one pair a layer, which all positions see.
            states: collects the input of the first layer and the output of each.
            cache: collects keys and values of these positions.

        Returns:
            [B, n + T, D].
        """
        if queries is None and text_ids is None:
            raise InvalidInputError("give queries, text_ids, or both")
        n = 0 if queries is None else queries.shape[1]
        shared = queries is not None and len(queries) == 1 and text_ids is None
        if queries is not None and encoder_states is not None and self.training and self.dropout and shared:
            queries = queries.expand(len(encoder_states), -1, -1)  # every picture has dropout of its own
        x = self.embed(queries, text_ids)
        mask, is_causal = self._mask(n, text_ids, text_mask, causal, past)
        crossings: list[Tensor] = []
        if encoder_states is not None and n:
            crossings = list(
                self.cross_key_value(encoder_states).chunk(2 * sum(layer.cross for layer in self.layers), -1)
            )
        seen = None if encoder_mask is None else encoder_mask.bool()[:, None, None, :]
        if states is not None:
            states.append(x)
        for number, layer in enumerate(self.layers):
            x, own = layer.self_attention(x, mask, is_causal, None if past is None else past[number])
            if cache is not None:
                cache.append(own)
            head, tail = (x[:, :n], x[:, n:]) if text_ids is not None else (x, None)
            if n and layer.cross:
                if not crossings:
                    raise InvalidInputError("queries attend to encoder_states; none were given")
                key, value = layer.split(crossings.pop(0)), layer.split(crossings.pop(0))
                head = layer.cross_attention(head, key, value, seen)
            parts = [layer.feed_forward(head, text=False)] if n else []
            if tail is not None:
                parts.append(layer.feed_forward(tail, text=True))
            x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            if states is not None:
                states.append(x)
        return x

    @staticmethod
    def _mask(
        n: int, text_ids: Tensor | None, text_mask: Tensor | None, causal: bool, past: list[KeysValues] | None
    ) -> tuple[Tensor | None, bool]:
        """(bool mask [B or 1, 1, L, K] or None, whether plain causal attention does)."""
        if text_ids is None:
            return None, causal and past is None
        batch, length = text_ids.shape
        device = text_ids.device
        words = torch.ones_like(text_ids, dtype=torch.bool) if text_mask is None else text_mask.bool()
        if past is not None:
            before = past[0][0].shape[2]
            order = torch.ones(length, length, dtype=torch.bool, device=device).tril()
            open_columns = torch.ones(batch, length, before, dtype=torch.bool, device=device)
            return torch.cat([open_columns, order & words[:, None, :]], dim=2)[:, None], False
        if n == 0 and bool(words.all()):
            return None, False
        order = torch.ones(n + length, n + length, dtype=torch.bool, device=device)
        if causal:
            order[:n, :n] = order[:n, :n].tril()
        columns = torch.cat([torch.ones(batch, n, dtype=torch.bool, device=device), words], dim=1)
        return (order & columns[:, None, :])[:, None], False

    def language_logits(self, states: Tensor) -> Tensor:
        """Word logits [B, T, V] of text states [B, T, D]."""
        return self.lm_out(self.lm_norm(functional.gelu(self.lm_dense(states))))
