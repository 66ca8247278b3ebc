"""`stage:NAME` in a recipe of a chain: where it may stand, and what is put in its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tunedock.errors import RecipeError
from tunedock.recipe.document import Key, dotted

REFERENCE = re.compile(r"stage:([A-Za-z][A-Za-z0-9_-]*)")
Use = Literal["weights", "run"]
_RUN_KEYS = re.compile(r"objective\.rewards\.\d+(\.path)?|adapter\.continue_from|model\.adapters\.\d+")


@dataclass(frozen=True, slots=True)
class Reference:
    """A place in a stage that takes another stage's result."""

    stage: str
    key: str
    use: Use


def _use(key: Key) -> Use | None:
    """What a reference means at a key; None where it means nothing."""
    if key in (("model",), ("model", "path")):
        return "weights"
    return "run" if _RUN_KEYS.fullmatch(dotted(key)) else None


def references_in(value: Any, key: Key) -> Iterator[Reference]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield from references_in(child, (*key, name))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from references_in(child, (*key, index))
    elif isinstance(value, str) and (found := REFERENCE.fullmatch(value)):
        use = _use(key)
        if use is None:
            raise RecipeError(
                f"`{dotted(key)}: {value}`: no stage's result can stand there",
                hint="`model`, a reward's `path`, `adapter.continue_from` and `model.adapters` take one",
            )
        yield Reference(found[1], dotted(key), use)


def replaced(value: Any, key: Key, put: Callable[[Reference], str]) -> Any:
    """The value with `put`'s text in the place of references. A bare one among rewards is a reward model."""
    if isinstance(value, dict):
        return {name: replaced(child, (*key, name), put) for name, child in value.items()}
    if isinstance(value, list):
        return [replaced(child, (*key, index), put) for index, child in enumerate(value)]
    if isinstance(value, str) and REFERENCE.fullmatch(value):
        (reference,) = references_in(value, key)
        text = put(reference)
        return {"kind": "model", "path": text} if key[:-1] == ("objective", "rewards") else text
    return value
