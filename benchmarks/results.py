"""What `make bench` leaves: one JSON file with every run in it, from which tables and plots are made again at any time."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import ROOT
from benchmarks.protocol import Measured

RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Machine:
    """No host names and no paths: what decides the figures, and nothing else."""

    cpu: str
    cores: int
    memory_gib: int
    torch: str
    threads: int
    bf16: bool
    """Whether the processor has bfloat16 dot products."""

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.cpu} {self.cores} cores".lower()).strip("-")


@dataclass(frozen=True, slots=True)
class Failure:
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Preparing:
    """Rows a second of preparing chats, by side; one figure a repeat."""

    rows: int
    workers: int
    rows_per_second: dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class StartUp:
    """Seconds, one figure a repeat."""

    bare_import_s: list[float]
    first_step_s: dict[str, list[float]]
    """Side and variant -> from the command to the end of the first step."""


@dataclass(frozen=True, slots=True)
class Peak:
    """Operations a second: the best bfloat16 product of the machine, and what SFT of `small` needs a second."""

    matmul: float
    best_shape: tuple[int, int, int]
    training: list[float]


@dataclass(slots=True)
class Report:
    machine: Machine
    date: str
    tunedock: str
    options: dict[str, Any]
    runs: list[Measured] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    preparing: Preparing | None = None
    start_up: StartUp | None = None
    peak: Peak | None = None

    @property
    def name(self) -> str:
        return f"{self.machine.slug}-{self.date}"

    def write(self, folder: Path) -> Path:
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> Report:
        """Raises OSError, ValueError, KeyError or TypeError on a file that `write` did not leave."""
        value = json.loads(path.read_text(encoding="utf-8"))
        value["machine"] = Machine(**value["machine"])
        value["runs"] = [Measured.from_json(run) for run in value["runs"]]
        value["failures"] = [Failure(**failure) for failure in value["failures"]]
        value["preparing"] = Preparing(**value["preparing"]) if value["preparing"] else None
        value["start_up"] = StartUp(**value["start_up"]) if value["start_up"] else None
        if value["peak"]:
            value["peak"] = Peak(**{**value["peak"], "best_shape": tuple(value["peak"]["best_shape"])})
        return cls(**value)


def this_machine() -> Machine:
    import torch

    from tunedock.model.load import has_bf16
    from tunedock.train.machine import hardware

    about = hardware()
    return Machine(
        cpu=about["cpu"],
        cores=about["cores"],
        memory_gib=round(about["memory_bytes"] / 2**30),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        bf16=has_bf16(torch.device("cpu")),
    )
