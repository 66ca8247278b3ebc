"""A model's config.json without fetching it: from its folder, from the hub's cache on this machine, or from the shapes of
well-known models that come with tunedock.

`shapes.json` holds for each the ids that share a shape, the keys of its config that decide its size, and the number of parameters
its makers say it has, which a test holds against the arithmetic. Of models that also see images, the part that reads text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tunedock.errors import ModelError
from tunedock.recipe.schema import Model


@dataclass(frozen=True, slots=True)
class Shape:
    config: Mapping[str, Any]
    source: str
    """Where it was found, in words."""


def find_shape(model: Model) -> Shape:
    """The config of a recipe's model, its overrides applied. Raises ModelError when nothing here tells it."""
    found = _in_folder(Path(model.path).expanduser()) or _in_cache(model.path) or _shipped(model.path)
    if found is None:
        raise ModelError(
            "the size of this model is not known here: there is no such folder, it is not in the hub's cache, and it is "
            "none of the well-known models",
            where=f"model: {model.path}",
            hint="fetch the model first, or put its config.json into a folder and give that as `model.path`",
        )
    return Shape({**found.config, **model.config_overrides}, found.source)


def known_models() -> list[str]:
    """The ids whose shapes come with tunedock."""
    return list(_table())


def _in_folder(folder: Path) -> Shape | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    return Shape(_read(path), str(path))


def _in_cache(path: str) -> Shape | None:
    """The newest snapshot of a hub id that has a config.json."""
    if path.count("/") != 1 or path.startswith(("/", ".", "~")):
        return None
    name = f"models--{path.replace('/', '--')}"
    snapshots = [found for cache_ in _caches() for found in (cache_ / name / "snapshots").glob("*/config.json")]
    if not snapshots:
        return None
    newest = max(snapshots, key=lambda found: found.stat().st_mtime)
    return Shape(_read(newest), "the hub's cache")


def _caches() -> Iterator[Path]:
    """Where huggingface_hub keeps models, by its environment variables."""
    if hub := os.environ.get("HF_HUB_CACHE"):
        yield Path(hub).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    yield Path(os.environ.get("HF_HOME") or caches / "huggingface").expanduser() / "hub"


def _shipped(path: str) -> Shape | None:
    config = _table().get(path)
    return None if config is None else Shape(config, "the shapes of well-known models")


@cache
def _table() -> dict[str, Mapping[str, Any]]:
    rows = json.loads(files("tunedock.plan").joinpath("shapes.json").read_text(encoding="utf-8"))
    # All of them are published in bfloat16.
    return {name: {"dtype": "bfloat16", **row["config"]} for row in rows for name in row["ids"]}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"config.json cannot be read: {error}", where=str(path), hint="fetch or copy it again"
        ) from None
    if not isinstance(value, dict):
        raise ModelError("config.json holds no object", where=str(path), hint="fetch or copy it again")
    return value
