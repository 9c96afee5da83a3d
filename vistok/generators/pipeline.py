"""`GenerationPipeline`: a prompt or a class becomes pictures, with any token generator and any grid tokenizer.

Tokens are ids of a codebook or continuous features; a generator of features has a `token_size` (channels of a token),
and one with settings of its own names them in `sampling_defaults` and checks them in `check_settings`.

Letters: B images, N tokens an image, H rows and W columns of pixels, D channels of a continuous token.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.generators.text import TextEncoder
from vistok.nn.sampling import Generators, Step, check_sampling
from vistok.nn.text import TextCondition
from vistok.tokens import VisualTokens

__all__ = ["GenerationOutput", "GenerationPipeline", "Preview"]

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# What a sampler of discrete tokens does when neither the call nor the checkpoint says anything.
SAMPLER_DEFAULTS: dict[str, Any] = {
    "guidance_scale": 1.0,
    "guidance_interval": None,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}
ARTICLES = ("a", "an", "the")
Labels: TypeAlias = int | str | Sequence[int | str] | Tensor
Callback: TypeAlias = Callable[[Any, int, int, dict[str, Any]], dict[str, Any] | None]


@dataclass
class GenerationOutput(BaseOutput):
    """Result of a pipeline call.

    Attributes:
        images: list of PIL images, float numpy [B, H, W, 3] in [0, 1], float tensor [B, 3, H, W] in [0, 1], or (for
            `output_type="latent"`) `VisualTokens`.
        tokens: the tokens behind them; with a mask if the run was interrupted.
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


@dataclass(frozen=True)
class _Request:
    """A checked call: what to draw (one of the three), and the arguments of the generator's `sample`."""

    prompts: list[str] | None
    labels: list[int] | None
    embeds: TextCondition | None
    copies: int
    arguments: dict[str, Any]


