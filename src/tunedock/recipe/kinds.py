"""Sections that come in kinds, and what stays of one when its kind changes.

A key stays where the new kind has one of the same name, type and description: the `rewards` of a GRPO are those of a PPO. A key of
the same name that means another thing (`beta` of DPO and of ORPO), and one that the new kind lacks, go.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tunedock.recipe.adapters import Adapter
from tunedock.recipe.document import Key
from tunedock.recipe.objectives import Kinds
from tunedock.recipe.objectives.rollout import Engine

KINDS: Mapping[Key, str | None] = {("objective",): None, ("adapter",): "lora", ("objective", "engine"): "local"}
"""The sections that have kinds -> the kind that settings without one are meant for. A bare string there is the kind."""

_UNIONS: Mapping[Key, Any] = {("objective",): Kinds, ("adapter",): Adapter, ("objective", "engine"): Engine}


def kept(section: Key, before: str, after: str) -> frozenset[str]:
    """Keys of the kind `before` that mean the same to the kind `after`; none where one of the two is no kind."""
    kinds = _kinds(section)
    old, new = kinds.get(before, {}), kinds.get(after, {})
    return frozenset(name for name, field in old.items() if name in new and _same(field, new[name]))


@cache
def _kinds(section: Key) -> dict[str, dict[str, FieldInfo]]:
    found = {}
    for model in _models(_UNIONS[section]):
        fields = dict(model.model_fields)
        found[str(fields.pop("kind").default)] = fields
    return found


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def _same(one: FieldInfo, other: FieldInfo) -> bool:
    return (one.annotation, one.metadata, one.description) == (other.annotation, other.metadata, other.description)
