"""Which builder is chosen, and what it is told. The programs are stand-ins: scripts that say a version, as the real ones do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunedock.errors import DependencyError, RecipeError
from tunedock.image.builders import Build, choose, found


@pytest.fixture
def stand_in(tmp_path: Path):
    """stand_in(folder, name, version, buildx) -> the folder, with a program in it."""

    def make(folder: str, name: str, version: str, buildx: bool = False) -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        plugin = "echo github.com/docker/buildx v0.20" if buildx else "exit 1"
        script = f'#!/bin/sh\n[ "$1" = buildx ] && {{ {plugin}; exit; }}\necho "{name} version {version}, build x"\n'
        (place / name).write_text(script)
        (place / name).chmod(0o755)
        return str(place)

    return make


def test_an_older_client_that_builds_better_is_preferred(stand_in) -> None:
    path = ":".join([stand_in("a", "docker", "28.2.2"), stand_in("b", "docker", "20.10.24+dfsg1")])
    assert [builder.name for builder in found({"PATH": path})] == ["docker without BuildKit", "docker with BuildKit"]
    chosen = choose(None, {"PATH": path})
    assert (chosen.version, chosen.environment) == ("20.10.24", {"DOCKER_BUILDKIT": "1"})


def test_the_plugin_is_used(stand_in) -> None:
    chosen = choose(None, {"PATH": stand_in("a", "docker", "28.2.2", buildx=True)})
    command = chosen.command(
        Build(Path("/c"), ["x:1"], {"BASE": "b:1"}, {"l": "v"}, {"pip": Path("/s")}, "linux/arm64", True)
    )
    assert command[1:] == [
        "buildx", "build", "--load", "--progress", "plain", "--file", "/c/Dockerfile", "--tag", "x:1",
        "--build-arg", "BASE=b:1", "--label", "l=v", "--secret", "id=pip,src=/s", "--platform", "linux/arm64", "--no-cache", "/c",
    ]  # fmt: skip


def test_the_builder_of_old_is_better_than_none(stand_in) -> None:
    chosen = choose(None, {"PATH": stand_in("a", "docker", "28.2.2")})
    assert not chosen.mounts
    with pytest.raises(RecipeError, match="would write the address") as caught:
        chosen.command(Build(Path("/c"), ["x"], secrets={"pip": Path("/s")}))
    assert caught.value.where == "--index"


@pytest.mark.parametrize("name", ["podman", "buildah"])
def test_others(stand_in, name: str) -> None:
    path = ":".join([stand_in("a", "docker", "28.2.2"), stand_in("b", name, "5.4.0")])
    assert choose(None, {"PATH": path}).name == name  # it has mounts
    command = choose(name, {"PATH": path}).command(Build(Path("/c"), ["x"]))
    assert command[1:4] == ["build", "--format", "docker"]  # HEALTHCHECK is no part of theirs


def test_none_and_unknown_ones(tmp_path: Path, stand_in) -> None:
    with pytest.raises(DependencyError, match="docker, podman or buildah is not installed"):
        choose(None, {"PATH": str(tmp_path)})
    with pytest.raises(DependencyError, match="podman is not installed"):
        choose("podman", {"PATH": stand_in("a", "docker", "28.2.2")})
    with pytest.raises(RecipeError, match="no builder `kaniko`"):
        choose("kaniko", {"PATH": str(tmp_path)})
