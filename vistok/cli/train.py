"""`vistok train`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file, e.g. recipes/nar-shapes.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe fields to change: optimizer.lr=3e-4")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder (default: runs/ and the recipe's name).")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue a run that the folder already holds.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: the best there is).")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Also write TensorBoard event files.")] = True,
) -> None:
    """Train a model from a recipe. Ctrl-C saves a checkpoint; the same command continues from it.

    Several processes: accelerate launch --multi_gpu --num_processes 2 -m vistok train RECIPE (also with --device cpu).
    """
    from vistok.training.recipe import load_recipe
    from vistok.training.trainer import Trainer

    checked = load_recipe(recipe, overrides or [])
    run_dir = output if output is not None else Path("runs") / checked.name
    trainer = Trainer(checked, run_dir, device=device, tensorboard=tensorboard)
    result = trainer.fit(resume=resume)
    if trainer.main:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        typer.echo(f"{result.status} at step {result.step} of {checked.steps}; {run_dir}; {figures}")
    if result.status == "interrupted":
        raise typer.Exit(130)
