"""An export out of a container.

It is written beside its place and renamed at the end, for which the folder around it would have to be mounted, with all that is in
it. So a folder of its own is, and we move what was made from there.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tunedock.errors import DiskError
from tunedock.events import Event
from tunedock.launch.job import JobSpec


class ExportAside:
    def __init__(self, to: Path) -> None:
        """Raises DiskError where nothing can be written beside `to`."""
        self._to = to
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
        except OSError as error:
            raise DiskError(
                f"the export cannot be written: {error.strerror}",
                where=str(to),
                hint="give a folder that can be written by --to",
            ) from None

    @property
    def made(self) -> Path:
        return self.folder / self._to.name

    def spec(self, spec: JobSpec) -> JobSpec:
        """The same export, to the folder of its own."""
        return replace(spec, request={**spec.request, "to": str(self.made)})

    def finish(self, event: Event) -> Event:
        """Moves what was made to its place. Returns the result with that in it; raises DiskError."""
        try:
            if self._to.exists():
                self._to.rmdir()
            self.made.rename(self._to)
        except OSError as error:
            raise DiskError(f"the export cannot be moved to its place: {error.strerror}", where=str(self._to)) from None
        return {**event, "value": {**event["value"], "to": str(self._to)}}

    def close(self) -> None:
        with suppress(OSError):  # something is in it: then it is not for us to throw away
            self.folder.rmdir()
