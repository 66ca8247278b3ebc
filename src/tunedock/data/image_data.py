"""Data in an image -> its files in a folder of this machine's cache, where the control plane has brought them (`image.data_cache`).

Where names of files tell splits, they are told apart by them as on a hub; elsewhere the image stands for all its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunedock.data import hub_data
from tunedock.errors import DataError
from tunedock.recipe.data_images import folder_of
from tunedock.recipe.schema import Source


def here(source: Source) -> Path:
    """The folder with an image's files. Raises DataError where they are not on this machine."""
    if source.revision is None:
        raise DataError(
            "it is not known which content this name stands for",
            where=source.path,
            hint="name it by `revision`, or read it by a command of tunedock, which asks the engine or the registry",
        )
    folder = folder_of(source.revision)
    if not folder.is_dir():
        raise DataError(
            f"the content {source.revision} of this image is not on this machine",
            where=source.path,
            hint=f"`tunedock data check` on this machine brings it; it was looked for in {folder}",
        )
    return folder


def pick(files: Sequence[str], source: Source) -> list[str]:
    """The files (paths within the image) of the source's subset and split. Raises DataError with the choices."""
    if source.subset is None and source.split == "train" and not hub_data.tell_splits(files):
        return list(files)
    return hub_data.pick(files, source)
