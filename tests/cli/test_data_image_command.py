"""`tunedock data image` as a user calls it."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_bed import Engine
from inline_worker import InlineLauncher
from tunedock.image.engine import connected

Tunedock = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunedock.launch.places.LocalLauncher", InlineLauncher)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\nno json\n')
    return tmp_path


def test_made_named_listed(tunedock: Tunedock, engine_here: Engine) -> None:
    name = f"td-cli-data-{os.getpid()}:1"
    try:
        code, out, err = tunedock("data", "image", "rows.jsonl", "--tag", name, "--label", "org.example.owner=us=you")
        assert code == 0, err
        assert "1 row(s) among them cannot be read" in out
        assert f"`data.train: image://{name}`" in out
        _, out, _ = tunedock("image", "inspect", name, "--json")
        labels = json.loads(out)["labels"]
        assert (labels["org.example.owner"], labels["io.tunedock.data.rows"]) == ("us=you", "3")
        assert f"revision {labels['io.tunedock.data.revision']}" not in out
        _, out, _ = tunedock("image", "list", "--json")
        assert name in out
    finally:
        with connected() as client:
            client.images.remove(name, force=True)


def test_to_a_file_with_no_engine(tunedock: Tunedock, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{here}/none.sock")
    code, out, err = tunedock("data", "image", "rows.jsonl", "--tag", "a/b", "--to", "data.tar", "--json")
    assert code == 0, err
    assert json.loads(out)["name"] == "a/b:latest"
    with tarfile.open(here / "data.tar") as archive:
        assert json.load(archive.extractfile("manifest.json"))[0]["RepoTags"] == ["a/b:latest"]  # type: ignore[arg-type]
    before = (here / "data.tar").read_bytes()
    code, _, err = tunedock("data", "image", "rows.jsonl", "--to", "data.tar")
    assert (code, before) == (5, (here / "data.tar").read_bytes())
    assert "the file is there already" in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["rows.jsonl"], 2, "an image needs a name"),
        (["rows.jsonl", "--tag", "Data:1"], 2, "is no repository"),
        (["rows.jsonl", "--tag", f"data@sha256:{'0' * 64}"], 2, "an image needs a name"),
        (["none.jsonl", "--to", "d.tar"], 2, "none.jsonl"),
        (["rows.jsonl", "--to", "d.tar", "--label", "owner"], 2, "is not of the form KEY=VALUE"),
        (["rows.jsonl", "--to", "/proc/no/d.tar"], 8, "/proc/no"),
    ],
)
def test_what_is_refused(tunedock: Tunedock, here: Path, arguments: list[str], code: int, says: str) -> None:
    found, _, err = tunedock("data", "image", *arguments)
    assert (found, says in err) == (code, True), err
    assert sorted(path.name for path in here.iterdir()) == ["rows.jsonl"]
