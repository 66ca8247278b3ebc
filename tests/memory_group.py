"""A control group with a memory limit, for tests that run out of it. Made below our own group, removed at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tunedock.plan.control_group import Group, groups


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Group]:
    """Skips the test where groups cannot be made: no rights, or version 2 without delegation."""
    found = groups()
    if not found:
        pytest.skip("no control group counts memory here")
    path = found[0].path / f"tunedock-test-{os.getpid()}-{time.monotonic_ns()}"
    group = Group(path, found[0].version)
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    try:
        try:
            (path / ("memory.max" if group.version == 2 else "memory.limit_in_bytes")).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"no limit can be set here: {error.strerror}")
        yield group
    finally:
        _remove(path)


def run_in(group: Group, arguments: Sequence[str], *, cwd: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs Python with the arguments; the process and its children are in the group from their first moment."""
    procs = str(group.path / "cgroup.procs")
    enter = (
        f"open({procs!r}, 'w').write('0'); import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    return subprocess.run(
        [sys.executable, "-c", enter, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout_s
    )


def _remove(path: Path) -> None:
    """A group goes once its last process has."""
    for _ in range(100):
        try:
            path.rmdir()
            return
        except OSError:
            time.sleep(0.1)
