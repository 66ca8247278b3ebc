"""Data in an image: how a source names one, and where its files stand on this machine once they are here.

    data:
      train: image://registry.example/support-data:v3        # what the name stands for when the run begins
      train: {path: image://support-data:v3, revision: sha256:6f0c...}   # this content, or an error

The revision is the SHA-256 of the one layer's archive. It is the same whoever packs the same files, and what a folder of the cache
is named by. The control plane brings the content here (`image.data_cache`); whoever reads rows finds the folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tunedock.recipe.schema import Recipe, Source
from tunedock.recipe.section import Section

SCHEME = "image://"
CACHE = Path("~/.cache/tunedock/images")
DATA_IMAGES = "data_images"
"""Of a run's lineage: which revision each image stood for when the run began, by the source's path."""

LAYER = "layer.tar"
"""What the stage `data-pack` leaves in its folder."""

_REVISION = re.compile(r"sha256:[0-9a-f]{64}")


class Packing(Section):
    """The request of the stage `data-pack`."""

    source: Source
    folder: str
    """Absolute; where the layer is written."""
    hub: str = "hf"
    offline: bool = False


class Packed(Section):
    """What that stage says of the layer it has written."""

    revision: Annotated[str, Field(pattern=_REVISION.pattern)]
    files: dict[str, int]
    """Name -> rows."""
    unreadable: int
    """Rows among them that cannot be read."""
    bytes: int
    """Of the files."""


def image_of(source: Source) -> str | None:
    """The image that a source names; None for any other source."""
    return source.path.removeprefix(SCHEME) if source.path.startswith(SCHEME) else None


def is_revision(text: str) -> bool:
    return _REVISION.fullmatch(text) is not None


def folder_of(revision: str, cache: Path | None = None) -> Path:
    """Where the files of a revision stand, once they are here."""
    return (cache or CACHE.expanduser()) / revision.removeprefix("sha256:")


def images_of(recipe: Recipe) -> list[Source]:
    """The sources of a recipe that are images."""
    data = recipe.data
    return [source for source in (*data.train, *data.validation, *data.test) if image_of(source) is not None]


def pinned(recipe: Recipe, revisions: dict[str, str]) -> Recipe:
    """The recipe with the revision of every image that `revisions` (by the source's path) knows; a revision that is said stays."""
    if not images_of(recipe):
        return recipe
    sides = {
        side: [
            source
            if source.revision
            else source.model_copy(update={"revision": revisions.get(source.path)})
            if image_of(source) is not None
            else source
            for source in getattr(recipe.data, side)
        ]
        for side in ("train", "validation", "test")
    }
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=sides)})
