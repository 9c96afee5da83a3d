"""The text side of diffusers pipelines, one encoder at a time: tokens, states, and how they make up `prompt_embeds`.

Letters: R rows (prompts, or images), N token positions of an encoder, D its width, P width of its pooled vector.

Controllers that edit text states derive from `PromptController`: it encodes the prompts of Stable Diffusion 1.x/2.x,
SDXL, SD3, FLUX and the Stable Cascade prior once (prompts and negative prompts in one batch an encoder), lets each
controller edit the states of the encoders that it knows, puts them together as the pipeline takes them, and swaps them
during sampling through `callback_on_step_end` where a controller acts on a part of the steps only.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor
from torch.nn import functional

from vistok.attach import Attachable, Handle
from vistok.errors import InvalidInputError
from vistok.nn.spans import Subject, TokenSpans, covered_tokens, find_subject, token_spans

__all__ = [
    "CombinedControllers",
    "EncodedPrompts",
    "PipelineText",
    "PromptController",
    "SwitchPrompts",
    "TextEncoderSlot",
    "clip_states",
    "describe_pipeline",
    "encode_prompts",
    "pad_ids",
    "t5_states",
]


def _final_norm(model: Any) -> Any:
    inner = getattr(model, "text_model", None) or getattr(model, "encoder", None) or model
    if hasattr(inner, "final_layer_norm"):
        return inner.final_layer_norm
    return model.final_layer_norm


def clip_states(
    model: Any, ids: Tensor, *, layer: str, skip: int | None = None, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token states and pooled vector of a CLIP text encoder.

    Args:
        model: `CLIPTextModel` or `CLIPTextModelWithProjection`.
        ids: int64 [R, N].
        layer: `final`: last layer and final norm (Stable Diffusion; with `skip` the layer that many earlier, normed);
            `penultimate`: one layer before the last, and `skip` more, not normed (SDXL, SD3); `last`: the last layer,
            not normed (Stable Cascade).
        skip: layers to leave out, or None.
        attention_mask: [R, N] or None.

    Returns:
        (states [R, N, D], pooled [R, P]): the pooled vector is projected where the model has a projection.
    """
    output = model(ids, attention_mask=attention_mask, output_hidden_states=True, return_dict=True)
    pooled = output.text_embeds if getattr(output, "text_embeds", None) is not None else output.pooler_output
    if layer == "final":
        if skip is None:
            return output.last_hidden_state, pooled
        return _final_norm(model)(output.hidden_states[-(skip + 1)]), pooled
    first = {"penultimate": 2, "last": 1}[layer]
    return output.hidden_states[-(first + (skip or 0))], pooled


def t5_states(model: Any, ids: Tensor, *, skip: int | None = None) -> Tensor:
    """Token states [R, N, D] of a T5 encoder, without an attention mask, as SD3 and FLUX take them.

    Args:
        model: `T5EncoderModel`.
        ids: int64 [R, N].
        skip: None for the output; k for the final norm of the k-th last hidden state (which norms twice at k = 0).
    """
    output = model(ids, output_hidden_states=skip is not None, return_dict=True)
    if skip is None:
        return output.last_hidden_state
    return model.encoder.final_layer_norm(output.hidden_states[-(skip + 1)])


