"""Names that move: `support-bot:production` stands for a digest, is promoted to another and rolled back.

A digest that gives way is left in the same registry under a tag that says when and how (`production.was-TIME-DIGEST`), written
before the name moves. So nothing is lost if we die in between, every machine reads one history, from one list of tags, and a
rollback is a few small requests that copy nothing.

    was     replaced by a promotion
    back    rolled back from

What a rollback goes to is found by replaying the history as a stack: a promotion puts what it replaces on top, a rollback takes off
what it goes back to. So two rollbacks in a row go two versions back, and never forward to the one that was just found bad.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from tunedock.errors import EngineError, RecipeError
from tunedock.image.reference import Reference
from tunedock.image.registry import Manifest, Registry

LONGEST_NAME = 32
"""Characters of a name that moves: its history's tags hold a time and a digest too, and end at 128."""

_HISTORY = re.compile(r"(?P<name>.+)\.(?P<how>was|back)-(?P<time>\d{8}T\d{9}Z)-(?P<digest>[0-9a-f]{64})")
_TIME = "%Y%m%dT%H%M%S%f"
_STEP = timedelta(milliseconds=1)


@dataclass(frozen=True, slots=True)
class Former:
    """A digest that a name stood for until `until`."""

    digest: str
    until: datetime
    how: Literal["was", "back"]

    def tag(self, name: str) -> str:
        return f"{name}.{self.how}-{self.until.strftime(_TIME)[:-3]}Z-{self.digest.removeprefix('sha256:')}"


@dataclass(frozen=True, slots=True)
class Moved:
    """What a promotion or a rollback did."""

    name: str
    digest: str
    before: str | None

    @property
    def changed(self) -> bool:
        return self.digest != self.before


def history(name: str, tags: Sequence[str]) -> list[Former]:
    """What a name stood for before, oldest first, read from a repository's tags."""
    found = []
    for tag in tags:
        match = _HISTORY.fullmatch(tag)
        if match and match["name"] == name:
            try:
                until = datetime.strptime(match["time"][:-1] + "000", _TIME).replace(tzinfo=UTC)
            except ValueError:
                continue  # month 13: nobody's history
            found.append(Former(f"sha256:{match['digest']}", until, "was" if match["how"] == "was" else "back"))
    return sorted(found, key=lambda former: (former.until, former.how, former.digest))


def is_history(tag: str) -> bool:
    return _HISTORY.fullmatch(tag) is not None


def behind(current: str, past: Sequence[Former]) -> list[str]:
    """The digests a rollback may go to, nearest first."""
    stack: list[str] = []
    for place, former in enumerate(past):
        after = past[place + 1].digest if place + 1 < len(past) else current
        if former.how == "was":
            if former.digest != after:  # else we died between the note and the move, or it was promoted to what it was
                stack.append(former.digest)
        elif after in stack:
            while stack.pop() != after:
                pass
    return [digest for digest in reversed(stack) if digest != current]


def promote(registry: Registry, target: Reference, source: str) -> Moved:
    """Moves a name to what `source` (a tag or a digest of the same repository) stands for.

    Raises EngineError where the registry has no such thing, RecipeError for a name that cannot have a history.
    """
    name = movable(target)
    manifest = registry.manifest(target.repository, source)
    return _move(registry, target, manifest, registry.digest(target.repository, name), "was")


def roll_back(registry: Registry, target: Reference, to: str | None = None) -> Moved:
    """Moves a name to what it stood for before, or to one of its former digests (or the beginning of one).

    Raises EngineError where there is nothing to go back to.
    """
    name = movable(target)
    current = registry.digest(target.repository, name)
    if current is None:
        raise EngineError(
            f"it has no `{target.repository}:{name}`",
            where=registry.host,
            hint=f"`tunedock image tags {target.place}` lists what it has",
        )
    past = history(name, registry.tags(target.repository))
    digest = _named(target, past, to) if to is not None else next(iter(behind(current, past)), None)
    if digest is None:
        raise EngineError(
            f"`{target.repository}:{name}` has nothing to go back to",
            where=registry.host,
            hint="name a digest by --to; `tunedock image tags` shows the history of a name",
        )
    return _move(registry, target, registry.manifest(target.repository, digest), current, "back")


def movable(target: Reference) -> str:
    """The name a reference means to move. Raises RecipeError for one that must not, or could have no history."""
    name = target.tag
    if name is None or target.digest is not None:
        raise RecipeError(
            "a name that moves is a tag", where=f"image {target}", hint=f"write `{target.place}:production`"
        )
    if is_history(name):
        raise RecipeError("this tag is a piece of history, which stays as it is", where=f"image {target}")
    if len(name) > LONGEST_NAME:
        raise RecipeError(
            f"a name that moves has at most {LONGEST_NAME} characters, for its history stands in tags",
            where=f"image {target}",
        )
    return name


def _named(target: Reference, past: Sequence[Former], to: str) -> str:
    wanted = to.removeprefix("sha256:").lower()
    found = sorted(
        {former.digest for former in past if wanted and former.digest.removeprefix("sha256:").startswith(wanted)}
    )
    if len(found) != 1:
        which = f"is the beginning of {len(found)} digests" if found else "is no digest"
        raise EngineError(
            f"`{to}` {which} in the history of `{target.repository}:{target.tag}`",
            where=target.host,
            hint=f"`tunedock image tags {target}` shows it; `tunedock image promote` takes any digest",
        )
    return found[0]


def _move(
    registry: Registry, target: Reference, manifest: Manifest, before: str | None, how: Literal["was", "back"]
) -> Moved:
    name = movable(target)
    moved = Moved(str(target), manifest.digest, before)
    if before is not None and moved.changed:
        past = history(name, registry.tags(target.repository))
        now = datetime.now(UTC)
        if past and past[-1].until >= now:  # the clock of another machine is ahead: after it all the same
            now = past[-1].until + _STEP
        left = Former(before, now, how)
        registry.put(target.repository, left.tag(name), registry.manifest(target.repository, before))
    if moved.changed:
        registry.put(target.repository, name, manifest)
    return moved
