"""The commands, put together. Each lives in a file of its own and imports torch only when it runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import vistok
from vistok.cli import (
    data,
    decode,
    encode,
    env,
    eval_pruners,
    evaluate,
    generate,
    models,
    prune,
    reconstruct,
    reproduce,
    scop,
    steer,
    train,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vistok {vistok.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Make, generate, steer and drop visual tokens."""


def build() -> Any:
    """The click command of the whole application."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="--debug shows tracebacks. Pictures and figures come from shipped checkpoints: no network is needed.",
    )
    app.callback()(_root)
    app.command()(generate.generate)
    app.command()(models.models)
    app.command()(encode.encode)
    app.command()(decode.decode)
    app.command()(reconstruct.reconstruct)
    app.command()(steer.steer)
    app.command()(scop.scop)
    app.command()(train.train)
    app.command()(evaluate.evaluate)
    app.command()(prune.prune)
    app.add_typer(eval_pruners.app, name="eval")
    app.command()(reproduce.reproduce)
    app.add_typer(data.app, name="data")
    app.command()(env.env)
    return typer.main.get_command(app)
