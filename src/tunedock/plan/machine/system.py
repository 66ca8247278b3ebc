"""Python, the processor's cores, WSL, the locale, the C++ compiler and the environment variables of OpenMP."""

from __future__ import annotations

import locale
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunedock.plan.machine.bounds import measured
from tunedock.plan.machine.check import Check, absent, failure, warning
from tunedock.plan.machine.command import Runner, run

GROUP = "system"
PROC = Path("/proc")


def python() -> Check:
    version = platform.python_version()
    found = f"{version}, {sys.executable}"
    return measured(
        GROUP, "python", version, found=found, way_out="make a new environment: `uv venv --python 3.12`, or a container"
    )


def platform_(system: str | None = None) -> Check:
    """Whether this is a system the work plane runs on."""
    system = system or platform.system()
    found = f"{system} {platform.release()}, {platform.machine()}"
    if system == "Windows":
        return failure(GROUP, "platform", found, "tunedock runs in WSL2: `wsl --install`, then install it in there")
    return Check(GROUP, "platform", found)


def cores() -> Check:
    """The cores this process may run on, which can be fewer than the machine has."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = os.cpu_count() or here
    found = f"{here}" + (f" of {total}" if total != here else "")
    return measured(GROUP, "cores", here, found=found, way_out="give the container or the virtual machine more cores")


def wsl_version(proc: Path = PROC) -> int | None:
    """1 or 2 in the Windows Subsystem for Linux; None elsewhere."""
    try:
        text = (proc / "version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if "microsoft" not in text.lower():
        return None
    # WSL1 shows no kernel of its own: `4.4.0-19041-Microsoft`. WSL2's end in `microsoft-standard`, newer ones in `-WSL2`.
    return 2 if "microsoft-standard" in text or "WSL2" in text else 1


def wsl(proc: Path = PROC, folder: Path | None = None) -> Check:
    """What the Windows Subsystem for Linux means here: whose driver, how much memory, which disk. `folder`: where runs would go."""
    version = wsl_version(proc)
    if version is None:
        return absent(GROUP, "wsl", "no")
    if version == 1:
        return failure(
            GROUP, "wsl", "WSL1: no GPU, no Docker, slow files", "in PowerShell: `wsl --set-version <distribution> 2`"
        )
    folder = folder or Path.cwd()
    if re.match(r"/mnt/[a-z](/|$)", folder.as_posix()):
        return warning(
            GROUP,
            "wsl",
            f"WSL2, and {folder} is on a Windows drive: files there are many times slower",
            "work in a folder of Linux's own, such as ~/runs",
        )
    return Check(
        GROUP,
        "wsl",
        "WSL2: the GPU's driver is that of Windows (install none in here); half of the memory, unless .wslconfig says otherwise",
    )


def utf8(encoding: str | None = None) -> Check:
    """Whether text without a declared encoding is read as UTF-8: log files, names of files, the terminal."""
    encoding = encoding or ("utf-8" if sys.flags.utf8_mode else locale.getencoding())
    if encoding.lower().replace("-", "").replace("_", "") == "utf8":
        return Check(GROUP, "locale", encoding)
    return warning(
        GROUP, "locale", f"{encoding}: Chinese text may not print", "`export LANG=C.UTF-8`, or `export PYTHONUTF8=1`"
    )


def compiler(runner: Runner = run, system: str | None = None) -> Check:
    """The C++ compiler of the compiled kernels (`tunedock.model.kernels` looks for the same names)."""
    if (system or platform.system()) != "Linux":
        return absent(GROUP, "c++ compiler", "the compiled kernels are for Linux only")
    for name in ("c++", "g++", "clang++"):
        ran = runner([name, "--version"])
        if ran is None:
            continue
        if ran.ok:
            return Check(GROUP, "c++ compiler", (ran.out.splitlines() or [name])[0])
        return warning(GROUP, "c++ compiler", f"{name}: {ran.trouble}", "install it again: `apt-get install g++`")
    return warning(
        GROUP,
        "c++ compiler",
        "none: training on the CPU uses PyTorch's own operations, which are slower",
        "`apt-get install g++` (Debian, Ubuntu) or `dnf install gcc-c++`",
    )


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


def openmp_variables(environment: Mapping[str, str] | None = None, cores: int | None = None) -> Check:
    environment = os.environ if environment is None else environment
    cores = cores or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
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
