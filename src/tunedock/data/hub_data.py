"""A data set on a hub -> the files of one subset and split in a local folder.

Which files those are goes by their names, as hubs have it. A file's split is its name without the shard number
(`train-00000-of-00002.parquet`), a word in its name (`my_dev.jsonl`), or a folder's name (`test/part1.jsonl`); a subset is
a folder's name or a word in the file's. Where that leaves a choice, the choice is the user's: it is an error that lists them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tunedock.data.files import COMPRESSIONS, KINDS
from tunedock.data.hub import Repository, snapshot
from tunedock.errors import DataError
from tunedock.recipe.schema import Source

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

SPLIT_WORDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ALL_SPLIT_WORDS = frozenset(word for words in SPLIT_WORDS.values() for word in words)
_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")
_NUMBER = re.compile(r"[-_.]?\d+$")


def download(source: Source, *, hub: str, offline: bool) -> Path:
    """The folder with the data files of a hub data set. Raises what `data.hub.snapshot` raises."""
    patterns = [f"*{kind}{packed}" for kind in KINDS for packed in ("", *COMPRESSIONS)]
    return snapshot(Repository("dataset", source.path, source.revision), hub=hub, offline=offline, patterns=patterns)


def pick(files: Sequence[str], source: Source) -> list[str]:
    """The files (paths within the repository) of the source's subset and split. Raises DataError with the choices."""
    chosen = _of_subset(files, source)
    by_split: dict[str, list[str]] = {}
    for file in chosen:
        by_split.setdefault(split_name(file), []).append(file)
    if source.split in by_split:
        found = by_split[source.split]
    else:
        names = [name for name in by_split if name and _same_split(name, source.split)]
        if len(names) > 1:
            raise _choice("several splits fit", "split", source, names)
        if names:
            found = by_split[names[0]]
        elif len(chosen) == 1 or (source.split == "train" and set(by_split) == {""}):
            found = list(chosen)
        else:
            raise _choice("no file belongs to the split", "split", source, [name for name in by_split if name])
    folders = {_subset_folder(file) for file in found}
    if source.subset is None and len(folders) > 1:
        raise _choice("the data set has several subsets", "subset", source, sorted(folders))
    return found


def split_name(file: str) -> str:
    """The split a file's name or folders tell (`train`, `dev`, `train_sft`); empty when they tell none."""
    path = PurePosixPath(file)
    stem = _stem(path)
    if _SHARD.search(stem):
        return _SHARD.sub("", stem)
    stem = _NUMBER.sub("", stem)
    if _tells_split(stem):
        return stem
    word = next((word for word in _words(stem) if word in _ALL_SPLIT_WORDS), None)
    return word or next((part for part in reversed(path.parts[:-1]) if _tells_split(part)), "")


def tell_splits(files: Sequence[str]) -> bool:
    """Whether any file's name or folders tell a split."""
    return any(_tells_split(split_name(file)) for file in files)


def _tells_split(name: str) -> bool:
    """Whether a name begins with a word for a split: `train`, `train_sft`, not `strain`."""
    return bool(words := _words(name)) and words[0] in _ALL_SPLIT_WORDS


def _same_split(name: str, split: str) -> bool:
    return any(word in _words(name) for word in SPLIT_WORDS.get(split, (split.lower(),)))


def _of_subset(files: Sequence[str], source: Source) -> Sequence[str]:
    if source.subset is None:
        return files
    in_folder = [file for file in files if source.subset in PurePosixPath(file).parts[:-1]]
    found = in_folder or [file for file in files if source.subset.lower() in _stem(PurePosixPath(file)).lower()]
    if not found:
        raise _choice(
            "no file belongs to the subset", "subset", source, sorted({_subset_folder(file) for file in files})
        )
    return found


def _subset_folder(file: str) -> str:
    """The folder that tells a subset: not the one that tells a split."""
    parts = [part for part in PurePosixPath(file).parts[:-1] if not _tells_split(part)]
    return "/".join(parts) or "."


def _stem(path: PurePosixPath) -> str:
    name = path.name
    for suffix in reversed(path.suffixes):
        if suffix.lower() not in KINDS and suffix.lower() not in COMPRESSIONS:
            break
        name = name.removesuffix(suffix)
    return name


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]


def _choice(what: str, key: str, source: Source, choices: Sequence[str]) -> DataError:
    value = getattr(source, key)
    named = f" `{value}`" if value else ""
    hint = f"name one by `{key}:` — {', '.join(choices)}" if choices else f"drop `{key}:`; its files tell none"
    return DataError(f"{what}{named}", where=source.path, hint=hint)
