"""KTO's loss and gradients are TRL's and the paper's, in every layout and split; what it takes for mismatched completions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from families import tiny_model, tokenizer
from pair_steps import LENGTHS, PREFERENCES, backward, moved, moved_policy
from steps import Bigrams, assert_same_gradients, gradients, step_sums
from tunedock.data.layout import Kind, Row, lay_out
from tunedock.data.sample import Sample, Segment
from tunedock.objective.base import StepLogprobs
from tunedock.objective.evaluate import batches, measure
from tunedock.objective.kto import Kto, mismatched
from tunedock.objective.registry import make
from tunedock.recipe.objectives import preference

ROWS = [
    {"prompt": row["prompt"], "completion": row["chosen"] if n % 3 else row["rejected"], "label": n % 3 > 0}
    for n, row in enumerate([*PREFERENCES, *PREFERENCES[:1]])
]
ROWS[4]["prompt"] = [{"role": "user", "content": "And in a week, which has seven days, how many hours are there?"}]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer in float64, its mismatched paths cut where ours are: at the longest path. This way round the KL is above 0."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    made = KTOTrainer(
        model=tiny_model("qwen3").double(),
        ref_model=moved(tiny_model("qwen3")).double(),
        args=KTOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=5, use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", max_length=256, train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer("qwen3"),
    )  # fmt: skip
    made.batch = next(iter(made.get_train_dataloader()))
    width = made.batch["input_ids"].shape[1]
    for name in ("KL_input_ids", "KL_attention_mask", "KL_completion_mask"):
        made.batch[name] = made.batch[name][:, :width]
    made.model.train()
    return made


def group_of(trainer: Any) -> list[Sample]:
    """In the other order: TRL gives a prompt the completion before it, ours the one behind."""
    batch = trainer.batch
    made = []
    for n in range(len(batch["label"])):
        here = batch["attention_mask"][n].bool()
        ids = batch["input_ids"][n][here].numpy().astype(np.int32)
        mask = batch["completion_mask"][n][here].numpy().astype(np.float32)
        first = int(mask.argmax())
        segments = (Segment(ids[:first], mask[:first]), Segment(ids[first:], mask[first:], 0))
        made.append(Sample(f"row {n}", segments, wanted=bool(batch["label"][n])))
    return made[::-1]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize(("kind", "budget"), [("tree", 4096), ("tree", 8), ("packed", 70), ("padded", 8)])
def test_value_and_gradients_are_trls(trainer: Any, kind: Kind, budget: int, loss_type: str) -> None:
    trainer.beta, trainer.desirable_weight, trainer.undesirable_weight = 0.3, 1.0, 1.4
    trainer.loss_type, trainer.calculate_KL = loss_type, loss_type == "kto"
    wanted = backward(trainer.model, lambda: trainer.compute_loss(trainer.model, trainer.batch))
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    policy, reference = moved_policy(kind, back=True)
    policy.model.zero_grad()
    group = group_of(trainer)
    beside = partial(policy.rows, budget_tokens=budget)
    loss, sums = step_sums(policy, Kto(0.3, 1.0, 1.4, loss_type), group, policy.rows(group, budget), reference, beside)
    assert loss == pytest.approx(wanted[0], rel=1e-5)
    assert_same_gradients(gradients(policy.model), wanted[1])
    assert len(sums) == 6
    for name, (total, of) in sums.items():
        assert total / of == pytest.approx(logged[name], rel=1e-4, abs=1e-5), name
    assert loss_type != "kto" or logged["kl"] > 0, "the estimate is at work"


def labelled(row_id: str, prompt: int, completion: int, wanted: bool, draw: np.random.Generator) -> Sample:
    weights = draw.choice([1.0, 1.0, 0.5], completion).astype(np.float32)
    segments = (
        Segment(draw.integers(1, 20, prompt).astype(np.int32), np.zeros(prompt, np.float32)),
        Segment(draw.integers(1, 20, completion).astype(np.int32), weights, 0),
    )
    return Sample(row_id, segments, wanted=wanted)


class Before:
    """A reference that is another language model."""

    def __init__(self, model: Bigrams) -> None:
        self.model = model
        self.asked = 0

    def leaf_logprobs(self, samples: Sequence[Sample], rows: Sequence[Row], *, remember: bool = True) -> Tensor:
        self.asked += 1
        with torch.no_grad():
            return torch.stack([self.model.of(sample, 0)[None] for sample in samples])


def of_the_paper(model: Bigrams, before: Bigrams, group: Sequence[Sample], objective: Kto) -> Tensor:
    def ratio(sample: Sample) -> Tensor:
        return model.of(sample, 0) - before.of(sample, 0).detach()

    others = mismatched(group)
    kl = torch.stack([ratio(other).detach() for other in others]).mean().clamp(min=0) if others else 0.0
    losses = [
        objective.desirable_weight * (1 - torch.sigmoid(objective.beta * (ratio(sample) - kl)))
        if sample.wanted
        else objective.undesirable_weight * (1 - torch.sigmoid(objective.beta * (kl - ratio(sample))))
        for sample in group
    ]
    return torch.stack(losses).mean()


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(LENGTHS, st.booleans()), min_size=1, max_size=7),
    budget=st.integers(1, 80),
    kind=st.sampled_from(["tree", "packed", "padded"]),
    seed=st.integers(0, 99),
    weights=st.tuples(st.floats(0.1, 4.0), st.floats(0.1, 4.0)),
)
def test_however_rows_are_split(
    sizes: list[tuple[tuple[int, int, int], bool]], budget: int, kind: Kind, seed: int, weights: tuple[float, float]
) -> None:
    """Completions of any shape over any budget: the paper's loss and gradient, one KL for the step, each counted once."""
    draw = np.random.default_rng(seed)
    group = [labelled(f"r:{n}", size[0] + 1, size[1], wanted, draw) for n, (size, wanted) in enumerate(sizes)]
    model, before = Bigrams(20, seed), Bigrams(20, seed + 1)
    objective = Kto(0.2, *weights)
    expected = of_the_paper(model, before, group, objective)
    (wanted,) = torch.autograd.grad(expected, [model.table_VV])
    beside = partial(lay_out, kind=kind, budget_tokens=budget)
    loss, sums = step_sums(model, objective, group, beside(group), Before(before), beside)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5, abs=1e-9)
    torch.testing.assert_close(model.table_VV.grad, wanted, rtol=1e-4, atol=1e-6)
    assert sums["kl"][1] == len(group)
    assert sums["rewards/chosen"][1] == sum(bool(sample.wanted) for sample in group)
    if all(sums[f"rewards/{side}"][1] for side in ("chosen", "rejected")):
        chosen, rejected = (sums[f"rewards/{side}"][0] / sums[f"rewards/{side}"][1] for side in ("chosen", "rejected"))
        assert sums["rewards/margins"][0] / len(group) == pytest.approx(chosen - rejected, abs=1e-6)
    else:
        assert sums["rewards/margins"] == [0.0, 0.0], "nothing to compare"


