"""A folder of a user's own lm-eval tasks, looked through before lm-eval loads any: which tasks there are, and what in them is code.

A task's YAML can name Python (`!function module.name` imports that module), a metric that is fetched as code, or a data set's
pickles. That is refused unless the recipe allows it by name. Files are only parsed here, with the parser lm-eval has; nothing
of them is made into objects. Templates are not code: they run in a sandbox (`eval.task_library`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunedock.errors import RecipeError

KEY = "eval.tasks_path"
SWITCH = "eval.tasks_run_code"
LARGEST_FILE = 4 << 20
DEEPEST = 100
"""Lists and mappings within each other; the parser in C would end the process at some ten thousand."""

TOO_DEEP = "this is nested too deeply for a task"

IGNORED = {"__pycache__", ".ipynb_checkpoints"}
"""Folders lm-eval passes over."""

_LOADER: Any = yaml.CSafeLoader if getattr(yaml, "__with_libyaml__", False) else yaml.SafeLoader
_PLAIN = "tag:yaml.org,2002:"
_PLAIN_TYPES = {"str", "int", "float", "bool", "null", "seq", "map", "timestamp", "set"}
"""Without `merge` (`<<`) and `value` (`=`): both make keys and texts that stand nowhere as such, an `include` among them."""
_UNPICKLING = {"pandas"}
"""Of datasets' own builders, those that read pickles (in some of its versions)."""

_LOCAL_BUILDERS = {"json", "csv", "parquet", "arrow", "text", "xml"}


@dataclass(frozen=True, slots=True)
class OwnTasks:
    """What the YAML files of a folder define."""

    tasks: frozenset[str]
    groups: frozenset[str]
    """Names of groups and tags; what they hold may be lm-eval's."""
    local: bool
    """Whether all data come from files of this machine."""


@dataclass(frozen=True, slots=True)
class _Folder:
    root: Path
    library: Path
    """lm-eval's own tasks, which may be included and are trusted as it is."""
    metrics: Collection[str]
    run_code: bool


def look_through(folder: Path, *, library: Path, metrics: Collection[str], run_code: bool) -> OwnTasks:
    """`metrics`: the names lm-eval computes itself; any other would be fetched.

    Raises RecipeError naming file and line for what is no YAML, lies outside the folder, or is code that `run_code` does not allow.
    """
    if not folder.is_dir():
        raise RecipeError(
            "there is no such folder", where=f"{KEY}: {folder}", hint="name a folder with task YAML files"
        )
    place = _Folder(folder.resolve(), library.resolve(), metrics, run_code)
    tasks: set[str] = set()
    groups: set[str] = set()
    local = True
    for path in sorted(folder.glob("**/*.yaml")):
        if IGNORED & set(path.parts):
            continue
        values = _values(path, place, str(path), set())
        local = local and str(values.get("dataset_path")) in _LOCAL_BUILDERS
        if isinstance(values.get("group"), str):
            groups.add(values["group"])
        elif isinstance(values.get("task"), str):
            tasks.add(values["task"])
        tags = values.get("tag")
        groups |= {tag for tag in (tags if isinstance(tags, list) else [tags]) if isinstance(tag, str)}
    if not tasks and not groups:
        raise RecipeError(
            "no task is defined there", where=f"{KEY}: {folder}", hint="a task is a *.yaml file with a key `task`"
        )
    return OwnTasks(frozenset(tasks), frozenset(groups), local)


def _values(path: Path, place: _Folder, where: str, seen: set[Path]) -> dict[str, Any]:
    """The plain values at the top of a file and of what it includes, its own winning, once all of them have been checked.

    `where`: what leads to the file. `seen`: files read for the same task; lm-eval, too, takes each once.
    """
    resolved = path.resolve()
    if resolved in seen:
        raise RecipeError(f"{path.name} is included a second time", where=where, hint="take one `include` of it out")
    if resolved.is_relative_to(place.library):
        return {}
    if not resolved.is_relative_to(place.root):
        raise RecipeError(
            f"this leads out of the folder, to {resolved}", where=where, hint=f"keep a task's files within {place.root}"
        )
    seen.add(resolved)
    node = _parsed(path, where)
    for found in _nodes(node):
        _check(found, path, place)
    own = _top(node)
    values: dict[str, Any] = {}
    included = own.get("include", [])
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise RecipeError("`include` is no file name", where=_at(path, node), hint="write the file's name")
        values |= _values(resolved.parent / name, place, f"{path}: include: {name}", seen)
    return values | own


