"""What memory is there for training and what is used: of the host and its control groups, or of a CUDA device.

On a host nothing fails when memory runs out: the kernel kills. So a row is looked at before it is computed (`looks_ahead`). CUDA
says so by an exception, and the step is done again.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import psutil
import torch

from tunedock.plan import control_group

SAMPLE_S = 0.02
"""How often resident memory is read while a peak is looked for. The kernel's own high-water mark cannot be used: it remembers the
loading of the model, and putting it back would hide that from everyone else who reads it."""


@dataclass(slots=True)
class Peak:
    """The most that was in use while it was watched."""

    size: int = 0


class Memory(Protocol):
    """Bytes, of one device."""

    @property
    def looks_ahead(self) -> bool:
        """Whether a row must be checked before it is computed, because running out of memory is no exception there."""

    def used_bytes(self) -> int:
        """What this process holds."""

    def free_bytes(self) -> int:
        """What this process can take on top."""

    def watched(self) -> AbstractContextManager[Peak]:
        """A context in which the peak of `used_bytes` is found; it is known at the end."""

    def release(self) -> None:
        """Gives back what is kept for reuse, after a step that did not fit."""


class HostMemory:
    """Main memory: the tightest of the host and the control groups the process is in."""

    looks_ahead = True

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._groups = control_group.groups()

    def used_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def free_bytes(self) -> int:
        return control_group.host_free_bytes(self._groups)

    @contextmanager
    def watched(self) -> Iterator[Peak]:
        peak, done = Peak(self.used_bytes()), threading.Event()

        def sample() -> None:
            while not done.wait(SAMPLE_S):
                peak.size = max(peak.size, self.used_bytes())

        sampler = threading.Thread(target=sample, name="peak memory", daemon=True)
        sampler.start()
        try:
            yield peak
        finally:
            done.set()
            sampler.join()
            peak.size = max(peak.size, self.used_bytes())

    def release(self) -> None:
        gc.collect()


class CudaMemory:
    """A CUDA device as torch's caching allocator sees it."""

    looks_ahead = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def used_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free) + torch.cuda.memory_reserved(self._device) - self.used_bytes()

    @contextmanager
    def watched(self) -> Iterator[Peak]:
        peak = Peak()
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield peak
        finally:
            peak.size = torch.cuda.max_memory_allocated(self._device)

    def release(self) -> None:
        gc.collect()  # a step that failed may leave its graph in a cycle, with the exception that ended it
        torch.cuda.empty_cache()


def memory_of(device: torch.device) -> Memory:
    return CudaMemory(device) if device.type == "cuda" else HostMemory()
