"""NAR for video: a grid of (frames, rows, columns) of tokens grows from its first corner, one oblique plane a step.

Each token is predicted by its left neighbour, by its upper neighbour and by the one in the frame before, each through a
head of its own; the logits of those that exist are averaged. 4 x 16 x 16 tokens take 34 model calls instead of 1024.

Source: He et al., "Neighboring Autoregressive Modeling for Efficient Visual Generation" (arXiv 2503.10696), after the
generator of Wang et al., "LARP: Tokenizing Videos with a Learned Autoregressive Generative Prior" (arXiv 2410.21264).
Letters: B videos, T condition tokens, N video tokens, L = T + N positions, S tokens of a plane, D channels, V codes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import CheckpointError, InvalidInputError
from vistok.files import read_state_dict
from vistok.nn.cache import KVCache
from vistok.nn.llama import LlamaNetwork, token_loss
from vistok.nn.norms import RMSNorm
from vistok.nn.positions import sinusoids
from vistok.nn.proximity import grow, grows_from_corner, mixed_features, proximity_mask, proximity_order
from vistok.nn.sampling import Generators, Step
from vistok.nn.text import TextCondition
from vistok.registry import Published
from vistok.tokens import VisualTokens

__all__ = ["NARVideo"]

# name -> (layers of the backbone, width, heads)
SIZES = {
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "lp": (30, 1280, 20),
    "xl": (36, 1280, 20),
    "xxl": (48, 1536, 24),
    "xxxl": (48, 2560, 40),
}
PARAMETERS = {"l": 368_736_256, "lp": 693_588_480}
NAME_PREFIX = "llama-abs-"
OFFICIAL_NAMES = {
    "dim": "hidden_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "multiple_of": "multiple_of",
    "ffn_dim_multiplier": "ffn_dim_multiplier",
    "norm_eps": "norm_eps",
    "token_dropout_p": "token_dropout",
    "attn_dropout_p": "attention_dropout",
    "resid_dropout_p": "residual_dropout",
    "ffn_dropout_p": "ffn_dropout",
    "drop_path_rate": "drop_path",
    "class_dropout_prob": "condition_dropout",
    "vocab_size": "vocab_size",
    "cls_token_num": "num_condition_tokens",
    "latent_shape": "grid",
    "max_seq_len": "num_positions",
    "use_fixed_pe": "fixed_positions",
    "num_classes": "num_classes",
}
OFFICIAL_DEFAULTS: dict[str, Any] = {"dim": 4096, "n_layer": 32, "n_head": 32, "max_seq_len": 1024}
# Set by the authors' code, without a meaning for ours: initial weights, the size of their cache, an unused rotary base.
OFFICIAL_IGNORED = {"initializer_range", "max_batch_size", "rope_base", "model_type"}
OFFICIAL_ONLY = (OFFICIAL_NAMES.keys() - OFFICIAL_NAMES.values()) | OFFICIAL_IGNORED | {"frame_prediction", "args"}
# The authors' heads: right, down (next row), back (next frame).
OFFICIAL_KEYS = {
    "norm_R.": "norm.",
    "output_R.": "output.",
    "norm_D.": "vertical_norm.",
    "output_D.": "vertical_output.",
    "norm_B.": "temporal_norm.",
    "output_B.": "temporal_output.",
    "abs_pe": "position_embedding",
}


def _published() -> dict[str, Published]:
    entries = {}
    for size, parameters in PARAMETERS.items():
        layers, width, heads = SIZES[size]
        name = f"nar-{size}.ucf101"
        entries[name] = Published(
            name=name,
            system="nar-video",
            config={"num_layers": layers, "hidden_size": width, "num_heads": heads},
            hub_id=f"chenfeng1271/NAR-ucf101-256-{size.upper()}",
            hub_file="model.safetensors",
            licence="apache-2.0 or mit (see the Hub repository)",
            paper="arXiv:2503.10696",
            origin="ThisisBillhe/NAR",
            image_size=128,
            num_tokens=1024,
            codebook_size=8192,
            preprocessing="16 frames, short side 128, centre crop, [0, 1]",
            tokenizer="larp-l-long.ucf101",
            sampling={"guidance_scale": 1.25, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            parameters=parameters,
        )
    return entries


class NARVideo(LlamaNetwork):
    """Near-to-far generator of videos, conditioned on a class, or on tokens such as those of earlier frames.

    Args:
        vocab_size: entries of the tokenizer's codebook, V.
        hidden_size: channels D.
        num_layers: blocks of the backbone, whose output feeds the horizontal head. One more block on top feeds the
            vertical head, and another on top of that the temporal head.
        num_heads: attention heads.
        num_kv_heads: key-value heads (grouped-query attention); None is as many as heads.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        ffn_dim_multiplier: further factor on that width.
        norm_eps: inside the root of RMSNorm.
        num_classes: classes, without the null class; None for a model that continues tokens (frame prediction).
        num_condition_tokens: T: 1 for a class; for frame prediction, tokens that are given and a separator.
        condition_dropout: probability of the null class in training.
        grid: (frames, rows, cols) of the training videos.
        num_positions: places of the position table after the condition; None is one for each cell of the grid.
        fixed_positions: sines and cosines of the raster index instead of a learned table.
        token_dropout, residual_dropout, ffn_dropout, attention_dropout: dropout rates, in training only.
        drop_path: stochastic depth rate of the last block; rises linearly from 0.
    """

    system = "nar-video"
    published: ClassVar[dict[str, Published]] = _published()

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 8192,
        hidden_size: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        num_classes: int | None = 101,
        num_condition_tokens: int = 1,
        condition_dropout: float = 0.1,
        grid: Sequence[int] = (4, 16, 16),
        num_positions: int | None = None,
        fixed_positions: bool = False,
        token_dropout: float = 0.1,
        residual_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.grid = check_video_grid(grid)
        places = prod(self.grid) if num_positions is None else num_positions
        if places < prod(self.grid):
            raise InvalidInputError(f"the grid {self.grid} has {prod(self.grid)} cells; num_positions is only {places}")
        if num_classes is None and num_condition_tokens < 2:
            raise InvalidInputError(
                "without classes the condition is at least one token and a separator: num_condition_tokens must be "
                f"at least 2; got {num_condition_tokens}"
            )
        if fixed_positions and hidden_size % 2:
            raise InvalidInputError(f"sines and cosines need an even hidden_size; got {hidden_size}")
        self._build_network(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers + 2,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            multiple_of=multiple_of,
            ffn_dim_multiplier=ffn_dim_multiplier,
            norm_eps=norm_eps,
            num_classes=num_classes,
            caption_dim=None,
            num_condition_tokens=num_condition_tokens,
            condition_dropout=condition_dropout,
            token_dropout=token_dropout,
            residual_dropout=residual_dropout,
            ffn_dropout=ffn_dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
        )
        self.num_backbone_layers = num_layers
        if num_classes is None:
            self.tok_embeddings = nn.Embedding(vocab_size + 1, hidden_size)  # the separator comes last
        for axis in ("vertical", "temporal"):
            self.add_module(f"{axis}_norm", RMSNorm(hidden_size, norm_eps))
            self.add_module(f"{axis}_output", nn.Linear(hidden_size, vocab_size, bias=False))
        self.position_embedding: Tensor
        length = num_condition_tokens + places
        if fixed_positions:
            self.register_buffer("position_embedding", sinusoids(torch.arange(length), hidden_size)[None].float())
        else:
            self.position_embedding = nn.Parameter(0.02 * torch.randn(1, length, hidden_size))
        self._initialise()
        for head in self.heads:
            nn.init.zeros_(head.weight)

    @classmethod
    def tiny(cls, **overrides: Any) -> NARVideo:
        """Random weights in eval mode, builds in milliseconds: 2 frames of 3x4 of 64 codes, 10 classes."""
        arguments: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "multiple_of": 16,
            "num_classes": 10,
            "grid": (2, 3, 4),
        }
        return cls(**{**arguments, **overrides}).eval()

    # ------------------------------------------------------------------------------------------------ official files
    @classmethod
    def from_official(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        config: str | Mapping[str, Any],
        *,
        ema_decay: float | None = None,
    ) -> NARVideo:
        """Load a file of the authors (see `VistokModel.from_official`).

        Args:
            source: file, or its content: a flat state dict, or a training checkpoint around one.
            config: published name, or constructor arguments: ours, the authors', or `{"name": "llama-abs-L", "args":
                {...}}` as in their checkpoints.
            ema_decay: take the moving average with this decay out of a training checkpoint, instead of the weights.

        Raises:
            CheckpointError: also if the checkpoint has no such average.
        """
        if ema_decay is None:
            return super().from_official(source, config)
        content = source if isinstance(source, Mapping) else read_state_dict(source)
        wrapper = content.get("model", content)
        averages = wrapper.get("ema_sd", content.get("ema_sd")) if isinstance(wrapper, Mapping) else None
        if not isinstance(averages, Mapping) or ema_decay not in averages:
            held = ", ".join(map(str, averages)) if isinstance(averages, Mapping) else "none"
            raise CheckpointError(f"the checkpoint holds no moving average with decay {ema_decay}; it holds: {held}")
        return super().from_official(averages[ema_decay], config)

    @classmethod
    def config_from_official(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """From the authors' `ModelArgs`, or the name and arguments of their checkpoints; ours pass unchanged."""
        if isinstance(config.get("config"), Mapping):  # a Hub repository wraps the dataclass
            config = config["config"]
        if str(config.get("name", "")).startswith(NAME_PREFIX):
            size = str(config["name"]).removeprefix(NAME_PREFIX).lower()
            if size not in SIZES:
                raise InvalidInputError(f"unknown size {config['name']!r}; known: {', '.join(SIZES)}")
            layers, width, heads = SIZES[size]
            config = {"n_layer": layers, "dim": width, "n_head": heads, **config.get("args", {})}
        if not config.keys() & OFFICIAL_ONLY:
            return dict(config)
        given = {**OFFICIAL_DEFAULTS, **config}
        predicts_frames = given.pop("frame_prediction", False)
        arguments = {OFFICIAL_NAMES.get(key, key): given[key] for key in given if key not in OFFICIAL_IGNORED}
        if predicts_frames:
            arguments["num_classes"] = None
        return arguments

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Flat, or under "sd" inside "model"."""
        for key in ("model", "sd", "module", "state_dict"):
            if isinstance(state.get(key), Mapping):
                state = state[key]
        return {key.removeprefix("_orig_mod."): value for key, value in state.items()}

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The heads R, D and B become the horizontal, the vertical and the temporal one."""
        return {_renamed(key, OFFICIAL_KEYS): value for key, value in state.items()}

    def to_official(self) -> dict[str, Tensor]:
        """The state dict under the authors' names, which `from_official` reads back."""
        return self.names_to_official(self.state_dict())

    @classmethod
    def names_to_official(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors (weights, gradients) by our names under the authors'."""
        ours = {value: key for key, value in OFFICIAL_KEYS.items()}
        return {_renamed(key, ours): value for key, value in tensors.items()}

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise the other generators of this family."""
        if any(key.startswith("medusa_") for key in unexpected):
            return "this is NAR for images (medusa_* heads); load it with NAR."
        if any(key.startswith(("prior_model.", "encoder.blocks.")) for key in unexpected):
            return "this is a LARP tokenizer; load it with LARP."
        if "temporal_output.weight" in missing and "tok_embeddings.weight" not in missing:
            return "this is a generator with a single head (LARP's own, or LlamaGen's), which writes token by token."
        return None

    # ------------------------------------------------------------------------------------------------------ network
    @property
    def heads(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Horizontal, vertical and temporal output head: the axes of the grid from the last to the first."""
        return self.output, cast(nn.Linear, self.vertical_output), cast(nn.Linear, self.temporal_output)

    @property
    def is_text_conditional(self) -> bool:
        """Always False."""
        return False

    @property
    def predicts_frames(self) -> bool:
        """Whether the condition is tokens (of earlier frames) rather than a class."""
        return self.num_classes is None

    def positions(self, grid: tuple[int, int, int]) -> Tensor:
        """Position vectors [N, D] of a grid in raster order: a cell has that of the same cell of the training grid.

        Raises:
            InvalidInputError: for a grid that leaves the training grid (fixed positions allow more frames).
        """
        frames, rows, cols = self.grid
        longer = self.config.fixed_positions or grid[0] <= frames
        if not longer or grid[1] > rows or grid[2] > cols:
            more = "any number of frames" if self.config.fixed_positions else f"up to {frames} frames"
            raise InvalidInputError(
                f"this model has positions for {more} of up to {rows}x{cols} tokens; got the grid {grid}"
            )
        places = [torch.arange(side, device=self.device) * stride for side, stride in zip(grid, (rows * cols, cols, 1))]
        index = (places[0][:, None, None] + places[1][:, None] + places[2]).flatten() + self.num_condition_tokens
        table = self.position_embedding[0]
        if grid[0] <= frames:
            return table[index]
        return sinusoids(index, table.shape[1]).to(table.dtype)

    def condition_positions(self, length: int) -> Tensor:
        """Position vectors [length, D] of the last condition tokens."""
        total = self.num_condition_tokens
        return self.position_embedding[0, total - length : total]

    def embed_condition(self, condition: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels int64 [B] (negative: the null class), or tokens [B, T - 1], to [B, T, D]."""
        if self.predicts_frames:
            return self.tok_embeddings(functional.pad(condition, (0, 1), value=self.vocab_size))
        drop = self.condition_drop(len(condition), generator)
        return self.cls_embedding(torch.where(condition < 0, cast(int, self.num_classes), condition), drop)

    def hidden_states(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, is_causal: bool, cache: KVCache | None
    ) -> tuple[Tensor, ...]:
        """Normed inputs [B, L, D] of the horizontal, the vertical and the temporal head; positions [L, D]."""
        x = x + positions.to(x.dtype)
        layers, states = list(self.layers), []
        for index, layer in enumerate(layers):
            if cache is None:
                x = self.run_blocks(x, [layer], None, mask, is_causal)
            else:
                x = layer(x, None, mask, is_causal, cache.layers[index])
            if index + 1 >= self.num_backbone_layers:
                states.append(x)
        return self.norm(states[0]), self.vertical_norm(states[1]), self.temporal_norm(states[2])

    def forward(self, ids: Tensor, condition: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Mixed logits of every token from the condition and all nearer planes (teacher forcing).

        Args:
            ids: int64 [B, N], N cells of the training grid in raster order (frame, row, column).
            condition: labels int64 [B], negative for the null class; or, for frame prediction, tokens int64 [B, T - 1].
            generator: draws the condition dropout in training.

        Returns:
            float32 [B, N, V] in raster order.
        """
        order = proximity_order(self.grid, ids.device)
        logits = self._ordered_logits(ids, condition, generator)
        return logits[:, torch.argsort(order.order)]

    def _ordered_logits(self, ids: Tensor, condition: Tensor, generator: torch.Generator | None) -> Tensor:
        """`forward` in decoding order: sorted by plane, the mask is block-causal."""
        total, order = self.num_condition_tokens, proximity_order(self.grid, ids.device)
        x = self.embed_condition(condition, generator)
        x = self.tok_dropout(torch.cat([x, self.tok_embeddings(ids[:, order.order])], dim=1))
        positions = torch.cat([self.condition_positions(total), self.positions(self.grid)[order.order]])
        states = self.hidden_states(x, positions, proximity_mask(self.grid, total, ids.device), False, None)
        features = mixed_features(states, order, 0, ids.shape[1], total)
        return functional.linear(features, torch.cat([head.weight for head in self.heads], dim=1)).float()

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy of the mixed logits.

        Args:
            batch: `ids` int64 [B, N] in raster order; `labels` int64 [B] (negative: null class), or for frame
                prediction `frames` int64 [B, T - 1]; optionally `valid` [B], videos that count.
            generator: draws the condition dropout.

        Raises:
            InvalidInputError: a missing part, or ids that do not fill the grid.
        """
        name = "frames" if self.predicts_frames else "labels"
        for key in ("ids", name):
            if key not in batch:
                given = ", ".join(sorted(batch)) or "none"
                raise InvalidInputError(f"this {type(self).__name__} trains on batches with {key!r}; got {given}")
        ids = batch["ids"]
        if ids.ndim != 2 or ids.shape[1] != prod(self.grid):
            raise InvalidInputError(
                f"ids must be [B, {prod(self.grid)}] for the grid {self.grid}; got {list(ids.shape)}"
            )
        logits = self._ordered_logits(ids, batch[name], generator)
        targets = ids[:, proximity_order(self.grid, ids.device).order]
        return {"loss": token_loss(logits, targets, batch.get("valid"))}

    # ----------------------------------------------------------------------------------------------------- sampling
    def check_condition(self, condition: Tensor | TextCondition) -> Tensor:
        """The condition on the model's device: labels with null for negative ones, or tokens with their separator.

        Raises:
            InvalidInputError: another type or shape, or values out of range.
        """
        given = (
            f"{condition.dtype} {list(condition.shape)}" if isinstance(condition, Tensor) else type(condition).__name__
        )
        if not isinstance(condition, Tensor) or condition.dtype != torch.int64:
            raise InvalidInputError(f"the condition must be int64 class labels or tokens; got {given}")
        if not condition.numel():
            raise InvalidInputError(f"the condition is empty ({given}); expected at least one label")
        low, high = int(condition.min()), int(condition.max())
        condition = condition.to(self.device)
        if self.num_classes is None:
            expected = self.num_condition_tokens - 1
            if condition.ndim != 2 or condition.shape[1] != expected:
                raise InvalidInputError(
                    f"this model continues {expected} tokens: give int64 [B, {expected}]; got {given}"
                )
            if low < 0 or high >= self.vocab_size:
                raise InvalidInputError(f"tokens must lie in 0..{self.vocab_size - 1}; got {low}..{high}")
            return functional.pad(condition, (0, 1), value=self.vocab_size)
        if condition.ndim != 1:
            raise InvalidInputError(f"this model is class-conditional: give class labels as int64 [B], not {given}")
        if high >= self.num_classes:
            raise InvalidInputError(
                f"class labels must lie in 0..{self.num_classes - 1} (negative: no class); got {low}..{high}"
            )
        if low < 0 and self.condition_dropout == 0.0:
            raise InvalidInputError("this model was trained without condition dropout and has no null class")
        return torch.where(condition < 0, self.num_classes, condition)

    def known_tokens(
        self, prefix: VisualTokens | None, batch: int, grid: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        """What a continuation starts from: ids int64 [B, N] (0 where unknown), and known bool [N] on the CPU.

        Raises:
            InvalidInputError: if the prefix does not fit, or is no region that can grow.
        """
        size, frame = prod(grid), grid[1] * grid[2]
        ids = torch.zeros(batch, size, dtype=torch.int64, device=self.device)
        known = torch.zeros(size, dtype=torch.bool)
        if prefix is None:
            return ids, known
        if prefix.ids is None or len(prefix) != batch:
            raise InvalidInputError(
                f"prefix must hold ids of {batch} videos; got {len(prefix)}, ids "
                f"{'missing' if prefix.ids is None else 'given'}"
            )
        count = prefix.num_tokens
        if count > size or count % frame:
            raise InvalidInputError(
                f"prefix must hold whole frames of {grid[1]}x{grid[2]} = {frame} tokens, at most {grid[0]} of them; "
                f"got {count} tokens"
            )
        given = self.known_cells(prefix)
        known[:count] = given
        ids[:, :count] = torch.where(given.to(self.device), prefix.ids.to(self.device), 0)
        if not grows_from_corner(known, grid):
            raise InvalidInputError(
                "videos grow from the first corner of the first frame: the known tokens of a prefix must contain the "
                "left and the upper neighbour of each of their cells, and that in the frame before"
            )
        return ids, known

    def sample(
        self,
        condition: Tensor,
        *,
        guidance_scale: float = 1.0,
        guidance_interval: int | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators = None,
        grid: tuple[int, int, int] | None = None,
        prefix: VisualTokens | None = None,
    ) -> Iterator[Step]:
        """Grow videos plane by plane.

        Keys and values are cached in decoding order, so what a plane may see is the filled prefix of the cache and no
        mask exists. Guidance and the mix of the three heads act on hidden states, before one product with all heads;
        the unconditional rows are dropped when guidance ends.

        Args:
            condition: class labels int64 [B], negative for no class; for frame prediction, tokens int64 [B, T - 1].
            guidance_scale: u + s (c - u) on the hidden states (the heads are linear); up to 1 is no guidance. The paper
                uses 1.25.
            guidance_interval: guidance ends before the first plane that more than this many tokens precede; None
                guides all.
            temperature: divides the logits; 0 is greedy.
            top_k: keep the k best tokens; 0 keeps all.
            top_p: then keep the smallest set with this probability; 1 keeps all.
            generator: one for all videos, or one a video (each video then does not depend on the others).
            grid: (frames, rows, cols) to write; None is the training grid, others lie within it (see `positions`).
            prefix: known tokens to grow from, which are kept, in raster order: the first frames (so many tokens), or
                any region that contains the three nearer neighbours of each of its cells (the `mask`).

        Yields:
            A `Step` for every plane that had tokens to be written; raster order is (frame, row, column).

        Raises:
            InvalidInputError: at once, if an argument is out of range.
            InvalidOutputError: NaN logits (with CUDA, after the last step).
        """
        checked = self.check_request(
            condition,
            guidance_scale,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
        if guidance_scale > 1.0 and self.predicts_frames:
            raise InvalidInputError("a model that continues frames has no null condition; use guidance_scale=1")
        sides = self.grid if grid is None else check_video_grid(grid)
        ids, known = self.known_tokens(prefix, len(checked), sides)
        positions = self.positions(sides)
        choice = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        return grow(self, self.heads, checked, ids, known, sides, positions, guidance_scale, guidance_interval, choice)


def _renamed(key: str, table: Mapping[str, str]) -> str:
    for theirs, ours in table.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def check_video_grid(grid: Sequence[int]) -> tuple[int, int, int]:
    """(frames, rows, cols) as integers, or an InvalidInputError."""
    sides = tuple(int(side) for side in grid)
    if len(sides) != 3 or min(sides) < 1:
        raise InvalidInputError(f"grid must be (frames, rows, cols), each at least 1; got {tuple(grid)}")
    return sides[0], sides[1], sides[2]
