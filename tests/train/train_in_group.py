"""`tunedock train` in the control group a test has put it in: `python train_in_group.py RECIPE [--hungry-after STEP]`.

With `--hungry-after` this process takes all the memory left after that step, until the kernel has killed the worker.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tunedock import pipeline
from tunedock.events import Event
from tunedock.plan import control_group
from tunedock.run.record import Run

HUNGRY_AFTER = int(sys.argv[3]) if len(sys.argv) > 3 else None
fed = False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


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
    held = []
    groups = control_group.groups()
    before = control_group.oom_kills(groups)
    while alive(pid) and control_group.oom_kills(groups) == before:  # the killed give their memory back before they are gone
        held.append(bytearray(b"x" * (8 << 20)))


pipeline.train([Path(sys.argv[1])], on_event=on_event)