def test_measured_in_parts() -> None:
    """Each part has its own estimate, as a step has."""
    draw = np.random.default_rng(3)
    group = [labelled(f"r:{n}", 4 + n, 3 + n % 5, n % 2 == 0, draw) for n in range(9)]
    model, before = Bigrams(20, 3), Bigrams(20, 4)
    objective = Kto(0.4)
    parts = list(batches(group, 4))
    assert [len(part) for part in parts] == [4, 4, 1]
    losses = [float(of_the_paper(model, before, part, objective).detach()) * len(part) for part in parts]
    beside = partial(lay_out, kind="tree", budget_tokens=20)
    got = measure(model, objective, group, beside, reference=Before(before), batch=4)
    assert (got.loss, got.count) == (pytest.approx(sum(losses) / 9), 9)
    assert {"kl", "rewards/margins", "logps/rejected"} <= got.metrics.keys()


def test_a_kind_that_is_not_there_has_no_figure() -> None:
    draw = np.random.default_rng(0)
    group = [labelled(f"r:{n}", 4, 3, True, draw) for n in range(3)]
    got = measure(
        Bigrams(20, 0), Kto(), group, partial(lay_out, kind="tree", budget_tokens=20), reference=Before(Bigrams(20, 1))
    )
    assert got.metrics.keys() == {"kl", "rewards/chosen", "logps/chosen"}


