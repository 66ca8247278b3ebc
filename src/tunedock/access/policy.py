"""What a subject may do: a row of its own laid over the row of everyone (`*`), laid over the gateway's settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from sqlalchemy import Connection, bindparam, delete, insert, select

from tunedock.access import tables
from tunedock.errors import RecipeError

EVERYONE = "*"
NO_LIMIT: Final = -1
"""In a row, where null already says "as everyone"."""

LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent", "tokens_per_day")
MOST = 2**53
"""What JSON still tells exactly."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What holds for a subject. None is no limit."""

    models: tuple[str, ...] = ("*",)
    """Patterns as of `fnmatch`, case counts; a model or an adapter is allowed that fits one."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    """Requests being answered at once."""
    tokens_per_day: int | None = None
    """From midnight to midnight, UTC."""

    def __post_init__(self) -> None:
        for name in LIMITS:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST:
                raise RecipeError(
                    f"{value} is no limit", where=name, hint="a whole number from 1 on, or none for no limit"
                )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"models": list(self.models)}


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """What is said of a subject itself. None: as everyone; NO_LIMIT: none."""

    models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    tokens_per_day: int | None = None

    def over(self, base: Policy) -> Policy:
        said: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        given: dict[str, Any] = {
            name: None if value == NO_LIMIT else value for name, value in said.items() if value is not None
        }
        return replace(base, **given)

    def to_json(self) -> dict[str, Any]:
        """`null`: as everyone; `"none"`: no limit."""
        said = {name: "none" if value == NO_LIMIT else value for name, value in asdict(self).items()}
        return said | {"models": None if self.models is None else list(self.models)}


_ALL = select(tables.policies)
_SOME = _ALL.where(tables.policies.c.subject.in_(bindparam("subjects", expanding=True)))


def read_rows(connection: Connection, *subjects: str) -> dict[str, PolicyRow]:
    """Subject -> its row, of those that have one; of all without any name."""
    found = connection.execute(_SOME, {"subjects": subjects}) if subjects else connection.execute(_ALL)
    return {row["subject"]: _row(row) for row in found.mappings()}


def resolve(connection: Connection, subject: str, default: Policy) -> Policy:
    """What holds for a subject."""
    rows = read_rows(connection, EVERYONE, subject)
    made = default
    for name in dict.fromkeys((EVERYONE, subject)):
        if name in rows:
            made = rows[name].over(made)
    return made


def write_row(connection: Connection, subject: str, row: PolicyRow) -> None:
    """Puts a row in the place of the one before; one that says nothing is taken away."""
    connection.execute(delete(tables.policies).where(tables.policies.c.subject == subject))
    if row != PolicyRow():
        values = asdict(row) | {"models": None if row.models is None else json.dumps(list(row.models))}
        connection.execute(insert(tables.policies).values(subject=subject, **values))


def _row(row: Mapping[Any, Any]) -> PolicyRow:
    models = row["models"]
    return PolicyRow(None if models is None else tuple(json.loads(models)), **{name: row[name] for name in LIMITS})
