"""What the machine is and how busy it is: figures for the metrics events and for `environment.json`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from tunedock.plan.machine.system import processor_name

PACKAGES = (
    "tunedock",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "pyarrow",
    "pydantic",
)

_process = psutil.Process()
_process.cpu_percent()  # psutil measures between two calls; this is the first, so that no call of `usage` answers 0


def usage() -> dict[str, float]:
    """How much of the machine this process uses.

    memory_bytes         CUDA: the most its tensors took on the current device so far; CPU: resident memory now
    device_utilisation   percent. CUDA: share of the last moment in which a kernel ran, left out where NVML cannot say; CPU: of the
                         cores this process may run on, since the last call
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        busy = _cuda_utilisation()
        figures = {"memory_bytes": float(torch.cuda.max_memory_allocated())}
        return figures if busy is None else {**figures, "device_utilisation": busy}
    return {
        "memory_bytes": float(_process.memory_info().rss),
        "device_utilisation": min(_process.cpu_percent() / _cores(), 100.0),
    }


def hardware() -> dict[str, Any]:
    """The machine: CPU model, the cores this process may run on, memory, GPUs, NVIDIA's driver, torch's CUDA, the system.

    Memory in bytes; `driver` and `cuda` are null where there is none.
    """
    return {
        "cpu": processor_name(),
        "cores": _cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Version of Python and of each installed package that decides what a run computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cuda_utilisation() -> float | None:
    if not _nvml_answers():
        return None
    return float(torch.cuda.utilization())


@cache
def _nvml_answers() -> bool:
    """Asked once: the package may be missing, the driver out of reach in a container, the figure unsupported on a MIG slice."""
    try:
        torch.cuda.utilization()
    except Exception:  # noqa: BLE001 - NVML's errors can only be named where its package is; any of them means: no figure
        return False
    return True


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _driver() -> str | None:
    """Version of NVIDIA's kernel driver, as the driver itself says."""
    try:
        found = re.search(
            r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text("utf-8")
        )
    except OSError:
        return None
    return found.group(1) if found else None
