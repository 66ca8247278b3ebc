"""`tunedock models` at a terminal: what it prints, and what it says of what cannot be meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from registry_of_models import a_record, a_registry

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry with two versions of `support`, the first in production."""
    monkeypatch.chdir(tmp_path)
    acts = a_registry(tmp_path)
    for number in (1, 2):
        acts.register("support", *a_record(tmp_path / f"m{number}", f"weights {number}"))
    acts.promote("support", "1", "production")
    return tmp_path


def said(tunedock: Command, *arguments: str, code: int = 0) -> str:
    """What it printed, in one line; what it complained of, where it was to fail."""
    ended, out, err = tunedock("models", *arguments)
    assert ended == code, err
    return " ".join((err if code else out).split())


def test_there_and_back(folder: Path, tunedock: Command) -> None:
    assert said(tunedock, "register", "support", "m2", "--note", "again").endswith(f"support version 3: {folder}/m2")
    assert said(tunedock, "promote", "support", "2") == "support@production is version 2; it was version 1"
    assert said(tunedock, "promote", "support", "2") == "support@production is version 2, as before"
    assert said(tunedock, "promote", "support", "production", "--to", "staging").startswith(
        "support@staging is version 2"
    )
    assert "10% version 3" in said(tunedock, "promote", "support", "v3", "--canary", "10%")
    listed = json.loads(said(tunedock, "list", "support", "--json"))
    assert listed["canaries"] == {"production": {"version": "3", "percent": 10.0}}
    assert [one["version"] for one in listed["versions"]] == ["3", "2", "1"]
    assert said(tunedock, "rollback", "support") == "support@production is version 2; it was version 2, 10% version 3"
    assert said(tunedock, "rollback", "support") == "support@production is version 1; it was version 2"
    assert "nothing to go back to" in said(tunedock, "rollback", "support", code=2)
    assert "version 1" in said(tunedock, "list") and "again" in said(tunedock, "list", "support")
    assert json.loads(said(tunedock, "show", "support", "3", "--json"))["files"].keys() == {
        "config.json",
        "model.safetensors",
    }
    shown = said(tunedock, "show", "support", "1")
    assert "aliases production created 20" in shown and "1,7" not in shown
    assert said(tunedock, "unalias", "support", "staging") == "support@staging is nothing; it was version 2"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["list", "nothere"], "the registry has no model `nothere`"),
        (["promote", "support", "9"], "`support` has no version 9"),
        (["promote", "support", "staging"], "`support` has no alias `staging`"),
        (["promote", "support", "2", "--to", "v2"], "`v2` is reserved: it would be taken for a version"),
        (["promote", "support", "2", "--to", "2"], "`2` is reserved: it would be taken for a version"),
        (["promote", "support", "2", "--canary", "100%"], "for everybody promote without --canary"),
        (["promote", "support", "2", "--canary", "150%"], "from 0 to below 100 percent"),
        (["promote", "support", "2", "--canary", "-5%"], "from 0 to below 100 percent"),
        (["promote", "support", "1", "--canary", "5%"], "is version 1 already"),
        (["promote", "support", "2", "--to", "staging", "--canary", "5%"], "stands for nothing yet"),
        (["register", "../../etc/passwd", "m1"], "is no name of a model"),
        (["register", "support", "/etc"], "this folder holds no model"),
        (["register", "support", "m1", "--registry", "htp://x"], "`htp` is no registry"),
        (["list", "--registry", "none.db"], "there is no registry"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_what_cannot_be_meant(folder: Path, tunedock: Command, arguments: list[str], says: str) -> None:
    assert says in said(tunedock, *arguments, code=2)
    assert json.loads(said(tunedock, "list", "--json"))["models"][0]["aliases"] == {"production": "1"}


def test_a_server_that_is_not_there_is_told_in_a_line(tunedock: Command) -> None:
    told = said(tunedock, "list", "--registry", "http://127.0.0.1:9", code=12)
    assert told.startswith("error: http://127.0.0.1:9: the registry cannot be asked: Connection refused hint:")
