"""`vistok models`: what can be loaded."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

COLUMNS = ("name", "system", "image_size", "num_tokens", "codebook_size", "licence", "paper")


def models(
    pattern: Annotated[str, typer.Argument(help="Shell wildcards, e.g. 'nar*'; or one name for all its facts.")] = "*",
    shipped: Annotated[bool, typer.Option("--shipped", help="Only those that need no download.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List shipped and published checkpoints."""
    from vistok.errors import UnknownNameError
    from vistok.hub import list_models, model_info

    names = list_models(pattern, include_published=not shipped)
    if not names:
        if any(mark in pattern for mark in "*?["):
            raise UnknownNameError(f"no model matches {pattern!r}; `vistok models` lists all")
        model_info(pattern)  # raises, naming the nearest
    entries: list[dict[str, Any]] = [model_info(name) for name in names]
    if as_json:
        typer.echo(json.dumps(entries, indent=2, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    if len(entries) == 1:
        for key, value in entries[0].items():
            if value is not None and key not in ("class_names",):
                typer.echo(f"{key:>16}  {value}")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), overflow="fold")
    for entry in entries:
        table.add_row(*("" if entry.get(column) is None else str(entry[column]) for column in COLUMNS))
    Console().print(table)
