"""`python -m tunedock.launch.alive RUN_DIR`: a container's health check. Ends with 0 where this host's training processes beat.

A pulse is written at least every five seconds, by a thread of its own, however long a step takes (`run.pulse`): one that is older
is of a process that is stopped or gone. Before there are processes, and between two starts, there is nothing to be ill.
"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

from tunedock.run.pulse import STILL_S, beats_of
from tunedock.run.record import Run

STALE_S = 12 * STILL_S
"""A machine that swaps misses a beat."""


def stale(run: Run, host: str, now: float) -> list[str]:
    """In words, the processes of `host` whose pulse has stopped."""
    beats = [beat for beat in beats_of(run.ranks) if beat.host == host]
    return [
        f"rank {beat.rank} has told nothing for {now - beat.time:.0f} s, at {beat.what} of step {beat.step}"
        for beat in beats
        if now - beat.time > STALE_S
    ]


def main(arguments: list[str]) -> int:
    found = stale(Run(Path(arguments[0])), socket.gethostname(), time.time())
    print("; ".join(found) or "well")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
