"""`tunedock recipe show` and `schema`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunedock.cli.options import Json, Recipe, group, recipe_files

if TYPE_CHECKING:
    from tunedock.recipe.resolve import Resolved

app = group("Look at a recipe with every value filled in, or at its schema.")


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