def pad_ids(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), both int64 [R, N]: texts cut or padded to `length`."""
    encoded = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt", verbose=False
    )
    return encoded["input_ids"], encoded["attention_mask"]


@dataclass(frozen=True)
class TextEncoderSlot:
    """One text encoder of a pipeline.

    Attributes:
        key: `oai_clip_vit_l`, `openclip_h`, `openclip_g` or `t5_xxl`: what a delta for it is filed under.
        model: the encoder.
        tokenizer: its tokenizer.
        length: N, positions that it is padded to.
        tokens: whether its token states reach the denoiser.
        pooled: whether its pooled vector does.
        kind: `clip` or `t5`.
        layer: for CLIP, see `clip_states`.
        masked: whether the pipeline passes the attention mask.
    """

    key: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    length: int
    tokens: bool = True
    pooled: bool = False
    kind: str = "clip"
    layer: str = "penultimate"
    masked: bool = False

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.d_model if self.kind == "t5" else self.model.config.hidden_size)

    def states(
        self, ids: Tensor, *, skip: int | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(token states [R, N, D], pooled [R, P] or None) of token ids [R, N]."""
        ids = ids.to(self.model.device)
        if self.kind == "t5":
            return t5_states(self.model, ids, skip=skip), None
        if attention_mask is not None:
            attention_mask = attention_mask.to(ids.device)
        return clip_states(self.model, ids, layer=self.layer, skip=skip, attention_mask=attention_mask)

    def encode(self, texts: Sequence[str], *, skip: int | None = None) -> tuple[Tensor, Tensor | None]:
        """(token states [R, N, D], pooled [R, P] or None) of texts, as the pipeline itself encodes them."""
        ids, mask = pad_ids(self.tokenizer, texts, self.length)
        return self.states(ids, skip=skip, attention_mask=mask if self.masked else None)


