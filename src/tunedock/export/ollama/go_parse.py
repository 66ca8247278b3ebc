"""Go's text/template read into nodes, as far as templates made here use it; `go_template.py` executes them.

Strict: an action or a function outside this subset is refused, never guessed at.

    text and trim markers      {{- x -}}
    control                    if, else if, else, range $i, $x := list, with, end
    variables                  $x := e, $x = e; dying with the block that declared them, as Go has it
    operands                   .A.B  $  $x.A  (e).A  "text"  12  true  false
    functions                  those of FUNCTIONS
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

FUNCTIONS = frozenset(("and", "or", "not", "eq", "ne", "lt", "gt", "len", "slice", "index", "json", "printf"))


class GoTemplateError(Exception):
    """The template is not of the subset, or Go would stop executing it here."""


def parse(source: str) -> list[Node]:
    """The template's nodes. Raises GoTemplateError."""
    return _Parser(source).template()


@dataclass(frozen=True, slots=True)
class Text:
    value: str


@dataclass(frozen=True, slots=True)
class Print:
    expression: Expression


@dataclass(frozen=True, slots=True)
class Assign:
    name: str
    declares: bool
    expression: Expression


@dataclass(frozen=True, slots=True)
class Block:
    """`if`, `with` or `range`; `names` are those a range declares."""

    word: str
    expression: Expression
    names: tuple[str, ...]
    body: list[Node]
    otherwise: list[Node]


Node: TypeAlias = Text | Print | Assign | Block


@dataclass(frozen=True, slots=True)
class Constant:
    value: str | int | bool


@dataclass(frozen=True, slots=True)
class Path:
    """A variable, the dot (`start` is `.`) or an expression, and fields of it."""

    start: str | Expression
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Call:
    function: str
    arguments: tuple[Expression, ...]


Expression: TypeAlias = Constant | Path | Call

