"""A LLaMA-Factory YAML and its dataset_info.json -> a recipe, and a report that says of each key what it became.

Nothing of the file vanishes: a key becomes a key of the recipe, is left out with the reason, or is refused by name. What tunedock
has a name for but does not do yet stands in the recipe under that name, and `recipe.load` refuses it there. Where the two tools'
defaults differ, LLaMA-Factory's is written out, so that the run means the same.

| module | what it knows |
|---|---|
| importers_words | the table of words, the report, the recipe as it grows |
| importers_sections | what the file is for, and kinds with their settings |
| importers_training | keys of training that hang together |
| importers_optimizers | GaLore, APOLLO and Muon |
| importers_parallel | DeepSpeed, FSDP |
| importers_rules | keys that cannot stand together |
| importers_info | which data sets the file names, and where they are described |
| dataset_info | what an entry becomes |
| dataset_columns | their format, columns and tags |
| importers_data | the sources and the split they become |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunedock import __version__
from tunedock.errors import DiskError, RecipeError
from tunedock.recipe import importers_adapters as adapters
from tunedock.recipe import importers_sections as sections
from tunedock.recipe.document import Document, Key, dotted, read
from tunedock.recipe.explain import explain
from tunedock.recipe.importers_data import put_data
from tunedock.recipe.importers_info import read_data_sets
from tunedock.recipe.importers_optimizers import optimizers
from tunedock.recipe.importers_parallel import parallel
from tunedock.recipe.importers_rules import contradictions
from tunedock.recipe.importers_training import training
from tunedock.recipe.importers_words import Draft, Line, coerce, is_off, left_out, nearest, of_kinds, refused, tables
from tunedock.recipe.merge import Merge
from tunedock.recipe.problems import Problem, error_of
from tunedock.recipe.schema import Recipe
from tunedock.recipe.words import sections as known_keys
from tunedock.recipe.write import commented_yaml

_V1_ALONE = (
    "model",
    "train_dataset",
    "peft_config",
    "quant_config",
    "dist_config",
    "micro_batch_size",
    "global_batch_size",
)


@dataclass(frozen=True)
class Imported:
    """What a file became."""

    version: str
    """`v0` or `v1`: which generation of LLaMA-Factory's words the file speaks."""
    purpose: str
    """train, evaluate, export or inference; of the last three the recipe is a part, to be merged over another."""
    values: dict[str, Any]
    """The recipe."""
    lines: tuple[Line, ...]
    """The report: each key of the file and of its data sets, in their order, then the defaults written out."""
    problems: tuple[Problem, ...]
    """Why the recipe cannot be used; empty when it can."""
    text: str
    """The recipe as YAML, each value with the word it came from."""

    @property
    def not_built(self) -> tuple[str, ...]:
        """Keys of the recipe that this version refuses by name."""
        return tuple(dict.fromkeys(f"{line.to}" for line in self.lines if line.outcome == "not built"))

    def error(self) -> RecipeError:
        """One error that says every problem."""
        return error_of(self.problems)

    def check(self) -> None:
        """Raises that error where there is a problem."""
        if self.problems:
            raise self.error()

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "purpose": self.purpose,
            "recipe": self.values,
            "yaml": self.text,
            "report": [line.to_json() for line in self.lines],
            "not_built": list(self.not_built),
        }

    def write(self, to: Path) -> None:
        """Writes the recipe to a new file. Raises RecipeError where one is, or problems are left; DiskError where it cannot."""
        self.check()
        try:
            with to.open("x", encoding="utf-8") as file:
                file.write(self.text)
        except FileExistsError:
            raise RecipeError("there is a file already", where=str(to), hint="give `--to` a new name") from None
        except (OSError, ValueError) as error:
            raise DiskError(f"cannot write the recipe: {error}", where=str(to)) from None


def import_llamafactory(
    file: Path, *, dataset_info: Path | None = None, to: Path | None = None, cwd: Path | None = None
) -> Imported:
    """Reads `file`. Writes nothing.

    `dataset_info`: the dataset_info.json, or its folder; by default it is looked for in the file's `dataset_dir`. `to`: where the
    recipe will stand, for its paths start from there; the working directory `cwd` by default, where LLaMA-Factory's own start.

    Raises RecipeError for a file that is no mapping of plain values, and for a recipe; all else that is wrong is in `problems`.
    """
    here = Path.cwd() if cwd is None else cwd
    document = read(file)
    if _is_recipe(document.value):
        raise RecipeError(
            "this is a recipe of tunedock already", where=str(file), hint=f"look at it: `tunedock recipe show {file}`"
        )
    version = _version(document.value)
    folder = Path(os.path.normpath(here / (to.parent if to else Path())))
    draft = Draft(version, file, folder, here, document)
    purpose = sections.purpose(draft)
    contradictions(draft)
    data = read_data_sets(draft, dataset_info)
    sections.objective(draft, pairs=data.pairs)
    adapters.adapter(draft)
    sections.quantize(draft)
    put_data(draft, data)
    optimizers(draft)
    training(draft)
    parallel(draft)
    _simple(draft)
    if purpose == "train":
        _defaults(draft)
    draft.values = {key: _ordered(draft.values[key], key) for key in Recipe.model_fields if key in draft.values}
    _check_schema(draft, whole=purpose == "train")
    order = {word: index for index, word in enumerate(draft.words)}
    lines = sorted(draft.lines, key=lambda line: _place(line, order))
    return Imported(
        version, purpose, draft.values, tuple(lines), tuple(draft.problems), _text(draft, version, purpose, lines)
    )


