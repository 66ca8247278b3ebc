"""Devices a run is planned for: this machine, or a card by its name.

`cards.json` has memory as nvidia-smi tells it, and dense 16-bit tensor operations a second by the maker's data sheet.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import psutil

from tunedock.errors import RecipeError
from tunedock.plan import control_group
from tunedock.plan.machine.bounds import MIB
from tunedock.plan.machine.cards import Cards, find

MAKERS_WORDS = "nvidia|geforce|rtx|tesla"
"""What people write in front of a card's number."""

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
    here: bool = False
    """This machine's, so that it can be measured."""
    measured: bool = False
    """Whether the teraflops are; else they are the maker's."""


def card(name: str, devices: int) -> Target:
    """A card by its short name. Raises RecipeError for one that is not in the table."""
    short = "-".join(re.sub(MAKERS_WORDS, " ", name.lower()).split())
    row = _table().get(short)
    if row is None:
        near = difflib.get_close_matches(short, _table(), n=1)
        raise RecipeError(
            f"`{name}` is no card in the table",
            where="--gpu",
            hint=f"did you mean `{near[0]}`?" if near else f"known: {', '.join(_table())}",
        )
    return Target(
        str(row["name"]), "cuda", int(row["memory_mib"]) * MIB, bool(row["bf16"]), devices, float(row["teraflops"])
    )


def card_names() -> list[str]:
    return list(_table())


def this_machine(devices: int | None = None) -> Target:
    """Its NVIDIA cards where nvidia-smi finds some (the smallest of those used counts), else its main memory."""
    found = [card for card in find().of("NVIDIA") if card.memory_bytes]
    if found:
        smallest = min(found[:devices], key=lambda card: card.memory_bytes or 0)
        row = next((row for row in _table().values() if row["name"] == smallest.name), None)
        bf16 = float(smallest.capability or 0) >= BF16_SINCE
        speed = None if row is None else float(row["teraflops"])
        return Target(smallest.name, "cuda", smallest.memory_bytes or 0, bf16, devices or len(found), speed, here=True)
    free = int(psutil.virtual_memory().available)
    allowed = control_group.free_bytes(control_group.groups())
    room = free if allowed is None else min(free, allowed)
    return Target("this machine's CPU", "cpu", room, cpu_has_bf16(), devices or 1, here=True)


def gpus_here(environment: Mapping[str, str] | None = None, *, look: Callable[[], Cards] = find) -> int:
    """NVIDIA cards a training here would use: those its PyTorch can, and CUDA_VISIBLE_DEVICES does not hide."""
    environment = os.environ if environment is None else environment
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if (shown is not None and shown.strip() in ("", "-1", "none", "NoDevFiles")) or not _torch_has_cuda():
        return 0
    cards = len(look().of("NVIDIA"))
    return cards if shown is None else min(cards, len(shown.split(",")))


def _torch_has_cuda() -> bool:
    """By its version alone: wheels for CPUs say so."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:  # it is in a container, or on the machines that train
        return True


CPUINFO = Path("/proc/cpuinfo")
BF16_UNITS = ("amx_bf16", " bf16 ")
"""Matrix instructions of Intel, and of Arm."""


def cpu_has_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether bfloat16 products are native; emulated ones are slower than float32."""
    return _has_any(("avx512_bf16", *BF16_UNITS), cpuinfo)


def cpu_has_bf16_unit(cpuinfo: Path = CPUINFO) -> bool:
    """Whether they are products of matrices too, not of vectors alone."""
    return _has_any(BF16_UNITS, cpuinfo)


def _has_any(flags: Sequence[str], cpuinfo: Path) -> bool:
    if not cpuinfo.exists():
        return False
    capabilities = cpuinfo.read_text(encoding="ascii", errors="replace")
    return any(flag in capabilities for flag in flags)


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(
        files("tunedock.plan").joinpath("cards.json").read_text(encoding="utf-8")
    )
    return table
