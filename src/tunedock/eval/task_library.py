"""lm-evaluation-harness's tasks, by name: found, looked through, loaded with their data, and kept from what nobody asked for.

What lm-eval would do on its own, and does not do here: run code of a user's YAML (`eval.task_files`), run expressions of a
template outside a sandbox, fetch metrics as code, try again for half a minute where there is no network.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

from tunedock.errors import DataError, DependencyError, RecipeError, TunedockError
from tunedock.eval.task_files import SWITCH, OwnTasks, look_through
from tunedock.events import Emitter
from tunedock.plan.machine.network import ask
from tunedock.recipe.schema import Eval, Recipe

KEY = "eval.tasks"
FEWSHOT_SEED = 1234
"""lm-eval's own, so that the examples shown are those of published figures."""


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """What a name stands for: a task, or a group or tag of several."""

    name: str
    content: Mapping[str, Any]
    """lm-eval's `TaskDict`."""


def load_tasks(recipe: Recipe, options: Eval, emit: Emitter) -> list[LoadedTask]:
    """The tasks of `options.tasks` with their data, in that order.

    Raises DependencyError without lm-eval or a package a task needs, RecipeError for names and tasks that cannot be run, DataError
    where data cannot be had.
    """
    require_lm_eval()
    _sandbox_templates()
    own = _own_tasks(options)
    names = list(dict.fromkeys(options.tasks))
    emit.note("reading lm-eval's tasks")
    manager = _manager(names, options, own)
    _require_known(names, manager.all_tasks)
    offline = recipe.offline or _told_to_stay_offline()
    local = own is not None and own.local and set(names) <= own.tasks
    if not local and not offline and not _answers(recipe.hub):
        emit.warning("the hub cannot be reached: the tasks' data are taken from its cache", where=KEY)
        offline = True
    with _hub(recipe.hub, offline=offline), _folder(options.tasks_path), no_fetched_metrics(options) as refused:
        return [_load(name, manager, refused, options, offline=offline) for name in names]


def require_lm_eval() -> None:
    """Raises DependencyError where lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise DependencyError(
            "tasks by name need the package lm-eval, which is not installed",
            where=KEY,
            hint="pip install 'tunedock[lm-eval]'",
        )


def _own_tasks(options: Eval) -> OwnTasks | None:
    if options.tasks_path is None:
        return None
    import lm_eval.api.metrics  # noqa: F401 - what registers them
    from lm_eval.api.registry import metric_registry

    known = {str(name) for name in metric_registry.keys()}  # noqa: SIM118 - a registry of lm-eval, no dictionary
    return look_through(Path(options.tasks_path), library=_library(), metrics=known, run_code=options.tasks_run_code)


def _library() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _manager(names: Sequence[str], options: Eval, own: OwnTasks | None) -> Any:
    """lm-eval's own tasks are 14,000 files, which take seconds: they are read when a name is not a task of the user's folder."""
    from lm_eval.tasks import TaskManager

    enough = own is not None and not own.groups and set(names) <= own.tasks
    return TaskManager(include_path=options.tasks_path, include_defaults=not enough)


def _require_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
            raise RecipeError(
                f"there is no task `{name}`",
                where=KEY,
                hint=f"near it: {', '.join(near)}" if near else "`lm-eval ls tasks` lists lm-eval's tasks",
            )


def _load(name: str, manager: Any, refused: list[str], options: Eval, *, offline: bool) -> LoadedTask:
    try:
        content: dict[str, Any] = manager.load([name])
    except TunedockError:
        raise
    except Exception as error:  # policy: a task is YAML, code and data of other people's, and may raise anything
        raise _not_loaded(name, error, refused, offline=offline) from error
    if refused:
        raise fetched(name, refused)
    for task_name, task in content["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise RecipeError(
                "this task runs code the model writes, which tunedock does not do",
                where=f"{KEY}: {task_name}",
                hint="run it by lm-eval itself, in a container, on an export of the run",
            )
        if getattr(task, "MULTIMODAL", False):
            raise RecipeError("this task shows the model images or sounds", where=f"{KEY}: {task_name}")
        _set_few_shot(task, options.num_fewshot)
    return LoadedTask(name, content)


def _set_few_shot(task: Any, number: int | None) -> None:
    """As lm-eval's `--num_fewshot`: a task that says 0 itself keeps it."""
    own = task.get_config("num_fewshot")
    if number is not None and own != 0:
        task.set_config(key="num_fewshot", value=number)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


