"""Images and launchers for tests of stages in containers: fixtures that need an engine (`engine_bed`)."""

from __future__ import annotations

import io
import json
import shutil
import site
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import tunedock
from engine_bed import Engine, only_one
from tunedock.image.engine import Endpoint, connected
from tunedock.run.record import Run, RunState

if TYPE_CHECKING:
    from docker import DockerClient

PACKAGE = Path(tunedock.__file__).parent
PACKAGES = site.getsitepackages()[0]
SITE = "tunedock-tests:site"
"""A Debian whose Python is called `python`. Packages are those of the tests, shown to it where they are."""

FAKE = """
import runpy, sys
from pathlib import Path
here = Path(__file__).parent
sys.argv[1:] = [(Path(sys.argv[2]) / "script.json").read_text(), *sys.argv[1:]]
runpy.run_path(str(here / "fake_worker.py"), run_name="__main__")
"""


@pytest.fixture(scope="session")
def site_image(engine: Engine, base_image: str) -> str:
    dockerfile = f"FROM {base_image}\nRUN ln -s python3 /usr/bin/python\n".encode()
    with connected(Endpoint(engine.host, "the tests"), timeout_s=120) as client:
        client.images.build(fileobj=io.BytesIO(dockerfile), tag=SITE, rm=True)
    return SITE


@pytest.fixture
def client(engine: Engine) -> Iterator[DockerClient]:
    with connected(Endpoint(engine.host, "the tests")) as made:
        yield made


@pytest.fixture
def nothing_left(engine: Engine, client: DockerClient) -> Iterator[None]:
    """Neither containers nor networks stay behind. One test at a time, of all processes: they have one machine to share out."""
    with only_one(engine.folder.with_name(f"{engine.folder.name}-shares")):
        networks = {network.id for network in client.networks.list()}
        yield
        left = [container.name for container in client.containers.list(all=True, filters={"label": "tunedock.version"})]
        for name in left:
            client.api.remove_container(name, force=True)
        assert not left
        assert {network.id for network in client.networks.list()} == networks


def launch_section(**container: Any) -> dict[str, Any]:
    """`launch` for the image of the tests: the code and the packages of the tests, on Debian's own Python."""
    given = {
        "source": True,
        "mounts": [PACKAGES],
        "env": [f"PYTHONPATH={PACKAGES}", "PATH=/usr/bin:/bin"],
        **container,
    }
    return {"on": "docker", "image": SITE, "container": given}


@pytest.fixture
def scripted(
    engine_here: Engine, site_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Makes a run whose worker, in its container, does the given steps (`fake_worker.py`)."""
    package = tmp_path / "package" / "tunedock"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "worker.py").write_text(FAKE)
    shutil.copy(Path(__file__).parent / "launch" / "fake_worker.py", package)
    monkeypatch.setattr("tunedock.launch.docker.own_source", lambda: str(package))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()

    def make(*steps: list[Any], name: str = "r1", grace_s: float = 5.0, **container: Any) -> Run:
        state = RunState(name, 1.0, "sft", "some/model", "lora", "0123456789abcdef")
        launch = {**launch_section(**container), "grace_s": grace_s}
        recipe = {"model": f"{tmp_path}/model", "data": {"train": f"{tmp_path}/rows.jsonl"}, "launch": launch}
        resolved = {"recipe": {**recipe, "train": {"report_to": "none"}}, "origins": {}, "hash": "x"}
        run = Run.create(tmp_path / name, recipe_yaml="model: x\n", resolved=resolved, state=state)
        (run.path / "script.json").write_text(json.dumps(steps))
        return run

    return make
