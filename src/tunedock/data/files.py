"""One data file: what its name says it is, and its bytes, wherever it lies and however it is compressed.

A path is a local path, or a URL of one of `PROTOCOLS` that fsspec opens. Compression goes by the last suffix.
A file that cannot be read to its end is a `DataError` that names it: a cut-off archive is never a short data set.
"""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, NamedTuple, cast
from urllib.parse import urlsplit

import fsspec
import zstandard
from fsspec.compression import compr

from tunedock.errors import DataError, DependencyError, TunedockError

Kind = Literal["json", "jsonl", "csv", "tsv", "parquet", "arrow", "text"]

KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".lz4": "lz4", ".bz2": "bz2", ".xz": "xz"}
"""Suffix -> fsspec's name of the compression."""

LOCAL_PROTOCOLS = ("file", "memory")
PROTOCOLS = (*LOCAL_PROTOCOLS, "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
"""Protocols a source may name. fsspec knows more, among them some that unpack or chain others; those are refused."""

_INPUT_BYTES = 4096
"""Compressed bytes decoded at once. A hostile zstd block grows 30,000-fold, so this bounds memory at about 100 MB."""


class FileType(NamedTuple):
    kind: Kind
    compression: str | None


def file_type(path: str) -> FileType | None:
    """What the name says; None when it does not end in one of `KINDS`, or in one with a compression behind it."""
    name = urlsplit(path).path if is_web(path) else path
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return FileType(kind, compression) if kind else None


def known_extensions() -> str:
    """For messages: the extensions, and those that may follow."""
    return f"{', '.join(KINDS)}; each also with {', '.join(COMPRESSIONS)}"


def is_url(path: str) -> bool:
    return "://" in path


def is_web(path: str) -> bool:
    """http and https: no listing of folders, no globs (`?` starts the query)."""
    return path.startswith(("http://", "https://"))


def file_system(url: str, *, offline: bool = False) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises DataError for a protocol that is not in `PROTOCOLS` or needs the network when `offline`,
    DependencyError when the protocol's package is not installed.
    """
    protocol = url.partition("://")[0]
    if "::" in url or protocol not in PROTOCOLS:
        raise DataError(
            f"`{protocol}://` is no protocol data is read from", where=url, hint=f"use {', '.join(PROTOCOLS)}"
        )
    if offline and protocol not in LOCAL_PROTOCOLS:
        raise DataError(
            "`offline: true` and this source is on the network", where=url, hint="drop `offline`, or give a local copy"
        )
    try:
        with reading(url):
            return cast("tuple[fsspec.AbstractFileSystem, str]", fsspec.url_to_fs(url))
    except ImportError as error:
        raise DependencyError(
            f"reading `{protocol}://` needs another package: {error}",
            where=url,
            hint="pip install 'tunedock[object-stores]'",
        ) from None


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what can go wrong while a file is read into a DataError that names it."""
    try:
        yield
    except (TunedockError, ImportError):
        raise
    except FileNotFoundError as error:
        raise DataError("there is no such file", where=path) from error
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError) as error:
        raise DataError(
            f"the archive is cut off or damaged: {error}", where=path, hint="fetch or write the file again"
        ) from error
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror or error}", where=path) from error
    except RuntimeError as error:
        if not path.lower().endswith(".lz4"):
            raise
        # lz4 has no exception class of its own.
        raise DataError(
            f"the archive is cut off or damaged: {error}", where=path, hint="fetch or write the file again"
        ) from error
    except Exception as error:
        if not is_url(path):
            raise
        # Policy: what fails behind a URL is the store's answer (denied, no bucket, time-out), and each store's client
        # has exception classes of its own.
        raise DataError(f"the store did not give the file: {type(error).__name__}: {error}", where=path) from error


@contextmanager
def open_bytes(path: str, *, raw: bool = False) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed unless `raw`; buffered, read from the start to the end."""
    found = file_type(path)
    compression = None if raw or found is None else found.compression
    with reading(path):
        if is_url(path):
            fs, inner = file_system(path)
            file = cast(BinaryIO, fs.open(inner, "rb"))
        else:
            file = Path(path).open("rb")  # noqa: SIM115 - closed by the `with` below
        with file:
            if compression is None:
                yield file
            elif compression == "zstd":
                yield cast(BinaryIO, io.BufferedReader(ZstdStream(file), buffer_size=1 << 17))
            else:
                yield cast(BinaryIO, compr[compression](file, mode="rb"))


@contextmanager
def open_seekable(path: str) -> Iterator[BinaryIO]:
    """The file's bytes with random access: an archive is unpacked into an unnamed temporary file first."""
    with open_bytes(path) as file:
        found = file_type(path)
        if found is None or found.compression is None:
            yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            with reading(path):
                shutil.copyfileobj(file, unpacked, 1 << 20)
            unpacked.seek(0)
            yield cast(BinaryIO, unpacked)


class ZstdStream(io.RawIOBase):
    """All frames of a zstd file; EOFError when the last one is not whole.

    fsspec's reader (zstandard's `stream_reader`) ends quietly where the file is cut, which would lose
    rows without a word.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready and self._more():
            pass
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _more(self) -> bool:
        """Decodes the next piece into `_ready`, which may stay empty; False at the end of the file."""
        if self._frame.eof:
            data = self._frame.unused_data
            self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._inside = False
        else:
            data = b""
        data = data or self._file.read(_INPUT_BYTES)
        if not data:
            if self._inside:
                raise EOFError("it ends inside a zstd frame")
            return False
        self._inside = True
        self._ready = memoryview(self._frame.decompress(data))
        return True
