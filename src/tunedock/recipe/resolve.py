"""A loaded recipe -> the recipe a run follows: what was left out filled in, each value with where it came from.

    recipe.yaml:12                    written there
    command line                      a `key=value` override
    default                           the schema's default
    derived: twice adapter.r          worked out from other keys

What depends on the device (`train.bf16`, `train.token_budget`) stays null for the work plane.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunedock import __version__
from tunedock.errors import RecipeError
from tunedock.recipe import deepspeed, paths, rewards, rules
from tunedock.recipe.adapter_files import fill_continued, notes_on_base, read_adapter
from tunedock.recipe.described import expand
from tunedock.recipe.document import Key, at, dotted
from tunedock.recipe.launch import Launch
from tunedock.recipe.load import Loaded
from tunedock.recipe.problems import Problem, error_of
from tunedock.recipe.schema import Recipe
from tunedock.recipe.write import commented_yaml

DEFAULT = "default"
BATCH_SIZE = 16
LEARNING_RATES = {"lora": 1e-4, "full": 1e-5, "freeze": 1e-5}
SMALL_STEPS = frozenset({"dpo", "orpo", "simpo", "kto", "ppo", "grpo", "rloo"})
"""Objectives that move likelihoods of answers the model can give already: a tenth of what teaches new ones."""
SMALL_LEARNING_RATES = {"lora": 1e-5, "full": 1e-6, "freeze": 1e-6}
FRESH_LEARNING_RATE = 1e-3

_NO_EFFECT: tuple[Key, ...] = (
    ("train", "output_dir"),
    ("train", "report_to"),
    ("train", "logging_steps"),
    ("train", "save_total_limit"),
    ("train", "per_device_train_batch_size"),
    ("train", "gradient_accumulation_steps"),
    ("data", "cache_dir"),
    ("data", "max_dropped"),
    ("data", "num_proc"),
    ("eval",),
    ("track",),
    ("search",),
    ("train", "deepspeed"),
    ("launch",),
    ("parallel",),
    ("offload",),
    ("hub",),
    ("offline",),
)
"""Keys that change where or how a run is made and watched, not what it trains.

The batch counts once, as `batch_size`; over how many processes it is spread, and how a model lies on them, changes rounding alone.
"""


@dataclass(frozen=True)
class Resolved:
    recipe: Recipe
    origins: dict[str, str]
    """Dotted key of every leaf -> where its value came from."""
    hash: str
    """16 hex digits; recipes with one hash train the same model, given the same data."""
    version: str = __version__
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "origins": self.origins,
            "hash": self.hash,
            "version": self.version,
        }

    def to_yaml(self) -> str:
        """The whole recipe; values that are no defaults have their origin beside them.

        `output_dir` is left out: training from this file is a new run.
        """
        comments = {key: origin for key, origin in self.origins.items() if origin != DEFAULT}
        head = f"# Resolved by tunedock {self.version}, hash {self.hash}. Values without a comment are defaults.\n"
        values = self.recipe.model_dump(mode="json")
        return head + commented_yaml(values, comments, leave_out=("train", "output_dir"))

    @classmethod
    def from_json(cls, value: Any) -> Resolved:
        """Reads what `to_json` wrote. Raises RecipeError when it is something else, or of a version this one cannot read."""
        try:
            recipe = Recipe.model_validate(value["recipe"])
            return cls(recipe, dict(value["origins"]), str(value["hash"]), str(value["version"]))
        except (KeyError, TypeError, ValueError) as error:
            by = value.get("version") if isinstance(value, dict) else None
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
            raise RecipeError(
                f"this is no resolved recipe that tunedock {__version__} can read: {reason}",
                hint=f"it was written by tunedock {by}" if by and by != __version__ else None,
            ) from None


def resolve(
    loaded: Loaded,
    *,
    now: datetime | None = None,
    cwd: Path | None = None,
    to_come: Collection[str] = (),
    gpus: Callable[[], int] = lambda: 0,
) -> Resolved:
    """Fills in what was left out, makes sources plain (`described`) and paths absolute, and checks the rules that span sections.

    `now` names the run directory, `cwd` is where relative paths of the command line start; paths `to_come` are taken as they are
    written. `gpus` counts those of a machine that trains, and is asked where it matters. Raises RecipeError for paths that are not
    there and rules that are broken.
    """
    here = cwd or Path.cwd()
    values = loaded.recipe.model_dump()
    described = expand(values, loaded, here)
    derived: dict[str, str] = {}
    _fill_split(values, loaded, derived)
    _fill_adapter(values, derived)
    devices = _devices(values, gpus)
    _fill_train(values, loaded, derived, devices)
    _check_rules(values, loaded, devices)
    _fill_paths(values, loaded, here, to_come)
    if values["train"]["deepspeed"] is not None:
        deepspeed.fill_from_deepspeed(values, derived, Path(values["train"]["deepspeed"]))
    rewards.settle(values, loaded, derived)
    notes = [*loaded.notes, *described.notes, *_fill_from_adapters(values, loaded, derived, to_come)]
    _check_rules(values, loaded, devices)
    if values["train"]["output_dir"] is None:
        values["train"]["output_dir"] = str(here / "runs" / run_name(values, now or datetime.now()))
        derived["train.output_dir"] = "time, objective and model"
    recipe = Recipe.model_validate(values)
    origins = _origins(recipe, loaded, {**described.origins, **derived})
    return Resolved(recipe, origins, fingerprint(recipe), notes=tuple(notes))


def _devices(values: dict[str, Any], gpus: Callable[[], int]) -> int:
    """Processes in all, where the recipe's meaning depends on it; looking for GPUs takes a moment, so 1 on each node elsewhere."""
    matters = values["train"]["per_device_train_batch_size"] is not None or "engine" in values["objective"]
    unsaid = values["launch"]["processes"] is None
    return Launch.model_validate(values["launch"]).devices(gpus() if matters and unsaid else 0)


