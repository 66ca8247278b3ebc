"""Real trainings in containers: the numbers of a run outside, whoever calls, however it is stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine_bed import Engine
from stage_containers import launch_section
from tunedock.launch.at_work import container_at_work
from tunedock.launch.meeting import free_port
from tunedock.run.placed import read_placed
from tunedock.run.record import Run

if TYPE_CHECKING:
    from docker import DockerClient

ROOT = Path(__file__).parents[2]
STEPS = 8
CALLER = 12345

BY_ANOTHER_USER = """
import os, sys
from pathlib import Path
import docker.transport, tunedock.pipeline, uuid
from tunedock.launch.docker import DockerLauncher
call = [Path(sys.argv[2])], sys.argv[3:]
recipe = tunedock.pipeline.resolve_recipe(*call).recipe
DockerLauncher().check(recipe, Path(recipe.train.output_dir))
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
tunedock.pipeline.train(*call)
"""
"""What it needs is loaded before: this user need not be able to read where the tests' Python lies."""

# Longer than other tests may take: each waits until none of another process has a share of the machine.
pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A project: a small model, rows, a recipe that trains in a container, and in none with `launch.on=local`.

    Not in pytest's own folders: each of its processes shuts those to other users again.
    """
    made = Path(tempfile.mkdtemp(prefix="td-project-"))
    made.chmod(0o755)
    (made / "home").mkdir()
    shutil.copytree(ROOT / "examples/demo/base", made / "base")
    rows = (ROOT / "examples/demo/triage.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    (made / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    recipe = {
        "model": {"path": "./base", "init": "random"},
        "adapter": "full",
        "data": {"train": "./rows.jsonl", "max_length": 256},
        "train": {
            "max_steps": STEPS,
            "batch_size": 4,
            "save_steps": 2,
            "save_total_limit": None,
            "learning_rate": 1e-3,
            "eval_strategy": "no",
            "report_to": "none",
            "token_budget": 1024,
            "bf16": False,
        },
        "eval": {"max_samples": 2, "max_new_tokens": 8},
        "launch": launch_section(cpus=1, memory="3g"),
    }
    (made / "r.yaml").write_text(json.dumps(recipe))
    yield made
    shutil.rmtree(made)


def surroundings(folder: Path, engine: Engine) -> dict[str, str]:
    """Without a compiler on the path: the image has none, and kernels round otherwise than PyTorch's operations."""
    own = {"HOME": f"{folder}/home", "PATH": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **engine.environment, **own}


@pytest.fixture
def tunedock(folder: Path, engine: Engine, site_image: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tunedock", *arguments]
        env = surroundings(folder, engine)
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)

    return call


@pytest.fixture
def whole(folder: Path, tunedock: Callable[..., subprocess.CompletedProcess[str]]) -> Run:
    """A run outside, from its first step to its last."""
    run = Run(folder / "runs/whole")
    if not run.path.exists():
        done = tunedock("train", "r.yaml", "launch.on=local", "train.output_dir=runs/whole")
        assert done.returncode == 0, done.stderr
    return run


def losses(run: Run) -> dict[int, float]:
    """By step; of steps done again, the last."""
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    return {e["step"]: e["values"]["loss"] for e in events if e["kind"] == "metrics" and "loss" in e["values"]}


def weights(run: Run) -> str:
    return hashlib.sha256((run.model / "model.safetensors").read_bytes()).hexdigest()


def started(folder: Path, engine: Engine, name: str, *overrides: str, steps: int = 3) -> subprocess.Popen[str]:
    """A training in a container that has done some steps."""
    command = [sys.executable, "-m", "tunedock", "train", "r.yaml", f"train.output_dir=runs/{name}", *overrides]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=surroundings(folder, engine),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    run, deadline = Run(folder / "runs" / name), time.monotonic() + 120
    while not (run.events.exists() and len(losses(run)) >= steps):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return process


