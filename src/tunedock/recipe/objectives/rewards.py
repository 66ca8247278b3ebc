"""What scores an answer that was made while training: a reward model, a Python function, a model that judges."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tunedock.recipe.section import Section

BUILT_IN: dict[str, tuple[str, ...]] = {
    "exact_match": ("column", "ignore_case"),
    "regex_match": ("pattern",),
    "length_penalty": ("free_tokens", "max_tokens"),
}
"""Functions that come with tunedock -> the `args` they take."""

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class ModelReward(Section):
    """A reward model's score of prompt and answer."""

    kind: Literal["model"] = "model"
    path: str
    """A run of `objective: reward`, a folder or a hub id."""
    revision: str | None = None
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model you trust."""
    name: str | None = None
    """What the metric `rewards/<name>` is called; `model` by default."""
    weight: float = 1.0


class FunctionReward(Section):
    """A Python function, by TRL's convention: `f(prompts, completions, completion_ids, **columns)` gives a number for each
    completion, or None where it has no say. It is code that runs while training: name only what you have read."""

    kind: Literal["function"] = "function"
    name: str
    """The function. Without `path` one of tunedock's own: `exact_match`, `regex_match`, `length_penalty`."""
    path: str | None = None
    """A Python file, or an installed module by its dotted name."""
    args: dict[str, Any] = {}
    """Further keyword arguments."""
    sha256: str | None = None
    """Of the file, filled in when the run begins: it goes on with the same code, or not at all."""
    weight: float = 1.0


class JudgeReward(Section):
    """A model behind an OpenAI-compatible endpoint, asked for a score; needs `tunedock[judge]`."""

    kind: Literal["judge"] = "judge"
    base_url: str
    """For example `http://localhost:8000/v1`."""
    model: str
    """The model's name there."""
    prompt: str | None = None
    """A Jinja template, with `prompt` (the messages), `question` (the last of the user), `completion`, `answer` (the row's own),
    `columns`, `worst`, `best` and `form` (how to reply); by default it asks how well the question is answered."""
    system: str | None = None
    parse: Literal["json", "regex"] = "json"
    """How the score is read: a JSON object that is the whole reply (or its one code block), or the one group of `pattern`."""
    key: str = "score"
    """Of the JSON object."""
    pattern: str = r"[Ss]core:\s*(-?\d+(?:\.\d+)?)"
    """A regular expression; where it matches more than once, all matches must say the same."""
    scale: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.0, 10.0]
    """The worst and the best score, which become 0 and 1. What lies beyond is no score."""
    temperature: NonNegativeFloat = 0.0
    max_tokens: PositiveInt = 512
    api_key_env: str | None = None
    """The environment variable that holds the key, where the server wants one. The key itself is kept nowhere."""
    concurrency: PositiveInt = 8
    """Requests under way at once."""
    timeout_s: PositiveFloat = 60.0
    """Of one request."""
    max_retries: NonNegativeInt = 4
    """Further tries for a request that failed, or a reply without a score."""
    on_error: Literal["error", "skip"] = "error"
    """When no try gave a score: end the run, or leave the judge out of this answer's reward."""
    name: str | None = None
    """What the metric `rewards/<name>` is called; `judge` by default."""
    weight: float = 1.0


AnyReward = FunctionReward | ModelReward | JudgeReward


def widened(value: Any) -> Any:
    """`exact_match` is `{kind: function, name: exact_match}`, `rewards.py:exact` has a `path` too; settings without a kind are a
    function's."""
    if isinstance(value, str):
        path, colon, name = value.rpartition(":")
        return {"kind": "function", "name": name, **({"path": path} if colon else {})}
    return {"kind": "function", **value} if isinstance(value, dict) else value


Reward = Annotated[
    Annotated[AnyReward, Field(discriminator="kind")],
    BeforeValidator(widened, json_schema_input_type=str | AnyReward),
]


def names_module(path: str) -> bool:
    """Whether a function's `path` is a module's dotted name, and no file."""
    return not path.endswith(".py") and _MODULE.fullmatch(path) is not None


def labels(rewards: Sequence[AnyReward]) -> list[str]:
    """A name for each, no two alike: `exact`, `model`, `model-2`."""
    found: list[str] = []
    for reward in rewards:
        name = reward.name or reward.kind
        number, label = 1, name
        while label in found:
            number += 1
            label = f"{name}-{number}"
        found.append(label)
    return found
