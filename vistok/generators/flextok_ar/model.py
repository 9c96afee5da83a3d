"""FlexTok's autoregressive generators: ordered tokens one after the other, from a class or a caption, to any length.

Source: Bachmann, Allardice, Mizrahi et al., "FlexTok" (arXiv 2502.13967), section 4; the published models come with
the paper on searching over token prefixes (arXiv 2604.15453). Because the tokens go from coarse to fine, a prefix is a
whole image: one can stop anywhere, branch anywhere, and judge candidates by their first tokens.

Top to bottom: configuration and network; objective; what is accepted; sampling, branching, search; the authors' files.
The blocks, the state of a sampler and the authors' names are the neighbours of this file.

Letters: B images, R rows (samples of an image, side by side), N tokens, L positions, T caption tokens, D channels,
H heads, C channels of a head, V codes, M branches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.files import read_state_dict
from vistok.nn import sampling
from vistok.nn.cache import KVCache
from vistok.nn.codebook import start_from_codebook
from vistok.nn.model import VistokModel
from vistok.nn.sampling import Generators, Step
from vistok.nn.text import TextCondition
from vistok.nn.transformer import feed_forward_size
from vistok.registry import Published
from vistok.tokens import VisualTokens

from . import names
from .network import Caption, Layer, make_norm, sincos_positions
from .writer import Branches, SearchResult, Writer

__all__ = ["FlexTokAR", "Score"]

Score: TypeAlias = Callable[[VisualTokens, Tensor], Tensor]
"""(candidates [M, n], int64 [M]: which image of the batch each is for) -> float [M]; greater is better."""

# name -> (layers, width)
SIZES = {"113m": (12, 768), "382m": (18, 1152), "1b": (26, 1664), "3b": (36, 2304)}
# Of the configurations below; what a published file adds or lacks in norms and widths is read from its weights.
PARAMETERS = {
    "113m.t2i": 217_573_632,
    "382m.t2i": 536_640_384,
    "1b.t2i": 1_395_298_688,
    "3b.t2i": 3_362_568_960,
    "1b.c2i": 1_101_306_752,
}


def _published() -> dict[str, Published]:
    entries = {}
    for size, kind in (("113m", "t2i"), ("382m", "t2i"), ("1b", "t2i"), ("3b", "t2i"), ("1b", "c2i")):
        layers, width = SIZES[size]
        text = kind == "t2i"
        name = f"flexar-{size}.{kind}"
        hub = f"FlexAR-{size.upper()}-{kind.upper()}"
        entries[name] = Published(
            name=name,
            system="flextok-ar",
            config={
                "num_layers": layers,
                "hidden_size": width,
                "num_heads": width // 64,
                "num_classes": None if text else 1000,
                "caption_dim": 2048 if text else None,
            },
            hub_id=f"EPFL-VILAB/{hub}",
            hub_file="model.safetensors",
            licence="see the Hub repository",
            paper="arXiv:2502.13967",
            origin="EPFL-VILAB/search-over-tokens",
            image_size=256,
            num_tokens=256,
            codebook_size=64000,
            tokenizer="flextok-d18-d28.dfn" if text else "flextok-d18-d28.imagenet",
            text_encoder="google/flan-t5-xl" if text else None,
            parameters=PARAMETERS[f"{size}.{kind}"],
        )
    return entries


class FlexTokAR(VistokModel):
    """Autoregressive generator of FlexTok's tokens.

    Class-conditional with `num_classes`, text-conditional with `caption_dim` (and `num_classes=None`). The class vector
    is added to the start token; captions are read by cross-attention.

    Args:
        vocab_size: entries of the tokenizer's codebook, V.
        hidden_size: channels D.
        num_layers: blocks.
        num_heads: attention heads H.
        num_tokens: N, the most tokens an image can have.
        mlp_hidden_size: hidden width of the feed-forward layers; None is 2/3 of 4 D rounded up to a multiple of 256, or
            4 D without a gate.
        gated_mlp: SwiGLU instead of GELU.
        norm_type: `"layer"` or `"rms"`.
        norm_eps: inside its root.
        qk_norm, cross_qk_norm: normalise queries and keys of self- and cross-attention a head.
        positions: `"absolute"` (learned), `"sincos1d"`, `"sincos2d"` or `"none"`.
        bias: biases of attention and feed-forward layers.
        head_norm, head_bias: a further norm before the head, and its bias.
        num_classes: classes, without the null class; None for a text-conditional model.
        caption_dim: channels of the text features; None for a class-conditional model.
        num_condition_tokens: caption length that a pipeline pads to; cross-attention takes any.
        condition_dropout: probability of the null condition in training.

    Raises:
        InvalidInputError: if the arguments do not fit each other.
    """

    system = "flextok-ar"
    published: ClassVar[dict[str, Published]] = _published()
    sampling_defaults: ClassVar[dict[str, Any]] = {
        "guidance_scale": 1.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "num_tokens": None,
    }
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 64000,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        num_tokens: int = 256,
        mlp_hidden_size: int | None = None,
        gated_mlp: bool = True,
        norm_type: str = "layer",
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        cross_qk_norm: bool = False,
        positions: str = "absolute",
        bias: bool = False,
        head_norm: bool = False,
        head_bias: bool = False,
        num_classes: int | None = 1000,
        caption_dim: int | None = None,
        num_condition_tokens: int = 120,
        condition_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if (num_classes is None) == (caption_dim is None):
            raise InvalidInputError("give either num_classes (class-conditional) or caption_dim (text-conditional)")
        if hidden_size % num_heads:
            raise InvalidInputError(f"hidden_size must be a multiple of num_heads; got {hidden_size} and {num_heads}")
        if positions not in ("absolute", "sincos1d", "sincos2d", "none"):
            raise InvalidInputError(
                f"positions must be 'absolute', 'sincos1d', 'sincos2d' or 'none'; got {positions!r}"
            )
        if not 0.0 <= condition_dropout < 1.0:
            raise InvalidInputError(f"condition_dropout must lie in [0, 1); got {condition_dropout}")
        self.vocab_size, self.num_tokens, self.num_classes = vocab_size, num_tokens, num_classes
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.condition_dropout, self.gradient_checkpointing = condition_dropout, False
        self.num_condition_tokens = num_condition_tokens if num_classes is None else 1
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.start = nn.Parameter(torch.empty(1, 1, hidden_size))
        if positions == "absolute":
            self.position_table = nn.Parameter(torch.empty(num_tokens, hidden_size))
        elif positions == "none":
            self.position_table = None
        else:
            self.register_buffer("position_table", sincos_positions(hidden_size, num_tokens, positions))
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes, hidden_size)
        else:
            assert caption_dim is not None
            self.text_mlp = nn.ModuleDict(
                {
                    "fc1": nn.Linear(caption_dim, caption_dim, bias=False),
                    "fc2": nn.Linear(caption_dim, hidden_size, bias=False),
                }
            )
            # Features of the empty caption. Not in the authors' files: see `set_null_text`.
            self.null_text = nn.Parameter(torch.empty(1, caption_dim))

        def norm(size: int) -> nn.Module:
            return make_norm(norm_type, size, norm_eps)

        if mlp_hidden_size is None:
            mlp_hidden_size = feed_forward_size(hidden_size, 256) if gated_mlp else 4 * hidden_size
        self.layers = nn.ModuleList(
            Layer(
                hidden_size,
                num_heads,
                mlp_hidden_size,
                norm=norm,
                text=num_classes is None,
                qk_norm=qk_norm,
                cross_qk_norm=cross_qk_norm,
                gated_mlp=gated_mlp,
                bias=bias,
            )
            for _ in range(num_layers)
        )
        self.norm = norm(hidden_size)
        self.output_norm = norm(hidden_size) if head_norm else nn.Identity()
        self.head = nn.Linear(hidden_size, vocab_size, bias=head_bias)
        self._initialise()

    def _initialise(self) -> None:
        """Normal with deviation 0.02, smaller by the depth for what adds to the residual stream."""
        residual = 0.02 / math.sqrt(2 * len(self.layers))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                narrow = name.endswith(("proj.weight", "fc2.weight")) and name.startswith("layers.")
                nn.init.normal_(parameter, std=residual if narrow else 0.02)

    def embed_codebook(self, codes: Tensor) -> None:
        """Start token embeddings and head as random projections of the codebook [V, C]: like codes start alike.

        Raises:
            InvalidInputError: if the codebook has another size than the vocabulary.
        """
        start_from_codebook(codes, self.token_embedding, [self.head], self.vocab_size)

    @classmethod
    def tiny(cls, **overrides: Any) -> FlexTokAR:
        """Random weights in eval mode, builds in milliseconds: 10 classes, 16 tokens of `FlexTok.tiny`'s 1600 codes."""
        arguments: dict[str, Any] = {
            "vocab_size": 1600,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_tokens": 16,
            "mlp_hidden_size": 64,
            "num_classes": None if "caption_dim" in overrides else 10,
        }
        model = cls(**{**arguments, **overrides})
        with torch.no_grad():
            for parameter in model.parameters():  # large enough that every part matters
                parameter.mul_(8.0) if parameter.std() < 0.1 and parameter.ndim > 1 else None
        return model.eval()

    @property
    def is_text_conditional(self) -> bool:
        """Whether the condition is a caption."""
        return self.num_classes is None

    @property
    def grid(self) -> tuple[int, int]:
        """(1, N): the tokens are one row. They carry no grid themselves."""
        return 1, self.num_tokens

    def set_null_text(self, features: Tensor) -> None:
        """Set what guidance contrasts captions with: features [n, caption_dim] of the empty caption.

        The authors' files lack it; `TextEncoder` makes it from `""`. It is saved with the model.
        """
        if not self.is_text_conditional or features.ndim != 2 or features.shape[1] != self.null_text.shape[1]:
            raise InvalidInputError(
                "features of the empty caption must be [n, caption_dim] of a text-conditional model; "
                f"got {list(features.shape)}"
            )
        if len(features) != len(self.null_text):
            features = features[-1:]  # T5 makes one token of an empty text; padding in front of it is left out
        self.null_text = nn.Parameter(features.detach().to(self.null_text))

    # ------------------------------------------------------------------------------------------------------ network
    def embed(self, ids: Tensor, first: Tensor | None) -> Tensor:
        """Input of the blocks, [R, L, D].

        Args:
            ids: int64 [R, n].
            first: class vectors [R, D] (zeros for none): the sequence begins with the start token, and positions count
                from 0. None: the ids continue a sequence, and no start token or position is added here.
        """
        x = self.token_embedding(ids)
        if first is None:
            return x
        start = self.start + first[:, None]
        x = torch.cat([start.to(x.dtype), x], dim=1)
        return x if self.position_table is None else x + self.position_table[: x.shape[1]].to(x.dtype)

    def embed_text(self, features: Tensor) -> Tensor:
        """Text features [R, T, caption_dim] -> [R, T, D]."""
        features = features.to(self.text_mlp["fc1"].weight.dtype)
        return self.text_mlp["fc2"](functional.gelu(self.text_mlp["fc1"](features), approximate="tanh"))

    def run_blocks(self, x: Tensor, captions: Sequence[Caption] | None, cache: KVCache | None = None) -> Tensor:
        """Normed output of the last block, [R, L, D]: the input of the head."""
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for index, layer in enumerate(self.layers):
            caption = None if captions is None else captions[index]
            if recompute:
                x = self._gradient_checkpointing_func(layer, x, caption)
            else:
                x = layer(x, caption, None if cache is None else cache.layers[index])
        return self.output_norm(self.norm(x))

    def captions(self, text: Tensor, mask: Tensor | None) -> list[Caption]:
        """Keys and values of embedded captions [R, T, D] for every layer."""
        return [layer.cross_attention.prepare(text, mask) for layer in self.layers]

    def forward(
        self, ids: Tensor, condition: Tensor | TextCondition, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Logits of every token from the condition and the tokens before it (teacher forcing).

        Args:
            ids: int64 [B, n], n <= N; the last one is not read.
            condition: labels int64 [B], or a `TextCondition` [B, T, caption_dim].
            generator: draws the condition dropout in training.

        Returns:
            float32 [B, n, V].
        """
        batch, device = len(ids), ids.device
        drop = torch.zeros(batch, dtype=torch.bool, device=device)
        if self.training and self.condition_dropout:
            drop = sampling.uniform((batch,), generator, device) < self.condition_dropout
        captions = None
        if isinstance(condition, TextCondition):
            features, mask = condition.features, condition.mask
            if mask is None:
                mask = torch.ones(features.shape[:2], dtype=torch.bool, device=device)
            # The empty caption takes the last place, where captions end, and hides the others.
            empty = functional.pad(self.null_text[-1:], (0, 0, features.shape[1] - 1, 0)).to(features.dtype)
            last = torch.arange(features.shape[1], device=device) == features.shape[1] - 1
            features = torch.where(drop[:, None, None], empty, features)
            mask = torch.where(drop[:, None], last, mask)
            captions = self.captions(self.embed_text(features), mask)
            first = self.start.new_zeros(batch, self.start.shape[2])
        else:
            first = self.class_embedding(condition).masked_fill(drop[:, None], 0.0)
        hidden = self.run_blocks(self.embed(ids[:, :-1], first), captions)
        return self.head(hidden).float()

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mean cross-entropy of the next token.

        Args:
            batch: `ids` int64 [B, n], the first n tokens of each image; `labels` int64 [B], or `text_features` [B, T,
                caption_dim] with `text_mask` bool [B, T]; optionally `valid` [B], samples that count.
            generator: draws the condition dropout.
        """
        for key in ("ids", "text_features" if self.is_text_conditional else "labels"):
            if key not in batch:
                given = ", ".join(sorted(batch)) or "none"
                raise InvalidInputError(f"this {type(self).__name__} trains on batches with {key!r}; got {given}")
        ids = batch["ids"]
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.num_tokens:
            raise InvalidInputError(f"ids must be [B, n] with n in 1..{self.num_tokens}; got {list(ids.shape)}")
        condition: Tensor | TextCondition
        if self.is_text_conditional:
            condition = TextCondition(batch["text_features"], batch.get("text_mask"))
        else:
            condition = batch["labels"]
        logits = self(ids, condition, generator=generator)
        losses = functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        if batch.get("valid") is None:
            return {"loss": losses.mean()}
        weights = batch["valid"][:, None].expand_as(losses).to(losses.dtype)
        return {"loss": (losses * weights).sum() / weights.sum().clamp_min(1.0)}

    # --------------------------------------------------------------------------------------------- what is accepted
    def check_condition(self, condition: Tensor | TextCondition) -> Tensor | TextCondition:
        """The condition on the model's device, or an InvalidInputError that says what was expected."""
        name = type(self).__name__
        if self.is_text_conditional:
            if not isinstance(condition, TextCondition):
                raise InvalidInputError(
                    f"this {name} is text-conditional: give a TextCondition (see TextEncoder), "
                    f"not {type(condition).__name__}"
                )
            size = self.null_text.shape[1]
            if condition.features.shape[2] != size or not len(condition):
                raise InvalidInputError(
                    f"text features must be [B, T, {size}] for this model; got {list(condition.features.shape)}: "
                    "was another text encoder used?"
                )
            if not bool(torch.isfinite(condition.features).all()):
                raise InvalidInputError("text features contain NaN or infinity")
            if condition.mask is not None and not bool(condition.mask.any(1).all()):
                raise InvalidInputError("a caption has no valid token: the empty caption has one, its end token")
            return condition.to(self.device)
        if not isinstance(condition, Tensor) or condition.dtype != torch.int64 or condition.ndim != 1:
            given = (
                f"{condition.dtype} {list(condition.shape)}"
                if isinstance(condition, Tensor)
                else type(condition).__name__
            )
            raise InvalidInputError(f"this {name} is class-conditional: give class labels as int64 [B], not {given}")
        assert self.num_classes is not None
        if not len(condition):
            raise InvalidInputError("no class labels were given; expected at least one")
        low, high = int(condition.min()), int(condition.max())
        if low < 0 or high >= self.num_classes:
            raise InvalidInputError(f"class labels must lie in 0..{self.num_classes - 1}; got {low}..{high}")
        return condition.to(self.device)

    def check_settings(self, generator: Generators, batch: int, **settings: Any) -> None:
        """Raise InvalidInputError if a sampling setting for `batch` images is out of range."""
        given = {**self.sampling_defaults, **settings}
        self._check_length(given.pop("num_tokens"))
        sampling.check_sampling(**given, guidance_interval=None, generator=generator, batch=batch)
        if given["guidance_scale"] > 1.0 and self.is_text_conditional and not bool(self.null_text.isfinite().all()):
            raise InvalidInputError(
                "guidance needs the features of the empty caption, which the authors' files do not hold: call "
                "set_null_text(), give null_condition, or use guidance_scale=1"
            )

    def _check_length(self, num_tokens: int | None) -> int:
        if num_tokens is None:
            return self.num_tokens
        if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or not 1 <= num_tokens <= self.num_tokens:
            raise InvalidInputError(f"num_tokens must be an integer in 1..{self.num_tokens}; got {num_tokens!r}")
        return num_tokens

    def known_tokens(self, prefix: VisualTokens | None, batch: int, grid: Sequence[int] | None = None) -> Tensor:
        """Ids int64 [B, n] of a prefix on the model's device; [B, 0] for None.

        Raises:
            InvalidInputError: if it does not hold ids of `batch` images, of equal length and inside the codebook.
        """
        if prefix is None:
            return torch.zeros(batch, 0, dtype=torch.int64, device=self.device)
        if prefix.ids is None or len(prefix) != batch or prefix.grid is not None:
            raise InvalidInputError(
                f"a prefix must hold ordered ids of {batch} images, without a grid; got {len(prefix)} images, ids "
                f"{'missing' if prefix.ids is None else 'given'}, grid {prefix.grid}"
            )
        ids = prefix.ids
        if prefix.mask is not None:
            lengths = prefix.mask.sum(1)
            longest = int(lengths.max())
            if not bool((prefix.mask[:, :longest]).all()) or bool(prefix.mask[:, longest:].any()):
                raise InvalidInputError(
                    "the known tokens of a prefix must be the first ones, equally many in each image"
                )
            ids = ids[:, :longest]
        if ids.shape[1] > self.num_tokens:
            raise InvalidInputError(f"a prefix can have at most {self.num_tokens} tokens; got {ids.shape[1]}")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise InvalidInputError(
                f"prefix ids must lie in 0..{self.vocab_size - 1}; got {int(ids.min())}..{int(ids.max())}"
            )
        return ids.to(self.device)

    def _begin(
        self,
        condition: Tensor | TextCondition,
        prefix: VisualTokens | None,
        num_tokens: int | None,
        null_condition: TextCondition | None,
        class_zero_guidance: bool,
        settings: Mapping[str, Any],
        generator: Generators,
    ) -> Writer:
        """Check every argument of a sampler, then read condition and prefix."""
        if self.training:
            raise InvalidInputError(
                f"this {type(self).__name__} is in training mode, where conditions are dropped: call eval() first"
            )
        condition = self.check_condition(condition)
        scale = settings["guidance_scale"]
        checked = dict(settings) if null_condition is None else {**settings, "guidance_scale": 1.0}
        self.check_settings(generator, len(condition), num_tokens=num_tokens, **checked)
        if not 0.0 <= scale < float("inf"):
            raise InvalidInputError(f"guidance_scale must be a number >= 0 (up to 1 means no guidance); got {scale}")
        ids = self.known_tokens(prefix, len(condition))
        total = self._check_length(num_tokens)
        if ids.shape[1] > total:
            raise InvalidInputError(f"the prefix has {ids.shape[1]} tokens, which is more than num_tokens={total}")
        if null_condition is not None:
            if not isinstance(self.check_condition(null_condition), TextCondition) or len(null_condition) != 1:
                raise InvalidInputError("null_condition must be the TextCondition of one empty caption")
            null_condition = null_condition.to(self.device)
        if class_zero_guidance and self.is_text_conditional:
            raise InvalidInputError("class_zero_guidance is about classes; this model is text-conditional")
        return Writer(self, condition, ids, total, scale, null_condition, class_zero_guidance)

    # ----------------------------------------------------------------------------------------------------- sampling
    def sample(
        self,
        condition: Tensor | TextCondition,
        *,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators = None,
        num_tokens: int | None = None,
        prefix: VisualTokens | None = None,
        grid: Sequence[int] | None = None,
        null_condition: TextCondition | None = None,
        class_zero_guidance: bool = False,
    ) -> Iterator[Step]:
        """Write tokens one by one, coarse to fine; what a step yields is a whole image for the tokenizer.

        A step runs one position a row: keys and values of earlier ones are kept, captions are read once, and guidance
        acts on the last hidden state, before one product with the head.

        Args:
            condition: class labels int64 [B], or a `TextCondition`.
            guidance_scale: u + s (c - u); up to 1 is no guidance. The authors use 1.5 for classes and 3 for captions.
            temperature: divides the logits; 0 is greedy.
            top_k: keep the k best tokens; 0 keeps all.
            top_p: then keep the smallest set with this probability; 1 keeps all.
            generator: one for all images, or one an image (each image then does not depend on the others).
            num_tokens: where to stop, 1..N; None is N.
            prefix: known first tokens, which are kept.
            grid: None or (1, N); other generators write other grids.
            null_condition: one empty caption, instead of the model's own.
            class_zero_guidance: reproduce the authors' sampler, whose unconditional rows are those of class 0 from the
                second written token on.

        Yields:
            A `Step` for each written token, whose tokens [B, n] end with it.

        Raises:
            InvalidInputError: at once, if an argument is out of range.
            InvalidOutputError: NaN logits (with CUDA, after the last step).
        """
        if grid is not None and tuple(grid) != self.grid:
            raise InvalidInputError(f"FlexTok's tokens are a sequence: grid must be None or {self.grid}; got {grid}")
        settings = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        with torch.no_grad():
            writer = self._begin(
                condition, prefix, num_tokens, null_condition, class_zero_guidance, settings, generator
            )
        choice: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "generator": generator,
        }
        return self._write(writer, choice)

    @torch.no_grad()
    def _write(self, writer: Writer, choice: Mapping[str, Any]) -> Iterator[Step]:
        start = writer.ids.shape[1]
        total = writer.total - start
        for index in range(total):
            writer.write(writer.choose(**choice), last=index + 1 == total)
            tokens = VisualTokens(ids=writer.ids.clone())
            yield Step(index, total, tokens, torch.tensor([start + index]))

    def generate(self, condition: Tensor | TextCondition, **settings: Any) -> VisualTokens:
        """All tokens at once: the last step of `sample`, which documents the settings."""
        tokens = settings.get("prefix")  # nothing is left to write if it is complete
        for step in self.sample(condition, **settings):
            tokens = step.tokens
        assert tokens is not None
        return VisualTokens(ids=tokens.ids)

    @torch.no_grad()
    def branch(
        self,
        condition: Tensor | TextCondition,
        num_branches: int,
        *,
        branch_at: int | None = None,
        distinct: bool = True,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators = None,
        num_tokens: int | None = None,
        prefix: VisualTokens | None = None,
        null_condition: TextCondition | None = None,
        class_zero_guidance: bool = False,
    ) -> Branches:
        """Several continuations of each image from a common beginning, which is computed once.

        Args:
            condition: see `sample`.
            num_branches: M continuations of each image.
            branch_at: tokens that the branches of an image share (at least those of the prefix); None is all but the
                last, as the authors' `num_samples` does. 0 gives independent samples.
            distinct: the branches of an image differ in the first token after that (draws without replacement; at
                temperature 0 the M most likely). There must be that many tokens to choose from.
            guidance_scale, temperature, top_k, top_p, generator, num_tokens, prefix: see `sample`.
            null_condition, class_zero_guidance: see `sample`.

        Returns:
            Tokens [B * M, n], the branches of an image side by side, and the log-probability of each.

        Raises:
            InvalidInputError: an argument out of range.
        """
        settings = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        writer = self._begin(condition, prefix, num_tokens, null_condition, class_zero_guidance, settings, generator)
        start = writer.ids.shape[1]
        fork = max(writer.total - 1, start) if branch_at is None else branch_at
        if isinstance(num_branches, bool) or not isinstance(num_branches, int) or num_branches < 1:
            raise InvalidInputError(f"num_branches must be an integer >= 1; got {num_branches!r}")
        if not start <= fork < writer.total:
            raise InvalidInputError(
                f"branch_at must lie in {start}..{writer.total - 1}, from the end of the prefix to before the last "
                f"token; got {fork}"
            )
        choice: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "generator": generator,
        }
        writer.extend(fork, choice, log_probs=True)
        writer.fork(num_branches)
        if distinct:
            writer.write(writer.choose_distinct(num_branches, **choice), choice=choice, last=fork + 1 == writer.total)
        writer.extend(writer.total, choice, log_probs=True)
        return Branches(VisualTokens(ids=writer.ids), writer.log_probs)

    @torch.no_grad()
    def search(
        self,
        condition: Tensor | TextCondition,
        score: Score,
        *,
        num_beams: int = 4,
        num_candidates: int = 4,
        schedule: Sequence[int] | None = None,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators = None,
        num_tokens: int | None = None,
        prefix: VisualTokens | None = None,
        null_condition: TextCondition | None = None,
    ) -> SearchResult:
        """Beam search over prefixes with any score, such as that of a verifier on decoded images.

        At each length of the schedule every beam has grown into `num_candidates` samples, which share its cache; the
        score sees all of them, and the best `num_beams` of an image go on. Best of n is one stop at the full length:
        `schedule=[num_tokens], num_beams=1, num_candidates=n`.

        Args:
            condition: see `sample`.
            score: see `Score`.
            num_beams: prefixes of an image that survive a stop.
            num_candidates: samples that each of them grows into.
            schedule: lengths at which to stop, increasing; None is 1, 2, 4, ... and the last one. The last length is
                always added.
            guidance_scale, temperature, top_k, top_p, generator, num_tokens, prefix, null_condition: see `sample`.

        Returns:
            The best candidate of each image and its score, and what survived each stop.

        Raises:
            InvalidInputError: an argument out of range, or scores of another shape or NaN.
        """
        settings = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        for name, value in (("num_beams", num_beams), ("num_candidates", num_candidates)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{name} must be an integer >= 1; got {value!r}")
        writer = self._begin(condition, prefix, num_tokens, null_condition, False, settings, generator)
        start = writer.ids.shape[1]
        powers = [1 << power for power in range(writer.total.bit_length())]
        stops = sorted({int(stop) for stop in (powers if schedule is None else schedule)} | {writer.total})
        if schedule is None:
            stops = [stop for stop in stops if stop > start]
        if not stops or stops[0] <= start or stops[-1] > writer.total:
            raise InvalidInputError(
                f"the schedule must lie in {start + 1}..{writer.total} (after the prefix, up to num_tokens); "
                f"got {stops}"
            )
        choice: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "generator": generator,
        }
        batch = len(condition)
        history = []
        best = torch.zeros(batch, 1, device=self.device)
        for stop in stops:
            writer.fork(num_candidates)
            writer.extend(stop, choice)
            images = torch.arange(batch, device=self.device).repeat_interleave(writer.rows)
            found = torch.as_tensor(score(VisualTokens(ids=writer.ids.clone()), images), device=self.device).float()
            if found.shape != images.shape or bool(found.isnan().any()):
                raise InvalidInputError(
                    f"score must return {len(images)} numbers, one a candidate; got {list(found.shape)}"
                    + (" with NaN" if bool(found.isnan().any()) else "")
                )
            kept = min(num_beams if stop < writer.total else 1, writer.rows)
            best, places = found.view(batch, -1).sort(dim=1, descending=True, stable=True)
            best, places = best[:, :kept], places[:, :kept]
            offsets = torch.arange(batch, device=self.device)[:, None] * writer.rows
            writer.select((places + offsets).flatten(), kept)
            history.append((VisualTokens(ids=writer.ids.clone()), best.flatten()))
        return SearchResult(VisualTokens(ids=writer.ids), best[:, 0], history)

    # ------------------------------------------------------------------------------------------- the authors' files
    @classmethod
    def from_official(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], config: str | Mapping[str, Any] | None = None
    ) -> FlexTokAR:
        """Load a published generator (see `VistokModel.from_official`).

        What shapes show is read from the weights, because the published configurations are no plain lists of arguments;
        only the number of heads (64 channels each), the norm's epsilon and fixed tables are taken as usual.

        Args:
            source: `model.safetensors`, or a state dict.
            config: a published name, or constructor arguments, which count more than what is read; None reads all.
        """
        state = dict(source) if isinstance(source, Mapping) else read_state_dict(source)
        known = cls.infer_config(cls.unwrap_official(state))
        if isinstance(config, str):
            if config not in cls.published:
                return super().from_official(state, config)  # raises, naming the nearest
            known = {**known, **cls.published[config].config}
        else:
            known |= dict(config or {})
        return super().from_official(state, known)

    @classmethod
    def infer_config(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Constructor arguments that the shapes and names of official weights show; {} if these are none."""
        return names.infer_config(state)

    @classmethod
    def unwrap_official(cls, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The flat state dict, without the tokenizer and the text encoder that may lie beside it."""
        for key in ("model", "state_dict"):
            if isinstance(state.get(key), Mapping):
                return cls.unwrap_official(state[key])
        kept = {key.removeprefix("model."): value for key, value in state.items()}
        return {key: value for key, value in kept.items() if "image_tokenizer" not in key and "t5_embedder" not in key}

    @classmethod
    def rename_official(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official names to ours; parts of one product are joined, and captions get an unset null feature."""
        return names.rename(state)

    @classmethod
    def diagnose_official(cls, missing: list[str], unexpected: list[str]) -> str | None:
        """Recognise the tokenizer."""
        if any("enc_transformer" in key for key in unexpected):
            return "This is a FlexTok tokenizer; load it with FlexTok."
        return None
