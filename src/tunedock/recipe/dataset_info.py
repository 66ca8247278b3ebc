"""An entry of LLaMA-Factory's dataset_info.json (of its v1: of a YAML of data sets) -> a source, and a line for each of its keys.

An entry names its data by the first it has of `hf_hub_url`, `ms_hub_url`, `om_hub_url`, `script_url`, `cloud_file_name` and
`file_name`. Local JSON is looked at: a column that is in no row need not be shut out (`dataset_columns`). The importer of whole
files and sources that name an entry (`described`) both come here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunedock.errors import RecipeError
from tunedock.recipe.dataset_columns import Columns, of_converter, of_entry
from tunedock.recipe.importers_words import Line, Outcome, nearest, tables
from tunedock.recipe.problems import Problem

INFO = "dataset_info.json"
MOST_BYTES = 64 << 20
"""A local file up to this size is read for its columns and rows; reading takes a second."""
_INFO_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Scan:
    """What a local JSON file holds."""

    rows: int
    columns: frozenset[str]


@dataclass
class Entry:
    """A data set by its name, and the source it becomes."""

    name: str
    info: Mapping[str, Any]
    base: Path
    """Folder its file name starts from."""
    label: str
    """The file it stands in."""
    to: str
    """`data.train.0`."""
    file: Path
    """The file `label` is short for."""
    lines: list[Line]
    """The report it writes to."""
    problems: list[Problem]
    """What is wrong with it goes here."""
    word: str = ""
    """The key that names it: `dataset`."""
    version: str = "v0"
    """The generation of LLaMA-Factory whose words it speaks."""
    folder: Path | None = None
    """Absolute folder that paths of the source shall start from; None: they shall be absolute."""
    source: dict[str, Any] = field(default_factory=dict)
    scan: Scan | None = None
    hub: str | None = None

    def say(
        self, key: str, outcome: Outcome, to: str | None = None, value: Any = None, note: str | None = None
    ) -> None:
        """A line of the report. `key` within the entry, `to` within the source."""
        target = f"{self.to}.{to}" if to else None
        self.lines.append(Line(f"{self.label}: {self.name}.{key}", self.given(key), outcome, target, value, note))

    def given(self, key: str) -> Any:
        """What the entry says of `columns.prompt`; None where it says nothing."""
        value: Any = self.info
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def put(self, key: str, to: str, value: Any, note: str | None = None) -> None:
        self.source[to] = value
        self.say(key, "becomes", to, value, note)

    def refuse(self, key: str, why: str, hint: str | None, *, built: bool = True) -> None:
        message = f"`{self.name}.{key}`: {why}"
        self.problems.append(
            Problem(message, str(self.file), hint, not_built=not built, key=(self.label, self.name, key))
        )
        self.say(key, "refused", note=why)

    def text(self, key: str) -> str | None:
        value = self.info.get(key)
        if value is None or isinstance(value, str):
            return value
        self.refuse(key, "it should be text", None)
        return None


def read_info(path: Path) -> dict[str, Any]:
    """The entries of a dataset_info.json, by name. Raises RecipeError."""
    where = str(path)
    try:
        with path.open("rb") as file:
            content = file.read(_INFO_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot read the file: {error.strerror}", where=where) from None
    if len(content) > _INFO_BYTES:
        raise RecipeError("the file is larger than 16 MiB", where=where, hint="is this the data?")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"this is no JSON: {error}", where=where) from None
    if not isinstance(value, dict):
        raise RecipeError("data sets are a mapping of names, and this is none", where=where)
    return value


def source_of(entry: Entry, kind: str) -> dict[str, Any] | None:
    """The source an entry becomes for an objective of this kind; None after a problem."""
    before = len(entry.problems)
    if entry.version == "v0":
        _known_keys(entry, tables()["dataset_info"]["keys"])
        _place(entry)
        entry.scan = scan(entry)
        columns = of_entry(entry.info, kind, entry.scan.columns if entry.scan else None)
        _samples(entry)
    else:
        _known_keys(entry, tables()["dataset_info"]["v1_keys"])
        _place_of_v1(entry)
        entry.scan = scan(entry)
        columns = of_converter(entry.info, entry.scan.columns if entry.scan else None)
        _weights_of_v1(entry)
    _put_columns(entry, columns)
    order = ("path", "format", "columns", "subset", "split", "revision", "num_samples")
    source = {key: entry.source[key] for key in order if key in entry.source}
    return source if len(entry.problems) == before else None


def _known_keys(entry: Entry, known: list[str]) -> None:
    for key in entry.info:
        if key not in known:
            hint = nearest(str(key), known)
            if hint:
                entry.refuse(str(key), "there is no such key", hint)
            else:
                entry.say(str(key), "left out", note="LLaMA-Factory reads no such key")


def _place(entry: Entry) -> None:
    """Where the rows are: the first of the keys, in LLaMA-Factory's order."""
    keys = [key for key in tables()["dataset_info"]["sources"] if entry.info.get(key) is not None]
    if not keys:
        entry.refuse("file_name", "it names no data", "give `file_name` or `hf_hub_url`")
        return
    for other in keys[1:]:
        entry.say(other, "left out", note=f"`{keys[0]}` goes before it")
    key = keys[0]
    value = entry.text(key)
    if value is None:
        return
    if key in ("om_hub_url", "script_url"):
        why = "this hub is not known" if key == "om_hub_url" else "a script is code that would run"
        entry.refuse(key, why, "download the data and name the file by `file_name`", built=False)
    elif key == "file_name":
        _local(entry, key, value)
    else:
        entry.put(key, "path", value)
        if key != "cloud_file_name":
            entry.hub = "hf" if key == "hf_hub_url" else "modelscope"
    _parts(entry, on_hub=key.endswith("_hub_url"))


