"""The Llama-like network of LlamaGen and NAR: conditions, token embedding, blocks; for pictures also grid and files.

Source: Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (arXiv 2406.06525),
section 2. Letters: B images, R rows of a sampling batch (2 B with guidance), T condition tokens, N image tokens,
L = T + N positions, S tokens fed at once, D channels, V entries of the codebook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.nn import sampling
from vistok.nn.cache import KVCache
from vistok.nn.codebook import start_from_codebook
from vistok.nn.conditions import check_labels, check_text
from vistok.nn.model import VistokModel
from vistok.nn.norms import RMSNorm
from vistok.nn.rope import grid_rotation
from vistok.nn.sampling import Step
from vistok.nn.text import TextCondition
from vistok.nn.transformer import TransformerBlock, feed_forward_size
from vistok.tokens import VisualTokens

__all__ = ["CaptionEmbedding", "ClassEmbedding", "ConditionalLlama", "LlamaNetwork", "check_grid", "token_loss"]

OFFICIAL_DEFAULTS: dict[str, Any] = {
    "dim": 4096,
    "n_layer": 32,
    "n_head": 32,
    "n_kv_head": None,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "rope_base": 10000,
    "norm_eps": 1e-5,
    "token_dropout_p": 0.1,
    "attn_dropout_p": 0.0,
    "resid_dropout_p": 0.1,
    "ffn_dropout_p": 0.1,
    "drop_path_rate": 0.0,
    "num_classes": 1000,
    "caption_dim": 2048,
    "class_dropout_prob": 0.1,
    "model_type": "c2i",
    "vocab_size": 16384,
    "cls_token_num": 1,
    "block_size": 256,
}
# Set by the authors' code, without a meaning for ours: initial weights, and the sizes of their caches.
OFFICIAL_IGNORED = {"initializer_range", "max_batch_size", "max_seq_len"}
OFFICIAL_NAMES = {
    "dim": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "multiple_of": "multiple_of",
    "ffn_dim_multiplier": "ffn_dim_multiplier",
    "rope_base": "rope_theta",
    "norm_eps": "norm_eps",
    "token_dropout_p": "token_dropout",
    "attn_dropout_p": "attention_dropout",
    "resid_dropout_p": "residual_dropout",
    "ffn_dropout_p": "ffn_dropout",
    "drop_path_rate": "drop_path",
    "class_dropout_prob": "condition_dropout",
    "vocab_size": "vocab_size",
    "cls_token_num": "num_condition_tokens",
}
# Arguments that only the authors' configurations have.
OFFICIAL_ONLY = (OFFICIAL_NAMES.keys() - OFFICIAL_NAMES.values()) | {"model_type", "block_size"} | OFFICIAL_IGNORED


class ClassEmbedding(nn.Module):
    """A vector for each class, and one more for "no class" if the model was trained with condition dropout."""

    def __init__(self, num_classes: int, size: int, has_null: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + has_null, size)

    def forward(self, labels: Tensor, drop: Tensor | None) -> Tensor:
        """Labels int64 [B] (dropped where `drop`, bool [B]) to [B, 1, D]."""
        if drop is not None:
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)[:, None]


class CaptionProjection(nn.Module):
    """Two linear layers without biases around a tanh-approximated GELU."""

    def __init__(self, caption_dim: int, size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, size, bias=False)
        self.fc2 = nn.Linear(size, size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, caption_dim] -> [B, T, D]."""
        return self.fc2(functional.gelu(self.fc1(features), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """Projected text features; the null caption is a fixed random buffer that training never changes."""

    def __init__(self, caption_dim: int, size: int, num_tokens: int) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(caption_dim, size)
        self.uncond_embedding: Tensor
        self.register_buffer("uncond_embedding", torch.randn(num_tokens, caption_dim) / caption_dim**0.5)

    def forward(self, features: Tensor, drop: Tensor | None) -> Tensor:
        """Features [B, T, caption_dim] (replaced by the null caption where `drop`, bool [B]) to [B, T, D]."""
        features = features.to(self.uncond_embedding.dtype)
        if drop is not None:
            features = torch.where(drop[:, None, None], self.uncond_embedding, features)
        return self.cap_proj(features)


class LlamaNetwork(VistokModel):
    """Blocks, embeddings and first head, whatever the tokens are laid out as."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]  # noqa: RUF012 - the name and type that accelerate reads

    def _build_network(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None,
        multiple_of: int,
        ffn_dim_multiplier: float | None,
        norm_eps: float,
        num_classes: int | None,
        caption_dim: int | None,
        num_condition_tokens: int,
        condition_dropout: float,
        token_dropout: float,
        residual_dropout: float,
        ffn_dropout: float,
        attention_dropout: float,
        drop_path: float,
    ) -> None:
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if hidden_size % num_heads:
            raise InvalidInputError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads}")
        if num_heads % kv_heads:
            raise InvalidInputError(f"num_heads {num_heads} must be a multiple of num_kv_heads {kv_heads}")
        self.head_dim = hidden_size // num_heads
        self.num_kv_heads = kv_heads
        self.vocab_size = vocab_size
        self.num_classes = num_classes
        self.num_condition_tokens = num_condition_tokens
        self.condition_dropout = condition_dropout
        self.gradient_checkpointing = False
        self.cls_embedding: ClassEmbedding | CaptionEmbedding
        if caption_dim is not None:
            self.cls_embedding = CaptionEmbedding(caption_dim, hidden_size, num_condition_tokens)
        elif num_classes is not None:
            if num_condition_tokens != 1:
                raise InvalidInputError(
                    f"a class is one condition token; got num_condition_tokens={num_condition_tokens}"
                )
            self.cls_embedding = ClassEmbedding(num_classes, hidden_size, condition_dropout > 0)
        self.tok_embeddings = nn.Embedding(vocab_size, hidden_size)
        self.tok_dropout = nn.Dropout(token_dropout)
        ffn_size = feed_forward_size(hidden_size, multiple_of, ffn_dim_multiplier)
        self.layers = nn.ModuleList(
            TransformerBlock(
                hidden_size,
                num_heads,
                kv_heads,
                ffn_size,
                norm_eps=norm_eps,
                attention_dropout=attention_dropout,
                residual_dropout=residual_dropout,
                ffn_dropout=ffn_dropout,
                drop_path=drop_path * index / max(1, num_layers - 1),
            )
            for index in range(num_layers)
        )
        self.norm = RMSNorm(hidden_size, norm_eps)
        self.output = nn.Linear(hidden_size, vocab_size, bias=False)

    def _initialise(self) -> None:
        """Normal(0, 0.02) for every matrix and embedding; the first head starts at zero (uniform probabilities)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def embed_codebook(self, codes: Tensor) -> None:
        """Start token embeddings and heads as random projections of the codebook [V, C]: like codes start alike.

        Raises:
            InvalidInputError: if the codebook has another size than the vocabulary.
        """
        heads = [m for m in self.modules() if isinstance(m, nn.Linear) and m.out_features == self.vocab_size]
        start_from_codebook(codes, self.tok_embeddings, heads, self.vocab_size)

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names, which `from_official` reads back."""
        return self.state_dict()

    # ------------------------------------------------------------------------------------------------------ training
    @property
    def is_text_conditional(self) -> bool:
        """Whether the condition is a caption rather than a class."""
        return isinstance(self.cls_embedding, CaptionEmbedding)

    def condition_drop(self, batch: int, generator: torch.Generator | None) -> Tensor | None:
        """bool [B], which conditions this training step replaces by the null condition; None outside training."""
        if not self.training or self.condition_dropout == 0.0:
            return None
        return sampling.uniform((batch,), generator, self.device) < self.condition_dropout

    def run_blocks(
        self, x: Tensor, layers: Sequence[nn.Module], rotation: Tensor | None, mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Blocks without a cache, with gradient checkpointing where it is switched on."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in layers:
            if recompute:
                x = self._gradient_checkpointing_func(layer, x, rotation, mask, is_causal)
            else:
                x = layer(x, rotation, mask, is_causal)
        return x

    # ------------------------------------------------------------------------------------------------------ sampling
    def check_condition(self, condition: Tensor | TextCondition) -> Tensor | TextCondition:
        """The condition on the model's device, or an InvalidInputError that says what was expected."""
        name = type(self).__name__
        if self.is_text_conditional:
            channels = self.cls_embedding.uncond_embedding.shape[1]
            return check_text(condition, self.num_condition_tokens, channels, name).to(self.device)
        assert self.num_classes is not None
        return check_labels(condition, self.num_classes, name).to(self.device)

    def check_request(
        self, condition: Tensor | TextCondition, guidance_scale: float, **settings: Any
    ) -> Tensor | TextCondition:
        """The condition on the model's device, after every check of `sample` that does not concern the layout.

        Raises:
            InvalidInputError: an argument out of range, or a model in training mode.
        """
        if self.training:
            raise InvalidInputError(
                f"this {type(self).__name__} is in training mode, where dropout spoils the samples: call eval() first"
            )
        condition = self.check_condition(condition)
        sampling.check_sampling(guidance_scale, batch=len(condition), **settings)
        if guidance_scale > 1.0 and self.num_classes is not None and self.condition_dropout == 0.0:
            raise InvalidInputError(
                "this model was trained without condition dropout and has no null class; use guidance_scale=1"
            )
        return condition

    def known_cells(self, prefix: VisualTokens) -> Tensor:
        """bool [N] on the CPU, the cells of a prefix that are known: those of its mask, or all.

        Raises:
            InvalidInputError: if they differ between samples, or hold ids outside the vocabulary.
        """
        assert prefix.ids is not None
        given = torch.ones(prefix.num_tokens, dtype=torch.bool)
        if prefix.mask is not None:
            given = prefix.mask[0].cpu()
            if not bool((prefix.mask.cpu() == given).all()):
                raise InvalidInputError(
                    "the known tokens of a prefix must be the same cells in every sample of the batch"
                )
        chosen = prefix.ids.cpu()[:, given]
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.vocab_size:
            raise InvalidInputError(
                f"prefix ids must lie in 0..{self.vocab_size - 1}; got {int(chosen.min())}..{int(chosen.max())}"
            )
        return given

    def condition_positions(self, length: int) -> Tensor:
        """What `hidden_states` takes for the last `length` condition positions; the generators' bases define it."""
        raise InvalidInputError(f"{type(self).__name__} defines no positions")

    def hidden_states(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, is_causal: bool, cache: KVCache | None
    ) -> tuple[Tensor, ...]:
        """Normed input [B, L, D] of each output head, at positions [L, ...]; the generators define it."""
        raise InvalidInputError(f"{type(self).__name__} defines no heads")

    def sample(self, *args: Any, **settings: Any) -> Iterator[Step]:
        """Write images step by step; the generators define it."""
        raise InvalidInputError(f"{type(self).__name__} defines no decoding order")

    def generate(self, condition: Tensor | TextCondition, **settings: Any) -> VisualTokens:
        """All tokens at once: the last step of `sample`, which documents the settings."""
        tokens = settings.get("prefix")  # nothing is left to write if it is complete
        for step in self.sample(condition, **settings):
            tokens = step.tokens
        assert tokens is not None
        return VisualTokens(ids=tokens.ids, grid=tokens.grid)


class ConditionalLlama(LlamaNetwork):
    """Base of LlamaGen and NAR, which document its arguments: pictures from a class or a caption."""

    def _build(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_classes: int | None,
        caption_dim: int | None,
        rope_theta: float,
        grid: Sequence[int],
        **arguments: Any,
    ) -> None:
        if hidden_size % num_heads or (hidden_size // num_heads) % 4:
            raise InvalidInputError(
                f"hidden_size {hidden_size} over num_heads {num_heads} must give a head width divisible by 4 "
                "(2-D rotary positions)"
            )
        if (num_classes is None) == (caption_dim is None):
            raise InvalidInputError(
                f"give num_classes for a class-conditional model or caption_dim for a text-conditional one, not "
                f"{'neither' if num_classes is None else 'both'}"
            )
        self.grid = check_grid(grid)
        self.rope_theta = float(rope_theta)
        self._build_network(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_classes=num_classes,
            caption_dim=caption_dim,
            **arguments,
        )

    # ------------------------------------------------------------------------------------------------ official files
    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """From the authors' `ModelArgs`; our own arguments pass unchanged."""
        if not config.keys() & OFFICIAL_ONLY:
            return dict(config)
        given = {**OFFICIAL_DEFAULTS, **config}
        arguments = {ours: given.pop(theirs) for theirs, ours in OFFICIAL_NAMES.items()}
        side = round(given["block_size"] ** 0.5)
        if side * side != given["block_size"]:
            raise InvalidInputError(f"block_size must be a perfect square (a square grid); got {given['block_size']}")
        text = given.pop("model_type") == "t2i"
        arguments["grid"] = (side, side)
        arguments["num_classes"] = None if text else given["num_classes"]
        arguments["caption_dim"] = given["caption_dim"] if text else None
        for key in ("block_size", "num_classes", "caption_dim"):
            given.pop(key)
        arguments.update({key: value for key, value in given.items() if key not in OFFICIAL_IGNORED})
        return arguments

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Flat (FSDP) files, or under "model", "module" or "state_dict"; old files also hold the rotary table."""
        for key in ("model", "module", "state_dict"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
                break
        return {key: value for key, value in state.items() if key != "freqs_cis"}

    # ------------------------------------------------------------------------------------------------------ training
    def rotation_table(self, grid: tuple[int, int]) -> Tensor:
        """Rotary factors complex64 [T + N, C / 2] of a grid in raster order; the last grid's are kept."""
        key = (grid, self.device)
        if getattr(self, "_rotation_key", None) != key:
            with torch.inference_mode(False):  # a table made while sampling must serve training, too
                self._rotation = grid_rotation(
                    grid,
                    self.head_dim,
                    self.rope_theta,
                    num_condition_tokens=self.num_condition_tokens,
                    device=self.device,
                )
            self._rotation_key = key
        return self._rotation

    def condition_positions(self, length: int) -> Tensor:
        """Zero rotary factors complex64 [length, C / 2]: condition positions have no place on the grid."""
        return torch.zeros(length, self.head_dim // 2, dtype=torch.complex64, device=self.device)

    def batch_condition(self, batch: Mapping[str, Any]) -> tuple[Tensor | TextCondition, Tensor]:
        """(condition, ids) of a training batch.

        Raises:
            InvalidInputError: if a part is missing, or the ids do not fill the grid.
        """
        for key in ("ids", "text_features" if self.is_text_conditional else "labels"):
            if key not in batch:
                given = ", ".join(sorted(batch)) or "none"
                raise InvalidInputError(f"this {type(self).__name__} trains on batches with {key!r}; got {given}")
        ids = batch["ids"]
        if ids.ndim != 2 or ids.shape[1] != self.grid[0] * self.grid[1]:
            raise InvalidInputError(
                f"ids must be [B, {self.grid[0] * self.grid[1]}] for the grid {self.grid}; got {list(ids.shape)}"
            )
        if self.is_text_conditional:
            return TextCondition(batch["text_features"], batch.get("text_mask")), ids
        return batch["labels"], ids

    # ------------------------------------------------------------------------------------------------------ sampling
    def check_sampling(
        self,
        condition: Tensor | TextCondition,
        grid: Sequence[int] | None,
        prefix: VisualTokens | None,
        guidance_scale: float,
        **settings: Any,
    ) -> tuple[Tensor | TextCondition, tuple[int, int], Tensor, Tensor]:
        """Check every argument of `sample` before any work.

        Returns:
            The condition on the model's device, the grid, and what `known_tokens` gives.

        Raises:
            InvalidInputError: an argument out of range, or a model in training mode.
        """
        condition = self.check_request(condition, guidance_scale, **settings)
        grid = self.grid if grid is None else check_grid(grid)
        return condition, grid, *self.known_tokens(prefix, len(condition), grid)

    def known_tokens(self, prefix: VisualTokens | None, batch: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What a continuation starts from.

        Args:
            prefix: tokens on the grid itself or on a smaller one, which is placed in the top left corner; its mask is
                True at the known tokens (without a mask, all are known).
            batch: images to write.
            grid: (rows, cols) to write.

        Returns:
            ids int64 [B, N] on the model's device, 0 where unknown, and known bool [N] on the CPU.

        Raises:
            InvalidInputError: if the prefix does not fit, or its known cells differ between images.
        """
        rows, cols = grid
        ids = torch.zeros(batch, rows, cols, dtype=torch.int64, device=self.device)
        known = torch.zeros(rows, cols, dtype=torch.bool)
        if prefix is None:
            return ids.flatten(1), known.flatten()
        if prefix.ids is None or prefix.grid is None or len(prefix) != batch:
            raise InvalidInputError(
                f"prefix must hold ids of {batch} images with a grid; got {len(prefix)} images, ids "
                f"{'missing' if prefix.ids is None else 'given'}, grid {prefix.grid}"
            )
        high, wide = prefix.grid
        if high > rows or wide > cols:
            raise InvalidInputError(
                f"the prefix covers {high}x{wide} tokens, which is more than the grid {rows}x{cols}"
            )
        given = self.known_cells(prefix)
        known[:high, :wide] = given.view(high, wide)
        held = torch.where(given.to(self.device), prefix.ids.to(self.device), 0)
        ids[:, :high, :wide] = held.view(batch, high, wide)
        return ids.flatten(1), known.flatten()


class SamplingRun:
    """What a sampler keeps while it writes: the cache, the visible keys, the latest hidden states.

    Rows of the condition come first; with guidance, as many unconditional rows follow. Equal rows are run once and
    copied: a class or a caption that occurs several times, and the null condition. Padding that all captions share is
    not run at all: condition keys are zero wherever they stand, so leaving out what nobody may see changes nothing.

    Args:
        model: the generator.
        condition: checked condition of B images (labels [B], a caption, or tokens [B, T]).
        slots: image tokens that the cache shall hold.
        guidance_scale: up to 1 is no guidance.

    Attributes:
        hidden: normed inputs [R, S, D] of the heads at the positions fed last; at first, the last condition position.
    """

    def __init__(
        self, model: LlamaNetwork, condition: Tensor | TextCondition, slots: int, guidance_scale: float
    ) -> None:
        self.model, self.batch = model, len(condition)
        self.guidance_scale, self.guided = guidance_scale, guidance_scale > 1.0
        embed: Callable[[Any], tuple[Tensor, Tensor | None, Tensor]] = self._embed_classes
        if isinstance(condition, TextCondition):
            embed = self._embed_captions
        elif condition.ndim == 2:
            embed = self._embed_tokens
        x, valid, rows = embed(condition)
        length = x.shape[1]
        mask = None if valid is None else caption_mask(valid)
        self.cache = KVCache(
            len(model.layers), len(x), model.num_kv_heads, length, model.head_dim, dtype=x.dtype, device=x.device
        )
        positions = model.condition_positions(length)
        hidden = model.hidden_states(x, positions, mask, mask is None and length > 1, self.cache)
        self.hidden = tuple(state[:, -1:].index_select(0, rows) for state in hidden)
        self.cache.select_rows(rows)
        self.cache.reserve(slots)
        self.visible: Tensor | None = None  # bool [R, 1, 1, length + slots]; None where every key may be seen
        if valid is not None:
            open_slots = valid.new_ones(len(rows), slots)
            self.visible = torch.cat([valid.index_select(0, rows), open_slots], dim=1)[:, None, None]

    def _embed_classes(self, labels: Tensor) -> tuple[Tensor, None, Tensor]:
        """Distinct rows [U, 1, D], and int64 [R], which of them each row is."""
        labels, rows = torch.unique(labels, return_inverse=True)
        if self.guided:
            rows = torch.cat([rows, torch.full_like(rows, len(labels))])
            labels = torch.cat([labels, labels.new_tensor([self.model.num_classes])])
        return self.model.cls_embedding(labels, None), None, rows

    def _embed_tokens(self, ids: Tensor) -> tuple[Tensor, None, Tensor]:
        """Tokens int64 [B, T] that serve as the condition: rows [B, T, D], and which of them each row is."""
        return self.model.tok_embeddings(ids), None, torch.arange(len(ids), device=ids.device)

    def _embed_captions(self, text: TextCondition) -> tuple[Tensor, Tensor | None, Tensor]:
        """Distinct rows [U, T', D], their valid tokens bool [U, T'] (None if all are), and int64 [R]."""
        features, total = text.features, text.features.shape[1]
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        if text.mask is not None:
            valid = text.mask
            first = int(valid.any(0).int().argmax()) if bool(valid.any()) else total - 1
            features, valid, total = features[:, first:], valid[:, first:], total - first
        # Captions of one prompt follow each other, so comparing neighbours finds them.
        same = (features[1:] == features[:-1]).flatten(1).all(1) & (valid[1:] == valid[:-1]).all(1)
        distinct = torch.cat([same.new_ones(min(1, len(features))), ~same])
        rows = distinct.cumsum(0) - 1
        x = self.model.cls_embedding(features[distinct], None)
        held = valid[distinct]
        if self.guided:
            # The null caption keeps the padding of the caption beside it.
            null = self.model.cls_embedding.cap_proj(self.model.cls_embedding.uncond_embedding[-total:])
            paddings, which = torch.unique(valid, dim=0, return_inverse=True)
            x = torch.cat([x, null.expand(len(paddings), -1, -1)])
            rows = torch.cat([rows, which + len(held)])
            held = torch.cat([held, paddings])
        return x, None if bool(held.all()) else held, rows

    def end_guidance(self) -> None:
        """Go on without the unconditional rows."""
        if not self.guided:
            return
        self.guided = False
        kept = slice(0, self.batch)
        self.hidden = tuple(state[kept] for state in self.hidden)
        self.cache.select_rows(kept)
        self.visible = None if self.visible is None else self.visible[kept]

    def guide(self, features: Tensor) -> Tensor:
        """float32 [B, S, K] from features [R, S, K] of a linear head: u + s (c - u), as on its logits."""
        features = features.float()
        if not self.guided:
            return features
        cond, uncond = features.chunk(2)
        return torch.lerp(uncond, cond, self.guidance_scale)

    def feed(self, ids: Tensor, positions: Tensor, order: Tensor | None = None) -> None:
        """Run tokens [B, S]; all that was fed before is visible to them, and they to each other unless `order` says.

        Args:
            ids: codes.
            positions: [S, ...], what the model's `hidden_states` takes for them.
            order: bool [S, S], which of them may see which.
        """
        x = self.model.tok_embeddings(ids)
        if self.guided:
            x = torch.cat([x, x])
        stop = self.cache.length + ids.shape[1]
        mask = None if self.visible is None else self.visible[..., :stop]
        if order is not None:
            order = torch.cat([order.new_ones(len(order), self.cache.length), order], dim=1)
            mask = order if mask is None else mask & order
        self.hidden = self.model.hidden_states(x, positions, mask, False, self.cache)


def caption_mask(valid: Tensor) -> Tensor:
    """bool [B, 1, L, L] from valid positions [B, L]: causal, closed at padding, open on the diagonal."""
    length = valid.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    mask = (causal & valid[:, None]) | torch.eye(length, dtype=torch.bool, device=valid.device)
    return mask[:, None]


def check_grid(grid: Sequence[int]) -> tuple[int, int]:
    """(rows, cols) as integers, or an InvalidInputError."""
    sides = tuple(int(side) for side in grid)
    if len(sides) != 2 or min(sides) < 1:
        raise InvalidInputError(f"grid must be (rows, cols), both at least 1; got {tuple(grid)}")
    return sides[0], sides[1]


def token_loss(logits: Tensor, targets: Tensor, valid: Tensor | None) -> Tensor:
    """Mean cross-entropy; with `valid` [B], over the tokens of valid samples alone."""
    if valid is None:
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    weights = valid[:, None].expand_as(losses).to(losses.dtype)
    return (losses * weights).sum() / weights.sum().clamp_min(1.0)
