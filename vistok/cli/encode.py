"""`vistok encode`: pictures to tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from vistok.tokens import VisualTokens


def encode(
    images: Annotated[list[Path], typer.Argument(help="Pictures; several must give the same number of tokens.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A tokenizer. By default vq-shapes, and flextok-shapes with --tokens.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Scale pictures until they cover a square of this side, and cut out their middle. By default they "
            "keep their size; tokenizers with ordered tokens, such as FlexTok, take the square they were trained for.",
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            help="Lengths such as 1,4,16,64, for tokenizers with ordered tokens: keeps as many tokens as the longest "
            "says, and draws each picture from its first 1, 4, 16 and 64 into a strip.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="safetensors file.")] = Path("tokens.safetensors"),
    strip: Annotated[
        Path | None,
        typer.Option(help="With --tokens: the strip, a row for each picture. By default the output's name with .png."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="With --tokens: picture k is drawn from seed + k.")] = 0,
    guidance_scale: Annotated[float | None, typer.Option(help="With --tokens; by default the tokenizer's own.")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="With --tokens; by default the tokenizer's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print facts as JSON.")] = False,
) -> None:
    """Encode pictures into a file of tokens, and show what the first ones of ordered tokens hold."""
    lengths = None if tokens is None else _lengths(tokens)
    model = model or ("vq-shapes" if lengths is None else "flextok-shapes")
    from vistok.cli.pictures import codebook_size, load_tokenizer
    from vistok.errors import InvalidInputError

    sampling = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if lengths is None and (strip is not None or sampling):
        raise InvalidInputError("--strip, --guidance-scale and --num-inference-steps need --tokens, e.g. --tokens 1,4")
    strip = output.with_suffix(".png") if strip is None else strip
    if lengths is not None and strip == output:
        raise InvalidInputError(f"tokens and strip cannot both be written to {output}; give --strip another name")
    tokenizer = load_tokenizer(model)
    if lengths is not None:
        _check_ordered(tokenizer, model, lengths)
    pixels = [tokenizer.preprocess(path, size=size) for path in images]
    if len({tuple(image.shape) for image in pixels}) > 1:
        sizes = ", ".join(f"{path.name} {image.shape[-1]}x{image.shape[-2]}" for path, image in zip(images, pixels))
        raise InvalidInputError(
            f"pictures of several sizes in one file ({sizes}); give --size, or encode them one by one"
        )
    import torch

    batch = torch.cat(pixels)
    encoded = tokenizer.encode(batch) if lengths is None else tokenizer.encode(batch, lengths[-1])
    codes = codebook_size(tokenizer)
    drawn = []
    if lengths is not None:
        drawn = _draw_strip(tokenizer, batch, encoded, lengths, strip, seed, sampling)
    encoded.save(output)
    bits = None if codes is None else int(encoded.bits(codes)[0])
    channels = None if encoded.features is None else encoded.features.shape[2]
    report = {
        "output": str(output),
        "images": len(encoded),
        "grid": list(encoded.grid or ()),
        "tokens_per_image": encoded.num_tokens,
        "codebook_size": codes,
        "bits_per_image": bits,
        "token_size": channels,
    }
    if lengths is not None:
        report |= {"strip": str(strip), "prefixes": drawn}
    if as_json:
        typer.echo(json.dumps(report))
        return
    extent = f"{channels} numbers each" if bits is None else f"{bits / 8:.0f} bytes an image ({codes} codes)"
    layout = "ordered" if encoded.grid is None else encoded.grid
    typer.echo(f"{output}: {len(encoded)} x {encoded.num_tokens} tokens {layout}, {extent}")
    if lengths is not None:
        height, width = batch.shape[-2:]
        typer.echo(f"{strip}: pictures of {width}x{height}, the original first")
    for one in drawn:
        typer.echo(
            f"{one['tokens']:6d} token{'s' if one['tokens'] > 1 else ' '}  {one['bits']:6d} bits  {one['psnr']:6.2f} dB"
        )


def _lengths(text: str) -> list[int]:
    """Numbers of tokens, sorted, from "1,4,16".

    Raises:
        InvalidInputError: not such a list, or a number below 1.
    """
    from vistok.errors import InvalidInputError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise InvalidInputError(f"--tokens takes numbers of tokens, each at least 1, such as 1,4,16,64; got {text!r}")
    return sorted({int(part) for part in parts})


def _check_ordered(tokenizer: Any, name: str, lengths: list[int]) -> None:
    """Raise InvalidInputError unless the first `lengths` tokens of this tokenizer stand for a picture."""
    from vistok.errors import InvalidInputError

    if not hasattr(tokenizer, "decode_prefixes"):
        raise InvalidInputError(
            f"{name} is a {type(tokenizer).__name__}, whose tokens have no order: its first ones are no picture; "
            "--tokens needs a tokenizer with ordered tokens, such as flextok-shapes"
        )
    if lengths[-1] > tokenizer.num_registers:
        raise InvalidInputError(
            f"--tokens: {name} makes at most {tokenizer.num_registers} tokens of a picture; got {lengths[-1]}"
        )


def _draw_strip(
    tokenizer: Any,
    images: Tensor,
    encoded: VisualTokens,
    lengths: list[int],
    path: Path,
    seed: int,
    sampling: dict[str, Any],
) -> list[dict[str, Any]]:
    """Write the pictures drawn from the first tokens, and say how near they come (mean over the pictures)."""
    import torch

    from vistok.cli.pictures import grid_of, progress, save_picture, with_titles
    from vistok.metrics.reconstruction import psnr

    rows, errors = [], []
    with progress("drawing", len(images)) as advance:
        for number, image in enumerate(images):
            generator = torch.Generator().manual_seed(seed + number)
            decoded = tokenizer.decode_prefixes(
                encoded[number], lengths, generator=generator, image_size=tuple(image.shape[-2:]), **sampling
            )[0].cpu()
            rows += [image[None], decoded]
            errors.append(psnr(decoded.float(), image.expand_as(decoded)))
            advance()
    titles = ["original", *map(str, lengths)]
    pictures = tokenizer.postprocess(torch.cat(rows))
    save_picture(with_titles(grid_of(pictures, columns=len(titles)), titles), path)
    codes = tokenizer.codebook_size
    return [
        {"tokens": length, "bits": int(encoded.keep(length).bits(codes)[0]), "psnr": round(float(error), 3)}
        for length, error in zip(lengths, torch.stack(errors).mean(0))
    ]