def _parsed(path: Path, where: str) -> yaml.MappingNode:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise RecipeError("this is too large for a task", where=str(path), hint="give rows by `data_files`")
        text = path.read_text(encoding="utf-8")
        _refuse_deep(text, path)
        node = yaml.compose(text, Loader=_LOADER)
    except OSError as error:
        raise RecipeError(f"{path.name} cannot be read: {error.strerror}", where=where) from None
    except UnicodeDecodeError:
        raise RecipeError("the file is not UTF-8", where=str(path), hint="save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = str(getattr(error, "problem", None) or error)
        if "nesting depth" in problem:  # PyYAML's own limit, since 6.0.4
            raise RecipeError(TOO_DEEP, where=where) from None
        raise RecipeError(f"this is no YAML: {problem}", where=where) from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            "a task's file holds keys and values", where=str(path), hint="a line of it is `task: my-task`"
        )
    return node


def _refuse_deep(text: str, path: Path) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise RecipeError(TOO_DEEP, where=_at(path, event))


def _nodes(root: Any) -> Iterator[Any]:
    """Every node once, however often it is referred to."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _check(node: Any, path: Path, place: _Folder) -> None:
    """Raises RecipeError for a tag that nothing knows, and for code where that is not allowed."""
    if node.tag == "!function":
        if not place.run_code:
            raise _code(f"`!function {node.value}` runs Python code when the task is loaded", path, node)
    elif node.tag == _PLAIN + "merge":
        raise RecipeError(
            "a task takes no `<<`", where=_at(path, node), hint="write the keys out, or `include` a file that has them"
        )
    elif node.tag == _PLAIN + "value":
        raise RecipeError("a bare `=` is no text in YAML", where=_at(path, node), hint='write it in quotes: "="')
    elif not node.tag.startswith(_PLAIN) or node.tag.removeprefix(_PLAIN) not in _PLAIN_TYPES:
        raise RecipeError(f"the tag `{node.tag}` means nothing in a task", where=_at(path, node))
    if isinstance(node, yaml.MappingNode) and not place.run_code:
        for key, value in _pairs(node):
            plain = value.value if isinstance(value, yaml.ScalarNode) else None
            if key == "hf_evaluate" and str(plain).lower() in ("true", "yes", "on"):
                raise _code("`hf_evaluate` fetches a metric and runs it", path, value)
            if key == "metric" and plain is not None and value.tag != "!function" and plain not in place.metrics:
                raise _code(f"lm-eval has no metric `{plain}`, and would fetch and run one of that name", path, value)
            if key == "dataset_path" and plain in _UNPICKLING:
                raise _code(f"`dataset_path: {plain}` reads pickles, which can hold code", path, value)
            if key == "use_prompt" and ".yaml" in str(plain):
                raise _code("`use_prompt` reads a file by a YAML loader that can name Python objects", path, value)


def _top(node: yaml.MappingNode) -> dict[str, Any]:
    """Text and lists of text at the top of a file; anything else as None."""
    values: dict[str, Any] = {}
    for key, value in _pairs(node):
        if isinstance(value, yaml.ScalarNode):
            values[key] = value.value
        elif isinstance(value, yaml.SequenceNode):
            values[key] = [item.value if isinstance(item, yaml.ScalarNode) else None for item in value.value]
        else:
            values[key] = None
    return values


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[str, Any]]:
    return ((key.value, value) for key, value in node.value if isinstance(key, yaml.ScalarNode))


def _code(what: str, path: Path, node: Any) -> RecipeError:
    return RecipeError(what, where=_at(path, node), hint=f"read that code first; `{SWITCH}: true` allows it")


def _at(path: Path, node: Any) -> str:
    return f"{path}:{node.start_mark.line + 1}"
