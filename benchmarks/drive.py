"""Starts a side, hands it its job and takes its answer, within a time limit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.peers import PEERS, ROOT, ensure
from benchmarks.protocol import Job, Measured
from benchmarks.sides import SIDES

WORK = ROOT / "benchmarks" / ".work"
TIMEOUT_S = 1800.0


class RunFailed(Exception):  # noqa: N818 - what happened, not a mistake of the caller
    """A side ended without an answer; the message is the end of what it printed."""


def python_of(side: str) -> Path:
    """The Python of a side's environment, which is made first where it is missing."""
    environment = SIDES[side].environment
    return Path(sys.executable) if environment is None else ensure(PEERS[environment])


def run(job: Job, *, timeout_s: float = TIMEOUT_S) -> Measured:
    """One run in an empty folder, which is deleted after it. `job.work` and `job.spawned_at` are filled in here.

    Raises RunFailed when the side fails, answers nothing or takes longer than `timeout_s`.
    """
    python = python_of(job.side)
    (WORK / "runs").mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{job.side}-", dir=WORK / "runs"))
    try:
        return _run(replace(job, work=str(work)), python, timeout_s)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(job: Job, python: Path, timeout_s: float) -> Measured:
    log = Path(job.work) / "log.txt"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [str(python), "-m", SIDES[job.side].module],
            cwd=ROOT,
            env=_environment(Path(job.work)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # so that a run out of time is ended with all its children
        )
        try:
            said, _ = process.communicate(json.dumps(asdict(replace(job, spawned_at=time.time()))) + "\n", timeout_s)
        except BaseException as stopped:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(stopped, subprocess.TimeoutExpired):
                raise RunFailed(f"no answer after {timeout_s:.0f} s") from None
            raise
    if process.returncode or not said.strip():
        raise RunFailed(f"exit code {process.returncode}: {_end(log)}")
    return Measured.from_json(json.loads(said.splitlines()[-1]))


def _environment(work: Path) -> dict[str, str]:
    """No network, no GPU, and caches that are empty each time: nobody profits from an earlier run."""
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(work / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _end(log: Path, lines: int = 12) -> str:
    """The last lines, without the folders of this machine: they go into a report that others read."""
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:]
    return "\n".join(said).replace(str(ROOT), ".").replace(str(Path.home()), "~")
