"""Control groups: against the kernel's own files where there are some, and against laid-out trees of both versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tunedock.plan.control_group import Group, free_bytes, groups, host_bytes, oom_kills

MIB = 1 << 20


def lay_out(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def v2(limit: str, used: int, inactive: int, kills: int = 0) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 1\nfile 2\ninactive_file {inactive}\nactive_file 3\n",
        "memory.events": f"low 0\nhigh 0\nmax 12\noom 1\noom_kill {kills}\noom_group_kill 0\n",
    }


def v1(limit: int, used: int, inactive: int, kills: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": f"{limit}\n",
        "memory.usage_in_bytes": f"{used}\n",
        "memory.stat": f"cache 1\ninactive_file 9\ntotal_inactive_file {inactive}\n",
        "memory.oom_control": f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n",
    }


def process(folder: Path, *, cgroup: str, mounts: list[str]) -> Path:
    return lay_out(folder / "proc", {"self/cgroup": cgroup, "self/mountinfo": "\n".join(mounts) + "\n"})


def under(folder: Path, place: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{place}/{name}" if place else name: text for name, text in files.items()}


def test_v2_walks_up_to_the_tightest_parent(tmp_path: Path) -> None:
    mount = tmp_path / "fs"
    lay_out(mount, under(mount, "a", v2(str(100 * MIB), 80 * MIB, 10 * MIB)))
    lay_out(mount, under(mount, "a/b", v2("max", 50 * MIB, 0, kills=3)))
    line = f"30 23 0:26 / {mount} rw,nosuid - cgroup2 cgroup2 rw"
    proc = process(tmp_path, cgroup="0::/a/b\n", mounts=["22 1 8:1 / / rw - ext4 /dev/sda1 rw", line])
    found = groups(proc=proc)
    assert [group.path for group in found] == [mount / "a/b", mount / "a"]  # the root of v2 has no memory files
    assert free_bytes(found) == 30 * MIB
    assert oom_kills(found, proc=proc) == 3


def test_v1_beside_an_empty_v2(tmp_path: Path) -> None:
    """A hybrid host: v2 is mounted too, without the memory controller."""
    mount, unified = tmp_path / "memory", tmp_path / "unified"
    unified.mkdir()
    lay_out(mount, v1(9223372036854771712, 900 * MIB, 0))
    lay_out(mount, under(mount, "job", v1(64 * MIB, 60 * MIB, 20 * MIB, kills=1)))
    mounts = [
        f"40 23 0:30 / {unified} rw - cgroup2 cgroup2 rw",
        f"41 23 0:31 / {tmp_path}/cpu rw - cgroup cgroup rw,cpu",
        f"42 23 0:32 / {mount} rw - cgroup cgroup rw,memory",
    ]
    proc = process(tmp_path, cgroup="4:memory:/job\n1:cpu:/\n0::/\n", mounts=mounts)
    found = groups(proc=proc)
    assert [(group.path, group.version) for group in found] == [(mount / "job", 1), (mount, 1)]
    assert free_bytes(found) == 24 * MIB
    assert oom_kills(found, proc=proc) == 1


def test_a_container_sees_its_own_part_only(tmp_path: Path) -> None:
    """Without a cgroup namespace the path is the host's and the mount shows the container's folder."""
    mount = lay_out(tmp_path / "memory", v1(10 * MIB, 4 * MIB, 0))
    line = f"42 23 0:32 /docker/0123 {mount} rw - cgroup cgroup rw,memory"
    found = groups(proc=process(tmp_path, cgroup="4:memory:/docker/0123\n", mounts=[line]))
    assert [group.path for group in found] == [mount]
    assert free_bytes(found) == 6 * MIB


def test_more_than_the_limit_in_use_leaves_nothing(tmp_path: Path) -> None:
    group = Group(lay_out(tmp_path / "g", v2(str(10 * MIB), 12 * MIB, 0)), 2)
    assert free_bytes([group]) == 0


@pytest.mark.parametrize("cgroup", ["", "nonsense\n", "3:cpu:/x\n"])
def test_where_there_are_no_groups_nothing_is_said(tmp_path: Path, cgroup: str) -> None:
    proc = process(tmp_path, cgroup=cgroup, mounts=[])
    assert groups(proc=proc) == groups(proc=tmp_path / "none") == []
    assert free_bytes([]) is None
    assert oom_kills([], proc=proc) is None
    lay_out(proc, {"vmstat": "pgfault 1\noom_kill 5\n"})
    assert oom_kills([], proc=proc) == 5


@pytest.mark.skipif(not groups(), reason="no control group counts this process's memory")
def test_the_kernel_counts_what_a_process_takes() -> None:
    own = groups()[0]
    held = "import sys; held = b'x' * (128 << 20); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert groups(child.pid)[0] == own
        assert (own.used_bytes or 0) > 128 * MIB
        child.communicate()
    assert own.oom_kills is not None


def test_the_memory_there_is(tmp_path: Path) -> None:
    lay_out(tmp_path, {"tight/memory.max": f"{100 * MIB}\n", "none/memory.max": "max\n"})
    tight, none = Group(tmp_path / "tight", 2), Group(tmp_path / "none", 2)
    assert host_bytes([tight, none]) == 100 * MIB
    assert host_bytes([none]) == host_bytes([]) == psutil.virtual_memory().total
