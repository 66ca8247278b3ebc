"""Sources that name an entry of a dataset_info.json -> plain sources: `data/dataset_info.json#identity`.

A recipe is resolved to plain sources, so all that comes after knows no other kind, `recipe show` says what an entry became, and
the recipe's hash changes with whatever the entry says of the data (docs/decisions/0010). An entry is read as the importer reads it
(`dataset_info`). Beside such a path a source may have `num_samples`, which then is the most; the entry says the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunedock.errors import RecipeError
from tunedock.recipe import paths
from tunedock.recipe.dataset_info import INFO, Entry, read_info, source_of
from tunedock.recipe.document import Key, at
from tunedock.recipe.importers_words import Line, nearest
from tunedock.recipe.load import Loaded
from tunedock.recipe.problems import Problem, error_of
from tunedock.recipe.schema import Source

_NAMED = re.compile(r"(?P<file>.+?\.json)#(?P<name>.+)", re.DOTALL)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SIDES = ("train", "validation", "test")
_NAMES_SHOWN = 8
_TOLD = ("path", "subset", "num_samples")
"""What an entry became is noted where it is not quite what LLaMA-Factory makes of it."""


@dataclass
class Described:
    """What the entries said."""

    origins: dict[str, str] = field(default_factory=dict)
    """Dotted key of the recipe -> the entry's key it came from."""
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def expand(values: dict[str, Any], loaded: Loaded, cwd: Path) -> Described:
    """Puts plain sources in the place of those that name an entry. Raises one RecipeError for all that is wrong with them."""
    found = Described()
    for side in _SIDES:
        for index, source in enumerate(values["data"][side]):
            key: Key = ("data", side, index)
            origin = loaded.origin((*key, "path"))
            base = origin.file.absolute().parent if origin and origin.file else cwd
            place = paths.Place(f"data.{side}.{index}.path", str(origin), base, cwd)
            given = at(loaded.values, key)
            beside = [name for name in given if name != "path"] if isinstance(given, dict) else []
            try:
                plain = _plain(source, place, beside, values["objective"]["kind"], values["hub"], found)
            except RecipeError as error:
                found.problems.append(Problem(error.message, error.where, error.hint))
                continue
            if plain is not None:
                values["data"][side][index] = Source.model_validate(plain).model_dump()
    if found.problems:
        raise error_of(found.problems)
    return found


def sources_of(
    given: Sequence[str], settings: Mapping[str, Any], *, hub: str, cwd: Path
) -> tuple[list[Source], list[str]]:
    """(sources, notes) of paths from a command line; `settings` are the keys each has beside its path. Raises RecipeError.

    What an entry is for is told from itself: pairs, verdicts, text or turns.
    """
    found = Described()
    made: list[Source] = []
    for path in given:
        place = paths.Place("SOURCE", "command line", cwd, cwd)
        plain: dict[str, Any] | None = {"path": path, **settings}
        try:
            named = _plain({"path": path, **settings}, place, list(settings), None, hub, found)
            plain = named or plain
            if plain:
                made.append(Source.model_validate({**plain, "path": paths.existing(plain["path"], place, hub=True)}))
        except RecipeError as error:
            found.problems.append(Problem(error.message, error.where, error.hint))
    if found.problems:
        raise error_of(found.problems)
    return made, found.notes