LONGEST = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=9)


@settings(max_examples=60, deadline=None)
@given(sizes=LONGEST, seed=st.integers(0, 99))
def test_each_completion_meets_another_prompt_and_none_is_longer_than_training(
    sizes: list[tuple[int, int]], seed: int
) -> None:
    draw = np.random.default_rng(seed)
    group = [labelled(f"r:{n}", *size, True, draw) for n, size in enumerate(sizes)]
    made = mismatched(group)
    longest = max(sample.longest_path for sample in group)
    taken = {other.row_id.split(" with ")[1] for other in made}
    assert len(taken) == len(group), "each completion once"
    for sample, other in zip(group, made, strict=True):
        assert other.longest_path <= longest and other.weight > 0
        assert other.row_id.split(" with ")[0] == sample.row_id != other.row_id.split(" with ")[1]
        assert np.array_equal(other.segments[0].tokens_T, sample.segments[0].tokens_T)


def test_the_two_sides_of_a_pair_do_not_meet() -> None:
    """Pairs read in their order stand side by side: the second neighbour is of another prompt."""
    draw = np.random.default_rng(0)
    group = []
    for n in range(3):
        chosen, other = labelled(f"p:{n}", 6, 4, True, draw), labelled(f"p:{n}~2", 6, 5, False, draw)
        group += [chosen, Sample(other.row_id, (chosen.segments[0], other.segments[1]), wanted=False)]
    assert [other.row_id for other in mismatched(group)][:2] == ["p:0 with p:1", "p:0~2 with p:1~2"]
    assert mismatched(group[:1]) == []
    same = mismatched(group[:2])
    assert same[0].row_id == "p:0 with p:0~2", "there is no other"


def test_what_it_cannot_do_without() -> None:
    draw = np.random.default_rng(0)
    group = [labelled("a", 4, 3, True, draw), labelled("b", 4, 3, False, draw)]
    rows = lay_out(group, "tree", budget_tokens=100)
    with pytest.raises(ValueError, match="lays them out"):
        step_sums(Bigrams(20, 0), Kto(), group, rows, Before(Bigrams(20, 1)))
    with pytest.raises(ValueError, match="needs a reference"):
        step_sums(Bigrams(20, 0), Kto(), group, rows)
    with pytest.raises(ValueError, match="one completion"):
        Kto().prepare(StepLogprobs(group, reference_SL=torch.zeros(2, 2)))
    plain = [Sample(sample.row_id, sample.segments) for sample in group]
    with pytest.raises(ValueError, match="verdict"):
        Kto().prepare(StepLogprobs(plain, reference_SL=torch.zeros(2, 1)))


def test_nobody_is_asked_about_others_where_none_count() -> None:
    draw = np.random.default_rng(0)
    group = [labelled("a", 4, 3, True, draw), labelled("b", 4, 3, False, draw)]
    before = Before(Bigrams(20, 1))
    step_sums(
        Bigrams(20, 0), Kto(loss_type="apo_zero_unpaired"), group, lay_out(group, "tree", budget_tokens=9), before
    )
    assert before.asked == 1


def test_the_recipe_makes_it() -> None:
    section = preference.Kto(beta=0.2, desirable_weight=1.5, undesirable_weight=0.5, loss_type="apo_zero_unpaired")
    assert make(section) == Kto(0.2, 1.5, 0.5, "apo_zero_unpaired")
