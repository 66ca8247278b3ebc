"""`tunedock data image`: a version of a data set as an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tunedock.cli.options import Json


def data_image(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file, a folder, a glob, a URL or a hub id; of a hub's data set all splits.",
            show_default=False,
        ),
    ],
    tag: Annotated[
        str | None,
        typer.Option("--tag", metavar="NAME", help="The image's name: registry.example/support-data:v3."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FILE", help="Write the image to a new file; no engine is asked."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label of your own. Repeatable.")
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Touch no network; a hub's data come from its cache.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Pack a version of a data set into an image, which `data.train` can name: image://registry.example/support-data:v3.

    The same files are the same revision, by whomever they are packed. `tunedock image push` brings the image to a registry.
    """
    from tunedock.cli.results import add_row, number, table
    from tunedock.cli.show import console, display
    from tunedock.cli.text import one_line, print_json, printable
    from tunedock.pipeline.data_packing import make_data_image

    with display() as tell:
        value = make_data_image(
            source,
            tag=tag,
            to=Path(to).expanduser().absolute() if to else None,
            labels=_labels(label or []),
            offline=offline,
            on_event=tell,
        )
    if as_json:
        print_json(value)
        return
    made = table("file", "rows", numbers_from=1)
    for name, rows in value["files"].items():
        add_row(made, one_line(name), number(rows))
    console().print(made)
    if value["unreadable"]:
        print(f"{value['unreadable']} row(s) among them cannot be read: training drops them")
    print(f"revision {value['revision']}, {value['bytes'] / 1e6:,.1f} MB, {value['seconds']:.1f} s")
    if value["file"]:
        print(printable(f"wrote {value['file']}; `tunedock image load` gives it to an engine"))
    else:
        print(printable(f"made {value['name']}; in a recipe: `data.train: image://{value['name']}`"))


def _labels(given: Sequence[str]) -> dict[str, str]:
    from tunedock.errors import RecipeError

    pairs = [text.partition("=") for text in given]
    for text, (key, equals, _) in zip(given, pairs, strict=True):
        if not (key and equals) or not key.isprintable():
            raise RecipeError(
                f"`{text}` is not of the form KEY=VALUE", where="--label", hint="write org.example.owner=support"
            )
    return {key: value for key, _, value in pairs}
