"""Files packed into an image: listed and counted by the work plane, named and handed to an engine by this one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunedock.errors import RecipeError
from tunedock.image import data_image
from tunedock.image.reference import parse
from tunedock.launch.job import JobSpec, Launcher
from tunedock.launch.watch import OnEvent
from tunedock.pipeline.jobs import run_job
from tunedock.pipeline.notes import note_event
from tunedock.recipe.data_images import LAYER, Packed, Packing
from tunedock.recipe.described import sources_of


def make_data_image(
    given: str,
    *,
    tag: str | None,
    to: Path | None,
    labels: Mapping[str, str],
    offline: bool = False,
    on_event: OnEvent,
    launcher: Launcher | None = None,
) -> dict[str, Any]:
    """Packs one source into an image: loaded into the engine as `tag`, or written to the file `to`.

    Raises RecipeError, DataError for files that cannot be read, EngineError, RunError for a file that is there, DiskError.
    """
    reference = parse(tag) if tag is not None else None
    if (reference is None and to is None) or (reference is not None and reference.digest is not None):
        raise RecipeError(
            "an image needs a name", where="--tag", hint="give one: --tag registry.example/support-data:v3"
        )
    began = time.monotonic()
    sources, notes = sources_of([given], {}, hub="hf", cwd=Path.cwd())
    for note in notes:
        on_event(note_event(note))
    with tempfile.TemporaryDirectory(prefix="tunedock-data-") as folder:
        order = Packing(source=sources[0], folder=folder, offline=offline)
        packed = Packed.model_validate(
            run_job(JobSpec("data-pack", None, order.model_dump(mode="json")), on_event, launcher)
        )
        layer = Path(folder, LAYER)
        for name, what in data_image.secrets(layer):
            on_event(note_event(f"{name} holds what looks like {what}, and whoever pulls the image has it", name=name))
        about = data_image.configuration(
            packed, data_image.labels(packed, labels, reference.tag if reference else None)
        )
        named = None if reference is None or tag is None else data_image.name_for_engines(reference, tag)
        pieces = data_image.archive(layer, packed, about, named)
        if to is not None:
            data_image.write(pieces, to, layer.stat().st_size)
        else:
            data_image.load(pieces, str(named), packed)
    return {
        **packed.model_dump(mode="json"),
        "rows": sum(packed.files.values()),
        "name": named,
        "file": str(to) if to else None,
        "seconds": time.monotonic() - began,
    }
