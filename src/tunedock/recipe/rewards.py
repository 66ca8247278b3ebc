"""The `rewards` of an objective, checked before a run begins, and a file of functions known again by its content.

The functions themselves are loaded where training runs (`eval.rewards`): nothing of the recipe's is executed here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tunedock.errors import RecipeError
from tunedock.recipe.document import Key, dotted
from tunedock.recipe.load import Loaded
from tunedock.recipe.objectives.rewards import (
    BUILT_IN,
    AnyReward,
    FunctionReward,
    JudgeReward,
    ModelReward,
    Reward,
    names_module,
)
from tunedock.recipe.problems import Problem, error_of

SECTION: Key = ("objective", "rewards")
MAX_FILE_BYTES = 1 << 20

_READ: TypeAdapter[AnyReward] = TypeAdapter(Reward)
_METRIC = re.compile(r"[\w.-]{1,64}")


def path_keys(values: dict[str, Any]) -> Iterator[tuple[Key, bool, bool]]:
    """As `resolve` asks for them: (key, whether it must exist, whether it may be a hub id)."""
    for index, reward in enumerate(values["objective"].get("rewards", [])):
        key = (*SECTION, index, "path")
        if reward["kind"] == "model":
            yield key, True, True
        elif reward["kind"] == "function" and reward["path"] is not None and not names_module(reward["path"]):
            yield key, True, False


def settle(values: dict[str, Any], loaded: Loaded, derived: dict[str, str]) -> None:
    """Fills in `sha256` of files, whose paths are absolute by now. Raises one RecipeError for all that is wrong."""
    problems: list[Problem] = []
    for index, value in enumerate(values["objective"].get("rewards", [])):
        key: Key = (*SECTION, index)
        where = str(loaded.origin(key) or dotted(key))
        reward = _READ.validate_python(value)
        try:
            _check(reward)
            if isinstance(reward, FunctionReward) and reward.path is not None and not names_module(reward.path):
                value["sha256"] = _known(reward, Path(reward.path))
                if reward.sha256 is None:
                    derived[dotted((*key, "sha256"))] = "the file's content"
        except RecipeError as error:
            problems.append(Problem(f"`{dotted(key)}`: {error.message}", where, error.hint, key=key))
    if problems:
        raise error_of(problems)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _known(reward: FunctionReward, path: Path) -> str:
    if path.suffix != ".py":
        raise RecipeError(
            f"`{path.name}` is no Python file",
            hint="write `path: rewards.py`, or the dotted name of an installed module",
        )
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"`{path}` cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise RecipeError(f"`{path}` is larger than 1 MiB", hint="is this a file of functions?")
    found = digest(content)
    if reward.sha256 not in (None, found):
        raise RecipeError(
            f"`{path}` is not the file this recipe was made with: its content has changed",
            hint="put the file back as it was, or drop `sha256` to take it as it is now",
        )
    return found


def _check(reward: AnyReward) -> None:
    """Raises RecipeError."""
    if reward.name is not None and not _METRIC.fullmatch(reward.name):
        raise RecipeError(
            f"`name: {reward.name}` names a metric, and may have letters, digits, `.`, `_` and `-`",
        )
    if isinstance(reward, FunctionReward):
        _check_function(reward)
    elif isinstance(reward, JudgeReward):
        _check_judge(reward)
    else:
        assert isinstance(reward, ModelReward)  # noqa: S101 - a kind that is added here is forgotten by nobody


def _check_function(reward: FunctionReward) -> None:
    if not reward.name.isidentifier():
        raise RecipeError(f"`name: {reward.name}` is no name of a function")
    if reward.path is not None:
        return
    if reward.name not in BUILT_IN:
        raise RecipeError(
            f"there is no function `{reward.name}` of tunedock's own ({', '.join(BUILT_IN)})",
            hint=f"say where it is: `{{kind: function, path: rewards.py, name: {reward.name}}}`",
        )
    unknown = [name for name in reward.args if name not in BUILT_IN[reward.name]]
    if unknown:
        takes = ", ".join(f"`{name}`" for name in BUILT_IN[reward.name])
        raise RecipeError(f"`{reward.name}` takes no `{unknown[0]}` among its `args`", hint=f"it takes {takes}")
    if reward.name == "regex_match":
        _check_pattern("args.pattern", reward.args.get("pattern"))
    if reward.name == "length_penalty":
        free, most = (reward.args.get(name) for name in BUILT_IN["length_penalty"])
        if not (type(free) is int and type(most) is int and 0 <= free < most):
            raise RecipeError(
                "`length_penalty` needs `args` with whole numbers, `free_tokens` smaller than `max_tokens`",
                hint="for example `args: {free_tokens: 200, max_tokens: 256}`",
            )


def _check_judge(reward: JudgeReward) -> None:
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not reward.base_url.startswith(("http://", "https://")):
        raise RecipeError(
            f"`base_url: {reward.base_url}` is no URL", hint="write for example `base_url: http://localhost:8000/v1`"
        )
    if "@" in reward.base_url.split("://", 1)[1].split("/", 1)[0]:
        raise RecipeError(
            "`base_url` holds a password, and a recipe is kept with its run",
            hint="put the key into an environment variable and name that in `api_key_env`",
        )
    if reward.scale[0] == reward.scale[1]:
        raise RecipeError(
            "`scale` has one value twice, so all scores would be the same", hint="write for example `scale: [0, 10]`"
        )
    if reward.parse == "regex" and _check_pattern("pattern", reward.pattern).groups != 1:
        raise RecipeError(
            f"`pattern: {reward.pattern}` needs one group, around the score", hint=r"for example `Score: (\d+)`"
        )
    try:
        ImmutableSandboxedEnvironment().parse(reward.prompt or "")
    except TemplateSyntaxError as error:
        raise RecipeError(f"`prompt` is no Jinja template: {error.message} (its line {error.lineno})") from None


def _check_pattern(key: str, pattern: object) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise RecipeError(
            f"`{key}` must be a regular expression", hint=r"for example `pattern: '<answer>\d+</answer>'`"
        )
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"`{key}: {pattern}` is no regular expression: {error}") from None
