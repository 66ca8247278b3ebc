"""Names of images: `registry.example:5000/team/support-bot:production`, or `@sha256:...` in place of the tag.

The grammar is that of the distribution project, and so is what is left unsaid: without a host a name means Docker Hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from tunedock.errors import RecipeError

HUB = "docker.io"

_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9][A-Za-z0-9-]*)*|\[[0-9a-fA-F:]+\])(?::\d{1,5})?"
)
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LONGEST = 255
LAST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Reference:
    host: str
    """Name and port of the registry, as `docker login` knows it."""
    repository: str
    tag: str | None = None
    digest: str | None = None
    named: bool = True
    """Whether the host was written; a bare `support-bot` may just as well be an image of this machine."""

    @property
    def place(self) -> str:
        """Host and repository: what an engine calls a repository."""
        return f"{self.host}/{self.repository}"

    def tagged(self, tag: str) -> Reference:
        return replace(self, tag=is_tag(tag), digest=None)

    def __str__(self) -> str:
        return f"{self.place}{f':{self.tag}' if self.tag else ''}{f'@{self.digest}' if self.digest else ''}"


def parse(name: str) -> Reference:
    """Raises RecipeError for what is no name of an image."""
    rest, at, digest = name.partition("@")
    if at and not is_digest(digest):
        raise _error(name, f"`{digest}` is no digest", "a digest is `sha256:` and 64 hex digits")
    rest, tag = _without_tag(rest)
    if tag is not None and not _TAG.fullmatch(tag):
        raise _error(name, f"`{tag}` is no tag", "a tag is at most 128 letters, digits, `_`, `.` and `-`")
    first, slash, others = rest.partition("/")
    named = bool(slash) and ("." in first or ":" in first or first == "localhost")
    host, repository = (first, others) if named else (HUB, rest)
    if host == "index.docker.io":
        host = HUB
    if not _HOST.fullmatch(host) or _port(host) > LAST_PORT:
        raise _error(name, f"`{host}` is no host", "write `host/repository:tag`, or `host:port/repository:tag`")
    if not _REPOSITORY.fullmatch(repository) or len(repository) > _LONGEST:
        raise _error(
            name,
            f"`{repository}` is no repository",
            "parts between slashes are small letters and digits, with `-`, `_`, `.` inside",
        )
    if host == HUB and "/" not in repository:
        repository = f"library/{repository}"
    return Reference(host, repository, tag, digest or None, named)


def is_digest(text: str) -> bool:
    return bool(_DIGEST.fullmatch(text))


def is_tag(text: str) -> str:
    """The tag itself. Raises RecipeError for what cannot be one."""
    if not _TAG.fullmatch(text):
        raise _error(text, "this is no tag", "a tag is at most 128 letters, digits, `_`, `.` and `-`")
    return text


def _port(host: str) -> int:
    """What stands behind the last colon, outside of an address in brackets; 0 for none."""
    _, colon, port = host.rpartition("]")[2].rpartition(":")
    return int(port) if colon else 0


def _without_tag(name: str) -> tuple[str, str | None]:
    """A colon after the last slash begins a tag; one before it, a port."""
    head, colon, tail = name.rpartition(":")
    return (head, tail) if colon and "/" not in tail else (name, None)


def _error(name: str, message: str, hint: str) -> RecipeError:
    return RecipeError(message, where=f"image {name[:200]}", hint=hint)
