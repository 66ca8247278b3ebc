from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from machine_recordings import RecordedRunner, recorded

from tunedock.plan.control_group import Group
from tunedock.plan.machine import openmp, packages, room, system
from tunedock.plan.machine.check import Check
from tunedock.plan.machine.command import Ran, run
from tunedock.plan.machine.survey import survey

GIB = 1 << 30


@pytest.mark.parametrize(
    ("file", "version"), [("proc_version_wsl1", 1), ("proc_version_wsl2", 2), ("proc_version_debian", None)]
)
def test_wsl_is_told_by_the_kernel(tmp_path, file, version):
    (tmp_path / "version").write_text(recorded(file))
    assert system.wsl_version(tmp_path) == version
    verdict = {1: "failure", 2: "ok", None: "not applicable"}[version]
    assert system.wsl(tmp_path, Path("/home/me")).verdict == verdict


def test_in_wsl2_windows_drives_are_slow(tmp_path):
    (tmp_path / "version").write_text(recorded("proc_version_wsl2"))
    assert system.wsl(tmp_path, Path("/mnt/c/Users/me")).verdict == "warning"
    assert system.wsl(tmp_path, Path("/mnt/data")).verdict == "ok"
    assert system.wsl_version(tmp_path / "nothing") is None


def test_python_cores_and_platform_here():
    assert system.python().verdict == "ok"
    assert sys.executable in system.python().found
    assert system.cores().verdict in ("ok", "warning")
    assert system.platform_("Linux").verdict == "ok"
    assert system.platform_("Windows").verdict == "failure"


@pytest.mark.parametrize(
    ("encoding", "verdict"), [("UTF-8", "ok"), ("utf8", "ok"), ("ANSI_X3.4-1968", "warning"), ("cp936", "warning")]
)
def test_text_that_is_not_utf8(encoding, verdict):
    assert system.utf8(encoding).verdict == verdict


def test_a_compiler_or_none():
    assert system.compiler(RecordedRunner({}), "Linux").verdict == "warning"
    gcc = RecordedRunner({"g++": Ran(0, "g++ (Debian 12.2.0-14) 12.2.0\nmore\n")})
    assert system.compiler(gcc, "Linux").found == "g++ (Debian 12.2.0-14) 12.2.0"
    assert system.compiler(RecordedRunner({"c++": Ran(1, "", "cc1plus: not found")}), "Linux").verdict == "warning"
    assert system.compiler(gcc, "Darwin").verdict == "not applicable"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "8"}, None),
        ({"OMP_NUM_THREADS": "8,2"}, None),
        ({"OMP_NUM_THREADS": "64"}, "more than the 8 cores"),
        ({"OMP_NUM_THREADS": "1"}, "leaves 7 of 8 cores idle"),
        ({"OMP_NUM_THREADS": "many"}, "no number"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "spin"),
        ({"OMP_WAIT_POLICY": "passive"}, None),
        ({"GOMP_SPINCOUNT": "2000"}, None),
        ({"GOMP_SPINCOUNT": "infinity"}, "spin"),
        ({"KMP_DUPLICATE_LIB_OK": "TRUE"}, "two OpenMP runtimes"),
        ({"MKL_THREADING_LAYER": "INTEL"}, "second OpenMP runtime"),
        ({"OMP_PROC_BIND": "close"}, "pins threads"),
    ],
)
def test_variables_that_hurt(environment, said):
    check = openmp.variables(environment, cores=8)
    assert check.verdict == ("warning" if said else "ok")
    if said:
        assert said in check.found
        assert next(iter(environment)) in check.way_out


def test_the_tightest_control_group_counts(tmp_path):
    for name, limit, used in (("own", 8 * GIB, 6 * GIB), ("parent", 12 * GIB, 7 * GIB)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "memory.max").write_text(str(limit))
        (folder / "memory.current").write_text(str(used))
    now = room.memory_now([Group(tmp_path / "own", 2), Group(tmp_path / "parent", 2)])
    assert (now.limit, now.limit_free) == (8 * GIB, 2 * GIB)
    total, free, _ = room.memory(room.Memory(64 * GIB, 60 * GIB, now.limit, now.limit_free))
    assert (total.verdict, free.verdict) == ("warning", "warning")
    assert total.found == "8 GiB (a control group's limit; the machine has 64 GiB)"
    assert "--memory" in total.way_out


