"""`tunedock init`: a project that a team can commit, made of the files in `project/` beside this module.

They are whole files, so that what a template says can be read and tested as it stands; only words between two `@` are filled in.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from tunedock import __version__
from tunedock.cli.options import Json
from tunedock.errors import DiskError, RecipeError


class StartObjective(StrEnum):
    """Objectives that come with a sample."""

    sft = "sft"
    dpo = "dpo"
    reward = "reward"
    pretrain = "pretrain"


@dataclass(frozen=True, slots=True)
class Start:
    """What is told apart by objective."""

    model: str
    rows: str
    form: str
    measure: str = (
        "$ tunedock eval first                            # the held-out rows, beside the model as it was before\n"
        "$ tunedock chat first"
    )
    """Commands that show what the training came to."""


STARTS = {
    StartObjective.sft: Start(
        "Qwen/Qwen3-0.6B",
        "questions to a library and good answers, in English and Chinese",
        'A row is a conversation: `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`.',
    ),
    StartObjective.dpo: Start(
        "Qwen/Qwen3-0.6B",
        "questions to a library, each with a good answer and a worse one, in English and Chinese",
        'A row is a pair: `{"prompt": "...", "chosen": "...", "rejected": "..."}`.',
    ),
    StartObjective.reward: Start(
        "Qwen/Qwen3-0.6B",
        "questions to a library, each with a good answer and a worse one, in English and Chinese",
        'A row is a pair: `{"prompt": "...", "chosen": "...", "rejected": "..."}`; a number `margin` may say by how much.',
        "$ tunedock eval first                            # how often the better answer of a held-out pair has the higher score",
    ),
    StartObjective.pretrain: Start(
        "Qwen/Qwen3-0.6B-Base",
        "short texts about a library, in English and Chinese",
        'A row is a document: `{"text": "..."}`.',
    ),
}
"""The smallest models of a family that reads both languages: a first run takes minutes on a small card."""

FILES = {
    "README.md": "README.md",
    "requirements.txt": "requirements.txt",
    "recipe.yaml": "{objective}.yaml",
    "data/sample.jsonl": "{objective}.jsonl",
    ".gitignore": "gitignore",
    "Dockerfile": "Dockerfile",
    ".dockerignore": "dockerignore",
    ".github/workflows/recipe.yml": "workflow.yml",
}
"""File of a project -> the template it is made of. Templates have no leading dot: tools that pack a wheel obey a `.gitignore`."""

_PLAIN_SCALAR = re.compile(r"[A-Za-z/~.][\w./~+-]*")
"""Text that YAML reads back as it stands."""

_YAML_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"}


def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that is new or empty.", show_default=False)],
    objective: Annotated[
        StartObjective, typer.Option("--objective", metavar="sft|dpo|reward|pretrain", help="What to train for.")
    ] = StartObjective.sft,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Hub id or folder of a model; a small Qwen3 by default.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Start a project: a recipe that trains, sample data, a Dockerfile and a workflow that checks both.

    Writes all of it or nothing, and never over a file that is there; a folder that holds only `.git` is fine.
    """
    from tunedock.cli.text import print_json, printable

    target = _target(folder)
    named = STARTS[objective].model if model is None else _model(model, target)
    made = write_project(target, project_files(objective, named))
    if as_json:
        print_json({"directory": str(target.absolute()), "objective": objective, "model": named, "files": made})
        return
    for name in made:
        typer.echo(printable(target / name))
    there = shlex.quote(str(target))
    typer.echo(printable(f"next: cd {there} && tunedock data check recipe.yaml && tunedock plan recipe.yaml"))


def project_files(objective: StartObjective, model: str) -> dict[str, str]:
    """Path in the project -> its text."""
    start = STARTS[objective]
    words = {
        "MODEL": _scalar(model),
        "VERSION": __version__,
        "ROWS": start.rows,
        "FORMAT": start.form,
        "MEASURE": start.measure,
    }
    templates = files("tunedock.cli") / "project"
    return {
        path: _filled((templates / name.format(objective=objective.value)).read_text(encoding="utf-8"), words)
        for path, name in FILES.items()
    }


def write_project(target: Path, texts: Mapping[str, str]) -> list[str]:
    """Writes the files and returns their names; after a failure, and after Ctrl-C, nothing of it is left.

    Raises RecipeError when the folder is in use, DiskError when it cannot be written.
    """
    _refuse_in_use(target)
    with ExitStack() as undo:
        try:
            for name, text in texts.items():
                path = target / name
                for parent in _missing(path.parent):
                    parent.mkdir()
                    undo.callback(_forget, parent.rmdir)
                with path.open("x", encoding="utf-8", newline="\n") as file:
                    undo.callback(_forget, path.unlink)
                    file.write(text)
        except OSError as error:
            raise DiskError(
                f"cannot write the project: {error.strerror}",
                where=str(error.filename or target),
                hint="nothing was left behind; give a folder that can be written",
            ) from error
        undo.pop_all()
    return list(texts)


def _target(given: str) -> Path:
    """`~` expanded, as everywhere: a folder that is called `~` is an accident. Raises RecipeError for what is no path."""
    try:
        if given.strip():
            return Path(given).expanduser()
        why = "this is no path"
    except RuntimeError:
        why = "there is no such user's home"
    raise RecipeError(why, where=f"DIR: {given!r}", hint="name the folder of the project, `.` for this one")


def _refuse_in_use(target: Path) -> None:
    hint = "give a folder that is new or empty; a `.git` in it is fine"
    try:
        if not target.is_dir():
            if os.path.lexists(target):
                raise RecipeError("this is no folder", where=str(target), hint=hint)
            return
        found = sorted(entry.name for entry in target.iterdir() if entry.name != ".git")
    except (OSError, ValueError) as error:
        raise DiskError(f"cannot look into the folder: {error}", where=str(target)) from error
    if found:
        named = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise RecipeError(f"this folder is not empty: it holds {named}", where=str(target), hint=hint)


def _missing(folder: Path) -> Iterator[Path]:
    """The folders to be made, the outermost first."""
    wanted = [folder, *folder.parents]
    return (parent for parent in reversed(wanted) if not parent.is_dir())


def _forget(remove: Callable[[], object]) -> None:
    with suppress(OSError):
        remove()


def _model(given: str, target: Path) -> str:
    """The model as the recipe will name it. A folder given by a relative path is named from the project's folder, where recipes
    look. Raises RecipeError for what is neither a folder nor a hub id."""
    from tunedock.recipe.paths import Place, existing

    here = Path.cwd()
    found = existing(given, Place("--model", "command line", here, here), hub=True)
    local = Path(found).is_absolute()  # else a hub id, or a URL
    if not found.isprintable():
        raise RecipeError(
            "a recipe cannot name this path: it holds characters that are no text",
            where=f"--model: {given!r}",
            hint="rename the folder, or point a link with a plain name to it",
        )
    if not Path(found).is_dir() if local else "://" in found:
        raise RecipeError(
            "a model is a folder or a hub id", where=f"--model: {given}", hint="a hub id has the form owner/name"
        )
    if not local or given.startswith(("/", "~")):
        return given
    relative = os.path.relpath(found, target.absolute())
    return relative if relative.startswith("..") else f"./{relative}"


def _scalar(text: str) -> str:
    """The text as one YAML scalar on one line."""
    if _PLAIN_SCALAR.fullmatch(text) and text.lower() not in _YAML_WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)


def _filled(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"@([A-Z]+)@", lambda found: words[found[1]], text)
