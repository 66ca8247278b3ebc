"""A control group with a memory limit, to run out of it: made below our own, removed at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.chaos.injection import CannotBe
from tunedock.plan.control_group import Group, groups

ENTER = "import os, sys; open(sys.argv[1], 'w').write('0'); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"

EATER = """
import pathlib, sys
stat, held = pathlib.Path(sys.argv[1]), []
while stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
    held.append(bytearray(b"x" * (8 << 20)))
"""
"""Takes memory until another process is dead. Where that one's memory is slow to come back, the kernel kills again: this one."""


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Group]:
    """Raises CannotBe where groups cannot be made: no rights, or version 2 without delegation."""
    found = groups()
    if not found:
        raise CannotBe("no control group counts memory here")
    path = found[0].path / f"tunedock-{os.getpid()}-{time.monotonic_ns()}"
    group = Group(path, found[0].version)
    try:
        path.mkdir()
    except OSError as error:
        raise CannotBe(f"no control group can be made here: {error.strerror}") from error
    try:
        try:
            _limit(group, limit_bytes)
        except OSError as error:
            raise CannotBe(f"no limit can be set here: {error.strerror}") from error
        yield group
    finally:
        _remove(path)


def enter(group: Group) -> None:
    """This process, and what it starts from here on."""
    (group.path / "cgroup.procs").write_text("0")


def python_in(group: Group, arguments: Sequence[str]) -> list[str]:
    """The command that runs Python with the arguments, in the group from its first moment."""
    return [sys.executable, "-c", ENTER, str(group.path / "cgroup.procs"), *arguments]


def take_memory_until_killed(group: Group, pid: int) -> None:
    """A process takes what memory the group has left, until the kernel has killed `pid`, which it is told to kill before others."""
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    command = python_in(group, ["-c", EATER, f"/proc/{pid}/stat"])
    subprocess.run(command, check=False, timeout=120, stderr=subprocess.DEVNULL)


def _limit(group: Group, size_bytes: int) -> None:
    """Of memory; and, where the kernel counts swap, none of that."""
    second = group.version == 2
    (group.path / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(size_bytes))
    swap = group.path / ("memory.swap.max" if second else "memory.memsw.limit_in_bytes")
    if swap.exists():
        swap.write_text("0" if second else str(size_bytes))


def _remove(path: Path) -> None:
    """What is still in the group is killed; the group goes once its last process has."""
    for _ in range(100):
        with suppress(OSError):
            for pid in (path / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(0.1)