def test_memory_and_swap():
    total, free, swap = room.memory(room.Memory(2 * GIB, GIB // 2))
    assert (total.verdict, free.verdict, swap.verdict) == ("failure", "failure", "not applicable")
    assert room.swap(room.Memory(GIB, GIB, swap_total=4 * GIB, swap_used=3 * GIB)).verdict == "warning"
    assert room.swap(room.Memory(GIB, GIB, swap_total=4 * GIB)).found == "4 GiB, 0 bytes used"
    assert room.memory_now().total > 0


def test_shared_memory_of_a_container(monkeypatch):
    usage = room.shutil.disk_usage(Path.cwd())
    for size, verdict in ((64 << 20, "warning"), (16 << 20, "failure"), (8 * GIB, "ok")):
        monkeypatch.setattr(room.shutil, "disk_usage", lambda _path, size=size: usage._replace(total=size))
        assert room.shared_memory().verdict == verdict
    monkeypatch.undo()
    assert room.shared_memory(Path("/nowhere/shm")).verdict == "not applicable"


def test_disks_that_can_and_cannot_be_written(tmp_path):
    assert room.disk("kernel cache", tmp_path / "not" / "made" / "yet", "x").verdict in ("ok", "warning")
    assert list(tmp_path.iterdir()) == []  # asking leaves nothing behind
    (tmp_path / "file").write_text("")
    in_the_way = room.disk("runs", tmp_path / "file" / "runs", "set another")
    assert (in_the_way.verdict, in_the_way.way_out) == ("failure", "set another")
    sealed = room.disk("runs", Path("/proc/here"), "set another")  # writable to nobody, root or not
    assert sealed.verdict == "failure"
    assert room.disk("hub cache", Path("/proc/here"), "set another").verdict == "warning"  # it can still be read


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.setattr(room, "home_folder", lambda: None)
    (check,) = room.disks()
    assert (check.name, check.verdict) == ("home", "failure")
    assert "HOME" in check.way_out


def test_folders_follow_the_environment():
    home, cwd = Path("/home/me"), Path("/work")
    folders = {name: folder for name, (folder, _) in room.places({}, cwd, home).items()}
    assert folders["hub cache"] == home / ".cache" / "huggingface" / "hub"
    assert folders["runs"] == cwd / "runs"
    moved = room.places({"HF_HOME": "/big/hf", "XDG_CACHE_HOME": "/big/cache"}, cwd, home)
    assert moved["hub cache"][0] == Path("/big/hf/hub")
    assert moved["kernel cache"][0] == Path("/big/cache/tunedock/kernels")


def test_open_files_here():
    assert room.open_files().found


def test_required_and_optional_packages():
    have = {"transformers": "5.2.0", "peft": "0.10", "accelerate": "1.15", "safetensors": "0.8", "deepspeed": "0.19"}
    made = {check.name: check for check in packages.required(have.get)}
    assert made["transformers"].verdict == "ok"
    assert made["peft"].verdict == "failure"
    assert made["huggingface-hub"].found == "not installed"
    for has_card in (True, False):
        extra = {check.name: check for check in packages.optional(has_card, have.get)}
        assert {check.verdict for check in extra.values()} == {"ok", "not applicable"}
        assert bool(extra["flash-attn"].way_out) is has_card
        assert "ZeRO" in extra["deepspeed"].found
    old = {check.name: check for check in packages.optional(True, {"bitsandbytes": "0.41"}.get)}["bitsandbytes"]
    assert (old.verdict, old.way_out) == ("warning", "`pip install --upgrade 'tunedock[quantize]'`")
    assert packages.installed("pytest")
    assert packages.installed("no-such-package-anywhere") is None


def test_programs_are_run_with_a_limit():
    assert run(["no-such-program-anywhere"]) is None
    assert run([sys.executable, "-c", "print('é')"]) == Ran(0, "é\n")
    failed = run([sys.executable, "-c", "import sys; print('a\\nb', file=sys.stderr); sys.exit(3)"])
    assert (failed.code, failed.ok, failed.trouble) == (3, False, "b")
    began = time.monotonic()
    # A child that keeps the pipe open must not keep us.
    stuck = run([sys.executable, "-c", "import subprocess, sys; subprocess.run(['sleep', '60'])"], 0.5)
    assert (stuck, time.monotonic() - began < 5) == (Ran(None), True)
    assert Ran(1).trouble == "exit code 1"


def test_one_check_that_hangs_or_breaks_takes_no_other_with_it():
    def breaks():
        raise ZeroDivisionError("surprise")

    began = time.monotonic()
    made = survey(
        {
            "disk": lambda: time.sleep(30),
            "docker: all": breaks,
            "system": lambda: [Check("system", "python", "3.13")],
        },
        limit_s=0.5,
    )
    assert time.monotonic() - began < 5
    assert [(check.group, check.name, check.verdict) for check in made] == [
        ("disk", "disk", "failure"), ("docker", "all", "failure"), ("system", "python", "ok"),
    ]  # fmt: skip
    assert "ZeroDivisionError: surprise" in made[1].found


def test_the_survey_of_this_machine_asks_no_network(monkeypatch):
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    made = survey()
    names = [(check.group, check.name) for check in made]
    assert len(names) == len(set(names))
    assert {group for group, _ in names} == {"system", "memory", "disk", "gpu", "packages", "docker", "network"}
    assert not any("the check itself failed" in check.found for check in made)