def test_another_users_training_in_a_container_has_the_numbers_of_one_outside_and_its_files_are_theirs(
    folder: Path, engine: Engine, whole: Run
) -> None:
    home = folder / "caller"
    (home / "runs").mkdir(parents=True)
    for path in (home, home / "runs"):
        os.chown(path, CALLER, CALLER)
    engine.folder.chmod(0o711)
    socket = engine.folder / "docker.sock"
    socket.chmod(0o666)
    env = {**surroundings(folder, engine), "HOME": str(home)}
    command = [sys.executable, "-c", BY_ANOTHER_USER, str(CALLER), str(folder / "r.yaml")]
    done = subprocess.run(
        [*command, f"train.output_dir={home}/runs/r1"], cwd=folder, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    run = Run(home / "runs/r1")
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)
    assert run.state().status == "finished"
    owners = {path.lstat().st_uid for path in run.path.rglob("*")}
    assert owners == {CALLER}


@pytest.mark.long
def test_a_container_killed_in_mid_run_is_gone_on_with_to_the_same_weights(
    folder: Path,
    engine: Engine,
    whole: Run,
    client: DockerClient,
    tunedock: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    process = started(folder, engine, "killed", steps=5)
    run = Run(folder / "runs/killed")
    placed = read_placed(run)
    assert placed is not None
    client.api.kill(placed.container, "SIGKILL")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    assert "the container was killed (SIGKILL)" in err
    assert run.state().status == "failed"
    done = tunedock("train", "--resume", "killed")
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)


@pytest.mark.long
def test_a_stop_by_the_engine_saves_a_checkpoint_and_the_run_goes_on_outside(
    folder: Path,
    engine: Engine,
    whole: Run,
    client: DockerClient,
    tunedock: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    process = started(folder, engine, "stopped")
    run = Run(folder / "runs/stopped")
    placed = read_placed(run)
    assert placed is not None
    client.api.stop(placed.container, timeout=30)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert run.state().status == "interrupted"
    assert run.newest_checkpoint() == max(losses(run))
    done = tunedock("train", "--resume", "stopped", "launch.on=local")
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)


