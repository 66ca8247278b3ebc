"""Token budgets: planned, corrected, lowered, recorded, replayed, agreed on.

`FakeMemory` stands in for a machine with a given amount of memory, and `fake_cuda_oom` for a card that runs out: neither can be had
here. The models, rows and steps are real.
"""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_loop import build, losses, weights
from tunedock.data.batch import RowTensors
from tunedock.data.layout import Row, padded
from tunedock.data.sample import Sample, single
from tunedock.errors import OutOfMemoryError
from tunedock.events import Emitter
from tunedock.model.adapter import checkpoint_activations, checkpointable
from tunedock.model.out_of_memory import is_out_of_memory
from tunedock.model.policy import Policy
from tunedock.plan.memory import MemoryPlan
from tunedock.plan.rungs import LADDER
from tunedock.recipe.adapters import Lora
from tunedock.train.budget import Budget, Need, agree, least
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.loop import Loop
from tunedock.train.memory import HostMemory, Peak, memory_of

MIB = 1 << 20
PLAN = MemoryPlan({"runtime": 500 * MIB, "base weights": 100 * MIB, "gradients": 10 * MIB}, MIB, True)
"""1 MiB a token."""


class FakeMemory:
    """A machine with `size` bytes, of which the process holds `used`."""

    looks_ahead = True

    def __init__(self, size: int, used: int = 0, peaks: Sequence[int] = ()) -> None:
        self.size, self.used, self.peaks = size, used, list(peaks)
        self.released = 0

    def used_bytes(self) -> int:
        return self.used

    def free_bytes(self) -> int:
        return self.size - self.used

    @contextmanager
    def watched(self) -> Iterator[Peak]:
        peak = Peak()
        yield peak
        peak.size = self.peaks.pop(0) if self.peaks else self.used

    def release(self) -> None:
        self.released += 1


def sample(tokens: int, name: str = "s") -> Sample:
    return single(name, np.arange(tokens) % 90 + 1, np.ones(tokens, np.float32))


def rows(*lengths: int, budget: int = 1 << 17) -> list[Row]:
    return padded([sample(length, str(n)) for n, length in enumerate(lengths)], budget_tokens=budget)


def told(stream: io.StringIO, kind: str = "note") -> list[dict[str, Any]]:
    return [event for line in stream.getvalue().splitlines() if (event := json.loads(line))["kind"] == kind]


# -- planning ----------------------------------------------------------------------------------------------------------


def test_the_ladder_climbs_by_half_and_third() -> None:
    assert LADDER[:6] == (1, 64, 96, 128, 192, 256) and LADDER[-2:] == (98304, 131072)


@pytest.mark.parametrize(
    ("free_mib", "most", "longest", "expected"),
    [
        (100_000, 4096, 100, 4096),  # the cap
        (1300, 4096, 100, 1024),  # 80 % of it, less 10 MiB, at 1 MiB a token
        (100, 4096, 100, 256),  # the least there is
        (100_000, 4096, 5000, 6144),  # one row takes the longest sample
    ],
)
def test_the_first_budget_is_planned(free_mib: int, most: int, longest: int, expected: int) -> None:
    memory = FakeMemory(free_mib * MIB + 77, used=77)
    assert Budget(memory=memory, plan=PLAN, most=most, longest_path=longest).tokens == expected


def test_a_sample_longer_than_what_fits_is_said() -> None:
    stream = io.StringIO()
    budget = Budget(memory=FakeMemory(500 * MIB), plan=PLAN, most=4096, longest_path=2000, emit=Emitter(stream))
    assert budget.tokens == 2048
    (warning,) = told(stream, "warning")
    assert "2000 tokens" in warning["message"]


def test_the_recipes_own_budget_is_not_corrected() -> None:
    budget = Budget(memory=FakeMemory(1, peaks=[10**12] * 3), plan=PLAN, most=4096, pinned=3000)
    for step in range(3):
        assert budget.begin(step) == 3000
        with budget.watching(step, rows(2500)):
            pass
    assert len(budget.record) == 1


def test_without_a_plan_the_usual_size_is_taken_and_measured() -> None:
    memory = FakeMemory(1000 * MIB, peaks=[2000 * MIB])
    budget = Budget(memory=memory, plan=None, most=2048)
    assert budget.tokens == 2048
    assert budget.shortage(rows(2000)[0]) is None
    with budget.watching(0, rows(2000)):
        pass
    assert budget.begin(1) == 768  # 1 MiB a token was measured, and 800 MiB may be used


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_need_follows_what_was_measured() -> None:
    need = Need(PLAN, base_bytes=100 * MIB)
    assert need.peak(200) == 310 * MIB
    need.observe(100, 310 * MIB)  # twice what was planned
    assert need.peak(100) == 310 * MIB
    assert need.peak(200) == 510 * MIB
    need.observe(50, 999 * MIB)  # a smaller row says nothing new
    assert need.measured_slots == 100
    assert need.largest(310 * MIB) == 96