_WORD = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<number>-?\d+)|(?P<variable>\$\w*(?:\.\w+)*)|(?P<field>(?:\.\w+)+|\.)"""
    r"""|(?P<name>[A-Za-z]\w*)|(?P<sign>:=|=|,|\(|\)))"""
)


def _actions(source: str) -> Iterator[tuple[str, bool]]:
    """(content, whether it is an action), trim markers applied."""
    at, trim = 0, False
    while True:
        opened = source.find("{{", at)
        plain = source[at:] if opened < 0 else source[at:opened]
        plain = plain.lstrip(" \t\r\n") if trim else plain
        if opened < 0:
            yield plain, False
            return
        inside = opened + 2
        if source[inside : inside + 1] == "-" and source[inside + 1 : inside + 2].isspace():
            plain, inside = plain.rstrip(" \t\r\n"), inside + 2
        if plain:
            yield plain, False
        end = _end_of_action(source, inside)
        content = source[inside:end]
        trim = len(content) > 1 and content[-1] == "-" and content[-2].isspace()
        yield content[:-1].strip() if trim else content.strip(), True
        at = end + 2


def _end_of_action(source: str, at: int) -> int:
    while at < len(source):
        if source.startswith("}}", at):
            return at
        if source[at] == '"':
            at += 1
            while at < len(source) and source[at] not in '"\n':
                at += 2 if source[at] == "\\" else 1
            if source[at : at + 1] != '"':
                raise GoTemplateError("a string without an end")
        at += 1
    raise GoTemplateError("an action without an end")


class _Parser:
    def __init__(self, source: str) -> None:
        self._parts = list(_actions(source))
        self._at = 0

    def template(self) -> list[Node]:
        nodes, ended_by = self._list()
        if ended_by is not None:
            raise GoTemplateError(f"`{ended_by}` without a beginning")
        return nodes

    def _list(self) -> tuple[list[Node], str | None]:
        """Nodes up to `end`, `else` or the end of the template, and which it was."""
        nodes: list[Node] = []
        while self._at < len(self._parts):
            content, is_action = self._parts[self._at]
            self._at += 1
            if not is_action:
                nodes.append(Text(content))
                continue
            word, _, rest = content.partition(" ")
            if word in ("end", "else"):
                return nodes, content
            if word in ("if", "with", "range"):
                nodes.append(self._block(word, rest))
            else:
                nodes.append(_statement(content))
        return nodes, None

    def _block(self, word: str, head: str) -> Block:
        words = _Words(head)
        names = words.declared() if word == "range" else ()
        expression = words.whole()
        body, ended_by = self._list()
        otherwise: list[Node] = []
        if ended_by is not None and ended_by.startswith("else if ") and word == "if":
            otherwise = [self._block("if", ended_by.removeprefix("else if "))]
        elif ended_by == "else":
            otherwise, ended_by = self._list()
            if ended_by != "end":
                raise GoTemplateError(f"`{word}` without an end")
        elif ended_by != "end":
            raise GoTemplateError(f"`{word}` without an end" if ended_by is None else f"`{ended_by}` is not known here")
        return Block(word, expression, names, body, otherwise)


def _statement(content: str) -> Node:
    found = re.match(r"(\$\w+)\s*(:?=)\s*(.*)\Z", content, re.DOTALL)
    if found:
        return Assign(found[1], found[2] == ":=", _Words(found[3]).whole())
    return Print(_Words(content).whole())


class _Words:
    """The words of an action, and the expressions they make."""

    def __init__(self, source: str) -> None:
        self._words: list[tuple[str, str]] = []
        at = 0
        source = source.strip()
        while at < len(source):
            found = _WORD.match(source, at)
            if found is None or found.lastgroup is None:
                raise GoTemplateError(f"not known here: {source[at:]!r}")
            touches = bool(self._words) and found[0][0] not in " \t\n("
            kind = found.lastgroup
            if kind == "field" and touches and self._words[-1][1] == ")":
                kind = "chained"
            self._words.append((kind, found[kind if kind != "chained" else "field"]))
            at = found.end()
        self._at = 0

    def declared(self) -> tuple[str, ...]:
        """`$i, $x :=` before a range."""
        if ("sign", ":=") not in self._words:
            return ()
        end = self._words.index(("sign", ":="))
        names = tuple(text for kind, text in self._words[:end] if kind == "variable")
        if len(self._words[:end]) != 2 * len(names) - 1 or len(names) > 2:
            raise GoTemplateError("not known here: what the range declares")
        self._at = end + 1
        return names

    def whole(self) -> Expression:
        expression = self._command()
        if self._at != len(self._words):
            raise GoTemplateError(f"not known here: {self._words[self._at][1]!r}")
        return expression

    def _peek(self) -> tuple[str, str]:
        return self._words[self._at] if self._at < len(self._words) else ("end", "")

    def _command(self) -> Expression:
        kind, name = self._peek()
        if kind == "name" and name not in ("true", "false"):
            if name not in FUNCTIONS:
                raise GoTemplateError(f"not known here: the function {name}")
            self._at += 1
            arguments = []
            while self._peek()[0] != "end" and self._peek()[1] != ")":
                arguments.append(self._operand())
            return Call(name, tuple(arguments))
        return self._operand()

    def _operand(self) -> Expression:
        kind, word = self._peek()
        self._at += 1
        if kind == "string":
            return Constant(_unquote(word))
        if kind == "number":
            return Constant(int(word))
        if kind == "name" and word in ("true", "false"):
            return Constant(word == "true")
        if kind == "field":
            return Path(".", tuple(filter(None, word.split("."))))
        if kind == "variable":
            name, *fields = word.split(".")
            return Path(name, tuple(fields))
        if (kind, word) == ("sign", "("):
            inner = self._command()
            if self._peek() != ("sign", ")"):
                raise GoTemplateError("a parenthesis without an end")
            self._at += 1
            if self._peek()[0] == "chained":
                self._at += 1
                return Path(inner, tuple(filter(None, self._words[self._at - 1][1].split("."))))
            return inner
        raise GoTemplateError(f"not known here: {word!r}")


def _unquote(literal: str) -> str:
    longer = re.sub(r"\\U([0-9a-fA-F]{8})", lambda found: json.dumps(chr(int(found[1], 16)))[1:-1], literal)
    try:
        return str(json.loads(longer.replace("\t", "\\t")))
    except ValueError:
        raise GoTemplateError(f"not known here: the string {literal}") from None
