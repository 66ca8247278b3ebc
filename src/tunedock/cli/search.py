"""`tunedock search`: the best values of a recipe's keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunedock.cli.options import RUNS_DIR, Json, Recipe, RunsDir, recipe_files
from tunedock.errors import CheckError, TunedockError

if TYPE_CHECKING:
    from tunedock.search.trials import Found

SHOWN = 10


def search(
    recipe: Recipe,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="DIR", help="A folder that is new or empty; in the runs' folder by default."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="DIR", help="Go on with the search in this folder.")
    ] = None,
    runs_dir: RunsDir = RUNS_DIR,
    as_json: Json = False,
) -> None:
    """Search for the best values of a recipe's keys, by the loss on the validation rows.

    The recipe's `search` section says which keys and values. Every trial is a run; Ctrl-C keeps everything, and --resume goes on.
    """
    from datetime import datetime

    from tunedock.cli.show import display
    from tunedock.cli.text import print_json
    from tunedock.errors import RecipeError
    from tunedock.search.trials import search as run_search

    files, overrides = recipe_files(recipe)
    if to is not None and resume is not None:
        raise RecipeError("one starts a search, the other goes on with one", where="--to, --resume", hint="keep one")
    folder = Path(resume or to or Path(runs_dir) / f"search-{datetime.now():%Y%m%d-%H%M%S}")
    with display() as tell:
        found = run_search(files, overrides, folder=folder, resume=resume is not None, on_event=tell)
    failed = None if found.best is not None else _none_of(found)
    if not as_json:
        _show(found)
        if failed is not None:
            raise failed
        return
    print_json(found.to_json() | ({} if failed is None else {"error": failed.to_json()}))
    if failed is not None:
        raise typer.Exit(failed.exit_code)


def _none_of(found: Found) -> TunedockError:
    why = next((row.why for row in found.rows if row.why), None)
    return CheckError(
        f"none of the {len(found.rows)} trials came to its end" + (f"; the first: {why}" if why else ""),
        where=str(found.folder),
        hint="widen the ranges of `search.space`, or leave out values that cannot train",
    )


def _show(found: Found) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from tunedock.cli.text import printable

    keys = list(dict.fromkeys(key for row in found.rows for key in row.values))
    sign = 1.0 if found.direction == "minimize" else -1.0
    ranked = sorted(found.rows, key=lambda row: (row.state != "complete", row.value is None, sign * (row.value or 0.0)))
    table = Table(box=None, pad_edge=False)
    for name in ("trial", "state", found.metric, "step", *keys):
        table.add_column(printable(name))
    for row in ranked[:SHOWN]:
        cells = [row.number, row.state, row.value, row.step, *(row.values.get(key) for key in keys)]
        table.add_row(*(printable(_cell(cell)) for cell in cells))
    out = Console()
    out.print(table)
    if len(ranked) > SHOWN:
        out.print(Text(f"and {len(ranked) - SHOWN} more in trials.json"))
    out.print(Text(printable(f"page    {found.folder / 'index.html'}")), soft_wrap=True)
    if found.best is not None:
        out.print(Text(printable(f"best    {found.folder / 'best.yaml'}")), soft_wrap=True)
        out.print(Text(printable(f"model   {found.best.run}/model")), soft_wrap=True)


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
