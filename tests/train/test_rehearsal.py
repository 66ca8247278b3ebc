"""Compiled layers give what plain ones give, are kept only where they pay, and a rehearsal leaves no trace."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from tiny_loop import build, data, losses, weights
from tunedock.errors import OutOfMemoryError, RowTooLargeError
from tunedock.events import Emitter
from tunedock.model import world
from tunedock.run.record import Run
from tunedock.train import step
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.loop import Rehearsed
from tunedock.train.rehearsal import LEAST_STEPS, RECORD, judge, rehearse_largest_row, settle_compiling


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return Run(tmp_path / "run")


def settle(asked, run, policy, loop, *, resume=False):
    settle_compiling(asked, run, policy, loop, resume=resume, emit=Emitter(None))


def test_a_rehearsal_changes_nothing(tmp_path):
    plain, policy_a, events_a = build(tmp_path / "a", steps=3)
    plain.run()
    rehearsed, policy_b, events_b = build(tmp_path / "b", steps=3)
    first = rehearsed.rehearse()
    again = rehearsed.rehearse()
    assert (again.loss, again.grad_norm) == (first.loss, first.grad_norm)
    rehearsed.run()
    assert losses(events_b) == losses(events_a)
    assert first.loss == losses(events_a)[0]
    assert all(torch.equal(a, weights(policy_b)[name]) for name, a in weights(policy_a).items())


@pytest.mark.parametrize(
    ("again", "backend"),
    [
        pytest.param(True, "aot_eager", id="computed again, traced"),
        pytest.param(True, "inductor", id="computed again", marks=pytest.mark.long),
        pytest.param(False, "inductor", id="kept", marks=pytest.mark.long),
    ],
)
def test_compiled_layers_train_to_the_same_weights_and_resume_to_the_same_bits(
    tmp_path, run, again, backend, monkeypatch
):
    """As the run has it: rows as trees, the row's attention left out, no fused parts. Dropout on: a compiled layer draws what a
    plain one draws. `traced`: graphs of forward and backward as the compiler gets them, but no minute of C++."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    real = {"steps": 4, "save_steps": 2, "probed": True, "to_compile": True, "gradient_checkpointing": again}
    plain, policy_a, events_a = build(tmp_path / "a", **real)
    plain.run()
    compiled, policy_b, events_b = build(tmp_path / "b", **real)
    assert policy_b.layout == "tree" and policy_b.fused == []
    torch.compiler.reset()
    counters.clear()
    settle(True, run, policy_b, compiled)
    assert counters["stats"]["unique_graphs"] > 1
    record = json.loads((run.path / RECORD).read_text())
    assert record["compiled"] and record["plain_s"] > 0 and record["compiling_s"] > 0
    compiled.run()
    assert losses(events_b) == pytest.approx(losses(events_a), rel=1e-5)
    for name, a in weights(policy_a).items():
        assert torch.allclose(weights(policy_b)[name], a, atol=2e-4), name
    resumed, policy_c, events_c = build(tmp_path / "b", **real)
    kept = Checkpoints(tmp_path / "b", keep=None)
    resumed.state.restore(kept.load(kept.names()[0]))
    settle("auto", run, policy_c, resumed, resume=True)
    resumed.run()
    assert losses(events_c) == losses(events_b)[2:]
    assert all(torch.equal(b, weights(policy_c)[name]) for name, b in weights(policy_b).items())


def test_a_compiler_that_fails_is_done_without(tmp_path, run, monkeypatch):
    """A stand-in for a compiler without a C++ compiler: what it raises, where it raises it."""
    loop, policy, _ = build(tmp_path / "a", steps=2, probed=True, to_compile=True)

    def compile_to_failure(model):
        def fail(*args, **kwargs):
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

        model.get_base_model().model.layers[0].forward = fail
        return 1

    monkeypatch.setattr("tunedock.train.rehearsal.compile_layers", compile_to_failure)
    settle(True, run, policy, loop)
    record = json.loads((run.path / RECORD).read_text())
    assert not record["compiled"] and "no working C++ compiler" in record["why"]
    assert policy.fused
    (run.path / RECORD).write_text(json.dumps({**record, "compiled": True}))
    settle("auto", run, policy, loop, resume=True)
    loop.run()
    assert loop.progress.step == 2


def test_a_machine_that_does_not_see_the_record_does_as_the_others(tmp_path, run, monkeypatch):
    """The first rank's word comes over the network; here it is put in its place."""
    loop, policy, _ = build(tmp_path / "a", steps=2)
    monkeypatch.setattr(world, "told_by_first", lambda own: {"compiled": False})
    monkeypatch.setattr(loop, "rehearse", lambda: pytest.fail("nothing is tried again"))
    settle(True, run, policy, loop, resume=True)
    assert not (run.path / RECORD).exists()


