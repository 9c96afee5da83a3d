"""`vistok generate`: pictures from a prompt or a class."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer


def preview_latents(pipe: Any, latents: Any) -> list[Any]:
    """What the latents of a running Stable Diffusion show, as PIL pictures."""
    import torch

    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pipe.image_processor.postprocess(images)


def generate(
    prompt: Annotated[str | None, typer.Argument(help='What to draw, e.g. "a red circle".')] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Shipped or published name, or a folder.")] = "nar-shapes",
    class_label: Annotated[
        str | None, typer.Option("--class", help="Class by number or name, for class-conditional models.")
    ] = None,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, max=1024, help="How many.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Picture k is drawn from seed + k, whatever the number.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG of all pictures as a grid.")] = Path("grid.png"),
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Model steps, where they can be chosen (default: the checkpoint's own)")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels (default: as trained)")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels (default: as trained)")] = None,
    guidance_interval: Annotated[
        int | None, typer.Option(min=0, help="Guide until this many tokens are drawn (default: the checkpoint's own)")
    ] = None,
    film: Annotated[
        Path | None, typer.Option(help="Also write a film strip: one row a picture, one column a step.")
    ] = None,
    steps_dir: Annotated[
        Path | None, typer.Option(help="Also write the grid after every step into this folder.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once; does not change them.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Generate pictures and write them as one PNG grid."""
    from vistok.errors import InvalidInputError

    if prompt is not None and class_label is not None:
        raise InvalidInputError("give either a prompt or --class, not both")
    if prompt is None and class_label is None:
        raise InvalidInputError('say what to draw: vistok generate "a red circle"')
    begun = time.perf_counter()
    import torch

    from vistok.cli.pictures import grid_of, progress, save_picture
    from vistok.hub import load_pipeline, recommended_sampling

    pipe = load_pipeline(model, device=device)
    pipe.set_progress_bar_config(disable=True)
    stock = hasattr(pipe, "unet")  # a text-to-image pipeline of diffusers, made of latents instead of tokens
    settings: dict[str, Any] = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    settings |= {"height": height, "width": width}
    others: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance_interval": guidance_interval,
    }
    if stock:
        others["class"] = class_label
        foreign = [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]
        if foreign:
            raise InvalidInputError(
                f"{model} is a diffusion pipeline told by a prompt; it knows no {', '.join(foreign)}"
            )
        if (height is None) != (width is None):  # diffusers ignores one without the other
            side = pipe.unet.config.sample_size * pipe.vae_scale_factor
            settings |= {"height": height or side, "width": width or side}
        settings = recommended_sampling(model) | {key: value for key, value in settings.items() if value is not None}
    loaded = time.perf_counter()
    generators = [torch.Generator().manual_seed(seed + index) for index in range(num_images)]
    label: int | str | None = class_label
    if class_label is not None and class_label.lstrip("-").isdigit():
        label = int(class_label)
    strips: list[list] = []  # one a batch: previews [step][picture]
    pictures: list = []
    interrupted = False
    with progress("pictures x steps", 1) as advance:
        try:
            for first in range(0, num_images, batch_size):
                part = generators[first : first + batch_size]
                strip: list = []

                def on_step(pipeline: object, index: int, total: int, inputs: dict, strip: list = strip) -> dict:
                    drawn_so_far: Any = inputs["latents" if stock else "tokens"]
                    steps = pipe.num_timesteps if stock else total  # diffusers gives the time here
                    advance(len(drawn_so_far), total=steps * num_images)
                    if film is not None or steps_dir is not None:
                        strip.append(preview_latents(pipe, drawn_so_far) if stock else pipe.preview(drawn_so_far))
                    return inputs

                given = {} if stock else {"class_labels": label, **others}
                try:
                    result = pipe(
                        prompt,
                        num_images_per_prompt=len(part),
                        **settings,
                        **given,
                        generator=part,
                        callback_on_step_end=on_step,
                    )
                except ValueError as error:
                    if not stock or isinstance(error, InvalidInputError):
                        raise
                    raise InvalidInputError(f"{model} cannot draw this: {error}") from error
                pictures += result.images
                strips.append(strip)
        except KeyboardInterrupt:
            if not pictures:
                raise
            interrupted = True  # what is finished is written
    drawn = time.perf_counter()
    save_picture(grid_of(pictures), output)
    steps = [[picture for batch in moment for picture in batch] for moment in zip(*strips, strict=True)]
    if film is not None:
        save_picture(grid_of([step[row] for row in range(len(pictures)) for step in steps], columns=len(steps)), film)
    if steps_dir is not None:
        for number, step in enumerate(steps):
            save_picture(grid_of(step), steps_dir / f"step-{number:04d}.png")
    report = {
        "output": str(output),
        "model": model,
        "prompt": prompt,
        "class": class_label,
        "num_images": len(pictures),
        "seed": seed,
        "interrupted": interrupted,
        "seconds_to_load": round(loaded - begun, 3),
        "seconds_to_draw": round(drawn - loaded, 3),
    }
    if film is not None:
        report["film"] = str(film)
    if steps_dir is not None:
        report["steps_dir"] = str(steps_dir)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        typer.echo(
            f"{output}: {len(pictures)} picture{'s' if len(pictures) > 1 else ''} by {model}, seed {seed} "
            f"(loaded in {loaded - begun:.1f} s, drawn in {drawn - loaded:.1f} s)"
        )
    if interrupted:
        typer.echo(f"vistok: {len(pictures)} of {num_images} pictures were finished and written", err=True)
        raise typer.Exit(130)
