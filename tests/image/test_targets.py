"""The rows of targets.json, and the versions that come into images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tunedock.errors import RecipeError
from tunedock.image.lock import closure, normal
from tunedock.image.package import package
from tunedock.image.targets import LOCKED, ROLES, engine_targets, engines, names, target

ROOT = Path(__file__).parents[2]


def pinned(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", names())
def test_every_row_is_whole(name: str, role: str) -> None:
    row = target(name, role)
    assert ":" in row.base
    assert not row.base.endswith(":latest")
    assert "tini" in row.system
    assert row.default_tag == f"tunedock-{role}:{name}"
    assert (row.port is not None) == (role == "serve")
    assert (row.torch_index is None) == row.light


def test_the_edge_serves_without_pytorch() -> None:
    row = target("edge", "serve")
    assert row.light
    assert any(name.startswith("llama-cpp-python==") for name in row.packages)
    assert "g++" in row.build
    assert "g++" not in row.system


@pytest.mark.parametrize("engine", engines())
def test_engines_are_for_some_targets(engine: str) -> None:
    assert engine_targets(engine)
    for name in engine_targets(engine):
        row = target(name, "serve", engine)
        assert row.default_tag == f"tunedock-serve:{name}-{engine}"
        assert all("==" in line for line in row.engine)
    with pytest.raises(RecipeError, match=f"{engine} is not installed for `cpu`"):
        target("cpu", "serve", engine)
    with pytest.raises(RecipeError, match="no inference engine"):
        target("cuda", "train", engine)


def test_what_there_is_none_of() -> None:
    for arguments in (("tpu",), ("cpu", "deploy"), ("cuda", "serve", "tgi")):
        with pytest.raises(RecipeError, match="there is no") as caught:
            target(*arguments)
        assert caught.value.hint is not None
        assert "one of" in caught.value.hint


def test_locked_versions_are_those_that_are_tested() -> None:
    locked, tested = pinned(LOCKED), pinned(ROOT / "constraints.txt")
    assert {name: locked[name] for name in tested.keys() & locked.keys()} == {
        name: tested[name] for name in tested.keys() & locked.keys()
    }
    direct = {normal(re.split(r"[^\w.-]", line)[0]) for line in package().requires}
    assert direct <= locked.keys(), "run `make lock`"


def test_nothing_comes_unlocked() -> None:
    """All that tunedock's requirements bring here has a version in locked.txt, in an environment of those versions."""
    here, locked = closure(package().needed()), pinned(LOCKED)
    newer = {name for name in here.keys() & locked.keys() if here[name] != locked[name]}
    if newer:
        pytest.skip(f"this environment has other versions than locked.txt: {', '.join(sorted(newer))}")
    assert not here.keys() - locked.keys(), "run `make lock`"
