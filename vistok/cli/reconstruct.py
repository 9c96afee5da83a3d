"""`vistok reconstruct`: a picture through the tokens and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer


def reconstruct(
    image: Annotated[Path, typer.Argument(help="Any picture, any size.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A tokenizer.")] = "vq-shapes",
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG.")] = Path("reconstruction.png"),
    side_by_side: Annotated[bool, typer.Option("--side-by-side", help="Original on the left.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts as JSON.")] = False,
) -> None:
    """Encode and decode a picture, and say how much was lost (PSNR in dB, 8-bit pixels)."""
    import numpy as np

    from vistok.cli.pictures import codebook_size, grid_of, load_tokenizer, save_picture
    from vistok.errors import InvalidInputError
    from vistok.files import open_image

    original = open_image(image)
    tokenizer = load_tokenizer(model)
    if not hasattr(tokenizer, "reconstruct"):
        raise InvalidInputError(
            f"{model} is a {type(tokenizer).__name__}, which does not give back a picture in its own size"
            + (": use vistok encode --tokens" if hasattr(tokenizer, "decode_prefixes") else "")
        )
    result = tokenizer.reconstruct(original)
    error = float(((np.asarray(original, dtype=np.float64) - np.asarray(result, dtype=np.float64)) ** 2).mean())
    psnr = math.inf if error == 0 else 10 * math.log10(255**2 / error)
    save_picture(grid_of([original, result], columns=2) if side_by_side else result, output)
    factor = tokenizer.downsample_factor
    tokens = -(-original.width // factor) * -(-original.height // factor)
    codes = codebook_size(tokenizer)
    pixels = original.width * original.height
    rate = None if codes is None else round(tokens * math.log2(codes) / pixels, 4)
    report = {
        "output": str(output),
        "psnr": None if math.isinf(psnr) else round(psnr, 3),
        "tokens": tokens,
        "bits_per_pixel": rate,
    }
    if as_json:
        typer.echo(json.dumps(report))
    else:
        size = f"of {tokenizer.token_size} numbers" if rate is None else f"({rate} bits a pixel)"
        typer.echo(f"{output}: {psnr:.2f} dB from {tokens} tokens {size}")