def _local(entry: Entry, key: str, value: str) -> None:
    if "://" in value:
        entry.put(key, "path", value)
        return
    there = Path(os.path.normpath(entry.base / value))
    try:
        is_there = there.exists()
    except OSError as error:  # a name that is too long, a folder that must not be looked into
        entry.refuse(key, f"this cannot be looked up: {error.strerror}", "name a file")
        return
    stays = entry.folder is None or Path(value).is_absolute()
    path = str(there) if stays else os.path.relpath(there, entry.folder)
    lines = "the file is one document; LLaMA-Factory takes each line for one" if there.suffix == ".txt" else None
    entry.put(key, "path", path, lines if is_there else "it is not there now")


def _parts(entry: Entry, *, on_hub: bool) -> None:
    """Subset, split, folder and revision."""
    for key in ("subset", "revision", "split", "folder"):
        value = entry.text(key)
        if value is None:
            continue
        if not on_hub:
            entry.say(key, "left out", note="a file has none")
        elif key == "folder" and ("/" in value or entry.info.get("subset") is not None):
            entry.refuse(
                key, "`subset` names one folder of a data set", "download the data and name the folder", built=False
            )
        elif key == "split" and not value.replace("_", "").replace("-", "").isalnum():
            entry.refuse(key, "a split is taken whole", "name a split, and `num_samples`", built=False)
        elif key == "folder":
            entry.put(key, "subset", value, "a folder's name tells a subset")
        else:
            entry.put(key, key, value)


def _samples(entry: Entry) -> None:
    value = entry.info.get("num_samples")
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        entry.refuse("num_samples", f"{value!r:.40} is no number of rows", "write a whole number above 0")
    else:
        entry.put(
            "num_samples",
            "num_samples",
            value,
            "the first rows; LLaMA-Factory draws them, and repeats rows where it has too few",
        )


def _place_of_v1(entry: Entry) -> None:
    key = "path" if entry.info.get("path") is not None else "file_name"
    value = entry.text(key)
    if value is None:
        entry.refuse(key, "it names no data", "give `path`")
        return
    source = entry.info.get("source", "local" if key == "file_name" else "hf_hub")
    if source == "local":
        folder = entry.text("dataset_dir") or ""
        _local(entry, key, str(Path(folder) / value))
        if folder:
            entry.say("dataset_dir", "becomes", "path", entry.source.get("path"), f"with `{key}`")
    elif source == "hf_hub":
        entry.put(key, "path", value)
        entry.hub = "hf"
    else:
        entry.refuse("source", "the data are local or on Hugging Face's hub", "write `local` or `hf_hub`", built=False)
    if "source" in entry.info:
        entry.say("source", "left out", note="the path tells it")
    _parts(entry, on_hub=source == "hf_hub")
    _samples(entry)


def _weights_of_v1(entry: Entry) -> None:
    for key, off in (("size", None), ("weight", 1), ("streaming", False)):
        value = entry.info.get(key, off)
        if value != off:
            entry.refuse(
                key, "rows are taken as they are, each once an epoch", "take it out, or use `num_samples`", built=False
            )
        elif key in entry.info:
            entry.say(key, "left out", note="off, as it is here")


def _put_columns(entry: Entry, found: Columns) -> None:
    for key, why, hint, built in found.refusals:
        entry.refuse(key, why, hint, built=built)
    if found.format is None:
        return
    entry.source["format"] = found.format
    given = found.format_key in entry.info
    note = found.format_note if given else "LLaMA-Factory's default"
    entry.say(found.format_key, "becomes" if given else "default", "format", found.format, note)
    if found.columns:
        entry.source["columns"] = found.columns
    for key, ours in found.became.items():
        if entry.given(key) is not None:
            theirs = found.columns.get(ours)
            to, note = (f"columns.{ours}", None) if theirs else ("format", "read by its usual name")
            entry.say(key, "becomes", to, theirs or found.format, note)
    for key, note in {
        **{key: why for key, why in found.left.items() if entry.given(key) is not None},
        **found.notes,
    }.items():
        entry.say(key, "left out", note=note)
    for ours in found.shut:
        note = "a column LLaMA-Factory does not read here"
        line = Line(
            f"{entry.label}: {entry.name}.columns",
            None,
            "default",
            f"{entry.to}.columns.{ours}",
            found.columns[ours],
            note,
        )
        entry.lines.append(line)


def scan(entry: Entry) -> Scan | None:
    """The rows and columns of a local JSON file; None of anything else, or what cannot be read: that is told where data are."""
    path = entry.source.get("path", "")
    there = Path(os.path.normpath((entry.folder or entry.base) / path))
    try:
        if "://" in path or there.suffix not in (".json", ".jsonl") or not 0 < there.stat().st_size <= MOST_BYTES:
            return None
        rows = list(_rows(there))
    except (OSError, ValueError, RecursionError):
        return None
    if not all(isinstance(row, dict) for row in rows):
        return None
    return Scan(len(rows), frozenset(key for row in rows for key in row))


def _rows(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        yield from json.loads(text)
    else:
        # Not `splitlines`: what else ends a line for it (U+2028) may stand bare in a text of JSON.
        yield from (json.loads(line) for line in text.split("\n") if line.strip())
