"""Sources of the recipe -> rows: files, folders, globs, URLs, and data sets on a hub or in an image.

A row's id is `file:line`, or `file:#element` where a file has no lines (`records` tells which). `file` is the base name
when the source is one file, else the path within the folder, the glob's fixed part, or the hub's repository.

A folder stands for all files in it with a known extension, sorted by path. Left out are hidden ones, what describes
data rather than holding it (`DESCRIPTIONS`), and text files beside data files, because a README is no document; links
to folders are not followed. A folder that `datasets` saved to disk is read as its `state.json` says.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from tunedock.data import hub_data, image_data
from tunedock.data.files import FileType, file_system, file_type, is_url, is_web, known_extensions, open_bytes, reading
from tunedock.data.records import read_records
from tunedock.errors import DataError
from tunedock.recipe.data_images import image_of
from tunedock.recipe.schema import Source

DESCRIPTIONS = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))
"""Files of a folder that describe its data."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a source."""

    number: int = 0
    """From 0, in the source's order."""
    first_row: int = 0
    """How many rows the files before it have."""


FIRST = Shard()


@dataclass(frozen=True, slots=True)
class RawRow:
    row_id: str
    value: Any
    """The row as it stands in the file; None when it could not be read."""
    problem: tuple[str, str] | None = None
    """(reason, detail) when the row cannot be used; the reasons are those of `records`."""
    shard: Shard = FIRST


@dataclass(frozen=True, slots=True)
class _Listing:
    root: str
    """Folder the names in row ids start from."""
    files: list[str]


def list_files(source: Source, *, hub: str = "hf", offline: bool = False) -> list[str]:
    """The files of a source, sorted. A hub id is downloaded first, or taken from the hub's cache when `offline`.

    Raises DataError when there are none, one is empty or of an unknown kind; DependencyError for a missing package.
    """
    return _listing(source, hub, offline).files


def list_all(source: Source, *, hub: str = "hf", offline: bool = False) -> list[tuple[str, str]]:
    """(name, path) of the files of a source, sorted by name; of a hub's data set those of every split. Raises as `list_files`."""
    if not _is_hub_id(source.path):
        listing = _listing(source, hub, offline)
        below = [file.removeprefix(listing.root).lstrip("/") for file in listing.files]
        named = zip(_names(listing.root, listing.files), below, listing.files, strict=True)
        return sorted((inside or name, file) for name, inside, file in named)
    folder = hub_data.download(source, hub=hub, offline=offline)
    return sorted((file.relative_to(folder).as_posix(), str(file)) for file in _data_files(folder))


def read_rows(
    source: Source, *, hub: str = "hf", offline: bool = False, shard: Shard | None = None
) -> Iterator[RawRow]:
    """Every row of a source, at most `source.num_samples`, in the order of files and rows; read as they are asked for. With `shard`
    those from there on, and no file before it is opened.

    A row that cannot be read comes with its problem. Raises DataError for a file that is broken as a whole.
    """
    shard = shard or FIRST
    left = None if source.num_samples is None else max(0, source.num_samples - shard.first_row)
    return islice(_rows(_listing(source, hub, offline), shard), left)


def fingerprint(source: Source, files: Sequence[str]) -> str:
    """A hash (hex) over the names, sizes and bytes of a source's files: it changes when any of them does."""
    digest = hashlib.blake2b(digest_size=16)
    for file, name in zip(files, _names(_root(source, files), files), strict=True):
        content = hashlib.blake2b(digest_size=32)
        size = 0
        with open_bytes(file, raw=True) as data:
            while piece := data.read(1 << 20):
                content.update(piece)
                size += len(piece)
        digest.update(json.dumps([name, size, content.hexdigest()]).encode())
    return digest.hexdigest()


