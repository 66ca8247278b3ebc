"""The commands with the real worker and a small random model: train, stop, resume, evaluate, talk, export, delete."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunedock.run.record import Run

DEMO = Path(__file__).parents[2] / "examples" / "demo"

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("real")
    shutil.copytree(DEMO / "base-config", made / "base")
    rows = (DEMO / "triage.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:60]
    (made / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (made / "r.yaml").write_text(
        "model: {path: ./base, init: random}\nadapter: full\noffline: true\n"
        "data: {train: ./rows.jsonl, max_length: 256, cache_dir: ./cache}\n"
        "train: {max_steps: 6, batch_size: 4, save_steps: 2, learning_rate: 1.0e-3}\n"
        "eval: {max_samples: 2, max_new_tokens: 8}\n"
    )
    return made


def command(*arguments):
    return [sys.executable, "-m", "tunedock", *arguments]


def tunedock(folder, *arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments), cwd=folder, env=environment, capture_output=True, text=True, timeout=200, **options
    )


@pytest.fixture(scope="module")
def trained(folder):
    done = tunedock(folder, "train", "r.yaml", "train.output_dir=runs/whole", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def losses(path):
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    return {e["step"]: e["values"]["loss"] for e in events if e["kind"] == "metrics" and "loss" in e["values"]}


def test_training_leaves_a_finished_run(folder, trained):
    assert trained["steps"] == 6
    assert Run(folder / "runs" / "whole").state().status == "finished"
    assert (folder / "runs" / "whole" / "model").is_dir()


def test_ctrl_c_saves_and_resume_gives_the_same_losses(folder, trained):
    path = folder / "runs" / "stopped"
    process = subprocess.Popen(
        command("train", "r.yaml", "train.output_dir=runs/stopped"), cwd=folder, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not ((path / "events.jsonl").exists() and losses(path)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "saving a checkpoint; press Ctrl-C again to stop at once" in err
    assert "--resume" in err
    assert Run(path).state().status == "interrupted"
    assert max(losses(path)) < 6
    done = tunedock(folder, "train", "--resume", "stopped", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6
    assert losses(path) == losses(folder / "runs" / "whole")


def test_a_killed_worker_is_told_with_its_log(folder):
    process = subprocess.Popen(
        command("train", "r.yaml", "train.output_dir=runs/killed", "train.max_steps=500"),
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    state = folder / "runs" / "killed" / "run.json"
    deadline = time.monotonic() + 100
    while not (state.exists() and json.loads(state.read_text())["pid"]):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(json.loads(state.read_text())["pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 7, err
    assert str(folder / "runs" / "killed" / "logs" / "train.log") in err
    assert Run(folder / "runs" / "killed").state().status == "failed"


def test_evaluation_has_base_and_tuned(folder, trained):
    done = tunedock(folder, "eval", "whole", "--split", "validation", "max_new_tokens=4", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["tuned"]["loss"] < value["base"]["loss"]
    done = tunedock(folder, "eval", "whole", "--split", "nope")
    assert done.returncode == 3
    assert "there is no split `nope`" in done.stderr


def test_chat_answers_a_line_a_turn(folder, trained):
    done = tunedock(folder, "chat", "whole", input="Where is my order?\n/base\nHello?\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 10


def test_export_is_checked_and_whole(folder, trained):
    done = tunedock(folder, "export", "whole", "--to", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "model.safetensors").is_file()
    assert tunedock(folder, "export", "whole", "--to", "out").returncode == 5


def test_data_check_and_show(folder):
    done = tunedock(folder, "data", "check", "r.yaml", "--json", "--to", "report")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert (value["read"], value["kept"]) == (60, 60)
    assert (folder / "report" / "report.json").is_file()
    done = tunedock(folder, "data", "show", "r.yaml", "--row", "rows.jsonl:3")
    assert done.returncode == 0, done.stderr
    assert "⟦{" in done.stdout
    done = tunedock(folder, "data", "show", "r.yaml", "--row", "999", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["where"] == "--row"


def test_a_run_is_deleted(folder):
    (folder / "runs").mkdir(exist_ok=True)
    made = tunedock(folder, "train", "r.yaml", "train.max_steps=1", "train.output_dir=runs/short")
    assert made.returncode == 0, made.stderr
    assert tunedock(folder, "runs", "delete", "short", "--yes").returncode == 0
    assert not (folder / "runs" / "short").exists()
