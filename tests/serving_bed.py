"""`tunedock serve` in a process of its own, on the demo's small base: all of it as a user starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

BASE = Path(__file__).parents[1] / "examples/demo/base"


@dataclass
class Serving:
    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)
    """Lines of standard error so far."""
    url: str = ""


@contextmanager
def serving(folder: Path, *arguments: str, model: str = f"tiny={BASE}") -> Iterator[Serving]:
    """A gateway until the block's end."""
    command = [sys.executable, "-m", "tunedock", "serve", model, *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    made, began = Serving(process), threading.Event()

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            made.said.append(line)
            if found := re.search(r" at (https?://\S+)/v1", line):
                made.url = found[1]
                began.set()
        began.set()

    listening = threading.Thread(target=listen, daemon=True)
    listening.start()
    try:
        assert began.wait(120) and made.url, "".join(made.said)
        yield made
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
        listening.join(10)
