"""The worker's part of `tunedock doctor`: what is left of it when torch does not load, crashes or hangs.

The worker is the real one; only torch is replaced, by a package earlier on the path that does what broken ones do.
"""

from __future__ import annotations

import os
import time

import pytest

from tunedock.errors import InterruptedRun
from tunedock.launch.doctor import GROUPS, examine
from tunedock.launch.local import LocalLauncher
from tunedock.pipeline import ignore
from tunedock.plan.machine.check import Check, failure

HERE = [Check("network", "hub", "answers"), Check("system", "python", "3.13")]


@pytest.fixture
def broken_torch(tmp_path, monkeypatch):
    def write(code: str) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(code)
        path = os.environ.get("PYTHONPATH")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path) + (os.pathsep + path if path else ""))

    return write


def of_torch(**options) -> list[Check]:
    made = examine(LocalLauncher(), ignore, look=lambda: HERE, **options)
    assert [check for check in made if check.group != "torch"] == [HERE[1], HERE[0]]  # by group, and whole
    return [check for check in made if check.group == "torch"]


def test_torch_is_not_installed(broken_torch):
    broken_torch("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    (check,) = of_torch()
    assert (check.name, check.verdict) == ("torch", "failure")
    assert "pip install torch" in check.way_out


def test_torch_does_not_load(broken_torch):
    broken_torch("raise OSError('/lib/libgomp.so.1: cannot allocate memory in static TLS block')\n")
    (check,) = of_torch()
    assert "LD_PRELOAD=/lib/libgomp.so.1" in check.way_out


def test_torch_crashes_while_it_loads(broken_torch):
    broken_torch(
        "import os, sys\nprint('undefined symbol: __nvJitLinkCreate', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), 11)\n"
    )
    (check,) = of_torch()
    assert (check.name, check.verdict) == ("worker", "failure")
    assert "SIGSEGV" in check.found
    assert "at `torch`" in check.found
    assert "undefined symbol: __nvJitLinkCreate" in check.found  # the log's last lines
    assert "LD_LIBRARY_PATH" in check.way_out


def test_torch_hangs_while_it_loads(broken_torch):
    broken_torch("import time\ntime.sleep(60)\n")
    began = time.monotonic()
    (check,) = of_torch(worker_s=2.0)
    assert time.monotonic() - began < 15
    assert (check.name, check.verdict) == ("worker", "failure")
    assert "no answer within 2 s, at `torch`" in check.found


def test_what_was_told_before_the_end_is_kept(launcher):
    told = Check("torch", "torch", "2.13.0")
    worker = launcher(
        ["event", "progress", {"task": "torch", "done": 0}],
        ["event", "note", {"message": "torch", "data": {"check": told.to_json()}}],
        ["event", "note", {"message": "junk", "data": {"check": {"verdict": "fine"}}}],
        ["event", "progress", {"task": "cuda", "done": 1}],
        ["signal", 9],
    )
    made = examine(worker, ignore, look=list)
    assert made[0] == told
    assert made[1].name == "worker"
    assert "at `cuda`" in made[1].found


def test_a_worker_that_cannot_be_started_is_a_finding(tmp_path):
    (check,) = examine(LocalLauncher([str(tmp_path / "no-python")]), ignore, look=list)
    assert check.verdict == "failure"
    assert "cannot start the worker" in check.found


def test_a_stop_is_a_stop(launcher):
    worker = launcher(["event", "failure", {"error": InterruptedRun("stopped").to_json()}], ["exit", 130])
    with pytest.raises(InterruptedRun):
        examine(worker, ignore, look=list)


def test_a_survey_that_breaks_is_not_taken_for_a_sound_machine(launcher):
    def breaks() -> list[Check]:
        raise ZeroDivisionError("surprise")

    with pytest.raises(ZeroDivisionError):
        examine(launcher(["event", "result", {"value": []}]), ignore, look=breaks)


def test_groups_not_in_the_order_come_last(launcher):
    worker = launcher(["event", "result", {"value": []}])
    made = examine(worker, ignore, look=lambda: [failure("new", "x", "y", "z"), Check(GROUPS[0], "a", "b")])
    assert [check.group for check in made] == [GROUPS[0], "new"]
