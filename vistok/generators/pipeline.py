"""`GenerationPipeline`: a prompt or a class becomes pictures, with any token generator and any grid tokenizer.

Letters: B images, N tokens an image, H rows and W columns of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.generators.text import TextEncoder
from vistok.nn.sampling import Generators, Step
from vistok.nn.text import TextCondition
from vistok.tokens import VisualTokens

__all__ = ["GenerationOutput", "GenerationPipeline", "Preview"]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Callback = Callable[[Any, int, int, dict[str, Any]], dict[str, Any]]


@dataclass
class GenerationOutput(BaseOutput):
    """Result of a pipeline call.

    Attributes:
        images: list of PIL images, float numpy [B, H, W, 3] in [0, 1], float tensor [B, 3, H, W] in [0, 1], or (for
            `output_type="latent"`) `VisualTokens`.
        tokens: the tokens behind them.
    """

    images: Any
    tokens: VisualTokens


@dataclass(frozen=True)
class Preview:
    """One step of `GenerationPipeline.stream`.

    Attributes:
        step: the generator's step.
        images: PIL images decoded from the tokens so far; undecided places are grey.
    """

    step: Step
    images: list[Image.Image]


class GenerationPipeline(DiffusionPipeline):
    """Joins a token generator, an image tokenizer and, for prompts, a text encoder.

    Args:
        generator: `NAR`, `LlamaGen`, ...
        tokenizer: what decodes its tokens, e.g. `VQModel`.
        text_encoder: transformers text encoder of a text-conditional generator.
        text_tokenizer: the tokenizer of that text encoder.
        class_names: names of the classes of a class-conditional generator, by label.
        sampling: default sampling settings (`guidance_scale`, `temperature`, `top_k`, `top_p`).

    Raises:
        InvalidInputError: if the parts do not fit each other (naming both).
    """

    model_cpu_offload_seq = "text_encoder->generator->tokenizer"
    _optional_components = ["text_encoder", "text_tokenizer"]  # noqa: RUF012 - diffusers reads a list
    _callback_tensor_inputs = ["tokens"]  # noqa: RUF012 - diffusers reads a list

    def __init__(
        self,
        generator: Any,
        tokenizer: Any,
        text_encoder: Any = None,
        text_tokenizer: Any = None,
        class_names: Sequence[str] | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        wanted, held = generator.config.vocab_size, tokenizer.config.codebook_size
        if wanted != held:
            raise InvalidInputError(
                f"{type(generator).__name__} writes tokens of a codebook of {wanted}, but {type(tokenizer).__name__} "
                f"has {held} codes; load the tokenizer that the generator was trained with"
            )
        if generator.is_text_conditional and (text_encoder is None or text_tokenizer is None):
            raise InvalidInputError(
                f"this {type(generator).__name__} is text-conditional: give text_encoder and text_tokenizer, too"
            )
        if class_names is not None and generator.num_classes is not None and len(class_names) != generator.num_classes:
            raise InvalidInputError(f"{len(class_names)} class_names for {generator.num_classes} classes")
        self.register_modules(
            generator=generator, tokenizer=tokenizer, text_encoder=text_encoder, text_tokenizer=text_tokenizer
        )
        # diffusers would note the defining modules; the package also hands out the base class that loading looks for.
        self.register_to_config(
            generator=("vistok", type(generator).__name__), tokenizer=("vistok", type(tokenizer).__name__)
        )
        self.register_to_config(
            class_names=None if class_names is None else list(class_names), sampling=dict(sampling or {})
        )
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current step."""
        return self._interrupt

    # ------------------------------------------------------------------------------------------------- conditions
    def check_inputs(
        self,
        prompt: str | Sequence[str] | None,
        class_labels: int | str | Sequence[int | str] | None,
        num_images_per_prompt: int,
        output_type: str,
        generator: Generators,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> tuple[list[str] | None, list[int] | None]:
        """Validate a call before any work.

        Returns:
            (prompts, labels): one of them is None.

        Raises:
            InvalidInputError: saying what was given and what was expected.
        """
        if (prompt is None) == (class_labels is None):
            raise InvalidInputError(
                "give either a prompt or class_labels" + (", not both" if prompt is not None else "")
            )
        if output_type not in OUTPUT_TYPES:
            raise InvalidInputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        if num_images_per_prompt < 1:
            raise InvalidInputError(f"num_images_per_prompt must be at least 1; got {num_images_per_prompt}")
        prompts: list[str] | None
        labels: list[int] | None
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise InvalidInputError(
                f"callback_on_step_end_tensor_inputs {sorted(unknown)} unknown; "
                f"available: {self._callback_tensor_inputs}"
            )
        if class_labels is not None:
            if self.generator.is_text_conditional:
                raise InvalidInputError("class_labels given, but this generator is text-conditional: give a prompt")
            given = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
            if not given:
                raise InvalidInputError("class_labels is empty")
            labels = [self.class_label(label) for label in given]
            count = len(labels)
            prompts = None
        else:
            assert prompt is not None
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if not prompts or not all(isinstance(text, str) and text.strip() for text in prompts):
                raise InvalidInputError(f"prompt must be a text or a list of texts, none empty; got {prompt!r}")
            count = len(prompts)
            if self.generator.is_text_conditional:
                labels = None
            else:
                labels = [self.class_label(text) for text in prompts]
                prompts = None
        if isinstance(generator, Sequence) and len(generator) != count * num_images_per_prompt:
            raise InvalidInputError(
                f"{len(generator)} generators for {count * num_images_per_prompt} images; give one, or one an image"
            )
        return prompts, labels

    def class_label(self, label: int | str) -> int:
        """The number of a class given by number or name (with or without an article).

        Raises:
            InvalidInputError: naming the known classes.
        """
        total, names = self.generator.num_classes, self.config.class_names
        if isinstance(label, int) and not isinstance(label, bool):
            if not 0 <= label < total:
                raise InvalidInputError(f"class {label} does not exist; classes are numbered 0..{total - 1}")
            return label
        if names is None:
            raise InvalidInputError(f"class {label!r}: this model has no class names; give a number in 0..{total - 1}")
        words = str(label).lower().split()
        plain = " ".join(words[1:] if words and words[0] in ("a", "an", "the") else words)
        if plain not in names:
            shown = ", ".join(names[:8])
            raise InvalidInputError(
                f"unknown class {label!r}; this model draws one of {len(names)} classes: {shown}, ... "
                "(all: pipe.config.class_names)"
            )
        return names.index(plain)

    def encode_prompt(self, prompts: Sequence[str]) -> TextCondition:
        """Text features of prompts, as the generator was trained with."""
        encoder = TextEncoder(self.text_encoder, self.text_tokenizer)
        return encoder(list(prompts), num_tokens=self.generator.num_condition_tokens)

    def _condition(
        self, prompts: list[str] | None, labels: list[int] | None, num_images_per_prompt: int
    ) -> Tensor | TextCondition:
        device = self.generator.device
        if prompts is not None:
            condition = self.encode_prompt(prompts).repeat_interleave(num_images_per_prompt)
            return condition.to(device, self.generator.dtype)
        return torch.tensor(labels, dtype=torch.int64, device=device).repeat_interleave(num_images_per_prompt)

    def _grid(self, grid: tuple[int, int] | None, height: int | None, width: int | None) -> tuple[int, int] | None:
        if grid is not None and (height is not None or width is not None):
            raise InvalidInputError("give the size either as grid (tokens) or as height and width (pixels), not both")
        if height is None and width is None:
            return grid
        factor = self.tokenizer.downsample_factor
        rows, cols = self.generator.grid
        sides = []
        for name, pixels, default in (("height", height, rows), ("width", width, cols)):
            if pixels is None:
                sides.append(default)
            elif pixels < factor or pixels % factor:
                raise InvalidInputError(f"{name} must be a positive multiple of {factor} pixels; got {pixels}")
            else:
                sides.append(pixels // factor)
        return sides[0], sides[1]

    def _settings(self, **given: Any) -> dict[str, Any]:
        """Sampling settings: what the call gives, else the checkpoint's, else the sampler's."""
        defaults = self.config.sampling or {}
        settings = {name: defaults.get(name) if value is None else value for name, value in given.items()}
        return {name: value for name, value in settings.items() if value is not None}

    # ---------------------------------------------------------------------------------------------------- pictures
    def decode_tokens(self, tokens: VisualTokens) -> Tensor:
        """Tokens to pixels, float [B, 3, H, W] in [0, 1]."""
        with torch.no_grad():
            images = self.tokenizer.decode(VisualTokens(ids=tokens.ids, grid=tokens.grid).to(self.tokenizer.device))
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def to_output(self, images: Tensor, output_type: str) -> Any:
        """Float images [B, 3, H, W] in [0, 1] as "pt", "np" or "pil"."""
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return array
        return [Image.fromarray(picture) for picture in np.rint(array * 255).astype(np.uint8)]

    def preview(self, tokens: VisualTokens) -> list[Image.Image]:
        """PIL images of unfinished tokens; places without a token are grey."""
        images = self.decode_tokens(tokens)
        if tokens.mask is not None and tokens.grid is not None:
            factor = self.tokenizer.downsample_factor
            known = tokens.mask.view(-1, 1, *tokens.grid).to(images.device)
            known = known.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
            images = torch.where(known, images, 0.5)
        return self.to_output(images, "pil")

    @torch.no_grad()
    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images_per_prompt: int = 1,
        grid: tuple[int, int] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        prefix: VisualTokens | None = None,
        **sampling: Any,
    ) -> Iterator[Preview]:
        """Yield the pictures as they grow, one `Preview` a model step. Arguments as in `__call__`."""
        prompts, labels = self.check_inputs(prompt, class_labels, num_images_per_prompt, "pil", generator, ())
        condition = self._condition(prompts, labels, num_images_per_prompt)
        names = ("guidance_scale", "guidance_interval", "temperature", "top_k", "top_p")
        unknown = sampling.keys() - set(names)
        if unknown:
            raise InvalidInputError(f"unknown sampling setting {sorted(unknown)}; known: {', '.join(names)}")
        settings = self._settings(**{name: sampling.get(name) for name in names})
        grid = self._grid(grid, height, width)
        for step in self.generator.sample(condition, generator=generator, grid=grid, prefix=prefix, **settings):
            yield Preview(step, self.preview(step.tokens))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        grid: tuple[int, int] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        prefix: VisualTokens | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> GenerationOutput | tuple[Any, VisualTokens]:
        """Generate pictures.

        Args:
            prompt: one or several texts; a class-conditional generator takes the name of a class ("a red circle").
            class_labels: classes by number or name, instead of a prompt.
            num_images_per_prompt: pictures of each prompt or class.
            guidance_scale: classifier-free guidance, u + s (c - u); up to 1 is none. None takes the checkpoint's
                default, here and below.
            guidance_interval: see the generator's `sample`.
            temperature: 0 is greedy.
            top_k, top_p: filters; 0 and 1 switch them off.
            grid: (rows, cols) of tokens; None is the training grid.
            height, width: the same in pixels.
            generator: one `torch.Generator`, or one an image (each picture then does not depend on the batch).
            prefix: known tokens to continue from (see the generator's `sample`).
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"` (the tokens).
            return_dict: False returns (images, tokens).
            callback_on_step_end: called as `f(pipe, step, total, {"tokens": ...})` after each model step; setting
                `pipe._interrupt = True` stops there.
            callback_on_step_end_tensor_inputs: what the callback gets; only `"tokens"` exists.

        Raises:
            InvalidInputError: before any work, if an argument is wrong.
        """
        prompts, labels = self.check_inputs(
            prompt, class_labels, num_images_per_prompt, output_type, generator, callback_on_step_end_tensor_inputs
        )
        grid = self._grid(grid, height, width)
        settings = self._settings(
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        condition = self._condition(prompts, labels, num_images_per_prompt)
        self._interrupt = False
        tokens = prefix
        steps = self.generator.sample(condition, generator=generator, grid=grid, prefix=prefix, **settings)
        bar = None
        for step in steps:
            bar = self.progress_bar(total=step.total) if bar is None else bar
            tokens = step.tokens
            bar.update()
            if callback_on_step_end is not None:
                inputs = {"tokens": tokens} if "tokens" in callback_on_step_end_tensor_inputs else {}
                callback_on_step_end(self, step.index, step.total, inputs)
            if self._interrupt:
                break
        if bar is not None:
            bar.close()
        assert tokens is not None
        if tokens.mask is None or bool(tokens.mask.all()):
            tokens = VisualTokens(ids=tokens.ids, grid=tokens.grid)
        if output_type == "latent":
            images: Any = tokens
        else:
            images = self.to_output(self.decode_tokens(tokens), output_type)
        self.maybe_free_model_hooks()
        return GenerationOutput(images=images, tokens=tokens) if return_dict else (images, tokens)
