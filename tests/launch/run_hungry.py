"""The launcher, in the control group the test has put it in: `python run_hungry.py RUN_DIR` prints the events and the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tunedock.launch.job import JobSpec
from tunedock.launch.local import LocalLauncher
from tunedock.launch.supervise import supervise

worker = Path(__file__).with_name("hungry_worker.py")
result = supervise(
    LocalLauncher([sys.executable, str(worker)]),
    JobSpec("train", Path(sys.argv[1]), {"resume": False}),
    lambda event: print(json.dumps(event), flush=True),
)
print(json.dumps({"kind": "returned", "value": result}))