def _check_rules(values: dict[str, Any], loaded: Loaded, devices: int) -> None:
    """With `launch.processes` as many as there will be."""
    launch = {**values["launch"], "processes": devices // values["launch"]["nodes"]}
    rules.check(Recipe.model_validate({**values, "launch": launch}), lambda key: _written(loaded, key))


def run_name(values: dict[str, Any], now: datetime) -> str:
    """`20250131-093000-sft-Qwen3-8B`."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(values["model"]["path"]).name).strip("-.") or "model"
    return f"{now:%Y%m%d-%H%M%S}-{values['objective']['kind']}-{model[:60]}"


def fingerprint(recipe: Recipe) -> str:
    """The hash of what affects the result. Files count by their path here; their content is in the run's lineage."""
    text = json.dumps(counted(recipe), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe as people write it, shorthands allowed, for editors."""
    schema = Recipe.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "tunedock recipe"}


def _fill_split(values: dict[str, Any], loaded: Loaded, derived: dict[str, str]) -> None:
    data, split = values["data"], values["data"]["split"]
    given = {name for name in split if loaded.origin(("data", "split", name))}
    for side in ("validation", "test"):
        if data[side] and side not in given:
            split[side] = 0.0
            derived[f"data.split.{side}"] = f"data.{side} gives the files"
    rest = round(1.0 - split["validation"] - split["test"], 12)
    if "train" not in given and (given & {"validation", "test"} or derived) and rest > 0:
        split["train"] = rest
        derived["data.split.train"] = "what validation and test leave"


def _fill_adapter(values: dict[str, Any], derived: dict[str, str]) -> None:
    adapter = values["adapter"]
    if adapter["kind"] == "lora" and adapter["alpha"] is None and adapter["continue_from"] is None:
        adapter["alpha"] = 2.0 * adapter["r"]
        derived["adapter.alpha"] = "twice adapter.r"


def _fill_from_adapters(
    values: dict[str, Any], loaded: Loaded, derived: dict[str, str], to_come: Collection[str]
) -> list[str]:
    """Takes the shape of the adapter that is gone on with from its file. Returns notes on what adapters were trained on."""
    notes: list[str] = []
    for path in values["model"]["adapters"]:
        if path in to_come:
            continue
        trained_on = read_adapter(Path(path))["base_model_name_or_path"]
        notes += notes_on_base(Path(path), values["model"]["path"], trained_on)
    if values["adapter"]["kind"] == "lora" and values["adapter"]["continue_from"] not in (None, *to_come):
        notes += fill_continued(values, loaded, derived)
    return notes


def _fill_train(values: dict[str, Any], loaded: Loaded, derived: dict[str, str], devices: int) -> None:
    train, kind = values["train"], values["adapter"]["kind"]
    if train["batch_size"] is None:
        per_device = train["per_device_train_batch_size"]
        if per_device is None:
            train["batch_size"] = BATCH_SIZE
            group = values["objective"].get("num_generations", 1)
            if BATCH_SIZE % group:
                train["batch_size"] = -(-BATCH_SIZE // group) * group
                derived["train.batch_size"] = "whole groups of objective.num_generations"
        else:
            train["batch_size"] = per_device * (train["gradient_accumulation_steps"] or 1) * devices
            many = f"{devices} device{'s' if devices > 1 else ''}"
            derived["train.batch_size"] = f"per_device_train_batch_size x gradient_accumulation_steps x {many}"
    if train["learning_rate"] is None:
        train["learning_rate"], derived["train.learning_rate"] = _learning_rate(values, kind)
    if train["optim"].startswith("schedule_free") and not loaded.origin(("train", "lr_scheduler_type")):
        train["lr_scheduler_type"] = "constant"
        derived["train.lr_scheduler_type"] = f"train.optim {train['optim']}"
    if train["eval_strategy"] == "steps" and train["eval_steps"] is None:
        train["eval_steps"] = train["save_steps"]
        derived["train.eval_steps"] = "as train.save_steps"
    nothing_to_evaluate = not values["data"]["validation"] and values["data"]["split"]["validation"] == 0
    watched = train["load_best_model_at_end"] or train["early_stopping_patience"] is not None
    if nothing_to_evaluate and not watched and not loaded.origin(("train", "eval_strategy")):
        train["eval_strategy"] = "no"
        derived["train.eval_strategy"] = "there is no validation data"


def _learning_rate(values: dict[str, Any], kind: str) -> tuple[float, str]:
    """The default and what it follows from."""
    if values["model"]["init"] == "random":
        return FRESH_LEARNING_RATE, "model.init random"
    objective = values["objective"]["kind"]
    if objective in SMALL_STEPS:
        return SMALL_LEARNING_RATES[kind], f"objective.kind {objective}, adapter.kind {kind}"
    return LEARNING_RATES[kind], f"adapter.kind {kind}"


def _fill_paths(values: dict[str, Any], loaded: Loaded, cwd: Path, to_come: Collection[str]) -> None:
    problems: list[Problem] = []
    for key, must_exist, hub in path_keys(values):
        section: Any = values
        for part in key[:-1]:
            section = section[part]
        if section[key[-1]] is None or section[key[-1]] in to_come:
            continue
        origin = loaded.origin(key)
        base = origin.file.absolute().parent if origin and origin.file else cwd
        place = paths.Place(dotted(key), str(origin or DEFAULT), base, cwd)
        try:
            if must_exist:
                section[key[-1]] = paths.existing(section[key[-1]], place, hub=hub)
            else:
                section[key[-1]] = paths.absolute(section[key[-1]], place)
        except RecipeError as error:
            problems.append(Problem(error.message, error.where, error.hint))
    if problems:
        raise error_of(problems)


def path_keys(values: dict[str, Any]) -> Iterator[tuple[Key, bool, bool]]:
    """(key, whether it must exist, whether it may be a hub id or a URL) of every path in a recipe."""
    yield ("model", "path"), True, True
    yield ("model", "chat_template"), True, False
    for index in range(len(values["model"]["adapters"])):
        yield ("model", "adapters", index), True, False
    if values["adapter"]["kind"] == "lora":
        yield ("adapter", "continue_from"), True, False
    for side in ("train", "validation", "test"):
        for index in range(len(values["data"][side])):
            yield ("data", side, index, "path"), True, True
    yield from rewards.path_keys(values)
    if "adapter_dir" in values["objective"].get("engine", {}):
        yield ("objective", "engine", "adapter_dir"), False, False
    for index in range(len(values["launch"]["container"]["mounts"])):
        yield ("launch", "container", "mounts", index, "path"), True, False
    yield ("data", "cache_dir"), False, False
    yield ("eval", "tasks_path"), True, False
    yield ("train", "deepspeed"), True, False
    yield ("train", "output_dir"), False, False


def paths_of(recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """(dotted key, path, whether it is only read) of every path of a resolved recipe; hub ids and URLs are among them."""
    values = recipe.model_dump()
    for key, must_exist, _hub in path_keys(values):
        value = at(values, key)
        if isinstance(value, str):
            yield dotted(key), value, must_exist


def inputs(recipe: Recipe) -> dict[str, str]:
    """Dotted key -> path of all that training reads: what a run's recipe hash knows by its path alone."""
    values = recipe.model_dump()
    found = {}
    for key, must_exist, _hub in path_keys(values):
        value = at(values, key)
        if must_exist and isinstance(value, str) and key[0] not in ("eval", "launch") and key not in _NO_EFFECT:
            found[dotted(key)] = value
    return found


def counted(recipe: Recipe) -> dict[str, Any]:
    """The recipe's values that affect the result, as JSON values."""
    values = recipe.model_dump(mode="json")
    for key in _NO_EFFECT:
        section: Any = values
        for part in key[:-1]:
            section = section[part]
        section.pop(key[-1], None)
    return values


def _written(loaded: Loaded, key: Key) -> str | None:
    origin = loaded.origin(key)
    return str(origin) if origin else None


def _origins(recipe: Recipe, loaded: Loaded, derived: dict[str, str]) -> dict[str, str]:
    origins = {}
    for key in leaves(recipe.model_dump(mode="json"), ()):
        name = dotted(key)
        origins[name] = f"derived: {derived[name]}" if name in derived else _written(loaded, key) or DEFAULT
    return origins


def leaves(value: Any, key: Key) -> Iterator[Key]:
    """Keys of all values that hold no further keys. A list of plain values is one value."""
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from leaves(child, (*key, name))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, child in enumerate(value):
            yield from leaves(child, (*key, index))
    else:
        yield key
