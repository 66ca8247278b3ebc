"""Go's text/template executed, as far as templates made here use it (`go_parse.py`): what Ollama will say, seen on the spot.

Strict: a value Go would print in its own syntax is refused. Held against Go itself by a long test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunedock.export.ollama.go_parse import (
    Assign,
    Block,
    Call,
    Constant,
    Expression,
    GoTemplateError,
    Node,
    Print,
    Text,
    parse,
)
from tunedock.export.ollama.values import Struct, go_json


@dataclass
class _State:
    scopes: list[dict[str, Any]] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def find(self, name: str) -> dict[str, Any]:
        scope: dict[str, Any]
        for scope in reversed(self.scopes):
            if name in scope:
                return scope
        raise GoTemplateError(f"undefined variable {name}")


def render(source: str, data: dict[str, Any]) -> str:
    """What Go's text/template makes of `source` and `data` (see `values`). Raises GoTemplateError."""
    state = _State([{"$": data}])
    _run(parse(source), data, state)
    return "".join(state.written)


def _run(nodes: Sequence[Node], dot: Any, state: _State) -> None:
    for node in nodes:
        if isinstance(node, Text):
            state.written.append(node.value)
        elif isinstance(node, Print):
            state.written.append(_printed(_value(node.expression, dot, state)))
        elif isinstance(node, Assign):
            value = _value(node.expression, dot, state)
            (state.scopes[-1] if node.declares else state.find(node.name))[node.name] = value
        else:
            _run_block(node, dot, state)


def _run_block(node: Block, dot: Any, state: _State) -> None:
    value = _value(node.expression, dot, state)
    state.scopes.append({})
    if not _true(value):
        _run(node.otherwise, dot, state)
    elif node.word == "range":
        for key, item in _items(value):
            names = node.names if len(node.names) == 2 else ("", *node.names) if node.names else ("", "")
            state.scopes.append({name: part for name, part in zip(names, (key, item), strict=True) if name})
            _run(node.body, item, state)
            state.scopes.pop()
    else:
        _run(node.body, value if node.word == "with" else dot, state)
    state.scopes.pop()


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, list):
        return list(enumerate(value))
    if isinstance(value, dict) and not isinstance(value, Struct):
        return sorted(value.items())
    raise GoTemplateError("not known here: a range over neither list nor map")


def _printed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    raise GoTemplateError(f"not known here: printing a value of {type(value).__name__}")


def _true(value: Any) -> bool:
    return True if isinstance(value, Struct) else bool(value)


def _value(expression: Expression, dot: Any, state: _State) -> Any:
    if isinstance(expression, Constant):
        return expression.value
    if isinstance(expression, Call):
        return _called(expression, dot, state)
    start = expression.start
    if start == ".":
        value = dot
    elif isinstance(start, str):
        value = state.find(start)[start]
    else:
        value = _value(start, dot, state)
    for name in expression.fields:
        value = _field(value, name)
    return value


def _field(value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise GoTemplateError(f"no field {name} in a value of {type(value).__name__}")
    if isinstance(value, Struct) and name not in value:
        raise GoTemplateError(f"no field {name}")
    return value.get(name)


def _called(call: Call, dot: Any, state: _State) -> Any:
    if call.function in ("and", "or"):
        value: Any = None
        for argument in call.arguments:
            value = _value(argument, dot, state)
            if _true(value) != (call.function == "and"):
                break
        return value
    arguments = [_value(argument, dot, state) for argument in call.arguments]
    try:
        return _FUNCTIONS[call.function](*arguments)
    except (TypeError, IndexError) as error:
        raise GoTemplateError(f"{call.function}: {error}") from None


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b) or not isinstance(a, str | int | bool):
        raise TypeError("incompatible types for comparison")
    return bool(a == b)


def _ordered(a: Any, b: Any) -> bool:
    if type(a) is not int or type(b) is not int:
        raise TypeError("only whole numbers are ordered here")
    return a < b


def _sliced(value: Any, start: int) -> Any:
    if not isinstance(value, list) or not 0 <= start <= len(value):
        raise IndexError("out of range")
    return value[start:]


def _indexed(value: Any, at: int) -> Any:
    if not isinstance(value, list) or not 0 <= at < len(value):
        raise IndexError("out of range")
    return value[at]


def _typed(form: str, value: Any) -> str:
    """Only `%T`: `string` is told from everything else."""
    if form != "%T":
        raise TypeError(f"not known here: {form}")
    return "string" if isinstance(value, str) else "any"


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": _true, "or": _true, "not": lambda a: not _true(a), "eq": _equal, "ne": lambda a, b: not _equal(a, b),
    "lt": _ordered, "gt": lambda a, b: _ordered(b, a), "len": len, "slice": _sliced, "index": _indexed, "json": go_json,
    "printf": _typed,
}  # fmt: skip
