"""A step that gives no numbers: the rows that did it are named, and what `train.on_divergence` says is done. On real rows: a token
whose embedding is no number stands in some of them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pair_steps import moved_policy
from pairs import pairs
from tiny_loop import BATCH, build, data, losses, weights
from tunedock.data.layout import padded, step_indices
from tunedock.data.sample import Sample, single
from tunedock.errors import DivergedError
from tunedock.model.policy import Policy
from tunedock.objective.registry import make
from tunedock.recipe.objectives.preference import Dpo, Kto, Simpo
from tunedock.train.checkpoint import Checkpoints, Snapshot
from tunedock.train.divergence import IN_A_ROW, ROLL_BACKS, Blame, LeftOut
from tunedock.train.loop import Loop
from tunedock.train.saving import State

BAD = 95
"""A token of no other row."""


def poisoned(policy: Policy) -> None:
    """By a hook: the output layer shares the weights."""

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == BAD)[..., None], float("nan"))

    policy.model.get_input_embeddings().register_forward_hook(hook)  # type: ignore[operator]


def rows(*bad: int) -> list[Sample]:
    made = data()
    for number in bad:
        tokens = np.append(made[number].segments[0].tokens_T, [BAD, 7])
        made[number] = single(f"d:{number}", tokens, np.ones(len(tokens), np.float32))
    return made


def made(folder: Path, *bad: int, **how: Any) -> tuple[Loop, Policy, io.StringIO]:
    loop, policy, stream = build(folder, samples=rows(*bad), adapter=how.pop("adapter", None), **how)
    poisoned(policy)
    return loop, policy, stream


def steps_with(*bad: int, of: int = 9) -> list[int]:
    """From 0."""
    return [n for n in range(of) if set(step_indices(len(data()), BATCH, n, seed=5).tolist()) & set(bad)]


def warnings(stream: io.StringIO) -> list[dict[str, Any]]:
    return [event for event in map(json.loads, stream.getvalue().splitlines()) if event["kind"] == "warning"]


def logged(stream: io.StringIO) -> list[int]:
    return [event["step"] for event in map(json.loads, stream.getvalue().splitlines()) if event["kind"] == "metrics"]


def same(one: Policy, other: Policy) -> bool:
    return all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def test_the_rows_that_did_it_are_named_and_no_others(tmp_path: Path) -> None:
    loop, _, _ = made(tmp_path, 3, 11)
    with pytest.raises(DivergedError) as caught:
        loop.run()
    first = min(steps_with(3, 11))
    expected = [f"d:{n}" for n in (3, 11) if first in steps_with(n)]
    assert str(caught.value.where).removeprefix("rows ").removeprefix("row ").split(", ") == expected
    assert f"at step {first + 1};" in caught.value.message
    assert "on_divergence: skip" in str(caught.value.hint)


def test_weights_that_are_no_numbers_are_not_blamed_on_a_row(tmp_path: Path) -> None:
    loop, policy, _ = build(tmp_path)
    with torch.no_grad():
        policy.trainable[0][1].fill_(float("nan"))
    with pytest.raises(DivergedError, match="every row of step 1, so the weights themselves"):
        loop.run()


def test_a_row_whose_gradients_alone_are_no_numbers_is_named(tmp_path: Path) -> None:
    """Its loss is a number: what overflows is the backward pass below the second layer."""
    loop, policy, stream = build(tmp_path, samples=rows(3), on_divergence="skip")
    seen: list[bool] = []
    decoder = next(module for name, module in policy.model.named_modules() if name.endswith("layers"))
    embeddings = policy.model.get_input_embeddings()  # type: ignore[operator]
    embeddings.register_forward_hook(lambda module, inputs, output: seen.append(bool((inputs[0] == BAD).any())))

    def overflow(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if seen[-1] and inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: gradient * float("inf"))

    list(decoder.children())[1].register_forward_pre_hook(overflow)
    before = weights(policy)
    loop.run()
    told = warnings(stream)
    assert [event["where"] for event in told] == ["row d:3"] * len(steps_with(3))
    assert "norm of the gradients" in told[0]["message"]
    assert all(torch.isfinite(tensor).all() for tensor in weights(policy).values())
    assert any(not torch.equal(tensor, weights(policy)[name]) for name, tensor in before.items())


@pytest.mark.parametrize("objective", [Dpo(), Kto(), Simpo()], ids=lambda one: one.kind)
def test_pairs_are_named_likewise(objective: Any) -> None:
    """KTO compares a step's pairs with each other, so it cannot be asked about one: its log-probabilities are."""
    policy, reference = moved_policy.__wrapped__("padded")  # one of our own, to poison
    poisoned(policy)
    group = pairs(6, 90)
    tokens = group[4].segments[1].tokens_T
    tokens[-1] = BAD
    if objective.kind == "kto":
        group = [Sample(one.row_id, one.segments[:2], wanted=n % 2 == 0) for n, one in enumerate(group)]
    asked = reference if make(objective).needs_reference else None
    blame = Blame(policy, make(objective), asked, padded)
    assert blame.by_loss(group, 4096) == ["p:4"]
    assert blame.by_gradients(group, 4096) == ["p:4"]
    assert all(parameter.grad is None for _, parameter in policy.trainable)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_skip_leaves_the_update_out_and_goes_on(tmp_path: Path, optim: str) -> None:
    loop, policy, stream = made(tmp_path, 3, on_divergence="skip", optim=optim)
    loop.run()
    bad = steps_with(3)
    assert loop.progress.step == 9
    assert loop.progress.left_out == LeftOut(steps=len(bad))
    assert all(torch.isfinite(tensor).all() for tensor in weights(policy).values())
    assert [event["where"] for event in warnings(stream)] == ["row d:3"] * len(bad)
    assert f"at step {bad[0] + 1}; its update is left out" in warnings(stream)[0]["message"]
    assert logged(stream) == [n + 1 for n in range(9) if n not in bad]
    assert np.isfinite(losses(stream)).all()


