"""One image made: its context written, the builder run and listened to, the result looked into."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from tunedock.errors import DiskError, EngineError, RecipeError, TunedockError
from tunedock.image import context, store
from tunedock.image.builders import Build, Builder, choose
from tunedock.image.context import Sources
from tunedock.image.engine import connected, told
from tunedock.image.reference import parse
from tunedock.image.targets import Target
from tunedock.plan.machine.symptoms import known_way_out

LIMIT_S = 6 * 3600.0
"""Seconds after which a build is given up on: an engine's packages are gigabytes, and are compiled where there is no wheel."""

TAIL = 60
"""Lines of a build's output that are looked at when it fails."""

SOURCE = "https://github.com/tunedock/tunedock"


@dataclass(frozen=True, slots=True)
class Request:
    """An image that is wanted."""

    target: Target
    sources: Sources
    tag: str | None = None
    base: str | None = None
    """In the place of the target's base image: a mirror's, one pinned by digest, one of your own."""
    pin: bool = False
    """Whether the base's tag is looked up at its registry and its digest used."""
    index: str | None = None
    torch_index: str | None = None
    offline: bool = False
    """Whether only the folder of wheels is to be used."""
    platform: str | None = None
    builder: str | None = None
    fresh: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Built:
    name: str
    builder: str
    seconds: float
    image: store.Image | None
    """What the engine says of it; None where the builder keeps its images elsewhere (podman, buildah)."""
    left_out: tuple[str, ...]


def build(request: Request, tell: Callable[[str], None]) -> Built:
    """Makes the image; `tell` gets each line the builder prints. Raises EngineError, DiskError, RecipeError, DependencyError."""
    _refuse_contradictions(request)
    if request.tag is not None:
        parse(request.tag)
    builder = choose(request.builder)
    name = request.tag or request.target.default_tag
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tunedock-image-") as folder:
        place = Path(folder, "context")
        place.mkdir()
        made = context.write(place, request.target, request.sources, mounts=builder.mounts)
        command = builder.command(_build(request, place, Path(folder), name))
        tell(f"{builder.name} {builder.version} ({builder.program}): {name}")
        run(command, builder, tell)
    image = None
    if builder.name.startswith("docker"):
        with connected() as client, told(name):
            image = store.inspect(client, name)
    return Built(name, builder.name, time.monotonic() - began, image, tuple(made.left_out))


def labels(request: Request, base: str) -> dict[str, str]:
    """What an image says of itself, beside what stands in its Dockerfile; `request.labels` are a run's."""
    package = request.sources.package
    found = {
        "org.opencontainers.image.version": package.version,
        "org.opencontainers.image.revision": package.revision(),
        "org.opencontainers.image.source": SOURCE,
        "org.opencontainers.image.base.name": base.split("@")[0],
        "org.opencontainers.image.base.digest": base.partition("@")[2] or None,
        **request.labels,
    }
    return {key: value for key, value in found.items() if value}


def _build(request: Request, place: Path, private: Path, name: str) -> Build:
    base = request.base or request.target.base
    if request.pin and "@" not in base:
        base = _pinned(base)
    arguments = {"BASE": base} if base != request.target.base else {}
    secrets = {}
    indexes = {"INDEX": request.index, "TORCH_INDEX": _torch_index(request)}
    if any(_private(url) for url in indexes.values() if url):
        secrets["pip"] = _configuration(private / "pip.conf", indexes)
        indexes = {"INDEX": None, "TORCH_INDEX": "" if request.target.torch_index else None}
    arguments |= {key: url for key, url in indexes.items() if url is not None}
    if request.offline:
        arguments["OFFLINE"] = "1"
    return Build(
        context=place,
        tags=[name],
        arguments=arguments,
        labels=labels(request, base),
        secrets=secrets,
        platform=request.platform,
        fresh=request.fresh,
    )


def _torch_index(request: Request) -> str | None:
    """None: the target's own. Empty where there is nothing to look for elsewhere: a folder of wheels that has PyTorch."""
    if request.target.torch_index is None:
        return None
    if request.torch_index is not None:
        return request.torch_index
    wheels = request.sources.wheels
    return "" if request.offline or (wheels is not None and any(wheels.glob("torch-*.whl"))) else None


def _refuse_contradictions(request: Request) -> None:
    if request.offline and request.sources.wheels is None:
        raise RecipeError(
            "without a network packages come from a folder, and none is named",
            where="--offline",
            hint="add --wheels DIR",
        )
    if request.platform and request.platform not in request.target.platforms:
        raise RecipeError(
            f"`{request.target.name}` is not made for {request.platform}",
            where="--platform",
            hint=f"one of {', '.join(request.target.platforms)}",
        )
    if request.target.role != "serve" and (request.sources.model or request.sources.adapter):
        raise RecipeError(
            "only a serving image has a model in it",
            where="--model",
            hint="add --role serve; training mounts its model",
        )


