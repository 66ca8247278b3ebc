"""`tunedock data convert`: rows in another format."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunedock.cli.options import Json, recipe_files

if TYPE_CHECKING:
    pass


class Format(StrEnum):
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    text = "text"
    preference = "preference"
    labelled = "labelled"


class Spelling(StrEnum):
    trl = "trl"
    openai = "openai"
    llamafactory = "llamafactory"


class Part(StrEnum):
    ids = "ids"
    names = "names"
    marks = "marks"
    reasoning = "reasoning"


class Trained(StrEnum):
    assistant = "assistant"
    last = "last"


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE|RECIPE.yaml",
            help="Files, folders, globs, URLs, hub ids, or entries of a dataset_info.json (`dataset_info.json#identity`); "
            "or a recipe, with changes of its keys, whose training data are taken.",
            show_default=False,
        ),
    ],
    to: Annotated[Format, typer.Option("--to", metavar="FORMAT", help=", ".join(Format) + ".", show_default=False)],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            metavar="FILE",
            help="A new file; its extension tells its kind: .jsonl, .json, .csv, .tsv, .parquet or .arrow, each also with "
            ".gz, .zst, .lz4, .bz2 or .xz.",
            show_default=False,
        ),
    ],
    spelling: Annotated[
        Spelling,
        typer.Option(
            "--spelling",
            metavar="trl|openai|llamafactory",
            help="Whose columns pairs and verdicts have; openai has pairs only.",
        ),
    ] = Spelling.trl,
    format_: Annotated[
        Format | None, typer.Option("--format", metavar="FORMAT", help="Of the rows read; detected by default.")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--columns", metavar="OURS=THEIRS", help="A column's name in the files: prompt=question. Repeatable."
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", metavar="N", min=1, help="Read at most so many rows of each source.")
    ] = None,
    train_on: Annotated[
        Trained | None,
        typer.Option(
            "--train-on", metavar="assistant|last", help="With last, earlier answers are marked as not trained."
        ),
    ] = None,
    without: Annotated[
        list[Part] | None,
        typer.Option(
            "--without",
            metavar="PART",
            help="Leave out ids (of calls), names (of speakers), marks (of what is trained) or reasoning. Repeatable.",
        ),
    ] = None,
    max_dropped: Annotated[
        float, typer.Option("--max-dropped", metavar="SHARE", min=0, max=1, help="Refused rows that are no error.")
    ] = 0.0,
    refused: Annotated[
        str | None, typer.Option("--refused", metavar="FILE", help="Name every refused row here, a JSON object a line.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    as_json: Json = False,
) -> None:
    """Write rows in another format. Each row read is written, or refused with the reason why the format cannot say it.

    The file is read back before it takes its place. Where more rows are refused than --max-dropped allows, nothing is written and
    the exit code is 3.
    """
    from tunedock import pipeline
    from tunedock.cli.results import show_conversion
    from tunedock.cli.show import judged
    from tunedock.cli.text import print_json

    settings = {"format": format_ and format_.value, "columns": _columns(columns or []), "num_samples": num_samples}
    settings = {name: value for name, value in settings.items() if value}
    files, overrides = _recipe_or_sources(sources, settings, train_on)
    options = {
        "force": force,
        "spelling": spelling.value,
        "max_dropped": max_dropped,
        "refused": str(Path(refused).expanduser().absolute()) if refused else None,
        "train_on": train_on and train_on.value,
        "without": [part.value for part in without or []],
    }
    value, failed = judged(
        lambda tell: pipeline.data_convert(
            files, overrides, to=to.value, out=Path(out), settings=settings, options=options, on_event=tell
        )
    )
    if as_json:  # one document, so that a program can parse it
        print_json({**value, **({"error": failed.to_json()} if failed else {})})
        if failed is not None:
            raise typer.Exit(failed.exit_code)
        return
    show_conversion(value)
    if failed is not None:
        raise failed


def _columns(given: Sequence[str]) -> dict[str, str]:
    from tunedock.errors import RecipeError

    pairs = [text.partition("=") for text in given]
    for text, (ours, equals, theirs) in zip(given, pairs, strict=True):
        if not (ours and equals and theirs):
            raise RecipeError(
                f"`{text}` is not of the form OURS=THEIRS", where="--columns", hint="write prompt=question"
            )
    return {ours: theirs for ours, _, theirs in pairs}


def _recipe_or_sources(
    given: Sequence[str], settings: dict[str, Any], train_on: Trained | None
) -> tuple[list[str], list[str]]:
    """(recipe files or sources, the recipe's overrides)."""
    from tunedock.errors import RecipeError

    if not any(argument.endswith((".yaml", ".yml")) for argument in given):
        return list(given), []
    files, overrides = recipe_files(given)
    if other := next((file for file in files if file.suffix not in (".yaml", ".yml")), None):
        raise RecipeError(
            f"`{other}` is no recipe, and the others are", where="command line", hint="give recipes, or data, not both"
        )
    said = [f"--{name.replace('_', '-')}" for name in settings] + (["--train-on"] if train_on else [])
    if said:
        raise RecipeError(
            "the recipe says this",
            where=said[0],
            hint="change it there, or on the command line: `data.train.0.format=alpaca`",
        )
    return [str(file) for file in files], overrides
