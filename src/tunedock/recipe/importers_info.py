"""The data sets a LLaMA-Factory file names, and what describes them: dataset_info.json for its v0, a YAML for its v1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunedock.errors import RecipeError
from tunedock.recipe.dataset_info import INFO, Entry, read_info
from tunedock.recipe.document import read
from tunedock.recipe.importers_words import Draft, nearest
from tunedock.recipe.problems import Problem

_PARENTS = 3
"""Folders above the YAML in which `dataset_dir` is looked for, after the working directory: examples stand below the data."""


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
            _entry(draft, name, info, base, draft.file, f"{to}.{index}", word, label="ONLINE")
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
            entries.append(_entry(draft, name, info, path.parent, path, f"{to}.{index}", word))
    return entries if len(entries) == len(names) else []


def _info_file(draft: Draft, folder: str, given: Path | None) -> Path:
    if given is not None:
        there = draft.cwd / given
        return there / INFO if there.is_dir() else there
    near = (draft.cwd / draft.file).parent
    places = [draft.cwd, near, *list(near.parents)[:_PARENTS]]
    found = (place / folder / INFO for place in places)
    return next((path for path in found if _is_file(path)), draft.cwd / folder / INFO)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that must not be looked into
        return False


def _read_info(draft: Draft, path: Path, word: str) -> dict[str, Any] | None:
    """The file's entries; None after a problem."""
    hint = "name it by `--dataset-info PATH`"
    if not _is_file(path):
        draft.problem(word, f"there is no file {path}", hint)
        return None
    try:
        return read_info(path)
    except RecipeError as error:
        draft.problems.append(Problem(error.message, error.where, error.hint or hint))
        return None


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
    path = next((draft.cwd / place for place in places if _is_file(draft.cwd / place)), None)
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
        _entry(draft, name, info, base, path, f"{to}.{index}", word)
        for index, (name, info) in enumerate(infos.items())
        if isinstance(info, Mapping)
    ]
    if len(entries) < len(infos):
        draft.problem(word, f"a data set in {path} should be a mapping", None)
    return entries


def _entry(
    draft: Draft,
    name: str,
    info: Mapping[str, Any],
    base: Path,
    file: Path,
    to: str,
    word: str,
    *,
    label: str | None = None,
) -> Entry:
    return Entry(
        name=name,
        info=info,
        base=base,
        label=label or file.name,
        to=to,
        file=file,
        lines=draft.lines,
        problems=draft.problems,
        word=word,
        version=draft.version,
        folder=draft.folder,
    )
