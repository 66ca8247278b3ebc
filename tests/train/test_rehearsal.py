"""Compiled layers give what plain ones give, are kept only where they pay, and a rehearsal leaves no trace."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch._dynamo.utils import counters

from tiny_loop import build, losses, weights
from tunedock.errors import RowTooLargeError
from tunedock.events import Emitter
from tunedock.run.record import Run
from tunedock.train.loop import Rehearsed
from tunedock.train.rehearsal import RECORD, judge, rehearse_largest_row, settle_compiling


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


def test_compiled_layers_train_to_the_same_weights_and_resume_to_the_same_bits(tmp_path, run):
    """Dropout on: a compiled layer draws what a plain one draws."""
    plain, policy_a, events_a = build(tmp_path / "a", steps=4, save_steps=2)
    plain.run()
    compiled, policy_b, events_b = build(tmp_path / "b", steps=4, save_steps=2)
    settle(True, run, policy_b, compiled)
    record = json.loads((run.path / RECORD).read_text())
    assert record["compiled"] and record["plain_s"] > 0 and record["compiling_s"] > 0
    compiled.run()
    assert losses(events_b) == pytest.approx(losses(events_a), rel=1e-5)
    assert counters["stats"]["unique_graphs"] > 1
    for name, a in weights(policy_a).items():
        assert torch.allclose(weights(policy_b)[name], a, atol=2e-4), name
    again, policy_c, events_c = build(tmp_path / "b", steps=4, save_steps=2)
    again.restore(again._checkpoints.load(sorted(again._checkpoints.names())[0]))
    settle("auto", run, policy_c, again, resume=True)
    again.run()
    assert losses(events_c) == losses(events_b)[2:]
    assert all(torch.equal(b, weights(policy_c)[name]) for name, b in weights(policy_b).items())


def test_auto_leaves_a_cpu_alone(tmp_path, run):
    loop, policy, _ = build(tmp_path / "a")
    settle("auto", run, policy, loop)
    assert not (run.path / RECORD).exists()
    assert all(
        "forward" not in vars(layer) for layer in policy.model.modules() if type(layer).__name__.endswith("Layer")
    )


PLAIN = Rehearsed(2.0, 1.5, 0.7)


@pytest.mark.parametrize(
    ("asked", "first_s", "then", "steps", "compiled"),
    [
        ("auto", 62.0, Rehearsed(1.5, 1.5, 0.7), 1000, True),
        ("auto", 62.0, Rehearsed(1.5, 1.5, 0.7), 100, False),  # 50 s saved for 60 s of compiling
        ("auto", 62.0, Rehearsed(1.98, 1.5, 0.7), 10**6, False),  # within the noise
        (True, 62.0, Rehearsed(2.5, 1.5, 0.7), 10, True),
        (True, 62.0, Rehearsed(1.0, 1.6, 0.7), 1000, False),
        ("auto", 62.0, Rehearsed(1.0, 1.5, 0.8), 1000, False),
        ("auto", 62.0, Rehearsed(1.0, math.nan, 0.7), 1000, False),
    ],
)
def test_when_compiling_is_kept(asked, first_s, then, steps, compiled):
    first = Rehearsed(first_s, then.loss, then.grad_norm)
    verdict = judge(asked, PLAIN, first, then, steps_left=steps, same=1e-4)
    assert verdict.compiled is compiled
    assert verdict.compiling_s == pytest.approx(first_s - then.seconds)


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


def test_the_largest_row_fits_or_the_run_starts_anew(tmp_path, monkeypatch):
    loop, policy, _ = build(tmp_path / "a", steps=2)
    before = weights(policy)
    rehearse_largest_row(policy, loop, 300)
    assert all(torch.equal(value, weights(policy)[name]) for name, value in before.items())
    assert all(p.grad is None for _, p in policy.trainable)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(policy.model, "forward", full)
    with pytest.raises(RowTooLargeError, match="300 tokens"):
        rehearse_largest_row(policy, loop, 300)
