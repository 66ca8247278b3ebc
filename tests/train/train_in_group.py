"""`tunedock train` in the control group a test has put it in: `python train_in_group.py RECIPE [--hungry-after STEP]`.

With `--hungry-after` a process of this group takes all the memory left after that step, until the kernel has killed the worker.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tunedock import pipeline
from tunedock.events import Event
from tunedock.run.record import Run

HUNGRY_AFTER = int(sys.argv[3]) if len(sys.argv) > 3 else None
EATER = """
import pathlib, sys
held = []
while pathlib.Path(sys.argv[1]).exists() and pathlib.Path(sys.argv[1]).read_text().rsplit(")", 1)[1].split()[0] != "Z":
    held.append(bytearray(b"x" * (8 << 20)))
"""
"""The kernel kills the worker first; where that one's memory is slow to come back it kills again, and this is the next it takes."""
fed = False


def on_event(event: Event) -> None:
    global fed
    if event["kind"] in ("note", "warning", "failure"):
        print(event.get("message") or event.get("error"), flush=True)
    if fed or HUNGRY_AFTER is None or event["kind"] != "metrics" or event["step"] < HUNGRY_AFTER:
        return
    fed = True
    pid = Run(Path("run").absolute()).state().pid
    assert pid is not None
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    subprocess.run([sys.executable, "-c", EATER, f"/proc/{pid}/stat"], check=False)


pipeline.train([Path(sys.argv[1])], on_event=on_event)
