"""DeLeaker: reweighting FLUX's attention while it samples, against leakage between similar entities.

Source: "DeLeaker: Dynamic Inference-Time Reweighting For Semantic Leakage Mitigation", arXiv 2510.15015.

Letters: B batch, H heads, T text tokens, I image tokens, E entities, C = T + I.

The blocks are counted over the whole sampling, `c = 57 * step + block` with single blocks from 19 on (also for smaller
models). Each block's attention tells where an entity is drawn; image tokens of one entity are then cut off from the
words and the image tokens of the others, and tied to their own words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional

from vistok.attach import Attachable, Handle
from vistok.errors import InvalidInputError
from vistok.nn.prompts import describe_pipeline
from vistok.nn.spans import covered_tokens, find_subject, token_spans

__all__ = ["DeLeaker", "DeLeakerSettings"]

_BLOCKS, _DOUBLE = 57, 19


@dataclass(frozen=True)
class DeLeakerSettings:
    """Defaults are the authors', tuned for FLUX.1-dev at 20 steps, guidance 3.5 and 512 pixels.

    Attributes:
        aggregate_from: first block count whose attention enters the running mean.
        aggregate_until: the last one.
        intervene_from: first block count that is changed.
        intervene_until: the last one.
        text_threshold: an image token belongs to an entity above mean + this many standard deviations.
        image_threshold: the same for attention between two entities' image tokens.
        strength: factor on the logits of an entity's image tokens to its own words. It weakens negative logits, as in
            the authors' code.
        history: judge by the running mean instead of the block at hand.
        smoothing: clean the masks by opening and closing on the square grid of image tokens.
        cut_image_image: cut strong attention between two entities' image tokens.
        strengthen: tie image tokens to their own entity's words.
        weaken: cut them off from the other entities' words.
        cut_text_text: cut the first words of two entities off from each other.
    """

    aggregate_from: int = 12
    aggregate_until: int = 684
    intervene_from: int = 18
    intervene_until: int = 1140
    text_threshold: float = 1.0
    image_threshold: float = 1.0
    strength: float = 1.2
    history: bool = True
    smoothing: bool = True
    cut_image_image: bool = True
    strengthen: bool = True
    weaken: bool = True
    cut_text_text: bool = False


@dataclass
class _Run:
    """What one sampling has seen so far: calls of each block, and the running mean of the entities' maps [B, E, I]."""

    calls: dict[int, int] = field(default_factory=dict)
    mean: Tensor | None = None
    count: int = 0


def _dilate(mask: Tensor) -> Tensor:
    return functional.max_pool2d(mask, 3, stride=1, padding=1)


def _erode(mask: Tensor) -> Tensor:
    # What lies outside the grid erodes nothing.
    return 1 - _dilate(1 - mask)


def smoothed(mask: Tensor) -> Tensor:
    """Opening, then a closing of two dilations and two erosions, with a 3x3 square.

    Args:
        mask: bool [..., I]; returned as it is where I is no square.
    """
    side = round(mask.shape[-1] ** 0.5)
    if side * side != mask.shape[-1]:
        return mask
    grid = mask.float().reshape(-1, 1, side, side)
    grid = _dilate(_erode(grid))
    grid = _erode(_erode(_dilate(_dilate(grid))))
    return (grid > 0.5).reshape(mask.shape)


