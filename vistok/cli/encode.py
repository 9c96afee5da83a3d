"""`vistok encode`: pictures to tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def encode(
    images: Annotated[list[Path], typer.Argument(help="Pictures; several must give the same number of tokens.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A tokenizer.")] = "vq-shapes",
    size: Annotated[
        int | None, typer.Option(help="Scale and crop to this square [default: the picture's own size].")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="safetensors file.")] = Path("tokens.safetensors"),
    as_json: Annotated[bool, typer.Option("--json", help="Print facts as JSON.")] = False,
) -> None:
    """Encode pictures into a file of tokens."""
    from vistok.cli.pictures import codebook_size, load_tokenizer
    from vistok.errors import InvalidInputError

    tokenizer = load_tokenizer(model)
    pixels = [tokenizer.preprocess(path, size=size) for path in images]
    if len({tuple(image.shape) for image in pixels}) > 1:
        sizes = ", ".join(f"{path.name} {image.shape[-1]}x{image.shape[-2]}" for path, image in zip(images, pixels))
        raise InvalidInputError(
            f"pictures of several sizes in one file ({sizes}); give --size, or encode them one by one"
        )
    import torch

    tokens = tokenizer.encode(torch.cat(pixels))
    tokens.save(output)
    codes = codebook_size(tokenizer)
    bits = None if codes is None else int(tokens.bits(codes)[0])
    channels = None if tokens.features is None else tokens.features.shape[2]
    report = {
        "output": str(output),
        "images": len(tokens),
        "grid": list(tokens.grid or ()),
        "tokens_per_image": tokens.num_tokens,
        "codebook_size": codes,
        "bits_per_image": bits,
        "token_size": channels,
    }
    if as_json:
        typer.echo(json.dumps(report))
    else:
        size = f"{channels} numbers each" if bits is None else f"{bits / 8:.0f} bytes an image ({codes} codes)"
        typer.echo(f"{output}: {len(tokens)} x {tokens.num_tokens} tokens {tokens.grid}, {size}")
