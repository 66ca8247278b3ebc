"""Trackers for real: an MLflow server with SQLite, SwanLab and Weights & Biases offline; one that fails does no harm."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from inline_worker import InlineLauncher
from tunedock import pipeline
from tunedock.errors import DependencyError, RecipeError
from tunedock.events import Emitter, EventReader
from tunedock.recipe.load import load
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, RunState, read_json
from tunedock.train import tracker_kinds, trackers
from tunedock.train.trackers import _first_line, following

SERVER_PACKAGES = ("mlflow", "flask", "flask_cors", "sqlalchemy", "alembic", "fastapi", "uvicorn")


def installed(*names: str) -> None:
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


class Server:
    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "files")],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=self.log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        pytest.fail(f"the server does not answer: {self.log.read_text()}")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait(10)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    installed(*SERVER_PACKAGES)
    made = Server(tmp_path_factory.mktemp("mlflow"))
    try:
        made.wait()
        yield made
    finally:
        made.kill()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "INTERVAL_S", 0.05)
    for name in ("MLFLOW_TRACKING_URI", "SWANLAB_API_KEY", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in tracker_kinds.MLFLOW_ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, tracker_kinds.MLFLOW_ENVIRONMENT[name]))


def a_recipe(*report_to: str, **track: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": "a/b", "data": {"train": "t.jsonl"}, "train": {"report_to": list(report_to)}, "track": track}
    )


def a_run(folder: Path) -> Run:
    state = RunState(
        name="mine", created=0.0, objective="sft", model="a/b", adapter="lora", recipe_hash="0123456789abcdef"
    )
    run = Run.create(folder, recipe_yaml="model: a/b\n", resolved={"recipe": {}}, state=state)
    run.update(lineage={"model": "a/b", "commit": "c0ffee", "data": "f00d"})
    (run.path / "data.json").write_text("{}")
    (run.path / "plots").mkdir()
    (run.path / "plots" / "loss.svg").write_text("<svg/>")
    return run


def told(emit: Emitter, steps: range) -> None:
    for step in steps:
        emit.metrics(step, 0.0, {"loss": 10.0 / step, "tokens_per_second": float("nan")})
        if step % 2 == 0:
            emit.metrics(step, 0.0, {"eval_loss": 20.0 / step})


def warnings(run: Run) -> list[str]:
    return [event["message"] for event in EventReader(run.events).new() if event["kind"] == "warning"]


# -- MLflow ----------------------------------------------------------------------------------------------------------------


def test_mlflow_has_parameters_metrics_tags_and_files_and_a_resumed_run_goes_on(server: Server, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run = a_run(tmp_path / "mine")
    emit = Emitter.to_file(run.events)
    recipe = a_recipe("mlflow", mlflow={"tracking_uri": server.uri}, project="support", tags={"team": "desk"})
    with pytest.raises(KeyboardInterrupt), following(run, recipe, emit):
        told(emit, range(1, 4))
        raise KeyboardInterrupt
    state = read_json(run.path / "trackers" / "mlflow.json")
    client = MlflowClient(server.uri)
    assert client.get_run(state["id"]).info.status == "KILLED"

    with following(run, recipe, emit) as known:
        told(emit, range(3, 7))  # step 3 is done again
        known.result = {"steps": 6, "eval_loss": 3.3, "weights": "last"}
    assert not warnings(run)
    again = read_json(run.path / "trackers" / "mlflow.json")
    assert again["id"] == state["id"]
    kept = client.get_run(state["id"])
    assert kept.info.status == "FINISHED" and kept.info.run_name == "mine"
    assert client.get_experiment(kept.info.experiment_id).name == "support"
    assert kept.data.params["train.neftune_noise_alpha"] == "None" and kept.data.params["model.path"] == "a/b"
    expected = {
        "tunedock.commit": "c0ffee", "tunedock.data": "f00d", "tunedock.recipe_hash": "0123456789abcdef", "team": "desk",
        "tunedock.model": "a/b",
    }  # fmt: skip
    assert expected.items() <= kept.data.tags.items()
    curve = client.get_metric_history(state["id"], "train/loss")
    assert [(point.step, point.value) for point in curve] == [(step, 10.0 / step) for step in range(1, 7)]
    assert [point.step for point in client.get_metric_history(state["id"], "eval/loss")] == [2, 4, 6]
    assert kept.data.metrics["final/eval_loss"] == 3.3 and "final/weights" not in kept.data.metrics
    assert "train/tokens_per_second" not in kept.data.metrics, "what is no number is no point"
    files = {entry.path for entry in client.list_artifacts(state["id"])}
    assert files == {"recipe.yaml", "resolved.json", "data.json", "plots"}

    (run.path / "eval").mkdir()
    (run.path / "eval" / "metrics.json").write_text("{}")
    trackers.report_evaluation(run, recipe, emit, {"test": {"loss": 1.5}, "run": "mine"})
    assert client.get_run(state["id"]).data.metrics["test/test/loss"] == 1.5
    assert [entry.path for entry in client.list_artifacts(state["id"], "eval")] == ["eval/metrics.json"]


@pytest.mark.parametrize(("limit", "sent"), [(1.0, True), (0.0, False)])
def test_an_adapter_is_sent_where_it_is_small(server: Server, tmp_path: Path, limit: float, sent: bool) -> None:
    from mlflow.tracking import MlflowClient

    run = a_run(tmp_path / "mine")
    run.model.mkdir()
    (run.model / "adapter_config.json").write_text("{}")
    (run.model / "adapter_model.safetensors").write_bytes(b"0" * 1000)
    recipe = a_recipe("mlflow", mlflow={"tracking_uri": server.uri}, max_adapter_mb=limit)
    with following(run, recipe, Emitter.to_file(run.events)):
        pass
    client, name = MlflowClient(server.uri), read_json(run.path / "trackers" / "mlflow.json")["id"]
    assert ("model" in {entry.path for entry in client.list_artifacts(name)}) is sent


@pytest.mark.long
def test_a_server_that_dies_in_the_middle_is_one_warning(tmp_path: Path) -> None:
    """And one that comes back is told the rest."""
    installed(*SERVER_PACKAGES)
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    try:
        server.wait()
        run = a_run(tmp_path / "mine")
        emit = Emitter.to_file(run.events)
        recipe = a_recipe("mlflow", mlflow={"tracking_uri": server.uri}, timeout_s=20)
        began = time.monotonic()
        with following(run, recipe, emit):
            told(emit, range(1, 4))
            deadline = time.monotonic() + 30
            while "last" not in (state := _state(run)) or not state["last"]:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            server.kill()
            told(emit, range(4, 9))
        assert time.monotonic() - began < 60
        found = warnings(run)
        assert len(found) == 1 and "mlflow could not be told" in found[0]
    finally:
        server.kill()


def _state(run: Run) -> dict[str, Any]:
    path = run.path / "trackers" / "mlflow.json"
    return read_json(path) if path.is_file() else {}


# -- SwanLab and Weights & Biases, offline ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ending"), [("swanlab", ".swanlab"), ("wandb", ".wandb")])
def test_offline_trackers_leave_a_file_to_send(tmp_path: Path, name: str, ending: str) -> None:
    installed(name)
    run = a_run(tmp_path / "mine")
    emit = Emitter.to_file(run.events)
    recipe = a_recipe(name, **{name: {"mode": "offline"}})
    for steps in (range(1, 3), range(3, 5)):
        with following(run, recipe, emit):
            told(emit, steps)
    assert not warnings(run)
    state = read_json(run.path / "trackers" / f"{name}.json")
    assert state["last"] == {"train": 4, "eval": 4}
    files = list((run.path / "trackers" / name).rglob(f"*{ending}"))
    assert len(files) == 2 and all(state["id"] in file.name for file in files)
    until = time.monotonic() + 30  # a process of W&B's own writes its file, and may be behind
    while not all(file.stat().st_size > 200 for file in files):
        assert time.monotonic() < until, [file.stat().st_size for file in files]
        time.sleep(0.1)


# -- failures ------------------------------------------------------------------------------------------------------------


class Broken(tracker_kinds.Kind):
    name = "broken"

    def open(self) -> str:
        raise SystemExit("this package calls exit")

    def way_out(self) -> str:
        return "take it out"


class Hanging(tracker_kinds.Kind):
    name = "hanging"
    forever = threading.Event()

    def open(self) -> str:
        self.forever.wait(30)
        return "x"

    def finish(self, status: str, final: Any, files: Any) -> None:
        pass

    def way_out(self) -> str:
        return "take it out"


@pytest.mark.parametrize(("kind", "said"), [(Broken, "could not be told: SystemExit"), (Hanging, "does not answer")])
def test_whatever_a_tracker_does_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[tracker_kinds.Kind], said: str
) -> None:
    monkeypatch.setattr(Hanging, "forever", threading.Event())
    monkeypatch.setattr(trackers, "KINDS", {"mlflow": kind})
    run = a_run(tmp_path / "mine")
    emit = Emitter.to_file(run.events)
    began = time.monotonic()
    with following(run, a_recipe("mlflow", timeout_s=0.3), emit):
        told(emit, range(1, 4))
    assert (
        time.monotonic() - began < 20
    )  # a machine that does other things too takes its time; the tracker would take 30 s
    found = warnings(run)
    Hanging.forever.set()
    assert len(found) == 1 and said in found[0]


def test_what_is_missing_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tracker_kinds, "find_spec", lambda name: object())
    with pytest.raises(RecipeError, match="nothing says where MLflow is"):
        tracker_kinds.require(a_recipe("mlflow"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    tracker_kinds.require(a_recipe("mlflow"))
    for name, secret in (("swanlab", "SWANLAB_API_KEY"), ("wandb", "WANDB_API_KEY")):
        with pytest.raises(RecipeError, match=f"there is no key for {name}") as caught:
            tracker_kinds.require(a_recipe(name))
        assert f"set {secret} in the environment (never in the recipe)" in str(caught.value)
        tracker_kinds.require(a_recipe(name, **{name: {"mode": "offline"}}))
        monkeypatch.setenv(secret, "k")
        tracker_kinds.require(a_recipe(name))
    monkeypatch.setattr(tracker_kinds, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="mlflow-skinny") as missing:
        tracker_kinds.require(a_recipe("tensorboard", "mlflow"))
    assert "pip install 'tunedock[mlflow]'" in str(missing.value)
    tracker_kinds.require(a_recipe("tensorboard"))


def test_addresses_are_told_without_their_passwords() -> None:
    error = OSError("API request to http://user:s3cr3t@127.0.0.1:9/api failed, and https://key@host:1 too")
    assert _first_line(error) == "API request to http://***@127.0.0.1:9/api failed, and https://***@host:1 too"
    with pytest.raises(RecipeError) as raised:
        load([], ["model=m", "data.train=x", "track.mlflow.tracking_uri=https://me:s3cr3t@mlflow.example"])
    assert "https://***@mlflow.example" in str(raised.value) and "s3cr3t" not in str(raised.value)


@pytest.mark.parametrize(
    "track",
    [
        {"mlflow": {"tracking_uri": "https://me:secret@mlflow.example"}},
        {"proxy": "http://me:secret@proxy.example:3128"},
        {"proxy": "proxy.example"},
        {"project": "it's mine"},
        {"swanlab": {"api_key": "k"}},
    ],
)
def test_secrets_and_odd_addresses_are_refused(track: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"should|pattern|not permitted"):
        a_recipe(**track)


def test_a_proxy_of_the_recipe_reaches_the_packages_and_spares_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "before" if "no" in name.lower() else "")
    trackers._use_proxy("http://proxy.example:3128")
    assert os.environ["https_proxy"] == os.environ["HTTP_PROXY"] == "http://proxy.example:3128"
    assert os.environ["no_proxy"] == "before,localhost,127.0.0.1,::1"


@pytest.mark.long
def test_a_training_with_mlflow_and_wandb_named_in_the_recipe(server: Server, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient
    from test_dpo_run import workplace

    installed("wandb")
    place = tmp_path / "place"
    place.mkdir()
    overrides = [
        "train.report_to=[tensorboard, mlflow, wandb]", f"track.mlflow.tracking_uri={server.uri}",
        "track.wandb.mode=offline", "train.max_steps=3", f"train.output_dir={place / 'run'}",
    ]  # fmt: skip
    outcome = pipeline.train([workplace(place)], overrides, launcher=InlineLauncher())
    run = Run.open(outcome.run)
    assert not [message for message in warnings(run) if "could not be told" in message]
    kept = MlflowClient(server.uri).get_run(read_json(run.path / "trackers" / "mlflow.json")["id"])
    assert kept.data.metrics["final/steps"] == 3 and kept.data.tags["tunedock.data"] == run.state().lineage["data"]
    assert list((run.path / "trackers" / "wandb").rglob("*.wandb"))
