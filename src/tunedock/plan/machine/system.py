"""Python, the platform, the processor's cores, WSL, the locale, the C++ compiler."""

from __future__ import annotations

import locale
import os
import platform
import re
import sys
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


def cores_here() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name(proc: Path = PROC) -> str:
    """The name people know (`AMD EPYC 9654`); the architecture where the system does not tell."""
    try:
        text = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cores() -> Check:
    """The cores this process may run on, which can be fewer than the machine has."""
    here = cores_here()
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
