"""A bundle where there is no network: in another engine, empty and cut off, a run is finished; wheels need no index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import engine_keeper
from bundle_bed import quiet
from engine_bed import Engine
from tunedock.bundle.content import of_recipe
from tunedock.bundle.create import Wanted, create
from tunedock.bundle.keys import make_key
from tunedock.bundle.load import load
from tunedock.errors import DependencyError
from tunedock.image.engine import Endpoint, connected
from tunedock.recipe.load import load as load_recipe
from tunedock.recipe.resolve import resolve

DEMO = Path(__file__).parents[2] / "examples/demo"
MODULE = b"print('works')\n"
METADATA = b"Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
WHEEL = b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
NO_NETWORK = ("unshare", "--net")


def tiny_wheel(folder: Path) -> Path:
    """A wheel of one module."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", MODULE)
        wheel.writestr("tiny-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("tiny-1.0.dist-info/WHEEL", WHEEL)
        wheel.writestr("tiny-1.0.dist-info/RECORD", "tiny.py,,\n")
    return folder


def cut_off() -> list[str]:
    """The beginning of a command that has no network, where this machine lets us."""
    allowed = shutil.which("unshare") and not subprocess.run([*NO_NETWORK, "true"], capture_output=True).returncode
    return list(NO_NETWORK) if allowed else []


def test_wheels_may_be_left_out(tmp_path: Path) -> None:
    create(Wanted("w", wheels=tiny_wheel(tmp_path / "wheels")), tmp_path / "bundle", quiet)
    assert (tmp_path / "bundle/wheels/tiny-1.0-py3-none-any.whl").is_file()
    assert load(tmp_path / "bundle", tmp_path / "to", quiet, wheels=False).environment is None
    assert not list((tmp_path / "to").iterdir())


def test_wheels_are_made_of_requirements(tmp_path: Path) -> None:
    wheel = tiny_wheel(tmp_path / "wheels") / "tiny-1.0-py3-none-any.whl"
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"{wheel}\n")
    create(Wanted("w", requirements=requirements), tmp_path / "bundle", quiet)
    assert (tmp_path / "bundle/wheels" / wheel.name).read_bytes() == wheel.read_bytes()
    requirements.write_text(f"{tmp_path}/none-1.0-py3-none-any.whl\n")
    with pytest.raises(DependencyError, match="pip makes no wheels of it") as caught:
        create(Wanted("w", requirements=requirements), tmp_path / "other", quiet)
    assert caught.value.where == str(requirements)


@pytest.mark.long
def test_wheels_become_an_environment(tmp_path: Path) -> None:
    create(Wanted("w", wheels=tiny_wheel(tmp_path / "wheels")), tmp_path / "bundle", quiet)
    done = load(tmp_path / "bundle", tmp_path / "to", quiet)
    assert done.environment == tmp_path / "to/venv"
    said = subprocess.run([str(done.environment / "bin/python"), "-m", "tiny"], capture_output=True, timeout=60)
    assert said.stdout == b"works\n"
    assert not (tmp_path / "to/.wheels").exists()


@pytest.mark.long
def test_a_wheel_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/tiny-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    create(Wanted("w", wheels=tmp_path / "wheels"), tmp_path / "bundle", quiet)
    with pytest.raises(DependencyError, match="cannot be installed") as caught:
        load(tmp_path / "bundle", tmp_path / "to", quiet)
    assert "--no-wheels" in str(caught.value.hint)


@pytest.fixture
def far_engine() -> Iterator[Engine]:
    """A second engine: nothing in it, and in a network of its own that leads nowhere."""
    start = cut_off()
    if not start:
        pytest.skip("this machine makes no network namespaces")
    folder = Path(tempfile.mkdtemp(prefix="td-far-"))
    keeper = subprocess.Popen(
        [*start, sys.executable, str(Path(engine_keeper.__file__)), str(folder), str(os.getpid())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + engine_keeper.START_S
        while not engine_keeper.answers(folder):
            assert keeper.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        yield Engine(folder)
    finally:
        (folder / "stop").touch()
        keeper.wait(60)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_is_finished_where_there_is_no_network(
    engine_here: Engine, cpu_train_image: str, far_engine: Engine, tmp_path: Path
) -> None:
    overrides = ["train.max_steps=4", "train.save_steps=2", "train.warmup_steps=0", "launch.on=docker"]
    recipe = resolve(load_recipe([DEMO / "recipe.yaml"], overrides))
    trust = make_key(tmp_path / "key")
    began = time.monotonic()
    wanted = Wanted(
        "shop",
        of_recipe(recipe),
        images=[cpu_train_image],
        wheels=tiny_wheel(tmp_path / "w"),
        split=512 << 20,
        key=tmp_path / "key",
    )
    made = create(wanted, tmp_path / "bundle", quiet)
    print(f"created {made.facts.bytes / 1e9:.2f} GB in {time.monotonic() - began:.0f} s")

    to = tmp_path / "there"
    began = time.monotonic()
    done = subprocess.run(
        [*cut_off(), "sh", str(tmp_path / "bundle/install.sh"), "--to", str(to), "--trust", str(trust)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **far_engine.environment},
    )
    assert done.returncode == 0, done.stderr
    print(f"installed without a network in {time.monotonic() - began:.0f} s")

    with connected(Endpoint(far_engine.host, "the tests")) as client:
        assert [image.tags for image in client.images.list()] == [[cpu_train_image]]
    said = compose_run(to, far_engine)
    (run,) = (to / "runs").iterdir()
    assert '"finished"' in (run / "run.json").read_text(), said
    assert (run / "model/adapter_model.safetensors").is_file()
    assert (to / "venv/bin/python").is_file()


def compose_run(folder: Path, engine: Engine) -> str:
    """`docker compose run --rm train`, or what that makes of the file where there is no compose; what it says at its end."""
    environment = {**os.environ, **engine.environment, "PWD": str(folder)}
    for compose in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(compose[0]) and not subprocess.run([*compose, "version"], capture_output=True).returncode:
            done = subprocess.run(
                [*compose, "run", "--rm", "-T", "train"], cwd=folder, env=environment, capture_output=True, timeout=900
            )
            return f"{compose}: {done.stdout[-2000:]!r} {done.stderr[-2000:]!r}"
    service = YAML(typ="safe").load((folder / "compose.yaml").read_text())["services"]["train"]
    with connected(Endpoint(engine.host, "the tests"), timeout_s=900) as client:
        said: bytes = client.containers.run(
            service["image"],
            service["command"],
            working_dir=str(folder),
            volumes=[f"{folder}:{folder}"],
            user=(folder / ".env").read_text().strip().removeprefix("TUNEDOCK_USER="),
            network_mode=service["network_mode"],
            shm_size=service["shm_size"],
            remove=True,
            stderr=True,
        )
    return repr(said[-2000:])
