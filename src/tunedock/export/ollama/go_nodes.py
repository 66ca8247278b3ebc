"""A Go text/template as nodes, and nodes as text: every character a node holds is a character the template prints.

Layout is free of charge: a line break stands before a control action where a trim marker takes it away again and nothing else.
Text that would be read as something else is printed by an action that holds it as a Go string: `{{`, a `{` before an action, and
what Ollama's Modelfile cannot hold (three quotes end its texts, characters Go does not call printable are dropped).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Text:
    value: str


@dataclass(frozen=True, slots=True)
class Value:
    """Prints what a pipeline gives."""

    pipeline: str


@dataclass(frozen=True, slots=True)
class Set:
    """Declares (`$x := 1`) or assigns (`$x = 1`) a variable."""

    statement: str


@dataclass(frozen=True, slots=True)
class If:
    condition: str
    then: Nodes
    otherwise: Nodes = ()


@dataclass(frozen=True, slots=True)
class With:
    pipeline: str
    body: Nodes


@dataclass(frozen=True, slots=True)
class Range:
    """`over` is what stands after the word: `$i, $_ := .Messages`."""

    over: str
    body: Nodes


Node: TypeAlias = Text | Value | Set | If | With | Range
Nodes: TypeAlias = tuple[Node, ...]


# -- making nodes ---------------------------------------------------------------------------------------------------


def text(value: str) -> Nodes:
    return (Text(value),) if value else ()


def join(*parts: Iterable[Node]) -> Nodes:
    """The parts in a row, texts that touch made one."""
    joined: list[Node] = []
    for node in (node for part in parts for node in part):
        if isinstance(node, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].value + node.value)
        else:
            joined.append(node)
    return tuple(joined)


def choose(condition: str, then: Nodes, otherwise: Nodes) -> Nodes:
    """`then` or `otherwise`, what they have in common at both ends said once. Texts part at a tag or a line, not in a word."""
    if then == otherwise:
        return then
    head: Nodes = ()
    while then and otherwise and then[0] == otherwise[0]:
        head, then, otherwise = join(head, then[:1]), then[1:], otherwise[1:]
    shared = _first_text(then, otherwise)
    head, then, otherwise = join(head, text(shared)), _drop_first(then, shared), _drop_first(otherwise, shared)
    tail: Nodes = ()
    while then and otherwise and then[-1] == otherwise[-1]:
        tail, then, otherwise = join(then[-1:], tail), then[:-1], otherwise[:-1]
    shared = _last_text(then, otherwise)
    tail, then, otherwise = join(text(shared), tail), _drop_last(then, shared), _drop_last(otherwise, shared)
    return join(head, _either(condition, then, otherwise), tail)


def _either(condition: str, then: Nodes, otherwise: Nodes) -> Nodes:
    if not then and not otherwise:
        return ()
    if then:
        return (If(condition, then, otherwise),)
    return (If(_negated(condition), otherwise),)


def _negated(condition: str) -> str:
    for word, opposite in (("eq ", "ne "), ("ne ", "eq ")):
        if condition.startswith(word):
            return opposite + condition.removeprefix(word)
    return f"not {condition}" if " " not in condition else f"not ({condition})"


def _first_text(a: Nodes, b: Nodes) -> str:
    if not (a and b and isinstance(a[0], Text) and isinstance(b[0], Text)):
        return ""
    shared = common_prefix(a[0].value, b[0].value)
    if shared in (a[0].value, b[0].value):
        return shared
    return shared[: max(shared.rfind(">"), shared.rfind("\n")) + 1]


def _last_text(a: Nodes, b: Nodes) -> str:
    if not (a and b and isinstance(a[-1], Text) and isinstance(b[-1], Text)):
        return ""
    shared = common_suffix(a[-1].value, b[-1].value)
    if shared in (a[-1].value, b[-1].value):
        return shared
    found = re.search(r"[<\n]", shared)
    return shared[found.start() :] if found else ""


def _drop_first(nodes: Nodes, shared: str) -> Nodes:
    if not shared or not isinstance(nodes[0], Text):
        return nodes
    return join(text(nodes[0].value[len(shared) :]), nodes[1:])


def _drop_last(nodes: Nodes, shared: str) -> Nodes:
    if not shared or not isinstance(nodes[-1], Text):
        return nodes
    return join(nodes[:-1], text(nodes[-1].value[: len(nodes[-1].value) - len(shared)]))


def common_prefix(*texts: str) -> str:
    return os.path.commonprefix(texts)  # noqa: RUF071 - characters are meant


def common_suffix(*texts: str) -> str:
    return common_prefix(*(text[::-1] for text in texts))[::-1]


# -- nodes as text --------------------------------------------------------------------------------------------------

_TRIMMED = " \t\r\n"
"""What Go's trim markers take away."""

