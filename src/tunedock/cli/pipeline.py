"""`tunedock pipeline`: the stages of a chain file, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunedock.cli.options import Json

if TYPE_CHECKING:
    from tunedock.pipeline.chain import Done

_DONE = {"run": "ran", "resume": "gone on with", "skip": "skipped", "leave": "left out"}
_WILL = {"run": "run", "resume": "go on", "wait": "wait, go on", "skip": "skip", "leave": "leave out"}


def pipeline(
    chain: Annotated[
        str, typer.Argument(metavar="CHAIN.yaml", help="Stages that build on each other.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STAGE.KEY=VALUE",
            help="Keys of a stage's recipe to change (`sft.train.learning_rate=2e-4`), or of all (`defaults.train.seed=1`).",
            show_default=False,
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Tell what would run and why, and run nothing.")] = False,
    first: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Run this stage anew, and what follows; leave earlier ones."),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="STAGE", help="Run no other stage, and this one where it is due.")
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option(
            "--dir", metavar="DIR", help="Where the runs are; else the file's `output_dir`, or runs/<its name>."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the stages of a chain: train, evaluate and export, each where its inputs have changed.

    Stopped or killed at any point, the same command goes on.
    """
    from tunedock.cli.show import display
    from tunedock.cli.text import print_json
    from tunedock.pipeline.chain import run_chain
    from tunedock.pipeline.notes import note_event

    with display() as tell:
        done = run_chain(
            Path(chain),
            overrides or [],
            folder=None if folder is None else Path(folder).expanduser(),
            first=first,
            only=only,
            dry=plan,
            on_event=tell,
            on_stage=lambda stage: tell(
                note_event(f"stage {stage.name} ({stage.what}): {_WILL[stage.action]}; {stage.why}", stage=stage.name)
            ),
        )
    if as_json:
        print_json({"stages": [stage.to_json() for stage in done]})
    elif plan:
        _show_plan(done)
    else:
        _show_done(done)


def _show_plan(stages: Sequence[Done]) -> None:
    from tunedock.cli.results import add_row, table
    from tunedock.cli.show import console

    made = table("stage", "what", "would", "why")
    for stage in stages:
        add_row(made, stage.name, stage.what, _WILL[stage.action], stage.why)
    console().print(made)


def _show_done(stages: Sequence[Done]) -> None:
    from tunedock.cli.results import add_row, number, table
    from tunedock.cli.show import console, duration

    made = table("stage", "what", "", "time", "figures", "result")
    for stage in stages:
        figures = ", ".join(
            f"{name.replace('_', ' ')} {number(value)}" for name, value in (stage.figures or {}).items()
        )
        add_row(
            made,
            stage.name,
            stage.what,
            _DONE.get(stage.action, stage.action),
            duration(stage.seconds),
            figures,
            _short(stage.place),
        )
    console().print(made)


def _short(place: str | None) -> str:
    """From the working directory, where that is shorter."""
    if place is None:
        return ""
    here = Path.cwd()
    return str(Path(place).relative_to(here)) if Path(place).is_relative_to(here) else place
