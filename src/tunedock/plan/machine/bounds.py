"""The values a machine should have, as a table: below the minimum a check fails, below the recommended value it warns.

Minimum versions of packages are those of `pyproject.toml`; a test holds the two together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tunedock.plan.machine.check import Check, Verdict

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

Value = int | float | str


@dataclass(frozen=True, slots=True)
class Bounds:
    """A bound that is None is not asked for."""

    unit: Literal["version", "bytes", "count", "seconds"]
    minimum: Value | None = None
    recommended: Value | None = None
    at_most: bool = False
    """Whether the bounds are upper ones."""


BOUNDS: dict[str, Bounds] = {
    "python": Bounds("version", "3.11", "3.11"),
    "torch": Bounds("version", "2.9", "2.10"),  # from 2.10 on: variable-length flash attention
    "transformers": Bounds("version", "5.0"),
    "peft": Bounds("version", "0.18"),
    "accelerate": Bounds("version", "1.10"),
    "safetensors": Bounds("version", "0.5"),
    "huggingface-hub": Bounds("version", "1.0"),
    "bitsandbytes": Bounds("version", recommended="0.49"),
    "deepspeed": Bounds("version", recommended="0.19"),
    "modelscope": Bounds("version", recommended="1.20"),
    "cores": Bounds("count", 1, 2),
    "memory": Bounds("bytes", 4 * GIB, 16 * GIB),
    "free memory": Bounds("bytes", 1 * GIB, 4 * GIB),
    "shared memory": Bounds("bytes", 32 * MIB, 1 * GIB),
    "runs": Bounds("bytes", 2 * GIB, 50 * GIB),
    "hub cache": Bounds("bytes", recommended=50 * GIB),
    "kernel cache": Bounds("bytes", recommended=64 * MIB),
    "temporary files": Bounds("bytes", 256 * MIB, 4 * GIB),
    "open files": Bounds("count", 256, 1024),
    "clock": Bounds("seconds", 600, 60, at_most=True),
    "gpu memory": Bounds("bytes", 2 * GIB, 16 * GIB),
    "compute capability": Bounds("version", "5.0", "8.0"),  # from 8.0 on: bfloat16 and flash attention
    "docker daemon": Bounds("version", "20.10", "23.0"),
    "docker client": Bounds("version", "20.10", "23.0"),
    "images": Bounds("bytes", recommended=40 * GIB),
    "compose": Bounds("version", "2.0", "2.20"),
    "container toolkit": Bounds("version", "1.12", "1.14"),
}

DRIVERS: dict[str, tuple[str, str]] = {
    "11": ("450.80.02", "520.61.05"),
    "12": ("525.60.13", "525.60.13"),
    "12.4": ("525.60.13", "550.54.14"),
    "12.6": ("525.60.13", "560.28.03"),
    "12.8": ("525.60.13", "570.26"),
    "12.9": ("525.60.13", "575.51.03"),
    "13": ("580.65.06", "580.65.06"),
}
"""CUDA of a torch build -> NVIDIA driver on Linux, minimum (same major) and recommended (the toolkit's own).

Source: NVIDIA, CUDA Toolkit Release Notes, "CUDA Driver", tables 2 and 3.
"""


def version_parts(text: str) -> tuple[int, ...]:
    """The numbers a version begins with: `2.13.0+cpu` -> (2, 13, 0); empty when it begins with none."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", text.strip())
    return tuple(int(part) for part in found.group(1).split(".")) if found else ()


def below(one: Value, other: Value) -> bool:
    """Whether a number or version is lower than another; `2.9` and `2.9.0` are the same."""
    if isinstance(one, str) or isinstance(other, str):
        left, right = version_parts(str(one)), version_parts(str(other))
        length = max(len(left), len(right))
        return left + (0,) * (length - len(left)) < right + (0,) * (length - len(right))
    return one < other


def judge(value: Value, bounds: Bounds) -> Verdict:
    def misses(bound: Value | None) -> bool:
        return bound is not None and (below(bound, value) if bounds.at_most else below(value, bound))

    return "failure" if misses(bounds.minimum) else "warning" if misses(bounds.recommended) else "ok"


def measured(
    group: str,
    name: str,
    value: Value,
    *,
    way_out: str,
    found: str | None = None,
    bounds: Bounds | None = None,
) -> Check:
    """The check of a value against its bounds, those of `name` unless given. `found` is the value and more in words."""
    bounds = bounds or BOUNDS[name]
    words = _WORDS[bounds.unit]
    verdict = judge(value, bounds)
    sign = "≤ " if bounds.at_most else ""
    minimum, recommended = (
        None if bound is None else f"{sign}{words(bound)}" for bound in (bounds.minimum, bounds.recommended)
    )
    return Check(
        group, name, found or words(value), verdict, minimum, recommended, None if verdict == "ok" else way_out
    )


def driver_bounds(cuda: str) -> Bounds | None:
    """What a torch build of this CUDA version (`12.8`) asks of the driver; None for a CUDA we know nothing of."""
    for known in (".".join(cuda.split(".")[:2]), cuda.split(".")[0]):
        if known in DRIVERS:
            return Bounds("version", *DRIVERS[known])
    return None


def bytes_text(value: Value) -> str:
    """`512 MiB`, `23.4 GiB`."""
    number = float(value)
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if number >= size:
            return f"{number / size:,.1f}".removesuffix(".0") + f" {unit}"
    return f"{number:.0f} bytes"


_WORDS: dict[str, Callable[[Value], str]] = {
    "version": str,
    "bytes": bytes_text,
    "count": lambda value: f"{value:,}",
    "seconds": lambda value: f"{float(value):.0f} s",
}
