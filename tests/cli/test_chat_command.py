"""`tunedock chat` through a pipe and on a real terminal (a pty), with a worker that answers at once."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunedock.run.record import Run, RunState

FAKE_WORKER = Path(__file__).parents[1] / "launch" / "fake_worker.py"

DRIVER = f"""
import functools, sys
from tunedock.launch import local
local.LocalLauncher = functools.partial(local.LocalLauncher, [sys.executable, {str(FAKE_WORKER)!r}, '[["chat"]]'])
from tunedock.cli.app import main
main(["chat", "r1", *sys.argv[1:]])
"""


@pytest.fixture
def folder(tmp_path):
    state = RunState("r1", 1.0, "sft", "some/model", "lora", "h", status="finished")
    Run.create(tmp_path / "runs" / "r1", recipe_yaml="model: x\n", resolved={}, state=state)
    return tmp_path


def pipe(folder, text, *arguments):
    command = [sys.executable, "-c", DRIVER, *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=folder, timeout=60)


def without_ids(text):
    return " ".join(word for word in text.split() if not word.rstrip(":").isdigit())


def test_a_script_gets_one_answer_a_line_and_nothing_else(folder):
    done = pipe(folder, "one\n\ntwo\n")
    assert done.returncode == 0
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert without_ids(first) == "tuned u one"
    assert without_ids(second) == "tuned uau two"
    assert "\x1b" not in done.stdout


def test_commands_between_turns(folder):
    done = pipe(folder, "a\n/base\nb\n/reset\nc\n/system be brief\nd\n/tuned\n/nonsense\ne\n/exit\nf\n")
    answers = [without_ids(line) for line in done.stdout.splitlines()]
    assert answers == ["tuned u a", "base uau b", "base u c", "base su d", "tuned suau e"]
    assert "no such command: /nonsense" in done.stderr


def test_options_set_the_model_and_the_system_prompt(folder):
    done = pipe(folder, "a", "--base", "--system", "be brief")
    assert without_ids(done.stdout) == "base su a"


def test_a_script_ends_with_the_error(folder):
    done = pipe(folder, "a\nrefuse\nb\n")
    assert done.returncode == 2
    assert "error: this turn makes no sense" in done.stderr
    assert len(done.stdout.splitlines()) == 1


class Terminal:
    """A process on a pseudo-terminal of its own."""

    def __init__(self, folder):
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-c", DRIVER])
        self.seen = ""

    def until(self, text):
        deadline = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if not select.select([self._fd], [], [], 1.0)[0]:
                continue
            try:
                self.seen += os.read(self._fd, 4096).decode(errors="replace")
            except OSError:
                assert text in self.seen, self.seen
        self.seen = self.seen.partition(text)[2]

    def type(self, keys):
        os.write(self._fd, keys.encode())

    def leave(self, keys):
        """Presses keys until the process ends, and returns its exit code.

        Again and again, as a person would: Python may miss a signal that comes just as it begins to wait for a line.
        """
        for _ in range(30):
            with contextlib.suppress(OSError):
                self.type(keys)
            for _ in range(20):
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.05)
        raise AssertionError(f"still there: {self.seen}")


def test_on_a_terminal_ctrl_c_stops_the_answer_and_leaves_at_the_prompt(folder):
    terminal = Terminal(folder)
    terminal.until("tuned> ")
    terminal.type("hello\n")
    terminal.until("tuned u ")
    terminal.until("tuned> ")
    terminal.type("long\n")
    terminal.until("so")
    terminal.type("\x03")
    terminal.until("this turn is forgotten")
    terminal.until("tuned> ")
    terminal.type("refuse\n")
    terminal.until("error: this turn makes no sense")
    terminal.until("tuned> ")
    terminal.type("again\n")
    terminal.until("tuned uau ")
    terminal.until("tuned> ")
    assert terminal.leave("\x03") == 0


def test_on_a_terminal_ctrl_d_leaves(folder):
    terminal = Terminal(folder)
    terminal.until("tuned> ")
    assert terminal.leave("\x04") == 0
