"""Stages in real containers of a real engine, with a worker that does as told: what goes in, what comes out, what is left."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import engine_keeper
from engine_bed import debian
from stage_containers import SITE, launch_section
from tunedock.errors import (
    DataError,
    DependencyError,
    EngineError,
    InterruptedRun,
    OutOfMemoryError,
    RecipeError,
    RunError,
    TunedockError,
)
from tunedock.events import Event
from tunedock.image.engine import Endpoint, connect
from tunedock.launch import at_work
from tunedock.launch.chat import ChatSession
from tunedock.launch.docker import DockerLauncher
from tunedock.launch.docker_job import DockerJob
from tunedock.launch.job import JobSpec
from tunedock.launch.watch import watch
from tunedock.pipeline.jobs import run_stage
from tunedock.recipe.schema import Recipe
from tunedock.run.placed import read_placed
from tunedock.run.record import Run

if TYPE_CHECKING:
    from docker import DockerClient

# Longer than other tests may take: each waits until none of another process has a share of the machine.
pytestmark = [pytest.mark.usefixtures("engine_here", "nothing_left"), pytest.mark.timeout(900)]

Scripted = Callable[..., Run]
RESULT = ["event", "result", {"value": {"steps": 3}}]


class Watched:
    """A stage at work in a thread, so that a test can do things to it meanwhile."""

    def __init__(self, run: Run, stage: str = "train", **request: Any) -> None:
        self.events: list[Event] = []
        self.value: Any = None
        self.error: TunedockError | None = None
        self._at_work = threading.Event()
        self.job = DockerLauncher().start(JobSpec(stage, run.path, request))
        assert isinstance(self.job, DockerJob)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        try:
            self.value = watch(self.job, self._hear)
        except TunedockError as error:
            self.error = error
        finally:
            self.job.close()

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        if event.get("message") == "at work":
            self._at_work.set()

    def wait_for_work(self) -> None:
        assert self._at_work.wait(30), self.events

    def end(self, within_s: float = 60.0) -> TunedockError | None:
        self._thread.join(within_s)
        assert not self._thread.is_alive(), "it has not ended"
        return self.error


def ended(run: Run, stage: str = "train", **request: Any) -> Watched:
    watched = Watched(run, stage, **request)
    watched.end()
    return watched


def test_a_stage_gets_its_request_and_its_events_and_result_come_back(scripted: Scripted) -> None:
    run = scripted(["print", "a library speaks"], ["request"], RESULT)
    watched = ended(run, "train", resume=False)
    assert watched.error is None
    assert watched.value == {"steps": 3}
    request = next(event["data"] for event in watched.events if event.get("message") == "request")
    assert request["request"] == {"resume": False}
    assert "a library speaks" in run.log("train").read_text()
    placed = read_placed(run)
    assert placed is not None
    assert placed.image_id.startswith("sha256:")


def test_labels_of_ours_on_a_container_of_somebody_else_stop_nothing(scripted: Scripted, client: DockerClient) -> None:
    run = scripted(RESULT, cpus=1)
    names = ("cpus", "memory", "mps", "node")
    labels = {"tunedock.version": "x", "tunedock.run": str(run.path), **{f"tunedock.{name}": "lots" for name in names}}
    foreign = client.api.create_container_from_config({"Image": SITE, "Cmd": ["true"], "Labels": labels})["Id"]
    try:
        assert ended(run).value == {"steps": 3}
        assert client.api.inspect_container(foreign)["State"]["Status"] == "created"  # whose it is may want it
    finally:
        client.api.remove_container(foreign)


def test_an_error_and_its_exit_code_are_those_of_the_worker(scripted: Scripted) -> None:
    error = DataError("3 rows dropped", where="a.jsonl:7", hint="mend them")
    found = ended(scripted(["event", "failure", {"error": error.to_json()}], ["exit", 3]), "eval").error
    assert isinstance(found, DataError)
    assert str(found) == str(error)


def test_a_worker_that_dies_without_a_word_is_told_by_what_stands_beside_it(scripted: Scripted) -> None:
    run = scripted(["print", "the last line"], ["signal", signal.SIGSEGV])
    found = ended(run, "eval").error
    assert found is not None
    assert found.exit_code == 70
    assert "the worker died by SIGSEGV" in found.message
    assert "the last line" in found.message


def test_a_stop_of_the_engine_saves_and_ends_with_143(scripted: Scripted, client: DockerClient) -> None:
    run = scripted(["checkpoint"])
    watched = Watched(run)
    watched.wait_for_work()
    placed = read_placed(run)
    assert placed is not None
    client.api.stop(placed.container, timeout=20)
    error = watched.end()
    assert isinstance(error, InterruptedRun)
    saved = next(event["data"] for event in watched.events if event.get("message") == "saved")
    assert saved["signal"] == signal.SIGTERM
    assert f"--resume {run.path}" in str(error.hint)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_our_own_signals_reach_the_worker_once(scripted: Scripted, number: signal.Signals) -> None:
    run = scripted(["checkpoint"])

    def interrupt(event: Event) -> None:
        if event.get("message") == "at work":
            os.kill(os.getpid(), number)

    with pytest.raises(InterruptedRun) as raised:
        run_stage(JobSpec("train", run.path), interrupt, None)
    told = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert [event["data"]["signal"] for event in told if event.get("message") == "saved"] == [number]
    assert raised.value.message == "stopped at step 7"


@pytest.mark.long
def test_a_second_ctrl_c_ends_what_does_not_listen(scripted: Scripted) -> None:
    run = scripted(["stubborn"])
    left = [signal.SIGINT, signal.SIGINT]

    def interrupt(event: Event) -> None:
        if event["kind"] == "note" and left:
            os.kill(os.getpid(), left.pop())

    with pytest.raises(InterruptedRun):
        run_stage(JobSpec("train", run.path), interrupt, None)
    assert run.state().status == "interrupted"


def test_a_container_that_is_killed_is_told_as_such_and_not_as_a_want_of_memory(
    scripted: Scripted, client: DockerClient
) -> None:
    run = scripted(["stubborn"])
    watched = Watched(run)
    watched.wait_for_work()
    placed = read_placed(run)
    assert placed is not None
    client.api.kill(placed.container, "SIGKILL")
    error = watched.end()
    assert isinstance(error, OutOfMemoryError)
    assert "by the engine's record not for want of its own memory" in error.message
    assert not watched.job.killed_for_memory()
    assert watched.job.poll() == 137
    assert not watched.job.supervised()


def test_memory_that_runs_out_is_told_by_the_engines_own_record(scripted: Scripted) -> None:
    error = ended(scripted(["hungry"], memory="256m"), "eval").error
    assert isinstance(error, OutOfMemoryError)
    assert error.exit_code == 7
    assert "OOMKilled, with a limit of 256 MiB" in error.message
    assert "launch.container.memory" in str(error.hint)


def test_a_conversation_goes_over_the_containers_own_input_and_output(scripted: Scripted) -> None:
    run = scripted(["print", "a library speaks"], ["chat"])
    pieces: list[str] = []
    with ChatSession(run.path, DockerLauncher()) as session:
        answer = session.turn([{"role": "user", "content": "hello"}], pieces.append)
        assert "".join(pieces) == answer
        assert answer.startswith("tuned u ")
        with pytest.raises(RecipeError, match="no sense"):
            session.turn([{"role": "user", "content": "refuse"}], pieces.append)
        assert session.turn([{"role": "user", "content": "again"}], pieces.append, which="base").startswith("base")
    assert not [event for event in pieces if "library" in event]


def test_an_export_lands_where_it_was_asked_for_and_only_a_folder_of_its_own_was_shown(
    scripted: Scripted, tmp_path: Path
) -> None:
    run = scripted(["export"])
    to = tmp_path / "out" / "model"
    watched = ended(run, "export", to=str(to), format="hf")
    assert watched.error is None
    assert watched.value["to"] == str(to)
    assert (to / "config.json").is_file()
    assert [path.name for path in to.parent.iterdir()] == ["model"]


@pytest.mark.long
def test_an_export_that_fails_leaves_nothing(scripted: Scripted, tmp_path: Path) -> None:
    to = tmp_path / "out" / "model"
    assert ended(scripted(["exit", 6]), "export", to=str(to), format="hf").error is not None
    assert list(to.parent.iterdir()) == []


def test_the_container_goes_on_without_whoever_started_it(scripted: Scripted, client: DockerClient) -> None:
    run = scripted(["event", "note", {"message": "at work"}], ["sleep", 60], RESULT)
    job = DockerLauncher().start(JobSpec("train", run.path))
    job.close()  # as where a terminal is closed: nobody watches any more
    placed = at_work.container_at_work(run)
    assert placed is not None
    with pytest.raises(RunError, match=f"in the container {placed.name}"):
        run_stage(JobSpec("train", run.path, {"resume": True}), lambda _: None, None)
    assert at_work.stop(run, now=True) == f"container {placed.name}"
    assert at_work.container_at_work(run) is None
    with pytest.raises(RunError, match="nothing is at work"):
        at_work.stop(run)


@pytest.mark.long
def test_what_an_earlier_stage_left_is_swept_by_the_next(scripted: Scripted, client: DockerClient) -> None:
    run = scripted(RESULT)
    DockerLauncher().start(JobSpec("eval", run.path)).close()
    placed = read_placed(run)
    assert placed is not None
    client.api.wait(placed.container)
    assert ended(run, "eval").error is None


def test_two_runs_that_do_not_fit_on_the_machine(scripted: Scripted) -> None:
    cores = os.cpu_count() or 1
    first = Watched(scripted(["checkpoint"], name="first", cpus=cores))
    first.wait_for_work()
    with pytest.raises(RecipeError, match=f"`cpus: 0.5`, and this machine has {cores} processors") as raised:
        DockerLauncher().start(JobSpec("train", scripted(RESULT, name="second", cpus=0.5).path))
    assert "tunedock-train-first-" in raised.value.message
    first.job.signal(signal.SIGINT)
    assert isinstance(first.end(), InterruptedRun)
    assert ended(scripted(RESULT, name="third", cpus=0.5)).error is None


PROBE = """
import os, pathlib, resource, socket
def tried(what, *arguments):
    try:
        what(*arguments)
        return "yes"
    except OSError as error:
        return error.strerror
