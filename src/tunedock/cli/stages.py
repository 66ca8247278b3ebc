"""`tunedock train` and `eval`: stages of a run. `export` has a room of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunedock.cli.options import RUNS_DIR, Json, RunName, RunsDir, recipe_files, split_recipe_arguments


def train(
    recipe: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECIPE.yaml|KEY=VALUE",
            help="A recipe file, files merged over it, and single keys to change. Not needed with --resume.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN", help="Go on with a run that was stopped.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="With `launch.on=compose`: only make the run and write its compose file.")
    ] = False,
    runs_dir: RunsDir = RUNS_DIR,
    as_json: Json = False,
) -> None:
    """Train a model by a recipe.

    Ctrl-C saves a checkpoint and stops; `--resume` goes on from it with the same numbers.
    """
    from tunedock import pipeline
    from tunedock.cli.results import show_trained
    from tunedock.cli.show import display
    from tunedock.cli.text import print_json
    from tunedock.run.store import find

    files, overrides = split_recipe_arguments(recipe or []) if resume else recipe_files(recipe or [])
    run = find(resume, Path(runs_dir)) if resume else None
    if write:
        file = pipeline.write_compose(files, overrides, resume=run)
        print_json({"run": str(file.parent), "compose": str(file)}) if as_json else print(file)
        return
    with display() as tell:
        outcome = pipeline.train(files, overrides, resume=run, on_event=tell)
    if as_json:
        print_json(outcome.to_json())
    else:
        show_trained(outcome)


def evaluate(
    run: RunName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe's `eval` section to change.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option("--split", metavar="SPLIT", help="train, validation or test.")] = "test",
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="NAME",
            help="Only this task of lm-evaluation-harness, not the held-out rows; may be given several times.",
            show_default=False,
        ),
    ] = None,
    runs_dir: RunsDir = RUNS_DIR,
    as_json: Json = False,
) -> None:
    """Measure a run's model on held-out rows and on lm-evaluation-harness's tasks, next to its base model."""
    from tunedock import pipeline
    from tunedock.cli.results import show_metrics
    from tunedock.cli.show import display
    from tunedock.cli.text import print_json
    from tunedock.run.store import find

    found = find(run, Path(runs_dir))
    with display() as tell:
        outcome = pipeline.evaluate(found, split=split, overrides=overrides or [], tasks=task or [], on_event=tell)
    if as_json:
        print_json(outcome.to_json())
    else:
        show_metrics(outcome)
