"""`vistok eval pruners`: every pruning method at every keep ratio on your own pictures and questions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Compare methods on your own data.")


@app.callback()
def _eval() -> None:
    """Compare methods on your own data."""


@app.command()
def pruners(
    model: Annotated[str, typer.Option("--model", "-m", help="Shipped name, folder or Hub id of a transformers LVLM.")],
    data: Annotated[Path, typer.Option(help="Folder of pictures; or `shapes`: held-out scenes of the lab world.")],
    questions: Annotated[
        Path | None,
        typer.Option(help="JSON lines: image, question, answer (or list) (default: questions.jsonl in the folder)"),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method, or several joined by +; repeatable (default: all)")
    ] = None,
    keep_ratio: Annotated[
        list[float] | None,
        typer.Option(help="Share of tokens left after the last stage; repeatable (default: 0.5 0.25 0.11 0.05)"),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Only the first questions (default: all; 1000 of `shapes`)")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once; times are then shares of a batch.")] = 1,
    instruction: Annotated[str, typer.Option(help='After every question, e.g. "Answer with one word."')] = "",
    match: Annotated[str, typer.Option(help="exact: the answer and nothing else; contains: it occurs.")] = "exact",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 16,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder (default: evaluation/pruners-MODEL)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or auto (default: float32 on a CPU, else auto)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Accuracy, operations, cache and time of every pruning method, against random pruning and none.

    Writes report.json, pareto.png and every answer into the output folder. Answers are kept when the run is
    interrupted; the same command goes on.
    """
    from vistok.cli.evaluate import stages
    from vistok.errors import InvalidInputError, require
    from vistok.files import write_text_atomic
    from vistok.metrics.pruning import (
        KEEP_RATIOS,
        METHODS,
        check_method,
        evaluate_pruners,
        held_out_questions,
        load_lvlm,
        load_questions,
        plot_pareto,
    )
    from vistok.pruners.stages import check_ratio

    require("matplotlib", "eval")
    methods = method or list(METHODS)
    ratios = keep_ratio or list(KEEP_RATIOS)
    # What is wrong is said before a large model is loaded.
    for name in methods:
        check_method(name)
    for ratio in ratios:
        check_ratio("--keep-ratio", ratio)
    if match not in ("exact", "contains"):
        raise InvalidInputError(f"--match is exact or contains, got {match!r}")
    lab = str(data) == "shapes" and questions is None and not data.exists()
    asked = [] if lab else load_questions(data, questions, num_samples)
    folder = output if output is not None else Path("evaluation") / f"pruners-{Path(model).name}"
    network, processor = load_lvlm(model, device=device, dtype=dtype)
    if lab:
        side = getattr(network.config.vision_config, "image_size", 336)  # some towers take any size
        side = side[0] if isinstance(side, (list, tuple)) else side
        asked = held_out_questions(num_samples or 1000, side)
    with stages() as on_progress:
        report = evaluate_pruners(
            network,
            processor,
            asked,
            folder=folder,
            methods=methods,
            keep_ratios=ratios,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            instruction=instruction,
            match=match,  # type: ignore[arg-type]
            model_name=model,
            on_progress=on_progress,
        )
    measured = [row for row in report["parts"] if "skipped" not in row]
    report["plot"] = str(folder / "pareto.png") if measured else None
    if measured:
        plot_pareto(report, folder / "pareto.png")
    text = json.dumps(report, indent=2)
    write_text_atomic(folder / "report.json", text + "\n")
    if as_json:
        typer.echo(text)
    else:
        _print(report, folder)
    if report["interrupted"]:
        typer.echo(
            f"vistok: interrupted after {len(measured)} parts; the answers are kept in {folder}, and the same command "
            "goes on from there",
            err=True,
        )
        raise typer.Exit(130)


# -------------------------------------------------------------------------------------------------------------- screen
def _print(report: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from vistok.metrics.pruning import winners

    table = Table(
        "method",
        "keep",
        "accuracy",
        "95 % interval",
        "tokens",
        "GFLOPs",
        "cache MiB",
        "prefill ms",
        "ms/token",
        "front",
        title=f"{report['model']}: {report['questions']} questions ({report['match']})",
    )
    for row in report["parts"]:
        keep = "" if row["keep_ratio"] is None else f"{row['keep_ratio']:g}"
        if "skipped" in row:
            table.add_row(row["method"], keep, "skipped")
            continue
        share = row["accuracy"]
        decode = row["decode_seconds_per_token"]
        table.add_row(
            row["method"],
            keep,
            f"{100 * share['value']:.1f} %",
            f"[{100 * share['low']:.1f}, {100 * share['high']:.1f}]",
            f"{row['kept_tokens']:.0f}/{row['visual_tokens']:.0f}",
            f"{row['flops'] / 1e9:.4g} ({100 * row['flops_share']:.0f} %)",
            f"{row['kv_bytes'] / 2**20:.3g} ({100 * row['kv_bytes_share']:.0f} %)",
            f"{1000 * row['prefill_seconds']:.3g} ({100 * row['prefill_seconds_share']:.0f} %)",
            "" if decode is None else f"{1000 * decode:.3g}",
            "*" if row["pareto"] else "",
        )
    console = Console()
    console.print(table)
    for line in (*map(str, winners(report)), *_skipped(report)):
        console.print(line, markup=False, highlight=False)
    for path in (folder / "report.json", report["plot"]):
        if path:
            console.print(f"written {path}", markup=False, highlight=False)


def _skipped(report: dict[str, Any]) -> Iterator[str]:
    for row in report["parts"]:
        if "skipped" in row:
            yield f"skipped {row['method']} at {row['keep_ratio']:g}: {row['skipped']}"
    yield from dict.fromkeys(
        f"note, {row['method']}: {note}" for row in report["parts"] for note in row.get("notes", ())
    )
