"""A chain file: named stages, each a recipe, an evaluation or an export, that build on each other's results.

    output_dir: runs/shop               # where the runs are; runs/<the file's name> by default
    defaults: {offline: true}           # merged under the recipe of every stage that trains
    stages:
      - name: sft
        recipe: sft.yaml                # a file or a list of them, and sections merged over it
        train: {num_train_epochs: 1}
      - name: dpo
        model: stage:sft                # the result of an earlier stage
        objective: dpo
        data: {train: pairs.jsonl}
      - {name: scores, eval: dpo, options: {max_samples: 50}}
      - {name: model, export: dpo, to: exported}

`stage:NAME` is text that YAML takes without quotes wherever it stands, a shell too. As `model` it means weights, those of a LoRA
merged; as a reward's `path`, `adapter.continue_from` or one of `model.adapters` it means the run. Anywhere else it is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tunedock.errors import RecipeError
from tunedock.recipe.chain_references import Reference, references_in, replaced
from tunedock.recipe.document import Document, Key, dotted, parse, read
from tunedock.recipe.exporting import Format, Order, check
from tunedock.recipe.load import Loaded, checked
from tunedock.recipe.merge import COMMAND_LINE, Merge
from tunedock.recipe.section import Section

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
DEFAULTS = "defaults"
TAKEN = frozenset({DEFAULTS, "models", "chain"})
"""Names that mean something else in a chain file or its folder."""

_TOP = ("output_dir", DEFAULTS, "stages")


class EvalKeys(Section):
    """What a stage that evaluates may say."""

    name: str
    eval: str
    split: Literal["train", "validation", "test"] = "test"
    options: dict[str, Any] = {}
    """Keys of the `eval` section."""


class ExportKeys(Section):
    """What a stage that exports may say."""

    name: str
    export: str
    format: Format = "hf"
    quantize: str | None = None
    """As `--quantize`."""
    to: str | None = None
    """A folder; `<output_dir>/<name>` by default."""


@dataclass(frozen=True, slots=True)
class TrainStage:
    name: str
    where: str
    layers: tuple[tuple[Document, Path], ...]
    """Documents to merge, in order, each with its file."""
    overrides: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()

    def load(self, put: Callable[[Reference], str]) -> Loaded:
        """The recipe, `put` in the place of references. Raises RecipeError, which names the stage."""
        try:
            return checked(self.merged(put))
        except RecipeError as error:
            raise named(self, error) from None

    def merged(self, put: Callable[[Reference], str]) -> Merge:
        merge = Merge()
        for document, file in self.layers:
            merge.overlay(Document(replaced(document.value, (), put), document.lines), file)
        for text in self.overrides:
            name, _, raw = text.partition("=")
            value = parse(raw, f"{COMMAND_LINE}: {self.name}.{name}").value
            put_in = replaced(value, tuple(name.split(".")), put)
            merge.override(text if put_in == value else f"{name}={json.dumps(put_in)}")
        return merge


@dataclass(frozen=True, slots=True)
class EvalStage:
    name: str
    where: str
    of: str
    split: str
    overrides: tuple[str, ...]
    """`key=value` of the `eval` section."""


@dataclass(frozen=True, slots=True)
class ExportStage:
    name: str
    where: str
    of: str
    format: Format
    quantize: str | None
    to: Path | None
    """Absolute; None for the chain's own folder."""


Stage = TrainStage | EvalStage | ExportStage


@dataclass(frozen=True, slots=True)
class Chain:
    path: Path
    output_dir: Path | None
    """Absolute."""
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def needs(stage: Stage) -> tuple[str, ...]:
    """Names of the stages whose results it takes."""
    if isinstance(stage, TrainStage):
        return tuple(dict.fromkeys(reference.stage for reference in stage.references))
    return (stage.of,)


def named(stage: Stage, error: RecipeError) -> RecipeError:
    """The same error, with the stage it is about."""
    return type(error)(f"stage `{stage.name}`: {error.message}", where=error.where or stage.where, hint=error.hint)


def as_written(reference: Reference) -> str:
    """The reference itself: for a recipe that is checked before the result is there."""
    return f"stage:{reference.stage}"