class DeLeaker(Attachable):
    """Keeps similar entities apart in FLUX ("a cat and a cheetah").

        with DeLeaker(pipe, "a cat and a cheetah", ["cat", "cheetah"], max_sequence_length=256).attached(pipe):
            image = pipe("a cat and a cheetah", num_inference_steps=20, max_sequence_length=256).images[0]

    Materialises the attention of changed blocks: memory grows with heads * (text + image tokens)^2. Two passes a
    step (`true_cfg_scale` above 1) would be counted as two steps and are not supported.

    Args:
        pipe: a FLUX pipeline whose tokenizer finds the entities; None if `entities` are token ranges.
        prompt: the prompt of the image.
        entities: words of the prompt, or a mapping from name to (first, one after last) T5 token.
        settings: see there.
        max_sequence_length: T5 positions, as given to the pipeline; a range beyond is refused.
    """

    def __init__(
        self,
        pipe: Any,
        prompt: str,
        entities: Sequence[str] | Mapping[str, tuple[int, int]],
        settings: DeLeakerSettings | None = None,
        *,
        max_sequence_length: int = 512,
    ) -> None:
        self.settings = settings or DeLeakerSettings()
        if isinstance(entities, Mapping):
            self.ranges = {name: (int(first), int(last)) for name, (first, last) in entities.items()}
        else:
            slot = describe_pipeline(pipe, max_sequence_length=max_sequence_length).slot("t5_xxl")
            spans = token_spans(prompt, slot.tokenizer)
            self.ranges = {}
            for name in entities:
                places = covered_tokens(spans, find_subject(prompt, name, 0), slot.length)
                self.ranges[name] = (places[0], places[-1] + 1)
        for name, (first, last) in self.ranges.items():
            if not 0 <= first < last <= max_sequence_length:
                raise InvalidInputError(
                    f"the tokens ({first}, {last}) of {name!r} lie outside 0..{max_sequence_length}"
                )
        if len(self.ranges) < 2:
            raise InvalidInputError("leakage is between entities: give at least two")
        self._run = _Run()
        self._first: int = 0

    def reset(self) -> None:
        """Forget the last sampling. Happens by itself when the first block sees a time it has seen before."""
        self._run = _Run()

    def _attach(self, model: Any, handle: Handle) -> None:
        network = getattr(model, "transformer", model)
        if type(network).__name__ != "FluxTransformer2DModel":
            raise InvalidInputError(f"DeLeaker works on FLUX, not on a {type(network).__name__}")
        self.reset()
        blocks = [
            *enumerate(network.transformer_blocks),
            *((_DOUBLE + index, block) for index, block in enumerate(network.single_transformer_blocks)),
        ]
        for offset, block in blocks:
            before = block.attn.processor
            processor = _DeLeakerProcessor(self, offset, getattr(before, "_attention_backend", None))
            block.attn.processor = processor
            handle.undo_with(setattr, block.attn, "processor", before)
        if model is not network:  # each pipeline call is one sampling
            handle.hook(network.register_forward_pre_hook(self._new_sampling(model), with_kwargs=True))

    def _new_sampling(self, pipe: Any) -> Any:
        def look(network: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            steps = getattr(pipe, "_num_timesteps", None)
            first = self._run.calls.get(0, 0)
            if steps is not None and first >= steps:
                self.reset()

        return look

    def attention(
        self, offset: int, query: Tensor, key: Tensor, value: Tensor, text_tokens: int, mask: Tensor | None
    ) -> Tensor | None:
        """The changed attention [B, C, H, D] of one block, or None where the block is left alone.

        Args:
            offset: of the block.
            query: [B, C, H, D], as key and value, text first.
            text_tokens: T.
            mask: attention mask of the pipeline, if any.
        """
        settings, run = self.settings, self._run
        step = run.calls.get(offset, 0)
        run.calls[offset] = step + 1
        count = _BLOCKS * step + offset
        aggregate = settings.history and settings.aggregate_from <= count <= settings.aggregate_until
        intervene = settings.intervene_from <= count <= settings.intervene_until
        if not aggregate and not intervene:
            return None
        scale = query.shape[-1] ** -0.5
        logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
        if mask is not None:
            logits = logits + mask if mask.is_floating_point() else logits.masked_fill(~mask, float("-inf"))
        weights = logits.softmax(dim=-1)
        maps = self._maps(weights, text_tokens)
        if aggregate:
            if run.mean is None:
                run.mean, run.count = maps.float(), 1
            else:
                run.count += 1
                run.mean = run.mean + (maps.float() - run.mean) / run.count
        if intervene:
            use = run.mean if settings.history and count > settings.aggregate_from and run.mean is not None else maps
            weights = self._reweighted(logits, weights, use.to(logits), text_tokens)
        return torch.einsum("bhqk,bkhd->bqhd", weights.to(value.dtype), value)

    def _maps(self, weights: Tensor, text_tokens: int) -> Tensor:
        """[B, E, I]: attention of the image tokens to each entity's words, averaged over words, then heads."""
        image = weights[:, :, text_tokens:]
        return torch.stack(
            [image[..., first:last].mean(dim=-1).mean(dim=1) for first, last in self.ranges.values()], dim=1
        )

    def _reweighted(self, logits: Tensor, weights: Tensor, maps: Tensor, text_tokens: int) -> Tensor:
        settings = self.settings
        limit = maps.mean(dim=-1, keepdim=True) + settings.text_threshold * maps.std(dim=-1, keepdim=True)
        masks = maps > limit
        if settings.smoothing:
            masks = smoothed(masks)
        logits = logits.clone()
        ranges = list(self.ranges.values())
        rows = []
        for row in range(logits.shape[0]):  # masks differ from image to image
            rows.append(self._reweighted_row(logits[row], weights[row], masks[row], ranges, text_tokens))
        return torch.stack(rows)

    def _reweighted_row(
        self, logits: Tensor, weights: Tensor, masks: Tensor, ranges: Sequence[tuple[int, int]], text_tokens: int
    ) -> Tensor:
        settings, cut = self.settings, float("-inf")
        image = logits[:, text_tokens:]
        for one, two in combinations(range(len(ranges)), 2):
            (first_one, last_one), (first_two, last_two) = ranges[one], ranges[two]
            mask_one, mask_two = masks[one], masks[two]
            if settings.weaken:
                image[:, mask_one, first_two:last_two] = cut
                image[:, mask_two, first_one:last_one] = cut
            if settings.strengthen:
                image[:, mask_one, first_one:last_one] *= settings.strength
                image[:, mask_two, first_two:last_two] *= settings.strength
            if settings.cut_text_text:
                logits[:, first_one, first_two] = cut
                logits[:, first_two, first_one] = cut
            if settings.cut_image_image:
                between = weights[:, text_tokens:, text_tokens:].mean(dim=0)
                for rows, columns in ((mask_one, mask_two), (mask_two, mask_one)):
                    chosen = between * rows[:, None] * columns[None]
                    positive = chosen[chosen > 0]
                    if positive.numel() > 1:
                        limit = positive.mean() + settings.image_threshold * positive.std()
                        image[:, :, text_tokens:].masked_fill_((chosen > limit)[None], cut)
            weights = logits.softmax(dim=-1)
        return weights


class _DeLeakerProcessor:
    """The stock FLUX attention with `DeLeaker.attention` in the place of the dispatch."""

    _parallel_config = None

    def __init__(self, owner: DeLeaker, offset: int, backend: Any) -> None:
        self.owner, self.offset = owner, offset
        self._attention_backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, attn.head_dim))
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            text = [
                projection(encoder_hidden_states).unflatten(-1, (-1, attn.head_dim))
                for projection in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            ]
            query = torch.cat([attn.norm_added_q(text[0]), query], dim=1)
            key = torch.cat([attn.norm_added_k(text[1]), key], dim=1)
            value = torch.cat([text[2], value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        tokens = encoder_hidden_states.shape[1] if encoder_hidden_states is not None else self.owner._first
        if encoder_hidden_states is not None:
            self.owner._first = tokens  # single blocks run on the joined sequence
        result = self.owner.attention(self.offset, query, key, value, tokens, attention_mask)
        if result is None:
            result = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=attention_mask,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        result = result.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return result
        text_result, image_result = result[:, :tokens], result[:, tokens:]
        image_result = attn.to_out[1](attn.to_out[0](image_result.contiguous()))
        return image_result, attn.to_add_out(text_result.contiguous())
