"""What differs between targets and roles: rows of `targets.json`, so that a new base image is a change of data.

A target is a kind of machine (cuda, rocm, npu, cpu, edge), a role is what the image is for: `train` (every stage of a run), `serve`
(answers requests), `test` (the test suite runs in it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tunedock.errors import RecipeError

ROLES = ("train", "serve", "test")
FACTS = Path(__file__).with_name("targets.json")
LOCKED = Path(__file__).with_name("locked.txt")
"""Every package that comes into an image, at one version. `make lock` writes it."""


@dataclass(frozen=True, slots=True)
class Target:
    """A row, with what its role adds to it."""

    name: str
    role: str
    about: str
    base: str
    why_base: str
    platforms: tuple[str, ...]
    system: tuple[str, ...]
    """Packages of the distribution in the image."""
    build: tuple[str, ...]
    """Packages of the distribution that only the builder needs."""
    build_environment: tuple[tuple[str, str], ...]
    """(variable, value): what compilers are told in the builder."""
    torch_index: str | None
    """Where this target's PyTorch lies; None where the image has none."""
    packages: tuple[str, ...]
    """Python packages beside tunedock's own; of a light image, all there are."""
    extras: tuple[str, ...]
    light: bool
    """Whether tunedock's own dependencies stay out."""
    small: bool
    """Whether headers and tests of packages are removed."""
    port: int | None
    source: str | None
    """A script that sets the environment, read by a shell before anything starts."""
    engine: tuple[str, ...]
    """Packages of an inference engine, in an environment of its own: its PyTorch is another."""

    engine_name: str | None = None

    @property
    def full_name(self) -> str:
        """`train.cpu`, `serve.cuda-vllm`."""
        return f"{self.role}.{self._variant}"

    @property
    def default_tag(self) -> str:
        return f"tunedock-{self.role}:{self._variant}"

    @property
    def _variant(self) -> str:
        return f"{self.name}-{self.engine_name}" if self.engine_name else self.name


@cache
def _facts() -> Mapping[str, Any]:
    value: dict[str, Any] = json.loads(FACTS.read_text(encoding="utf-8"))
    return value


def names() -> tuple[str, ...]:
    return tuple(_facts()["targets"])


def engines() -> tuple[str, ...]:
    return tuple(_facts()["engines"])


def engine_targets(engine: str) -> tuple[str, ...]:
    return tuple(_facts()["engines"][engine]["targets"])


def test_files() -> tuple[str, ...]:
    """What of a checkout comes into a test image, beside the package."""
    return tuple(_facts()["test"]["files"])


def target(name: str, role: str = "train", engine: str | None = None) -> Target:
    """The row of a target in a role. Raises RecipeError for what there is none of."""
    facts = _facts()
    _one_of("target", name, names())
    _one_of("--role", role, ROLES)
    row = facts["targets"][name]
    small = bool(row.get("small"))
    engine_packages = _engine(name, role, engine)
    light = role == "serve" and (small or engine is not None)
    packages = [*row.get("also", [])] if not light else []
    system, build = list(row["packages"]), []
    if role == "serve":
        packages += facts["light"]["packages"] if light else facts["serve"]["packages"]
        if small:
            packages += facts["edge"]["packages"]
            system += facts["edge"]["system"]
            build += facts["edge"]["build"]
    if role == "test":
        system += facts["test"]["packages"]
    return Target(
        name=name,
        role=role,
        about=row["about"],
        base=row["base"],
        why_base=row["why_base"],
        platforms=tuple(row["platforms"]),
        system=tuple(sorted(set(system))),
        build=tuple(sorted(build)),
        build_environment=tuple(facts["edge"]["build_environment"].items()) if build else (),
        torch_index=None if light else row["torch_index"],
        packages=tuple(packages),
        extras=() if light else (*row["extras"], *(facts["test"]["extras"] if role == "test" else ())),
        light=light,
        small=small,
        port=facts["serve"]["port"] if role == "serve" else None,
        source=row.get("source"),
        engine=engine_packages,
        engine_name=engine,
    )


def _engine(name: str, role: str, engine: str | None) -> tuple[str, ...]:
    if engine is None:
        return ()
    _one_of("--engine", engine, engines())
    if role != "serve":
        raise RecipeError(
            f"an image for `{role}` has no inference engine",
            where="--engine",
            hint="engines answer requests: --role serve",
        )
    rows = _facts()["engines"][engine]["targets"]
    if name not in rows:
        raise RecipeError(
            f"{engine} is not installed for `{name}`",
            where="--engine",
            hint=f"it is for {', '.join(rows)}; without --engine PyTorch itself answers",
        )
    return tuple(rows[name]["packages"])


def _one_of(where: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"there is no `{value}`", where=where, hint=f"one of {', '.join(known)}")
