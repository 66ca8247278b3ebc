"""What Prometheus is answered, through its own client's parser and over HTTP."""

from __future__ import annotations

import math
import threading
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tunedock.errors import RecipeError
from tunedock.events import Emitter
from tunedock.run import exporter, store
from tunedock.run.record import Run, RunState


def made(folder: Path, name: str = "one") -> Run:
    state = RunState(name=name, created=1.0, objective="sft", model="m", adapter="lora", recipe_hash="h")
    return Run.create(folder / name, recipe_yaml="", resolved={}, state=state)


@pytest.fixture
def asked(tmp_path: Path):
    server, thread = exporter.serve(lambda: store.runs_in(tmp_path), host="127.0.0.1", port=0)

    def ask() -> dict[tuple[str, ...], float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {
            (
                sample.name,
                *(sample.labels[key] for key in ("run", "status", "name") if key in sample.labels),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    yield ask
    server.shutdown()
    thread.join(10)
    server.server_close()


def test_what_a_run_has_told(tmp_path: Path, asked) -> None:
    run = made(tmp_path)
    emit = Emitter.to_file(run.events)
    emit.progress("training", 3, 10, "steps")
    emit.progress("validation", 7, 8, "samples")
    emit.metrics(3, 0.5, {"loss": 1.5, 'rewards/"odd"\n': 0.25, "grad_norm": math.nan})
    emit.warning("something")
    with run.working("train"):
        found = asked()
    assert found["tunedock_run_status", "one", "running"] == 1
    assert found["tunedock_run_status", "one", "finished"] == 0
    assert (found["tunedock_run_steps", "one"], found["tunedock_run_steps_planned", "one"]) == (3, 10)
    assert found["tunedock_run_metric", "one", "loss"] == 1.5
    assert found["tunedock_run_metric", "one", 'rewards/"odd"\n'] == 0.25
    assert math.isnan(found["tunedock_run_metric", "one", "grad_norm"])
    assert (found["tunedock_run_warnings_total", "one"], found["tunedock_run_failures_total", "one"]) == (1, 0)
    run.update(status="running")  # and no process holds it
    assert asked()["tunedock_run_status", "one", "lost"] == 1
    emit.metrics(4, 0.6, {"loss": 1.25})
    emit.emit("failure", error={"message": "no"})
    found = asked()
    assert found["tunedock_run_metric", "one", "loss"] == 1.25
    assert found["tunedock_run_failures_total", "one"] == 1
    assert found["tunedock_run_last_event_timestamp_seconds", "one"] > 1.7e9


def test_runs_come_and_go(tmp_path: Path, asked) -> None:
    assert not asked()
    made(tmp_path, "a")
    second = made(tmp_path, "b")
    (second.path / "run.json").write_text("{")
    assert {key[1] for key in asked()} == {"a", "b"}
    store.delete(Run(tmp_path / "a"), tmp_path)
    assert {key[1] for key in asked()} == {"b"}


def test_scrapes_at_once_see_one_run(tmp_path: Path, asked) -> None:
    emit = Emitter.to_file(made(tmp_path).events)
    emit.warning("once")
    seen: list[float] = []
    threads = [
        threading.Thread(target=lambda: seen.append(asked()["tunedock_run_warnings_total", "one"])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [1.0] * 8


def test_a_port_that_is_taken(tmp_path: Path, asked) -> None:
    server, thread = exporter.serve(list, host="127.0.0.1", port=0)
    with pytest.raises(RecipeError, match="cannot listen on") as raised:
        exporter.serve(list, host="127.0.0.1", port=server.server_port)
    assert raised.value.where == "--listen"
    server.shutdown()
    thread.join(10)
    server.server_close()
