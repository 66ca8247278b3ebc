"""Stands in for `tunedock.worker`: tells a token budget, then takes memory until the kernel ends it; resumed, it tells its request.

python hungry_worker.py STAGE RUN_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tunedock.events import Emitter

request = json.loads(sys.stdin.readline())
emit = Emitter.to_file(Path(sys.argv[2]) / "events.jsonl")
emit.note("at work", token_budget=request.get("token_budget", 1024))
Path("/proc/self/oom_score_adj").write_text("1000")
if request.get("token_budget", 1024) > 256:
    held = []
    while True:
        held.append(bytearray(b"x" * (8 << 20)))
emit.result(request)