def wrote(path):
    return tried(lambda: (pathlib.Path(path) / "probe").write_text("x"))
def group(*names):
    return next((int(p.read_text()) for n in names if (p := pathlib.Path("/sys/fs/cgroup") / n).exists()), None)
told.update(
    uid=os.getuid(), gid=os.getgid(), home=os.environ["HOME"], threads=os.environ["OMP_NUM_THREADS"],
    secret=os.environ.get("HF_TOKEN"), named=os.environ.get("MINE"),
    root=wrote("/opt"), own=wrote(os.getcwd()), model=wrote(MODEL), tmp=wrote("/tmp"), home_written=wrote(os.environ["HOME"]),
    cache=wrote(os.environ["HOME"] + "/.cache"), rows=tried(open, MODEL + "/../rows.jsonl"),
    network=tried(socket.create_connection, ("192.0.2.1", 80), 3), interfaces=[name for _, name in socket.if_nameindex()],
    shm=os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize, nofile=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    memory=group("memory/memory.limit_in_bytes", "memory.max"), quota=group("cpu/cpu.cfs_quota_us"),
    init=pathlib.Path("/proc/1/comm").read_text().strip(), host=socket.gethostname(),
    caps=[l.split()[1] for l in pathlib.Path("/proc/self/status").read_text().splitlines() if l.startswith("CapEff")][0],
    others=sorted(os.listdir("/proc/1/root/home")),
)
"""


def test_what_a_stage_finds_in_its_container(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MINE", "passed by name")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = PROBE.replace("MODEL", repr(f"{tmp_path}/model"))
    settings = {"cpus": 1.5, "memory": "512m", "shm_size": "96m", "ulimits": {"nofile": 4096}, "user": "12345:2345"}
    env = [*launch_section()["container"]["env"], "MINE"]
    run = scripted(["probe", code], env=env, **settings)
    os.chown(run.path, 12345, 2345)
    run.events.touch()
    for path in (run.path, *run.path.rglob("*")):
        os.chown(path, 12345, 2345)
    watched = ended(run, "eval")
    assert watched.error is None
    found = watched.value
    assert (found["uid"], found["gid"]) == (12345, 2345)
    assert found["home"] == str(tmp_path / "home")
    assert found["threads"] == "1"
    assert (found["secret"], found["named"]) == (None, "passed by name")
    assert [found[place] for place in ("own", "tmp", "home_written", "cache", "rows")] == ["yes"] * 5
    assert {found["root"], found["model"]} <= {"Read-only file system", "Permission denied"}
    assert found["network"] == "Network is unreachable"
    assert found["interfaces"] == ["lo"]
    assert (found["shm"], found["nofile"], found["memory"]) == (96 << 20, 4096, 512 << 20)
    assert found["quota"] in (150_000, None)  # cgroups v2 keep it in another file
    assert found["host"] == os.uname().nodename[:63]
    assert found["caps"] == "0" * 16
    assert "docker-init" in found["init"] or "tini" in found["init"]
    assert (run.path / "probe").stat().st_uid == 12345
    assert not (tmp_path / "model" / "probe").exists()


def test_data_and_models_are_read_only_for_root_too(scripted: Scripted, tmp_path: Path) -> None:
    code = PROBE.replace("MODEL", repr(f"{tmp_path}/model"))
    found = ended(scripted(["probe", code]), "eval").value
    assert found["uid"] == os.getuid()
    assert (found["root"], found["model"]) == ("Read-only file system", "Read-only file system")
    assert found["own"] == "yes"


def test_an_image_that_is_not_there(scripted: Scripted) -> None:
    run = scripted(RESULT)
    resolved = json.loads((run.path / "resolved.json").read_text())
    resolved["recipe"]["launch"]["image"] = "tunedock-nowhere:1"
    (run.path / "resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(EngineError, match="no image `tunedock-nowhere:1`") as raised:
        DockerLauncher().start(JobSpec("train", run.path))
    assert "tunedock image build" in str(raised.value.hint)


def test_an_image_of_another_version(scripted: Scripted, client: DockerClient) -> None:
    run = scripted(RESULT, source=False)
    resolved = json.loads((run.path / "resolved.json").read_text())
    resolved["recipe"]["launch"]["image"] = "tunedock-tests:old"
    (run.path / "resolved.json").write_text(json.dumps(resolved))
    old = b"FROM tunedock-tests:site\nLABEL io.tunedock.target=cpu org.opencontainers.image.version=0.0.1\n"
    client.images.build(fileobj=io.BytesIO(old), tag="tunedock-tests:old", rm=True)
    with pytest.raises(EngineError, match=r"has tunedock 0.0.1, and this is"):
        DockerLauncher().start(JobSpec("train", run.path))


def test_a_gpu_without_the_toolkit(scripted: Scripted) -> None:
    with pytest.raises(DependencyError, match="nothing that gives GPUs") as raised:
        DockerLauncher({**os.environ, "CUDA_VISIBLE_DEVICES": ""}).start(
            JobSpec("train", scripted(RESULT, gpus="all").path)
        )
    assert "nvidia-container-toolkit" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("launch", "container", "said"),
    [
        ({}, {"runtime": "kata-nowhere"}, "knows no runtime"),
        ({}, {"network": "nowhere"}, r"no network `nowhere`: it has .*bridge"),
        ({"image": "../x"}, {}, "is no host"),
        ({"image": "a b"}, {}, "is no repository"),
    ],
)
def test_what_the_engine_has_not_is_told_before_there_is_a_run(
    scripted: Scripted, tmp_path: Path, launch: dict[str, Any], container: dict[str, Any], said: str
) -> None:
    recipe = Recipe.model_validate(scripted(RESULT, **container).resolved()["recipe"])
    recipe = recipe.model_copy(update={"launch": recipe.launch.model_copy(update=launch)})
    with pytest.raises(RecipeError, match=said):
        DockerLauncher().check(recipe, tmp_path / "not yet")
    assert not (tmp_path / "not yet").exists()


def test_a_runtime_that_the_engine_does_not_know(scripted: Scripted) -> None:
    with pytest.raises(RecipeError, match=r"knows no runtime `kata-nowhere`: it has .*runc"):
        DockerLauncher().start(JobSpec("train", scripted(RESULT, runtime="kata-nowhere").path))


def test_a_network_that_is_not_there(scripted: Scripted) -> None:
    with pytest.raises(EngineError, match="network nowhere not found"):
        DockerLauncher().start(JobSpec("train", scripted(RESULT, network="nowhere").path))


def test_an_image_without_tunedock_is_told(scripted: Scripted, client: DockerClient) -> None:
    run = scripted(RESULT, env=["PATH=/nowhere"])
    try:
        found = ended(run).error
    except EngineError as error:
        found = error
    assert isinstance(found, EngineError)
    assert "python" in found.message


def test_an_engine_that_is_not_there(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scripted(RESULT)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(EngineError, match="container engine"):
        DockerLauncher().start(JobSpec("train", run.path))
    monkeypatch.setenv("DOCKER_HOST", "tcp://far.example:2376")
    with pytest.raises(EngineError, match="on another machine"):
        DockerLauncher().start(JobSpec("train", run.path))


@pytest.mark.long
def test_an_engine_that_dies_is_told_once_and_the_wait_can_be_given_up(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunedock.launch.docker_job.SILENT_S", 0.5)
    folder = Path(tempfile.mkdtemp(prefix="td-dies-"))
    keeper = subprocess.Popen([sys.executable, engine_keeper.__file__, str(folder), str(os.getpid())])
    try:
        wait_until(lambda: engine_keeper.answers(folder), 60)
        client = connect(Endpoint(f"unix://{engine_keeper.socket_of(folder)}", "the tests"), timeout_s=240)
        client.api.import_image_from_file(str(debian()), repository="base", tag="debian")
        container = client.api.create_container_from_config({"Image": "base:debian", "Cmd": ["sleep", "600"]})["Id"]
        job = DockerJob(JobSpec("train", run.path), client, container, "dies", memory_bytes=None)
        os.kill(int((folder / "dockerd.pid").read_text()), signal.SIGKILL)
        keeper.wait(60)
        told: list[Event] = []
        wait_until(lambda: bool(told.extend(job.events(0.1)) or told), 30)
        told += [event for _ in range(5) for event in job.events(0.2)]
        assert [event["kind"] for event in told] == ["warning"]
        assert "does not answer" in told[0]["message"]
        job.kill()
        wait_until(lambda: job.poll() is not None, 30)
        assert isinstance(job.verdict(None, stopped_by=None), EngineError)
        job.close()
    finally:
        (folder / "stop").touch() if folder.exists() else None
        keeper.wait(60)


def wait_until(true: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
