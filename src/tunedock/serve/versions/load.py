"""A version -> what answers: its files held against their sums, then an engine of them.

What computes is imported where a version needs it: a GGUF file is served without PyTorch, as small images do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tunedock.errors import CheckError, RunError
from tunedock.plan import control_group
from tunedock.recipe.serving import ServeOrder
from tunedock.registry.digest import files_of, require_same, stamps
from tunedock.registry.record import Kind, Version
from tunedock.registry.source import PARTS
from tunedock.serve.exported import engine_of, limits_of
from tunedock.serve.loading import require_torch
from tunedock.serve.versions.bases import Bases
from tunedock.serve.versions.loaded import Loaded
from tunedock.serve.versions.room import require_room


def load_version(version: Version, order: ServeOrder, bases: Bases) -> Loaded:
    """Raises CheckError for files that are not what was registered, ModelError, RecipeError or RunError for what cannot be served,
    NoRoomError where it does not fit into memory beside what is there."""
    place, kind = version.place, version.record.kind
    if not (place.is_file() if kind == "gguf" else place.is_dir()):
        raise RunError(
            f"{version} is not there",
            where=str(place),
            hint="put its files back, or register them where they are as a new version",
        )
    files = files_of(place, only=PARTS[kind])
    before = stamps(files)
    require_same(place, files, version.record.sums(), str(version))
    loaded = _LOAD[kind](version, order, bases)
    if stamps(files_of(place, only=PARTS[kind])) != before:
        loaded.close()
        raise CheckError(f"{version} was changed while it was loaded", where=str(place), hint="register it anew")
    return loaded


def _run(version: Version, order: ServeOrder, bases: Bases) -> Loaded:
    require_torch(str(version))
    from tunedock.serve.versions.computed import run_version

    return run_version(version, order, bases)


def _adapter(version: Version, order: ServeOrder, bases: Bases) -> Loaded:
    require_torch(str(version))
    from tunedock.serve.versions.computed import adapter_version

    return adapter_version(version, order, bases)


def _folder(version: Version, order: ServeOrder, _bases: Bases) -> Loaded:
    require_torch(str(version))
    from tunedock.serve.versions.computed import folder_version

    return folder_version(version, order)


def _gguf(version: Version, order: ServeOrder, _bases: Bases) -> Loaded:
    from tunedock.serve.engines.gguf import tokenizer_of
    from tunedock.serve.engines.llama import from_gguf

    require_room(version, version.place.stat().st_size, control_group.host_free_bytes(control_group.groups()))
    tokenizer = tokenizer_of(version.place)
    generator = from_gguf(version.place, limits=limits_of(order))
    return Loaded(version, engine_of(version.place.parent, generator, tokenizer), None, generator.close)


_LOAD: Mapping[Kind, Callable[[Version, ServeOrder, Bases], Loaded]] = {
    "run": _run,
    "folder": _folder,
    "adapter": _adapter,
    "gguf": _gguf,
}
