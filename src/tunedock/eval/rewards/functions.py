"""Reward functions: Python that the recipe names, called as TRL calls it.

    f(prompts=..., completions=..., completion_ids=..., **columns) -> list[float | None]

`prompts` are lists of messages, `completions` lists with one message of the assistant, and each other field of the data's rows is a
list by its name, None where a row has no such field. `answer` is the answer the rows bring, unless they have a field of that name.
As in TRL there are `trainer_state` (`global_step`, `max_steps`), `log_metric` and `log_extra`, and a function may be async. What a
function does not take is not handed to it. `args` of the recipe are keyword arguments.

What runs is what was hashed: a file is read once, compared with the recipe's `sha256`, and compiled from those bytes. Modules
beside it can be imported; their folder stands last on the path, so that a stray `torch.py` there stands in for nothing.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tunedock.data.turns_out import spoken_turns
from tunedock.errors import RecipeError, RewardError
from tunedock.eval.rewards import built_in
from tunedock.eval.rewards.built_in import GIVEN
from tunedock.eval.rewards.completion import Completion, Log, Moment, Values
from tunedock.recipe.objectives.rewards import FunctionReward, names_module
from tunedock.recipe.rewards import digest

WHERE = "objective.rewards"


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What TRL's functions ask a trainer's state for."""

    global_step: int
    max_steps: int


class FunctionSource:
    """A function and its arguments."""

    def __init__(
        self, function: Callable[..., Any], label: str, args: dict[str, Any], identity: dict[str, Any]
    ) -> None:
        """`label`: how errors name it. Raises RecipeError when it cannot take `args`."""
        self._function = function
        self._label = label
        self._args = args
        self._identity = identity
        self._file = _file_of(function)
        try:
            parameters = inspect.signature(function).parameters.values()
        except (ValueError, TypeError):
            raise RecipeError(
                f"{label} does not say what it takes, so it cannot be called",
                where=WHERE,
                hint="write a function of your own that calls it: `def score(completions, **columns)`",
            ) from None
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._takes = {p.name for p in named}
        self._needs = {p.name for p in named if p.default is p.empty} - set(GIVEN) - set(args)
        for name in args:
            if name in GIVEN:
                raise RecipeError(f"`{name}` is given by training, and is none of the `args` of {label}", where=WHERE)
            if not self._takes_all and name not in self._takes:
                raise RecipeError(
                    f"{label} takes no `{name}`", where=WHERE, hint=f"it takes {', '.join(sorted(self._takes))}"
                )

    def values(self, completions: Sequence[Completion], moment: Moment, log: Log) -> Values:
        try:
            returned = self._call(completions, moment, log)
        except MemoryError:
            raise
        except (Exception, SystemExit) as raised:  # policy: whatever user's code raises is told with its place and row
            raise self._failed(raised, completions, moment) from raised
        return self._read(returned, completions)

    def lineage(self) -> dict[str, Any]:
        return {"kind": "function", **self._identity, "args": self._args}

    def close(self) -> None:
        """There is nothing to let go of."""

    def _call(self, completions: Sequence[Completion], moment: Moment, log: Log) -> Any:
        arguments = self._arguments(completions, moment, log)
        returned = self._function(**arguments)
        return asyncio.run(_awaited(returned)) if inspect.isawaitable(returned) else returned

    def _arguments(self, completions: Sequence[Completion], moment: Moment, log: Log) -> dict[str, Any]:
        """All that there is, less what the function does not take. Raises RewardError for a column that no row has."""
        columns = dict.fromkeys(name for one in completions for name in one.columns)
        given: dict[str, Any] = {"answer": [one.answer for one in completions]}
        given |= {name: [one.columns.get(name) for one in completions] for name in columns}
        missing = sorted(self._needs - given.keys())
        if missing:
            has = (
                f"the rows have {', '.join(f'`{name}`' for name in columns)}" if columns else "the rows have no others"
            )
            raise RewardError(
                f"{self._label} wants the column `{missing[0]}`, which no row has",
                where=completions[0].row_id,
                hint=has,
            )
        given |= {
            "prompts": [spoken_turns(one.prompt, context=True) for one in completions],
            "completions": [[{"role": "assistant", "content": one.text}] for one in completions],
            "completion_ids": [list(one.token_ids) for one in completions],
            "trainer_state": TrainerState(moment.step, moment.max_steps),
            "log_metric": lambda name, value: log.metrics.setdefault(str(name), []).append(float(value)),
            "log_extra": lambda column, values: log.extra.setdefault(str(column), []).extend(values),
            **self._args,
        }
        return given if self._takes_all else {name: value for name, value in given.items() if name in self._takes}

    def _failed(self, raised: BaseException, completions: Sequence[Completion], moment: Moment) -> RewardError:
        """The error with the line of the user's code, and the first row that fails alone."""
        if isinstance(raised, RewardError):
            return raised
        traceback.print_exception(raised)
        rows = list(dict.fromkeys(one.row_id for one in completions))
        where = self._first_failing(completions, moment) or f"{rows[0]} and {len(rows) - 1} more rows together"
        return RewardError(
            f"{self._label} failed{self._line(raised)}: {type(raised).__name__}: {raised}",
            where=where,
            hint="the traceback is in the log",
        )

    def _first_failing(self, completions: Sequence[Completion], moment: Moment) -> str | None:
        for one in completions:
            moment.check()
            try:
                self._call([one], moment, Log())
            except (Exception, SystemExit):  # noqa: BLE001 - the same policy; which row it was is all that is asked here
                return one.row_id
        return None

    def _line(self, raised: BaseException) -> str:
        frames = traceback.extract_tb(raised.__traceback__)
        own = [frame for frame in frames if frame.filename == self._file] or frames[-1:]
        return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""

    def _read(self, returned: Any, completions: Sequence[Completion]) -> Values:
        if hasattr(returned, "tolist"):  # a tensor or an array
            returned = returned.tolist()
        if not isinstance(returned, list | tuple):
            raise RewardError(
                f"{self._label} gave {_named(returned)}, and not a list of scores", where=completions[0].row_id
            )
        if len(returned) != len(completions):
            raise RewardError(
                f"{self._label} gave {len(returned)} scores for {len(completions)} completions",
                where=completions[0].row_id,
                hint="it must give one for each of `completions`, None where it has no say",
            )
        values: Values = []
        for value, one in zip(returned, completions, strict=True):
            plain = value.item() if hasattr(value, "item") else value
            if plain is not None and not isinstance(plain, bool | int | float):
                raise RewardError(f"{self._label} gave {_named(plain)} for a score, and not a number", where=one.row_id)
            if plain is not None and not math.isfinite(plain):
                raise RewardError(
                    f"{self._label} gave the score {plain}, which is no finite number",
                    where=one.row_id,
                    hint="it may give None where it has no say",
                )
            values.append(None if plain is None else float(plain))
        return values


