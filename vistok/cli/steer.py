"""`vistok steer`: one subject's attribute from less to more, as a strip of pictures from any diffusers pipeline."""

from __future__ import annotations

import inspect
import json
import math
import re
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

# Pairs behind a bare name: the words for "less" and for "more" that go before the subject.
ATTRIBUTES = {
    "age": ("young", "old"),
    "height": ("short", "tall"),
    "price": ("cheap", "expensive"),
    "shade": ("light", "dark"),
    "size": ("small", "large"),
    "width": ("narrow", "wide"),
}
# The contexts over which a contrastive pair is averaged.
PREFIXES = "{,a photo of,a picture of}"
MAX_PICTURES = 1024
DEFAULT_MODEL = "t2i-shapes"


def parse_scales(text: str) -> list[float]:
    """The scales of `-2:2:9` (from, to, how many), of `-2,0,2`, or of one number.

    Raises:
        InvalidInputError: for anything else, or numbers that are not finite.
    """
    from vistok.errors import InvalidInputError

    wrong = InvalidInputError(
        f"--scale {text!r} is no range of finite numbers; give FROM:TO:COUNT such as -2:2:9 (COUNT from 2 to "
        f"{MAX_PICTURES}), a list such as -2,0,2, or one number"
    )
    try:
        if ":" in text:
            low, high, count = text.split(":")
            start, stop, number = float(low), float(high), int(count)
            if not 2 <= number <= MAX_PICTURES:
                raise wrong
            # Rounded, so that the middle of a symmetric range is exactly the plain picture.
            scales = [round(start + (stop - start) * index / (number - 1), 12) for index in range(number)]
        else:
            scales = [float(value) for value in text.split(",")]
    except (ValueError, OverflowError) as error:
        raise wrong from error
    if len(scales) > MAX_PICTURES or not all(math.isfinite(scale) for scale in scales):
        raise wrong
    return [scale + 0.0 for scale in scales]  # no negative zero


def parse_attribute(text: str) -> tuple[str, str]:
    """(words for less, words for more) of `small:large`, or of a name from `ATTRIBUTES`.

    Raises:
        InvalidInputError: for anything else.
    """
    from vistok.errors import InvalidInputError

    if text in ATTRIBUTES:
        return ATTRIBUTES[text]
    sides = [" ".join(side.split()) for side in text.split(":")]
    if len(sides) != 2 or not all(sides) or sides[0] == sides[1]:
        raise InvalidInputError(
            f"--attribute {text!r} is no pair of opposites; give LESS:MORE such as 'small:large', one of "
            f"{', '.join(ATTRIBUTES)}, or a direction that was saved with --delta FILE"
        )
    return sides[0], sides[1]


