"""`tunedock token issue`, `revoke`, `list`, `limit`: who may call the gateway, and how much."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunedock.access import DEFAULT_STORE
from tunedock.cli.options import Json, group
from tunedock.errors import DependencyError, RecipeError

if TYPE_CHECKING:
    from tunedock.access.acts import Administration
    from tunedock.access.policy import PolicyRow
    from tunedock.access.store import Store

app = group("Say who may call the gateway, and how much.")

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

At = Annotated[
    str, typer.Option("--store", metavar="FILE|URL", help="A SQLite file, or postgresql://USER@HOST/DATABASE.")
]
AuditFile = Annotated[
    str | None,
    typer.Option(
        "--audit", metavar="FILE", help="Where acts are noted; beside a SQLite store by default.", show_default=False
    ),
]
Subject = Annotated[
    str, typer.Argument(metavar="SUBJECT", help="A person or a program, as in a token's `sub`.", show_default=False)
]
Limit = Annotated[
    str | None, typer.Option(metavar="N|none|default", help="none: no limit; default: as everyone.", show_default=False)
]


@app.command("issue")
def issue(
    subject: Subject,
    label: Annotated[str, typer.Option("--label", help="What the key is for.", show_default=False)] = "",
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="From now: 12h, 90d; or never.", show_default=True)
    ] = "90d",
    store: At = DEFAULT_STORE,
    audit: AuditFile = None,
    as_json: Json = False,
) -> None:
    """Issue an API key. It is shown once: the store keeps a hash of it only."""
    from tunedock.cli.text import print_json, printable

    with _administration(store, audit, create=True) as admin:
        key, row = admin.issue(subject, label=label, valid_s=_seconds(expires))
    if as_json:
        print_json(row.to_json(row.created) | {"key": key.text()})
        return
    print(key.text(), flush=True)  # alone on standard output, so that a script can take it
    until = f"until {_day(row.expires)}" if row.expires else "until it is revoked"
    print(printable(f"a key for {subject}, {until}; it is not shown again"), file=sys.stderr)


@app.command("revoke")
def revoke(
    key: Annotated[
        str | None, typer.Argument(metavar="[td-ID]", help="A key as it is listed.", show_default=False)
    ] = None,
    jti: Annotated[
        str | None, typer.Option("--jti", metavar="ID", help="A JSON Web Token, by its `jti`.", show_default=False)
    ] = None,
    store: At = DEFAULT_STORE,
    audit: AuditFile = None,
    as_json: Json = False,
) -> None:
    """Revoke an API key or a JSON Web Token. Gateways refuse it within a second."""
    from tunedock.cli.text import print_json, printable

    if (key is None) == (jti is None):
        raise RecipeError(
            "one thing is revoked at a time", where="token revoke", hint="name a key, or a token by --jti"
        )
    key_id = _key_id(key) if key is not None else ""
    with _administration(store, audit) as admin:
        if jti is not None:
            admin.revoke_jti(jti)
            value: dict[str, Any] = {"jti": jti, "state": "revoked"}
        else:
            row = admin.revoke(key_id)
            value = row.to_json(admin.clock())
    if as_json:
        print_json(value)
    else:
        print(printable(f"revoked {value.get('id', jti)}"))


@app.command("list")
def list_(store: At = DEFAULT_STORE, as_json: Json = False) -> None:
    """List the keys that were issued, and what subjects may do."""
    from tunedock.cli.results import add_row, table
    from tunedock.cli.show import console
    from tunedock.cli.text import print_json

    now = time.time()
    with _opened(store) as opened:
        from tunedock.access.acts import list_keys, list_policies

        rows, policies = list_keys(opened), list_policies(opened)
    if as_json:
        told = {name: row.to_json() for name, row in policies.items()}
        print_json({"keys": [row.to_json(now) for row in rows], "policies": told})
        return
    made = table("key", "subject", "label", "state", "created", "expires", "last used")
    for row in rows:
        times = (_day(when) for when in (row.created, row.expires, row.last_used))
        add_row(made, f"td-{row.id}", row.subject, row.label or "-", row.state(now), *times)
    console().print(made)
    if policies:
        limits = table("subject", "models", "requests/min", "tokens/min", "at once", "tokens/day", numbers_from=2)
        for name, policy in sorted(policies.items()):
            add_row(limits, "everyone" if name == "*" else name, *_cells(policy, everyone=name == "*"))
        console().print()
        console().print(limits)


@app.command("limit")
def limit(
    subject: Annotated[
        str, typer.Argument(metavar="SUBJECT|'*'", help="Whom it holds for; '*' is everyone.", show_default=False)
    ],
    models: Annotated[
        str | None,
        typer.Option(
            "--models",
            metavar="PATTERN,...|default",
            help="Models and adapters allowed: `support*,base`.",
            show_default=False,
        ),
    ] = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent: Limit = None,
    tokens_per_day: Limit = None,
    store: At = DEFAULT_STORE,
    audit: AuditFile = None,
    as_json: Json = False,
) -> None:
    """Say what a subject may do: which models, how much a minute, at once, and a day (UTC). What is not named stays."""
    from dataclasses import replace

    from tunedock.cli.results import number
    from tunedock.cli.text import print_json, printable

    given = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent": concurrent,
        "tokens_per_day": tokens_per_day,
    }
    changes: dict[str, Any] = {name: _limit(name, text) for name, text in given.items() if text is not None}
    if models is not None:
        changes["models"] = None if models == "default" else _patterns(models)
    if not changes:
        raise RecipeError("nothing is to be changed", where="token limit", hint="name a limit, or --models")
    with _administration(store, audit, create=True) as admin:
        row = admin.change_policy(subject, lambda before: replace(before, **changes))
    if as_json:
        print_json({"subject": subject, "policy": row.to_json()})
        return
    said = {name: value for name, value in row.to_json().items() if value is not None}
    parts = [f"{name} {value if isinstance(value, str | list) else number(value)}" for name, value in said.items()]
    print(printable(f"{subject}: {', '.join(parts) or 'as everyone'}"))


@contextmanager
def _opened(place: str, *, create: bool = False) -> Iterator[Store]:
    try:
        from tunedock.access.store import Store
    except ImportError as error:
        raise DependencyError(
            f"the package `{error.name}` is missing", where="tunedock token", hint="pip install 'tunedock[serve]'"
        ) from error
    store = Store.open(place, durable=True, create=create)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _administration(place: str, audit: str | None, *, create: bool = False) -> Iterator[Administration]:
    with _opened(place, create=create) as store:
        from tunedock.access.acts import Administration
        from tunedock.access.audit import Audit

        yield Administration(store, Audit.beside(store, None if audit is None else Path(audit)), time.time)


def _seconds(text: str) -> float | None:
    if text == "never":
        return None
    found = re.fullmatch(r"(\d{1,9})([smhd])", text, re.ASCII)
    if not found:
        raise RecipeError(
            f"`{text}` is no time", where="--expires", hint="a number and s, m, h or d, such as 90d; or never"
        )
    return float(int(found[1]) * UNITS[found[2]])


def _limit(name: str, text: str) -> int | None:
    from tunedock.access.policy import MOST, NO_LIMIT

    if text in ("none", "default"):
        return NO_LIMIT if text == "none" else None
    value = int(text) if re.fullmatch(r"\d{1,16}", text, re.ASCII) else 0
    if not 1 <= value <= MOST:
        raise RecipeError(
            f"`{text}` is no limit",
            where=f"--{name.replace('_', '-')}",
            hint="a whole number from 1 on, none, or default",
        )
    return value


def _patterns(text: str) -> tuple[str, ...]:
    """An empty text is no model at all."""
    from tunedock.access.acts import named

    patterns = tuple(part.strip() for part in text.split(",")) if text else ()
    for pattern in patterns:
        named(pattern, "--models")
    return patterns


def _key_id(text: str) -> str:
    from tunedock.access import api_key

    found = api_key.parse_id(text)
    if found is None:
        whole = api_key.parse(text)
        hint = (
            f"its id is enough: `tunedock token revoke td-{whole.id}`" if whole else "`tunedock token list` lists them"
        )
        raise RecipeError(
            "this is a whole key, which should stand in no command" if whole else "this is no key's id",
            where="token revoke",
            hint=hint,
        )
    return found


def _cells(row: PolicyRow, *, everyone: bool) -> list[str]:
    """What is not said: of everyone no limit, of a subject what everyone has."""
    from tunedock.cli.results import number

    said = row.to_json()
    unsaid = "-" if everyone else "as everyone"
    models = ("all" if everyone else unsaid) if row.models is None else ", ".join(row.models) or "none"
    figures = [value for name, value in said.items() if name != "models"]
    return [
        models,
        *(unsaid if value is None else value if isinstance(value, str) else number(value) for value in figures),
    ]


def _day(seconds: float | None) -> str:
    """Local time, to the minute."""
    return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
