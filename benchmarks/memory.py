"""Peak resident memory of a process and its children.

A thread samples the sum. Between two samples a short peak would be missed, so where the kernel keeps a high-water mark of each
process (Linux), the marks of those alive are summed: exact for one process, never too low for several.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import psutil

SAMPLE_S = 0.05
CHILDREN_S = 0.5
"""Listing children reads every process of the machine; that often is enough to see the workers of a data loader."""


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of one process now; 0 when it has ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def high_water_bytes(pid: int) -> int:
    """Linux's own peak of one process; 0 where it is not told."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


class PeakMemory:
    """`with PeakMemory(pid) as memory: ...`, then `memory.peak_bytes`."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._tree = [self._root]
        self._peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def peak_bytes(self) -> int:
        return max(self._peak, high_water_bytes(self._root.pid))

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._peak = self.peak_bytes

    def _watch(self) -> None:
        since_listed = CHILDREN_S
        while not self._done.is_set():
            if since_listed >= CHILDREN_S:
                self._list()
                since_listed = 0.0
            self._peak = max(self._peak, sum(_peak_of(process) for process in self._tree))
            since_listed += SAMPLE_S
            self._done.wait(SAMPLE_S)

    def _list(self) -> None:
        try:
            self._tree = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            self._tree = []


def _peak_of(process: psutil.Process) -> int:
    return high_water_bytes(process.pid) or resident_bytes(process.pid)
