"""A training over containers of one machine, by compose: the losses of one process, and nothing left behind."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from test_docker_training import folder, losses, surroundings, whole

from engine_bed import Engine
from tunedock.errors import DependencyError
from tunedock.image.engine import Endpoint, connected
from tunedock.launch.compose import find_compose, project_name
from tunedock.run.record import Run

__all__ = ["folder", "whole"]

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed here"),
]
TWO = ("launch.on=compose", "launch.nodes=2")

Tunedock = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(folder: Path, engine: Engine, site_image: str) -> dict[str, str]:
    """With compose on the path, and no compiler."""
    (folder / "home").mkdir(exist_ok=True)
    own = folder / "bin"
    own.mkdir(exist_ok=True)
    compose = own / "docker-compose"
    if not compose.exists():
        compose.symlink_to(str(shutil.which("docker-compose")))
    found = surroundings(folder, engine)
    return {**found, "PATH": f"{found['PATH']}:{own}"}


@pytest.fixture
def tunedock(folder: Path, environment: dict[str, str]) -> Tunedock:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tunedock", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)

    return call


@pytest.mark.long
def test_two_nodes_give_the_losses_of_one_process(folder: Path, tunedock: Tunedock, whole: Run) -> None:
    done = tunedock("train", "r.yaml", *TWO, "train.output_dir=runs/two")
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(folder / "runs/two")
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    told = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert any(event.get("data", {}).get("ranks") == 2 for event in told)
    assert "node-1" in (run.path / "compose.yaml").read_text()


@pytest.mark.long
def test_a_stop_saves_on_one_and_ends_all_and_the_run_goes_on(
    folder: Path, tunedock: Tunedock, whole: Run, environment: dict[str, str]
) -> None:
    run = Run(folder / "runs/stopped-two")
    command = [sys.executable, "-m", "tunedock", "train", "r.yaml", *TWO, f"train.output_dir={run.path}"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < until and not any(run.checkpoints.glob("step-*")):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=120)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 130, printed[-3000:]
    assert run.state().status == "interrupted"
    done = tunedock("train", "--resume", str(run.path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.long
def test_a_training_nobody_watches_any_more_is_stopped_by_its_name(
    folder: Path, tunedock: Tunedock, environment: dict[str, str]
) -> None:
    """All its nodes, with a checkpoint saved; neither a container nor a network stays."""
    run = Run(folder / "runs/unwatched")
    command = [
        sys.executable,
        "-m",
        "tunedock",
        "train",
        "r.yaml",
        *TWO,
        f"train.output_dir={run.path}",
        "train.max_steps=400",
    ]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < until and not any(run.checkpoints.glob("step-*")):
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait(30)
    done = tunedock("runs", "stop", str(run.path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert run.state().status == "interrupted"


@pytest.mark.long
def test_a_written_file_trains_by_compose_alone(
    folder: Path, tunedock: Tunedock, whole: Run, environment: dict[str, str]
) -> None:
    """Nobody watches it: what ends by itself compose starts again, and the run is in its folder."""
    done = tunedock("train", "r.yaml", *TWO, "train.output_dir=runs/written", "--write")
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(folder / "runs/written")
    file = run.path / "compose.yaml"
    assert str(file) in done.stdout and run.state().status == "created"
    compose = ["docker-compose", "--file", str(file), "--project-name", "by-hand"]
    try:
        up = subprocess.run([*compose, "up"], env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert run.state().status == "finished", up.stdout[-3000:]
        assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    finally:
        subprocess.run([*compose, "down"], env=environment, capture_output=True, timeout=120, check=True)


@pytest.mark.long
def test_two_nodes_that_do_not_fit_are_refused(folder: Path, tunedock: Tunedock) -> None:
    done = tunedock("train", "r.yaml", *TWO, "train.output_dir=runs/large", "launch.container.memory=40g")
    assert (done.returncode, "memory: 40g" in done.stderr) == (2, True), done.stderr


def test_a_written_file_is_for_another_shell(folder: Path, tunedock: Tunedock, environment: dict[str, str]) -> None:
    """Its variables may be set there alone; its containers are those tunedock means, whoever calls compose."""
    environment["SET_HERE"] = "s3cret"
    shown = f"launch.container.env={json.dumps([*surroundings_of(folder), 'SET_HERE', 'SET_THERE'])}"
    done = tunedock("train", "r.yaml", *TWO, "train.output_dir=runs/given", "--write", shown)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(folder / "runs/given")
    text = (run.path / "compose.yaml").read_text()
    assert "      SET_HERE:\n" in text and "      SET_THERE:\n" in text
    assert "s3cret" not in text
    listed = subprocess.run(
        ["docker-compose", "--file", str(run.path / "compose.yaml"), "up", "--no-start"],
        env={**environment, "SET_THERE": "x"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    try:
        assert project_name(run.path) in listed.stderr  # and not `given`, the name of the folder
    finally:
        down = ["docker-compose", "--file", str(run.path / "compose.yaml"), "down"]
        subprocess.run(down, env=environment, capture_output=True, timeout=120, check=True)


def surroundings_of(folder: Path) -> list[str]:
    """What the recipe of the tests has there, which a list on the command line takes the place of."""
    found: list[str] = YAML(typ="safe").load((folder / "r.yaml").read_text())["launch"]["container"]["env"]
    return found


def test_without_compose_the_way_out_is_told(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="there is no compose here") as raised:
        find_compose({"PATH": str(tmp_path)})
    assert raised.value.where == "launch.on: compose"


PROMETHEUS = "tunedock-tests:prometheus"
"""Debian's, where the public image would stand: it reads the same settings, at the same places."""


