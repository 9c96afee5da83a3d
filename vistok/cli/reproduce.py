"""`vistok reproduce`: measure a paper's claim again in the lab world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def reproduce(
    name: Annotated[str | None, typer.Argument(help="The claim (default: list them).")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder (default: reproduce/NAME).")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A fraction of the samples: seconds instead of minutes.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a claim against the paper's baseline in the same run, and say whether its direction holds."""
    from vistok.cli.evaluate import stages
    from vistok.reproduce import CLAIMS
    from vistok.reproduce import reproduce as measure

    if name is None:
        if as_json:
            typer.echo(json.dumps([{"name": claim.name, "title": claim.title} for claim in CLAIMS.values()]))
        width = max(map(len, CLAIMS))
        for claim in () if as_json else CLAIMS.values():
            typer.echo(f"{claim.name:<{width}} {claim.title}  [{claim.paper}; about {claim.minutes:g} min]")
        return
    with stages() as progress:
        folder = output if output is not None else Path("reproduce") / name
        report = measure(name, folder, quick=quick, seed=seed, on_progress=progress)
    typer.echo(report.to_json() if as_json else str(report))