def outline(source: Source, files: Sequence[str]) -> str:
    """A hash (hex) over the names and, for local files, the sizes: what can be known of a stream without reading it."""
    facts = [
        [name, Path(file).stat().st_size if Path(file).is_file() else None]
        for file, name in zip(files, _names(_root(source, files), files), strict=True)
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def _rows(listing: _Listing, shard: Shard) -> Iterator[RawRow]:
    named = list(zip(listing.files, _names(listing.root, listing.files), strict=True))
    row = shard.first_row
    for number, (file, name) in enumerate(named[shard.number :], start=shard.number):
        shard = Shard(number, row)
        for record in read_records(file, _type_of(file).kind):
            yield RawRow(f"{name}:{record.place}", record.value, record.problem, shard)
            row += 1


def _listing(source: Source, hub: str, offline: bool) -> _Listing:
    path = source.path
    if image_of(source) is not None:
        files = _within(image_data.here(source), source, image_data.pick)
    elif is_url(path) and not path.startswith("file://"):
        files = _of_url(path, offline)
    elif _is_hub_id(path):
        files = _within(hub_data.download(source, hub=hub, offline=offline), source, hub_data.pick)
    else:
        files = _of_local(source)
    if not files:
        raise DataError("nothing here is data", where=path, hint=f"known extensions: {known_extensions()}")
    for file in files:
        _refuse_empty(file, alone=len(files) == 1)
    return _Listing(_root(source, files), files)


def _within(folder: Path, source: Source, pick: Callable[[Sequence[str], Source], list[str]]) -> list[str]:
    """The files of a folder that a source means, as `pick` chooses among their paths within it."""
    files = {file.relative_to(folder).as_posix(): str(file) for file in _data_files(folder)}
    return [files[name] for name in pick(list(files), source)]


def _is_hub_id(path: str) -> bool:
    return hub_data.HUB_ID.fullmatch(path) is not None and file_type(path) is None and not Path(path).exists()


def _local(path: str) -> Path:
    return Path(path.removeprefix("file://")).expanduser()


def _of_local(source: Source) -> list[str]:
    path = _local(source.path)
    if path.is_dir():
        return [str(file) for file in _saved_to_disk(path, source.split) or _data_files(path)]
    if path.is_file():
        _type_of(str(path))
        return [str(path)]
    if glob.has_magic(str(path)):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207 - absolute
        files = [file for file in found if file.is_file()]
        if not files:
            raise DataError("no file fits this pattern", where=source.path, hint="`**` stands for any folders")
        return _known([str(file) for file in files], source.path)
    raise DataError("there is no such file or folder", where=str(path), hint=_missing_hint(path))


def _missing_hint(path: Path) -> str:
    """The longest end of the path that exists in the working directory is what was meant."""
    parts = path.parts[1:] if path.is_absolute() else path.parts
    for start in range(len(parts)):
        meant = Path(*parts[start:])
        if ".." not in meant.parts and meant.exists():
            return (
                f"`{meant}` exists in the working directory, but paths in a recipe start from the recipe's folder; "
                "move the file, or give its whole path"
            )
    return "check the path; a data set on a hub is named owner/name"


def _data_files(folder: Path) -> list[Path]:
    """Files of a folder that hold rows, sorted by path."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".") and name not in DESCRIPTIONS]
    if not found:
        raise DataError(
            "the folder is empty", where=str(folder), hint="put data files into it, or take it out of the source"
        )
    return [Path(file) for file in _known([str(file) for file in found], str(folder))]


def _known(files: Iterable[str], where: str) -> list[str]:
    """Files of known types, sorted; text files only when there are no others. Raises DataError when there are none."""
    files = sorted(files)
    types = {
        file: found for file in files if (found := file_type(file)) and PurePosixPath(file).name not in DESCRIPTIONS
    }
    if not types:
        seen = sorted({PurePosixPath(file).suffix or PurePosixPath(file).name for file in files})
        raise DataError(
            f"no file here has a known extension (found {', '.join(seen[:10])})",
            where=where,
            hint=f"known extensions: {known_extensions()}",
        )
    data = [file for file, found in types.items() if found.kind != "text"]
    return data or list(types)


def _saved_to_disk(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a folder made by `datasets`' `save_to_disk`; none when the folder is no such thing."""
    if (folder / "dataset_dict.json").is_file():
        names = sorted(file.parent.name for file in folder.glob("*/state.json"))
        if split not in names:
            raise DataError(
                f"the data set has no split `{split}`",
                where=str(folder),
                hint=f"name one by `split:` — {', '.join(names)}",
            )
        folder = folder / split
    state = folder / "state.json"
    if not state.is_file():
        return []
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
        files = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(
            "this is no state of a saved data set", where=str(state), hint="save the data set again"
        ) from None
    for file in files:
        if file.resolve().parent != folder.resolve():
            raise DataError(f"it names a file outside its folder: {file}", where=str(state))
        if not file.is_file():
            raise DataError("the saved data set lacks this file", where=str(file), hint="save the data set again")
    return files


def _of_url(url: str, offline: bool) -> list[str]:
    fs, inner = file_system(url, offline=offline)
    if is_web(url):
        _type_of(url)
        return [url]
    with reading(url):
        if glob.has_magic(inner):
            found = fs.glob(inner)
        elif fs.isdir(inner):
            found = fs.find(inner)
        elif fs.isfile(inner):
            _type_of(url)
            return [url]
        else:
            raise DataError("there is no such file or folder", where=url)
        start = len(_fixed_part(inner))
        visible = [name for name in found if not any(part.startswith(".") for part in name[start:].split("/"))]
        files = [fs.unstrip_protocol(name) for name in visible if fs.isfile(name)]
    if not files:
        raise DataError("no file is here", where=url)
    return _known(files, url)


def _type_of(file: str) -> FileType:
    found = file_type(file)
    if found is None:
        suffix = PurePosixPath(file).suffix
        raise DataError(
            f"`{suffix}` is no known extension" if suffix else "the file has no extension",
            where=file,
            hint=f"known extensions: {known_extensions()}",
        )
    return found


def _refuse_empty(file: str, *, alone: bool) -> None:
    """An empty file is a mistake; but an empty document among others is a row, dropped and counted as such."""
    if not alone and _type_of(file).kind == "text":
        return
    with open_bytes(file, raw=True) as data:
        if not data.read(1):
            raise DataError("the file is empty", where=file, hint="fill it, or take it out of the source")


def _root(source: Source, files: Sequence[str]) -> str:
    """Folder that names in row ids and fingerprints start from."""
    path = source.path
    if image_of(source) is not None:
        return str(image_data.here(source))
    if is_web(path) or _is_hub_id(path):
        return _common_folder(files)
    if is_url(path) and not path.startswith("file://"):
        fs, inner = file_system(path)
        return str(fs.unstrip_protocol(_fixed_part(inner)))
    local = _local(path)
    return str(local) if local.exists() else _fixed_part(str(local))


def _fixed_part(pattern: str) -> str:
    """The folders of a glob before its first wildcard; the whole path when there is none."""
    parts = pattern.split("/")
    fixed = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return "/".join(parts[:fixed]) or "/"


def _common_folder(files: Sequence[str]) -> str:
    return os.path.commonpath([str(PurePosixPath(file).parent) for file in files])


def _names(root: str, files: Sequence[str]) -> list[str]:
    if len(files) == 1:
        path = files[0].partition("?")[0] if is_web(files[0]) else files[0]
        return [PurePosixPath(path).name]
    return [file.removeprefix(root).lstrip("/") for file in files]