# -- what went wrong ---------------------------------------------------------------------------------------------------


def _not_loaded(name: str, error: Exception, refused: list[str], *, offline: bool) -> TunedockError:
    where = f"{KEY}: {name}"
    if refused:
        return fetched(name, refused)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if isinstance(error, ModuleNotFoundError):
        return DependencyError(
            f"the task needs the package `{error.name}`, which is not installed",
            where=where,
            hint="install it with pip",
        )
    if isinstance(error, OSError):  # no network is a ConnectionError, files that are not there are FileNotFoundError
        bring = (
            "load the task once where there is a network, and bring the folder HF_HOME (`~/.cache/huggingface`) along"
        )
        files = "check `dataset_path` and `data_files`; these start from the folder `eval.tasks_path`"
        from_hub = offline and isinstance(error, ConnectionError)
        return DataError(f"its data cannot be had: {first}", where=where, hint=bring if from_hub else files)
    traceback.print_exception(error, file=sys.stderr)
    return DataError(
        f"the task cannot be loaded: {type(error).__name__}: {first}", where=where, hint="the traceback is in the log"
    )


def fetched(name: str, refused: list[str]) -> RecipeError:
    return RecipeError(
        f"the task fetches the metric `{refused[0]}` as code from the hub, and runs it",
        where=f"{KEY}: {name}",
        hint=f"`{SWITCH}: true` allows it",
    )


# -- what lm-eval and its libraries are kept from ----------------------------------------------------------------------


class _Templates(SandboxedEnvironment):
    """lm-eval's template environment, in a sandbox. A template is compiled once, not for each row."""

    def __init__(self, like: Any) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True)
        self.filters.update(like.filters)
        self._compiled = cache(super().from_string)

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Template:
        return self._compiled(source, *args, **kwargs)


def _sandbox_templates() -> None:
    from lm_eval import utils

    if not isinstance(utils.env, _Templates):
        utils.env = _Templates(utils.env)


@contextlib.contextmanager
def no_fetched_metrics(options: Eval) -> Iterator[list[str]]:
    """Within it, metrics that would be fetched as code are refused; their names are in the list, for lm-eval swallows the error."""
    import evaluate

    refused: list[str] = []
    if options.tasks_run_code:
        yield refused
        return

    def refuse(path: str, *args: Any, **kwargs: Any) -> Any:
        refused.append(str(path))
        raise RuntimeError(f"the metric {path} is code, and is not fetched")

    as_it_was = evaluate.load
    evaluate.load = refuse
    try:
        yield refused
    finally:
        evaluate.load = as_it_was


@contextlib.contextmanager
def _hub(hub: str, *, offline: bool) -> Iterator[None]:
    """datasets and huggingface_hub read these when they are imported, which was long ago."""
    import datasets
    import huggingface_hub

    wanted: list[tuple[Any, str, Any]] = []
    if offline:
        wanted += [(datasets.config, "HF_HUB_OFFLINE", True), (datasets.config, "HF_DATASETS_OFFLINE", True)]
        wanted += [(huggingface_hub.constants, "HF_HUB_OFFLINE", True)]
    if "://" in hub:
        wanted += [(datasets.config, "HF_ENDPOINT", hub), (huggingface_hub.constants, "ENDPOINT", hub)]
    before = [(place, name, getattr(place, name)) for place, name, _ in wanted]
    try:
        for place, name, value in wanted:
            setattr(place, name, value)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


@contextlib.contextmanager
def _folder(path: str | None) -> Iterator[None]:
    """`data_files` of own tasks start from their folder, wherever the command is run."""
    with contextlib.chdir(path) if path is not None else contextlib.nullcontext():
        yield


def _answers(hub: str) -> bool:
    """Whether the hub says anything within seconds; huggingface_hub would ask it six times in half a minute."""
    import huggingface_hub

    endpoint = hub if "://" in hub else str(huggingface_hub.constants.ENDPOINT)
    return ask(endpoint).status is not None


def _told_to_stay_offline() -> bool:
    """By `HF_HUB_OFFLINE` or `HF_DATASETS_OFFLINE`."""
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)