@pytest.fixture(scope="module")
def prometheus_image(engine: Engine, base_image: str) -> str:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed here")
    dockerfile = (
        f"FROM {base_image}\nCOPY prometheus /usr/bin/\nRUN mkdir -m 1777 /prometheus\n"
        'CMD ["prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]\n'
    )
    files = {"Dockerfile": dockerfile.encode(), "prometheus": Path(program).read_bytes()}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
    packed.seek(0)
    with connected(Endpoint(engine.host, "the tests"), timeout_s=240) as client:
        client.images.build(fileobj=packed, custom_context=True, tag=PROMETHEUS, rm=True)
    return PROMETHEUS


@pytest.mark.long
def test_a_real_prometheus_scrapes_what_the_run_tells(
    folder: Path, tunedock: Tunedock, environment: dict[str, str], prometheus_image: str, cpu_train_image: str
) -> None:
    """In tunedock's own image. Grafana's is public, and no test pulls: the profile's other two services are started by name."""
    own = [
        f"launch.image={cpu_train_image}",
        *(f"launch.container.{key}" for key in ("source=false", "mounts=[]", "env=[]")),
    ]
    done = tunedock(
        *("train", "r.yaml", "launch.on=compose", "train.output_dir=runs/watched", "--write", *own),
        *("launch.compose.profiles=[monitoring]", f"launch.compose.images={{prometheus: '{prometheus_image}'}}"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run(folder / "runs/watched")
    compose = ["docker-compose", "--file", str(run.path / "compose.yaml"), "--project-name", "watched"]

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [*compose, *arguments], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    try:
        call("up", "--detach", "metrics", "prometheus")
        call("up", "node-0")
        assert run.state().status == "finished"
        wanted = {'tunedock_run_status{status="finished"}': 1.0, "tunedock_run_steps": 8.0}
        found = {query: answered(query, value) for query, value in wanted.items()}
        assert found == wanted, call("logs", "metrics", "prometheus") + call("ps")
        assert answered('tunedock_run_metric{name="loss"}') == pytest.approx(losses(run)[8])
    finally:
        call("down", "--volumes")


def answered(query: str, wanted: float | None = None) -> float | None:
    """What Prometheus says, once it says it: it scrapes every five seconds."""
    url = "http://127.0.0.1:9090/api/v1/query?" + urllib.parse.urlencode({"query": query})
    found, until = None, time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(OSError, IndexError, KeyError), urllib.request.urlopen(url, timeout=5) as answer:
            found = float(json.load(answer)["data"]["result"][0]["value"][1])
            if wanted is None or found == wanted:
                return found
        time.sleep(1)
    return found


@pytest.mark.parametrize(("what", "file"), [("rules", "alerts.yml"), ("config", "prometheus.yml")])
def test_the_settings_are_prometheus_own(what: str, file: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, of Debian's prometheus, is not installed here")
    settings = Path(__file__).parents[2] / "src/tunedock/launch/monitoring" / file
    done = subprocess.run(
        [promtool, "check", what, str(settings)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "SUCCESS" in done.stdout, done.stdout + done.stderr
