"""`vistok prune`: one question to a vision-language model, with and without its visual tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

SHORTEST_SIDE = 320  # pixels of a drawn panel: small pictures are enlarged


def prune(
    model: Annotated[str, typer.Argument(help="Shipped name, folder or Hub id of a transformers LVLM.")],
    image: Annotated[Path, typer.Argument(help="Any picture.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    method: Annotated[
        str, typer.Option(help="A pruning method, or several joined by +: fopru+transprune.")
    ] = "transprune",
    keep_ratio: Annotated[
        float | None,
        typer.Option(help="Share of visual tokens left after the last stage (default: the method's published setting)"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Time each so often and print the medians.")] = 1,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG: the picture, then what each stage kept.")] = Path(
        "kept.png"
    ),
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or auto (default: float32 on a CPU, else auto)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Ask a model about a picture with and without pruning; say what changed and draw what stayed.

    Methods: transprune, fopru, vflowopt, fastv, pyramiddrop, sparsevlm, fastervlm, visionzip, divprune, pooling,
    random.
    """
    from vistok.cli.pictures import save_picture
    from vistok.errors import InvalidInputError
    from vistok.files import open_image
    from vistok.metrics.pruning import UNPRUNED, Asker, check_method, load_lvlm
    from vistok.pruners.stages import check_ratio

    check_method(method)
    if keep_ratio is not None:
        check_ratio("--keep-ratio", keep_ratio)
    if not question.strip():
        raise InvalidInputError('the question is empty; ask something: vistok prune MODEL IMAGE "what is this?"')
    picture = open_image(image)
    if output.suffix.lower() != ".png":
        raise InvalidInputError(f"--output is a PNG, got {output}; call it {output.with_suffix('.png')}")
    network, processor = load_lvlm(model, device=device, dtype=dtype)
    asker = Asker(network, processor, max_new_tokens=max_new_tokens)
    inputs = asker.inputs(picture, question)
    answers: dict[str, list[Any]] = {UNPRUNED: [], method: []}
    # The first pass of each is slower than the others: it is not timed. The variants take turns.
    warm = Asker(network, processor, max_new_tokens=1)
    for name in answers:
        warm.answer(inputs, name, keep_ratio)
    for _ in range(repeats):
        for name, listed in answers.items():
            listed.append(asker.answer(inputs, name, keep_ratio))
    report = asker.last_report
    if report is None:
        raise InvalidInputError("the model never saw the picture: its processor put no image into the prompt")
    save_picture(_panels(picture, report, processor), output)
    stages = [
        {
            "name": stage.name,
            "place": stage.place,
            "layer": stage.layer,
            "kept": sum(len(visual.kept) for visual in stage.visuals),
            "of": sum(visual.tokens for visual in stage.visuals),
        }
        for stage in report.stages
    ]
    found = {
        "model": model,
        "image": str(image),
        "question": question,
        "method": method,
        "keep_ratio": keep_ratio,
        "device": network.device.type,
        "dtype": str(network.dtype).removeprefix("torch."),
        UNPRUNED: _figures(answers[UNPRUNED]),
        "pruned": {**_figures(answers[method]), "stages": stages},
        "same_answer": answers[UNPRUNED][-1].text == answers[method][-1].text,
        "output": str(output),
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)


def _figures(answers: list[Any]) -> dict[str, Any]:
    from dataclasses import asdict
    from statistics import median

    figures = asdict(answers[-1])
    figures["answer"] = figures.pop("text")
    figures["notes"] = list(figures["notes"])
    for name in ("prefill_seconds", "decode_seconds"):
        figures[name] = median(getattr(one, name) for one in answers)
    return dict(sorted(figures.items(), key=lambda item: item[0] != "answer"))


# ------------------------------------------------------------------------------------------------------------- picture
def _panels(picture: Image.Image, report: Any, processor: Any) -> Image.Image:
    """The picture as the tower saw it, and once for every stage with dropped tokens darkened."""
    from vistok.cli.pictures import grid_of
    from vistok.pruners import overlay

    seen = as_seen(picture, processor)
    shortest = min(seen.size)
    if shortest < SHORTEST_SIDE:
        factor = -(-SHORTEST_SIDE // shortest)
        seen = seen.resize((seen.width * factor, seen.height * factor), 0)
    panels = [seen, *(overlay(seen, stage.visuals[0]) for stage in report.stages)]
    return grid_of(panels, columns=len(panels), gap=8)


def as_seen(picture: Image.Image, processor: Any) -> Image.Image:
    """The part of a picture that an image processor shows to the tower: its middle if it crops, on grey if it pads."""
    from PIL import Image

    images = processor.image_processor
    if getattr(images, "image_grid_pinpoints", None):  # tiles cover the whole picture
        return picture
    if getattr(images, "do_pad", False) and type(images).__name__.startswith("LlavaImageProcessor"):
        side = max(picture.size)
        square = Image.new("RGB", (side, side), (127, 127, 127))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square
    size, crop = getattr(images, "size", None) or {}, getattr(images, "crop_size", None) or {}
    if getattr(images, "do_center_crop", False) and size.get("shortest_edge") and crop.get("height"):
        scale = size["shortest_edge"] / min(picture.size)
        width, height = (min(side, crop[name] / scale) for side, name in zip(picture.size, ("width", "height")))
        left, top = (picture.width - width) / 2, (picture.height - height) / 2
        return picture.crop((round(left), round(top), round(left + width), round(top + height)))
    return picture


# -------------------------------------------------------------------------------------------------------------- screen
def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    plain, pruned = found["unpruned"], found["pruned"]
    table = Table("", "unpruned", found["method"], "share", title=f"{found['question']}", title_justify="left")

    def row(name: str, key: str, form: Any) -> None:
        share = f"{100 * pruned[key] / plain[key]:.1f} %" if plain[key] else ""
        table.add_row(name, form(plain[key]), form(pruned[key]), share)

    table.add_row("answer", plain["answer"], pruned["answer"], "same" if found["same_answer"] else "differs")
    row("visual tokens left", "kept_tokens", str)
    row("average over the layers", "average_kept", lambda share: f"{100 * share:.1f} %")
    row("prefill operations", "flops", lambda count: f"{count / 1e9:.4g} GFLOPs")
    row("cache of the prompt", "kv_bytes", lambda count: f"{count / 2**20:.4g} MiB")
    row("prefill time", "prefill_seconds", lambda seconds: f"{1000 * seconds:.4g} ms")
    row("decoding time", "decode_seconds", lambda seconds: f"{1000 * seconds:.4g} ms")
    row("new tokens", "new_tokens", str)
    console = Console()
    console.print(table)
    for stage in pruned["stages"]:
        where = stage["place"] if stage["layer"] is None else f"{stage['place']} layer {stage['layer']}"
        console.print(
            f"{stage['name'] or 'stage'} ({where}): {stage['kept']} of {stage['of']} tokens",
            markup=False,
            highlight=False,
        )
    for note in pruned["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)
    console.print(f"picture {found['output']}", markup=False, highlight=False)
