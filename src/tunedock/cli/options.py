"""Arguments that several commands take, and the shape all command groups share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tunedock.errors import RecipeError

_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")

Recipe = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE.yaml|KEY=VALUE",
        help="A recipe file, files merged over it, and single keys to change (`train.learning_rate=2e-4`).",
        show_default=False,
    ),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's name, the beginning of it, or its path.", show_default=False)
]
RunsDir = Annotated[str, typer.Option("--runs-dir", metavar="DIR", help="Where the runs are.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

RUNS_DIR = "runs"


def _help(context: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(context.get_help())
        raise typer.Exit


Help = Annotated[
    bool, typer.Option("--help", is_eager=True, expose_value=False, callback=_help, help="Show this message and exit.")
]


def group(about: str) -> typer.Typer:
    """A group of commands. It has a `--help` of its own because typer's loads pydantic when a command's help is asked for."""
    made = typer.Typer(
        help=about, no_args_is_help=True, rich_markup_mode=None, add_completion=False, add_help_option=False
    )

    @made.callback()
    def _group(_help: Help = False) -> None: ...

    return made


def split_recipe_arguments(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Recipe files and `key=value` overrides, told apart by their form. Raises RecipeError for what is neither."""
    files: list[Path] = []
    overrides: list[str] = []
    for argument in arguments:
        if _OVERRIDE.match(argument):
            overrides.append(argument)
        elif argument.endswith((".yaml", ".yml")) or Path(argument).exists():
            files.append(Path(argument))
        else:
            raise RecipeError(
                f"`{argument}` is neither a recipe file nor key=value",
                where="command line",
                hint="recipe files end in .yaml or .yml; a change of one key looks like `train.learning_rate=2e-4`",
            )
    return files, overrides


def recipe_files(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Like `split_recipe_arguments`, for commands that cannot do without a file."""
    files, overrides = split_recipe_arguments(arguments)
    if not files:
        raise RecipeError(
            "no recipe file was given",
            where="command line",
            hint="name one before the overrides: `recipe.yaml key=value`",
        )
    return files, overrides
