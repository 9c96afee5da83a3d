"""`vistok evaluate`: judge a tokenizer or a generator in the lab world."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SHOWN = 64  # pictures in a grid


def evaluate(
    model: Annotated[str, typer.Argument(help="Shipped name, folder or Hub id of a tokenizer or generator.")],
    num_samples: Annotated[int, typer.Option(min=2, help="Scenes (tokenizers) or pictures of each kind.")] = 1000,
    photo: Annotated[
        list[str] | None,
        typer.Option(help="Photographs for tokenizers: names that scikit-image ships, or files (default: none)."),
    ] = None,
    photo_size: Annotated[int, typer.Option(min=16, help="Larger photographs are scaled to this longest side.")] = 512,
    fid: Annotated[
        str, typer.Option(help="Feature extractor of the Frechet distance: a model, inception, or none.")
    ] = "features-shapes",
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Model steps, where they can be chosen (default: the checkpoint's own)")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures a batch.")] = 50,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for pictures (default: evaluation/MODEL).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Judge a model in the lab world: held-out scenes, the oracle, Frechet distance, with 95 % intervals.

    Tokenizers: PSNR, SSIM, codebook usage, whether the oracle reads the same objects before and after.
    Generators: share of pictures that show what was asked for.
    """
    from vistok.errors import InvalidInputError
    from vistok.files import write_text_atomic
    from vistok.hub import load, load_pipeline
    from vistok.metrics.evaluate import evaluate_generator, evaluate_tokenizer

    folder = output if output is not None else Path("evaluation") / Path(model).name
    network = load(model)
    given = {
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "num_inference_steps": num_inference_steps,
    }
    sampling = {name: value for name, value in given.items() if value is not None}
    album = _Album()
    with stages() as on_progress:
        shared: dict[str, Any] = {
            "extractor": None if fid == "none" else fid,
            "batch_size": batch_size,
            "on_progress": on_progress,
            "on_images": album.add,
        }
        if hasattr(network, "sample"):
            if photo:
                raise InvalidInputError(f"--photo is for tokenizers; {model} is a generator")
            report = evaluate_generator(
                load_pipeline(model), num_samples=num_samples, seed=seed, sampling=sampling, **shared
            )
        elif hasattr(network, "decode"):
            if sampling:
                raise InvalidInputError(f"{', '.join(sampling)}: settings for generators; {model} is a tokenizer")
            report = evaluate_tokenizer(
                network, num_images=num_samples, photographs=photo or (), photograph_size=photo_size, **shared
            )
        else:
            raise InvalidInputError(
                f"{model} is a {type(network).__name__}; tokenizers and generators can be evaluated"
            )
    report = {"model": model, **report}
    report["pictures"] = [str(path) for path in album.save(folder)]
    text = json.dumps(report, indent=2)
    write_text_atomic(folder / "report.json", text + "\n")
    if as_json:
        typer.echo(text)
    else:
        _print(report)


# ------------------------------------------------------------------------------------------------------------ pictures
class _Album:
    """Keeps the first pictures of each kind and writes them as grids."""

    def __init__(self) -> None:
        self.pictures: dict[str, list[Tensor]] = {}

    def add(self, what: str, images: Tensor) -> None:
        kept = self.pictures.setdefault(what, [])
        room = SHOWN - sum(len(part) for part in kept)
        if room > 0:
            kept.append(images[:room].clone())

    def save(self, folder: Path) -> list[Path]:
        import torch

        found = {what: torch.cat(parts) for what, parts in self.pictures.items()}
        written = []
        pairs = {"originals": "reconstructions"} | {
            what: what.replace("photograph", "reconstruction", 1) for what in found if what.startswith("photograph ")
        }
        for first, second in pairs.items():
            if first in found:
                one, two = found.pop(first), found.pop(second)
                if len(one) > 1:  # scenes: a row of originals above a row of their reconstructions
                    rows = [torch.cat([one[start : start + 16], two[start : start + 16]]) for start in (0, 16)]
                    found["reconstruction"] = torch.cat([row for row in rows if len(row)])
                else:
                    found[first] = torch.cat([one, two])
        for what, images in found.items():
            path = folder / f"{what.replace(' ', '-')}.png"
            columns = {"reconstruction": min(16, len(images) // 2)}.get(what, 2 if "photograph" in what else 8)
            _save_grid(images, columns, path)
            written.append(path)
        return written


def _save_grid(images: Tensor, columns: int, path: Path) -> None:
    from PIL import Image

    from vistok.cli.pictures import grid_of, save_picture

    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    save_picture(grid_of([Image.fromarray(picture) for picture in pixels], columns), path)


# -------------------------------------------------------------------------------------------------------------- screen
@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage of a long run, with rate and time left, on stderr; silent when that is no terminal.

    Yields:
        `advance(what, done, total)`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, rate="")
            bar.update(tasks[what], completed=done)
            speed = bar.tasks[bar.task_ids.index(tasks[what])].speed
            bar.update(tasks[what], rate=f"{speed:.0f}/s" if speed else "")

        yield advance


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "95 % interval", "of", title=f"{report['model']} ({report['kind']})")
    for name, value, interval, of in _rows(report):
        table.add_row(name, value, interval, of)
    console = Console()
    console.print(table)
    for name, distance in _distances(report):
        console.print(
            f"{name} {distance['value']:.3f}: evaluator {distance['evaluator']}; reference {distance['reference']}, "
            f"n={distance['reference_samples']}; samples n={distance['samples']}; resize {distance['resize']}; "
            f"sampler {distance['sampler']}",
            markup=False,
            highlight=False,
        )
    for path in report["pictures"]:
        console.print(f"picture {path}", markup=False, highlight=False)


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    if report["kind"] == "tokenizer":
        for name, unit in (("psnr", " dB"), ("ssim", "")):
            figure = report[name]
            digits = 2 if name == "psnr" else 4
            interval = f"[{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"
            yield f"{name} of scenes", f"{figure['value']:.{digits}f}{unit}", interval, f"{figure['total']} scenes"
        if "codebook" in report:
            book = report["codebook"]
            yield "codebook usage", f"{100 * book['usage']:.1f} %", "", f"{book['used']} of {book['size']} codes"
            yield "codebook perplexity", f"{book['perplexity']:.1f}", "", f"{book['tokens']} tokens"
        for name, share in report["agreement"].items():
            yield f"oracle agreement: {name}", *_share(share)
        for name, figure in report["photographs"].items():
            size = f"{figure['width']}x{figure['height']}"
            yield f"psnr of {name}", f"{figure['psnr']:.2f} dB", "", size
            yield f"ssim of {name}", f"{figure['ssim']:.4f}", "", size
        return
    for kind in ("class", "one_object", "two_objects"):
        for name, share in report.get(kind, {}).items():
            if "correct" in share and share["total"]:
                yield f"{kind.replace('_', ' ')}: {name.replace('_', ' ')}", *_share(share)


def _share(share: dict[str, Any]) -> tuple[str, str, str]:
    interval = f"[{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
    return f"{100 * share['value']:.1f} %", interval, f"{share['correct']}/{share['total']}"


def _distances(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    names = {"fid": "FID", "fid_of_real_scenes": "FID of other real scenes", "fid_of_the_tokenizer": "FID of tokenizer"}
    if "fid" in report:
        yield "FID", report["fid"]
    for kind in ("class", "one_object", "two_objects"):
        for key, title in names.items():
            if key in report.get(kind, {}):
                yield f"{kind.replace('_', ' ')}: {title}", report[kind][key]
