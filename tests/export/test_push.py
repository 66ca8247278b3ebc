"""Exports on their way to a store or a hub."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tunedock.errors import EngineError, RecipeError
from tunedock.export.push import push, require


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    (made / "deep").mkdir(parents=True)
    for name in ("export.json", "model.gguf", "deep/a.txt"):
        (made / name).write_text(name)
    return made


def test_to_a_store_with_the_record_last(folder: Path, tmp_path: Path) -> None:
    told = []
    url = f"file://{tmp_path}/store/v1"
    assert push(folder, url, lambda done, total: told.append((done, total))) == url
    there = tmp_path / "store/v1"
    assert sorted(path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()) == [
        "deep/a.txt",
        "export.json",
        "model.gguf",
    ]
    assert told[-1] == (3, 3)
    with pytest.raises(EngineError, match="another export is there already"):
        push(folder, url, lambda done, total: None)


def test_a_store_that_breaks_off_has_no_whole_export(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fsspec.filesystem("file")
    put = type(store).put_file

    def breaks(self: object, source: str, target: str, **options: object) -> None:
        if target.endswith("model.gguf"):
            raise PermissionError("denied")
        put(self, source, target, **options)

    monkeypatch.setattr(type(store), "put_file", breaks)
    with pytest.raises(EngineError, match="the store did not take it: PermissionError: denied") as caught:
        push(folder, f"file://{tmp_path}/store", lambda done, total: None)
    assert str(folder) in str(caught.value.hint)
    assert not (tmp_path / "store/export.json").exists()


@pytest.mark.parametrize(
    "url",
    [
        "out",
        "http://host/x",
        "hf://owner",
        "hf://../../x",
        "s3://a::memory://b",
        "ftp://x/y",
        "s3://me:secret@bucket/x",
    ],
)
def test_no_place_to_send_to(url: str) -> None:
    with pytest.raises(RecipeError) as caught:
        require(url)
    assert caught.value.where == "--push"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """A hub that answers what huggingface_hub asks when it makes a repository, and then no more."""
    asked: list[tuple[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            asked.append((self.path, body))
            status, answer = (200, {"url": "x"}) if self.path == "/api/repos/create" else (403, {"error": "not yours"})
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield asked
    server.shutdown()
    server.server_close()


def test_a_hub_that_refuses_says_so(folder: Path, hub: list[tuple[str, str]]) -> None:
    with pytest.raises(EngineError, match="the hub did not take it") as caught:
        push(folder, "hf://owner/name", lambda done, total: None)
    assert "hf auth login" in str(caught.value.hint)
    path, body = hub[0]
    assert path == "/api/repos/create"
    made = json.loads(body)
    assert made.get("visibility") == "private" or made.get("private") is True  # as its versions have it