def open_function(reward: FunctionReward) -> FunctionSource:
    """Raises RecipeError when there is no such file, module or function, or it has changed since the run began."""
    if reward.path is None:
        function: Any = built_in.FUNCTIONS.get(reward.name)
        if function is None:
            raise RecipeError(f"there is no function `{reward.name}` of tunedock's own", where=WHERE)
        return FunctionSource(function, f"`{reward.name}`", reward.args, {"function": reward.name})
    module, found = _module(reward.path) if names_module(reward.path) else _file(reward.path, reward.sha256)
    label = f"`{Path(reward.path).name}:{reward.name}`"
    function = getattr(module, reward.name, None)
    if not callable(function):
        others = [name for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"]
        raise RecipeError(
            f"there is no function `{reward.name}` in {reward.path}",
            where=WHERE,
            hint=f"it has {', '.join(others)}" if others else None,
        )
    return FunctionSource(function, label, reward.args, {"path": reward.path, "function": reward.name, "sha256": found})


def _file(path: str, sha256: str | None) -> tuple[ModuleType, str]:
    """The file run as a module of its own, and its hash."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RecipeError(f"the file of reward functions cannot be read: {error.strerror}", where=path) from None
    found = digest(content)
    if sha256 not in (None, found):
        raise RecipeError(
            "this is not the file the run began with: its content has changed",
            where=path,
            hint="put the file back as it was, or start a new run",
        )
    folder = str(Path(path).parent)
    if folder not in sys.path:
        sys.path.append(folder)
    module = ModuleType(f"tunedock_rewards_{found[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up there
    _loading(path, lambda: exec(compile(content, path, "exec"), module.__dict__))  # noqa: S102 - what the recipe names
    return module, found


def _module(name: str) -> tuple[ModuleType, str | None]:
    module: ModuleType = _loading(name, lambda: importlib.import_module(name))
    file = getattr(module, "__file__", None)
    return module, digest(Path(file).read_bytes()) if file else None


def _loading(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as raised:  # policy: as for a function that fails
        traceback.print_exception(raised)
        if isinstance(raised, SyntaxError):
            place = f"{raised.filename}:{raised.lineno}"
        else:
            frames = traceback.extract_tb(raised.__traceback__)
            own = [frame for frame in frames if frame.filename == name]
            place = f"{own[-1].filename}:{own[-1].lineno}" if own else name
        raise RecipeError(
            f"the reward functions cannot be loaded: {type(raised).__name__}: {raised}",
            where=place,
            hint="the traceback is in the log",
        ) from raised


def _file_of(function: Callable[..., Any]) -> str | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else str(code.co_filename)


async def _awaited(returned: Awaitable[Any]) -> Any:
    return await returned


def _named(value: Any) -> str:
    return f"{type(value).__name__} ({value!r:.60})"
