"""Exports on their way to a store or a hub."""

from __future__ import annotations

import base64
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


class Hub:
    """A hub as far as huggingface_hub asks one that takes a model: repositories, what is to be sent how, commits."""

    def __init__(self, *, takes: bool) -> None:
        self.asked: list[tuple[str, str]] = []
        self.files: dict[str, bytes] = {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                outer.asked.append((self.path, body))
                self._say(*outer.answer(self.path, body, takes))

            def do_GET(self) -> None:
                outer.asked.append((self.path, ""))
                self._say(200, {"sha": "0" * 40, "siblings": [], "id": "owner/name"})

            def _say(self, status: int, answer: object) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: str, takes: bool) -> tuple[int, object]:
        if path == "/api/repos/create":
            return 200, {"url": f"{self.url}/owner/name", "name": "owner/name"}
        if not takes:
            return 403, {"error": "not yours"}
        if "/preupload/" in path:
            named = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {
                "commitUrl": f"{self.url}/owner/name/commit/{'1' * 40}",
                "commitOid": "1" * 40,
                "success": True,
            }
        return 200, {}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Hub]:
    made = Hub(takes=request.param)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield made
    made.close()


@pytest.mark.parametrize("hub", [True], indirect=True)
def test_to_a_hub(folder: Path, hub: Hub) -> None:
    there = push(folder, "hf://owner/name", lambda done, total: None)
    assert there.endswith("/owner/name/commit/" + "1" * 40)
    assert hub.files == {name: name.encode() for name in ("export.json", "model.gguf", "deep/a.txt")}
    made = json.loads(next(body for path, body in hub.asked if path == "/api/repos/create"))
    assert made.get("visibility") == "private" or made.get("private") is True  # as its versions have it


@pytest.mark.parametrize("hub", [False], indirect=True)
def test_a_hub_that_refuses_says_so(folder: Path, hub: Hub) -> None:
    with pytest.raises(EngineError, match="the hub did not take it") as caught:
        push(folder, "hf://owner/name", lambda done, total: None)
    assert "hf auth login" in str(caught.value.hint)
    assert not hub.files
