"""The loop on a tiny real model: exact resuming, invariance to rows, stopping, best and last, divergence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_loop import build, data, losses, weights
from tunedock.errors import DivergedError, InterruptedRun, RecipeError
from tunedock.objective.evaluate import Measured
from tunedock.recipe.adapters import Adapter, Full, Lora
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.random_states import random_states


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_resuming_is_bit_identical(tmp_path: Path, optim: str) -> None:
    """Across an epoch's end (step 6), with dropout drawing random numbers."""
    straight, policy, stream = build(tmp_path / "a", optim=optim)
    straight.run()
    build(tmp_path / "b", optim=optim, steps=9)[0].run()
    for name in ("step-00000008", "step-00000009"):
        shutil.rmtree(tmp_path / "b" / name)
    resumed, again, stream_again = build(tmp_path / "b", optim=optim)
    resumed.state.restore(Checkpoints(tmp_path / "b", keep=None).load_last(pytest.fail))
    assert resumed.progress.step == 4
    resumed.run()
    for name, tensor in weights(policy).items():
        assert torch.equal(tensor, weights(again)[name]), name
    assert losses(stream)[4:] == losses(stream_again)


def test_stopped_in_the_middle_of_a_step_it_goes_on_exactly(tmp_path: Path) -> None:
    straight, policy, _ = build(tmp_path / "a", budget=30)
    straight.run()
    asked = iter([False] * 11 + [True] * 100)  # some row of some step
    stopped, _, _ = build(tmp_path / "b", budget=30, stop=lambda: next(asked))
    with pytest.raises(InterruptedRun, match="a checkpoint is saved"):
        stopped.run()
    assert 0 < stopped.progress.step < 9
    resumed, again, _ = build(tmp_path / "b", budget=30)
    resumed.state.restore(Checkpoints(tmp_path / "b", keep=None).load_last(pytest.fail))
    resumed.run()
    for name, tensor in weights(policy).items():
        assert torch.equal(tensor, weights(again)[name]), name


@pytest.mark.parametrize("into", [1, 3])
def test_stopped_in_the_middle_of_an_evaluation_it_goes_on_with_it(tmp_path: Path, into: int) -> None:
    """What was measured of it is thrown away, and all of it done when the run goes on: best and patience are the same."""
    settings: dict[str, Any] = {
        "budget": 60, "validation": data(seed=1), "eval_strategy": "steps", "eval_steps": 3, "early_stopping_patience": 9,
    }  # fmt: skip
    straight, policy, stream = build(tmp_path / "a", **settings)
    straight.run()
    evaluating: list[int] = []

    def stop() -> bool:
        if stopped.progress.step == 6 and stopped.progress.to_evaluate:
            evaluating.append(1)
        return len(evaluating) >= into

    stopped, _, first = build(tmp_path / "b", stop=stop, **settings)
    with pytest.raises(InterruptedRun, match="stopped after step 6; a checkpoint is saved"):
        stopped.run()
    resumed, again, second = build(tmp_path / "b", **settings)
    resumed.state.restore(Checkpoints(tmp_path / "b", keep=None).load_last(pytest.fail))
    resumed.run()
    assert losses(first, "eval_loss") + losses(second, "eval_loss") == losses(stream, "eval_loss")
    assert resumed.progress == straight.progress
    assert Checkpoints(tmp_path / "b", keep=None).index() == Checkpoints(tmp_path / "a", keep=None).index()
    for name, tensor in weights(policy).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_how_a_step_is_split_into_rows_changes_nothing_but_rounding(tmp_path: Path) -> None:
    adapter = Lora(r=4, alpha=8)
    results = []
    for budget in (16, 64, 4096):
        loop, policy, _ = build(tmp_path / str(budget), adapter=adapter, budget=budget)
        loop.run()
        results.append(weights(policy))
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
@pytest.mark.parametrize(("adapter", "left"), [(Lora(r=16, alpha=32), 0.9), (Full(), 0.75)])
def test_it_learns(tmp_path: Path, precision: dict[str, bool], adapter: Adapter, left: float) -> None:
    """Whole weights learn the runs of numbers; an adapter on random weights learns a little of them."""
    loop, _, stream = build(
        tmp_path,
        adapter=adapter,
        steps=40,
        learning_rate=1e-2,
        save_strategy="no",
        lr_scheduler_type="constant",
        **precision,
    )
    loop.run()
    curve = losses(stream)
    assert len(curve) == 40
    print(curve[0], curve[-1])
    assert np.mean(curve[-5:]) < left * np.mean(curve[:5])