@dataclass(frozen=True)
class PipelineText:
    """What the text side of a pipeline consists of.

    Attributes:
        family: `sd`, `sdxl`, `sd3`, `flux` or `cascade`.
        encoders: the encoders in the pipeline's order.
        zero_negative: an absent negative prompt is zeros instead of the empty prompt (SDXL).
        joint_width: width of SD3's and FLUX's text states; SD3 pads CLIP states to it.
        t5_length: positions of SD3's T5 part (zeros where that encoder is left out).
    """

    family: str
    encoders: tuple[TextEncoderSlot, ...]
    zero_negative: bool = False
    joint_width: int = 0
    t5_length: int = 0

    def slot(self, key: str) -> TextEncoderSlot:
        """The encoder of that name."""
        for encoder in self.encoders:
            if encoder.key == key:
                return encoder
        raise InvalidInputError(
            f"this {self.family} pipeline has no text encoder {key!r}; it has {', '.join(self.keys) or 'none'}"
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the encoders."""
        return tuple(encoder.key for encoder in self.encoders)

    def assemble(self, states: Mapping[str, Tensor], pooled: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(`prompt_embeds`, `pooled_prompt_embeds` or None) from the encoders' states.

        Args:
            states: key -> [R, N, D] of every encoder whose tokens reach the denoiser.
            pooled: key -> [R, P] of every encoder whose pooled vector does.
        """
        tokens = [states[slot.key] for slot in self.encoders if slot.tokens]
        vectors = [pooled[slot.key] for slot in self.encoders if slot.pooled]
        vector = torch.cat(vectors, dim=-1) if vectors else None
        if self.family == "cascade":
            vector = None if vector is None else vector[:, None]
        if self.family != "sd3":
            return torch.cat(tokens, dim=-1) if len(tokens) > 1 else tokens[0], vector
        clip = torch.cat([states[slot.key] for slot in self.encoders if slot.kind == "clip"], dim=-1)
        clip = functional.pad(clip, (0, self.joint_width - clip.shape[-1]))
        t5 = next((states[slot.key] for slot in self.encoders if slot.kind == "t5"), None)
        if t5 is None:
            t5 = clip.new_zeros(clip.shape[0], self.t5_length, self.joint_width)
        return torch.cat([clip, t5], dim=-2), vector


def _clip_key(model: Any) -> str:
    # OpenAI's CLIP uses the quick GELU, OpenCLIP (SD 2.x) the exact one.
    return "oai_clip_vit_l" if model.config.hidden_act == "quick_gelu" else "openclip_h"


def describe_pipeline(pipe: Any, *, max_sequence_length: int | None = None) -> PipelineText:
    """The text encoders of a diffusers pipeline.

    Args:
        pipe: Stable Diffusion 1.x/2.x, SDXL, SD3/3.5, FLUX, or the Stable Cascade prior (any variant with the same
            components: image to image, inpainting, ControlNet).
        max_sequence_length: T5 positions; None for the pipeline's own default (256 for SD3, 512 for FLUX).

    Raises:
        InvalidInputError: for a pipeline of another family, or one that has lost its text encoders.
    """
    parts = getattr(pipe, "components", {})

    def slot(suffix: str, key: str, **settings: Any) -> list[TextEncoderSlot]:
        model, tokenizer = parts.get(f"text_encoder{suffix}"), parts.get(f"tokenizer{suffix}")
        if model is None or tokenizer is None:
            return []
        return [TextEncoderSlot(key, model, tokenizer, **settings)]

    def clip_length(suffix: str) -> int:
        tokenizer = parts.get(f"tokenizer{suffix}")
        return int(tokenizer.model_max_length) if tokenizer is not None else 77

    encoders: list[TextEncoderSlot]
    transformer = parts.get("transformer")
    if "text_encoder_3" in parts and transformer is not None:
        length = max_sequence_length or 256
        shared = int(getattr(pipe, "tokenizer_max_length", 77))
        encoders = [
            *slot("", "oai_clip_vit_l", length=shared, pooled=True),
            *slot("_2", "openclip_g", length=shared, pooled=True),
            *slot("_3", "t5_xxl", length=length, kind="t5"),
        ]
        family = PipelineText(
            "sd3", tuple(encoders), joint_width=int(transformer.config.joint_attention_dim), t5_length=length
        )
        needed = {"oai_clip_vit_l", "openclip_g"}
    elif transformer is not None and "text_encoder_2" in parts and _is_t5(parts["text_encoder_2"]):
        length = max_sequence_length or 512
        encoders = [
            *slot(
                "",
                "oai_clip_vit_l",
                length=int(getattr(pipe, "tokenizer_max_length", 77)),
                tokens=False,
                pooled=True,
                layer="final",
            ),
            *slot("_2", "t5_xxl", length=length, kind="t5"),
        ]
        family = PipelineText("flux", tuple(encoders), joint_width=int(transformer.config.joint_attention_dim))
        needed = {"oai_clip_vit_l", "t5_xxl"}
    elif "prior" in parts and "text_encoder" in parts:
        encoders = slot("", "openclip_g", length=clip_length(""), pooled=True, layer="last", masked=True)
        family, needed = PipelineText("cascade", tuple(encoders)), {"openclip_g"}
    elif "unet" in parts and "text_encoder_2" in parts:
        encoders = [
            *slot("", "oai_clip_vit_l", length=clip_length("")),
            *slot("_2", "openclip_g", length=clip_length("_2"), pooled=True),
        ]
        zero = bool(getattr(pipe.config, "force_zeros_for_empty_prompt", False))
        family, needed = PipelineText("sdxl", tuple(encoders), zero_negative=zero), {"openclip_g"}
    elif "unet" in parts and "text_encoder" in parts:
        model = parts["text_encoder"]
        if model is not None and not (hasattr(model.config, "hidden_act") and hasattr(model.config, "hidden_size")):
            raise InvalidInputError(
                f"{type(pipe).__name__} conditions on a {type(model).__name__}; expected a CLIP text encoder"
            )
        key = "oai_clip_vit_l" if model is None else _clip_key(model)
        masked = model is not None and bool(getattr(model.config, "use_attention_mask", False))
        encoders = slot("", key, length=clip_length(""), layer="final", masked=masked)
        family, needed = PipelineText("sd", tuple(encoders)), {key}
    else:
        raise InvalidInputError(
            f"{type(pipe).__name__} is none of the pipelines whose text states are known; expected Stable Diffusion "
            "1.x/2.x, SDXL, Stable Diffusion 3, FLUX or the Stable Cascade prior"
        )
    missing = needed - set(family.keys)
    if missing:
        raise InvalidInputError(
            f"{type(pipe).__name__} has no text encoder or tokenizer for {', '.join(sorted(missing))}; "
            "load the pipeline with its text encoders"
        )
    return family


def _is_t5(model: Any) -> bool:
    return (
        model is None
        or "t5" in str(getattr(model.config, "model_type", "")).lower()
        or hasattr(model.config, "d_model")
    )


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts and their states in every encoder of a pipeline.

    Attributes:
        text: the pipeline's encoders.
        prompts: R prompts, one a row.
        states: key -> [R, N, D].
        pooled: key -> [R, P].
        lone: texts that controllers asked for (`PromptController.texts`), encoded in the same pass.
    """

    text: PipelineText
    prompts: tuple[str, ...]
    states: Mapping[str, Tensor]
    pooled: Mapping[str, Tensor]
    lone: EncodedPrompts | None = field(default=None, repr=False)
    _spans: dict[tuple[str, str], TokenSpans] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def spans(self, key: str, row: int) -> TokenSpans:
        """The tokens of a row's prompt in one encoder (tokenised once a prompt)."""
        name = (key, self.prompts[row])
        if name not in self._spans:
            self._spans[name] = token_spans(self.prompts[row], self.text.slot(key).tokenizer)
        return self._spans[name]

    def positions(self, key: str, row: int, subject: Subject, occurrence: int | None = None) -> list[int]:
        """Token positions of a subject in one encoder's sequence.

        Raises:
            InvalidInputError: if the subject does not occur or is truncated away.
        """
        characters = find_subject(self.prompts[row], subject, occurrence)
        return covered_tokens(self.spans(key, row), characters, self.text.slot(key).length)

    def lone_states(self, key: str, text: str) -> Tensor:
        """States [N, D] of another text, encoded by itself at the same length."""
        if self.lone is not None and text in self.lone.prompts:
            return self.lone.states[key][self.lone.prompts.index(text)]
        with torch.no_grad():
            return self.text.slot(key).encode([text])[0][0]

    def expand(self, count: int) -> EncodedPrompts:
        """One prompt repeated over `count` rows."""
        if count == len(self):
            return self
        if len(self) != 1:
            raise InvalidInputError(f"{len(self)} prompts cannot fill {count} rows; give one prompt, or {count}")
        return EncodedPrompts(
            self.text,
            self.prompts * count,
            {key: value.expand(count, -1, -1) for key, value in self.states.items()},
            {key: value.expand(count, -1) for key, value in self.pooled.items()},
            self.lone,
            self._spans,
        )

    def repeat(self, times: int) -> EncodedPrompts:
        """Each row `times` times in succession, as `num_images_per_prompt` does."""
        if times == 1:
            return self
        return EncodedPrompts(
            self.text,
            tuple(prompt for prompt in self.prompts for _ in range(times)),
            {key: value.repeat_interleave(times, dim=0) for key, value in self.states.items()},
            {key: value.repeat_interleave(times, dim=0) for key, value in self.pooled.items()},
            self.lone,
            self._spans,
        )

    def with_states(
        self, states: Mapping[str, Tensor] | None = None, pooled: Mapping[str, Tensor] | None = None
    ) -> EncodedPrompts:
        """The same prompts with other states."""
        return EncodedPrompts(
            self.text,
            self.prompts,
            dict(self.states if states is None else states),
            dict(self.pooled if pooled is None else pooled),
            self.lone,
            self._spans,
        )

    def assemble(self) -> tuple[Tensor, Tensor | None]:
        """(`prompt_embeds`, `pooled_prompt_embeds` or None)."""
        return self.text.assemble(self.states, self.pooled)


@torch.no_grad()
def encode_prompts(
    text: PipelineText,
    prompts: Sequence[str],
    extra: Sequence[str] = (),
    lone: Sequence[str] = (),
    *,
    clip_skip: int | None = None,
) -> tuple[EncodedPrompts, EncodedPrompts | None]:
    """Encode prompts and other texts in one pass an encoder; each different text is encoded once.

    Args:
        text: the pipeline's encoders.
        prompts: R prompts.
        extra: negative prompts; they never skip layers.
        lone: texts for `EncodedPrompts.lone_states`.
        clip_skip: CLIP layers to leave out.

    Returns:
        The encoded prompts, and the encoded extra texts or None if there are none.
    """
    groups = {"prompts": list(prompts), "lone": list(dict.fromkeys(lone)), "extra": list(extra)}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in groups}
    pooled: dict[str, dict[str, Tensor]] = {name: {} for name in groups}
    for slot in text.encoders:
        skip = clip_skip if slot.kind == "clip" else None
        # With a skip the negative prompts take another layer, so they need a pass of their own.
        passes = (
            [(("prompts", "lone", "extra"), None)]
            if skip is None
            else [(("prompts", "lone"), skip), (("extra",), None)]
        )
        for names, layers in passes:
            joined = [one for name in names for one in groups[name]]
            if not joined:
                continue
            tokens, vector = _encode_unique(slot, joined, layers)
            start = 0
            for name in names:
                stop = start + len(groups[name])
                states[name][slot.key] = tokens[start:stop]
                if vector is not None and slot.pooled:
                    pooled[name][slot.key] = vector[start:stop]
                start = stop
    made = {
        name: EncodedPrompts(text, tuple(groups[name]), states[name], pooled[name]) for name in groups if groups[name]
    }
    first = made["prompts"]
    return EncodedPrompts(text, first.prompts, first.states, first.pooled, made.get("lone")), made.get("extra")


