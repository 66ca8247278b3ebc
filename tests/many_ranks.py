"""Scripts that several ranks run together, under the real torchrun, and what each of them says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def said_by_ranks(script: Path, folder: Path, ranks: int, *, limit_s: float = 120) -> list[Any]:
    """Runs `script FOLDER` as so many ranks: what each has written as JSON to `FOLDER/RANK.json`. AssertionError with what they
    printed where one fails."""
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--log-dir", os.devnull]
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(
        [*torchrun, "--nproc-per-node", str(ranks), str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=limit_s,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
