"""`tunedock export`: a run's model in the form it is deployed in, and such a folder tried again."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunedock.cli.options import RUNS_DIR, Json, RunsDir

if TYPE_CHECKING:
    from tunedock.run.record import Run

VERIFY = "verify"


class ExportFormat(StrEnum):
    hf = "hf"
    adapter = "adapter"
    gguf = "gguf"
    ollama = "ollama"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run's name, the beginning of it, or its path. With the word verify, a folder follows: it is tried again.",
            show_default=False,
        ),
    ],
    folder: Annotated[
        str | None, typer.Argument(metavar="[DIR]", help="After verify: an exported folder.", show_default=False)
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="DIR", help="A folder that is new or empty.", show_default=False)
    ] = None,
    export_format: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            metavar="hf|adapter|gguf|ollama",
            help="Whole weights in the Hugging Face layout, the adapter alone, one file for llama.cpp, or that and a Modelfile.",
        ),
    ] = ExportFormat.hf,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="KIND",
            help="hf: int8, int4, int8-dynamic, nf4, gptq, awq. gguf, ollama: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, "
            "q3_k_m, q2_k and the like.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            "--dtype", metavar="auto|float32|bfloat16|float16", help="Of merged weights: that of the base's files."
        ),
    ] = Dtype.auto,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Of one file of merged weights: 500MB, 5GB.")
    ] = "5GB",
    max_perplexity_change: Annotated[
        float | None,
        typer.Option(
            "--max-perplexity-change",
            metavar="SHARE",
            min=0.0,
            help="How much worse quantised weights may be on held-out rows: 0.05 for 5 %.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt of the Ollama model.")
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option("--parameter", metavar="NAME=VALUE", help="Of the Ollama model: temperature=0.7. Repeatable."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            "--push", metavar="URL", help="Send the folder there once it has passed: hf://owner/name, s3://bucket/path."
        ),
    ] = None,
    of_run: Annotated[
        str | None,
        typer.Option(
            "--run", metavar="RUN", help="After verify: hold the folder against this run and its held-out rows, too."
        ),
    ] = None,
    runs_dir: RunsDir = RUNS_DIR,
    as_json: Json = False,
) -> None:
    """Write a run's model to a folder in the form it is deployed in, and check it against the run.

    tunedock export verify DIR tries a folder again: its tokens, prompts and answers against those it had when it was made.
    """
    from tunedock.run.store import find

    if run == VERIFY:
        _verify(folder, None if of_run is None else find(of_run, Path(runs_dir)), max_perplexity_change, as_json)
        return
    _refuse_words_of_verify(folder, of_run)
    fields = {
        "to": _target(to),
        "format": export_format.value,
        "quantize": quantize,
        "dtype": dtype.value,
        "max_shard_size": max_shard_size.upper(),
        "max_perplexity_change": max_perplexity_change,
        "system": system,
        "parameters": _parameters(parameter or []),
        "push": push,
    }
    _export(find(run, Path(runs_dir)), fields, as_json)


def _export(run: Run, fields: dict[str, Any], as_json: bool) -> None:
    from tunedock import pipeline
    from tunedock.cli.results import show_exported
    from tunedock.cli.show import display
    from tunedock.cli.text import print_json
    from tunedock.pipeline.exports import order_of

    order = order_of(fields)
    with display() as tell:
        outcome = pipeline.export(run, order, on_event=tell)
    if as_json:
        print_json(outcome.to_json())
    else:
        show_exported(outcome.to_json())


def _verify(folder: str | None, run: Run | None, limit: float | None, as_json: bool) -> None:
    from tunedock import pipeline
    from tunedock.cli.results import show_exported
    from tunedock.cli.show import judged
    from tunedock.cli.text import print_json
    from tunedock.errors import RecipeError

    if folder is None:
        raise RecipeError("no folder was given", where="verify", hint="tunedock export verify DIR")
    value, failed = judged(
        lambda tell: pipeline.export_verify(Path(folder), run=run, max_perplexity_change=limit, on_event=tell)
    )
    if as_json:  # one document, so that a program can parse it
        print_json({**value, **({"error": failed.to_json()} if failed else {})})
        if failed is not None:
            raise typer.Exit(failed.exit_code)
        return
    show_exported(value)
    if failed is not None:
        raise failed


def _target(to: str | None) -> str:
    from tunedock.errors import RecipeError

    if to is None:
        raise RecipeError("no folder was given to write to", where="--to", hint="tunedock export RUN --to DIR")
    return str(Path(to).expanduser().absolute())


def _refuse_words_of_verify(folder: str | None, of_run: str | None) -> None:
    from tunedock.errors import RecipeError

    given = folder if folder is not None else of_run
    if given is not None:
        raise RecipeError(
            f"`{given}` says nothing here",
            where="command line" if folder is not None else "--run",
            hint="the folder to write to is given by --to; a folder is tried again by `tunedock export verify DIR`",
        )


def _parameters(given: Sequence[str]) -> dict[str, float | int]:
    from tunedock.errors import RecipeError

    found: dict[str, float | int] = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name] = int(value) if value.lstrip("-").isdecimal() else float(value)
        except ValueError:
            raise RecipeError(
                f"`{text}` is not of the form NAME=NUMBER", where="--parameter", hint="write temperature=0.7"
            ) from None
    return found
