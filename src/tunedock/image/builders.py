"""Programs that make an image of a Dockerfile: which are here, what they can, and their command lines as argument lists.

Docker's client and BuildKit are two things: since 23 the client builds through a plugin (buildx), and without it falls back to the
builder of old; clients before that speak to BuildKit themselves when `DOCKER_BUILDKIT=1` says so. So every `docker` on the path is
looked at, and the first that gets BuildKit is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunedock.errors import DependencyError, RecipeError
from tunedock.plan.machine.command import run

NAMES = ("docker", "podman", "buildah")
PLUGIN_SINCE = 23
"""The docker client that builds through buildx alone."""

INSTALL = "install Docker with buildx (https://docs.docker.com/engine/install), podman or buildah"


@dataclass(frozen=True, slots=True)
class Builder:
    """A program and the way it builds."""

    name: str
    """`docker buildx`, `docker with BuildKit`, `docker without BuildKit`, `podman`, `buildah`."""
    program: Path
    version: str
    mounts: bool
    """Whether it knows caches, secrets and folders that are mounted for one step."""
    verb: tuple[str, ...] = ("build",)
    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    def command(self, build: Build) -> list[str]:
        """The argument list. Raises RecipeError for a secret where the builder has no way to keep one."""
        if build.secrets and not self.mounts:
            raise RecipeError(
                f"{self.name} ({self.program}) would write the address, with its password, into the image",
                where="--index",
                hint=f"a builder that knows secrets is needed: {INSTALL}",
            )
        command = [str(self.program), *self.verb, *self.options, "--file", str(build.context / "Dockerfile")]
        for tag in build.tags:
            command += ["--tag", tag]
        for flag, values in (("--build-arg", build.arguments), ("--label", build.labels)):
            for name, value in values.items():
                command += [flag, f"{name}={value}"]
        for name, path in build.secrets.items():
            command += ["--secret", f"id={name},src={path}"]
        if build.platform:
            command += ["--platform", build.platform]
        if build.fresh:
            command.append("--no-cache")
        return [*command, str(build.context)]


@dataclass(frozen=True, slots=True)
class Build:
    """One image to make."""

    context: Path
    tags: Sequence[str]
    arguments: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Path] = field(default_factory=dict)
    """Name -> a file that the steps which name it see, and no layer does."""
    platform: str | None = None
    fresh: bool = False


def choose(name: str | None = None, environment: Mapping[str, str] = os.environ) -> Builder:
    """The named builder, or the best there is: one with mounts before one without. Raises DependencyError where there is none."""
    if name is not None and name not in NAMES:
        raise RecipeError(f"there is no builder `{name}`", where="--builder", hint=f"one of {', '.join(NAMES)}")
    here = [builder for builder in found(environment) if name is None or builder.name.split()[0] == name]
    if not here:
        wanted = name or "docker, podman or buildah"
        raise DependencyError(f"{wanted} is not installed", where="--builder", hint=INSTALL)
    return next((builder for builder in here if builder.mounts), here[0])


def found(environment: Mapping[str, str] = os.environ) -> list[Builder]:
    """All builders here, Docker's first."""
    made = []
    for program in programs("docker", environment):
        builder = _docker(program)
        if builder is not None:
            made.append(builder)
    for name in NAMES[1:]:
        for program in programs(name, environment):
            version = _version([str(program), "--version"])
            if version:
                made.append(Builder(name, program, version, mounts=True, options=_oci(name)))
                break
    return made


def programs(name: str, environment: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Every program of that name on the path, each once: an older one may be able to do what a newer cannot."""
    seen = set()
    for folder in environment.get("PATH", os.defpath).split(os.pathsep):
        path = Path(folder or ".") / name
        if path.is_file() and os.access(path, os.X_OK) and path.resolve() not in seen:
            seen.add(path.resolve())
            yield path


def _docker(program: Path) -> Builder | None:
    version = _version([str(program), "--version"])
    if version is None:
        return None
    plugin = run([str(program), "buildx", "version"])
    if plugin is not None and plugin.ok and "buildx" in plugin.out:
        # Into the engine's store whatever driver the plugin uses; only then can the image be run and looked into.
        return Builder(
            "docker buildx", program, version, mounts=True, verb=("buildx", "build"), options=("--load", *_PLAIN)
        )
    if int(version.split(".")[0]) < PLUGIN_SINCE:
        return Builder(
            "docker with BuildKit", program, version, mounts=True, environment={"DOCKER_BUILDKIT": "1"}, options=_PLAIN
        )
    return Builder("docker without BuildKit", program, version, mounts=False, environment={"DOCKER_BUILDKIT": "0"})


_PLAIN = ("--progress", "plain")


def _oci(name: str) -> tuple[str, ...]:
    """Their own format has no HEALTHCHECK; Docker's has."""
    return ("--format", "docker") if name in ("podman", "buildah") else ()


def _version(command: Sequence[str]) -> str | None:
    """`Docker version 28.2.2, build e6534b4` -> `28.2.2`; None where the program does not say."""
    ran = run(command)
    number = re.search(r"\d+\.\d+[\w.]*", ran.out) if ran is not None and ran.ok else None
    return number[0] if number else None
