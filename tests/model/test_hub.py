"""Hub ids, for real over HTTP: a mirror on loopback speaks the hub's two endpoints. And the cache, with no network."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from tunedock.errors import ModelError
from tunedock.eval import inspect_data
from tunedock.events import Emitter
from tunedock.model.hub import locate
from tunedock.recipe.schema import Recipe

COMMIT = "c0ffee" + "0" * 34
FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "model.safetensors": b"\x00" * 64,
    "evil.bin": b"pickle",
    "code.py": b"1",
}


class Mirror(BaseHTTPRequestHandler):
    """The hub's own paths: a model's revision, its tree, and the content of a file."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        if path == f"/api/models/owner/tiny/tree/{COMMIT}":
            tree = [{"type": "file", "path": name, "size": len(c), "oid": "0" * 40} for name, c in FILES.items()]
            return self._send(json.dumps(tree).encode(), body)
        if path.startswith("/api/models/owner/tiny/revision/") and path.rsplit("/", 1)[1] in ("main", COMMIT):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
            return self._send(json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode(), body)
        name = path.rsplit("/", 1)[1]
        if path.startswith("/owner/tiny/resolve/") and name in FILES:
            return self._send(FILES[name], body)
        code = "RevisionNotFound" if "owner/tiny" in path else "RepoNotFound"
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def _send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_mirror_gives_the_model_at_a_commit_and_the_cache_keeps_it(mirror: str) -> None:
    located = locate("owner/tiny", revision=None, hub=mirror, offline=False)
    assert located.commit == COMMIT
    assert sorted(p.name for p in located.folder.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]  # no pickle, no code
    again = locate("owner/tiny", revision=COMMIT, hub="hf", offline=True)
    assert again == located


def test_without_weights_nothing_large_comes_and_they_come_later(mirror: str) -> None:
    located = locate("owner/tiny", revision=None, hub=mirror, offline=False, weights=False)
    assert [p.name for p in located.folder.iterdir()] == ["config.json"]
    assert locate("owner/tiny", revision=COMMIT, hub="hf", offline=True, weights=False) == located
    again = locate("owner/tiny", revision=None, hub=mirror, offline=False)
    assert again == located
    assert (again.folder / "model.safetensors").is_file()


def test_looking_at_data_fetches_no_weights(mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(__file__).parents[2] / "examples" / "demo" / "base"
    for path in base.iterdir():
        monkeypatch.setitem(FILES, path.name, path.read_bytes())
    rows = [{"prompt": f"Where is number {n}?", "response": "Here."} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate(
        {
            "model": "owner/tiny",
            "hub": mirror,
            "data": {"train": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "tokens")},
        }
    )
    assert inspect_data.check(recipe, Emitter(None), to=None).kept == 10
    assert inspect_data.show(recipe, row="1")
    fetched = {path.name for path in (tmp_path / "cache").rglob("*") if path.suffix}
    assert "tokenizer.json" in fetched
    assert "model.safetensors" not in fetched


def test_code_comes_only_when_asked_for(mirror: str) -> None:
    located = locate("owner/tiny", revision=None, hub=mirror, offline=False, code=True)
    assert (located.folder / "code.py").is_file()
    assert not (located.folder / "evil.bin").exists()


@pytest.mark.parametrize(
    ("path", "revision", "offline", "word"),
    [
        ("owner/other", None, False, "no such model"),
        ("owner/tiny", "nowhere", False, "no revision"),
        ("owner/tiny", None, True, "offline"),
        ("./nowhere", None, False, "no such folder"),
        ("nowhere", None, False, "no such folder"),
    ],
)
def test_what_is_not_there_is_said(mirror: str, path: str, revision: str | None, offline: bool, word: str) -> None:
    with pytest.raises(ModelError, match=word):
        locate(path, revision=revision, hub=mirror, offline=offline)


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert locate(str(tmp_path), revision=None, hub="hf", offline=True).folder == tmp_path