def _encode_unique(slot: TextEncoderSlot, texts: Sequence[str], skip: int | None) -> tuple[Tensor, Tensor | None]:
    """Each different text is encoded once."""
    unique = list(dict.fromkeys(texts))
    tokens, vector = slot.encode(unique, skip=skip)
    if len(unique) == len(texts):
        return tokens, vector
    rows = torch.tensor([unique.index(text) for text in texts], device=tokens.device)
    return tokens[rows], None if vector is None else vector[rows]


class SwitchPrompts(PipelineCallback):
    """Replaces the prompt's embeddings during sampling, from inside `callback_on_step_end`.

    Args:
        segments: (step fraction in [0, 1], prompt_embeds [R, N, D], pooled [R, P] or None), in order of the fraction;
            from `int(round(fraction * steps))` steps on the segment holds.
        family: of the pipeline, see `PipelineText`.
        also: a callback of the caller, called after the switch.
        also_inputs: names of the tensors that it asked for.
    """

    config_name = "scheduler_config.json"

    def __init__(
        self,
        segments: Sequence[tuple[float, Tensor, Tensor | None]],
        family: str,
        also: Callable[..., Any] | None = None,
        also_inputs: Sequence[str] = (),
    ) -> None:
        self.segments = list(segments)
        self.family = family
        self.also = also
        self.also_inputs = list(also_inputs)

    _NAMES: ClassVar[dict[str, tuple[str, str | None]]] = {
        "sd": ("prompt_embeds", None),
        "sdxl": ("prompt_embeds", "add_text_embeds"),
        "sd3": ("prompt_embeds", "pooled_prompt_embeds"),
        "flux": ("prompt_embeds", None),
        "cascade": ("text_encoder_hidden_states", None),
    }

    @property
    def tensor_inputs(self) -> list[str]:
        """Names of the tensors that the pipeline hands to this callback."""
        names = [name for name in self._NAMES[self.family] if name is not None]
        return list(dict.fromkeys([*names, *self.also_inputs]))

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called after each step."""
        steps = int(pipeline.num_timesteps)
        # The first step has begun already when this is called first.
        due = [segment for segment in self.segments if max(1, round(segment[0] * steps)) == step_index + 1]
        if due:
            _, embeds, pooled = due[-1]
            tokens_name, pooled_name = self._NAMES[self.family]
            callback_kwargs[tokens_name] = self._written(pipeline, callback_kwargs[tokens_name], embeds)
            if pooled_name is not None and pooled is not None:
                callback_kwargs[pooled_name] = self._written(pipeline, callback_kwargs[pooled_name], pooled)
        if self.also is not None:
            changed = self.also(pipeline, step_index, timesteps, callback_kwargs)
            callback_kwargs = changed if changed is not None else callback_kwargs
        return callback_kwargs

    def _written(self, pipeline: Any, current: Tensor, new: Tensor) -> Tensor:
        """`current` with its conditional rows replaced; unconditional rows stay."""
        guided = self.family != "flux" and bool(getattr(pipeline, "do_classifier_free_guidance", False))
        # A guidance cut-off during sampling has dropped the unconditional half already.
        guided = guided and current.shape[0] % 2 == 0 and current.shape[0] >= 2 * new.shape[0]
        rows = current.shape[0] // 2 if guided else current.shape[0]
        if rows % new.shape[0]:
            raise InvalidInputError(f"the pipeline samples {rows} rows; the steered prompts fill {new.shape[0]}")
        new = new.to(device=current.device, dtype=current.dtype).repeat_interleave(rows // new.shape[0], dim=0)
        if self.family == "cascade":  # its loop ignores what the callback returns, and keeps the condition first
            current[:rows] = new
            return current
        return torch.cat([current[:rows], new]) if guided else new


class PromptController(Attachable):
    """A controller that edits the text states of a pipeline's prompts.

        kwargs = controller.prompt_kwargs(pipe, "a circle and a star")
        image = pipe(**kwargs).images[0]

        with controller.attached(pipe):           # the same, behind the ordinary call
            image = pipe("a circle and a star").images[0]

    Controllers that are used together act in ascending `order`: replacements (leakage, 0) before additions
    (attribute directions, 10), so that a delta lands on the replaced states.

    Subclasses override `edit`, and `rows` where they spread one prompt over several images.
    """

    order: ClassVar[int] = 0
    # The part of the steps in which the controller acts.
    start: float = 0.0
    stop: float = 1.0

    def edit(self, prompts: EncodedPrompts, fraction: float) -> EncodedPrompts:
        """The prompts with edited states, as they hold from this fraction of the steps on."""
        raise TypeError(f"{type(self).__name__} does not define edit(prompts, fraction)")

    def changes(self) -> list[float]:
        """The fractions of the steps at which `edit` begins to give something else."""
        return [self.start, self.stop]

    def rows(self, count: int) -> int:
        """How many rows (images) `count` prompts become."""
        return count

    def texts(self, prompts: Sequence[str], text: PipelineText) -> list[str]:
        """Other texts that `edit` reads the states of; they are encoded together with the prompts."""
        return []

    def members(self) -> list[PromptController]:
        """The controllers in the order in which they act."""
        return [self]

    def prompt_kwargs(
        self,
        pipe: Any,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> dict[str, Any]:
        """The keyword arguments that make `pipe(**kwargs)` draw the steered prompts.

        Args:
            pipe: a diffusers pipeline, see `describe_pipeline`.
            prompt: one prompt or several.
            negative_prompt: None for the pipeline's own default (SDXL zeros, otherwise the empty prompt; FLUX none).
            num_images_per_prompt: images a prompt; the rows are repeated here, so do not pass it to the pipeline again.
            num_inference_steps: steps that you will sample with. Only needed where a start is so early that it rounds
                to the first step.
            max_sequence_length: T5 positions (SD3, FLUX).
            clip_skip: CLIP layers to leave out.
            callback_on_step_end: your own callback, if a delayed start takes that place.
            callback_on_step_end_tensor_inputs: the tensors that it reads.

        Returns:
            `prompt_embeds` and, where the pipeline has them, `pooled_prompt_embeds` and their negatives; with a delayed
            start also `callback_on_step_end` and its tensor names.

        Raises:
            InvalidInputError: for a subject that is not in the prompt or is truncated away, a controller made for other
                encoders, or a pipeline without known text encoders.
        """
        return steered_kwargs(
            pipe,
            prompt,
            self.members(),
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            max_sequence_length=max_sequence_length,
            clip_skip=clip_skip,
            callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )

    def __and__(self, other: PromptController) -> CombinedControllers:
        """Both controllers together."""
        return CombinedControllers([*self.members(), *other.members()])

    def _attach(self, model: Any, handle: Handle) -> None:
        describe_pipeline(model)  # refuse unknown pipelines here rather than at the first call
        if model not in _ATTACHED:
            _ATTACHED[model] = (type(model), [])
            object.__setattr__(model, "__class__", _steered_class(type(model)))
        _ATTACHED[model][1].append(self)
        handle.undo_with(_detach, model, self)


class CombinedControllers(PromptController):
    """Several prompt controllers as one, sorted by `order` (equal ones keep their order)."""

    def __init__(self, controllers: Sequence[PromptController]) -> None:
        """
        Raises:
            InvalidInputError: for an empty list.
        """
        if not controllers:
            raise InvalidInputError("there are no controllers to combine")
        self.controllers = [member for controller in controllers for member in controller.members()]

    def members(self) -> list[PromptController]:
        return sorted(self.controllers, key=lambda controller: controller.order)


# Pipelines whose calls are steered: their own class, and the attached controllers in order of attaching.
_ATTACHED: weakref.WeakKeyDictionary[Any, tuple[type, list[PromptController]]] = weakref.WeakKeyDictionary()


def _detach(pipe: Any, controller: PromptController) -> None:
    """Take a controller off; the last one to leave gives the pipeline its own class back."""
    original, attached = _ATTACHED[pipe]
    attached.remove(controller)
    if not attached:
        del _ATTACHED[pipe]
        object.__setattr__(pipe, "__class__", original)


def _steered_class(cls: type) -> type:
    """A subclass whose call steers its prompts first. Only the one pipeline object takes it, and gives it back."""
    signature = inspect.signature(cls.__call__)

    def steered_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        return cls.__call__(self, **_steered_arguments(self, dict(bound.arguments), signature))

    steered_call.__doc__ = cls.__call__.__doc__
    steered_call.__wrapped__ = cls.__call__  # type: ignore[attr-defined]
    body = {"__call__": steered_call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


def _steered_arguments(pipe: Any, given: dict[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    given.pop("self", None)
    given.update(given.pop("kwargs", {}))
    controllers = [member for controller in _ATTACHED[pipe][1] for member in controller.members()]
    if not controllers or getattr(given.get("prompt_embeds"), "_vistok_steered", False):
        return given
    if given.get("prompt") is None:
        raise InvalidInputError(
            "a controller is attached to this pipeline, but it was called without a prompt (prompt_embeds cannot be "
            "searched for the subject); pass the prompt as text"
        )
    second = [name for name in ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3") if given.get(name)]
    if second:
        raise InvalidInputError(
            f"attached controllers steer one prompt for all encoders; {', '.join(second)} cannot be used with them"
        )
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    own = {}
    if given.get("callback_on_step_end") is not None:
        names = given.get("callback_on_step_end_tensor_inputs", defaults.get("callback_on_step_end_tensor_inputs"))
        names = getattr(given["callback_on_step_end"], "tensor_inputs", names)
        own = {"callback": given["callback_on_step_end"], "callback_inputs": names}
    changed = steered_kwargs(
        pipe,
        given.pop("prompt"),
        sorted(controllers, key=lambda controller: controller.order),
        negative_prompt=given.pop("negative_prompt", None),
        num_images_per_prompt=given.pop("num_images_per_prompt", 1) or 1,
        num_inference_steps=given.get("num_inference_steps", defaults.get("num_inference_steps")),
        max_sequence_length=given.get("max_sequence_length", defaults.get("max_sequence_length")),
        clip_skip=given.pop("clip_skip", None),
        **own,
    )
    return {**given, **changed}


def steered_kwargs(
    pipe: Any,
    prompt: str | Sequence[str],
    controllers: Sequence[PromptController],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_images_per_prompt: int = 1,
    num_inference_steps: int | None = None,
    max_sequence_length: int | None = None,
    clip_skip: int | None = None,
    callback: Callable[..., Any] | None = None,
    callback_inputs: Sequence[str] = ("latents",),
) -> dict[str, Any]:
    """See `PromptController.prompt_kwargs`; `controllers` act in the given order."""
    text = describe_pipeline(pipe, max_sequence_length=max_sequence_length)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(one, str) for one in prompts):
        raise InvalidInputError(f"expected a prompt or a list of prompts, got {prompt!r}")
    if num_images_per_prompt < 1:
        raise InvalidInputError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
    for controller in controllers:
        if not 0.0 <= controller.start <= controller.stop <= 1.0:
            raise InvalidInputError(
                f"a controller starts and stops at fractions 0 <= start <= stop <= 1 of the steps, got "
                f"{controller.start} and {controller.stop}"
            )
    negatives = _negative_prompts(text, negative_prompt, len(prompts))
    lone = [one for controller in controllers for one in controller.texts(prompts, text)]
    encoded, negative = encode_prompts(text, prompts, negatives, lone, clip_skip=clip_skip)
    encoded = encoded.repeat(num_images_per_prompt)
    negative = None if negative is None else negative.repeat(num_images_per_prompt)
    for controller in controllers:
        encoded = encoded.expand(controller.rows(len(encoded)))
    if negative is not None:
        negative = negative.expand(len(encoded))

    def edited(active: Sequence[PromptController], fraction: float) -> tuple[Tensor, Tensor | None]:
        current = encoded
        for controller in active:
            current = controller.edit(current, fraction)
        return current.assemble()

    segments = []
    for fraction in _switches(controllers, num_inference_steps):
        active = [controller for controller in controllers if controller.start <= fraction < controller.stop]
        segments.append((fraction, *edited(active, fraction)))
    embeds, pooled = segments[0][1:]
    if text.family in ("flux", "cascade") and any(
        later is not None and pooled is not None and not torch.equal(later, pooled) for _, _, later in segments
    ):
        raise InvalidInputError(
            f"the {text.family} pipeline cannot change the pooled vector during sampling; edit it from the first step "
            "on (start 0), or leave it alone"
        )
    embeds._vistok_steered = True
    pooled_name = "prompt_embeds_pooled" if text.family == "cascade" else "pooled_prompt_embeds"
    result: dict[str, Any] = {"prompt_embeds": embeds}
    if pooled is not None:
        result[pooled_name] = pooled
    if text.family != "flux" or negative is not None:
        if negative is not None:
            negative_embeds, negative_pooled = negative.assemble()
        else:  # SDXL without a negative prompt
            negative_embeds = torch.zeros_like(embeds)
            negative_pooled = None if pooled is None else torch.zeros_like(pooled)
        result["negative_prompt_embeds"] = negative_embeds
        if negative_pooled is not None:
            result[f"negative_{pooled_name}"] = negative_pooled
    if len(segments) > 1:
        switch = SwitchPrompts(segments[1:], text.family, callback, callback_inputs if callback is not None else ())
        result["callback_on_step_end"] = switch
        result["callback_on_step_end_tensor_inputs"] = switch.tensor_inputs
    elif callback is not None:
        result["callback_on_step_end"] = callback
        result["callback_on_step_end_tensor_inputs"] = list(callback_inputs)
    return result


def _switches(controllers: Sequence[PromptController], steps: int | None) -> list[float]:
    """The fractions at which another set of controllers takes over; the first is 0."""
    fractions = {0.0}.union(*(controller.changes() for controller in controllers))
    ordered = sorted(fraction for fraction in fractions if fraction < 1.0)
    if steps is None:
        return ordered
    # Switches that round to the same step: the last one holds.
    by_step: dict[int, float] = {}
    for fraction in ordered:
        by_step[round(fraction * steps)] = fraction
    return [fraction for _, fraction in sorted(by_step.items())]


def _negative_prompts(text: PipelineText, given: str | Sequence[str] | None, count: int) -> list[str]:
    if given is None:
        return [] if text.zero_negative or text.family == "flux" else [""] * count
    negatives = [given] * count if isinstance(given, str) else list(given)
    if len(negatives) != count:
        raise InvalidInputError(f"{len(negatives)} negative prompts were given for {count} prompts")
    return negatives
