"""Environment variables of OpenMP and its kin that make training slow, or its sums change: a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tunedock.plan.machine.check import Check, warning
from tunedock.plan.machine.system import GROUP, cores_here


@dataclass(frozen=True, slots=True)
class Setting:
    """An environment variable that can hurt. `hurts` says how, given its value and the number of cores; None when it does not."""

    name: str
    hurts: Callable[[str, int], str | None]
    way_out: str


def _threads(value: str, cores: int) -> str | None:
    first = value.split(",")[0].strip()
    if not first.isdecimal() or not int(first):
        return "is no number of threads"
    if int(first) > cores:
        return f"is more than the {cores} cores there are: threads wait for each other"
    if int(first) == 1 and cores > 1:
        return f"leaves {cores - 1} of {cores} cores idle in a run of one process"
    return None


def _spins(value: str, _cores: int) -> str | None:
    spins = {"infinite": 1 << 40, "infinity": 1 << 40}.get(value.lower(), int(value) if value.isdecimal() else 0)
    return (
        "lets threads spin: a step gets many times slower when another process wants a core" if spins > 10**6 else None
    )


def _one_of(*bad: str, why: str) -> Callable[[str, int], str | None]:
    return lambda value, _cores: why if value.lower() in bad else None


SETTINGS = (
    Setting("OMP_NUM_THREADS", _threads, "unset it: the number of cores is found"),
    Setting("MKL_NUM_THREADS", _threads, "unset it: the number of cores is found"),
    Setting("GOMP_SPINCOUNT", _spins, "unset it: workers get one that was measured"),
    Setting(
        "OMP_WAIT_POLICY",
        _one_of("active", why="lets threads spin: a step gets many times slower when another process wants a core"),
        "unset it, or set it to passive",
    ),
    Setting(
        "OMP_PROC_BIND",
        _one_of("true", "close", "master", "primary", why="pins threads: several processes pin theirs to the same cores"),
        "unset it where several processes share the machine",
    ),
    Setting(
        "KMP_DUPLICATE_LIB_OK",
        _one_of("true", "1", why="hides that two OpenMP runtimes are loaded, which can give wrong results"),
        "unset it; the check `openmp runtimes` says what is loaded",
    ),
    Setting(
        "MKL_THREADING_LAYER",
        _one_of("intel", why="loads a second OpenMP runtime beside PyTorch's libgomp"),
        "unset it, or set it to GNU",
    ),
    Setting(
        "OMP_DYNAMIC", _one_of("true", why="lets the number of threads change from call to call, and sums with it"), "unset it"
    ),
)  # fmt: skip


def variables(environment: Mapping[str, str] | None = None, cores: int | None = None) -> Check:
    environment = os.environ if environment is None else environment
    cores = cores or cores_here()
    name = "openmp variables"
    set_ = [setting for setting in SETTINGS if setting.name in environment]
    bad = [(setting, why) for setting in set_ if (why := setting.hurts(environment[setting.name], cores))]
    if bad:
        return warning(
            GROUP,
            name,
            "; ".join(f"{setting.name}={environment[setting.name]} {why}" for setting, why in bad),
            "; ".join(f"{setting.name}: {setting.way_out}" for setting, _ in bad),
        )
    return Check(GROUP, name, ", ".join(f"{s.name}={environment[s.name]}" for s in set_) or "none set")
