"""The image that trains on the CPU, made for real: what it is, what it says of itself, and that it trains for anyone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine_bed import Engine, HostSettings, image_build
from tunedock.image import store
from tunedock.image.engine import connected

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
STRANGER = 4242
"""A user that no list knows, as a cluster gives one."""

RECIPE = """
model: {model}
offline: true
data: {{train: {data}, max_length: 128, cache_dir: ./cache}}
train: {{max_steps: 2, batch_size: 2, save_steps: 2, output_dir: ./run}}
"""


@pytest.fixture
def image(cpu_train_image: str, engine_here: Engine) -> store.Image:
    with connected() as client:
        return store.inspect(client, cpu_train_image)


def tunedock(engine: Engine, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **engine.environment}
    command = [sys.executable, "-m", "tunedock", "image", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)


def test_what_it_says_of_itself(image: store.Image) -> None:
    assert image.user == "10001:10001"
    assert image.entrypoint == ("tini", "--")
    assert image.health == ("CMD", "tunedock", "--version")
    assert image.labels["io.tunedock.target"] == "cpu"
    assert image.labels["io.tunedock.role"] == "train"
    assert image.labels["org.opencontainers.image.version"] == "0.1.0"
    assert image.labels["org.opencontainers.image.base.name"] == "base:debian"
    assert "HOME=/home/tunedock" in image.environment
    assert [layer.step.split()[0] for layer in image.layers[-2:]] == ["COPY", "RUN"]
    assert "code" in image.layers[-2].step


def test_it_trains_for_a_stranger_on_a_read_only_root(image: store.Image, tmp_path: Path) -> None:
    """No network, no capability, nothing writable but the run's folder and /tmp."""
    tmp_path.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    (work / "r.yaml").write_text(RECIPE.format(model=DEMO / "base", data=DEMO / "triage.jsonl"))
    os.chown(work, STRANGER, STRANGER)
    with connected(timeout_s=280) as client:
        told = client.containers.run(
            image.id,
            ["tunedock", "train", "r.yaml", "--json"],
            user=f"{STRANGER}:{STRANGER}",
            read_only=True,
            network_disabled=True,
            cap_drop=["ALL"],
            tmpfs={"/tmp": "mode=1777", "/home/tunedock": "mode=1777"},
            volumes={str(work): {"bind": str(work), "mode": "rw"}, str(DEMO): {"bind": str(DEMO), "mode": "ro"}},
            working_dir=str(work),
            environment={"OMP_NUM_THREADS": "1"},
            remove=True,
        )
    assert json.loads(told)["steps"] == 2
    assert (work / "run/model/adapter_model.safetensors").stat().st_uid == STRANGER


def test_packages_sizes_and_health(image: store.Image, engine_here: Engine) -> None:
    """One container: its check comes out healthy, the image is little more than its environment, its lists are true."""
    check = {"test": list(image.health), "interval": 1_000_000_000, "timeout": 60_000_000_000, "retries": 20}
    with connected() as client:
        container = client.containers.run(image.id, ["sleep", "300"], detach=True, healthcheck=check, init=False)
        try:
            _code, said = container.exec_run(["du", "-s", "--block-size=1", "/opt/venv"])
            environment_bytes = int(said.split()[0])
            _code, said = container.exec_run(
                ["python", "-c", "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"]
            )
            installed = set(said.decode().split()) - {"tunedock"}
            _code, first = container.exec_run(["cat", "/proc/1/cmdline"])
            end = time.monotonic() + 90
            health: dict = {}
            while time.monotonic() < end and health.get("Status") != "healthy":
                time.sleep(0.5)
                container.reload()
                health = container.attrs["State"].get("Health") or {}
        finally:
            container.remove(force=True)
        bill = json.loads(store.file(client, image.id, store.SBOM))
        frozen = store.file(client, image.id, store.FREEZE).decode()
    assert health["Status"] == "healthy", health
    assert first.startswith(b"tini\0")
    assert image.bytes <= 1.2 * environment_bytes
    assert {line.split("==")[0] for line in frozen.split()} == installed
    purls = {component["purl"].split("@")[0] for component in bill["components"]}
    assert {"pkg:pypi/torch", "pkg:pypi/transformers", "pkg:deb/debian/libc6", "pkg:deb/debian/tini"} <= purls
    assert re.search(r"^torch==2\.", frozen, re.MULTILINE)


def test_a_changed_line_is_one_layer(
    image: store.Image,
    engine_here: Engine,
    base_image: str,
    host_settings: HostSettings,
    tmp_path: Path,
    record_property,
) -> None:
    """Of a copy of the repository in which a line differs: all layers but the code's are those of the image."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    changed = tmp_path / "src/tunedock/cli/app.py"
    changed.write_text(changed.read_text().replace('f"tunedock {__version__}"', 'f"tunedock {__version__}, changed"'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "src"))
        began = time.monotonic()
        built = image_build(engine_here, host_settings, "cpu", "--base", base_image, "--tag", "changed:1")
        record_property("seconds", time.monotonic() - began)
    assert built.returncode == 0, built.stderr[-3000:]
    layers = json.loads(built.stdout)["image"]["digests"]
    assert layers[:-2] == list(image.digests[:-2])
    assert layers[-2] != image.digests[-2]
    assert sum(layer.bytes for layer in image.layers[-2:]) < 20e6
    with connected() as client:
        said = client.containers.run("changed:1", ["tunedock", "--version"], remove=True)
    assert said.decode().strip() == "tunedock 0.1.0, changed"


def test_the_commands_tell_of_it(cpu_train_image: str, engine_here: Engine) -> None:
    listed = json.loads(tunedock(engine_here, "list", "--json").stdout)
    assert cpu_train_image in {name for image in listed for name in image["names"]}
    shown = tunedock(engine_here, "list").stdout
    assert "tunedock-train:cpu" in shown
    shown = tunedock(engine_here, "inspect", cpu_train_image).stdout
    assert "io.tunedock.target" in shown
    assert "/opt/venv" in shown
    assert "torch==" in tunedock(engine_here, "inspect", cpu_train_image, "--packages").stdout
    missing = tunedock(engine_here, "inspect", "none:1", "--json")
    assert missing.returncode == 12
    assert json.loads(missing.stdout)["error"]["where"] == "none:1"
