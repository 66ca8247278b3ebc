"""Checkpoints: what goes in comes out, damage is found and passed over, nothing is half-written, no pickle."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tunedock.errors import DiskError, RunError
from tunedock.run.record import write_json
from tunedock.train import checkpoint
from tunedock.train.checkpoint import (
    Checkpoints,
    Index,
    Snapshot,
)
from tunedock.train.optimizer_state import optimizer_state, restore_optimizer
from tunedock.train.random_states import random_states, restore_random_states


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        step, {"w": torch.full((3,), float(step))}, {"0/exp_avg": torch.ones(3)}, {"feed": {}}, random_states()
    )


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(snapshot(7))
    read = checkpoints.load_last(pytest.fail)
    assert read.step == 7
    assert read.trained["w"].tolist() == [7.0] * 3
    assert read.state == {"feed": {}}


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    place = Checkpoints(tmp_path, keep=None).save(snapshot(1))
    assert {p.suffix for p in place.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path, harm: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(snapshot(1))
    file = checkpoints.save(snapshot(2)) / "trained.safetensors"
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[:-5])
    else:
        file.unlink()
    told: list[str] = []
    assert checkpoints.load_last(lambda name, why: told.append(f"{name} {why}")).step == 1
    assert len(told) == 1 and "step-00000002 trained.safetensors" in told[0]
    # The step is reached again and saved anew, not taken for already there.
    checkpoints.save(snapshot(2))
    assert checkpoints.load_last(pytest.fail).step == 2


def test_none_left_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no whole checkpoint"):
        Checkpoints(tmp_path, keep=None).load_last(pytest.fail)


def test_a_first_checkpoint_cut_off_by_a_kill_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step-00000004.part").mkdir()
    assert Checkpoints(tmp_path, keep=None).untouched()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"state.json": {}}'])
def test_a_manifest_that_says_too_little_is_damage(tmp_path: Path, content: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(snapshot(1))
    (checkpoints.save(snapshot(2)) / "manifest.json").write_text(content)
    assert checkpoints.load_last(lambda name, why: None).step == 1


def test_the_limit_spares_the_best_and_the_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(snapshot(1), metric=0.5, better=True)
    for step in range(2, 6):
        checkpoints.save(snapshot(step))
    assert checkpoints.names() == ["step-00000001", "step-00000005"]
    assert checkpoints.index().best == "step-00000001"


@pytest.mark.parametrize("harm", ["missing", "", "{", '{"nonsense": 1}'])
def test_a_lost_index_is_made_from_the_checkpoints(tmp_path: Path, harm: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(snapshot(1), metric=0.5, better=True)
    for step in (2, 3):
        checkpoints.save(snapshot(step))
    if harm == "missing":
        (tmp_path / "index.json").unlink()
    else:
        (tmp_path / "index.json").write_text(harm)
    again = Checkpoints(tmp_path, keep=2)
    assert again.index() == Index("step-00000003", "step-00000001", 0.5)
    assert again.load_last(pytest.fail).step == 3
    again.save(snapshot(4))
    assert again.names() == ["step-00000001", "step-00000004"]


def test_a_kill_between_checkpoint_and_index_leaves_the_best_one_known(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(snapshot(1), metric=0.9, better=True)
    before = (tmp_path / "index.json").read_bytes()
    checkpoints.save(snapshot(2), metric=0.5, better=True)
    (tmp_path / "index.json").write_bytes(before)
    assert checkpoints.load_last(pytest.fail).step == 2
    assert checkpoints.index() == Index("step-00000002", "step-00000002", 0.5)


def test_what_a_kill_left_half_written_is_swept_away(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(snapshot(1))
    (tmp_path / ".step-00000002.part").mkdir()
    (tmp_path / ".step-00000002.part" / "trained.safetensors").write_bytes(b"half")
    (tmp_path / ".index.json.77.part").write_text("{")
    checkpoints.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "step-00000001"]


def test_what_is_named_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the real calls: files, then the manifest, then the folder, then the rename, then the folder above."""
    calls: list[str] = []
    flush, rename = checkpoint._flush, Path.rename

    def flushed(path: Path) -> None:
        calls.append(path.name)
        flush(path)

    def renamed(path: Path, target: Path) -> Path:
        calls.append(f"rename to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(checkpoint, "_flush", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(
        checkpoint, "write_json", lambda path, value: (calls.append(path.name), write_json(path, value))
    )
    Checkpoints(tmp_path / "c", keep=None).save(snapshot(1))
    files = [f"{name}.safetensors" for name in ("trained", "optimizer", "random")]
    whole = [*files, "state.json", "manifest.json", ".step-00000001.part", "rename to step-00000001", "c", "index.json"]
    assert calls == whole


def test_the_last_good_one_goes_only_after_the_next_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(snapshot(1))
    found: list[list[str]] = []
    flush = checkpoint._flush
    monkeypatch.setattr(checkpoint, "_flush", lambda path: (found.append(checkpoints.names()), flush(path)))
    checkpoints.save(snapshot(2))
    assert all("step-00000001" in names for names in found)
    assert checkpoints.names() == ["step-00000002"]


def test_a_full_disk_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=None)
    checkpoints.save(snapshot(1))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=3))
    with pytest.raises(DiskError, match="no space left"):
        checkpoints.save(snapshot(2))
    assert checkpoints.names() == ["step-00000001"]
    assert checkpoints.load_last(pytest.fail).step == 1


def test_an_optimizer_goes_on_exactly() -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def steps(layer: torch.nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            layer(torch.ones(4)).square().sum().backward()
            optimizer.step()

    straight, optimizer = make()
    steps(straight, optimizer, 5)
    first, optimizer = make()
    steps(first, optimizer, 3)
    tensors, numbers = optimizer_state(optimizer)
    second, fresh = make()
    second.load_state_dict(first.state_dict())
    restore_optimizer(fresh, tensors, numbers)
    steps(second, fresh, 2)
    assert torch.equal(second.weight, straight.weight)


def test_random_generators_go_on_exactly() -> None:
    random.gauss(0, 1)  # leaves a second value cached
    np.random.standard_normal()
    states = random_states()
    drawn = torch.rand(3), random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.random()
    restore_random_states(states)
    again = torch.rand(3), random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.random()
    assert torch.equal(drawn[0], again[0])
    assert drawn[1:] == again[1:]
