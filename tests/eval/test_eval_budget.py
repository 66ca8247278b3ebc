"""An evaluation whose rows do not fit goes on in smaller ones, with the same figures; a single path that does not is named.

`small_card` stands in for a card that runs out of memory, which cannot be had here. Model, rows and figures are real.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch

from families import tiny_model
from tunedock.data.layout import Row
from tunedock.data.sample import Sample, single
from tunedock.errors import OutOfMemoryError
from tunedock.eval.budget import EvalBudget
from tunedock.events import Emitter
from tunedock.model.policy import Policy, Precision
from tunedock.objective.evaluate import measure
from tunedock.objective.registry import make
from tunedock.recipe.objectives.likelihood import Sft


def policy() -> Policy:
    made = Policy(tiny_model("qwen3"), torch.device("cpu"), Precision(torch.float32, torch.float32))
    made.probe()
    return made


def samples() -> list[Sample]:
    draw = np.random.default_rng(0)
    lengths = (70, 20, 33, 12, 64, 41, 18, 9)
    return [single(f"rows:{n}", draw.integers(5, 90, n), np.ones(n)) for n in lengths]


def small_card(monkeypatch: pytest.MonkeyPatch, made: Policy, slots: int) -> list[int]:
    real, asked = made.logprobs, []

    def logprobs(row: Row) -> Any:
        asked.append(row.slots)
        if row.slots > slots:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(row)

    monkeypatch.setattr(made, "logprobs", logprobs)
    return asked


def test_smaller_rows_and_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = policy(), io.StringIO()
    wanted = measure(made, make(Sft()), samples(), EvalBudget(made, Emitter(None)).rows)
    asked = small_card(monkeypatch, made, 100)
    budget = EvalBudget(made, Emitter(told))
    found = measure(made, make(Sft()), samples(), budget.rows, batch=4, smaller=budget.smaller)
    assert (found.count, found.loss) == (wanted.count, pytest.approx(wanted.loss, rel=1e-5))
    assert budget.tokens == 128 and sum(size > 100 for size in asked) == 1  # what was learnt holds for the next batch
    notes = [json.loads(line) for line in told.getvalue().splitlines()]
    assert [note["data"] for note in notes] == [{"token_budget": 128}]


def test_a_path_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy()
    small_card(monkeypatch, made, 65)
    budget = EvalBudget(made, Emitter(None))
    with pytest.raises(OutOfMemoryError, match="70 tokens do not fit") as caught:
        measure(made, make(Sft()), samples(), budget.rows, smaller=budget.smaller)
    assert caught.value.where == "rows:70"


def test_other_faults_are_no_shortage(monkeypatch: pytest.MonkeyPatch) -> None:
    made = policy()
    monkeypatch.setattr(made, "logprobs", lambda row: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    budget = EvalBudget(made, Emitter(None))
    with pytest.raises(RuntimeError, match="shapes differ"):
        measure(made, make(Sft()), samples(), budget.rows, smaller=budget.smaller)
