"""`tunedock recipe show`, `schema` and `import`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunedock.cli.options import Json, Recipe, group, recipe_files

if TYPE_CHECKING:
    from tunedock.recipe.importers import Imported
    from tunedock.recipe.resolve import Resolved

app = group("Look at a recipe with every value filled in, or at its schema, or make one of a LLaMA-Factory file.")


@app.command("show")
def show(recipe: Recipe, as_json: Json = False) -> None:
    """Print every value of a recipe and where it came from."""
    from tunedock.cli.text import print_json
    from tunedock.pipeline import resolve_recipe

    resolved = resolve_recipe(*recipe_files(recipe))
    if as_json:
        print_json(resolved.to_json())
    else:
        _print(resolved)


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from tunedock.cli.text import print_json
    from tunedock.recipe.resolve import json_schema

    print_json(json_schema())


@app.command("import", short_help="Make a recipe of a LLaMA-Factory file.")
def import_(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE.yaml", help="A YAML of LLaMA-Factory: train, export or inference.", show_default=False
        ),
    ],
    dataset_info: Annotated[
        str | None,
        typer.Option(
            "--dataset-info",
            metavar="PATH",
            help="Its dataset_info.json, or the folder; by default it is looked for in `dataset_dir`.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="OUT.yaml", help="Write the recipe to this new file, its paths relative to it."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a recipe of a LLaMA-Factory file, and say of each key what it became.

    Without --to the recipe goes to standard output and the report to standard error. What cannot be said in a recipe is refused by
    name, and then nothing is written. What this version does not do yet stands in the recipe by name.
    """
    from pathlib import Path

    from tunedock.cli.streams import print_document
    from tunedock.cli.text import print_json
    from tunedock.recipe.importers import import_llamafactory

    target = Path(to) if to else None
    made = import_llamafactory(Path(file), dataset_info=Path(dataset_info) if dataset_info else None, to=target)
    if not as_json:
        _report(made, stderr=target is None)
    elif made.problems:  # one document, so that a program can parse it
        error = made.error()
        print_json({**made.to_json(), "error": error.to_json()})
        raise typer.Exit(error.exit_code)
    made.check()
    if target is not None:
        made.write(target)
    if as_json:
        print_json({**made.to_json(), "to": to})
    elif target is None:
        print_document(made.text)
    else:
        typer.echo(f"wrote {to}")


def _report(made: Imported, *, stderr: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from tunedock.cli.results import add_row
    from tunedock.cli.show import console
    from tunedock.cli.text import one_line

    out = console(stderr=stderr)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in (f"LLaMA-Factory {made.version}", "tunedock", ""):
        table.add_column(heading, overflow="fold")
    styles = {"becomes": "", "default": "cyan", "left out": "dim", "not built": "yellow", "refused": "red"}
    for line in made.lines:
        given = line.key if line.value is None else f"{line.key}: {one_line(_scalar(line.value), 60)}"
        paths = [source["path"] for source in line.to_value] if line.key.endswith("dataset") and line.to else None
        value = ", ".join(paths) if paths else _scalar(line.to_value)
        became = f"{line.to}: {one_line(value, 60)}" if line.to else line.outcome
        add_row(
            table,
            given,
            Text(one_line(became), style=styles[line.outcome]),
            Text(one_line(line.note or ""), style="dim"),
        )
    out.print(table)
    if made.purpose != "train":
        out.print(
            Text(
                f"note: the file names no training data (it is for {made.purpose}), so this is only a part of a recipe"
            )
        )
    if made.not_built:
        out.print(Text(f"note: this version does not do all of it yet and refuses {', '.join(made.not_built)} by name"))


def _print(resolved: Resolved) -> None:
    from rich.table import Table
    from rich.text import Text

    from tunedock.cli.results import add_row
    from tunedock.cli.show import console
    from tunedock.cli.text import one_line

    out = console()
    made = Table(box=None, pad_edge=False, show_header=False)
    for column in range(3):
        made.add_column(no_wrap=column == 0, overflow="fold")
    values = resolved.recipe.model_dump(mode="json")
    section = ""
    for key, origin in resolved.origins.items():
        if section and key.split(".")[0] != section:
            made.add_row("")
        section = key.split(".")[0]
        style = "dim" if origin == "default" else "cyan" if origin.startswith("derived") else "bold"
        add_row(made, key, Text(one_line(_scalar(_at(values, key))), style=style), Text(one_line(origin), style="dim"))
    out.print(made)
    out.print(Text(f"\nhash {resolved.hash}", style="dim"))
    for note in resolved.notes:
        out.print(Text(f"note: {one_line(note)}"))


def _at(value: Any, dotted_key: str) -> Any:
    """The value of a leaf. A key may itself hold dots (`model.config_overrides`), so the longest name that is there counts."""
    if not dotted_key:
        return value
    if isinstance(value, list):
        index, _, rest = dotted_key.partition(".")
        return _at(value[int(index)], rest)
    parts = dotted_key.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if isinstance(value, dict) and name in value:
            return _at(value[name], ".".join(parts[end:]))
    return None


def _scalar(value: Any) -> str:
    """As it would stand in the recipe."""
    import json

    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