def _private(url: str) -> bool:
    """Whether pip needs a file for it: a password, or a host that has to be named as trusted because it speaks plain HTTP.

    Raises RecipeError for what is no address.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise RecipeError(f"this is no address: {error}", where="--index, --torch-index") from None
    return parts.username is not None or parts.scheme == "http"


def _configuration(path: Path, indexes: Mapping[str, str | None]) -> Path:
    """pip's own file, which only the steps that install see. Percent signs are doubled: pip reads it with interpolation."""
    lines = ["[global]"]
    for key, url in (("index-url", indexes["INDEX"]), ("extra-index-url", indexes["TORCH_INDEX"])):
        if url:
            lines.append(f"{key} = {url.replace('%', '%%')}")
    plain = [urlsplit(url).hostname for url in indexes.values() if url and url.startswith("http://")]
    if plain:
        lines.append(f"trusted-host = {' '.join(str(host) for host in plain)}")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write("\n".join(lines) + "\n")
    return path


def _pinned(base: str) -> str:
    """`python:3.12-slim` -> `python:3.12-slim@sha256:...`, as its registry has it now."""
    with connected() as client, told(base):
        return f"{base}@{client.images.get_registry_data(base).id}"


def run(command: list[str], builder: Builder, tell: Callable[[str], None], limit_s: float = LIMIT_S) -> None:
    """Runs a builder to its end. Raises EngineError with the line that says why it failed."""
    tail: deque[str] = deque(maxlen=TAIL)
    process = subprocess.Popen(  # noqa: S603 - an argument list of ours, a program of the user's path
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **builder.environment},
        start_new_session=True,  # so that its children can be ended with it
    )
    late = threading.Event()

    def end() -> None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)

    def give_up() -> None:
        late.set()
        end()

    timer = threading.Timer(limit_s, give_up)
    timer.start()
    before = _end_on_sigterm()
    try:
        assert process.stdout is not None  # noqa: S101 - asked for above
        for line in process.stdout:
            tail.append(line.rstrip())
            tell(tail[-1])
        code = process.wait()
    finally:
        timer.cancel()
        end()
        process.wait()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if late.is_set():
        raise EngineError(f"the build did not end within {limit_s / 3600:.0f} hours", where=builder.name)
    if code:
        raise failure(list(tail), builder)


def _end_on_sigterm() -> Callable[[int, FrameType | None], Any] | int | None:
    """SIGTERM would end this process and leave the builder at work: it becomes an exit that ends both. The handler there was."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


_FAILURES = (
    (
        r"No matching distribution found for (\S+)",
        "the index has no such version for this Python and platform: --index or --wheels names another place",
    ),
    (
        r"Could not install packages due to an OSError|Connection to \S+ timed out|Temporary failure (?:in name |)resol",
        "the network inside the build does not reach the packages: --index names a mirror, --wheels a folder",
    ),
    (
        r"pull access denied|failed to resolve source metadata|manifest unknown|not found: manifest|error getting cred",
        "the base image cannot be had: --base names another, a mirror's for example; `docker login` where it needs one",
    ),
    (
        r"the --mount option requires BuildKit|unknown flag: --(?:secret|progress)",
        "this builder is too old: --builder names another",
    ),
    (
        r"unexpected EOF|error reading from server|transport is closing",
        "the engine ended in the middle, or was restarted: call it again when it answers (`docker info`)",
    ),
    (
        r"failed to do request: .*: no such host|failed to resolve reference",
        "the registry of the base image cannot be reached: --base names a mirror's, or an image that is here",
    ),
    (
        r"exec format error",
        "this machine cannot run programs of that platform: `docker run --privileged tonistiigi/binfmt --install all`",
    ),
)
"""A piece of what a builder prints -> the way out; most special first."""


def failure(tail: list[str], builder: Builder) -> TunedockError:
    """The error of a build that failed: the last line that tells of one."""
    text = "\n".join(tail)
    lines = [re.sub(r"^#\d+ (?:[\d.]+ )?", "", line).strip() for line in tail if line.strip()]
    errors = [line for line in lines if re.search(r"\b(?:ERROR|Error|error|failed|denied|E:)", line)]
    specific = [
        line
        for line in errors
        if not re.search(r"did not complete successfully|executor failed running|failed to solve", line)
    ]
    message = (specific or errors or lines or ["it said nothing"])[-1]
    full = [line for line in lines if "no space left on device" in line.lower()]
    if full:
        return DiskError(
            full[-1], where=builder.name, hint="free room where the engine keeps its images: `docker system prune`"
        )
    hint = next((way_out for pattern, way_out in _FAILURES if re.search(pattern, text)), None)
    return EngineError(message, where=builder.name, hint=hint or known_way_out(text) or "the lines above it say more")
