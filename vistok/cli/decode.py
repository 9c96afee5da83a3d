"""`vistok decode`: tokens to pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def decode(
    tokens: Annotated[Path, typer.Argument(help="File written by `vistok encode` or VisualTokens.save.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The tokenizer that made them.")] = "vq-shapes",
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG; several pictures become a grid.")] = Path(
        "decoded.png"
    ),
    seed: Annotated[
        int,
        typer.Option(min=0, help="Of tokenizers that draw (FlexTok): picture k is drawn from seed + k."),
    ] = 0,
    guidance_scale: Annotated[float | None, typer.Option(help="Likewise; by default the tokenizer's own.")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Likewise; by default the tokenizer's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Decode a file of tokens into a picture."""
    import json

    from vistok.cli.pictures import grid_of, load_tokenizer, save_picture
    from vistok.errors import InvalidInputError
    from vistok.tokens import VisualTokens

    held = VisualTokens.load(tokens)
    tokenizer = load_tokenizer(model)
    given = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if hasattr(tokenizer, "denoise") or hasattr(tokenizer, "decode_embeddings"):  # FlexTok, SEED
        import torch

        settings["generator"] = [torch.Generator().manual_seed(seed + number) for number in range(len(held))]
    elif settings:
        raise InvalidInputError(
            f"{model} is a {type(tokenizer).__name__}, which draws nothing: --guidance-scale and --num-inference-steps "
            "are for tokenizers that decode by sampling, such as FlexTok"
        )
    pictures = tokenizer.postprocess(tokenizer.decode(held, **settings))
    save_picture(grid_of(pictures) if len(pictures) > 1 else pictures[0], output)
    if as_json:
        width, height = pictures[0].size
        typer.echo(json.dumps({"output": str(output), "num_images": len(pictures), "width": width, "height": height}))
        return
    size = f"{pictures[0].width}x{pictures[0].height}"
    typer.echo(f"{output}: {len(pictures)} picture{'s' if len(pictures) > 1 else ''} of {size}")
