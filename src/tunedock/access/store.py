"""The access store: one SQLite file, or a PostgreSQL database by its URL.

SQLite is in WAL mode, so that reading never waits for writing, and every writing transaction takes its lock at once: one that reads
first and writes later would fail where two processes do so. A file that was there and is gone is not made anew (an empty one would
know no revocation); one that was put in its place is opened.

A transaction that finds the store locked or gone is tried again until `wait_s` is over, then StoreUnavailableError is raised.
Nobody is let in on the ground that the store could not be asked.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event, func, insert, inspect, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import QueuePool

from tunedock.access import tables
from tunedock.errors import DependencyError, DiskError, EngineError, RecipeError, RunError

WAIT_S = 2.0
AGAIN_S = 0.02
"""Between two tries where the store fails at once rather than after a wait of its own."""

SCHEMA_LOCK = 0x7464_6163
"""PostgreSQL's advisory lock under which tables are made: two workers start at once."""

T = TypeVar("T")


class StoreUnavailableError(EngineError):
    """The store was locked or gone for longer than is waited for."""


class Store:
    """Open connections to an access store; safe to use from several threads."""

    def __init__(self, engine: Engine, name: str, wait_s: float) -> None:
        self._engine = engine
        self.name = name
        """As it may be shown: without a password."""
        self._wait_s = wait_s

    @property
    def is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    @classmethod
    def open(cls, place: str, *, wait_s: float = WAIT_S, durable: bool = False, create: bool = True) -> Store:
        """Opens a store, with its tables. `durable`: a commit outlives a power cut, at the price of a flush of the disk.

        Raises RecipeError for a place that is none, DependencyError without PostgreSQL's driver, DiskError or EngineError where it
        cannot be opened, RunError where it is of another version.
        """
        engine = _postgresql(place, wait_s) if "://" in place else _sqlite(Path(place), wait_s, durable, create)
        store = cls(engine, place, wait_s)
        try:
            version = store.write(_tables_made)
        except StoreUnavailableError as error:
            store.close()
            raise EngineError(
                error.message, where=place, hint="is it an access store, and does its server run?"
            ) from error
        if version != tables.VERSION:
            store.close()
            raise RunError(
                f"its tables are of version {version}, this tunedock knows {tables.VERSION}",
                where=f"access store {place}",
                hint="use the tunedock that made it, or another store",
            )
        return store

    def read(self, work: Callable[[Connection], T]) -> T:
        """What `work` reads, in one transaction. Raises StoreUnavailableError."""
        return self._tried(work, "read")

    def write(self, work: Callable[[Connection], T]) -> T:
        """Does `work` in one transaction, which is done whole or not at all; it may be begun more than once.

        Raises StoreUnavailableError.
        """
        return self._tried(work, "write")

    def lock(self, connection: Connection, subject_key: int) -> None:
        """Makes transactions on one subject take turns. SQLite's take turns anyway."""
        if not self.is_sqlite:
            connection.execute(select(func.pg_advisory_xact_lock(subject_key)))

    def close(self) -> None:
        self._engine.dispose()

    def _tried(self, work: Callable[[Connection], T], mode: str) -> T:
        until = time.monotonic() + self._wait_s
        while True:
            try:
                with self._engine.connect().execution_options(access=mode) as connection, connection.begin():
                    return work(connection)
            except (DBAPIError, PoolTimeoutError) as error:
                # Whatever a database says, of a lock, a disk or a lost connection: it was not asked, so nobody enters by it.
                if time.monotonic() + AGAIN_S >= until:
                    reason = error.orig if isinstance(error, DBAPIError) else error
                    raise StoreUnavailableError(
                        f"the access store cannot be used: {_first_line(reason)}", where=self.name
                    ) from error
                time.sleep(AGAIN_S)


def _sqlite(path: Path, wait_s: float, durable: bool, create: bool) -> Engine:
    if not create and not path.exists():
        raise RecipeError(
            "there is no access store",
            where=str(path),
            hint="`--store` names another; `tunedock token issue` makes one",
        )
    try:
        # Its files hold hashes and who called: none of others' business. WAL's files take the mode of this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise DiskError(
            f"the access store cannot be opened: {error.strerror}", where=str(path), hint="name another by its path"
        ) from error
    address = f"file:{quote(str(path.absolute()))}?mode=rw"  # rw: it is never made here

    def connect() -> sqlite3.Connection:
        made = sqlite3.connect(address, uri=True, timeout=wait_s, check_same_thread=False, isolation_level=None)
        try:
            made.execute("PRAGMA journal_mode=WAL")
            made.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        except sqlite3.Error:
            made.close()
            raise
        return made

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_timeout=wait_s)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("access") == "write"
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    @event.listens_for(engine, "connect")
    def _opened(_connection: Any, record: Any) -> None:
        record.info["file"] = _identity(path)

    @event.listens_for(engine, "checkout")
    def _still_there(_connection: Any, record: Any, _proxy: Any) -> None:
        if record.info.get("file") != _identity(path):
            raise DisconnectionError("the file is another one now")

    return engine


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _postgresql(place: str, wait_s: float) -> Engine:
    where = "access store"
    try:
        url = make_url(place)
    except ArgumentError as error:
        raise RecipeError("it is no URL of a database", where=where, hint="postgresql://user@host/database") from error
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise RecipeError(
            f"`{url.get_backend_name()}` is no store: it is a path of a SQLite file, or postgresql://...",
            where=where,
            hint="write a path without `sqlite://`"
            if url.get_backend_name() == "sqlite"
            else "postgresql://user@host/database",
        )
    if url.password is not None or {"password", "passfile"} & set(url.query):
        raise RecipeError(
            "a password does not belong into the URL, which lists of processes and recipes show",
            where=where,
            hint="put it into the file ~/.pgpass, or name one by PGPASSFILE",
        )
    seconds = max(2, round(wait_s))  # libpq takes no fewer
    limits = f"-c lock_timeout={round(wait_s * 1000)} -c statement_timeout={round(wait_s * 2000)}"
    try:
        return create_engine(
            URL.create("postgresql+psycopg", url.username, None, url.host, url.port, url.database, url.query),
            connect_args={"connect_timeout": seconds, "options": limits, "application_name": "tunedock"},
            pool_timeout=wait_s,
        )
    except ImportError as error:
        raise DependencyError(
            "PostgreSQL's driver is not installed", where=where, hint="pip install 'tunedock[postgresql]'"
        ) from error


def _tables_made(connection: Connection) -> int:
    """Makes the tables where there are none; their version."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(SCHEMA_LOCK)))
    if not inspect(connection).has_table(tables.meta.name):
        tables.metadata.create_all(connection)
        connection.execute(insert(tables.meta).values(version=tables.VERSION))
    return int(connection.execute(select(func.max(tables.meta.c.version))).scalar_one())


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
