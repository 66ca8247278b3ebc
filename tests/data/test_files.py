"""Opening files: compressed, cut off, behind a URL."""

from __future__ import annotations

import bz2
import gzip
import http.server
import importlib.util
import lzma
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import lz4.frame
import pytest
import zstandard

from tunedock.data.files import file_system, file_type, open_bytes, open_seekable
from tunedock.errors import DataError, DependencyError

CONTENT = os.urandom(50_000) + b"row\n" * 60_000  # incompressible, then repetitive: more than one block of any format

PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".lz4": lz4.frame.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(path: Path | str) -> bytes:
    with open_bytes(str(path)) as file:
        return file.read()


@pytest.mark.parametrize("suffix", PACKED)
def test_each_compression_is_read_whole_also_when_written_in_two_pieces(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(PACKED[suffix](CONTENT) + PACKED[suffix](b"second"))
    assert read(path) == CONTENT + b"second"


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("kept", [0.3, 0.9, -1])
def test_a_cut_archive_is_an_error_that_names_it(tmp_path: Path, suffix: str, kept: float) -> None:
    whole = PACKED[suffix](CONTENT)
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(whole[:-1] if kept < 0 else whole[: int(len(whole) * kept)])
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.where == str(path)
    assert "cut off or damaged" in caught.value.message


@pytest.mark.parametrize("suffix", PACKED)
def test_an_archive_that_is_none_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(b'{"text": "not packed at all"}\n' * 10)
    with pytest.raises(DataError):
        read(path)


def test_seekable_unpacks(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet.zst"
    path.write_bytes(PACKED[".zst"](CONTENT))
    with open_seekable(str(path)) as file:
        file.seek(-4, os.SEEK_END)
        assert file.read() == b"row\n"


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("a.jsonl", "jsonl", None),
        ("A.NDJSON.GZ", "jsonl", "gzip"),
        ("v1.2/b.tsv.xz", "tsv", "xz"),
        ("https://host/c.parquet?sig=a.b", "parquet", None),
    ],
)
def test_type_by_name(name: str, kind: str, compression: str | None) -> None:
    assert file_type(name) == (kind, compression)


@pytest.mark.parametrize("name", ["a", "a.gz", "a.pkl", "a.jsonl.zip", "jsonl", ".gitignore"])
def test_unknown_types(name: str) -> None:
    assert file_type(name) is None


@pytest.mark.parametrize(
    "url", ["zip://a.jsonl::file:///x.zip", "simplecache::s3://b/a.jsonl", "github://o:r@/a.jsonl"]
)
def test_protocols_that_chain_or_are_not_listed_are_refused(url: str) -> None:
    with pytest.raises(DataError, match="is no protocol"):
        file_system(url)


def test_offline_touches_no_network() -> None:
    with pytest.raises(DataError, match="offline"):
        file_system("s3://bucket/a.jsonl", offline=True)
    file_system("memory://a.jsonl", offline=True)


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(DependencyError, match="object-stores"):
        file_system("s3://bucket/a.jsonl")


def test_memory_store() -> None:
    fsspec.filesystem("memory").pipe("/files/a.jsonl.gz", gzip.compress(b"abc"))
    assert read("memory://files/a.jsonl.gz") == b"abc"
    with pytest.raises(DataError, match="no such file"):
        read("memory://files/missing.jsonl")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on this machine, and the folder it serves."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="http needs tunedock[object-stores]")
def test_over_http(web: tuple[str, Path]) -> None:
    url, folder = web
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(CONTENT))
    assert read(f"{url}/a.jsonl.gz?v=1") == CONTENT
    with pytest.raises(DataError) as caught:
        read(f"{url}/missing.jsonl")
    assert caught.value.where == f"{url}/missing.jsonl"