_PLAIN, _VALUE, _CONTROL = range(3)
_Token: TypeAlias = tuple[int, str]


def write(nodes: Nodes) -> str:
    """The template's text."""
    tokens = list(_tokens(nodes))
    written = ""
    for at, (kind, content) in enumerate(tokens):
        if kind == _PLAIN:
            written += content
        elif kind == _VALUE:
            written += "{{ " + content + " }}"
        elif at == 0:
            written += "{{- " + content + " }}"
        else:
            breaks = tokens[at - 1][0] != _PLAIN or written[-1] not in _TRIMMED
            written += ("\n{{- " if breaks else "{{ ") + content + " }}"
    return written


def _tokens(nodes: Nodes) -> Iterable[_Token]:
    for node in nodes:
        if isinstance(node, Text):
            yield from _escaped(node.value)
        elif isinstance(node, Value):
            yield _VALUE, node.pipeline
        elif isinstance(node, Set):
            yield _CONTROL, node.statement
        elif isinstance(node, If):
            yield from _branches(node)
        else:
            word, over, body = (
                ("with", node.pipeline, node.body) if isinstance(node, With) else ("range", node.over, node.body)
            )
            yield _CONTROL, f"{word} {over}"
            yield from _tokens(body)
            yield _CONTROL, "end"


def _branches(node: If) -> Iterable[_Token]:
    yield _CONTROL, f"if {node.condition}"
    yield from _tokens(node.then)
    otherwise = node.otherwise
    while len(otherwise) == 1 and isinstance(otherwise[0], If):
        nested = otherwise[0]
        yield _CONTROL, f"else if {nested.condition}"
        yield from _tokens(nested.then)
        otherwise = nested.otherwise
    if otherwise:
        yield _CONTROL, "else"
        yield from _tokens(otherwise)
    yield _CONTROL, "end"


_UNSAFE = re.compile(r'(\{{2,}|\{\Z|"{3,})')


def _escaped(value: str) -> Iterable[_Token]:
    """A text in pieces: as it is, or in an action as a Go string."""
    held = ""
    for part in _UNSAFE.split(value):
        if _UNSAFE.fullmatch(part):
            yield from _before_action(held)
            held = ""
            yield _VALUE, quote(part)
            continue
        for character in part:
            if printable(character):
                held += character
                continue
            yield from _before_action(held)
            held = ""
            yield _VALUE, quote(character)
    if held:
        yield _PLAIN, held


def _before_action(held: str) -> Iterable[_Token]:
    bare = held.rstrip("{")
    if bare:
        yield _PLAIN, bare
    if bare != held:
        yield _VALUE, quote(held[len(bare) :])


def printable(character: str) -> bool:
    """Whether a Modelfile keeps the character: Go's strconv.IsPrint, and blanks and line feeds, which its parser lets pass."""
    return character in " \t\n" or unicodedata.category(character)[0] in "LMNPS"


_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def quote(value: str) -> str:
    """A Go string literal, on one line."""
    return '"' + "".join(_quoted(character) for character in value) + '"'


def _quoted(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if printable(character):
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
