"""`tunedock data check` and `show`: what training will see, before it does. `convert` and `image` have rooms of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunedock.cli.convert import convert
from tunedock.cli.data_image import data_image
from tunedock.cli.options import Json, Recipe, group, recipe_files

if TYPE_CHECKING:
    pass

app = group("Look at the data as training will see it, or write it in another format.")
app.command("convert")(convert)
app.command("image", short_help="Pack a version of the data into an image.")(data_image)


@app.command("check", short_help="Account for every row: kept, dropped or cut, and why.")
def check(
    recipe: Recipe,
    to: Annotated[
        str | None, typer.Option("--to", metavar="DIR", help="Write a report, with every dropped row, to this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Account for every row: read, kept, dropped and why, cut, and the lengths.

    Ends with exit code 3 when the data fail the recipe's limits; the account is shown all the same.
    """
    from tunedock import pipeline
    from tunedock.cli.results import show_data_check
    from tunedock.cli.show import judged
    from tunedock.cli.text import print_json

    value, failed = judged(
        lambda tell: pipeline.data_check(*recipe_files(recipe), to=Path(to) if to else None, on_event=tell)
    )
    if not as_json:
        show_data_check(value)
        if failed is not None:
            raise failed
        return
    account = value["account"]
    document = {**{key: account[key] for key in ("read", "kept", "dropped", "reasons")}, **value}
    if failed is not None:  # one document, so that a program can parse it
        print_json({**document, "error": failed.to_json()})
        raise typer.Exit(failed.exit_code)
    print_json(document)


@app.command("show", short_help="Show one row: its messages, tokens, what is trained.")
def show(
    recipe: Recipe,
    row: Annotated[
        str,
        typer.Option(
            "--row", metavar="N|FILE:LINE", help="Which row: its number from 0, or its place.", show_default=False
        ),
    ],
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a page instead.")] = None,
    as_json: Json = False,
) -> None:
    """Show one row: its messages, the exact tokens, and which of them are trained."""
    from tunedock import pipeline
    from tunedock.cli.show import display
    from tunedock.cli.text import print_json
    from tunedock.cli.tokens import show_row

    with display() as tell:
        value = pipeline.data_show(*recipe_files(recipe), row=row, on_event=tell)
    if html:
        _write_page(Path(html), value)
    if as_json:
        print_json(value)
    elif not html:
        show_row(value)


def _write_page(path: Path, value: dict[str, Any]) -> None:
    import sys

    from tunedock.cli.token_page import page
    from tunedock.errors import DiskError

    try:
        path.write_text(page(value), encoding="utf-8")
    except OSError as error:
        raise DiskError(f"cannot write the page: {error.strerror}", where=str(path)) from error
    print(f"page: {path}", file=sys.stderr)
