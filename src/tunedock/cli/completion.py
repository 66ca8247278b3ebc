"""`tunedock completion SHELL`, and the answers its scripts ask for at each Tab.

A script asks `tunedock __complete WORD... CURRENT`, each word an argument of its own, so that nothing is quoted or split twice.
The answer's first line says what else may stand there, `:none`, `:files [.yaml ...]` or `:folders`, which the shell completes by
itself; each line after it is a word that fits, and its help after a tab. What a parameter takes is told by its metavar, the word
that `--help` shows: `RUN`, `DIR`, `RECIPE.yaml|KEY=VALUE`, `hf|adapter`.

Tab must feel like nothing: the schema is loaded only where the word begins like a key of a recipe (0.3 s instead of 0.1 s).
PowerShell is left out: tunedock runs on Linux, macOS and in WSL2, where the shells are these.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from tunedock.cli.options import RUNS_DIR

ASK = "__complete"
"""The first argument of a script's question; no command, so that it stands in no help."""

_CHOICE = re.compile(r"[a-z0-9][a-z0-9_+.-]*")
_YAML_FILE = re.compile(r"[A-Z]+\.yaml")
_KEY = re.compile(r"[a-z_][a-z0-9_.]*")
_STAGE_NAME = re.compile(r"^\s*-\s*\{?\s*name:\s*([A-Za-z][A-Za-z0-9_-]*)", re.MULTILINE)
MOST_OF_A_CHAIN = 1 << 16
"""Characters of a chain file that are looked at."""

_FIXED = {"SPLIT": ("train", "validation", "test")}
_SHORT = ("model", "objective", "adapter")
"""Sections that may be one word."""


class Shell(StrEnum):
    bash = "bash"
    zsh = "zsh"
    fish = "fish"


@dataclass
class Answer:
    """What fits at the cursor."""

    rest: str = ":none"
    words: list[tuple[str, str]] = field(default_factory=list)
    """(word, help)."""

    def __str__(self) -> str:
        lines = [f"{word}\t{about}" if about else word for word, about in self.words]
        return "\n".join([self.rest, *lines]) + "\n"


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="bash|zsh|fish", help="Your shell.", show_default=False)],
) -> None:
    """Print a script that completes commands, options, recipes and runs.

    bash and zsh: put `eval "$(tunedock completion bash)"` (or `zsh`) into ~/.bashrc or ~/.zshrc. fish: `tunedock completion fish >
    ~/.config/fish/completions/tunedock.fish`.
    """
    script = files("tunedock.cli") / "shells" / f"tunedock.{shell.value}"
    typer.echo(script.read_text(encoding="utf-8"), nl=False)


def answer(root: Any, words: Sequence[str]) -> None:
    """Writes the answer to a question: the words after the program's name, the one at the cursor last."""
    from tunedock.cli.text import printable

    *before, current = words or [""]
    sys.stdout.write(printable(complete(root, before, current)))


def complete(root: Any, before: Sequence[str], current: str) -> Answer:
    """What fits at `current` after the words `before`; `root` is the click command of the program."""
    place = _Place(root)
    for word in before:
        if not place.step(word):
            return Answer()
    if place.expects is not None:
        return _values(place, place.expects, current)
    if current.startswith("-") and not place.only_arguments:
        name, equals, value = current.partition("=")
        if not equals:
            return _options(place, current)
        option = place.option(name)
        found = Answer() if option is None or option.is_flag else _values(place, option, value)
        return Answer(found.rest, [(f"{name}={word}", about) for word, about in found.words])
    if place.commands:
        fitting = [
            (name, child) for name, child in place.commands.items() if name.startswith(current) and not child.hidden
        ]
        return Answer(words=[(name, _line(child.help)) for name, child in fitting])
    argument = place.argument()
    return Answer() if argument is None else _values(place, argument, current)


class _Place:
    """How far the words before the cursor lead."""

    def __init__(self, root: Any) -> None:
        self.only_arguments = False
        self.expects: Any = None
        """The option whose value comes next."""
        self.given: dict[str, list[str]] = {}
        """Option -> values, and the arguments under ``."""
        self._enter(root)

    def _enter(self, command: Any) -> None:
        self.command = command
        self.commands: dict[str, Any] = getattr(command, "commands", {})
        self.given.clear()

    def step(self, word: str) -> bool:
        """Takes one word in; False where nothing sensible can follow."""
        if self.expects is not None:
            self.given.setdefault(self.expects.opts[0], []).append(word)
            self.expects = None
        elif word == "--" and not self.only_arguments:
            self.only_arguments = True
        elif word.startswith("-") and len(word) > 1 and not self.only_arguments:
            name, equals, value = word.partition("=")
            option = self.option(name)
            if option is None:
                return False
            if option.is_flag or equals:
                self.given.setdefault(option.opts[0], []).append(value)
            else:
                self.expects = option
        elif self.commands:
            if word not in self.commands:
                return False
            self._enter(self.commands[word])
        else:
            self.given.setdefault("", []).append(word)
        return True

    def options(self) -> Iterator[Any]:
        return (p for p in self.command.params if p.param_type_name == "option" and not p.hidden)

    def option(self, name: str) -> Any:
        return next((option for option in self.options() if name in option.opts), None)

    def argument(self) -> Any:
        """The argument at the cursor; None when the command takes no more."""
        arguments = [p for p in self.command.params if p.param_type_name == "argument"]
        count = len(self.given.get("", []))
        if count < len(arguments):
            return arguments[count]
        return arguments[-1] if arguments and arguments[-1].nargs == -1 else None


