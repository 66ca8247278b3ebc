"""All checks that need no torch, side by side: whatever hangs (a dead network disk, a stuck driver) costs its own lines alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from tunedock.plan.machine import cards, containers, network, openmp, packages, room, system
from tunedock.plan.machine.check import Check, failure

LIMIT_S = 15.0
"""Seconds for all of it. The longest chain of waits is one card query, then the three of Docker, 6 s each at worst."""

Source = Callable[[], Sequence[Check]]


def sources() -> dict[str, Source]:
    """Group and what is asked -> the checks, in the order they are shown."""
    lock, asked = threading.Lock(), cache(cards.find)

    def found() -> cards.Cards:
        with lock:  # asked once, by whoever comes first
            return asked()

    def has_card() -> bool:
        return bool(found().of("NVIDIA"))

    return {
        "system: python and platform": lambda: [system.python(), system.platform_(), system.cores(), system.wsl()],
        "system: text": lambda: [system.utf8()],
        "system: compiler": lambda: [system.compiler(), openmp.variables()],
        "memory": lambda: [*room.memory(room.memory_now()), room.shared_memory()],
        "disk": lambda: [*room.disks(), room.open_files()],
        "gpu": lambda: cards.checks(found()),
        "packages": lambda: [*packages.required(), *packages.optional(has_card())],
        "docker": lambda: containers.checks(has_card()),
        "network": network.checks,
    }


def survey(asked: Mapping[str, Source] | None = None, limit_s: float = LIMIT_S) -> list[Check]:
    """The checks of every source. One that has not answered within `limit_s`, or fails itself, is a failed check."""
    asked = sources() if asked is None else asked
    answers: dict[str, Sequence[Check]] = {}

    def answer(title: str, source: Source) -> None:
        try:
            answers[title] = source()
        except Exception as error:  # noqa: BLE001 - policy: a check that breaks is a finding, and the others still count
            group, name = _names(title)
            said = f"the check itself failed: {type(error).__name__}: {error}"
            answers[title] = [failure(group, name, said, "please report this as a bug in tunedock")]

    # Daemons: one that hangs for good must not keep the process from ending.
    threads = [
        threading.Thread(target=answer, args=item, name=f"check {item[0]}", daemon=True) for item in asked.items()
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    made: list[Check] = []
    for title in asked:
        given = answers.get(title)
        made += given if given is not None else [_silent(title, limit_s)]
    return made


def _silent(title: str, limit_s: float) -> Check:
    group, name = _names(title)
    return failure(
        group,
        name,
        f"no answer within {limit_s:.0f} s",
        "something hangs: a network disk that is gone (`df`), a stuck driver (`nvidia-smi`), a daemon (`docker info`)",
    )


def _names(title: str) -> tuple[str, str]:
    group, _, name = title.partition(": ")
    return group, name or group
