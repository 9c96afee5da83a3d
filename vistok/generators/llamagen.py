"""LlamaGen: a Llama-like transformer that writes image tokens in raster order, from a class or a caption.

Source: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv 2406.06525).
Letters: B images, T condition tokens, N image tokens, L positions, D channels, V entries of the codebook.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.nn import sampling
from vistok.nn.cache import KVCache
from vistok.nn.llama import ConditionalLlama, SamplingRun, caption_mask, token_loss
from vistok.nn.sampling import Generators, Step, TokenChecks
from vistok.nn.text import TextCondition
from vistok.registry import Published
from vistok.tokens import VisualTokens

__all__ = ["LlamaGen"]

# name -> (layers, width, heads)
SIZES = {
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (36, 1280, 20),
    "xxl": (48, 1536, 24),
    "3b": (24, 3200, 32),
}
PARAMETERS = {"b": 110_888_448, "l": 342_910_976, "xl": 774_699_520, "xxl": 1_410_972_672, "3b": 3_096_659_200}
OFFICIAL_FILES = {"b": "B", "l": "L", "xl": "XL", "xxl": "XXL", "3b": "3B"}


def _published() -> dict[str, Published]:
    shared: dict[str, Any] = {
        "system": "llamagen",
        "licence": "mit",
        "paper": "arXiv:2406.06525",
        "origin": "FoundationVision/LlamaGen",
        "codebook_size": 16384,
    }
    entries = {}
    for size, (layers, width, heads) in SIZES.items():
        for pixels in (256, 384) if size in ("b", "l") else (384,):
            name = f"llamagen-{size}.imagenet{pixels}"
            entries[name] = Published(
                name=name,
                config={
                    "num_layers": layers,
                    "hidden_size": width,
                    "num_heads": heads,
                    "grid": (pixels // 16, pixels // 16),
                },
                hub_id="FoundationVision/LlamaGen",
                hub_file=f"c2i_{OFFICIAL_FILES[size]}_{pixels}.pt",
                image_size=pixels,
                num_tokens=(pixels // 16) ** 2,
                preprocessing="centre crop, ten-crop codes, [-1, 1]",
                tokenizer="vq16.imagenet",
                sampling={"guidance_scale": 4.0, "temperature": 1.0, "top_k": 2000, "top_p": 1.0},
                parameters=PARAMETERS[size],
                **shared,
            )
    for stage, pixels in (("stage1", 256), ("stage2", 512)):
        name = f"llamagen-xl.t2i{pixels}"
        entries[name] = Published(
            name=name,
            config={
                "num_layers": 36,
                "hidden_size": 1280,
                "num_heads": 20,
                "grid": (pixels // 16, pixels // 16),
                "num_classes": None,
                "caption_dim": 2048,
                "num_condition_tokens": 120,
            },
            hub_id="peizesun/llamagen_t2i",
            hub_file=f"t2i_XL_{stage}_{pixels}.pt",
            image_size=pixels,
            num_tokens=(pixels // 16) ** 2,
            preprocessing="centre crop, [-1, 1]",
            tokenizer="vq16.t2i",
            text_encoder="google/flan-t5-xl",
            sampling={"guidance_scale": 7.5, "temperature": 1.0, "top_k": 1000, "top_p": 1.0},
            parameters=777_678_080,
            **shared,
        )
    return entries


class LlamaGen(ConditionalLlama):
    """Raster-order token generator.

    Class-conditional with `num_classes`, text-conditional with `caption_dim` (and `num_classes=None`).

    Args:
        vocab_size: entries of the tokenizer's codebook, V.
        hidden_size: channels D.
        num_layers: transformer blocks.
        num_heads: attention heads.
        num_kv_heads: key-value heads (grouped-query attention); None is as many as heads.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        ffn_dim_multiplier: further factor on that width.
        rope_theta: base of the rotary frequencies.
        norm_eps: inside the root of RMSNorm.
        num_classes: classes, without the null class; None for a text-conditional model.
        caption_dim: channels of the text features; None for a class-conditional model.
        num_condition_tokens: T: 1 for a class, the padded caption length for text.
        condition_dropout: probability of the null condition in training.
        grid: (rows, cols) of the training images.
        token_dropout, residual_dropout, ffn_dropout, attention_dropout: dropout rates, in training only.
        drop_path: stochastic depth rate of the last block; rises linearly from 0.
    """

    system = "llamagen"
    published: ClassVar[dict[str, Published]] = _published()

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        num_classes: int | None = 1000,
        caption_dim: int | None = None,
        num_condition_tokens: int = 1,
        condition_dropout: float = 0.1,
        grid: Sequence[int] = (16, 16),
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self._build(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            multiple_of=multiple_of,
            ffn_dim_multiplier=ffn_dim_multiplier,
            rope_theta=rope_theta,
            norm_eps=norm_eps,
            num_classes=num_classes,
            caption_dim=caption_dim,
            num_condition_tokens=num_condition_tokens,
            condition_dropout=condition_dropout,
            grid=grid,
            token_dropout=token_dropout,
            residual_dropout=residual_dropout,
            ffn_dropout=ffn_dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
        )
        self._initialise()

    @classmethod
    def tiny(cls, **overrides: Any) -> LlamaGen:
        """Random weights in eval mode, builds in milliseconds: a 4x4 grid of 64 codes and 10 classes."""
        arguments: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "multiple_of": 16,
            "num_classes": 10,
            "grid": (4, 4),
        }
        return cls(**{**arguments, **overrides}).eval()

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise NAR's files."""
        if any(key.startswith("medusa_") for key in unexpected):
            return (
                "this is a NAR checkpoint: it has a vertical head (medusa_*), which LlamaGen lacks; load it with NAR."
            )
        return None

    # ------------------------------------------------------------------------------------------------------ network
    def hidden_states(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, is_causal: bool, cache: KVCache | None
    ) -> tuple[Tensor, ...]:
        """Normed output of the last block, [B, L, D]."""
        if cache is None:
            x = self.run_blocks(x, list(self.layers), rotation, mask, is_causal)
        else:
            for layer, slots in zip(self.layers, cache.layers, strict=True):
                x = layer(x, rotation, mask, is_causal, slots)
        return (self.norm(x),)

    def forward(
        self, ids: Tensor, condition: Tensor | TextCondition, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Logits of every image token from the condition and the tokens before it (teacher forcing).

        Args:
            ids: int64 [B, N] in raster order; the last one is not read.
            condition: labels int64 [B], or a `TextCondition` [B, T, caption_dim].
            generator: draws the condition dropout in training.

        Returns:
            float32 [B, N, V].
        """
        total = self.num_condition_tokens
        drop = self.condition_drop(len(ids), generator)
        text = condition if isinstance(condition, TextCondition) else None
        x = self.cls_embedding(condition if text is None else text.features, drop)
        x = self.tok_dropout(torch.cat([x, self.tok_embeddings(ids[:, :-1])], dim=1))
        length = x.shape[1]
        rotation = self.rotation_table(self.grid)[:length]
        mask = None
        if text is not None and text.mask is not None:
            mask = caption_mask(torch.cat([text.mask, text.mask.new_ones(len(ids), length - total)], dim=1))
        (hidden,) = self.hidden_states(x, rotation, mask, mask is None, None)
        return self.output(hidden[:, total - 1 :]).float()

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy of the next token (section 3).

        Args:
            batch: `ids` int64 [B, N] in raster order; `labels` int64 [B], or `text_features` [B, T, caption_dim] with
                `text_mask` bool [B, T]; optionally `valid` [B], samples that count.
            generator: draws the condition dropout.
        """
        condition, ids = self.batch_condition(batch)
        logits = self(ids, condition, generator=generator)
        return {"loss": token_loss(logits, ids, batch.get("valid"))}

    # ----------------------------------------------------------------------------------------------------- sampling
    def sample(
        self,
        condition: Tensor | TextCondition,
        *,
        guidance_scale: float = 1.0,
        guidance_interval: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators = None,
        grid: tuple[int, int] | None = None,
        prefix: VisualTokens | None = None,
    ) -> Iterator[Step]:
        """Write images token by token in raster order.

        A step attends over what is written so far, without a mask (captions of different lengths keep one for their
        padding). Guidance acts on the last hidden state; the unconditional rows are dropped when it ends.

        Args:
            condition: class labels int64 [B], or a `TextCondition`.
            guidance_scale: u + s (c - u) on the last hidden state (the head is linear); up to 1 is no guidance.
            guidance_interval: the first token is guided, then those with decode index 0 to this (the second token has
                index 0); None guides all.
            temperature: divides the logits; 0 is greedy.
            top_k: keep the k best tokens; 0 keeps all.
            top_p: then keep the smallest set with this probability; 1 keeps all.
            generator: one for all images, or one an image (each image then does not depend on the others).
            grid: (rows, cols) to write; None is the training grid.
            prefix: known tokens, which are kept: the first ones of the grid in raster order, as whole rows (tokens on a
                grid with fewer rows) or by the `mask` of tokens on the grid itself.

        Yields:
            A `Step` for every token that had to be written.

        Raises:
            InvalidInputError: at once, if an argument is out of range.
            InvalidOutputError: NaN logits (with CUDA, after the last step).
        """
        condition, grid, ids, known = self.check_sampling(
            condition,
            grid,
            prefix,
            guidance_scale,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
        start = int(known.sum())
        if not bool(known[:start].all()):
            raise InvalidInputError(
                "LlamaGen continues raster prefixes: the known tokens must be the first ones of the grid, row by row"
            )
        choice = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        return self._write(condition, ids, start, grid, guidance_scale, guidance_interval, choice)

    @torch.no_grad()
    def _write(
        self,
        condition: Tensor | TextCondition,
        ids: Tensor,
        start: int,
        grid: tuple[int, int],
        guidance_scale: float,
        guidance_interval: int | None,
        choice: Mapping[str, Any],
    ) -> Iterator[Step]:
        batch, size = ids.shape
        if start == size:
            return
        run = SamplingRun(self, condition, size, guidance_scale)
        checks = TokenChecks(ids.device)
        rotation = self.rotation_table(grid)[self.num_condition_tokens :]
        head = self.output.weight.float()
        known = torch.arange(size, device=ids.device) < start
        ends = size if guidance_interval is None else guidance_interval + 2  # the first position without guidance
        if start:
            if start >= ends:
                run.end_guidance()
            causal = torch.ones(start, start, dtype=torch.bool, device=ids.device).tril()
            run.feed(ids[:, :start], rotation[:start], causal)
        for position in range(start, size):
            logits = functional.linear(run.guide(run.hidden[0][:, -1:]), head)
            chosen = checks(sampling.choose_tokens(logits, **choice), last=position + 1 == size)
            ids[:, position : position + 1] = chosen
            known[position] = True
            tokens = VisualTokens(ids=ids.clone(), grid=grid, mask=known.repeat(batch, 1))
            yield Step(position - start, size - start, tokens, torch.tensor([position]))
            if position + 1 < size:
                if position + 1 >= ends:
                    run.end_guidance()
                run.feed(chosen, rotation[position : position + 1])
