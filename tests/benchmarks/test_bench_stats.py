"""Steady states, medians, and what shows that two sides did not train on the same thing."""

from dataclasses import replace

import pytest

from benchmarks.protocol import Measured, Step
from benchmarks.stats import disagreements, mean_loss, steady, summaries, tokens_per_second


def measured(side="trl", variant="default", *, seconds=1.0, steps=4, **changes) -> Measured:
    given = Measured(
        side=side,
        variant=variant,
        objective="sft",
        model_name="tiny",
        steps=tuple(Step(9.0 if n == 0 else seconds, 100, 30, 9.0 - 0.1 * n) for n in range(steps)),
        first_step_s=5.0,
        preprocessing_s=1.0,
        rows=4 * steps,
        reference_s=0.0,
        peak_bytes=900,
        imports_bytes=400,
        same_order=True,
    )
    return replace(given, **changes)


def test_steady_state_leaves_out_the_first_tenth_and_at_least_one_step():
    assert len(steady(measured(steps=4).steps)) == 3
    assert len(steady(measured(steps=32).steps)) == 29
    with pytest.raises(ValueError, match="two steps"):
        steady(measured(steps=1).steps)


def test_the_first_step_does_not_slow_the_rate():
    assert tokens_per_second(measured(seconds=0.5)) == pytest.approx(200.0)


def test_a_reference_pass_counts_with_its_share_of_the_tokens():
    # 300 of 400 tokens are in the steady state, so 3 of the pass's 4 seconds count beside its 3 seconds of steps.
    assert tokens_per_second(measured(seconds=1.0, reference_s=4.0)) == pytest.approx(300 / 6)


def test_mean_loss_weighs_steps_by_their_trained_tokens():
    steps = (Step(1.0, 10, 1, 1.0), Step(1.0, 10, 3, 2.0))
    assert mean_loss(measured(steps=2)) == pytest.approx(8.95)
    assert mean_loss(replace(measured(), steps=steps)) == pytest.approx(7 / 4)


def test_summaries_are_medians_with_their_range_and_memory_is_above_the_imports():
    (summary,) = summaries([measured(seconds=s) for s in (1.0, 2.0, 0.5)])
    assert summary.tokens_per_second == pytest.approx(100.0)
    assert (summary.low, summary.high) == (pytest.approx(50.0), pytest.approx(200.0))
    assert summary.above_imports_bytes == 500
    assert summary.runs == 3


def test_equal_runs_agree_whatever_their_speed():
    assert disagreements([measured(), measured("tunedock", seconds=0.1), measured("trainer", seconds=3.0)]) == []


def test_packed_rows_need_the_same_tokens_in_all_but_not_the_same_steps():
    packed = (Step(1.0, 250, 80, 9.0), Step(1.0, 150, 40, 8.8))
    assert disagreements([measured(), measured("llamafactory", "best", same_order=False)]) == []
    run = replace(measured("llamafactory", "best"), steps=packed, same_order=False)
    assert disagreements([measured(), run]) == []
    (said,) = disagreements([measured(), replace(run, steps=(packed[0], Step(1.0, 149, 40, 8.8)))])
    assert "399 tokens in the epoch, not 400" in said


@pytest.mark.parametrize(
    ("step", "change", "said"),
    [
        (0, {"loss": 9.01}, "first loss 9.01000, not 9.00000"),
        (1, {"trained": 29}, "119 trained tokens in the epoch, not 120"),
        (3, {"loss": 12.0}, "mean loss"),
    ],
)
def test_what_differs_is_told(step, change, said):
    run = measured("tunedock")
    steps = tuple(replace(s, **change) if n == step else s for n, s in enumerate(run.steps))
    assert said in " ".join(disagreements([measured(), replace(run, steps=steps)]))


def test_another_order_of_rows_is_told_even_when_the_sums_agree():
    run = measured("tunedock")
    first, second, *rest = run.steps
    moved = (replace(first, tokens=110), replace(second, tokens=90), *rest)
    (said,) = disagreements([measured(), replace(run, steps=moved)])
    assert said == "tiny sft tunedock default: other tokens in a step (tiny sft trl default)"


def test_figures_that_sides_log_by_the_same_name_must_agree():
    runs = [
        measured(first_figures={"logps/chosen": -500.0}),
        measured("tunedock", first_figures={"logps/chosen": -510.0}),
    ]
    (said,) = disagreements(runs)
    assert "first logps/chosen -510.000, not -500.000" in said


def test_without_a_run_in_order_nothing_is_called_equal():
    (said,) = disagreements([measured(same_order=False)])
    assert "nothing to compare with" in said
