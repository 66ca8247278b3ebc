from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tunedock import pipeline
from tunedock.plan.machine.check import Check
from tunedock.plan.machine.survey import survey

GUIDES = Path(__file__).parents[2] / "docs" / "guides"

SOUND = [
    Check("system", "python", "3.13", "ok", "3.11", "3.12"),
    Check("system", "wsl", "no", "not applicable"),
    Check("memory", "swap", "4 GiB, 3 GiB used", "warning", way_out="end other programs"),
]
BROKEN = [
    *SOUND,
    Check(
        "torch", "build", "a build for CPUs, and this machine has a \x1b[2Jcard", "failure", way_out="install another"
    ),
    Check("network", "clock", "30 s", "ok", "≤ 600 s", "≤ 60 s"),
]


@pytest.fixture
def machine(monkeypatch):
    def has(checks):
        monkeypatch.setattr(pipeline, "doctor", lambda **_options: checks)

    return has


def test_a_sound_machine_with_a_warning_ends_with_0(tunedock, machine):
    machine(SOUND)
    code, out, err = tunedock("doctor")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert lines[:3] == [["system"], ["ok", "python", "3.13", "(≥", "3.11,", "better", "3.12)"], ["n/a", "wsl", "no"]]
    assert "warning  " in out
    assert "→ end other programs" in out
    assert out.splitlines()[-1] == "verdict: warning (1 ok, 1 warning, 1 not applicable)"


def test_a_failure_ends_with_6_and_says_which(tunedock, machine):
    machine(BROKEN)
    code, out, err = tunedock("doctor")
    assert code == 6
    assert "→ install another" in out
    assert "\x1b" not in out  # a device's name cannot steer the terminal
    assert "(≤ 600 s, better ≤ 60 s)" in out
    assert "verdict: failure" in out
    assert "error: this machine: 1 check failed: torch: build" in err


def test_json_is_one_document_with_the_error_in_it(tunedock, machine):
    machine(BROKEN)
    code, out, err = tunedock("doctor", "--json")
    assert (code, err) == (6, "")
    document = json.loads(out)
    assert list(document) == ["verdict", "counts", "checks", "error"]
    assert document["verdict"] == "failure"
    assert document["counts"] == {"ok": 2, "warning": 1, "failure": 1, "not applicable": 1}
    assert document["error"]["kind"] == "CheckError"
    assert document["checks"][0] == {
        "group": "system", "name": "python", "found": "3.13", "verdict": "ok", "minimum": "3.11", "recommended": "3.12",
        "way_out": None,
    }  # fmt: skip
    machine(SOUND)
    code, out, _ = tunedock("doctor", "--json")
    assert (code, "error" in json.loads(out)) == (0, False)


def test_a_terminal_without_utf8_is_told_so_and_not_met_with_a_traceback(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "PYTHON"))}
    environment |= {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "HF_HUB_OFFLINE": "1"}
    environment |= {"HTTPS_PROXY": "http://me:secret@代理:3128"}
    done = subprocess.run(
        [sys.executable, "-m", "tunedock", "doctor"], capture_output=True, timeout=60, env=environment, cwd=tmp_path
    )
    out = done.stdout.decode("ascii")
    assert b"Traceback" not in done.stderr
    assert "(>= 3.11)" in out
    assert "-> `export LANG=C.UTF-8`" in out
    assert "secret" not in out


def test_help_loads_nothing_heavy():
    command = [sys.executable, "-X", "importtime", "-m", "tunedock", "doctor", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "exit code 6" in done.stdout
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert not loaded & {"torch", "pydantic", "rich", "psutil", "tunedock.plan.machine.check"}


def test_without_torch_the_rest_is_still_said(tmp_path):
    """The whole command, with a torch that is not there: the command line never needs it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tunedock", "doctor", "--json"],
        capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    document = json.loads(done.stdout)
    failed = [check for check in document["checks"] if check["verdict"] == "failure"]
    assert ("torch", "torch") in [(check["group"], check["name"]) for check in failed]
    groups = {check["group"] for check in document["checks"]}
    assert {"system", "memory", "disk", "gpu", "packages", "docker", "network"} <= groups
    assert not (tmp_path / "runs").exists()


def test_the_guides_name_every_check(monkeypatch):
    """A check that is added is written up, in both languages."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {re.sub(r"\b\d+\b", "0", check.name) for check in survey()}
    names |= {"torch", "build", "driver for cuda", "cuda", "cuda:0", "compiled kernels", "training stack", "worker"}
    names |= {"bfloat16 on the cpu", "openmp runtimes", "font for chinese", "nvidia driver", "images", "clock"}
    for page in ("doctor.md", "doctor.zh.md"):
        text = (GUIDES / page).read_text(encoding="utf-8")
        assert not [name for name in names if f"`{name}`" not in text], page