@pytest.mark.long
def test_ctrl_c_and_a_stop_by_name_end_it_in_order(
    folder: Path, engine: Engine, tunedock: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    process = started(folder, engine, "asked", "train.max_steps=5000")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "saving a checkpoint; press Ctrl-C again to stop at once" in err
    process = started(folder, engine, "left", "train.max_steps=5000")
    process.kill()  # as a terminal that is closed; the container goes on
    process.communicate()
    run = Run(folder / "runs/left")
    placed = container_at_work(run)
    assert placed is not None
    shown = json.loads(tunedock("runs", "show", "left", "--json").stdout)
    assert (shown["status"], shown["container"]["name"]) == ("running", placed.name)
    again = tunedock("train", "--resume", "left")
    assert again.returncode == 5
    assert "a stage is at work in this run" in again.stderr
    done = tunedock("runs", "stop", "left")
    assert done.returncode == 0, done.stderr
    assert f"stopped container {placed.name}" in done.stdout
    assert run.state().status == "interrupted"
    assert run.newest_checkpoint() == max(losses(run))


@pytest.mark.long
def test_data_in_an_image_train_as_the_file_does(
    folder: Path,
    engine: Engine,
    whole: Run,
    client: DockerClient,
    tunedock: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """The container has neither the engine nor a network: what the name stands for is brought before it starts."""
    name = "td-rows:1"
    made = tunedock("data", "image", "rows.jsonl", "--tag", name, "--json")
    assert made.returncode == 0, made.stderr
    try:
        done = tunedock("train", "r.yaml", f"data.train=image://{name}", "train.output_dir=runs/by-image")
    finally:
        client.images.remove(name, force=True)
    assert done.returncode == 0, done.stderr
    run = Run(folder / "runs/by-image")
    assert run.state().lineage["data_images"] == {f"image://{name}": json.loads(made.stdout)["revision"]}
    assert losses(run) == losses(whole)
    assert weights(run) == weights(whole)
    assert tunedock("eval", "by-image").returncode == 0  # the image is gone, and what it held is here


@pytest.mark.long
def test_what_comes_after_training_runs_in_a_container_too(
    folder: Path, engine: Engine, tunedock: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert tunedock("train", "r.yaml", "train.output_dir=runs/made", "train.max_steps=2").returncode == 0
    for arguments in (("eval", "made", "--json"), ("export", "made", "--to", "exports/made", "--json")):
        done = tunedock(*arguments)
        assert done.returncode == 0, done.stderr
        placed = read_placed(Run(folder / "runs/made"))
        assert placed is not None
        assert placed.stage == arguments[0]
    assert (folder / "exports/made/export.json").is_file()
    command = [sys.executable, "-m", "tunedock", "chat", "made"]
    chat = subprocess.run(
        command,
        cwd=folder,
        env=surroundings(folder, engine),
        input="hello\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert chat.returncode == 0, chat.stderr
    placed = read_placed(Run(folder / "runs/made"))
    assert placed is not None
    assert placed.stage == "chat"


@pytest.mark.long
def test_two_processes_in_one_container_have_the_losses_of_two_outside(
    folder: Path, engine: Engine, tunedock: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    for name, place in (("two-in", "docker"), ("two-out", "local")):
        # By itself it would divide the model where the container's memory is short, and another order of sums rounds otherwise.
        spread = ["launch.processes=2", "parallel=ddp", f"launch.on={place}"]
        done = tunedock("train", "r.yaml", f"train.output_dir=runs/{name}", *spread)
        assert done.returncode == 0, done.stderr
    assert losses(Run(folder / "runs/two-in")) == losses(Run(folder / "runs/two-out"))


@pytest.mark.long
def test_two_nodes_in_containers_meet_over_the_machines_own_network(
    folder: Path, engine: Engine, tunedock: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    launch = ["launch.nodes=2", f"launch.rendezvous=127.0.0.1:{free_port('127.0.0.1')}", "launch.processes=1"]
    command = [sys.executable, "-m", "tunedock", "train", "r.yaml", "train.output_dir=runs/nodes", *launch]
    env = surroundings(folder, engine)
    first = subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
    second = tunedock("train", "r.yaml", "train.output_dir=runs/nodes", *launch, "launch.node_rank=1")
    _, err = first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), err + second.stderr
    assert "2 processes on 2 nodes" in err
    run = Run(folder / "runs/nodes")
    assert len(losses(run)) == STEPS
    assert read_placed(run, node=1) != read_placed(run)


@pytest.mark.long
def test_memory_that_is_too_little_for_a_training_ends_it_with_the_engines_record(
    folder: Path, engine: Engine, tunedock: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = tunedock("train", "r.yaml", "train.output_dir=runs/small", "launch.container.memory=200m")
    assert done.returncode == 7, done.stderr
    assert "OOMKilled, with a limit of 200 MiB" in done.stderr


@pytest.mark.long
def test_a_training_in_gvisor(
    folder: Path, client: DockerClient, whole: Run, tunedock: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    if "runsc" not in client.api.info()["Runtimes"]:
        pytest.skip("the engine has no runtime runsc (gVisor)")
    done = tunedock("train", "r.yaml", "train.output_dir=runs/gvisor", "launch.container.runtime=runsc")
    assert done.returncode == 0, done.stderr
    assert losses(Run(folder / "runs/gvisor")) == losses(whole)


@pytest.mark.long
def test_an_image_that_tunedock_builds_trains_with_the_same_numbers(
    folder: Path, cpu_train_image: str, whole: Run, tunedock: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    recipe = json.loads((folder / "r.yaml").read_text())
    recipe["launch"] = {"on": "docker", "container": {"cpus": 1, "memory": "3g"}}
    (folder / "built.yaml").write_text(json.dumps(recipe))
    done = tunedock("train", "built.yaml", "train.output_dir=runs/built")
    assert done.returncode == 0, done.stderr
    assert f"in a container of {cpu_train_image}" in done.stderr
    assert losses(Run(folder / "runs/built")) == losses(whole)
    assert weights(Run(folder / "runs/built")) == weights(whole)
