"""Registering, promoting, rolling back, in a real registry of MLflow's; several at once; what its own client sees."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from registry_of_models import a_record, a_registry, audit_of
from tunedock.errors import CheckError, DiskError, RecipeError, RunError
from tunedock.registry.acts import Acts
from tunedock.registry.client import Registry, RegistryUnavailableError
from tunedock.registry.digest import files_of, require_same
from tunedock.registry.history import Canary, Standing, notes
from tunedock.registry.record import place_of, source_of


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Acts:
    return a_registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def acts(shared: Acts, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Acts]:
    """A registry with three versions of a model named as the test."""
    for number in range(3):
        shared.register(request.node.name[:60], *a_record(tmp_path / f"v{number}", f"weights {number}"))
    yield shared


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name[:60])


def test_promoted_and_rolled_back(acts: Acts, name: str) -> None:
    for number in "123":
        moved = acts.promote(name, number, "production")
        assert moved.now == Standing(number) and moved.changed
    assert not acts.promote(name, "3", "production").changed
    assert [acts.roll_back(name, "production").now.version for _ in range(2)] == ["2", "1"]
    with pytest.raises(RecipeError, match="nothing to go back to"):
        acts.roll_back(name, "production")
    assert acts.registry.entry(name).aliases == {"production": "1"}
    told = [(line["act"], line.get("from"), line.get("to")) for line in audit_of(acts) if line["model"] == name]
    assert told == [
        *[("register", None, None)] * 3,
        ("promote", None, "1"), ("promote", "1", "2"), ("promote", "2", "3"),
        ("rollback", "3", "2"), ("rollback", "2", "1"),
    ]  # fmt: skip
    assert all(line["by"] and line["time"] for line in audit_of(acts))


def test_a_canary_begins_grows_and_ends(acts: Acts, name: str) -> None:
    with pytest.raises(RecipeError, match="stands for nothing yet"):
        acts.promote(name, "2", "production", 10.0)
    acts.promote(name, "1", "production")
    with pytest.raises(RecipeError, match="is version 1 already"):
        acts.promote(name, "1", "production", 10.0)
    for percent in (10.0, 50.0):
        assert acts.promote(name, "2", "production", percent).now == Standing("1", Canary("2", percent))
    assert acts.registry.entry(name).standing("production") == Standing("1", Canary("2", 50.0))
    assert acts.roll_back(name, "production").now == Standing("1"), "the last act is taken back first"
    acts.promote(name, "2", "production", 10.0)
    assert acts.promote(name, "2", "production", 0.0).now == Standing("1")
    acts.promote(name, "2", "production", 10.0)
    assert acts.promote(name, "2", "production").now == Standing("2")
    assert acts.registry.entry(name).standing("production") == Standing("2")
    assert acts.roll_back(name, "production").now == Standing("1")


def test_moved_by_mlflows_own_client_the_canary_ends_and_a_rollback_finds_its_way(acts: Acts, name: str) -> None:
    acts.promote(name, "1", "production")
    acts.promote(name, "2", "production", 10.0)
    acts.registry._client.set_registered_model_alias(name, "production", "3")
    assert acts.registry.entry(name).standing("production") == Standing("3")
    assert acts.roll_back(name, "production").now == Standing("1")


def test_a_version_that_was_deleted_is_not_gone_back_to(acts: Acts, name: str) -> None:
    for number in "123":
        acts.promote(name, number, "production")
    acts.registry._client.delete_model_version(name, "2")
    assert acts.roll_back(name, "production").now.version == "1"


def test_an_alias_dropped(acts: Acts, name: str) -> None:
    acts.promote(name, "1", "staging")
    assert acts.drop_alias(name, "staging").now == Standing(None)
    with pytest.raises(RecipeError, match="has no alias"):
        acts.drop_alias(name, "staging")
    with pytest.raises(RecipeError, match="stands for nothing"):
        acts.roll_back(name, "staging")


def test_two_at_once_lose_nothing(acts: Acts, name: str) -> None:
    """Eight threads over four opened registries, all at the same moment."""
    acts.promote(name, "1", "production")
    others = [Acts(Registry.open(str(acts.registry.file)), acts.audit) for _ in range(4)]

    def act(number: int) -> Any:
        return others[number % 4].promote(name, "23"[number % 2], "production")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(act, range(16)))
    entry = acts.registry.entry(name)
    past = notes("production", entry.tags)
    assert entry.aliases["production"] in "23" and len(past) >= 3
    assert all((note.before in "123" if note.before else True) and note.to in "123" for note in past)
    assert acts.roll_back(name, "production").now.version != entry.aliases["production"]


def test_history_does_not_grow_without_end(acts: Acts, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunedock.registry.acts.KEPT", 6)
    for number in range(9):
        acts.promote(name, "12"[number % 2], "production")
    entry = acts.registry.entry(name)
    assert len(notes("production", entry.tags)) == 6
    assert acts.roll_back(name, "production").changed


def test_what_a_version_is_told_by(acts: Acts, name: str, tmp_path: Path) -> None:
    version = acts.registry.version(name, "2")
    assert version.place == tmp_path / "v1" and version.record.kind == "folder"
    assert set(version.record.files) == {"config.json", "model.safetensors"}
    assert version.record.lineage() == {"kind": "folder", "digest": version.record.digest}
    by_mlflow = acts.registry._client.get_model_version(name, "2")
    assert by_mlflow.tags["tunedock.digest"] == version.record.digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "model.safetensors").write_text("weightZ 1"), "model.safetensors changed"),
        (lambda folder: (folder / "model.safetensors").write_text("longer than before"), "model.safetensors changed"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors missing"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json added"),
        (lambda folder: (folder / "sub").mkdir() or (folder / "sub" / "x").write_text(""), "sub/x added"),
    ],
    ids=range(5),
)
def test_changed_files_are_named(tmp_path: Path, change: Any, says: str) -> None:
    place, record = a_record(tmp_path / "m", "weights 1")
    require_same(place, files_of(place), record.sums(), "m")
    (place / "README.md").write_text("may change")
    (place / ".cache").mkdir()
    require_same(place, files_of(place), record.sums(), "m")
    change(place)
    with pytest.raises(CheckError, match=says):
        require_same(place, files_of(place), record.sums(), "m")


def test_a_pipe_or_a_device_is_not_read(tmp_path: Path) -> None:
    place, record = a_record(tmp_path / "m")
    (place / "model.safetensors").unlink()
    os.mkfifo(place / "model.safetensors")
    with pytest.raises(RunError, match="no plain file"):
        require_same(place, files_of(place), record.sums(), "m")
    (place / "model.safetensors").unlink()
    (place / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(RunError, match="no plain file"):
        require_same(place, files_of(place), record.sums(), "m")


def test_an_audit_that_cannot_be_written_lets_nothing_be_done(acts: Acts, name: str, tmp_path: Path) -> None:
    full = Acts(acts.registry, type(acts.audit)(Path("/dev/full")))
    acts.promote(name, "1", "production")
    for act in (lambda: full.promote(name, "2", "production"), lambda: full.promote(name, "2", "production", 5.0),
                lambda: full.drop_alias(name, "production"), lambda: full.register(name, *a_record(tmp_path / "n"))):  # fmt: skip
        with pytest.raises(DiskError, match="nothing was done"):
            act()
    assert acts.registry.entry(name).standing("production") == Standing("1")
    assert len(acts.registry.versions(name)) == 3


# -- what others write -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ["http://evil.example/model", "s3://bucket/x", "file:///etc", "/etc/passwd", "tunedock://host/etc", "tunedock:///a/../etc",
     "tunedock:///a%00b", "tunedock:///a%0ab", "tunedock:///%2e%2e/etc", "tunedock:etc", "", "runs:/abc/model", "tunedock:///a?x=1"],
)  # fmt: skip
def test_only_absolute_paths_are_sources(source: str) -> None:
    with pytest.raises(RunError, match="nothing is fetched"):
        place_of(source, "m version 1")


def test_a_source_keeps_any_path() -> None:
    for path in ("/a b/c", "/ä/100%/x#y?z", "/模型/v1", "/a//b"):
        assert place_of(source_of(Path(path)), "") == Path(path)


def test_versions_of_other_tools_are_listed_and_not_promoted(acts: Acts, name: str, tmp_path: Path) -> None:
    client = acts.registry._client
    client.create_model_version(name, "s3://bucket/model")
    client.create_model_version(
        name, source_of(tmp_path), tags={"tunedock.digest": "0" * 64, "tunedock.kind": "folder"}
    )
    good = acts.registry.version(name, "1").record.to_tags()
    for key, value in (
        ("tunedock.files", "["),
        ("tunedock.files", '{"../../etc/passwd": ["' + "a" * 64 + '", 1]}'),
        ("tunedock.files", '{"a": ["' + "a" * 64 + '", 1]}'),
        ("tunedock.kind", "pickle"),
        ("tunedock.metrics", "[" * 50_000),
    ):
        client.create_model_version(name, source_of(tmp_path), tags={**good, key: value})
    assert [one if isinstance(one, str) else one.number for one in acts.registry.versions(name)] == [
        str(number) for number in range(10, 0, -1)
    ]
    for number in range(4, 11):
        with pytest.raises(RunError):
            acts.promote(name, str(number), "production")


def test_what_is_no_registry(tmp_path: Path) -> None:
    for place, says in (
        ("databricks", "no registry"),
        ("mysql://host/db", "no registry"),
        ("postgresql://me:secret@host/db", "password"),
        ("http://me:secret@host", "password"),
        ("sqlite://", "names no file"),
        (str(tmp_path / "none.db"), "there is no registry"),
        (str(tmp_path), "no file"),
    ):
        with pytest.raises(RecipeError, match=says) as caught:
            Registry.open(place)
        assert "secret" not in str(caught.value)
    with pytest.raises(RegistryUnavailableError, match="cannot be asked: Connection refused"):
        Registry.open("http://127.0.0.1:9").entries()
    with pytest.raises(DiskError, match="folder"):
        Registry.open(str(tmp_path / "no" / "such.db"), create=True)
    (tmp_path / "text.db").write_text("not a database, but a text that is long enough to be taken for one" * 20)
    with pytest.raises(RegistryUnavailableError, match="cannot be asked"):
        Registry.open(str(tmp_path / "text.db"))


def test_without_mlflow_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'mlflow' else real(name, *more)\n"
        "from tunedock.cli.app import main\n"
        f"main(['models', 'register', 'a', {str(tmp_path)!r}, '--registry', {str(tmp_path / 'm.db')!r}])\n"
    )
    a_record(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 10, done.stderr
    assert "mlflow-skinny" in done.stderr and "tunedock[models]" in done.stderr
