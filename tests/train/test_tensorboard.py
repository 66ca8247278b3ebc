from __future__ import annotations

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tunedock.errors import DiskError
from tunedock.events import Emitter
from tunedock.train import tensorboard
from tunedock.train.metric_names import tag_of
from tunedock.train.tensorboard import TensorBoard


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What a TensorBoard server would show."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(point.step, round(point.value, 4)) for point in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def emitter(tmp_path: Path) -> Emitter:
    return Emitter.to_file(tmp_path / "events.jsonl")


def test_metrics_become_scalars(tmp_path: Path) -> None:
    emit = emitter(tmp_path)
    emit.stage("train", "started")
    values = {"loss": 2.5, "learning_rate": 0.25, "grad_norm": 1.5, "tokens_per_second": 900.0, "memory_bytes": 2.0**30}
    emit.metrics(1, 0.1, {**values, "device_utilisation": 50.0})
    emit.metrics(1, 0.1, {"eval_loss": 2.75, "eval_tokens": 10.0})
    emit.metrics(2, 0.2, {"loss": float("nan"), "grad_norm": 1.0})  # null in the file: no point
    board = TensorBoard(tmp_path / "tensorboard", tmp_path / "events.jsonl")
    board.catch_up()
    assert read_back(tmp_path / "tensorboard") == {
        "train/loss": [(1, 2.5)],
        "train/learning_rate": [(1, 0.25)],
        "train/grad_norm": [(1, 1.5), (2, 1.0)],
        "train/tokens_per_second": [(1, 900.0)],
        "train/memory_bytes": [(1, 2.0**30)],
        "train/device_utilisation": [(1, 50.0)],
        "eval/loss": [(1, 2.75)],
        "eval/tokens": [(1, 10.0)],
    }


def test_points_carry_the_time_they_were_measured(tmp_path: Path) -> None:
    with (tmp_path / "events.jsonl").open("w") as file:
        file.write('{"kind":"metrics","time":1700000000.5,"step":1,"epoch":0,"values":{"loss":1.0}}\n')
    board = TensorBoard(tmp_path / "tb", tmp_path / "events.jsonl")
    board.catch_up()
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    assert accumulator.Scalars("train/loss")[0].wall_time == 1700000000.5


def test_resume_appends_and_each_point_stands_once(tmp_path: Path) -> None:
    folder, events = tmp_path / "tensorboard", tmp_path / "events.jsonl"
    emit = emitter(tmp_path)
    for step in (1, 2):
        emit.metrics(step, 0.0, {"loss": float(step)})
    first = TensorBoard(folder, events)
    first.catch_up()
    first.catch_up()
    emit.metrics(3, 0.0, {"loss": 3.0})  # written, then the process is killed before it could catch up
    first.close()

    emit.metrics(4, 0.0, {"loss": 4.0})
    second = TensorBoard(folder, events)
    second.catch_up()
    second.close()
    assert read_back(folder) == {"train/loss": [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]}
    assert len(list(folder.glob("*tfevents*"))) == 2


def test_steps_done_again_replace_the_first_attempt(tmp_path: Path) -> None:
    folder, events = tmp_path / "tensorboard", tmp_path / "events.jsonl"
    emit = emitter(tmp_path)
    for step in (1, 2, 3, 4):
        emit.metrics(step, 0.0, {"loss": float(step)})
        emit.metrics(step, 0.0, {"eval_loss": 10.0 * step})
    board = TensorBoard(folder, events)
    board.catch_up()
    board.close()
    for step in (3, 4, 5):  # resumed from a checkpoint of step 2
        emit.metrics(step, 0.0, {"loss": step + 0.5})
    emit.metrics(5, 0.0, {"eval_loss": 50.0})
    board = TensorBoard(folder, events)
    board.catch_up()
    board.close()
    assert read_back(folder) == {
        "train/loss": [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)],
        "eval/loss": [(1, 10.0), (2, 20.0), (5, 50.0)],
    }


def test_a_kill_between_two_catch_ups_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Both attempts at a step stand in the events before the first `catch_up`."""
    emit = emitter(tmp_path)
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5), (3, 3.5)):
        emit.metrics(step, 0.0, {"loss": value})
    board = TensorBoard(tmp_path / "tb", tmp_path / "events.jsonl")
    board.catch_up()
    assert read_back(tmp_path / "tb") == {"train/loss": [(1, 1.0), (2, 2.5), (3, 3.5)]}


def test_follows_the_run_while_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "INTERVAL_S", 0.05)
    folder, emit = tmp_path / "tb", emitter(tmp_path)
    with TensorBoard(folder, tmp_path / "events.jsonl"):
        emit.metrics(1, 0.0, {"loss": 1.0})
        deadline = time.monotonic() + 10
        while not (folder / "written.json").is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert read_back(folder) == {"train/loss": [(1, 1.0)]}
        emit.metrics(2, 0.0, {"loss": 0.5})
    assert read_back(folder) == {"train/loss": [(1, 1.0), (2, 0.5)]}


def test_a_run_without_metrics_leaves_no_folder(tmp_path: Path) -> None:
    emitter(tmp_path).note("nothing yet")
    with TensorBoard(tmp_path / "tb", tmp_path / "events.jsonl"):
        pass
    assert not (tmp_path / "tb").exists()


def test_a_folder_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("a file stands where the folder should")
    emitter(tmp_path).metrics(1, 0.0, {"loss": 1.0})
    with pytest.raises(DiskError, match="TensorBoard's files cannot be written"):
        TensorBoard(tmp_path / "tb", tmp_path / "events.jsonl").catch_up()


def test_the_training_error_is_not_hidden_by_the_board_s(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("a file stands where the folder should")
    emitter(tmp_path).metrics(1, 0.0, {"loss": 1.0})
    with pytest.raises(KeyError, match="training"), TensorBoard(tmp_path / "tb", tmp_path / "events.jsonl"):
        raise KeyError("training")


def test_tags() -> None:
    assert tag_of("loss") == "train/loss"
    assert tag_of("eval_loss") == "eval/loss"
    assert tag_of("tokens_per_second") == "train/tokens_per_second"
