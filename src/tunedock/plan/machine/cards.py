"""Graphics cards, asked of the driver and of the PCI bus, so that a card without a driver is found too."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunedock.plan.machine.bounds import BOUNDS, DRIVERS, MIB, Bounds, bytes_text, judge, measured
from tunedock.plan.machine.check import Check, absent, failure, warning
from tunedock.plan.machine.command import Runner, run
from tunedock.plan.machine.symptoms import known_way_out
from tunedock.plan.machine.system import wsl_version

GROUP = "gpu"

Vendor = Literal["NVIDIA", "AMD", "Intel", "Apple"]

VENDORS: dict[str, Vendor] = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
DISPLAY, ACCELERATOR = "0x03", "0x12"
"""PCI classes: display controllers, and processing accelerators (AMD's Instinct cards)."""

SMI = ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")
"""The second is WSL2's, whose folder `sudo` and some shells leave out of the path."""

QUERY = ("name", "memory.total", "driver_version", "compute_cap")
"""`compute_cap` is unknown to drivers before 510."""


@dataclass(frozen=True, slots=True)
class Card:
    vendor: Vendor
    name: str
    memory_bytes: int | None = None
    capability: str | None = None
    """CUDA's compute capability: `9.0`."""


@dataclass(frozen=True, slots=True)
class Cards:
    """What was found; `trouble` is nvidia-smi's complaint."""

    cards: tuple[Card, ...] = ()
    driver: str | None = None
    trouble: str | None = None

    def of(self, vendor: Vendor) -> list[Card]:
        return [card for card in self.cards if card.vendor == vendor]


def find(
    runner: Runner = run,
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
    system: str | None = None,
    machine: str | None = None,
) -> Cards:
    """The cards of this machine. nvidia-smi knows most, then the driver's own files, then the bus."""
    cards: list[Card] = []
    driver, trouble = _driver_file(proc), None
    for program in SMI:
        ran = runner(_query(program, QUERY))
        if ran is not None and not ran.ok and "is not a valid field" in ran.out + ran.err:
            ran = runner(_query(program, QUERY[:-1]))
        if ran is None:
            continue
        if ran.ok:
            cards, driver = _from_smi(ran.out, driver)
        else:
            trouble = ran.trouble if ran.code is None else _complaint(ran.out + "\n" + ran.err) or ran.trouble
        break
    seen = list(_on_the_bus(sys))
    if not cards:
        cards = list(_from_driver(proc)) or [card for card in seen if card.vendor == "NVIDIA"]
    cards += [card for card in seen if card.vendor != "NVIDIA"]
    if (system or platform.system()) == "Darwin" and (machine or platform.machine()) == "arm64":
        cards.append(Card("Apple", "Apple silicon"))
    return Cards(tuple(cards), driver, trouble)


def checks(found: Cards, environment: Mapping[str, str] | None = None, proc: Path = Path("/proc")) -> list[Check]:
    """The cards, the driver, and cards hidden from this process."""
    environment = os.environ if environment is None else environment
    made = [check for index, card in enumerate(found.of("NVIDIA")) for check in _card(index, card)]
    made += [_other(card) for card in found.cards if card.vendor != "NVIDIA"]
    if not found.cards and not found.trouble:
        return [
            absent(
                GROUP, "cards", "none: training runs on the CPU", "for models of billions of parameters, an NVIDIA card"
            )
        ]
    if found.of("NVIDIA") or found.trouble:
        made.append(_driver(found, wsl_version(proc) is not None))
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if found.of("NVIDIA") and hidden is not None:
        made.append(_visible(hidden))
    return made


def _card(index: int, card: Card) -> list[Check]:
    name = f"gpu {index}"
    if card.memory_bytes is None:
        made = [Check(GROUP, name, card.name)]
    else:
        found = f"{card.name}, {bytes_text(card.memory_bytes)}"
        small = "take a smaller model, `quantize: nf4`, or `adapter: lora`"
        made = [measured(GROUP, name, card.memory_bytes, found=found, way_out=small, bounds=BOUNDS["gpu memory"])]
    if card.capability is not None:
        known = BOUNDS["compute capability"]
        if judge(card.capability, known) == "failure":
            way_out = "today's PyTorch has no kernels for this card: hide it by CUDA_VISIBLE_DEVICES"
        else:
            way_out = (
                "a card before Ampere computes no bfloat16: training takes float32, or float16 by `train.fp16: true`"
            )
        made.append(measured(GROUP, f"{name} compute capability", card.capability, way_out=way_out, bounds=known))
    return made


def _other(card: Card) -> Check:
    name = card.vendor.lower()
    if card.vendor == "AMD":
        return warning(
            GROUP,
            name,
            f"{card.name}: used only by a ROCm build of PyTorch, and tunedock is not tested on it",
            "install PyTorch from its ROCm index, or train on the CPU or an NVIDIA card",
        )
    if card.vendor == "Apple":
        return Check(GROUP, name, f"{card.name}: used through MPS, in float32; tunedock is not tested on it")
    return absent(GROUP, name, f"{card.name}: not used")


def _driver(found: Cards, wsl: bool) -> Check:
    name = "nvidia driver"
    update = (
        "update the driver of Windows: nvidia.com/drivers" if wsl else "install the newest driver your system offers"
    )
    if found.trouble:
        return failure(GROUP, name, found.trouble, known_way_out(found.trouble) or update)
    if found.driver is None:
        if wsl:
            install = "install NVIDIA's driver in Windows, then `wsl --shutdown`"
        else:
            install = "Debian: `apt-get install nvidia-driver`; Ubuntu: `ubuntu-drivers install`; in a container: `--gpus all`"
        return failure(GROUP, name, "an NVIDIA card, and no driver", install)
    return measured(
        GROUP,
        name,
        found.driver,
        way_out=f"{update}: today's PyTorch is built with CUDA 12 or 13",
        bounds=Bounds("version", DRIVERS["12"][0], DRIVERS["13"][0]),
    )


def _visible(value: str) -> Check:
    name = "CUDA_VISIBLE_DEVICES"
    if value.strip() in ("", "-1", "none", "NoDevFiles"):
        return warning(GROUP, name, f"`{value}`: every card is hidden from this shell", "`unset CUDA_VISIBLE_DEVICES`")
    return Check(GROUP, name, value)


def _query(program: str, fields: tuple[str, ...]) -> list[str]:
    return [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _complaint(text: str) -> str | None:
    """The first line that says what is wrong; a second one often only advises."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"fail|error|no devices", line, re.IGNORECASE)), None)


def _from_smi(text: str, driver: str | None) -> tuple[list[Card], str | None]:
    """Cards and driver of a query's lines. Memory is `[N/A]` on machines whose card shares the main memory."""
    cards = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) < 3:
            continue
        name, memory, driver = fields[:3]
        known = len(fields) > 3 and re.fullmatch(r"\d+\.\d+", fields[3])
        size = int(memory) * MIB if memory.isdecimal() else None
        cards.append(Card("NVIDIA", name, size, fields[3] if known else None))
    return cards, driver


def _driver_file(proc: Path) -> str | None:
    try:
        text = (proc / "driver" / "nvidia" / "version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else None


def _from_driver(proc: Path) -> Iterator[Card]:
    for path in sorted((proc / "driver" / "nvidia" / "gpus").glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        yield Card("NVIDIA", found.group(1).strip() if found else "NVIDIA card")


def _on_the_bus(sys: Path) -> Iterator[Card]:
    for folder in sorted((sys / "bus" / "pci" / "devices").glob("*")):
        try:
            kind, vendor, device = ((folder / name).read_text().strip() for name in ("class", "vendor", "device"))
        except (OSError, UnicodeDecodeError):
            continue
        if vendor in VENDORS and kind[:4] in (DISPLAY, ACCELERATOR):
            yield Card(VENDORS[vendor], f"{VENDORS[vendor]} card {device} at {folder.name}")