def test_a_plan_that_was_too_low_is_corrected_at_once_and_recorded() -> None:
    stream, kept = io.StringIO(), []
    memory = FakeMemory(5000 * MIB, peaks=[4 * 2048 * MIB])
    budget = Budget(memory=memory, plan=PLAN, most=2048, emit=Emitter(stream), keep=kept.append)
    with budget.watching(0, rows(2000)):
        pass
    assert budget.begin(0) == 2048  # the step that told is done
    assert budget.begin(1) == 768
    (note,) = told(stream)
    assert (note["data"]["token_budget"], note["data"]["step"]) == (768, 2)
    assert kept[-1][-1] == {"step": 1, "tokens": 768, "why": note["data"]["why"], "checkpointing": 0}


def test_a_plan_that_was_too_high_is_corrected_once_the_first_steps_are_done() -> None:
    memory = FakeMemory(1300 * MIB, peaks=[200 * MIB, 210 * MIB, 210 * MIB])
    budget = Budget(memory=memory, plan=PLAN, most=4096)
    seen = []
    for step in range(5):
        seen.append(budget.begin(step))
        with budget.watching(step, rows(900, 900, budget=1024)):
            pass
    assert seen == [1024, 1024, 1024, 2048, 2048]


def test_rows_that_do_not_fill_the_budget_tell_nothing() -> None:
    memory = FakeMemory(1300 * MIB, peaks=[1] * 3)
    budget = Budget(memory=memory, plan=PLAN, most=4096)
    for step in range(3):
        with budget.watching(step, rows(60)):
            pass
    assert budget.begin(3) == 1024


# -- running out -------------------------------------------------------------------------------------------------------


def test_a_row_is_looked_at_before_it_is_computed() -> None:
    budget = Budget(memory=FakeMemory(300 * MIB), plan=PLAN, most=4096, pinned=4096)
    assert budget.shortage(rows(200)[0]) is None
    shortage = budget.shortage(rows(400)[0])
    assert shortage is not None and shortage.needed_bytes == 410 * MIB and shortage.free_bytes == 300 * MIB


def test_smaller_rows_are_smaller() -> None:
    """Rungs that would lay the step out the same way are passed over."""
    group = [sample(100, str(n)) for n in range(3)]
    budget = Budget(memory=FakeMemory(300 * MIB), plan=PLAN, most=4096, pinned=4096)
    smaller = budget.smaller(5, group, padded(group, budget_tokens=4096), padded, None)
    assert [row.slots for row in smaller] == [200, 100]
    assert budget.begin(5) == 256 and budget.begin(4) == 4096
    smaller = budget.smaller(5, group, smaller, padded, None)
    assert [row.slots for row in smaller] == [100, 100, 100]
    assert [(change.step, change.tokens) for change in budget.record] == [(0, 4096), (5, 192)]


def test_then_checkpointing_then_an_error_that_names_the_sample() -> None:
    group = [sample(1000, "chats.jsonl:7"), sample(10, "chats.jsonl:8")]
    asked: list[int] = []
    stream = io.StringIO()
    budget = Budget(
        memory=FakeMemory(300 * MIB),
        plan=PLAN,
        most=4096,
        pinned=1024,
        layers=12,
        checkpoint=asked.append,
        emit=Emitter(stream),
    )
    laid = padded(group, budget_tokens=1024)
    shortage = budget.shortage(laid[0])
    assert budget.smaller(2, group, laid, padded, shortage) == laid
    assert asked == [12] and budget.record[-1].checkpointing == 12  # without a plan, in all layers at once
    with pytest.raises(OutOfMemoryError) as caught:
        budget.smaller(2, group, laid, padded, shortage)
    assert caught.value.where == "chats.jsonl:7"
    for word in ("1000 tokens", "1010 MiB more are needed", "300 MiB are free"):
        assert word in caught.value.message
    assert asked == [12]


