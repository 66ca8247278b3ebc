"""`launch.grace_s`: a stop by SIGTERM ends with a saved state before the SIGKILL that follows it.

Whether that can be is looked at before the first step, by the size of a checkpoint and a short write to its disk. What saves then
really take is measured; one that takes longer than the grace is warned of once. When the SIGTERM comes, a save that would not be
whole in what is left of the grace is not begun: the run ends in order with the checkpoint before.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

from tunedock.errors import DiskError, RecipeError
from tunedock.events import Emitter
from tunedock.plan.memory import readable

PROBE_BYTES = 32 << 20
"""Written at most to measure a disk."""

PROBE_S = 1.0
"""How long that may take, but for the last flush."""

CHUNK_BYTES = 1 << 20

ROOM = 1.5
"""A grace that is proposed is this many times a save: the row in progress comes first, and disks have bad days."""

MORE_TIME = (
    "what sends the SIGTERM must wait as long (`docker stop --time`, `terminationGracePeriodSeconds`); saves are shorter with "
    "`adapter: lora` or on a faster disk"
)


class Grace:
    """How long a stop may take, how much of that is left, and what saves have taken."""

    def __init__(self, seconds: float, left_s: Callable[[], float | None], emit: Emitter) -> None:
        """`left_s`: seconds until a SIGKILL; None while no SIGTERM has come."""
        self._seconds = seconds
        self._left_s = left_s
        self._emit = emit
        self._told = False
        self.longest_save_s = 0.0

    def saved_in(self, seconds: float) -> None:
        """A save took so long. Warns of the first that is longer than the grace."""
        self.longest_save_s = max(self.longest_save_s, seconds)
        if seconds > self._seconds and not self._told:
            self._told = True
            self._emit.warning(
                f"a checkpoint took {seconds:.0f} s, longer than a stop may take: stopped by SIGTERM, the run goes back to the one "
                "before",
                where=f"launch.grace_s: {self._seconds:g}",
                hint=f"a new run with `launch.grace_s: {math.ceil(seconds * ROOM)}` allows for it; {MORE_TIME}",
            )

    def allows_a_save(self) -> bool:
        """Whether a save begun now is whole before the SIGKILL, as far as saves are known."""
        left = self._left_s()
        return left is None or self.longest_save_s <= left


def require_time_to_save(folder: Path, size_bytes: int, grace_s: float) -> None:
    """Raises RecipeError when a checkpoint of this size takes longer to write into `folder` than a stop may take."""
    per_second = bytes_per_second(folder, size_bytes)
    seconds = size_bytes / per_second
    if seconds > grace_s:
        raise RecipeError(
            f"a checkpoint is {readable(size_bytes)} and this disk takes {readable(round(per_second))} a second: a stop by SIGTERM "
            f"would need {seconds:.0f} s to save the state, and has {grace_s:g}",
            where=f"launch.grace_s: {grace_s:g}",
            hint=f"set `launch.grace_s: {math.ceil(seconds * ROOM)}`; {MORE_TIME}",
        )


def bytes_per_second(folder: Path, size_bytes: int) -> float:
    """What the disk takes when it is written to as a checkpoint is: hashed and flushed."""
    path = folder / ".probe.part"  # swept away with other parts, should we be killed
    wanted = min(max(size_bytes, 1), PROBE_BYTES)  # no more than a checkpoint takes: the disk may be a small one
    chunk = os.urandom(min(wanted, CHUNK_BYTES))
    digest, written, began = hashlib.sha256(), 0, time.monotonic()
    try:
        with path.open("wb") as file:
            while written < wanted and time.monotonic() - began < PROBE_S:
                written += file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        return written / max(time.monotonic() - began, 1e-6)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise DiskError(
            f"no checkpoint can be written: {error.strerror}",
            where=str(folder),
            hint=f"free disk space, then `tunedock train --resume {folder.parent}`",
        ) from error
    finally:
        path.unlink(missing_ok=True)
