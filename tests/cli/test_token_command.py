"""`tunedock token`: what it prints, what it refuses, and that what it issues is what the gateway takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from access_bed import opened, refused, who
from tunedock.access.policy import Policy
from tunedock.serve.access import AccessSettings

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_key_is_issued_shown_once_used_and_revoked(tunedock: Command) -> None:
    code, out, err = tunedock("token", "issue", "alice", "--label", "laptop")
    key = out.strip()
    assert code == 0 and re.fullmatch(r"td-[a-z0-9]{12}-[A-Za-z0-9]{43}", key)
    assert out == f"{key}\n" and "alice" in err and "not shown again" in err and key not in err
    with opened(AccessSettings(store="access.db")) as access:
        assert who(access, key).name == "alice"
    code, out, _ = tunedock("token", "list")
    assert code == 0 and key[:15] in out and "laptop" in out and "valid" in out and key not in out
    code, out, _ = tunedock("token", "list", "--json")
    (row,) = json.loads(out)["keys"]
    assert (row["id"], row["subject"], row["state"]) == (key[:15], "alice", "valid") and row["last_used"]
    assert tunedock("token", "revoke", key[:15])[:2] == (0, f"revoked {key[:15]}\n")
    with opened(AccessSettings(store="access.db")) as access:
        assert "revoked" in refused(access, f"Bearer {key}").message
    assert "revoked" in tunedock("token", "list")[1]
    audit = [json.loads(line)["act"] for line in Path("access.db.audit.jsonl").read_text().splitlines()]
    assert audit == ["issue", "revoke"]


def test_json_for_programs(tunedock: Command) -> None:
    value = json.loads(tunedock("token", "issue", "ci", "--expires", "never", "--json")[1])
    assert value["key"].startswith(value["id"]) and value["expires"] is None
    assert json.loads(tunedock("token", "revoke", value["id"], "--json")[1])["state"] == "revoked"
    assert json.loads(tunedock("token", "revoke", "--jti", "t1", "--json")[1]) == {"jti": "t1", "state": "revoked"}
    said = json.loads(tunedock("token", "limit", "ci", "--concurrent", "3", "--json")[1])
    assert said["policy"]["concurrent"] == 3


def test_limits_are_said_one_by_one(tunedock: Command) -> None:
    tunedock("token", "limit", "*", "--requests-per-minute", "60", "--models", "support-*, base")
    tunedock("token", "limit", "alice", "--requests-per-minute", "none", "--tokens-per-day", "1000000")
    assert "tokens_per_day 1,000,000" in tunedock("token", "limit", "alice", "--concurrent", "2")[1]
    key = tunedock("token", "issue", "alice")[1].strip()
    with opened(AccessSettings(store="access.db")) as access:
        assert who(access, key).policy == Policy(("support-*", "base"), concurrent=2, tokens_per_day=1_000_000)
    out = tunedock("token", "list")[1]
    assert "everyone" in out and "support-*, base" in out and "1,000,000" in out
    assert [line.split() for line in out.splitlines() if line.startswith("alice")] == [
        ["alice", "as", "everyone", "none", "as", "everyone", "2", "1,000,000"]
    ]
    assert "as everyone" in tunedock("token", "limit", "alice", "--requests-per-minute", "default",
                                     "--tokens-per-day", "default", "--concurrent", "default")[1]  # fmt: skip
    tunedock("token", "limit", "bob", "--models", "")
    assert json.loads(tunedock("token", "list", "--json")[1])["policies"]["bob"]["models"] == []


REFUSED = [
    (["issue", "a\nb"], "printable"),
    (["issue", "*"], "everyone"),
    (["issue", "alice", "--label", "\x1b[2J"], "printable"),
    (["issue", "alice", "--expires", "soon"], "90d"),
    (["issue", "alice", "--expires", "0d"], "100 years"),
    (["issue", "alice", "--expires", "999999999d"], "100 years"),
    (["issue", "alice", "--store", "postgresql://alice:secret@host/d"], "pgpass"),
    (["revoke"], "--jti"),
    (["revoke", "td-aaaaaaaaaaaa", "--jti", "x"], "one thing"),
    (["revoke", "td-aaaaaaaaaaaa"], "no such key"),
    (["revoke", "alice"], "no key's id"),
    (["revoke", "td-aaaaaaaaaaaa-" + "b" * 43], "td-aaaaaaaaaaaa"),
    (["limit", "alice"], "nothing is to be changed"),
    (["limit", "alice", "--concurrent", "0"], "--concurrent"),
    (["limit", "alice", "--tokens-per-day", "many"], "--tokens-per-day"),
    (["limit", "alice", "--models", "a,,b"], "--models"),
]


def test_what_cannot_be_is_refused_with_a_way_out(tunedock: Command) -> None:
    tunedock("token", "issue", "someone")
    for arguments, reason in REFUSED:
        code, out, err = tunedock("token", *arguments)
        assert (code, out) == (2, "") and reason in err and "hint: " in err, arguments
        assert "secret@" not in err and "b" * 43 not in err
    assert len(json.loads(tunedock("token", "list", "--json")[1])["keys"]) == 1


def test_what_only_reads_makes_no_store(tunedock: Command) -> None:
    for arguments in (["list"], ["revoke", "td-aaaaaaaaaaaa"]):
        code, _, err = tunedock("token", *arguments)
        assert code == 2 and "there is no access store" in err
    assert not Path("access.db").exists()


def test_names_from_elsewhere_reach_no_terminal_raw(tunedock: Command) -> None:
    """A store written by another program holds what it likes."""
    import sqlite3

    tunedock("token", "issue", "alice")
    with sqlite3.connect("access.db") as connection:
        connection.execute("UPDATE access_keys SET subject = ?, label = ?", ("\x1b]0;x\x07bob", "[red]\x9b2J"))
    out = tunedock("token", "list")[1]
    assert "bob" in out and "[red]" in out and not set("\x1b\x07\x9b") & set(out)


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sqlalchemy":
            raise ImportError("blocked", name=name)
sys.meta_path.insert(0, Block())
from tunedock.cli.app import main
main(["token", "list"])
"""


def test_without_the_package_it_says_which() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 10 and "tunedock[serve]" in done.stderr
