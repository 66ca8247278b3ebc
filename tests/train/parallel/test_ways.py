"""Processes that train together give the losses, metrics and weights that one gives alone, however they spread the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import alone, assert_same_weights, begin, events, metrics, resumable_at, together, weights, workplace

LONG = pytest.mark.long
EVERY_WAY = ("ddp", "fsdp", "zero1", "zero2", "zero3")

CASES = [
    ("sft", "lora", "ddp", 2),
    ("ppo", "full", "fsdp", 2),  # a value head, a reference of its own, answers made by sharded weights
    *(
        pytest.param(objective, adapter, way, 2, marks=LONG)
        for objective, adapter in (("sft", "full"), ("dpo", "lora"), ("dpo", "full"), ("ppo", "lora"))
        for way in EVERY_WAY
    ),
    *(pytest.param("ppo", "full", way, 2, marks=LONG) for way in ("ddp", "zero2", "zero3")),
    *(
        pytest.param(objective, "lora", way, 4, marks=LONG)
        for objective in ("sft", "dpo", "ppo")
        for way in ("ddp", "fsdp", "zero2", "zero3")
    ),
    *(pytest.param(objective, "lora", "fsdp", 2, marks=LONG) for objective in ("kto", "reward", "grpo")),
    *(pytest.param("sft", "freeze", way, 2, marks=LONG) for way in ("fsdp", "zero3")),
    pytest.param("sft", "lora", "ddp", 3, marks=LONG),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Objective and adapter -> the folder, and the run of one process in it; each is made once."""
    made: dict[tuple[str, str], object] = {}

    def of(objective: str, adapter: str) -> object:
        if (objective, adapter) not in made:
            folder = workplace(tmp_path_factory.mktemp(f"{objective}-{adapter}"), objective, adapter)
            made[objective, adapter] = (folder, alone(begin(folder, "alone")))
        return made[objective, adapter]

    return of


@pytest.mark.parametrize(("objective", "adapter", "way", "ranks"), CASES)
def test_together_as_alone(one_process, objective: str, adapter: str, way: str, ranks: int) -> None:
    folder, single = one_process(objective, adapter)
    run = together(begin(folder, f"{way}-{ranks}", f"parallel={way}"), ranks)
    wanted, got = metrics(single), metrics(run)
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    assert_same_weights(weights(run), weights(single), within=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("way", ["ddp", "fsdp", "zero3"])
def test_answers_at_evaluations_are_those_of_one_process(tmp_path: Path, way: str) -> None:
    """Drawn ones, of five questions in batches of two: one process has a batch more than the other, which waits with it."""
    folder = workplace(tmp_path, "sft", "full", predict_with_generate=True, max_steps=8, eval_steps=4)
    shape = [f"eval.{key}" for key in ("max_samples=5", "batch_size=2", "max_new_tokens=10", "temperature=0.3")]
    wanted = metrics(alone(begin(folder, "alone", *shape)))
    got = metrics(together(begin(folder, way, f"parallel={way}", *shape), 2))
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    told = [one["eval_rouge1"] for one in wanted if "eval_loss" in one]
    assert len(told) == 2 and max(told) > 0


RESUMED = [
    ("sft", "dropout", "ddp", 2),
    pytest.param("ppo", "full", "zero3", 2, marks=LONG),
    *(
        pytest.param(objective, "full", way, 2, marks=LONG)
        for objective in ("sft", "dpo")
        for way in ("fsdp", "zero2", "zero3")
    ),
]


@pytest.mark.parametrize(("objective", "adapter", "way", "ranks"), RESUMED)
def test_resumed_with_as_many_it_is_the_run_that_never_stopped(
    tmp_path: Path, objective: str, adapter: str, way: str, ranks: int
) -> None:
    """Dropout too: each process goes on with its own generators."""
    folder = workplace(tmp_path, objective, adapter)
    whole = together(begin(folder, "whole", f"parallel={way}"), ranks)
    again = together(resumable_at(whole, 2, tmp_path / "again"), ranks, resume=True)
    after = [one for one in metrics(whole) if one["step"] > 2]
    for ours, theirs in zip(metrics(again), after, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert_same_weights(weights(again), weights(whole), within=0.0 if way == "ddp" else 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_stopped_in_the_middle_of_answers_all_leave_together(tmp_path: Path, way: str) -> None:
    """Each rank has four batches of a rollout to make."""
    folder = workplace(tmp_path, "grpo", save_steps=1, max_steps=16)
    small = ["objective.engine.max_num_seqs=4", "objective.steps_per_generation=4", f"parallel={way}"]
    whole = together(begin(folder, "whole", *small), 2)
    run = begin(folder, "stopped", *small)

    def in_the_second_rollout() -> bool:
        told = [event for event in events(run) if event["kind"] == "progress" and event["task"] == "answers"]
        return sum(event["done"] == 0 for event in told) == 2 and told[-1]["done"] > 0

    together(run, 2, stop_when=in_the_second_rollout, code=1)  # torchrun's own for workers that a signal stopped
    last = [event for event in events(run) if event["kind"] == "progress"][-1]
    assert last["task"] == "answers" and 0 < last["done"] < 16
    together(run, 2, resume=True)
    assert_same_weights(weights(run), weights(whole), within=0.0 if way == "ddp" else 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_one_goes_on_with_what_many_began_and_many_with_what_one_did(tmp_path: Path, way: str, adapter: str) -> None:
    folder = workplace(tmp_path, "sft", adapter)
    single = alone(begin(folder, "alone"))
    many = together(begin(folder, "many", f"parallel={way}"), 2)
    by_one = alone(resumable_at(many, 2, tmp_path / "by-one"), resume=True)
    assert_same_weights(weights(by_one), weights(single), within=2e-4)
    began = begin(folder, "empty", f"parallel={way}")
    for file in (single.path / "checkpoints").glob("step-00000002"):
        file.rename(began.checkpoints / file.name)
    for name in ("budget.json", "data.json"):
        (began.path / name).write_text((single.path / name).read_text())
    by_many = together(began, 2, resume=True)
    assert_same_weights(weights(by_many), weights(single), within=2e-4)