def test_auto_leaves_a_cpu_alone(tmp_path, run):
    loop, policy, _ = build(tmp_path / "a")
    settle("auto", run, policy, loop)
    assert not (run.path / RECORD).exists()
    assert all(
        "forward" not in vars(layer) for layer in policy.model.modules() if type(layer).__name__.endswith("Layer")
    )


PLAIN = Rehearsed(2.0, 1.5, 0.7)


@pytest.mark.parametrize(
    ("asked", "then", "compiled"),
    [
        ("auto", Rehearsed(1.5, 1.5, 0.7), True),
        ("auto", Rehearsed(1.98, 1.5, 0.7), False),  # within the noise
        (True, Rehearsed(2.5, 1.5, 0.7), True),
        (True, Rehearsed(1.0, 1.6, 0.7), False),
        ("auto", Rehearsed(1.0, 1.5, 0.8), False),
        ("auto", Rehearsed(1.0, math.nan, 0.7), False),
    ],
)
def test_when_compiling_is_kept(asked, then, compiled):
    first = Rehearsed(62.0, then.loss, then.grad_norm)
    verdict = judge(asked, PLAIN, first, then, same=1e-4)
    assert verdict.compiled is compiled
    assert verdict.compiling_s == pytest.approx(62.0 - then.seconds)


@pytest.mark.parametrize(("steps", "tried"), [(LEAST_STEPS - 1, 0), (LEAST_STEPS, 2)])
def test_a_short_run_is_not_held_up_by_a_trial(tmp_path, run, monkeypatch, steps, tried):
    """The device is said to be a GPU; nothing else of it is used."""
    loop, policy, _ = build(tmp_path / "a", steps=steps)
    monkeypatch.setattr(policy, "device", torch.device("cuda"))
    asked = []
    monkeypatch.setattr(loop, "rehearse", lambda: asked.append(1) or PLAIN)
    settle("auto", run, policy, loop)
    assert len(asked) == tried
    assert "too short" in json.loads((run.path / RECORD).read_text())["why"]


def test_layers_that_give_something_else_are_not_kept(tmp_path, run, monkeypatch):
    """A compiler's fault, as it would look: the layers come back from it with another result."""
    loop, policy, _ = build(tmp_path / "a", steps=2)

    def miscompile(model):
        layer = model.get_base_model().model.layers[0]
        layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs) * 1.5
        return 1

    monkeypatch.setattr("tunedock.train.rehearsal.compile_layers", miscompile)
    settle(True, run, policy, loop)
    record = json.loads((run.path / RECORD).read_text())
    assert not record["compiled"] and "loss" in record["why"]
    assert "forward" not in vars(policy.model.get_base_model().model.layers[0])


def test_float16_is_rehearsed_without_its_scale(tmp_path):
    scaled, _, _ = build(tmp_path / "a", steps=2, fp16=True)
    plain, _, _ = build(tmp_path / "b", steps=2)
    assert scaled.rehearse().grad_norm == pytest.approx(plain.rehearse().grad_norm, rel=0.05)


LONGEST = max(data(), key=lambda sample: sample.longest_path)


def test_the_largest_row_is_rehearsed_and_leaves_nothing(tmp_path):
    loop, policy, _ = build(tmp_path / "a", steps=2, probed=True)
    before, seen = weights(policy), []
    rehearse = loop.rehearse
    loop.rehearse = lambda rows: seen.append(rows) or rehearse(rows)
    rehearse_largest_row(policy, loop, LONGEST, 300, to_come_bytes=1 << 20)
    (rows,) = [rows for _, rows in seen]
    assert len(rows) == 1 and 300 - LONGEST.tokens < rows[0].slots <= 300
    assert all(torch.equal(value, weights(policy)[name]) for name, value in before.items())
    assert all(p.grad is None for _, p in policy.trainable)


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(("slots", "error"), [(300, RowTooLargeError), (LONGEST.tokens, OutOfMemoryError)])
def test_what_does_not_fit_starts_anew_or_names_the_sample(tmp_path, monkeypatch, slots, error, sharded):
    """No start with smaller rows makes room for a sample that is alone in its row."""
    loop, policy, _ = build(tmp_path / "a", steps=2, probed=True)
    monkeypatch.setattr(step, "is_sharded", lambda model: sharded)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(policy.model, "forward", full)
    with pytest.raises(OutOfMemoryError) as raised:
        rehearse_largest_row(policy, loop, LONGEST, slots)
    assert type(raised.value) is error


def test_a_sharded_models_step_is_not_done_again(tmp_path, monkeypatch):
    loop, policy, _ = build(tmp_path / "a", steps=2)
    monkeypatch.setattr(step, "is_sharded", lambda model: True)
    monkeypatch.setattr(policy.model, "forward", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(RowTooLargeError):
        loop.run()