def test_validation_finds_the_best_and_patience_ends(tmp_path: Path) -> None:
    """With a learning rate that wrecks the model, the first evaluations are the best."""
    loop, _, stream = build(
        tmp_path,
        steps=60,
        validation=data(seed=1),
        eval_strategy="steps",
        eval_steps=2,
        early_stopping_patience=2,
        learning_rate=30.0,  # far enough that rounding does not decide which evaluation is better
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_total_limit=2,
    )
    loop.run()
    evaluations = losses(stream, "eval_loss")
    index = Checkpoints(tmp_path, keep=2).index()
    assert loop.progress.step < 60
    assert index.best_metric == pytest.approx(min(evaluations))
    assert index.best == f"step-{2 * (evaluations.index(min(evaluations)) + 1):08d}"
    assert set(Checkpoints(tmp_path, keep=2).names()) == {index.best, index.last}
    assert "early stopping" in stream.getvalue()


def test_of_a_metric_that_is_no_loss_more_is_better(tmp_path: Path) -> None:
    """Patience too, with its threshold; and a resumed run goes on with what it had."""
    told = iter([0.2, 0.5, 0.52, 0.4, 0.9])
    settings: dict[str, Any] = {
        "validation": data(seed=1)[:2],
        "evaluation": lambda: Measured(1.0 + progressing(), 2.0, {"rougeL": next(told)}),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "eval_rougeL",
        "early_stopping_patience": 2,
        "early_stopping_threshold": 0.1,
        "steps": 30,
    }

    def progressing() -> float:
        return float(loop.progress.step)

    loop, _, _ = build(tmp_path, **settings)
    loop.run()
    assert (loop.progress.step, loop.progress.stale) == (8, 2), "0.52 is better, and not by enough"
    assert (loop.progress.best, loop.progress.best_loss, loop.progress.last_eval) == (0.52, 7.0, 9.0)
    index = Checkpoints(tmp_path, keep=None).index()
    assert (index.best, index.best_metric) == ("step-00000006", 0.52)
    loop, _, _ = build(tmp_path, **settings)
    loop.state.restore(Checkpoints(tmp_path, keep=None).load_last(pytest.fail))
    assert (loop.progress.best, loop.progress.best_loss) == (0.52, 7.0)


def test_a_checkpoint_of_before_the_metric_could_be_chosen(tmp_path: Path) -> None:
    loop, _, _ = build(tmp_path, steps=4)
    loop.progress.best = 2.5
    loop.run()
    snapshot = Checkpoints(tmp_path, keep=None).load_last(pytest.fail)
    del snapshot.state["progress"]["best_loss"]
    loop.state.restore(snapshot)
    assert loop.progress.best_loss == 2.5


def test_a_loss_that_is_no_number_names_the_rows(tmp_path: Path) -> None:
    loop, policy, _ = build(tmp_path)
    with torch.no_grad():
        policy.trainable[0][1].fill_(float("nan"))
    with pytest.raises(DivergedError) as caught:
        loop.run()
    assert "d:" in str(caught.value.where)
    assert "step 1" in caught.value.message


def test_gradients_that_are_no_numbers_never_reach_the_weights(tmp_path: Path) -> None:
    loop, policy, _ = build(tmp_path)
    before = weights(policy)
    policy.trainable[0][1].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DivergedError, match="norm of the gradients"):
        loop.run()
    for name, tensor in before.items():
        assert torch.equal(tensor, weights(policy)[name])


def test_a_run_out_of_patience_takes_no_step_when_resumed(tmp_path: Path) -> None:
    loop, policy, _ = build(tmp_path, early_stopping_patience=2)
    loop.progress.stale = 2
    before = weights(policy)
    assert loop.run().step == 0
    for name, tensor in before.items():
        assert torch.equal(tensor, weights(policy)[name])


def test_early_overflow_with_float16_skips_the_step(tmp_path: Path) -> None:
    loop, policy, _ = build(tmp_path, fp16=True, steps=3)
    before = weights(policy)
    loop.updater.scaler = torch.amp.GradScaler("cpu", init_scale=3e38)  # the next gradients overflow
    loop._step(random_states())
    assert loop.progress.skipped == 1
    for name, tensor in before.items():
        assert torch.equal(tensor, weights(policy)[name])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"optim": "adamm"}, "no optimizer"),
        ({"optim": "lomo"}, "inside the backward pass"),
        ({"lr_scheduler_type": "cosinus"}, "schedule"),
        ({"optim_args": "x=1"}, "does not use them"),
    ],
)
def test_names_nobody_knows_are_recipe_errors(tmp_path: Path, change: dict[str, str], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        build(tmp_path, **change)


def test_schedules_of_transformers(tmp_path: Path) -> None:
    for kind, extra in [
        ("linear", {}),
        ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}),
        ("warmup_stable_decay", {"lr_scheduler_kwargs": {"num_decay_steps": 2}}),
        ("constant_with_warmup", {"warmup_steps": 0.5}),
    ]:
        loop, _, stream = build(tmp_path / kind, steps=4, lr_scheduler_type=kind, save_strategy="no", **extra)
        loop.run()
        assert len(losses(stream, "learning_rate")) == 4
