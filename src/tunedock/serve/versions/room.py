"""Whether a version fits into memory beside what is there: on a host nothing fails when memory runs out, the kernel kills."""

from __future__ import annotations

from pathlib import Path

from tunedock.errors import ModelError
from tunedock.registry.record import Version

ROOM = 1.2
"""Memory that must be free, of the bytes of a version's weights."""
WEIGHTS = (".safetensors", ".gguf")


class NoRoomError(ModelError):
    """There is no memory for a version beside those that are here."""


def require_room(version: Version, weights: Path, free_bytes: int, times: float = 1.0) -> None:
    """Raises NoRoomError where the weights of a file or folder, `times` over, would not fit."""
    files = [weights] if weights.is_file() else [path for path in weights.iterdir() if path.suffix in WEIGHTS]
    need = int(sum(path.stat().st_size for path in files) * times * ROOM)
    if need > free_bytes:
        raise NoRoomError(
            f"it takes about {need:,} bytes of memory beside what is there, and {free_bytes:,} are free",
            where=str(version),
            hint="--keep-warm 0, a shorter --max-length, or start the gateway again, which loads this version alone",
        )
