from __future__ import annotations

import fcntl
import json

import pytest

from tunedock.errors import RunError
from tunedock.events import encode
from tunedock.run.record import Run, RunState
from tunedock.run.store import MISSING, compare, delete, find, flatten, last_metrics, list_runs


def make(folder, name, *, created=1.0, recipe=None, metrics=(), **state):
    run = Run.create(
        folder / name,
        recipe_yaml="model: x\n",
        resolved={"recipe": recipe or {}, "origins": {}, "hash": "h"},
        state=RunState(name, created, "sft", "some/model", "lora", "h", **state),
    )
    with run.events.open("w") as file:
        for step, values in metrics:
            file.write(encode({"kind": "metrics", "time": 1.0, "step": step, "epoch": step / 10, "values": values}))
    return run


def test_runs_are_listed_newest_first_with_their_newest_numbers(tmp_path):
    make(tmp_path, "old", created=1.0, status="finished", started=10.0, finished=75.0)
    make(tmp_path, "new", created=2.0, metrics=[(1, {"loss": 3.0}), (1, {"eval_loss": 2.5}), (2, {"loss": 2.0})])
    new, old = list_runs(tmp_path)
    assert (new.name, new.steps, new.loss, new.eval_loss) == ("new", 2, 2.0, 2.5)
    assert (old.name, old.steps, old.duration_s, old.status) == ("old", None, 65.0, "finished")


