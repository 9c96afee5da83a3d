"""`vistok decode`: tokens to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def decode(
    tokens: Annotated[Path, typer.Argument(help="File written by `vistok encode` or VisualTokens.save.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The tokenizer that made them.")] = "vq-shapes",
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG; several pictures become a grid.")] = Path(
        "decoded.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Decode a file of tokens into a picture."""
    import json

    from vistok.cli.pictures import grid_of, load_tokenizer, save_picture
    from vistok.tokens import VisualTokens

    held = VisualTokens.load(tokens)
    tokenizer = load_tokenizer(model)
    pictures = tokenizer.postprocess(tokenizer.decode(held))
    save_picture(grid_of(pictures) if len(pictures) > 1 else pictures[0], output)
    if as_json:
        width, height = pictures[0].size
        typer.echo(json.dumps({"output": str(output), "num_images": len(pictures), "width": width, "height": height}))
        return
    size = f"{pictures[0].width}x{pictures[0].height}"
    typer.echo(f"{output}: {len(pictures)} picture{'s' if len(pictures) > 1 else ''} of {size}")
