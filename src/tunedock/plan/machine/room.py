"""Room: memory (the machine's, and what the control groups leave of it), swap, shared memory, disk, open files."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tunedock.plan import control_group
from tunedock.plan.machine.bounds import bytes_text, measured
from tunedock.plan.machine.check import Check, absent, failure, warning

MEMORY, DISK = "memory", "disk"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's place for it


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `limit` and `limit_free` are the tightest control group's; None without one."""

    total: int
    available: int
    limit: int | None = None
    limit_free: int | None = None
    swap_total: int = 0
    swap_used: int = 0


def memory_now(groups: list[control_group.Group] | None = None) -> Memory:
    groups = control_group.groups() if groups is None else groups
    host, swap = psutil.virtual_memory(), psutil.swap_memory()
    limits = [group.limit_bytes for group in groups if group.limit_bytes is not None]
    return Memory(
        host.total,
        host.available,
        min(limits, default=None),
        control_group.free_bytes(groups),
        swap.total,
        swap.used,
    )


def memory(now: Memory) -> list[Check]:
    total = now.total if now.limit is None else min(now.total, now.limit)
    free = now.available if now.limit_free is None else min(now.available, now.limit_free)
    limited = now.limit is not None and now.limit < now.total
    words = bytes_text(total)
    more = "close other programs, or use a machine with more"
    if limited:
        words += f" (a control group's limit; the machine has {bytes_text(now.total)})"
        more = "raise the limit: `docker run --memory`, `resources.limits.memory`, `systemd-run -p MemoryMax=`"
    smaller = "; lower `data.max_length`, or take a smaller model"
    return [
        measured(MEMORY, "memory", total, found=words, way_out=more + smaller),
        measured(MEMORY, "free memory", free, way_out=more + smaller),
        swap(now),
    ]


def swap(now: Memory) -> Check:
    """Swap in use means that something has been too large already."""
    if not now.swap_total:
        return absent(MEMORY, "swap", "none: a process that outgrows the memory is killed at once")
    found = f"{bytes_text(now.swap_total)}, {bytes_text(now.swap_used)} used"
    if now.swap_used > now.swap_total // 2:
        return warning(
            MEMORY, "swap", found, "the machine is short of memory, and what is swapped is slow: end other programs"
        )
    return Check(MEMORY, "swap", found)


def shared_memory(folder: Path = SHARED_MEMORY) -> Check:
    """Its whole size: containers get 64 MiB unless told otherwise, and processes that share tensors die of that (SIGBUS)."""
    name = "shared memory"
    try:
        size = shutil.disk_usage(folder).total
    except OSError:
        return absent(MEMORY, name, f"no {folder}")
    return measured(
        MEMORY,
        name,
        size,
        found=f"{bytes_text(size)} at {folder}",
        way_out="`docker run --shm-size=8g` or `--ipc=host`; Kubernetes: an emptyDir of medium Memory mounted at /dev/shm",
    )


def places(environment: Mapping[str, str], cwd: Path, home: Path) -> dict[str, tuple[Path, str]]:
    """Check -> (folder, the way to another one): where runs, models, compiled kernels and temporary files go."""
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    hugging_face = Path(environment.get("HF_HOME") or cache / "huggingface")
    hub = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or hugging_face / "hub"
    return {
        "runs": (cwd / "runs", "start tunedock in a folder on another disk, or set `train.output_dir`"),
        "hub cache": (Path(hub), "set HF_HOME to a folder on another disk; `hf cache` removes models no longer used"),
        "kernel cache": (cache / "tunedock" / "kernels", "set XDG_CACHE_HOME to a folder you may write"),
        "temporary files": (Path(tempfile.gettempdir()), "set TMPDIR to a folder on another disk"),
    }


ESSENTIAL = ("runs", "temporary files")
"""Without the others training works: a cache that cannot be written can still be read, and kernels have a substitute."""


def disk(name: str, folder: Path, way_out: str) -> Check:
    """Free space of the disk a folder is on, or would be, and whether it can be written."""
    broken = failure if name in ESSENTIAL else warning
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    if not there.is_dir():
        return broken(DISK, name, f"{there} is a file, so {folder} cannot be made", way_out)
    try:
        with tempfile.TemporaryFile(
            dir=there
        ) as file:  # asking for permission only would not see a full or read-only disk
            file.write(b"\0")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return broken(DISK, name, f"{there}: {error.strerror}", f"free disk space, or {way_out}" if full else way_out)
    free = shutil.disk_usage(there).free
    return measured(
        DISK, name, free, found=f"{bytes_text(free)} free for {folder}", way_out=f"free disk space, or {way_out}"
    )


def disks() -> list[Check]:
    home = home_folder()
    if home is None:
        way_out = "`export HOME=` a folder you may write; in a container run by any user id: `-e HOME=/tmp`"
        return [failure(DISK, "home", "this user has no home directory, so there is no cache", way_out)]
    try:
        here = Path.cwd()
    except OSError:
        return [failure(DISK, "runs", "the current folder is gone", "`cd` to one that is there")]
    return [disk(name, *place) for name, place in places(os.environ, here, home).items()]


def home_folder() -> Path | None:
    """None for a user the system does not know, such as a container's that runs under any id."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def open_files() -> Check:
    """The soft limit; it may be raised up to the hard one without rights."""
    name = "open files"
    try:
        import resource
    except ImportError:  # Windows
        return absent(DISK, name, "no limit known on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Check(DISK, name, "no limit")
    most = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    return measured(
        DISK, name, soft, found=f"{soft:,} (may be raised to {most})", way_out="`ulimit -n 65536` in this shell"
    )
