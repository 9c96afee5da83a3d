"""`vistok data`: look at data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look at the lab world's data.")


@app.callback()
def _data() -> None:
    """Look at the lab world's data."""


@app.command()
def preview(
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, max=400, help="How many scenes.")] = 16,
    num_objects: Annotated[int | None, typer.Option(min=1, max=3, help="Objects a scene (default: 1 to 3).")] = None,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Side in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Stream of scenes.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG grid.")] = Path("scenes.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print captions and annotations as JSON.")] = False,
) -> None:
    """Write a grid of scenes, and print their captions in the same order."""
    import json
    from dataclasses import asdict

    import numpy as np
    from PIL import Image

    from vistok.cli.pictures import grid_of, save_picture
    from vistok.data import shapes

    pictures, listed = [], []
    for index in range(num_images):
        scene = shapes.sample_scene(seed, index, num_objects)
        pictures.append(Image.fromarray(shapes.render(scene, image_size)))
        text = shapes.caption(scene, np.random.default_rng([seed, index]))
        listed.append({"index": index, "caption": text, "objects": [asdict(item) for item in scene.objects]})
        if not as_json:
            typer.echo(f"{index:3d}  {text}")
    save_picture(grid_of(pictures), output)
    if as_json:
        typer.echo(json.dumps({"output": str(output), "seed": seed, "scenes": listed}))
        return
    typer.echo(f"{output}: {num_images} scenes of seed {seed}")


@app.command()
def questions(
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="How many questions.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Stream of scenes; 0 to 2 were trained on.")] = 7,
    num_objects: Annotated[int | None, typer.Option(min=1, max=3, help="Objects a scene (default: 1 to 3).")] = None,
    per_image: Annotated[int, typer.Option(min=1, help="Most questions about one picture.")] = 1,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="colour, shape, size, shade, count, relation or where; repeatable (default: all in turn)"),
    ] = None,
    image_size: Annotated[int, typer.Option(min=16, max=1024, help="Side in pixels.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write pictures and questions about them: a folder for `vistok eval pruners --data`."""
    import json

    from vistok.cli.evaluate import stages
    from vistok.data.shapes import QUESTION_KINDS, write_questions

    with stages() as on_progress:
        file = write_questions(
            output,
            num,
            seed=seed,
            image_size=image_size,
            num_objects=num_objects,
            per_image=per_image,
            kinds=tuple(kind) if kind else QUESTION_KINDS,
            on_progress=lambda done, total: on_progress("questions", done, total),
        )
    if as_json:
        typer.echo(json.dumps({"output": str(file), "questions": num, "seed": seed}))
        return
    typer.echo(f"{file}: {num} questions about scenes of seed {seed}")
