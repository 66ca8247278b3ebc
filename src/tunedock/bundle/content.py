"""What of a recipe or a run goes into a bundle: the files it names, and a recipe that finds them beside itself.

Every path of the recipe becomes one relative to it, a model on a hub the folder of the cache, so that `tunedock train recipe.yaml`
means on the other machine what it means here.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunedock import __version__
from tunedock.errors import DataError, ModelError, RecipeError
from tunedock.recipe.document import Key, at, dotted
from tunedock.recipe.resolve import Resolved, path_keys
from tunedock.recipe.schema import Recipe
from tunedock.recipe.write import commented_yaml
from tunedock.run.record import Run

RECIPE = "recipe.yaml"
COMPOSE = "compose.yaml"
OUTPUTS = frozenset({("train", "output_dir"), ("data", "cache_dir"), ("objective", "engine", "adapter_dir")})
"""Paths that a run writes to: the other machine has its own."""

UNUSED = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot")
"""Weights in formats that tunedock does not read; left out beside safetensors."""

_GLOB = re.compile(r"[*?\[]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass
class Content:
    files: dict[str, Path] = field(default_factory=dict)
    """Path in the bundle -> file here."""
    texts: dict[str, bytes] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """Files of a model that tunedock does not read, and keys of the recipe that mean something on this machine alone."""

    def add(self, path: str, source: Path) -> None:
        if not source.is_file():
            raise RecipeError(
                "this is no file, or a link to nothing", where=str(source), hint="a bundle holds plain files"
            )
        self.files[path] = source

    def add_tree(self, place: str, folder: Path, *, model: bool = False) -> None:
        """All files below a folder, links followed where they lead to files. Raises RecipeError for links to folders."""
        chosen = list(_files(folder))
        safe = model and any(path.suffix == ".safetensors" for path in chosen)
        for path in chosen:
            relative = path.relative_to(folder).as_posix()
            if safe and path.suffix in UNUSED:
                self.left_out.append(str(path))
            else:
                self.add(f"{place}/{relative}", path)
        if not chosen:
            raise RecipeError("the folder is empty", where=str(folder))


def of_recipe(resolved: Resolved, *, data: bool = True, model: bool = True) -> Content:
    """The recipe and all it reads; without `data` or `model`, those keys are left as names to be given on the other machine.

    Raises DataError and ModelError for what only a network has.
    """
    content = Content()
    values = copy.deepcopy(resolved.recipe.model_dump(mode="json"))
    if values["launch"]["container"]["mounts"]:  # folders of this machine, which hold anything
        values["launch"]["container"]["mounts"] = []
        content.left_out.append("launch.container.mounts")
    for key in _keys(values):
        value = at(values, key)
        if value is None:
            continue
        if key in OUTPUTS:
            _set(values, key, None)
            continue
        if (key[0] == "data" and not data) or (key == ("model", "path") and not model):
            continue
        place = (
            "model"
            if key == ("model", "path")
            else "/".join(("inputs", dotted(key).removesuffix(".path").replace(".", "-")))
        )
        _set(values, key, _take(content, key, value, place, resolved.recipe))
    values["offline"] = True
    if model:
        values["model"]["revision"] = None  # the folder is of that one
    head = f"# Bundled by tunedock {__version__} from the recipe with the hash {resolved.hash}; its paths start from this file.\n"
    text = head + commented_yaml(values, {}, leave_out=("train", "output_dir"))
    content.texts[f"content/{RECIPE}"] = text.encode()
    return content


def of_run(run: Run, *, data: bool = True, model: bool = True) -> Content:
    """A run's recipe, what it reads, and what it made (`adapter/`). Raises RunError for a run without a result."""
    run.require_model()
    content = of_recipe(Resolved.from_json(run.resolved()), data=data, model=model)
    content.add_tree("content/adapter", run.model)
    return content


def compose(image: str) -> bytes:
    """A compose file that trains by the bundle's recipe in a container without a network, as whoever installed it.

    A recipe that asks for containers is in one by then, which has no engine: there it is trained as by one machine without.
    """
    service = {
        "image": image,
        "command": ["tunedock", "train", RECIPE, "launch.on=local", "launch.nodes=1"],
        "working_dir": "${PWD}",
        "volumes": [{"type": "bind", "source": "${PWD}", "target": "${PWD}"}],  # not `a:b`: a path may hold a colon
        "user": "${TUNEDOCK_USER}",
        "network_mode": "none",
        "shm_size": "1gb",
    }
    head = "# docker compose run --rm train\n# GPUs: your version of compose says how (`gpus: all`, or a device).\n"
    return (head + commented_yaml({"services": {"train": service}}, {}, leave_out=("-",))).encode()


def _take(content: Content, key: Key, value: str, place: str, recipe: Recipe) -> str:
    """Puts in what a path names; the path relative to the recipe."""
    path = Path(value)
    if not path.is_absolute():
        path = _cached(key, value, recipe)
    if path.is_dir():
        content.add_tree(f"content/{place}", path, model=key[0] == "model")
        return place
    if path.is_file():
        content.add(f"content/{place}/{path.name}", path)
        return f"{place}/{path.name}"
    fixed = Path(*_until_glob(path))
    pattern = path.relative_to(fixed).as_posix()
    found = [file for file in sorted(fixed.glob(pattern)) if file.is_file()]
    if not found:
        raise DataError("nothing is there", where=f"{dotted(key)}: {value}")
    for file in found:
        content.add(f"content/{place}/{file.relative_to(fixed).as_posix()}", file)
    return f"{place}/{pattern}"


def _until_glob(path: Path) -> Iterator[str]:
    for part in path.parts:
        if _GLOB.search(part):
            return
        yield part


def _cached(key: Key, value: str, recipe: Recipe) -> Path:
    """The folder of a model that is named by its hub id, as the cache has it."""
    where = f"{dotted(key)}: {value}"
    if _URL.match(value) or key[0] == "data":
        raise DataError(
            "this is fetched from a network, which the bundle is to do without",
            where=where,
            hint="download it, and name the files",
        )
    if recipe.hub == "modelscope":
        raise ModelError(
            "models of ModelScope are bundled from a folder", where=where, hint="download it, and name its folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = recipe.model.revision if key == ("model", "path") else None
    try:
        return Path(snapshot_download(value, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise ModelError(
            f"the model is not in this machine's cache ({type(error).__name__})",
            where=where,
            hint=f"`hf download {value}` fetches it",
        ) from None


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        for name in folders:
            if (here / name).is_symlink():
                raise RecipeError(
                    "a link to a folder is not followed", where=str(here / name), hint="put the folder in its place"
                )
        folders[:] = sorted(name for name in folders if name not in {".git", ".cache", "__pycache__"})
        yield from (here / name for name in sorted(names))


def _keys(values: dict[str, Any]) -> list[Key]:
    return [key for key, _must_exist, _hub in path_keys(values)]


def _set(values: Any, key: Key, value: Any) -> None:
    for part in key[:-1]:
        values = values[part]
    values[key[-1]] = value