def test_what_was_skipped_is_skipped_when_resumed(tmp_path: Path) -> None:
    straight, policy, _ = made(tmp_path / "a", 3, on_divergence="skip", steps=12)
    straight.run()
    made(tmp_path / "b", 3, on_divergence="skip", steps=12)[0].run()
    for name in ("step-00000008", "step-00000012"):
        shutil.rmtree(tmp_path / "b" / name)
    resumed, again, _ = made(tmp_path / "b", 3, on_divergence="skip", steps=12)
    resumed.state.restore(Checkpoints(tmp_path / "b", keep=None).load_last(pytest.fail))
    resumed.run()
    assert resumed.progress.left_out == straight.progress.left_out
    assert same(policy, again)


def test_too_many_in_a_row_end_training(tmp_path: Path) -> None:
    loop, _, stream = made(tmp_path, *range(22), on_divergence="skip")
    with pytest.raises(DivergedError, match=f"{IN_A_ROW} steps in a row were left out") as caught:
        loop.run()
    assert caught.value.exit_code == 9
    assert len(warnings(stream)) == IN_A_ROW


def test_roll_back_goes_past_the_step_and_arrives_where_skipping_it_does(tmp_path: Path) -> None:
    """The steps in between are done again, to the last bit; `skip` never undid them."""
    bad = next(n for n in range(22) if 4 < steps_with(n)[0] < 8 and len([one for one in steps_with(n) if one < 8]) == 1)
    loop, policy, stream = made(tmp_path / "a", bad, on_divergence="roll_back")
    loop.run()
    (at, *_) = steps_with(bad)
    told = warnings(stream)
    assert f"training goes back to step 4 and passes over step {at + 1}" in told[0]["message"]
    assert told[0]["where"] == f"row d:{bad}"
    assert loop.progress.left_out.roll_backs == len(told) == len(steps_with(bad))
    assert loop.progress.step == 9
    skipping, other, _ = made(tmp_path / "b", bad, on_divergence="skip")
    skipping.run()
    assert same(policy, other)


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    bad = next(n for n in range(22) if min(steps_with(n)) < 3)
    loop, _, stream = made(tmp_path, bad, on_divergence="roll_back", steps=4)
    loop.run()
    assert "its update is left out" in warnings(stream)[0]["message"]
    assert loop.progress.left_out.roll_backs == 0


def test_a_run_resumed_after_a_roll_back_passes_over_the_same_steps(tmp_path: Path) -> None:
    bad = next(n for n in range(22) if 4 < min(steps_with(n)) < 8)
    straight, policy, _ = made(tmp_path / "a", bad, on_divergence="roll_back", steps=16)
    straight.run()
    for keep in ("step-00000004", "step-00000008"):
        shutil.copytree(tmp_path / "a", tmp_path / keep)
        for place in (tmp_path / keep).glob("step-*"):
            if place.name > keep:
                shutil.rmtree(place)
        resumed, again, _ = made(tmp_path / keep, bad, on_divergence="roll_back", steps=16)
        resumed.state.restore(Checkpoints(tmp_path / keep, keep=None).load_last(pytest.fail))
        resumed.run()
        assert same(policy, again)
        assert resumed.progress.left_out == straight.progress.left_out


def test_diverging_again_before_the_next_checkpoint_passes_over_all_since_the_last() -> None:
    saved = LeftOut(steps=1, in_a_row=1)
    once = saved.after_roll_back(saved, to=100, step=130)
    assert (once.to_pass, once.roll_backs, once.in_a_row) == ((130,), 1, 0)
    twice = once.after_roll_back(saved, to=100, step=131)
    assert (twice.to_pass, twice.roll_backs) == (tuple(range(100, 132)), 2)
    later = twice.after_roll_back(saved, to=200, step=203)
    assert later.to_pass == (*range(100, 132), 203)
    assert LeftOut.of(json.loads(json.dumps({"to_pass": [3], "roll_backs": 1}))) == LeftOut(to_pass=(3,), roll_backs=1)


def test_weights_saved_as_no_numbers_are_no_place_to_go_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of step 4 was poisoned after its step: the run goes back to the one before and saves step 4 anew."""
    loop, policy, stream = build(tmp_path, save_steps=2, on_divergence="roll_back")
    poison = [True]
    snapshot = State.snapshot

    def poisoning(state: State, copy: bool = False) -> Snapshot:
        if loop.progress.step == 4 and poison:
            poison.clear()
            with torch.no_grad():
                policy.trainable[0][1].fill_(float("nan"))
        return snapshot(state, copy)

    monkeypatch.setattr(State, "snapshot", poisoning)
    loop.run()
    told = [event["message"] for event in warnings(stream)]
    assert "step-00000004 is damaged and passed over" in told[0] and "no numbers" in told[0]
    assert "training goes back to step 2" in told[1]
    assert all(torch.isfinite(t).all() for t in Checkpoints(tmp_path, keep=None).load("step-00000004").trained.values())


def test_roll_backs_end_some_day(tmp_path: Path) -> None:
    loop, _, _ = made(tmp_path, *range(22), on_divergence="roll_back", save_steps=1, steps=40)
    loop.progress.left_out.roll_backs = ROLL_BACKS
    loop.saver.save(beside=False)
    with pytest.raises(DivergedError, match=f"went back {ROLL_BACKS} times"):
        loop.run()