def read_chain(path: Path, overrides: Sequence[str] = ()) -> Chain:
    """The chain file. `overrides`: `STAGE.KEY=VALUE`, or `defaults.KEY=VALUE` for all that train.

    Raises RecipeError for what is no chain: unknown keys, two stages of one name, references to no stage, to a later one or in a
    circle.
    """
    document = read(path)
    top: dict[str, Any] = document.value
    _known(top, path)
    changes = _by_stage(overrides)
    defaults = [] if top.get(DEFAULTS) is None else [(_part(document, (DEFAULTS,), path), path)]
    stages: list[Stage] = []
    for index, value in enumerate(top["stages"]):
        where = f"{path}:{document.lines.get(('stages', index), 1)}"
        name = _name(value, where, [stage.name for stage in stages])
        if "eval" in value and not isinstance(value["eval"], dict):
            stages.append(_eval_stage(value, where, path, changes.pop(name, [])))
        elif "export" in value:
            if name in changes:
                raise _no_override(name, changes[name][0])
            stages.append(_export_stage(value, where, path))
        else:
            own = [*changes.get(DEFAULTS, []), *changes.pop(name, [])]
            stages.append(_train_stage(document, index, where, path, defaults, own))
    changes.pop(DEFAULTS, None)
    if changes:
        unknown = next(iter(changes))
        raise RecipeError(
            f"`{unknown}.{changes[unknown][0]}`: there is no stage `{unknown}`",
            where=COMMAND_LINE,
            hint=f"the stages are {', '.join(stage.name for stage in stages)}; `{DEFAULTS}.` changes all that train",
        )
    _check_references(stages)
    output_dir = top.get("output_dir")
    return Chain(path, None if output_dir is None else _folder(output_dir, path, "output_dir"), tuple(stages))


def _known(top: Mapping[str, Any], path: Path) -> None:
    if "stages" not in top:
        recipe = {"model", "data"} & top.keys()
        raise RecipeError(
            "this is no chain: it has no `stages`",
            where=str(path),
            hint=f"this is a recipe: `tunedock train {path}`"
            if recipe
            else "write `stages: [{name: sft, recipe: sft.yaml}]`",
        )
    for name in top:
        if name not in _TOP:
            raise RecipeError(
                f"`{name}` is not a key of a chain",
                where=str(path),
                hint=f"a chain has {', '.join(f'`{key}`' for key in _TOP)}; what all stages share stands under `{DEFAULTS}`",
            )
    stages = top["stages"]
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise RecipeError(
            "`stages` is a list of at least one stage, each a mapping",
            where=str(path),
            hint="write `stages: [{name: sft, recipe: sft.yaml}]`",
        )
    if not isinstance(top.get(DEFAULTS) or {}, dict):
        raise RecipeError(
            f"`{DEFAULTS}` holds sections of a recipe", where=str(path), hint="for example `defaults: {offline: true}`"
        )


def _name(value: Mapping[str, Any], where: str, before: Sequence[str]) -> str:
    name = value.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RecipeError(
            "a stage needs a `name`" if name is None else f"`name: {name}` is no name of a stage",
            where=where,
            hint="letters, digits, `-` and `_`, a letter first: `name: sft`",
        )
    if name in TAKEN:
        raise RecipeError(f"a stage cannot be called `{name}`", where=where, hint="take another name")
    if name in before:
        raise RecipeError(f"two stages are called `{name}`", where=where, hint="give one of them another name")
    return name


