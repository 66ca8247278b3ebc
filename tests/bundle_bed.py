"""Bundles for the tests: tiny ones, made of files with given bytes."""

from __future__ import annotations

from pathlib import Path

from tunedock.bundle.content import Content
from tunedock.bundle.create import Created, Wanted, create


def quiet(task: str, done: int, total: int | None) -> None: ...


def content_of(folder: Path, files: dict[str, bytes]) -> Content:
    """The files written to a folder, as a bundle's content."""
    content = Content()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        content.add(name, path)
    return content


def bundle_of(folder: Path, files: dict[str, bytes], **wanted: object) -> Created:
    """A bundle in `folder/bundle` of files written to `folder/source`."""
    return create(Wanted("tiny", content_of(folder / "source", files), **wanted), folder / "bundle", quiet)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
