"""Whether a version fits into memory beside what is there: on a host nothing fails when memory runs out, the kernel kills."""

from __future__ import annotations

from tunedock.errors import ModelError
from tunedock.registry.record import Version

ROOM = 1.2
"""Memory that must be free, of the bytes of a version's weights."""


class NoRoomError(ModelError):
    """There is no memory for a version beside those that are here."""


def require_room(version: Version, weights_bytes: int, free_bytes: int) -> None:
    """Raises NoRoomError where weights that take so many bytes in memory would not fit."""
    need = int(weights_bytes * ROOM)
    if need > free_bytes:
        raise NoRoomError(
            f"it takes about {need:,} bytes of memory beside what is there, and {free_bytes:,} are free",
            where=str(version),
            hint="--keep-warm 0, a shorter --max-length, or start the gateway again, which loads this version alone",
        )