def _options(place: _Place, current: str) -> Answer:
    offered = [option for option in place.options() if option.multiple or option.opts[0] not in place.given]
    words = {option.opts[0]: _line(option.help) for option in offered}
    words.setdefault("--help", "Show this message and exit")  # of a command click adds it, of a group it is ours
    return Answer(words=[(word, about) for word, about in words.items() if word.startswith(current)])


def _values(place: _Place, parameter: Any, current: str) -> Answer:
    """What a parameter takes, by its metavar."""
    kinds = str(parameter.metavar or "").split("|")
    found = Answer()
    words: list[str] = []
    if parameter.opts[0] == "--gpu":
        words = _cards()
    elif all(_CHOICE.fullmatch(kind) for kind in kinds):
        words = kinds
    for kind in kinds:
        words += _FIXED.get(kind, ())
        if kind == "RUN":
            words += _runs(Path(place.given.get("--runs-dir", [RUNS_DIR])[-1]))
            found.rest = ":folders"
        elif _YAML_FILE.fullmatch(kind):
            found.rest = ":files" if found.rest == ":files" else ":files .yaml .yml"
        elif kind in ("FILE", "PATH", "SOURCE"):
            found.rest = ":files"
        elif kind in ("DIR", "MODEL"):
            found.rest = ":folders"
        elif kind in ("STAGE", "STAGE.KEY=VALUE"):
            stages = _stages(place.given.get("", []))
            words += stages if kind == "STAGE" else _stage_keys(stages, current)
        elif kind == "KEY=VALUE":
            if "=" in current:
                found.rest = ":files"
            elif _KEY.fullmatch(current):
                words += [f"{key}=" for key in _keys(only=place.command.name if len(kinds) == 1 else "")]
    found.words = [(word, "") for word in words if word.startswith(current)]
    return found


def _runs(runs_dir: Path) -> list[str]:
    """Names of runs, the newest first. Their contents are not read: `run.store` would take longer than a Tab may."""
    try:
        found = [(path.stat().st_mtime, path.parent.name) for path in runs_dir.expanduser().glob("*/run.json")]
    except (OSError, RuntimeError):
        return []
    return [name for _, name in sorted(found, reverse=True) if name.isprintable() and not name.startswith(".")]


def _stages(arguments: Sequence[str]) -> list[str]:
    """Names of the stages in the chain file that was given, as lines show them: reading YAML would take longer than a Tab may."""
    try:
        text = Path(arguments[0]).expanduser().read_text(encoding="utf-8")[:MOST_OF_A_CHAIN]
    except (IndexError, OSError, RuntimeError, ValueError):
        return []
    return _STAGE_NAME.findall(text)


def _stage_keys(stages: Sequence[str], current: str) -> list[str]:
    """`sft.train.seed=` once the stage's name stands there with its dot."""
    stage, dot, key = current.partition(".")
    if not dot or (key and not _KEY.fullmatch(key)) or stage not in (*stages, "defaults"):
        return []
    return [f"{stage}.{name}=" for name in _keys(only="")]


def _cards() -> list[str]:
    import json

    return list(json.loads((files("tunedock.plan") / "cards.json").read_text(encoding="utf-8")))


def _keys(only: str) -> list[str]:
    """Dotted keys of a recipe that can be set on the command line; with `only`, those of that section without its name."""
    from tunedock.recipe.words import ITEM, sections

    keyed = sections()
    found = [f"{section}.{name}".lstrip(".") for section, names in keyed.items() for name in names]
    plain = [key for key in found if f".{ITEM}" not in key and (key not in keyed or key in _SHORT)]
    return [key.removeprefix(f"{only}.") for key in plain if key.startswith(f"{only}.")] if only else sorted(plain)


def _line(text: str | None) -> str:
    """The first sentence of a help, on one line."""
    return " ".join((text or "").split()).split(". ")[0].rstrip(".")
