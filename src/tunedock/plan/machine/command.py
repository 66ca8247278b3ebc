"""Other programs asked about the machine: argument lists, a time limit, and no answer is an answer."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

COMMAND_S = 6.0
"""Seconds after which a program is given up on: nvidia-smi takes two on a machine of eight cards without a persistent driver."""

KILL_S = 0.5
"""Seconds a killed program gets to be gone; one that waits for a stuck driver cannot even be killed, and is left."""

MOST = 1 << 20
"""Characters of an output that are looked at."""


@dataclass(frozen=True, slots=True)
class Ran:
    """`code` is None when the program did not end in time; `out` and `err` are then empty."""

    code: int | None
    out: str = ""
    err: str = ""

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def trouble(self) -> str:
        """Why it failed, in its own words: one line, the last of its errors."""
        if self.code is None:
            return f"no answer within {COMMAND_S:.0f} s"
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


Runner = Callable[[Sequence[str]], Ran | None]
"""Runs a program; None when there is no such program."""


def run(arguments: Sequence[str], limit_s: float = COMMAND_S) -> Ran | None:
    """Runs a program to its end or for `limit_s` seconds, with nothing to read and messages in English."""
    program = shutil.which(arguments[0])
    if program is None:
        return None
    try:
        process = subprocess.Popen(  # noqa: S603 - an argument list of ours, a program of the user's path
            [program, *arguments[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},  # messages that can be recognised
            start_new_session=True,  # so that its children can be ended with it
        )
    except OSError as error:
        return Ran(127, err=error.strerror or str(error))
    try:
        streams = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=KILL_S)
        return Ran(None)
    out, err = (stream.decode("utf-8", errors="replace")[:MOST] for stream in streams)
    return Ran(process.returncode, out, err)