def _by_stage(overrides: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        name, dot, rest = key.partition(".")
        if not equals or not dot or not rest:
            raise RecipeError(
                f"`{text}` does not name a stage and a key",
                where=COMMAND_LINE,
                hint=f"write for example `sft.train.learning_rate=2e-4`, or `{DEFAULTS}.` for all stages that train",
            )
        found.setdefault(name, []).append(f"{rest}={value}")
    return found


def _no_override(name: str, text: str) -> RecipeError:
    return RecipeError(
        f"`{name}.{text}`: an export has no keys to change here", where=COMMAND_LINE, hint="change it in the chain file"
    )


def _train_stage(
    document: Document,
    index: int,
    where: str,
    path: Path,
    defaults: Sequence[tuple[Document, Path]],
    overrides: Sequence[str],
) -> TrainStage:
    value = document.value["stages"][index]
    name = value["name"]
    layers = [*defaults]
    recipes = value.get("recipe", [])
    for recipe in [recipes] if isinstance(recipes, str) else recipes:
        if not isinstance(recipe, str) or not recipe.strip() or "\0" in recipe:
            raise RecipeError(f"stage `{name}`: `recipe` is a file or a list of files", where=where)
        file = path.parent / Path(recipe).expanduser()
        layers.append((read(file), file))
    layers.append((_part(document, ("stages", index), path, without=("name", "recipe")), path))
    for layer, file in layers:
        section = layer.value.get("train")
        if file == path and isinstance(section, dict) and "output_dir" in section:
            raise RecipeError(
                f"stage `{name}`: a chain says itself where its runs are, so `train.output_dir` has no place in it",
                where=where,
                hint="set `output_dir` at the top of the chain file",
            )
    for text in overrides:
        if text.startswith("train.output_dir="):
            raise RecipeError(f"`{name}.{text}`: the chain says where its runs are", where=COMMAND_LINE)
    stage = TrainStage(name, where, tuple(layers), tuple(overrides))
    try:
        found = references_in(stage.merged(as_written).result(), ())
        return replace(stage, references=tuple(found))
    except RecipeError as error:
        raise named(stage, error) from None


def _eval_stage(value: dict[str, Any], where: str, path: Path, overrides: Sequence[str]) -> EvalStage:
    keys = _validated(EvalKeys, value, where)
    assert isinstance(keys, EvalKeys)  # noqa: S101 - of the class asked for
    options = dict(keys.options)
    if isinstance(options.get("tasks_path"), str):
        options["tasks_path"] = str(_folder(options["tasks_path"], path, "options.tasks_path"))
    texts = [f"{name}={json.dumps(item)}" for name, item in options.items()]
    return EvalStage(keys.name, where, keys.eval, keys.split, (*texts, *overrides))


def _export_stage(value: dict[str, Any], where: str, path: Path) -> ExportStage:
    keys = _validated(ExportKeys, value, where)
    assert isinstance(keys, ExportKeys)  # noqa: S101 - of the class asked for
    to = None if keys.to is None else _folder(keys.to, path, "to")
    try:
        check(Order(to="/", format=keys.format, quantize=keys.quantize))
    except RecipeError as error:
        raise RecipeError(f"stage `{keys.name}`: {error.message}", where=where, hint=error.hint) from None
    return ExportStage(keys.name, where, keys.export, keys.format, keys.quantize, to)


def _validated(kind: type[EvalKeys] | type[ExportKeys], value: dict[str, Any], where: str) -> EvalKeys | ExportKeys:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        key, verb = dotted(item["loc"]), "eval" if kind is EvalKeys else "export"
        if item["type"] == "extra_forbidden":
            message = f"`{key}` is no key of a stage with `{verb}`"
        else:
            message = f"`{key}: {item['input']}`: {item['msg']}"
        hint = f"it has {', '.join(f'`{name}`' for name in kind.model_fields)}"
        raise RecipeError(f"stage `{value['name']}`: {message}", where=where, hint=hint) from None


def _folder(text: str, path: Path, key: str) -> Path:
    """From the chain file's folder, absolute."""
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise RecipeError(f"`{key}: {text}` is no folder", where=str(path))
    try:
        return Path(os.path.normpath(path.absolute().parent / Path(text).expanduser()))
    except RuntimeError:
        raise RecipeError(f"`{key}: {text}`: there is no such user's home", where=str(path)) from None


def _part(document: Document, key: Key, path: Path, without: tuple[str, ...] = ()) -> Document:
    """The mapping at `key` as a document of its own, with its lines."""
    value: Any = document.value
    for part in key:
        value = value[part]
    value = {name: item for name, item in value.items() if name not in without}
    lines = {at[len(key) :]: line for at, line in document.lines.items() if at[: len(key)] == key}
    return Document(value, lines)


def _check_references(stages: Sequence[Stage]) -> None:
    by_name = {stage.name: stage for stage in stages}
    order = {stage.name: number for number, stage in enumerate(stages)}
    for stage in stages:
        for other in needs(stage):
            if other not in by_name:
                raise RecipeError(
                    f"stage `{stage.name}` needs `{other}`, and there is no such stage",
                    where=stage.where,
                    hint=f"the stages are {', '.join(by_name)}",
                )
            if order[other] >= order[stage.name]:
                circle = stage.name in _all_needs(other, by_name)
                raise RecipeError(
                    f"stages `{stage.name}` and `{other}` need each other"
                    if circle and other != stage.name
                    else f"stage `{stage.name}` needs "
                    + ("itself" if other == stage.name else f"`{other}`, which comes after it"),
                    where=stage.where,
                    hint="stages run in the order they are written; each may need earlier ones",
                )
        if not isinstance(stage, TrainStage) and not isinstance(by_name[stage.of], TrainStage):
            raise RecipeError(
                f"stage `{stage.name}`: `{stage.of}` trains nothing that could be "
                + ("evaluated" if isinstance(stage, EvalStage) else "exported"),
                where=stage.where,
                hint="name a stage that trains",
            )
        for other in needs(stage):
            if isinstance(by_name[other], EvalStage):
                raise RecipeError(
                    f"stage `{stage.name}` needs the result of `{other}`, which only measures", where=stage.where
                )


def _all_needs(name: str, by_name: Mapping[str, Stage], seen: frozenset[str] = frozenset()) -> frozenset[str]:
    if name in seen or name not in by_name:
        return seen
    seen |= {name}
    for other in needs(by_name[name]):
        seen |= _all_needs(other, by_name, seen) | {other}
    return seen