def _plain(
    source: Mapping[str, Any], place: paths.Place, beside: Sequence[str], kind: str | None, hub: str, found: Described
) -> dict[str, Any] | None:
    """The plain source of one that names an entry, None for any other. What is wrong is raised, or in `found.problems`."""
    text = str(source["path"])
    at_entry = _NAMED.fullmatch(text)
    if _is_remote(text):
        if (at_entry["file"] if at_entry else text).endswith(f"/{INFO}"):
            message = f"`{place.key}: {text}`: what describes data is read from the disk alone"
            raise RecipeError(message, where=place.where, hint="download it with the data it names")
        return None
    if not text.strip() or "\0" in text or Path(paths.absolute(text, place)).is_dir():
        return None
    if at_entry is None or Path(paths.absolute(text, place)).exists():
        _refuse_bare(text, place)
        return None
    file = Path(paths.existing(at_entry["file"], place, hub=False))
    infos = read_info(file)
    name = at_entry["name"]
    if name not in infos:
        hint = nearest(name, list(infos)) or f"it has {_some(infos)}"
        raise RecipeError(f"`{place.key}: {text}`: {file} has no data set `{name}`", where=place.where, hint=hint)
    if not isinstance(infos[name], Mapping):
        raise RecipeError(f"`{name}` should be a mapping", where=str(file))
    if said := [key for key in beside if key != "num_samples"]:
        raise RecipeError(
            f"`{place.key}: {text}`: the entry says what `{said[0]}` is",
            where=place.where,
            hint=f"take `{said[0]}` out, or name the data's own file as `path`",
        )
    return _of_entry(name, infos[name], file, at_entry["file"], source, place, kind, hub, found)


def _of_entry(
    name: str,
    info: Mapping[str, Any],
    file: Path,
    label: str,
    source: Mapping[str, Any],
    place: paths.Place,
    kind: str | None,
    hub: str,
    found: Described,
) -> dict[str, Any] | None:
    lines: list[Line] = []
    if hub == "modelscope" and info.get("ms_hub_url") is not None:
        info = {key: value for key, value in info.items() if key != "hf_hub_url"}
    to = place.key.removesuffix(".path")
    entry = Entry(name, info, file.parent, label, to, file, lines, found.problems)
    plain = source_of(entry, kind or _kind_of(info))
    if plain is None:
        return None
    if entry.hub == "modelscope" and hub != "modelscope":
        raise RecipeError(f"`{name}` is on ModelScope", where=str(file), hint="set `hub: modelscope`")
    if entry.hub == "hf" and hub == "modelscope":
        raise RecipeError(f"`{name}` is on Hugging Face's hub", where=str(file), hint="set `hub: hf`")
    if source.get("num_samples") is not None:
        plain["num_samples"] = min(source["num_samples"], plain.get("num_samples", source["num_samples"]))
    for line in lines:
        if line.to and not (line.to.endswith(".num_samples") and plain["num_samples"] == source.get("num_samples")):
            found.origins.setdefault(line.to, line.key)
        if line.note and line.outcome == "becomes" and line.to in [f"{to}.{key}" for key in _TOLD]:
            found.notes.append(f"{line.key}: {line.note}")
    return plain


def _is_remote(path: str) -> bool:
    return bool(_URL.match(path))


def _refuse_bare(text: str, place: paths.Place) -> None:
    """A dataset_info.json by itself would be read as one row of data."""
    file = Path(paths.absolute(text, place))
    if file.name == INFO and file.is_file():
        raise RecipeError(
            f"`{place.key}: {text}`: this describes data sets, and is none",
            where=place.where,
            hint=f"name one of them: `{text}#NAME`; it has {_some(read_info(file))}",
        )


def _some(infos: Mapping[str, Any]) -> str:
    names = [str(name) for name in infos]
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "") if names else "none"


def _kind_of(info: Mapping[str, Any]) -> str:
    """The objective an entry is for, where none is given."""
    columns = info.get("columns")
    named: Mapping[str, Any] = columns if isinstance(columns, Mapping) else {}
    if info.get("ranking") is True:
        return "dpo"
    if named.get("kto_tag") is not None:
        return "kto"
    only_text = set(_given(named)) == {"prompt"} and info.get("formatting", "alpaca") == "alpaca"
    return "pretrain" if only_text else "sft"


def _given(columns: Mapping[str, Any]) -> Iterator[str]:
    return (str(name) for name, value in columns.items() if value is not None)