def load_text_to_image(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    """A diffusers text-to-image pipeline: a shipped one, from a folder, or from the Hub.

    Args:
        model: shipped name (`t2i-shapes`) or export of the lab, folder with `model_index.json`, or a Hub id.
        device: None is the CPU.
        dtype: name of a torch type; None is float32 on the CPU and bfloat16 elsewhere.

    Raises:
        InvalidInputError: if there is none, it cannot be read, or it does not fit the device.
    """
    from vistok.errors import InvalidInputError

    expected = (
        f"expected {DEFAULT_MODEL}, a folder that a diffusers text-to-image pipeline was saved to, or its Hub id, "
        "e.g. stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    from vistok.hub import load, recommended_sampling, shipped

    ours = model in shipped() or bool(recommended_sampling(model))
    if ours:
        pass
    elif Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise InvalidInputError(f"{model} has no model_index.json; {expected}")
    elif not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", model):
        raise InvalidInputError(f"there is no pipeline at {model!r}; {expected}")
    import diffusers
    import torch
    import transformers

    # Their bars and notes would bury ours.
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    target = device or "cpu"
    number_type = getattr(torch, dtype or ("float32" if target == "cpu" else "bfloat16"), None)
    if not isinstance(number_type, torch.dtype) or not number_type.is_floating_point:
        raise InvalidInputError(f"--dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
    if ours:
        return load(model, device=device, dtype=number_type)
    # What can be wrong with a stranger's folder, network or device comes as errors of half a dozen libraries.
    try:
        with warnings.catch_warnings():
            # Newer diffusers call this argument `dtype` and warn; the oldest that we take know only this name.
            warnings.simplefilter("ignore", FutureWarning)
            pipe = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=number_type)
    except Exception as error:
        raise InvalidInputError(f"{model} cannot be loaded as a diffusers pipeline ({_first_line(error)})") from error
    try:
        pipe.to(target)
    except Exception as error:
        raise InvalidInputError(f"{model} cannot be put on {target} ({_first_line(error)})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def pair_delta(text: Any, subject: str, less: str, more: str) -> Any:
    """The optimisation-free direction of a contrastive pair: a few encoder passes, no diffusion model.

    Args:
        text: `vistok.nn.prompts.PipelineText`.
        subject: a noun or noun phrase.
        less: words before it for a negative scale.
        more: words before it for a positive scale.

    Returns:
        The `AttributeDelta`.
    """
    from vistok.controllers.attribute_directions import ContrastivePrompts, PromptPair, contrast_delta
    from vistok.controllers.scop import article

    pair = PromptPair(article(subject), article(f"{more} {subject}"), article(f"{less} {subject}"))
    return contrast_delta(text, ContrastivePrompts([pair], PREFIXES))


def with_scale(picture: Image.Image, scale: float) -> Image.Image:
    """The picture with its scale written beneath it."""
    from PIL import Image, ImageDraw, ImageFont

    size = max(10, picture.height // 20)
    sheet = Image.new("RGB", (picture.width, picture.height + size + 4), "white")
    sheet.paste(picture, (0, 0))
    where = (picture.width / 2, picture.height + 2)
    ImageDraw.Draw(sheet).text(where, _name(scale), fill="black", anchor="ma", font=ImageFont.load_default(size))
    return sheet


def _name(scale: float) -> str:
    return f"{scale:+.3g}" if scale else "0"


def steer(
    prompt: Annotated[str, typer.Argument(help='What to draw, e.g. "a circle and a star".')],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="A diffusers text-to-image pipeline (Stable Diffusion 1.x/2.x/3, SDXL, FLUX): shipped name, folder or "
            "Hub id.",
        ),
    ] = DEFAULT_MODEL,
    subject: Annotated[str | None, typer.Option(help="Word or phrase of the prompt, e.g. circle.")] = None,
    attribute: Annotated[
        str | None,
        typer.Option(help=f"LESS:MORE, e.g. small:large; or a name for such a pair: {', '.join(ATTRIBUTES)}."),
    ] = None,
    delta: Annotated[
        Path | None, typer.Option(help="In place of --attribute: a saved direction (.pt as published, .safetensors).")
    ] = None,
    scale: Annotated[
        str, typer.Option(help="FROM:TO:COUNT, a list such as -2,0,2, or one number; 0 is the plain picture.")
    ] = "-2:2:9",
    occurrence: Annotated[
        int | None, typer.Option(help="Which match of the subject, from 0; -1 is the last.", show_default="all")
    ] = None,
    delay: Annotated[
        float, typer.Option(help="Part of the steps, in [0, 1), left to the plain prompt, so that the layout stays.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Every picture starts from the noise of this seed.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture file of the strip.")] = Path("strip.png"),
    num_inference_steps: Annotated[int | None, typer.Option(min=1, show_default="the pipeline's own")] = None,
    guidance_scale: Annotated[float | None, typer.Option(show_default="the pipeline's own")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid (not with FLUX).")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="the pipeline's own")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="the pipeline's own")] = None,
    save_delta: Annotated[
        Path | None, typer.Option(help="Also keep the direction, as .safetensors or .pt, for --delta.")
    ] = None,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Write each scale under its picture.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once; does not change them.")] = 4,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cpu")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.", show_default="float32 on the CPU, otherwise bfloat16"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Turn an attribute of one subject from less to more: a strip of pictures that share their noise."""
    from vistok.errors import InvalidInputError, InvalidOutputError

    begun = time.perf_counter()
    # Everything that can be refused without torch is refused first, then what needs no pipeline.
    if not prompt.strip():
        raise InvalidInputError('say what to draw: vistok steer "a circle and a star" ...')
    if subject is None:
        raise InvalidInputError("say whose attribute to change with --subject: a word or phrase of the prompt")
    if (attribute is None) == (delta is None):
        raise InvalidInputError("give either --attribute LESS:MORE (such as small:large) or --delta FILE")
    scales = parse_scales(scale)
    pair = None if attribute is None else parse_attribute(attribute)
    if not 0.0 <= delay < 1.0:
        raise InvalidInputError(f"--delay is a part of the steps in [0, 1), got {delay}")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise InvalidInputError(f"--guidance-scale must be a finite number, got {guidance_scale}")
    if save_delta is not None and save_delta.suffix not in (".pt", ".safetensors"):
        raise InvalidInputError(f"--save-delta {save_delta} must end in .safetensors or .pt")
    import numpy as np
    from PIL import Image

    if output.suffix.lower() not in Image.registered_extensions():
        raise InvalidInputError(f"{output} has no suffix of an image format; use .png")
    from vistok.nn.spans import covered_tokens, find_subject, token_spans

    characters = find_subject(prompt, subject, occurrence)

    import torch

    from vistok.cli.pictures import grid_of, progress, save_picture
    from vistok.controllers import AttributeDelta, AttributeDirections, AttributeEdit
    from vistok.hub import recommended_sampling
    from vistok.nn.prompts import describe_pipeline

    direction = None if delta is None else AttributeDelta.load(delta)
    pipe = load_text_to_image(model, device, dtype)
    text = describe_pipeline(pipe)
    if text.family == "cascade":
        raise InvalidInputError(f"{model} is the prior of a cascade, which draws no pictures by itself")
    if text.family == "flux" and negative_prompt is not None:
        raise InvalidInputError("FLUX does not read a negative prompt; leave --negative-prompt out")
    defaults = {name: value.default for name, value in inspect.signature(type(pipe).__call__).parameters.items()}
    # What the checkpoint recommends goes before the defaults of the pipeline's class.
    recommended = recommended_sampling(model)
    defaults |= recommended
    steps = num_inference_steps or int(defaults["num_inference_steps"])
    if round(delay * steps) >= steps:
        raise InvalidInputError(
            f"--delay {delay} leaves none of the {steps} steps to steer; use a smaller one, or more steps"
        )
    tokens = {}
    for slot in text.encoders:
        if slot.tokens:
            spans = token_spans(prompt, slot.tokenizer)
            tokens[slot.key] = covered_tokens(spans, characters, slot.length)
    if direction is None:
        assert pair is not None
        direction = pair_delta(text, subject, *pair)
    if save_delta is not None:
        direction.save(save_delta)
    loaded = time.perf_counter()

    settings: dict[str, Any] = {"guidance_scale": guidance_scale, "height": height, "width": width}
    settings = {name: value for name, value in settings.items() if value is not None}
    settings = {**{name: value for name, value in recommended.items() if name != "num_inference_steps"}, **settings}
    arrays: list[Any] = []
    filtered = 0
    interrupted = False
    with progress("pictures x steps", 1) as advance:
        try:
            for first in range(0, len(scales), batch_size):
                part = scales[first : first + batch_size]

                def on_step(pipeline: Any, index: int, timestep: Any, inputs: dict, count: int = len(part)) -> dict:
                    advance(count, total=int(pipeline.num_timesteps) * len(scales))
                    return inputs

                controller = AttributeDirections(AttributeEdit(direction, subject, part, occurrence), delay=delay)
                inputs = controller.prompt_kwargs(
                    pipe,
                    prompt,
                    negative_prompt=negative_prompt,
                    num_inference_steps=steps,
                    callback_on_step_end=on_step,
                )
                try:
                    result = pipe(
                        **inputs,
                        **settings,
                        num_inference_steps=steps,
                        # One generator a picture: all start from the same noise, whatever the batch size.
                        generator=[torch.Generator().manual_seed(seed) for _ in part],
                        output_type="np",
                    )
                except (ValueError, RuntimeError) as error:  # sizes that do not fit the network, too little memory
                    raise InvalidInputError(f"{model} cannot draw this: {_first_line(error)}") from error
                if not np.isfinite(result.images).all():
                    raise InvalidOutputError(
                        f"{model} drew NaN at the scales {', '.join(map(_name, part))}; use smaller scales, "
                        "or --dtype float32"
                    )
                filtered += sum(map(bool, getattr(result, "nsfw_content_detected", None) or []))
                arrays.extend(np.round(result.images * 255).astype(np.uint8))
        except KeyboardInterrupt:
            if not arrays:
                raise
            interrupted = True  # what is finished is written
    drawn = time.perf_counter()
    pictures = [Image.fromarray(array) for array in arrays]
    shown = [with_scale(picture, value) for picture, value in zip(pictures, scales)] if labels else pictures
    save_picture(grid_of(shown, columns=len(shown)), output)

    done = scales[: len(pictures)]
    nearest = min(range(len(done)), key=lambda index: abs(done[index]))
    reference = arrays[nearest].astype(np.float64)
    report = {
        "output": str(output),
        "model": model,
        "pipeline": type(pipe).__name__,
        "prompt": prompt,
        "subject": subject,
        "subject_tokens": tokens,
        "attribute": None if pair is None else {"less": pair[0], "more": pair[1]},
        "delta": None if delta is None else str(delta),
        "delta_norms": {key: round(value, 4) for key, value in direction.norms().items()},
        "scales": done,
        # Mean absolute change of the pixels, 0 to 255, from the picture whose scale is nearest to 0.
        "mean_pixel_change": [round(float(np.abs(array - reference).mean()), 4) for array in arrays],
        "reference_scale": done[nearest],
        "size": list(pictures[0].size),
        "delay": delay,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale if guidance_scale is not None else defaults.get("guidance_scale"),
        "blacked_out_by_safety_checker": filtered,
        "interrupted": interrupted,
        "seconds_to_load": round(loaded - begun, 3),
        "seconds_to_draw": round(drawn - loaded, 3),
    }
    if save_delta is not None:
        report["save_delta"] = str(save_delta)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        typer.echo(
            f"{output}: {len(done)} picture{'s' if len(done) > 1 else ''}, {subject} "
            f"{f'from {pair[0]} to {pair[1]}' if pair else f'along {delta}'} at the scales "
            f"{', '.join(map(_name, done))}, seed {seed} "
            f"(loaded in {loaded - begun:.1f} s, drawn in {drawn - loaded:.1f} s)"
        )
    if filtered:
        typer.echo(f"vistok: the pipeline's safety checker blacked out {filtered} of {len(done)} pictures", err=True)
    if interrupted:
        typer.echo(f"vistok: {len(done)} of {len(scales)} pictures were finished; they are in {output}", err=True)
        raise typer.Exit(130)
