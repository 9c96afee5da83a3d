"""NAR: neighbouring autoregressive modelling; a grid of tokens grows from its top left corner, one diagonal a step.

Each token is predicted by its left neighbour through a horizontal head and by its upper neighbour through a vertical
head; where both exist their logits are averaged. A grid of 16 x 16 tokens takes 31 model calls.

Source: He et al., "Neighboring Autoregressive Modeling for Efficient Visual Generation" (arXiv 2503.10696).
Letters: B images, T condition tokens, N image tokens, L = T + N positions, S tokens of a diagonal, D channels, V codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.nn.cache import KVCache
from vistok.nn.llama import ConditionalLlama, token_loss
from vistok.nn.norms import RMSNorm
from vistok.nn.proximity import ProximityOrder, grow, grows_from_corner, mixed_features, proximity_mask
from vistok.nn.sampling import Generators, Step
from vistok.nn.text import TextCondition
from vistok.registry import Published
from vistok.tokens import VisualTokens

__all__ = ["NAR", "Diagonals", "diagonals_of"]

# name -> (layers, width, heads)
SIZES = {
    "b": (12, 768, 12),
    "m": (18, 1024, 16),
    "l": (24, 1024, 16),
    "xl": (36, 1280, 20),
    "xxl": (48, 1536, 24),
}
PARAMETERS = {"b": 130_551_552, "m": 295_453_696, "l": 372_536_320, "xl": 815_991_040, "xxl": 1_464_454_656}
HUB_IDS = {
    "b": "chenfeng1271/NAR-imagenet-256-B",
    "m": "yefly/NAR-imagenet-256-M",
    "l": "chenfeng1271/NAR-imagenet-256-L",
    "xl": "yefly/NAR-imagenet-256-XL",
    "xxl": "chenfeng1271/NAR-imagenet-256-XXL",
}


def _published() -> dict[str, Published]:
    shared: dict[str, Any] = {
        "system": "nar",
        "hub_file": "last_version.pt",
        "licence": "apache-2.0 or mit (see the Hub repository)",
        "paper": "arXiv:2503.10696",
        "origin": "ThisisBillhe/NAR",
        "codebook_size": 16384,
    }
    entries = {}
    for size, (layers, width, heads) in SIZES.items():
        name = f"nar-{size}.imagenet256"
        entries[name] = Published(
            name=name,
            config={"num_layers": layers, "hidden_size": width, "num_heads": heads},
            hub_id=HUB_IDS[size],
            image_size=256,
            num_tokens=256,
            preprocessing="centre crop, ten-crop codes, [-1, 1]",
            tokenizer="vq16.imagenet",
            sampling={"guidance_scale": 4.0, "temperature": 1.0, "top_k": 2000, "top_p": 1.0},
            parameters=PARAMETERS[size],
            **shared,
        )
    for stage, pixels in (("stage1", 256), ("stage2", 512)):
        name = f"nar-xl.t2i{pixels}"
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
            hub_id=f"yefly/NAR-XL-t2i-{stage}",
            image_size=pixels,
            num_tokens=(pixels // 16) ** 2,
            preprocessing="centre crop, [-1, 1]",
            tokenizer="vq16.t2i",
            text_encoder="google/flan-t5-xl",
            sampling={"guidance_scale": 7.5, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            parameters=818_969_600,
            **shared,
        )
    return entries


class Diagonals(ProximityOrder):
    """The decoding order of an image: diagonal by diagonal, rows ascending inside each. Get one from `diagonals_of`."""

    @property
    def left(self) -> Tensor:
        """int64 [N], for each decoding position that of its left neighbour; -1 where there is none."""
        return self.neighbours[0]

    @property
    def above(self) -> Tensor:
        """int64 [N], for each decoding position that of its upper neighbour; -1 where there is none."""
        return self.neighbours[1]

    @property
    def left_weight(self) -> Tensor:
        """float [N, 1], share of the horizontal head."""
        return self.shares[0]

    @property
    def above_weight(self) -> Tensor:
        """float [N, 1], share of the vertical head."""
        return self.shares[1]


@lru_cache(maxsize=16)
def diagonals_of(grid: tuple[int, int], device: torch.device) -> Diagonals:
    """The decoding order of a (rows, cols) grid; the last few are kept."""
    with torch.inference_mode(False):  # what is made while sampling must serve training, too
        return Diagonals.build(grid, device)


class NAR(ConditionalLlama):
    """Near-to-far token generator.

    Class-conditional with `num_classes`, text-conditional with `caption_dim` (and `num_classes=None`).

    Args:
        vocab_size: entries of the tokenizer's codebook, V.
        hidden_size: channels D.
        num_layers: blocks of the backbone, whose output feeds the horizontal head.
        num_vertical_layers: further blocks on top of it, whose output feeds the vertical head.
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

    system = "nar"
    published: ClassVar[dict[str, Published]] = _published()

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_vertical_layers: int = 1,
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
        if num_vertical_layers < 1:
            raise InvalidInputError(f"num_vertical_layers must be at least 1; got {num_vertical_layers}")
        self._build(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers + num_vertical_layers,
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
        self.num_backbone_layers = num_layers
        self.vertical_norm = RMSNorm(hidden_size, norm_eps)
        self.vertical_output = nn.Linear(hidden_size, vocab_size, bias=False)
        self._initialise()

    @classmethod
    def tiny(cls, **overrides: Any) -> NAR:
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
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """From the authors' `ModelArgs`; our own arguments pass unchanged."""
        official = dict(config)
        vertical = official.pop("medusa_attention_num", None)
        arguments = super().config_from_official(official)
        if vertical is not None:
            arguments["num_vertical_layers"] = vertical
        return arguments

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`medusa_norm` and `medusa_output` become `vertical_norm` and `vertical_output`."""
        return {
            "vertical_" + key.removeprefix("medusa_") if key.startswith("medusa_") else key: value
            for key, value in state.items()
        }

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names, which `from_official` reads back."""
        return {
            "medusa_" + key.removeprefix("vertical_") if key.startswith("vertical_") else key: value
            for key, value in self.state_dict().items()
        }

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise LlamaGen's files."""
        if "vertical_output.weight" in missing and not {"tok_embeddings.weight", "output.weight"} & set(missing):
            return "this is a LlamaGen checkpoint: the vertical head (medusa_*) is missing; load it with LlamaGen."
        return None

    # ------------------------------------------------------------------------------------------------------ network
    def hidden_states(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, is_causal: bool, cache: KVCache | None
    ) -> tuple[Tensor, ...]:
        """Normed inputs [B, L, D] of the horizontal and of the vertical head."""
        layers, horizontal = list(self.layers), x
        if cache is None:
            horizontal = self.run_blocks(x, layers[: self.num_backbone_layers], rotation, mask, is_causal)
            vertical = self.run_blocks(horizontal, layers[self.num_backbone_layers :], rotation, mask, is_causal)
        else:
            for index, (layer, slots) in enumerate(zip(layers, cache.layers, strict=True)):
                x = layer(x, rotation, mask, is_causal, slots)
                if index + 1 == self.num_backbone_layers:
                    horizontal = x
            vertical = x
        return self.norm(horizontal), self.vertical_norm(vertical)

    def forward(
        self, ids: Tensor, condition: Tensor | TextCondition, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mixed logits of every token from the condition and its nearer diagonals (teacher forcing).

        Args:
            ids: int64 [B, N] in raster order.
            condition: labels int64 [B], or a `TextCondition` [B, T, caption_dim].
            generator: draws the condition dropout in training.

        Returns:
            float32 [B, N, V] in raster order.
        """
        logits = self._ordered_logits(ids, condition, generator)
        diagonals = diagonals_of(self.grid, ids.device)
        return logits[:, torch.argsort(diagonals.order)]

    def _ordered_logits(
        self, ids: Tensor, condition: Tensor | TextCondition, generator: torch.Generator | None
    ) -> Tensor:
        """`forward` in decoding order: sorted by diagonal, the mask is block-causal."""
        total = self.num_condition_tokens
        diagonals = diagonals_of(self.grid, ids.device)
        drop = self.condition_drop(len(ids), generator)
        text = condition if isinstance(condition, TextCondition) else None
        x = self.cls_embedding(condition if text is None else text.features, drop)
        x = self.tok_dropout(torch.cat([x, self.tok_embeddings(ids[:, diagonals.order])], dim=1))
        table = self.rotation_table(self.grid)
        rotation = torch.cat([table[:total], table[total:][diagonals.order]])
        mask = proximity_mask(self.grid, total, ids.device)
        if text is not None and text.mask is not None:
            visible = torch.cat([text.mask, text.mask.new_ones(ids.shape)], dim=1)
            mask = (mask & visible[:, None]) | torch.eye(len(mask), dtype=torch.bool, device=ids.device)
            mask = mask[:, None]
        horizontal, vertical = self.hidden_states(x, rotation, mask, False, None)
        features = mixed_features((horizontal, vertical), diagonals, 0, ids.shape[1], total)
        weight = torch.cat([self.output.weight, self.vertical_output.weight], dim=1)
        return functional.linear(features, weight).float()

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy of the mixed logits (section 3; one loss, not one a head).

        Args:
            batch: `ids` int64 [B, N] in raster order; `labels` int64 [B], or `text_features` [B, T, caption_dim] with
                `text_mask` bool [B, T]; optionally `valid` [B], samples that count.
            generator: draws the condition dropout.
        """
        condition, ids = self.batch_condition(batch)
        logits = self._ordered_logits(ids, condition, generator)
        targets = ids[:, diagonals_of(self.grid, ids.device).order]
        return {"loss": token_loss(logits, targets, batch.get("valid"))}

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
        """Grow images diagonal by diagonal.

        Keys and values are cached in decoding order, so what a diagonal may see is the filled prefix of the cache and
        no mask exists (captions of different lengths keep one for their padding). Guidance and the mix of the two heads
        act on hidden states, before one product with both heads; the unconditional rows are dropped when guidance ends.

        Args:
            condition: class labels int64 [B], or a `TextCondition`.
            guidance_scale: u + s (c - u) on the hidden states (the heads are linear); up to 1 is no guidance.
            guidance_interval: guidance ends before the first diagonal that more than this many tokens precede; None
                guides all.
            temperature: divides the logits; 0 is greedy.
            top_k: keep the k best tokens; 0 keeps all.
            top_p: then keep the smallest set with this probability; 1 keeps all.
            generator: one for all images, or one an image (each image then does not depend on the others).
            grid: (rows, cols) to write; None is the training grid.
            prefix: known tokens to grow from, which are kept: a rectangle in the top left corner (tokens on a smaller
                grid), or any region that contains the left and the upper neighbour of each of its cells (the `mask` of
                tokens on the grid itself).

        Yields:
            A `Step` for every diagonal that had tokens to be written.

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
        if not grows_from_corner(known, grid):
            raise InvalidInputError(
                "NAR grows from the top left corner: the known tokens of a prefix must contain the left and the upper "
                "neighbour of each of their cells"
            )
        rotation = self.rotation_table(grid)[self.num_condition_tokens :]
        choice = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        heads = (self.output, self.vertical_output)
        return grow(self, heads, condition, ids, known, grid, rotation, guidance_scale, guidance_interval, choice)
