"""What the runs on one machine have been promised of it, read from the labels of their containers; what does not fit is refused.

A container is made before it is asked whether it fits, and only those made before it count: of two that are started at once the
first gets what there is, with no lock that several users would have to share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunedock.errors import RecipeError
from tunedock.launch.container import LABEL
from tunedock.plan.machine.bounds import bytes_text
from tunedock.recipe.container import Container, size_bytes

STALE_S = 120.0
"""A container that was made so long ago and never started was left by somebody who died."""

AT_WORK = ("created", "running", "paused", "restarting")

HIDE_ALL = ("", "-1", "none", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES by which people hide every card."""

WAY_OUT = "wait for one of them, stop one (`tunedock runs stop`), or ask for less"


@dataclass(frozen=True, slots=True)
class Share:
    """What one container has."""

    name: str
    cpus: float = 0.0
    memory_bytes: int = 0
    gpus: tuple[str, ...] = ()
    mps: int | None = None
    """Percent of each of its GPUs; None where it has them alone."""


def shares(
    containers: Iterable[Mapping[str, Any]], *, before: str | None = None, now: float | None = None
) -> list[Share]:
    """Of the engine's list of containers (`GET /containers/json?all=1`) those of ours that have a share of the machine.

    `before`: the id of one that has been made; only those that were made before it count.
    """
    now = time.time() if now is None else now
    ours = [each for each in containers if f"{LABEL}version" in (each.get("Labels") or {})]
    order = {str(each["Id"]): (float(each.get("Created", 0)), str(each["Id"])) for each in ours}
    found = []
    for each in ours:
        identity, state = str(each["Id"]), each.get("State")
        stale = state == "created" and now - float(each.get("Created", 0)) > STALE_S
        later = before is not None and before in order and order[identity] >= order[before]
        if state in AT_WORK and not stale and not later and identity != before:
            found.append(_share(each))
    return found


def _share(container: Mapping[str, Any]) -> Share:
    told = {name.removeprefix(LABEL): value for name, value in container["Labels"].items() if name.startswith(LABEL)}
    names = container.get("Names") or [container["Id"][:12]]
    percent = int(_number(told.get("mps")))
    return Share(
        name=str(names[0]).lstrip("/"),
        cpus=_number(told.get("cpus")),
        memory_bytes=int(_number(told.get("memory"))),
        gpus=tuple(filter(None, told.get("gpus", "").split(","))),
        mps=percent or None,
    )


def _number(label: str | None) -> float:
    """What a label promises. Anybody may put a label of ours on a container of theirs: what is no amount promises nothing."""
    try:
        found = float(label or 0)
    except ValueError:
        return 0.0
    return found if 0.0 <= found < math.inf else 0.0


def refuse_too_much(
    given: Container, gpus: Sequence[str], others: Sequence[Share], *, cpus: int, memory_bytes: int
) -> None:
    """Raises RecipeError where the machine has not what is asked for besides what others have. `gpus`: the ids chosen."""
    if given.cpus is not None:
        taken = sum(share.cpus for share in others)
        if given.cpus + taken > cpus:
            raise _too_much(
                "cpus", f"{given.cpus:g}", "processors", f"{cpus}", f"{taken:g}", [s for s in others if s.cpus]
            )
    if given.memory is not None:
        taken_bytes = sum(share.memory_bytes for share in others)
        if size_bytes(given.memory) + taken_bytes > memory_bytes:
            held = [share for share in others if share.memory_bytes]
            amounts = (bytes_text(memory_bytes), bytes_text(taken_bytes))
            raise _too_much("memory", given.memory, "of memory", *amounts, held)
    for gpu in gpus:
        held = [share for share in others if gpu in share.gpus or "all" in share.gpus or (gpu == "all" and share.gpus)]
        if held and not _shared(given.mps, held):
            raise _gpu_taken(gpu, given.mps, held)


def choose_gpus(
    given: Container, cards: Sequence[str], others: Sequence[Share], *, visible: str | None, processes: int | None
) -> tuple[str, ...]:
    """The ids of the GPUs a run gets. `cards`: all the machine's; `visible`: CUDA_VISIBLE_DEVICES.

    Raises RecipeError where so many are not free, or one is named that is not there.
    """
    asked, shown = given.gpus, _shown(cards, visible)
    if asked == "none":
        return ()
    if asked == "all":
        return tuple(shown) or ("all",)  # what nobody sees here, the engine may, and else says why not
    if asked == "auto":
        return tuple(_first(shown, given, others, processes)) if processes and shown else tuple(shown)
    if isinstance(asked, int):
        found = _first(shown, given, others, asked)
        if len(found) < asked:
            held = f"; the others are taken{_held([s for s in others if s.gpus])}" if len(found) < len(shown) else ""
            raise RecipeError(
                f"`gpus: {asked}`, and {len(found)} of {len(shown)} on this machine are free{held}",
                where="launch.container.gpus",
                hint=WAY_OUT if shown else "leave it out to train on the CPU; `tunedock doctor` looks for GPUs",
            )
        return tuple(found)
    named = tuple(str(one) for one in asked)
    missing = [one for one in named if one.isdecimal() and cards and one not in cards]
    if missing:
        raise RecipeError(
            f"there is no GPU {missing[0]} on this machine: it has {', '.join(cards)}", where="launch.container.gpus"
        )
    return named


def _shown(cards: Sequence[str], visible: str | None) -> list[str]:
    if visible is None:
        return list(cards)
    return [] if visible.strip() in HIDE_ALL else [name.strip() for name in visible.split(",") if name.strip()]


def _first(shown: Sequence[str], given: Container, others: Sequence[Share], count: int) -> list[str]:
    return _free(shown, given, others)[:count]


def _free(shown: Sequence[str], given: Container, others: Sequence[Share]) -> list[str]:
    """The cards on which there is room, those that fewer share first."""
    holders = {gpu: [share for share in others if gpu in share.gpus or "all" in share.gpus] for gpu in shown}
    free = [gpu for gpu in shown if not holders[gpu] or _shared(given.mps, holders[gpu])]
    return sorted(free, key=lambda gpu: sum(share.mps or 0 for share in holders[gpu]))


def _shared(mps: int | None, held: Sequence[Share]) -> bool:
    """Whether all of a card's users share it by MPS, and one more finds room."""
    return (
        mps is not None and all(share.mps is not None for share in held) and mps + sum(s.mps or 0 for s in held) <= 100
    )


def _too_much(key: str, asked: str, of: str, there: str, taken: str, held: Sequence[Share]) -> RecipeError:
    others = f", of which {taken} {'is' if key == 'memory' else 'are'} taken{_held(held)}" if held else ""
    hint = WAY_OUT if held else "ask for less"
    return RecipeError(
        f"`{key}: {asked}`, and this machine has {there} {of}{others}", where=f"launch.container.{key}", hint=hint
    )


def _gpu_taken(gpu: str, mps: int | None, held: Sequence[Share]) -> RecipeError:
    name = "the GPUs are" if gpu == "all" else f"GPU {gpu} is"
    how = "" if mps is None else f", and {mps}% more do not fit beside it"
    hint = f"{WAY_OUT}; `launch.container.mps` lets several runs have one GPU" if mps is None else WAY_OUT
    return RecipeError(f"{name} taken{_held(held)}{how}", where="launch.container.gpus", hint=hint)


def _held(others: Sequence[Share]) -> str:
    names = [share.name + (f" ({share.mps}%)" if share.mps else "") for share in others]
    return f" by {', '.join(names[:5])}" if names else ""
