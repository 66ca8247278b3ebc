"""What imports cost by themselves: the time and the memory of a process that imports and does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BARE = ("torch", "transformers.models.qwen3.modeling_qwen3", "peft")
"""Without these no side can train."""

OUR_COMMAND = ("tunedock.cli.app", "tunedock.pipeline")
OUR_WORKER = (*BARE, "tunedock.worker", "tunedock.train.stage")

_CODE = """
import importlib, json, sys, time
for name in sys.argv[1:]:
    importlib.import_module(name)
ended = time.time()
import psutil
print(json.dumps({"at": ended, "bytes": psutil.Process().memory_info().rss}))
"""


@dataclass(frozen=True, slots=True)
class Imported:
    at: float
    """Seconds since the epoch at which the imports were done."""
    resident_bytes: int


def imported(modules: tuple[str, ...], python: Path | None = None) -> Imported:
    """Imports in a process of its own. Raises subprocess.CalledProcessError when a module is not there."""
    command = [str(python or sys.executable), "-c", _CODE, *modules]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return Imported(said["at"], said["bytes"])


def resident_after(modules: tuple[str, ...], python: Path | None = None) -> int:
    return imported(modules, python).resident_bytes