def test_what_is_no_run_is_not_listed_and_a_damaged_one_is_called_so(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("")
    make(tmp_path, "half").path.joinpath("run.json").write_text('{"name": "ha')
    make(tmp_path, "other").path.joinpath("run.json").write_text('{"future": true}')
    assert [(run.name, run.status) for run in list_runs(tmp_path)] == [("half", "damaged"), ("other", "damaged")]
    assert list_runs(tmp_path / "nowhere") == []


def test_a_run_whose_worker_is_gone_is_lost(tmp_path):
    make(tmp_path, "r", status="running", started=1.0)
    assert list_runs(tmp_path)[0].status == "lost"


def test_find_takes_a_name_a_beginning_or_a_path(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    make(runs, "20260101-sft")
    make(runs, "20260101-sft-2")
    make(runs, "2025-x")
    elsewhere = make(tmp_path / "else", "r").path
    assert find("20260101-sft", runs).name == "20260101-sft"
    assert find("2025", runs).name == "2025-x"
    assert find(str(elsewhere), runs).path == elsewhere
    monkeypatch.chdir(elsewhere.parent)
    assert find("./r", runs).path.resolve() == elsewhere


def test_find_refuses_what_is_not_one_run(tmp_path):
    make(tmp_path, "support-a")
    make(tmp_path, "support-b")
    with pytest.raises(RunError, match="beginning of 2 runs: support-a, support-b"):
        find("support", tmp_path)
    with pytest.raises(RunError) as raised:
        find("suport-a", tmp_path)
    assert raised.value.hint == "did you mean `support-a`?"
    for nothing in ("", ".", "..", "/"):
        with pytest.raises(RunError):
            find(nothing, tmp_path)


def test_the_last_metrics_are_found_in_a_long_file_without_reading_it(tmp_path, monkeypatch):
    noise = encode({"kind": "progress", "time": 1.0, "task": "metrics?", "done": 1})
    path = tmp_path / "events.jsonl"
    with path.open("w") as file:
        file.write(encode({"kind": "metrics", "step": 1, "epoch": 0.1, "values": {"early": 1.0}}))
        file.write(noise * 200_000)
        file.write(encode({"kind": "metrics", "step": 7, "epoch": 0.7, "values": {"eval_loss": 0.5, "loss": 9.0}}))
        file.write(noise * 5_000)
        file.write(encode({"kind": "metrics", "step": 8, "epoch": 0.8, "values": {"loss": 0.25, "bad": None}}))
        file.write('{"kind":"metrics","step":9,"values":{"loss":0')
    read = []
    monkeypatch.setattr("tunedock.run.store.decode", lambda line: read.append(line) or json.loads(line))
    found = last_metrics(path, ("loss", "eval_loss"))
    assert found == {"loss": 0.25, "step": 8, "epoch": 0.8, "eval_loss": 0.5}
    assert len(read) == 2
    assert "early" not in last_metrics(path)
    assert path.stat().st_size > 8 << 20


def test_lines_that_cross_blocks_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("tunedock.run.store.BLOCK_BYTES", 7)
    path = make(tmp_path, "r", metrics=[(n, {"loss": float(n), f"only{n}": 1.0}) for n in range(30)]).events
    found = last_metrics(path)
    assert found["loss"] == 29.0
    assert all(found[f"only{n}"] == 1.0 for n in range(30))


def test_compare_names_the_keys_that_differ_and_all_metrics(tmp_path):
    a = make(tmp_path, "a", recipe={"train": {"lr": 1, "seed": 3}, "x": [1]}, metrics=[(1, {"loss": 2.0})])
    b = make(tmp_path, "b", recipe={"train": {"lr": 2, "seed": 3}}, metrics=[(5, {"eval_loss": 1.0})])
    found = compare([a, b])
    assert found.names == ["a", "b"]
    assert found.recipe == {"train.lr": [1, 2], "x.0": [1, MISSING]}
    assert found.metrics["loss"] == [2.0, None]
    assert found.metrics["eval_loss"] == [None, 1.0]
    assert found.metrics["step"] == [1, 5]
    with pytest.raises(RunError):
        compare([a])


def test_delete_removes_the_run_alone(tmp_path):
    kept = tmp_path / "outside"
    kept.write_text("keep me")
    run = make(tmp_path / "runs", "r")
    (run.path / "link").symlink_to(kept)
    (run.path / "folder").symlink_to(tmp_path)
    other = make(tmp_path / "runs", "other")
    delete(run, tmp_path / "runs")
    assert not run.path.exists()
    assert kept.read_text() == "keep me"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [other.name]


def test_delete_refuses_links_other_places_and_what_is_no_run(tmp_path):
    runs = tmp_path / "runs"
    outside = make(tmp_path / "else", "r")
    runs.mkdir()
    (runs / "link").symlink_to(outside.path)
    (runs / "folder").mkdir()
    nested = make(runs / "folder", "deep")
    cases = [Run(runs / "link"), outside, nested, Run(runs / "folder"), Run(runs / ".."), Run(runs), Run(runs / "gone")]
    for run in cases:
        with pytest.raises(RunError):
            delete(run, runs)
    assert outside.path.is_dir()
    assert nested.path.is_dir()


def test_delete_refuses_a_run_at_work(tmp_path):
    run = make(tmp_path, "r")
    with (run.path / "run.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="at work"):
            delete(run, tmp_path)
    delete(run, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_flatten_keeps_empty_sections():
    assert flatten({"a": {"b": 1, "c": []}, "d": [{"e": 2}]}) == {"a.b": 1, "a.c": [], "d.0.e": 2}
    assert flatten({}) == {}


def test_a_folder_in_use_says_what_can_be_done_about_the_run_in_it(tmp_path):
    def hint(name):
        with pytest.raises(RunError, match="in use") as caught:
            make(tmp_path, name)
        return str(caught.value.hint)

    make(tmp_path, "too early", status="failed")
    assert f"tunedock runs delete 'too early' --runs-dir {tmp_path}`" in hint("too early")
    assert "--resume" in hint("too early"), "what failed may have been the machine"
    later = make(tmp_path, "later", status="failed")
    (later.checkpoints / "step-00000001").mkdir()
    (later.checkpoints / "step-00000001" / "manifest.json").write_text("{}")
    assert "runs delete" not in hint("later")
    make(tmp_path, "damaged").path.joinpath("run.json").write_text("{")
    assert "--resume" in hint("damaged")


def test_the_newest_checkpoint_is_a_whole_one_by_its_step(tmp_path):
    run = make(tmp_path, "r")
    assert run.newest_checkpoint() is None
    for name in ("step-00000004", "step-00000012", "step-of-my-own", ".step-00000016.part"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "manifest.json").write_text("{}")
    (run.checkpoints / "step-00000014").mkdir()
    assert run.newest_checkpoint() == 12


def test_an_exported_model_is_no_run(tmp_path):
    (tmp_path / "export.json").write_text("{}")
    with pytest.raises(RunError, match="exported model") as caught:
        find(str(tmp_path), tmp_path / "runs")
    assert "the run it was made of" in str(caught.value.hint)
