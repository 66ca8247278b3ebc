"""Devices a run is planned for: this machine, or a card by its name.

`cards.json` has memory as nvidia-smi tells it, and dense 16-bit tensor operations a second by the maker's data sheet.
"""

from __future__ import annotations

import difflib
import json
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import psutil

from tunedock.errors import RecipeError
from tunedock.plan import control_group

MIB = 1 << 20
SMI_TIMEOUT_S = 10
BF16_SINCE = 8.0
"""Compute capability of the first cards with bfloat16 products."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a run is planned for; memory is that of one device."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    """All there is on a card; on a CPU what is free now."""
    bf16: bool
    devices: int = 1
    teraflops: float | None = None
    """Of one device; None where nobody has measured it."""


def card(name: str, devices: int) -> Target:
    """A card by its short name. Raises RecipeError for one that is not in the table."""
    row = _table().get(name.lower())
    if row is None:
        near = difflib.get_close_matches(name.lower(), _table(), n=1)
        raise RecipeError(
            f"`{name}` is no card in the table",
            where="--gpu",
            hint=f"did you mean `{near[0]}`? " if near else f"known: {', '.join(_table())}",
        )
    return Target(
        str(row["name"]), "cuda", int(row["memory_mib"]) * MIB, bool(row["bf16"]), devices, float(row["teraflops"])
    )


def card_names() -> list[str]:
    return list(_table())


def this_machine(devices: int | None = None) -> Target:
    """Its NVIDIA cards where nvidia-smi finds some (the smallest of those used counts), else its main memory."""
    found = _cards_here()
    if found:
        used = found[: devices or len(found)]
        smallest = min(used, key=lambda one: one[1])
        row = next((row for row in _table().values() if row["name"] == smallest[0]), None)
        speed = None if row is None else float(row["teraflops"])
        return Target(smallest[0], "cuda", smallest[1], smallest[2] >= BF16_SINCE, devices or len(found), speed)
    free = int(psutil.virtual_memory().available)
    allowed = control_group.free_bytes(control_group.groups())
    return Target(
        "this machine's CPU", "cpu", free if allowed is None else min(free, allowed), cpu_has_bf16(), devices or 1
    )


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether bfloat16 products are native; emulated ones are slower than float32."""
    if not cpuinfo.exists():
        return False
    capabilities = cpuinfo.read_text(encoding="ascii", errors="replace")
    return any(flag in capabilities for flag in ("avx512_bf16", "amx_bf16", " bf16 "))


def _cards_here() -> list[tuple[str, int, float]]:
    """Name, bytes and compute capability of each NVIDIA card; none where there is no driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True).stdout  # noqa: S603 - nvidia-smi, found on the path
        return [_card_of(line) for line in said.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _card_of(line: str) -> tuple[str, int, float]:
    name, memory, capability = (part.strip() for part in line.rsplit(",", 2))
    return name, int(memory) * MIB, float(capability)


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(
        files("tunedock.plan").joinpath("cards.json").read_text(encoding="utf-8")
    )
    return table