class GenerationPipeline(DiffusionPipeline):
    """Joins a token generator, an image tokenizer and, for prompts, a text encoder.

    Args:
        generator: `NAR`, `LlamaGen`, `MAR`, ...
        tokenizer: what decodes its tokens, e.g. `VQModel` or (continuous ones) `KLModel`.
        text_encoder: transformers text encoder of a text-conditional generator; None if only `prompt_embeds` are given.
        text_tokenizer: the tokenizer of that text encoder.
        class_names: names of the classes of a class-conditional generator, by label; a name may list several, separated
            by commas ("tench, Tinca tinca").
        sampling: default sampling settings, by their names in the generator's `sample` (`guidance_scale`,
            `temperature`, ...).
        image_size: side in pixels of the square images that the generator's training grid stands for; checks that the
            tokenizer covers as many pixels a token.

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
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        _check_parts(generator, tokenizer, image_size)
        if (text_encoder is None) != (text_tokenizer is None):
            raise InvalidInputError("text_encoder and text_tokenizer belong together; only one of them was given")
        if class_names is not None and generator.num_classes is not None and len(class_names) != generator.num_classes:
            raise InvalidInputError(f"{len(class_names)} class_names for {generator.num_classes} classes")
        _check_settings(generator, sampling or {})
        self.register_modules(
            generator=generator, tokenizer=tokenizer, text_encoder=text_encoder, text_tokenizer=text_tokenizer
        )
        # Saved as classes of `vistok` itself: of other libraries, diffusers finds only what is imported already.
        for name, part in (("generator", generator), ("tokenizer", tokenizer)):
            if type(part).__module__.startswith("vistok."):
                self.register_to_config(**{name: ("vistok", type(part).__name__)})
        self.register_to_config(
            class_names=None if class_names is None else list(class_names),
            sampling=dict(sampling or {}),
            image_size=image_size,
        )
        # Without a terminal there is nobody to watch a bar.
        self.set_progress_bar_config(disable=None, leave=False, unit="step")
        self._interrupt = False

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current step."""
        return self._interrupt

    # -------------------------------------------------------------------------------------------------- what to draw
    def check_inputs(
        self,
        prompt: str | Sequence[str] | None,
        class_labels: Labels | None,
        prompt_embeds: TextCondition | None,
        num_images_per_prompt: int,
        grid: Sequence[int] | None,
        height: int | None,
        width: int | None,
        generator: Generators,
        prefix: VisualTokens | None,
        settings: Mapping[str, Any],
    ) -> _Request:
        """Validate a call before any work.

        Raises:
            InvalidInputError: saying what was given and what was expected.
        """
        if num_images_per_prompt < 1:
            raise InvalidInputError(f"num_images_per_prompt must be at least 1; got {num_images_per_prompt}")
        given = {"prompt": prompt, "class_labels": class_labels, "prompt_embeds": prompt_embeds}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise InvalidInputError(
                "give either a prompt or class_labels (or prompt_embeds)"
                + (f", not {' and '.join(named)}: not both" if named else "; none was given")
            )
        prompts = None if prompt is None else self._check_prompts(prompt)
        labels = None if class_labels is None else self._check_labels(class_labels)
        if prompts is not None and not self.generator.is_text_conditional:
            labels = [self.class_label(text) for text in prompts]
            prompts = None
        if prompt_embeds is not None and not self.generator.is_text_conditional:
            raise InvalidInputError("prompt_embeds given, but this generator is class-conditional: give class_labels")
        count = len(prompts or labels or prompt_embeds or ()) * num_images_per_prompt
        if self.generator.training:
            raise InvalidInputError("the generator is in training mode: call pipe.generator.eval() first")
        settings = self._settings(settings)
        if hasattr(self.generator, "check_settings"):
            self.generator.check_settings(generator, count, **settings)
        else:
            check_sampling(**settings, generator=generator, batch=count)
        grid = self._grid(grid, height, width)
        if prefix is not None:
            self.generator.known_tokens(prefix, count, self.generator.grid if grid is None else grid)
        arguments = {**settings, "generator": generator, "grid": grid, "prefix": prefix}
        return _Request(prompts, labels, prompt_embeds, num_images_per_prompt, arguments)

    def _check_prompts(self, prompt: str | Sequence[str]) -> list[str]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) and text.strip() for text in prompts):
            raise InvalidInputError(f"prompt must be a text or a list of texts, none empty; got {prompt!r}")
        if self.generator.is_text_conditional:
            self._text().check_captions(prompts, self.generator.num_condition_tokens)
        return prompts

    def _check_labels(self, class_labels: Labels) -> list[int]:
        if self.generator.is_text_conditional:
            raise InvalidInputError("class_labels given, but this generator is text-conditional: give a prompt")
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.tolist()
        given: list[Any] = [class_labels] if isinstance(class_labels, Integral | str) else list(class_labels)  # type: ignore[arg-type]
        if not given:
            raise InvalidInputError("class_labels is empty")
        return [self.class_label(label) for label in given]

    def class_label(self, label: int | str) -> int:
        """The number of a class given by number or name (in any case, with or without an article).

        Raises:
            InvalidInputError: no such class, naming the nearest and the known words.
        """
        total, names = self.generator.num_classes, self.config.class_names
        if isinstance(label, Integral) and not isinstance(label, bool):
            if not 0 <= label < total:
                raise InvalidInputError(f"class {label} does not exist; classes are numbered 0..{total - 1}")
            return int(label)
        if not isinstance(label, str):
            raise InvalidInputError(f"a class is given by number or name; got {label!r}")
        if names is None:
            raise InvalidInputError(f"class {label!r}: this model has no class names; give a number in 0..{total - 1}")
        numbers: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            for variant in {name.lower(), *(part.strip().lower() for part in name.split(","))}:
                numbers.setdefault(variant, []).append(number)
        words = label.lower().strip(" .!").split()
        plain = " ".join(words[1:] if words and words[0] in ARTICLES else words)
        found = numbers.get(plain, [])
        if len(found) > 1:
            raise InvalidInputError(f"{len(found)} classes are called {plain!r}: {found}; give one of these numbers")
        if found:
            return found[0]
        nearest = difflib.get_close_matches(plain, numbers, n=3, cutoff=0.0)
        vocabulary = list(dict.fromkeys(word for name in names for word in name.split()))
        known = f"; known words: {', '.join(vocabulary)}" if len(vocabulary) <= 32 else ""
        raise InvalidInputError(
            f"unknown class {label!r}; nearest of the {total} classes of this model: {', '.join(nearest)}{known} "
            "(all: pipe.config.class_names)"
        )

    def _grid(self, grid: Sequence[int] | None, height: int | None, width: int | None) -> tuple[int, int] | None:
        """(rows, cols) of tokens; None is the training grid."""
        if grid is not None:
            if height is not None or width is not None:
                raise InvalidInputError(
                    "give the size either as grid (tokens) or as height and width (pixels), not both"
                )
            rows_cols = tuple(grid)
            if len(rows_cols) != 2 or min(rows_cols) < 1:
                raise InvalidInputError(f"grid must be (rows, cols), both at least 1; got {rows_cols}")
            return int(rows_cols[0]), int(rows_cols[1])
        if height is None and width is None:
            return None
        factor = self.tokenizer.downsample_factor
        sides = []
        for name, pixels, default in (("height", height, 0), ("width", width, 1)):
            if pixels is None:
                sides.append(self.generator.grid[default])
            elif pixels < factor or pixels % factor:
                nearest = max(1, round(pixels / factor)) * factor
                raise InvalidInputError(
                    f"{name} must be a positive multiple of {factor} pixels; got {pixels}: try {nearest}"
                )
            else:
                sides.append(pixels // factor)
        return sides[0], sides[1]

    def _settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling settings: what the call gives, else the checkpoint's, else the sampler's."""
        given = {name: value for name, value in given.items() if value is not None}
        _check_settings(self.generator, given)
        return {**_defaults(self.generator), **self.config.sampling, **given}

    # ---------------------------------------------------------------------------------------------------- conditions
    def _text(self) -> TextEncoder:
        if self.text_encoder is None:
            raise InvalidInputError(
                "this pipeline has no text encoder: load one (text_encoder and text_tokenizer), or give prompt_embeds"
            )
        return TextEncoder(self.text_encoder, self.text_tokenizer)

    def encode_prompt(self, prompts: Sequence[str]) -> TextCondition:
        """Text features of prompts as the generator was trained with; the pipeline takes them as `prompt_embeds`."""
        return self._text()(list(prompts), num_tokens=self.generator.num_condition_tokens)

    def _condition(self, request: _Request) -> Tensor | TextCondition:
        if request.labels is not None:
            return torch.tensor(request.labels, dtype=torch.int64).repeat_interleave(request.copies)
        text = request.embeds if request.prompts is None else self.encode_prompt(request.prompts)
        assert text is not None
        return text.repeat_interleave(request.copies).to(dtype=self.generator.dtype)

    # ------------------------------------------------------------------------------------------------------ sampling
    @torch.no_grad()
    def _steps(self, request: _Request, callback: Callback | None, inputs: Sequence[str]) -> Iterator[Step]:
        """The generator's steps, with progress bar, callback and interruption.

        A callback that returns other tokens makes the generator continue from those.
        """
        condition = self._condition(request)
        _run_hook(self.generator)
        arguments, done, bar = dict(request.arguments), 0, None
        self._interrupt = False
        try:
            while True:
                replaced = None
                for step in self.generator.sample(condition, **arguments):
                    step = Step(done + step.index, done + step.total, step.tokens, step.changed)
                    bar = self.progress_bar(total=step.total) if bar is None else bar
                    bar.update()
                    if callback is not None:
                        reply = callback(self, step.index, step.total, dict.fromkeys(inputs, step.tokens))
                        replaced = _replacement(reply, step)
                        if replaced is not None:
                            step = Step(step.index, step.total, replaced, step.changed)
                    yield step
                    if self._interrupt:
                        return
                    if replaced is not None:
                        break
                if replaced is None or step.index + 1 == step.total:
                    return
                arguments["prefix"], done = replaced, step.index + 1
        finally:
            if bar is not None:
                bar.close()

    def decode_tokens(self, tokens: VisualTokens, generator: Generators = None) -> Tensor:
        """Tokens to images, float [B, 3, H, W], about [-1, 1].

        Undecided tokens (mask False) take the value of the nearest decided one, so that they disturb their neighbours
        less than an arbitrary one would.

        Args:
            tokens: of B images.
            generator: draws of a tokenizer that decodes by sampling (FlexTok): one, or one an image.
        """
        _run_hook(self.tokenizer)
        grid, mask = tokens.grid, tokens.mask
        held = VisualTokens(tokens.ids, tokens.features, grid)
        if mask is not None and grid is not None and bool(mask.any()) and not bool(mask.all()):
            cells = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()
            distance = torch.cdist(cells, cells, p=1.0).to(tokens.device)
            nearest = distance.masked_fill(~mask[:, None], float("inf")).argmin(-1)  # [B, N]
            chosen = held.select(nearest)
            held = VisualTokens(chosen.ids, chosen.features, grid)
        with torch.no_grad():
            return self.tokenizer.decode(held.to(self.tokenizer.device), generator=generator)

    def preview(self, tokens: VisualTokens) -> list[Image.Image]:
        """PIL images of unfinished tokens; places without a token are grey.

        A tokenizer that decodes by sampling (FlexTok) starts every preview of an image from the same noise.
        """
        images = self.decode_tokens(tokens, [torch.Generator().manual_seed(0) for _ in range(len(tokens))])
        if tokens.mask is not None and tokens.grid is not None:
            known = tokens.mask.view(-1, 1, *tokens.grid).to(images.device)
            cell = [pixels // cells for pixels, cells in zip(images.shape[-2:], tokens.grid, strict=True)]
            images = torch.where(known.repeat_interleave(cell[0], 2).repeat_interleave(cell[1], 3), images, 0.0)
        return self.tokenizer.postprocess(images, "pil")

    def stream(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: Labels | None = None,
        prompt_embeds: TextCondition | None = None,
        num_images_per_prompt: int = 1,
        grid: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        prefix: VisualTokens | None = None,
        **sampling: Any,
    ) -> Iterator[Preview]:
        """Yield the pictures as they grow, one `Preview` a model step. Arguments as in `__call__`, checked at once."""
        request = self.check_inputs(
            prompt,
            class_labels,
            prompt_embeds,
            num_images_per_prompt,
            grid,
            height,
            width,
            generator,
            prefix,
            sampling,
        )
        return (Preview(step, self.preview(step.tokens)) for step in self._steps(request, None, ()))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: Labels | None = None,
        prompt_embeds: TextCondition | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_inference_steps: int | None = None,
        grid: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        prefix: VisualTokens | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        **sampling: Any,
    ) -> GenerationOutput | tuple[Any, VisualTokens]:
        """Generate pictures.

        Args:
            prompt: one or several texts; a class-conditional generator takes the name of a class ("a red circle").
            class_labels: classes by number or name, instead of a prompt.
            prompt_embeds: features from `encode_prompt`, instead of a prompt.
            num_images_per_prompt: pictures of each prompt or class.
            guidance_scale: classifier-free guidance, u + s (c - u); up to 1 is none. None takes the checkpoint's
                default, here and below.
            guidance_interval: see the generator's `sample`.
            temperature: 0 is greedy (of continuous tokens: without noise in the sampler's steps).
            top_k, top_p: filters of discrete tokens; 0 and 1 switch them off.
            num_inference_steps: model steps, where the generator lets one choose.
            grid: (rows, cols) of tokens; None is the training grid.
            height, width: the same in pixels.
            generator: one `torch.Generator`, or one an image (each picture then does not depend on the batch).
            prefix: known tokens to continue from (see the generator's `sample`).
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"` (the tokens).
            return_dict: False returns (images, tokens).
            callback_on_step_end: called as `f(pipe, step, total, {"tokens": VisualTokens})` after each model step. It
                may return a dictionary with other `"tokens"` (the generator continues from those; only decided tokens
                are read), and setting `pipe._interrupt = True` stops after this step.
            callback_on_step_end_tensor_inputs: what the callback gets; only `"tokens"` exists.
            **sampling: further settings of the generator's `sample` (`guidance_schedule`, `num_diffusion_steps`, ...).

        Returns:
            The pictures and their tokens.

        Raises:
            InvalidInputError: before any work, if an argument is wrong.
            InvalidOutputError: the networks produced NaNs.
        """
        if output_type not in OUTPUT_TYPES:
            raise InvalidInputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {output_type!r}")
        unknown = sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise InvalidInputError(
                f"callback_on_step_end_tensor_inputs {unknown} unknown; available: {self._callback_tensor_inputs}"
            )
        settings = {
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "num_inference_steps": num_inference_steps,
            **sampling,
        }
        request = self.check_inputs(
            prompt,
            class_labels,
            prompt_embeds,
            num_images_per_prompt,
            grid,
            height,
            width,
            generator,
            prefix,
            settings,
        )
        tokens = prefix  # already complete if there is nothing to write
        for step in self._steps(request, callback_on_step_end, callback_on_step_end_tensor_inputs):
            tokens = step.tokens
        assert tokens is not None
        if tokens.mask is None or bool(tokens.mask.all()):
            tokens = VisualTokens(ids=tokens.ids, features=tokens.features, grid=tokens.grid)
        images: Any = tokens
        if output_type == "pil" and tokens.mask is not None:
            images = self.preview(tokens)
        elif output_type != "latent":
            images = self.tokenizer.postprocess(self.decode_tokens(tokens, generator), output_type)
        self.maybe_free_model_hooks()
        return GenerationOutput(images=images, tokens=tokens) if return_dict else (images, tokens)


def _check_parts(generator: Any, tokenizer: Any, image_size: int | None) -> None:
    """Raise InvalidInputError if the tokenizer cannot be the one that the generator writes for."""
    writer, reader = type(generator).__name__, type(tokenizer).__name__
    if len(generator.grid) != 2:
        raise InvalidInputError(
            f"this pipeline makes pictures, but {writer} writes videos of {'x'.join(map(str, generator.grid))} tokens; "
            "for videos: tokenizer.postprocess(tokenizer.decode(generator.generate(class_labels)))"
        )
    continuous, decodes = hasattr(generator, "token_size"), hasattr(tokenizer, "token_size")
    if continuous != decodes:
        kinds = ("continuous tokens", "ids of a codebook")
        raise InvalidInputError(
            f"{writer} writes {kinds[not continuous]}, but {reader} decodes {kinds[not decodes]}; load the tokenizer "
            "that the generator was trained with"
        )
    if continuous:
        _check_continuous(generator, tokenizer)
    wanted, held = (None, None) if continuous else (generator.config.vocab_size, tokenizer.codebook_size)
    if wanted != held:
        raise InvalidInputError(
            f"{writer} writes tokens of a codebook of {wanted}, but {reader} has {held} codes; load the tokenizer that "
            "the generator was trained with"
        )
    rows, cols = generator.grid
    factor = tokenizer.downsample_factor
    sequence = rows == 1  # of FlexTok's ordered tokens, which lie on no grid
    if image_size is not None and not sequence and image_size != max(rows, cols) * factor:
        raise InvalidInputError(
            f"{writer} writes {rows}x{cols} tokens for images of {image_size}x{image_size} pixels, but {reader} "
            f"decodes them to {rows * factor}x{cols * factor} ({factor} pixels a token); load the tokenizer that the "
            "generator was trained with"
        )


def _check_continuous(generator: Any, tokenizer: Any) -> None:
    """Raise InvalidInputError if tokens of the generator have other channels or another scale than the tokenizer's."""
    writer, reader = type(generator).__name__, type(tokenizer).__name__
    if generator.token_size != tokenizer.token_size:
        raise InvalidInputError(
            f"{writer} writes tokens of {generator.token_size} channels, but {reader} decodes tokens of "
            f"{tokenizer.token_size}; load the tokenizer that the generator was trained with"
        )
    wanted, held = generator.config.get("scaling_factor"), tokenizer.config.get("scaling_factor")
    if wanted is not None and held is not None and abs(wanted - held) > 1e-4 * abs(wanted):
        raise InvalidInputError(
            f"{writer} was trained on latents scaled by {wanted}, but {reader} scales by {held}; load the tokenizer "
            "that the generator was trained with"
        )


def _defaults(generator: Any) -> Mapping[str, Any]:
    """The generator's sampling settings, with what it does when nothing is said."""
    return getattr(generator, "sampling_defaults", SAMPLER_DEFAULTS)


def _check_settings(generator: Any, given: Mapping[str, Any]) -> None:
    """Raise InvalidInputError if the generator has no such sampling settings."""
    known = _defaults(generator)
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise InvalidInputError(
            f"unknown sampling setting {unknown} of {type(generator).__name__}; known: {', '.join(known)}"
        )


def _replacement(reply: Mapping[str, Any] | None, step: Step) -> VisualTokens | None:
    """The tokens that a callback returned instead of the step's; None if they are the same."""
    tokens = None if reply is None else reply.get("tokens")
    held = step.tokens
    if tokens is None or tokens is held:
        return None
    if (
        not isinstance(tokens, VisualTokens)
        or (tokens.ids is None) != (held.ids is None)
        or (tokens.features is None) != (held.features is None)
        or tokens.grid != held.grid
        or len(tokens) != len(held)
    ):
        raise InvalidInputError(
            f"the callback must return VisualTokens of {len(held)} images on the grid {held.grid}; got {tokens!r:.80}"
        )
    pairs = ((tokens.ids, held.ids), (tokens.features, held.features))
    if all(ours is None or torch.equal(ours, theirs) for ours, theirs in pairs):
        return None
    return VisualTokens(tokens.ids, tokens.features, held.grid, held.mask)


def _run_hook(part: Any) -> None:
    """Bring an offloaded part to its device: accelerate does so before `forward`, which sampling bypasses."""
    hook = getattr(part, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(part)
