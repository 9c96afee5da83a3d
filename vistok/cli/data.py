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