def test_as_few_layers_as_the_plan_says_then_more() -> None:
    """Activations take 500 KiB a token, 100 less for each layer: 1,000 tokens fit into four fifths of 300 MiB from the third on."""
    asked: list[int] = []
    kept: list[list[dict[str, Any]]] = []

    def plan(layers: int) -> MemoryPlan:
        return MemoryPlan({"gradients": 10 * MIB}, (500 - 100 * layers) * 1024, True)

    def made() -> Budget:
        return Budget(
            memory=FakeMemory(300 * MIB),
            plan=plan(0),
            plan_again=plan,
            most=4096,
            pinned=1024,
            layers=5,
            checkpoint=asked.append,
            keep=kept.append,
        )

    budget = made()
    group = [sample(1000, "a:1"), sample(10, "a:2")]
    laid = padded(group, budget_tokens=1024)
    assert budget.smaller(3, group, laid, padded, budget.shortage(laid[0])) == laid
    assert asked == [3] and budget.record[-1].checkpointing == 3
    assert "3 of 5 layers" in budget.record[-1].why
    assert budget.shortage(laid[0]) is None
    assert budget.smaller(3, group, laid, padded, None) == laid  # it failed all the same: twice as many, five at most
    assert asked == [3, 5]
    assert kept[-1] == json.loads(json.dumps(kept[-1]))
    after = made()
    after.restore(kept[-1])
    for step in (2, 3, 4):
        after.begin(step)
    assert asked == [3, 5, 5]


