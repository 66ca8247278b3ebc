"""YAML 1.2 text -> plain values, each with its line. Hostile text ends in a RecipeError, never in code that runs.

The document is composed to nodes and walked here rather than constructed: that gives the line of every key, sees
duplicates and aliases before anything is expanded, and leaves no way for a tag to name a Python object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from tunedock.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_VALUES = 50_000
"""Values after aliases are expanded: a recipe has hundreds, an alias bomb billions."""
MAX_DEPTH = 32
DATA_SUFFIXES = {".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow"}
"""Never a recipe's, which JSON could be."""

Key = tuple[str | int, ...]
"""Where a value stands: `("data", "train", 0, "path")`; written `data.train.0.path`."""

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {"str", "int", "float", "bool", "null", "map", "seq"}


@dataclass(frozen=True, slots=True)
class Document:
    value: Any
    """dicts with text keys, lists, text, numbers, booleans and None."""
    lines: dict[Key, int] = field(default_factory=dict)
    """Line, from 1, of every value; for a mapping's value the line of its key."""


ABSENT = object()


def at(values: Any, key: Key) -> Any:
    """The value at `key` of nested dicts and lists, ABSENT where there is none."""
    for part in key:
        inside = part in values if isinstance(values, dict) else isinstance(values, list) and part in range(len(values))
        if not inside:
            return ABSENT
        values = values[part]
    return values


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def read(path: Path) -> Document:
    """The recipe file at `path`.

    Raises RecipeError when it cannot be read, or holds anything but one mapping of plain values.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError("there is no such file", where=str(path), hint=_neighbour(path)) from None
    except IsADirectoryError:
        raise RecipeError("this is a folder, not a recipe file", where=str(path), hint=_neighbour(path / "*")) from None
    except OSError as error:
        raise RecipeError(f"cannot read the file: {error.strerror}", where=str(path)) from None
    except ValueError as error:  # a null byte in the path
        raise RecipeError(f"cannot read the file: {error}", where=repr(str(path))) from None
    if path.suffix in DATA_SUFFIXES:
        raise RecipeError(
            "this is a file of data, not a recipe",
            where=str(path),
            hint=f"name it to a recipe: `recipe.yaml data.train={path}`; `tunedock init` writes a recipe to begin with",
        )
    if len(content) > MAX_BYTES:
        raise RecipeError(
            "the file is larger than 1 MiB", where=str(path), hint="a recipe is a page of YAML; is this the data?"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError("the file is not UTF-8", where=f"{path}:{line}", hint="save it as UTF-8") from None
    document = parse(text, str(path))
    if document.value is None:
        raise RecipeError("the file is empty", where=str(path), hint="a recipe names at least `model` and `data.train`")
    if not isinstance(document.value, dict):
        found = "a list" if isinstance(document.value, list) else f"the value {document.value!r:.60}"
        raise RecipeError(
            f"a recipe is a mapping of keys, this is {found}", where=str(path), hint="begin with `model: ...`"
        )
    return document


def parse(text: str, name: str) -> Document:
    """One YAML document. `name` stands for the file in errors."""
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        parts = [part for part in (error.context, error.problem) if part]
        raise RecipeError(f"not valid YAML: {', '.join(parts)}", where=where, hint=_syntax_hint(text, error)) from None
    except YAMLError as error:
        raise RecipeError(
            f"not valid YAML: {' '.join(str(error).split())}", where=name, hint="is this a text file?"
        ) from None
    except RecursionError:
        raise RecipeError("nested too deeply", where=name) from None
    walk = _Walk(name)
    value = None if node is None else walk.value(node, ())
    return Document(value, walk.lines)


def _syntax_hint(text: str, error: MarkedYAMLError) -> str | None:
    problem = f"{error.context} {error.problem}"
    if "cannot start any token" in problem:
        return "indent with spaces, not tabs" if "'\\t'" in problem else "put the value in quotes"
    if "another document" in problem:
        return "one file holds one recipe; give further files to the command as overlays"
    if "mapping values are not allowed" in problem:
        return "put text that contains `: ` in quotes, and indent keys of one section alike"
    return None


def _neighbour(path: Path) -> str | None:
    """What else could have been meant."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder}"
    found = sorted(child.name for child in folder.iterdir() if child.suffix in {".yaml", ".yml"})[:5]
    return f"in {folder} there is {', '.join(found)}" if found else None


def _join_pairs(text: str) -> str:
    """JSON escapes a character beyond U+FFFF as two halves. Raises UnicodeError for a half alone, which no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


class _Walk:
    """Node tree -> plain values, within the limits above."""

    def __init__(self, name: str) -> None:
        self.lines: dict[Key, int] = {}
        self._name = name
        self._count = 0
        self._scalars = YAML(typ="safe", pure=True).constructor

    def value(self, node: Node, key: Key) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            self._refuse(node, f"more than {MAX_VALUES} values once aliases are expanded")
        if len(key) > MAX_DEPTH:
            self._refuse(node, f"nested deeper than {MAX_DEPTH} levels, or an alias contains itself")
        self.lines.setdefault(key, node.start_mark.line + 1)
        tag = str(node.tag)
        if tag == f"{_TAG}timestamp":
            return str(node.value)  # YAML 1.2 has no dates: the text as written
        if not tag.startswith(_TAG) or tag.removeprefix(_TAG) not in _PLAIN_TAGS:
            self._refuse(node, f"the tag `{tag.replace(_TAG, '!!')}` is not allowed", "write plain YAML values")
        if isinstance(node, MappingNode):
            return {name: self.value(child, (*key, name)) for name, child in self._pairs(node, key)}
        if isinstance(node, SequenceNode):
            return [self.value(child, (*key, index)) for index, child in enumerate(node.value)]
        return self._scalar(node)

    def _pairs(self, node: MappingNode, key: Key) -> Iterator[tuple[str, Node]]:
        seen: dict[str, int] = {}
        for name_node, child in node.value:
            line = name_node.start_mark.line + 1
            if name_node.tag == f"{_TAG}merge":
                self._refuse(
                    name_node,
                    "merge keys (`<<`) are YAML 1.1",
                    "put what recipes share in a file of its own: overlays merge",
                )
            if name_node.tag != f"{_TAG}str":
                self._refuse(name_node, f"the key {str(name_node.value)!r:.60} is not text", "put the key in quotes")
            name = str(self._scalar(name_node))
            if name in seen:
                self._refuse(
                    name_node,
                    f"`{dotted((*key, name))}` stands twice, first in line {seen[name]}",
                    "keep one of the two",
                )
            seen[name] = line
            self.lines[(*key, name)] = line
            yield name, child

    def _scalar(self, node: Node) -> Any:
        if not isinstance(node, ScalarNode):
            self._refuse(node, "not a plain value")
        try:
            value = self._scalars.construct_object(node)
            return _join_pairs(value) if isinstance(value, str) else value
        except (YAMLError, ValueError, OverflowError):
            self._refuse(
                node, f"cannot read {str(node.value)!r:.60} as {str(node.tag).removeprefix(_TAG)}", "put text in quotes"
            )

    def _refuse(self, node: Node, message: str, hint: str | None = None) -> Any:
        mark = node.start_mark
        raise RecipeError(message, where=f"{self._name}:{mark.line + 1}:{mark.column + 1}", hint=hint)
