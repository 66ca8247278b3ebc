"""`tunedock plan`: what a run will take, before it is started."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from tunedock.cli.options import Json, Recipe, recipe_files
from tunedock.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from tunedock.plan.outlook import Outlook


def plan(
    recipe: Recipe,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", help="Plan for this card: 3090, 4090, l20, a100-80g, h100 ...", show_default=False
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option("--devices", metavar="N", help="How many cards, as `launch` says by default.", show_default=False),
    ] = None,
    zero: Annotated[
        int | None,
        typer.Option("--zero", metavar="STAGE", help="ZeRO stage, 0 to 3, in place of `parallel`.", show_default=False),
    ] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep optimizer states in main memory.")] = False,
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", metavar="N", help="Rows of data, before the split; counted by default.", show_default=False
        ),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine's speed again; it is kept from the first plan.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell steps, memory by part, and whether a run fits, on this machine or on a card you name.

    Loads no weights and fetches no model; the rows are counted unless --rows says how many there are, and the first plan
    for this machine measures its speed. Ends with exit code 7 when the run does not fit.
    """
    from dataclasses import asdict

    from tunedock import pipeline
    from tunedock.cli.show import console, display
    from tunedock.cli.text import print_json
    from tunedock.errors import OutOfMemoryError
    from tunedock.plan.cards import card, this_machine
    from tunedock.plan.spread import Spread

    _check(devices, zero, rows)
    if gpu is not None and calibrate:
        raise RecipeError("only this machine can be measured", where="--calibrate", hint="leave out `--gpu`")
    devices = devices or _devices(recipe)
    target = this_machine(devices) if gpu is None else card(gpu, devices or 1)
    if zero and target.devices == 1:
        raise RecipeError(
            "ZeRO divides over several devices, and there is one", where="--zero", hint="add `--devices 2`"
        )
    with display() as tell:
        found = pipeline.plan(
            *recipe_files(recipe),
            target=target,
            spread=Spread(zero or 0, offload) if zero is not None or offload else None,
            rows=rows,
            calibrate=calibrate,
            on_event=tell,
        )
    if as_json:
        print_json({**asdict(found), "fits": found.fits})
    else:
        _show(console(), found)
    if not found.fits:
        raise typer.Exit(OutOfMemoryError.exit_code)


def _devices(recipe: list[str]) -> int | None:
    """In all, where the recipe says how many."""
    from tunedock import pipeline

    launch = pipeline.resolve_recipe(*recipe_files(recipe)).recipe.launch
    return launch.devices(0) if launch.processes is not None or launch.nodes > 1 else None


def _check(devices: int | None, zero: int | None, rows: int | None) -> None:
    for name, value, least in (("--devices", devices, 1), ("--rows", rows, 1)):
        if value is not None and value < least:
            raise RecipeError(f"{value} is less than {least}", where=name)
    if zero is not None and not 0 <= zero <= 3:
        raise RecipeError(f"{zero} is no stage of ZeRO", where="--zero", hint="stages are 0 to 3")


def _show(out: Console, found: Outlook) -> None:
    from rich.text import Text

    from tunedock.cli.results import add_row, table
    from tunedock.plan.memory import readable

    share = found.trained / max(found.parameters, 1)
    guess = "" if found.known_family else ", counted by the nearest family known"
    out.print(Text(f"{found.parameters:,} parameters, {found.trained:,} of them trained ({share:.2%}){guess}"))
    out.print(Text(f"shape from {found.shape_source}", style="dim"))
    made = table("steps", "")
    for name, value in _steps(found):
        add_row(made, name, value)
    out.print()
    out.print(made)
    target = found.target
    each = f"each of {target.devices} x {target.name}" if target.devices > 1 else target.name
    made = table(f"memory on {each}", "", numbers_from=1)
    for name, size in found.need.parts.items():
        if size:
            add_row(made, name, readable(size))
    row = found.row_tokens or found.longest
    add_row(made, f"activations of a row of {row:,} tokens", readable(found.need.bytes_per_token * row))
    add_row(made, "in all", Text(readable(found.need.step(row)), style="bold"))
    for name, size in found.need.answering.items():
        add_row(made, name, readable(size))
    if found.need.answering:
        add_row(made, "in all while answers are made", Text(readable(found.need.answering_bytes), style="bold"))
    out.print()
    out.print(made)
    if found.need.host_bytes:
        what = "what is offloaded" if found.spread.offload_all else "optimizer states"
        out.print(Text(f"and {readable(found.need.host_bytes)} of main memory for {what}"))
    out.print()
    out.print(_verdict(found))
    if found.ways:
        made = table("a change that needs less", "needs", "", "cost", numbers_from=None)
        for way in found.ways:
            add_row(made, way.change, readable(way.needed_bytes), "fits" if way.fits else "too much", way.cost)
        out.print()
        out.print(made)
    held = ", ".join(f"{name} {readable(size)}" for name, size in found.weights.items())
    out.print(Text(f"\nall weights alone: {held}", style="dim"))


def _steps(found: Outlook) -> Iterator[tuple[str, str]]:
    yield "examples a step", f"{found.batch_size:,}"
    rows = found.rows
    if rows is not None:
        yield "rows", f"{rows.read:,}: {rows.train:,} to train on, {rows.validation:,} validation, {rows.test:,} test"
        if rows.mean_tokens is not None:
            yield "tokens of a row", f"about {rows.mean_tokens:,.0f}, by its characters"
    if found.steps is None:
        yield "steps", "not known: the rows are not counted"
        return
    each, all_ = f"{found.steps.steps_per_epoch:,}", f"{found.steps.total_steps:,}"
    if found.floor is not None:
        each += f" ({found.floor.steps_per_epoch:,} where a partial batch is left out)"
        all_ += f" ({found.floor.total_steps:,})"
    yield "steps an epoch", each
    yield "steps in all", all_
    if found.seconds is not None and found.fits:
        yield "time", f"about {_duration(found.seconds)}, by {_source(found)}"


def _source(found: Outlook) -> str:
    return "this machine's own speed" if found.target.measured else "the card's data sheet"


def _verdict(found: Outlook) -> str:
    from tunedock.plan.memory import readable

    room = readable(found.room_bytes)
    if found.row_tokens is not None:
        rows = f"samples packed into rows of up to {found.row_tokens:,} tokens"
        return f"It fits: {rows}, within the {room} that may be used."
    short = readable(found.need.at(found.longest) - found.room_bytes)
    if found.need.answering_bytes > found.need.step(found.longest):
        return f"It does not fit: making answers needs {short} more than the {room} that may be used."
    return f"It does not fit: a sample of {found.longest:,} tokens needs {short} more than the {room} that may be used."


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"