def test_with_checkpointing_other_figures_hold() -> None:
    """What was measured without it must not condemn the row."""
    lean = MemoryPlan({"gradients": 10 * MIB}, MIB // 10, True)
    budget = Budget(
        memory=FakeMemory(300 * MIB),
        plan=PLAN,
        plan_again=lambda layers: lean,
        most=4096,
        pinned=1024,
        layers=4,
    )
    budget.need.observe(1000, 1000 * MIB)
    group = [sample(1000)]
    laid = padded(group, budget_tokens=1024)
    assert budget.smaller(0, group, laid, padded, budget.shortage(laid[0])) == laid
    assert budget.shortage(laid[0]) is None


def test_a_plan_that_may_be_wrong_does_not_end_a_run() -> None:
    stream = io.StringIO()
    budget = Budget(memory=FakeMemory(900 * MIB), plan=PLAN, most=4096, pinned=4096, emit=Emitter(stream))
    group = [sample(1000, "a:1")]
    laid = padded(group, budget_tokens=4096)
    assert budget.smaller(0, group, laid, padded, budget.shortage(laid[0])) == laid
    assert budget.shortage(laid[0]) is None
    (warning,) = told(stream, "warning")
    assert warning["where"] == "a:1" and "tried all the same" in warning["message"]


# -- the record --------------------------------------------------------------------------------------------------------


def test_a_record_is_replayed() -> None:
    before = Budget(memory=FakeMemory(300 * MIB), plan=PLAN, most=4096, pinned=4096)
    group = [sample(100, str(n)) for n in range(3)]
    before.smaller(5, group, padded(group, budget_tokens=4096), padded, None)
    after = Budget(memory=FakeMemory(10**15), plan=PLAN, most=4096, pinned=4096)
    after.restore(json.loads(json.dumps(before.state())))
    assert [after.begin(step) for step in (4, 5, 6)] == [4096, 256, 256]
    after.restore(before.state()[:1])  # a checkpoint from before the change knows less
    assert after.begin(5) == 256


def test_after_a_kill_it_stays_low() -> None:
    budget = Budget(memory=FakeMemory(10**15), plan=PLAN, most=4096)
    budget.restore([{"step": 0, "tokens": 4096, "why": "", "checkpointing": 0}])
    budget.lower_to(3, 2048, "killed")
    assert [budget.begin(step) for step in (2, 3, 9)] == [4096, 2048, 2048]
    budget.lower_to(0, 1500, "killed again, before any checkpoint")
    assert [budget.begin(step) for step in (0, 3, 9)] == [1024, 1024, 1024]


# -- with the loop -----------------------------------------------------------------------------------------------------


def fake_cuda_oom(policy: Policy, slots: int, *, calls: list[int]) -> None:
    """From now on rows of more than `slots` raise what a CUDA device raises, after some of the work is done."""
    real = policy.logprobs

    def logprobs(row: Row) -> tuple[torch.Tensor, RowTensors]:
        calls.append(row.slots)
        torch.rand(7)  # something is drawn before it fails
        if row.slots > slots:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(row)

    policy.logprobs = logprobs  # type: ignore[method-assign]


def pinned(loop: Loop) -> Budget:
    return loop._budget


def test_a_step_that_ran_out_is_done_again_in_smaller_rows_and_the_run_is_the_same(tmp_path: Path) -> None:
    """Bit by bit: random states, gradients, metrics and the data are as if the smaller budget had been known."""
    loop, policy, stream = build(tmp_path / "a", budget=4096)
    calls: list[int] = []
    fake_cuda_oom(policy, 50, calls=calls)
    loop.run()
    assert max(calls) > 50
    record = pinned(loop).record
    assert [(change.step, change.tokens) for change in record] == [(0, 1)]
    assert [note["data"]["token_budget"] for note in told(stream) if "token_budget" in note["data"]]

    known, again, stream_again = build(tmp_path / "b", budget=4096)
    calls.clear()
    fake_cuda_oom(again, 10**9, calls=calls)
    pinned(known).restore(pinned(loop).state())
    known.run()
    assert max(calls) <= 50
    assert losses(stream) == losses(stream_again)
    for name, tensor in weights(policy).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_resuming_replays_the_record_bit_by_bit(tmp_path: Path) -> None:
    """The card runs out at step 7; resumed at step 4, the run has small rows from step 7 on, not before."""

    samples = [single(f"d:{n}", np.arange(20) + n, np.ones(20, np.float32)) for n in range(22)]
    failed: list[int] = []

    def made(folder: Path) -> tuple[Loop, Policy, io.StringIO]:
        loop, policy, stream = build(folder, budget=200, steps=9, samples=samples)
        real = policy.logprobs

        def logprobs(row: Row) -> tuple[torch.Tensor, RowTensors]:
            if loop.progress.step >= 6 and row.slots > 64:
                failed.append(loop.progress.step)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(row)

        policy.logprobs = logprobs  # type: ignore[method-assign]
        return loop, policy, stream

    loop, policy, stream = made(tmp_path)
    loop.run()
    assert failed == [6]
    record = pinned(loop).state()
    assert [change["step"] for change in record] == [0, 6]
    resumed, again, stream_again = made(tmp_path)
    pinned(resumed).restore(record)  # as the run directory has it
    resumed.state.restore(Checkpoints(tmp_path, keep=None).load("step-00000004"))
    resumed.run()
    assert failed == [6]
    assert losses(stream)[4:] == losses(stream_again)
    for name, tensor in weights(policy).items():
        assert torch.equal(tensor, weights(again)[name]), name


def test_a_checkpoint_keeps_the_record(tmp_path: Path) -> None:
    loop, _, _ = build(tmp_path, steps=2)
    loop.run()
    snapshot = Checkpoints(tmp_path, keep=None).load_last(pytest.fail)
    assert snapshot.state["budget"] == pinned(loop).state()


def test_checkpointing_turned_on_in_the_middle_changes_no_loss(tmp_path: Path) -> None:
    plain, _, stream = build(tmp_path / "a", adapter=Lora(r=4, alpha=8), steps=4, save_strategy="no")
    plain.run()
    loop, policy, other = build(tmp_path / "b", adapter=Lora(r=4, alpha=8), steps=4, save_strategy="no")
    turned_on: list[int] = []

    def checkpoint(layers: int) -> None:
        turned_on.append(loop.progress.step)
        checkpoint_activations(policy.model, layers)

    pinned(loop)._checkpoint = checkpoint
    pinned(loop)._layers = len(checkpointable(policy.model))
    real = policy.logprobs

    def logprobs(row: Row) -> tuple[torch.Tensor, RowTensors]:
        if loop.progress.step == 2 and not turned_on:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(row)

    policy.logprobs = logprobs  # type: ignore[method-assign]
    loop.run()
    assert turned_on == [2]
    assert policy.model.is_gradient_checkpointing
    assert losses(other) == pytest.approx(losses(stream), rel=1e-5)


def test_a_host_without_room_ends_with_the_samples_name(tmp_path: Path) -> None:
    loop, _, _ = build(tmp_path, save_strategy="no")
    memory = FakeMemory(100 * MIB, used=0)
    loop._budget.memory = memory
    loop._budget.need = Need(PLAN, 0)
    loop._budget.need.observe(8, 90 * MIB)
    memory.used = 99 * MIB
    loop._budget.need.observe(9, 300 * MIB)
    with pytest.raises(OutOfMemoryError, match="alone in its row") as caught:
        loop.run()
    assert str(caught.value.where).startswith("d:")
    assert memory.released


# -- what is there -----------------------------------------------------------------------------------------------------


def test_a_hosts_memory_is_really_looked_at() -> None:
    memory = memory_of(torch.device("cpu"))
    assert isinstance(memory, HostMemory) and memory.looks_ahead
    assert memory.free_bytes() > 0
    before = memory.used_bytes()
    with memory.watched() as peak:
        held = torch.ones(64 * MIB // 4)
        for _ in range(10):
            held.add_(1)
        del held
    assert peak.size - before > 60 * MIB
    assert memory.used_bytes() - before < 32 * MIB


def test_what_running_out_looks_like() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_ranks_agree() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("agree_rank.py")
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(port)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    assert found == [[True, False, True, 10]] * 2
    assert agree(True) and not agree(False) and least(3) == 3  # without ranks
