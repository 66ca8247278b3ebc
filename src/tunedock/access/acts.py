"""What an administrator does to an access store: issue, revoke, list, and say what a subject may do.

Each act is one transaction, with its line in the audit written inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, insert, select, update

from tunedock.access import api_key, policy, tables
from tunedock.access.audit import Audit
from tunedock.access.policy import EVERYONE, PolicyRow
from tunedock.access.store import Store
from tunedock.errors import RecipeError

State = Literal["valid", "expired", "revoked"]


@dataclass(frozen=True, slots=True)
class KeyRow:
    """What is known of a key that was issued. Times in seconds since 1970."""

    id: str
    subject: str
    label: str
    created: float
    expires: float | None
    revoked: float | None
    last_used: float | None
    """To the minute."""

    def state(self, now: float) -> State:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"

    def to_json(self, now: float) -> dict[str, Any]:
        return {
            "id": api_key.PREFIX + self.id,
            "subject": self.subject,
            "label": self.label,
            "state": self.state(now),
            "created": told(self.created),
            "expires": told(self.expires),
            "revoked": told(self.revoked),
            "last_used": told(self.last_used),
        }


@dataclass(frozen=True, slots=True)
class Administration:
    store: Store
    audit: Audit
    clock: Callable[[], float]

    def issue(self, subject: str, *, label: str = "", valid_s: float | None) -> tuple[api_key.ApiKey, KeyRow]:
        """Makes a key; its secret is in what is returned, and nowhere else. `valid_s` None: until it is revoked.

        Raises RecipeError for a subject or a label that is none.
        """
        named(subject, "SUBJECT")
        if subject == EVERYONE:
            raise RecipeError("`*` is everyone, and has no key", where="SUBJECT", hint="name a person or a program")
        if label:
            named(label, "--label")
        if valid_s is not None and not 1 <= valid_s <= 100 * 366 * 86_400:
            raise RecipeError("no such time", where="--expires", hint="from 1s to 100 years (36500d), or never")
        now = self.clock()
        key = api_key.new()
        stored = api_key.digest(key)
        row = KeyRow(key.id, subject, label, now, None if valid_s is None else now + valid_s, None, None)

        def work(connection: Connection) -> None:
            values = {"id": key.id, "subject": subject, "label": label, "created": now, "expires": row.expires}
            connection.execute(insert(tables.keys).values(salt=stored.salt, digest=stored.digest, **values))
            told_key = {"key": api_key.PREFIX + key.id, "subject": subject, "label": label}
            self.audit.write("issue", now, **told_key, expires=told(row.expires))

        self.store.write(work)
        return key, row

    def revoke(self, key_id: str) -> KeyRow:
        """Makes a key void. One that is revoked already stays as it is. Raises RecipeError where there is no such key."""
        now = self.clock()

        def work(connection: Connection) -> KeyRow:
            found = connection.execute(select(*_COLUMNS).where(tables.keys.c.id == key_id)).one_or_none()
            if found is None:
                raise RecipeError(
                    "there is no such key",
                    where=api_key.PREFIX + key_id,
                    hint="`tunedock token list` lists those there are",
                )
            row = _key_row(found)
            if row.revoked is not None:
                return row
            connection.execute(update(tables.keys).where(tables.keys.c.id == key_id).values(revoked=now))
            self.audit.write("revoke", now, key=api_key.PREFIX + key_id, subject=row.subject, label=row.label)
            return replace(row, revoked=now)

        return self.store.write(work)

    def revoke_jti(self, jti: str) -> bool:
        """Has a JSON Web Token refused, by its `jti`; false where it was already. Raises RecipeError for what is no id."""
        named(jti, "--jti")
        now = self.clock()

        def work(connection: Connection) -> bool:
            if connection.execute(select(tables.revoked.c.jti).where(tables.revoked.c.jti == jti)).first():
                return False
            connection.execute(insert(tables.revoked).values(jti=jti, at=now))
            self.audit.write("revoke-jti", now, jti=jti)
            return True

        return self.store.write(work)

    def change_policy(self, subject: str, change: Callable[[PolicyRow], PolicyRow]) -> PolicyRow:
        """Changes the row of a subject (`*`: everyone); the row it has now. Raises RecipeError for a subject that is none."""
        named(subject, "SUBJECT")
        now = self.clock()

        def work(connection: Connection) -> PolicyRow:
            before = policy.read_rows(connection, subject).get(subject, PolicyRow())
            after = change(before)
            if after != before:
                policy.write_row(connection, subject, after)
                self.audit.write("policy", now, subject=subject, before=before.to_json(), after=after.to_json())
            return after

        return self.store.write(work)


def list_keys(store: Store) -> list[KeyRow]:
    """Every key that was issued, oldest first."""
    query = select(*_COLUMNS).order_by(tables.keys.c.created, tables.keys.c.id)
    return [_key_row(row) for row in store.read(lambda connection: connection.execute(query).all())]


def list_policies(store: Store) -> dict[str, PolicyRow]:
    """Subject -> its row, of those that have one."""
    return store.read(policy.read_rows)


def usable(name: str) -> bool:
    """Whether a text from outside may name a subject or a token: short, and nothing that moves a terminal or breaks a line."""
    return 0 < len(name) <= tables.LONGEST and name.isprintable() and name == name.strip()


def named(name: str, where: str) -> None:
    """Raises RecipeError for what is no name of a subject, a label or an id."""
    if not usable(name):
        raise RecipeError(
            f"it must have 1 to {tables.LONGEST} characters, all printable, and no blank at an end",
            where=where,
            hint="a name such as `alice` or `billing-service`",
        )


def told(seconds: float | None) -> str | None:
    """A time as ISO 8601, UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


_COLUMNS = [tables.keys.c[name] for name in KeyRow.__dataclass_fields__]


def _key_row(row: Row[Any]) -> KeyRow:
    return KeyRow(**row._mapping)