def _ordered(value: Any, section: str) -> Any:
    """The keys of a section in the schema's order; those it does not have, at their end."""
    if not isinstance(value, dict):
        return value
    known = [name for name in known_keys().get(section, {}) if name in value]
    return {
        name: _ordered(value[name], f"{section}.{name}")
        for name in [*known, *(name for name in value if name not in known)]
    }


def _is_recipe(words: Mapping[str, Any]) -> bool:
    """LLaMA-Factory has neither `data` nor `objective`, and of `model` alone its v1 could be meant."""
    return set(words) <= set(Recipe.model_fields) and not {"data", "objective"}.isdisjoint(words)


def _version(words: Mapping[str, Any]) -> str:
    return "v1" if "model_name_or_path" not in words and any(word in words for word in _V1_ALONE) else "v0"


def _place(line: Line, order: Mapping[str, int]) -> tuple[int, int]:
    """Defaults last; a data set's keys behind the word that names it."""
    if line.outcome == "default":
        return len(order) + 1, 0
    if line.key in order:
        return order[line.key], 0
    near = next((word for word in ("dataset", "train_dataset") if word in order), None)
    return (order[near] if near else len(order), 1)


def _simple(draft: Draft) -> None:
    """The words that a table tells all about."""
    becomes, without, refusals = tables()[draft.version]["becomes"], left_out(draft.version), refused(draft.version)
    for word, value in draft.words.items():
        if draft.told(word):
            continue
        if value is None and _known(draft, word):
            draft.leave(word, "null is its default")
        elif word == "output_dir" and not draft.training:
            draft.leave(word, "results stand in the run's directory")
        elif word in becomes:
            sections.by_table(draft, word, becomes[word])
        elif word in without:
            draft.leave(word, without[word])
        elif word in refusals:
            off, why, hint = refusals[word]
            if value in off or is_off(value, off):
                draft.leave(word, "off, as it is here")
            else:
                draft.refuse(word, why, hint, built=False)
        elif word in tables()[draft.version]["by_code"]:
            draft.lines.append(Line(word, value, "refused", note="what it names has a problem"))
        else:
            draft.refuse(word, "LLaMA-Factory has no such key", _meant(draft, word))


@cache
def _words(version: str) -> list[str]:
    """Every word of a generation of LLaMA-Factory."""
    table = tables()[version]
    kinds = [
        name for section in ("objective", "adapter") for names in of_kinds(version, section).values() for name in names
    ]
    return [*table["becomes"], *left_out(version), *refused(version), *kinds, *table["by_code"]]


def _known(draft: Draft, word: str) -> bool:
    return word in _words(draft.version)


def _meant(draft: Draft, word: str) -> str:
    """The key a word nobody knows may have been."""
    known = _words(draft.version)
    other = "v1" if draft.version == "v0" else "v0"
    if word in _words(other):
        return f"it is a word of LLaMA-Factory's {other}, and the other keys are of its {draft.version}"
    if hint := nearest(word, known):
        return hint
    section = word.rpartition(".")[0]
    names = [name.removeprefix(f"{section}.") for name in known if name.startswith(f"{section}.")]
    if section and names:
        return f"the keys of `{section}` are {', '.join(dict.fromkeys(names))}"
    return "take it out, or correct it"


def _defaults(draft: Draft) -> None:
    """LLaMA-Factory's defaults that are not tunedock's."""
    becomes = tables()[draft.version]["becomes"]
    for entry in tables()[draft.version]["defaults"]:
        word, _, text = entry.partition(": ")
        if draft.has(word):
            continue
        value = (
            None if text == "null" else text if becomes[word]["type"] == "text" else coerce(text, becomes[word]["type"])
        )
        draft.put(becomes[word]["to"], value, word, "LLaMA-Factory's default", default=True)


def _check_schema(draft: Draft, *, whole: bool) -> None:
    """What the schema says of the values, told with the words they came from."""
    origins: dict[Key, int] = {(): 1}
    for line in draft.lines:
        if line.to:
            key = tuple(int(part) if part.isdigit() else part for part in line.to.split("."))
            origins[key] = draft.line_of(line.key)
    merge = Merge()
    merge.overlay(Document(draft.values, origins), draft.file)
    names = [line.to for line in draft.lines if line.outcome == "not built" and line.to]
    told = {problem.key for problem in draft.problems}
    values = merge.result()
    try:
        Recipe.model_validate(values)
    except ValidationError as error:
        for problem in explain(error, values, merge):
            name = dotted(problem.key)
            if any(name == other or name.startswith(f"{other}.") for other in names):
                continue
            if problem.message.endswith("is missing") and (not whole or draft.problems):
                continue
            word = draft.source_of(name)
            if word and (word,) not in told:
                draft.problems.append(replace(problem, message=f"`{word}`: {problem.message}", where=draft.where(word)))
            elif not word:
                draft.problems.append(replace(problem, where=str(draft.file)))


def _text(draft: Draft, version: str, purpose: str, lines: list[Line]) -> str:
    comments: dict[str, str] = {}
    for line in lines:
        if line.to:
            said = str(line.note) if line.outcome == "default" else line.key
            comments.setdefault(line.to, f"{said} (not built yet)" if line.outcome == "not built" else said)
    head = f"# Made by tunedock {__version__} from {draft.file.name}, a file of LLaMA-Factory {version}.\n"
    if purpose != "train":
        head += "# It names no training data, so this is part of a recipe: merge it over one, or complete it.\n"
    return head + (commented_yaml(draft.values, comments, leave_out=()) if draft.values else "")
