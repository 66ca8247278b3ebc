"""The data sets a LLaMA-Factory file names, and what describes them: dataset_info.json for its v0, a YAML for its v1."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunedock.errors import RecipeError
from tunedock.recipe.document import read
from tunedock.recipe.importers_words import Draft, Line, Outcome, nearest
from tunedock.recipe.problems import Problem

INFO = "dataset_info.json"
MOST_BYTES = 64 << 20
"""A local file up to this size is read for its columns and rows; reading takes a second."""
_INFO_BYTES = 16 << 20
_PARENTS = 3
"""Folders above the YAML in which `dataset_dir` is looked for, after the working directory: examples stand below the data."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What a local JSON file holds."""

    rows: int
    columns: frozenset[str]


@dataclass
class Entry:
    """A data set by its name, and the source it becomes."""

    draft: Draft
    name: str
    info: Mapping[str, Any]
    base: Path
    """Folder its file name starts from."""
    label: str
    """The file it stands in."""
    to: str
    """`data.train.0`."""
    word: str
    """The key that names it: `dataset`."""
    file: Path
    """The file `label` is short for."""
    source: dict[str, Any] = field(default_factory=dict)
    scan: Scan | None = None
    hub: str | None = None

    def say(
        self, key: str, outcome: Outcome, to: str | None = None, value: Any = None, note: str | None = None
    ) -> None:
        """A line of the report. `key` within the entry, `to` within the source."""
        target = f"{self.to}.{to}" if to else None
        self.draft.lines.append(Line(f"{self.label}: {self.name}.{key}", self.given(key), outcome, target, value, note))

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
        self.draft.problems.append(
            Problem(message, str(self.file), hint, not_built=not built, key=(self.label, self.name, key))
        )
        self.say(key, "refused", note=why)

    def text(self, key: str) -> str | None:
        value = self.info.get(key)
        if value is None or isinstance(value, str):
            return value
        self.refuse(key, "it should be text", None)
        return None


@dataclass
class DataSets:
    train: list[Entry] = field(default_factory=list)
    validation: list[Entry] = field(default_factory=list)

    @property
    def pairs(self) -> bool:
        """Whether v1's converter says that the rows are preferences."""
        return any(entry.info.get("converter") == "pair" for entry in self.train)


def read_data_sets(draft: Draft, dataset_info: Path | None) -> DataSets:
    """The entries the file names. What is not there is a problem."""
    found = DataSets()
    for word, side, entries in (
        ("dataset" if draft.version == "v0" else "train_dataset", "train", found.train),
        ("eval_dataset", "validation" if draft.training else "test", found.validation),
    ):
        if draft.has(word):
            reader = _entries_of_v0 if draft.version == "v0" else _entries_of_v1
            entries += reader(draft, word, f"data.{side}", dataset_info)
    return found


def _entries_of_v0(draft: Draft, word: str, to: str, dataset_info: Path | None) -> list[Entry]:
    names = draft.get(word, "names")
    if names is None:
        return []
    if not names:
        draft.problem(word, "it names no data set", f"name them: `{word}: a, b`")
        return []
    folder = draft.get("dataset_dir", "text") or "data"
    if dataset_info is None and folder.startswith("REMOTE:"):
        draft.refuse(
            "dataset_dir",
            "importing touches no network",
            "download its dataset_info.json and name it by --dataset-info",
        )
        return []
    if dataset_info is None and folder == "ONLINE":
        made = [({"hf_hub_url": name}, draft.cwd, name) for name in names]
        return [
            Entry(draft, name, info, base, "ONLINE", f"{to}.{index}", word, draft.file)
            for index, (info, base, name) in enumerate(made)
        ]
    path = _info_file(draft, folder, dataset_info)
    infos = _read_info(draft, path, word)
    if infos is None:
        return []
    entries = []
    for index, name in enumerate(names):
        info = infos.get(name)
        if name not in infos:
            hint = nearest(name, list(infos)) or f"it has {', '.join(list(infos)[:8])}"
            draft.problem(word, f"`{name}` is not in {path}", hint)
        elif not isinstance(info, Mapping):
            draft.problem(word, f"`{name}` in {path} should be a mapping", None)
        else:
            entries.append(Entry(draft, name, info, path.parent, path.name, f"{to}.{index}", word, path))
    return entries if len(entries) == len(names) else []


def _info_file(draft: Draft, folder: str, given: Path | None) -> Path:
    if given is not None:
        there = draft.cwd / given
        return there / INFO if there.is_dir() else there
    near = (draft.cwd / draft.file).parent
    places = [draft.cwd, near, *list(near.parents)[:_PARENTS]]
    found = (place / folder / INFO for place in places)
    return next((path for path in found if path.is_file()), draft.cwd / folder / INFO)


def _read_info(draft: Draft, path: Path, word: str) -> dict[str, Any] | None:
    """The file's entries; None after a problem."""
    hint = "name it by `--dataset-info PATH`"
    try:
        with path.open("rb") as file:
            content = file.read(_INFO_BYTES + 1)
        if len(content) > _INFO_BYTES:
            draft.problems.append(Problem("the file is larger than 16 MiB", str(path), "is this the data?"))
            return None
        value = json.loads(content)
    except OSError as error:
        draft.problem(
            word, f"there is no {path}" if not path.exists() else f"cannot read {path}: {error.strerror}", hint
        )
        return None
    except (ValueError, RecursionError) as error:
        draft.problems.append(Problem(f"this is no JSON: {error}", str(path), None))
        return None
    if not isinstance(value, dict):
        draft.problems.append(Problem("data sets are a mapping of names, and this is none", str(path), hint))
        return None
    return value


def _entries_of_v1(draft: Draft, word: str, to: str, dataset_info: Path | None) -> list[Entry]:
    given = draft.get(word, "text")
    if given is None:
        return []
    if not given.endswith((".yaml", ".yml")):
        draft.refuse(
            word,
            "data named by themselves have v1's own rows, whose texts are `{type, value}`, and these are not read",
            "name a YAML of data sets with a `converter`",
            built=False,
        )
        return []
    near = (draft.cwd / draft.file).parent
    places = (
        [dataset_info]
        if dataset_info
        else [place / given for place in (draft.cwd, near, *list(near.parents)[:_PARENTS])]
    )
    path = next((draft.cwd / place for place in places if (draft.cwd / place).is_file()), None)
    if path is None:
        draft.problem(word, f"there is no {draft.cwd / places[0]}", "name it by `--dataset-info PATH`")
        return []
    try:
        infos = read(path).value
    except RecipeError as error:
        draft.problems.append(Problem(error.message, error.where, error.hint))
        return []
    base = path.parent if dataset_info else draft.cwd
    entries = [
        Entry(draft, name, info, base, path.name, f"{to}.{index}", word, path)
        for index, (name, info) in enumerate(infos.items())
        if isinstance(info, Mapping)
    ]
    if len(entries) < len(infos):
        draft.problem(word, f"a data set in {path} should be a mapping", None)
    return entries


def scan(entry: Entry) -> Scan | None:
    """The rows and columns of a local JSON file; None of anything else, or what cannot be read: that is told where data are."""
    path = entry.source.get("path", "")
    there = Path(os.path.normpath(entry.draft.folder / path))
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
        yield from (json.loads(line) for line in text.splitlines() if line.strip())
