"""The store: who may open what, and what becomes of it while it is open."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import select, update

from access_bed import administration
from tunedock.access import api_key, tables
from tunedock.access.acts import list_keys, list_policies
from tunedock.access.policy import NO_LIMIT, Policy, PolicyRow, resolve
from tunedock.access.store import Store, StoreUnavailableError
from tunedock.errors import DiskError, EngineError, RecipeError, RunError, TunedockError


def test_a_store_is_its_owners_alone(tmp_path: Path) -> None:
    place = tmp_path / "access.db"
    with administration(place) as admin:
        admin.issue("alice", valid_s=None)
        made = list(tmp_path.iterdir())
        assert {path.name for path in made} >= {"access.db", "access.db-wal", "access.audit"}
        assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}


def test_no_file_holds_a_secret(tmp_path: Path) -> None:
    with administration(tmp_path / "access.db") as admin:
        key, row = admin.issue("alice", label="laptop", valid_s=60)
        admin.revoke(row.id)
        held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.id.encode() in held and key.secret.encode() not in held
    assert key.secret not in repr(key) + str(row)


def test_two_hashes_of_one_secret_differ_and_both_match() -> None:
    key = api_key.new()
    first, second = api_key.digest(key), api_key.digest(key)
    assert first != second and first.matches(key.secret) and second.matches(key.secret)
    assert not first.matches(key.secret[:-1]) and not first.matches("")
    assert api_key.parse(key.text()) == key and len({api_key.new().secret for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("mysql://a@b/c", RecipeError),
        ("sqlite:///access.db", RecipeError),
        ("postgresql://a:secret@b/c", RecipeError),
        ("postgresql://a@b/c?password=secret", RecipeError),
        ("://", RecipeError),
        ("postgresql://a@127.0.0.1:1/c", EngineError),
        ("no-such-folder/access.db", DiskError),
        (".", DiskError),
    ],
)
def test_what_is_no_store_is_told(
    place: str, kind: type[TunedockError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as found:
        Store.open(place, wait_s=0.1)
    assert found.value.hint and "secret" not in str(found.value)
    assert ("sqlite://" in found.value.hint) == place.startswith("sqlite")


def test_a_file_that_is_something_else_stays_as_it_is(tmp_path: Path) -> None:
    place = tmp_path / "notes.txt"
    place.write_text("not a database " * 100)
    before = place.read_bytes()
    with pytest.raises(EngineError, match="not a database"):
        Store.open(str(place), wait_s=0.1)
    assert place.read_bytes() == before


def test_another_version_is_refused(tmp_path: Path) -> None:
    place = str(tmp_path / "access.db")
    store = Store.open(place)
    store.write(lambda connection: connection.execute(update(tables.meta).values(version=tables.VERSION + 1)))
    store.close()
    with pytest.raises(RunError, match="version 2"):
        Store.open(place)


def test_many_processes_may_make_it_at_once(tmp_path: Path) -> None:
    code = "import sys; from tunedock.access.store import Store; Store.open(sys.argv[1]).close()"
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.db")]) for _ in range(3)]
    assert [one.wait(60) for one in running] == [0] * 3


def test_reading_does_not_wait_for_writing(tmp_path: Path) -> None:
    place = tmp_path / "access.db"
    store = Store.open(str(place), wait_s=0.2)
    other = sqlite3.connect(place, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert (
        store.read(lambda connection: connection.execute(select(tables.meta.c.version)).scalar_one()) == tables.VERSION
    )
    began = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="locked"):
        store.write(lambda connection: None)
    assert 0.1 < time.monotonic() - began < 1.5
    other.close()
    store.write(lambda connection: None)
    store.close()


def test_a_file_put_in_its_place_is_the_store(tmp_path: Path) -> None:
    """A backup that is played back: who was revoked there is revoked."""
    place, other = tmp_path / "access.db", tmp_path / "other.db"
    with administration(other) as admin:
        admin.issue("bob", valid_s=None)
    sqlite3.connect(other).execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
    store = Store.open(str(place), wait_s=0.2)
    assert list_keys(store) == []
    for end in ("-wal", "-shm"):
        Path(f"{place}{end}").unlink(missing_ok=True)
        Path(f"{other}{end}").unlink(missing_ok=True)
    other.replace(place)
    assert [row.subject for row in list_keys(store)] == ["bob"]
    store.close()


def test_threads_share_a_store(tmp_path: Path) -> None:
    with administration(tmp_path / "access.db") as admin:
        threads = [threading.Thread(target=admin.issue, args=(f"s{i}",), kwargs={"valid_s": None}) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({row.id for row in list_keys(admin.store)}) == 8


def test_a_policy_is_laid_over_that_of_everyone_and_that_over_the_settings(tmp_path: Path) -> None:
    default = Policy(requests_per_minute=1, tokens_per_minute=2, concurrent=3)
    with administration(tmp_path / "access.db") as admin:
        admin.change_policy("*", lambda _: PolicyRow(tokens_per_minute=20, concurrent=30))
        admin.change_policy("alice", lambda _: PolicyRow(models=("a-*",), concurrent=NO_LIMIT, tokens_per_day=400))

        def of(subject: str) -> Policy:
            return admin.store.read(lambda connection: resolve(connection, subject, default))

        everyone = Policy(requests_per_minute=1, tokens_per_minute=20, concurrent=30)
        assert of("bob") == of("*") == everyone
        assert of("alice") == Policy(
            ("a-*",), requests_per_minute=1, tokens_per_minute=20, concurrent=None, tokens_per_day=400
        )
        admin.change_policy("alice", lambda _: PolicyRow())
        assert of("alice") == everyone and set(list_policies(admin.store)) == {"*"}


@pytest.mark.parametrize("value", [0, -1, 2**60])
def test_a_limit_is_a_number_from_one_on(value: int) -> None:
    with pytest.raises(RecipeError, match="is no limit"):
        Policy(concurrent=value)


def test_every_act_is_in_the_audit(tmp_path: Path) -> None:
    now = [1_796_256_000.5]
    with administration(tmp_path / "access.db", lambda: now[0]) as admin:
        _, row = admin.issue("alice", label='a "label"', valid_s=3600)
        admin.revoke(row.id)
        admin.revoke(row.id)  # nothing is done, nothing is told
        admin.revoke_jti("t1")
        admin.revoke_jti("t1")
        admin.change_policy("alice", lambda before: PolicyRow(concurrent=4))
        admin.change_policy("alice", lambda before: before)
    lines = [json.loads(line) for line in (tmp_path / "access.audit").read_text().splitlines()]
    assert [line["act"] for line in lines] == ["issue", "revoke", "revoke-jti", "policy"]
    assert {line["time"] for line in lines} == {"2026-12-03T00:00:00.500+00:00"}
    assert all(line["by"] and line["host"] for line in lines)
    assert lines[0]["label"] == 'a "label"' and lines[0]["expires"] == "2026-12-03T01:00:00+00:00"
    assert lines[1]["key"] == f"td-{row.id}" and lines[1]["subject"] == "alice"
    assert (lines[3]["before"]["concurrent"], lines[3]["after"]["concurrent"]) == (None, 4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_what_cannot_be_told_is_not_done(tmp_path: Path) -> None:
    from tunedock.access.acts import Administration
    from tunedock.access.audit import Audit

    store = Store.open(str(tmp_path / "access.db"))
    admin = Administration(store, Audit(Path("/dev/full")), time.time)
    with pytest.raises(DiskError, match="so nothing was done"):
        admin.issue("alice", valid_s=None)
    with pytest.raises(DiskError):
        admin.revoke_jti("t1")
    assert list_keys(store) == []
    assert not store.read(lambda connection: connection.execute(select(tables.revoked)).all())
    store.close()


@pytest.mark.parametrize("subject", ["", " ", "a\nb", "a\x00", "a\x1b[2J", "\u202eb", "a" * 257, "*", " a", "\ud800"])
def test_what_is_no_name_gets_no_key(subject: str, tmp_path: Path) -> None:
    with administration(tmp_path / "access.db") as admin:
        with pytest.raises(RecipeError):
            admin.issue(subject, valid_s=None)
        assert list_keys(admin.store) == []


def test_a_store_may_lie_at_any_path(tmp_path: Path) -> None:
    folder = tmp_path / "a b?mode=memory#%41&é"
    os.mkdir(folder)  # noqa: PTH102
    with administration(folder / "x y.db") as admin:
        admin.issue("alice", valid_s=None)
    assert (folder / "x y.db").stat().st_size > 0
