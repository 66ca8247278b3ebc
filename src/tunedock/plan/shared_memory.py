"""What a run's processes hold in /dev/shm: a container has 64 MiB there unless it asks for more, and a bus error is all it says."""

from __future__ import annotations

BASE_BYTES = 64 << 20
"""What an engine gives by itself: enough for semaphores and for what one process shares with itself."""

A_PEER_BYTES = 1 << 30
"""For each process on a GPU of several: NCCL's buffers to the others where cards do not reach each other directly (some megabytes
a channel and peer). It is a bound, not a cost: pages that nobody writes take no memory."""

MOST_SHARE = 0.5
"""Of the container's memory: what stands in /dev/shm counts there too."""


def shared_memory_bytes(processes: int, *, gpus: bool, memory_bytes: int | None) -> int:
    """`processes`: on this machine; on CPUs they talk over sockets. `memory_bytes`: the container's limit, None for none."""
    wanted = BASE_BYTES + (A_PEER_BYTES * processes if gpus and processes > 1 else 0)
    return wanted if memory_bytes is None else max(min(wanted, int(memory_bytes * MOST_SHARE)), BASE_BYTES)
