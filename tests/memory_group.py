"""A control group with a memory limit, for tests that run out of it (`benchmarks.chaos.memory_group`)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from benchmarks.chaos import memory_group as chaos
from benchmarks.chaos.injection import CannotBe

from tunedock.plan.control_group import Group


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Group]:
    """Skips the test where groups cannot be made."""
    with ExitStack() as stack:
        try:
            group = stack.enter_context(chaos.memory_group(limit_bytes))
        except CannotBe as why:
            pytest.skip(str(why))
        yield group


def run_in(group: Group, arguments: Sequence[str], *, cwd: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs Python with the arguments; the process and its children are in the group from their first moment."""
    command = chaos.python_in(group, arguments)
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s)
