"""Data in images, brought to this machine before a stage reads them.

A run keeps which content each image stood for when it began, so a name that moves in between moves no run: it goes on, and is
evaluated, with what it began with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from tunedock.launch.watch import OnEvent
from tunedock.pipeline.notes import note_event, progress_event
from tunedock.recipe.data_images import DATA_IMAGES, image_of, images_of, pinned
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run

TELL_EVERY_S = 0.1


def brought(recipe: Recipe, on_event: OnEvent) -> Recipe:
    """The recipe with each image's content on this machine and named. Raises what `image.data_cache.bring` does."""
    return pinned(recipe, _bring(recipe, {}, on_event))


def bring_for(run: Run, on_event: OnEvent) -> None:
    """Has what a run's images stood for when it began on this machine, and the run know what that is."""
    recipe = Recipe.model_validate(run.resolved()["recipe"])
    if not images_of(recipe):
        return
    lineage = run.state().lineage
    known = dict(lineage.get(DATA_IMAGES, {}))
    found = _bring(recipe, known, on_event)
    if found != known:
        run.update(lineage={**lineage, DATA_IMAGES: found})


def _bring(recipe: Recipe, known: Mapping[str, str], on_event: OnEvent) -> dict[str, str]:
    """Path of a source -> revision. `known`: those that are not asked for again."""
    found = dict(known)
    for source in images_of(recipe):
        from tunedock.image.data_cache import bring  # asks for Docker's SDK, which few recipes need

        name, wanted = image_of(source), source.revision or found.get(source.path)
        if name is None:
            continue
        revision = bring(name, wanted, offline=recipe.offline, tell=_teller(on_event))
        if wanted is None:
            on_event(note_event(f"{source.path} is {revision}"))
        if source.revision is None:
            found[source.path] = revision
    return found


def _teller(on_event: OnEvent) -> Callable[[str, int, int | None], None]:
    last = 0.0

    def tell(task: str, done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= TELL_EVERY_S:
            last = now
            on_event(progress_event(task, done, total, "bytes"))

    return tell
