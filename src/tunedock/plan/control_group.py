"""What the kernel's control groups (cgroups, v1 and v2) allow a process, have it use, and killed for want of memory.

A process may be in a group of a group; each level can have its own limit, so all of them up to the mount are read. In a container
the mount shows only the container's part of the hierarchy, and that is all there is to walk.

Files, by version: `memory.max`, `memory.current`, `memory.stat` (inactive_file), `memory.events` (oom_kill); in v1
`memory.limit_in_bytes`, `memory.usage_in_bytes`, `memory.stat` (total_inactive_file), `memory.oom_control` (oom_kill).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Group:
    """One level: a folder with memory files."""

    path: Path
    version: int

    @property
    def limit_bytes(self) -> int | None:
        """None where there is no limit; v1 says so by a number near 2**63."""
        limit = _number(self.path / ("memory.max" if self.version == 2 else "memory.limit_in_bytes"))
        return None if limit is None or limit >= 1 << 60 else limit

    @property
    def used_bytes(self) -> int | None:
        """Bytes in use less cached files nobody has read lately, which the kernel drops before it kills."""
        used = _number(self.path / ("memory.current" if self.version == 2 else "memory.usage_in_bytes"))
        cached = _entry(self.path / "memory.stat", "inactive_file" if self.version == 2 else "total_inactive_file")
        return None if used is None else max(0, used - (cached or 0))

    @property
    def oom_kills(self) -> int | None:
        """Processes of this group the kernel has killed for want of memory, in the group or on the host."""
        return _entry(self.path / ("memory.events" if self.version == 2 else "memory.oom_control"), "oom_kill")


def groups(pid: int | None = None, *, proc: Path = PROC) -> list[Group]:
    """The groups that count a process's memory, its own first, then its parents; empty where there are none (not Linux)."""
    own = proc / ("self" if pid is None else str(pid))
    try:
        places = dict(_places((own / "cgroup").read_text(encoding="utf-8")))
        mounts = list(_mounts((own / "mountinfo").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []
    for version, root, mount in mounts:
        if version not in places:
            continue
        found = _levels(Group(_folder(places[version], root, mount), version), mount)
        if found:
            return found
    return []


def free_bytes(found: list[Group]) -> int | None:
    """What the tightest of the groups still allows; None where none has a limit."""
    rooms = [
        group.limit_bytes - group.used_bytes
        for group in found
        if group.limit_bytes is not None and group.used_bytes is not None
    ]
    return max(0, min(rooms)) if rooms else None


def host_bytes(found: list[Group]) -> int:
    """Main memory there is for a process: the least of what the host has and these groups allow."""
    limits = (group.limit_bytes for group in found)
    return min([int(psutil.virtual_memory().total), *(limit for limit in limits if limit is not None)])


def host_free_bytes(found: list[Group]) -> int:
    """Main memory a process can take: the least of what the host has and these groups allow."""
    available, allowed = int(psutil.virtual_memory().available), free_bytes(found)
    return available if allowed is None else min(available, allowed)


def oom_kills(found: list[Group], *, proc: Path = PROC) -> int | None:
    """Kills for want of memory counted for the process's own group; for the whole host where a group does not count."""
    own = found[0].oom_kills if found else None
    return own if own is not None else _entry(proc / "vmstat", "oom_kill")


def _places(text: str) -> Iterator[tuple[int, str]]:
    """(version, path in the hierarchy) of the memory controller, from `/proc/PID/cgroup`."""
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield 2, path
        elif "memory" in controllers.split(","):
            yield 1, path


def _mounts(text: str) -> Iterator[tuple[int, str, Path]]:
    """(version, which part of the hierarchy it shows, where) of each mount, v1's before v2's, which may lack memory."""
    found = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split(None, 2)
        if kind == "cgroup2" or (kind == "cgroup" and "memory" in options.split(",")):
            found.append((2 if kind == "cgroup2" else 1, root, Path(mount.replace("\\040", " "))))
    yield from sorted(found, key=lambda mount: mount[0])


def _folder(place: str, root: str, mount: Path) -> Path:
    """Where a path of the hierarchy is seen: below the mount, whose own root may be a part of the hierarchy."""
    inside = place[len(root) :] if root != "/" and place.startswith(root) else place
    parts = [part for part in inside.split("/") if part not in ("", "..")]
    folder = mount.joinpath(*parts)
    return folder if folder.is_dir() else mount


def _levels(group: Group, mount: Path) -> list[Group]:
    """The group and its parents up to the mount, those with memory files; the top of v2's hierarchy has none."""
    chain = [group.path, *group.path.parents]
    inside = chain[: chain.index(mount) + 1] if mount in chain else [group.path]
    levels = [Group(path, group.version) for path in inside]
    return [level for level in levels if level.used_bytes is not None]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # `max`, or no such file
        return None


def _entry(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
