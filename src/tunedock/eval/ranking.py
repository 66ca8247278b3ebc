"""A reward model's held-out pairs: how often, and by how much, the chosen answer has the higher score; `eval/metrics.json`.

There is no base beside it: before training its score layer was drawn at random. Each pair is listed with its two scores, those that
are ranked the wrong way round first, for they are what one wants to read.
"""

from __future__ import annotations

from typing import Any

import torch

from tunedock.errors import RunError
from tunedock.eval.held_out import held_out_rows
from tunedock.events import Emitter
from tunedock.model.policy import Policy
from tunedock.model.scorer import RowScorer
from tunedock.model.session import Base
from tunedock.objective.base import Objective, RowScores, StepLogprobs
from tunedock.objective.registry import make as make_objective
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, write_json


class Ranking:
    """The pairs of one side, scored once."""

    def __init__(self, base: Base, recipe: Recipe, emit: Emitter, *, side: str) -> None:
        """Raises DataError when the side is empty."""
        self._base = base
        self._side = side
        self._store = held_out_rows(base, recipe, side, emit)
        self._objective: Objective = make_objective(recipe.objective)
        self._result: dict[str, Any] | None = None

    def measure(self, policy: Policy, who: str, emit: Emitter) -> None:
        samples = [self._store[i] for i in range(len(self._store))]
        scorer = RowScorer(policy, self._base.tokenizer, chat=self._base.chat)
        scores = scorer.sample_scores(
            samples, on_progress=lambda done: emit.progress(f"scores, {who}", done, len(samples), "pairs")
        )
        every = torch.arange(len(scores))
        row = RowScores(torch.tensor(scores), every // 2, every % 2)
        terms = self._objective.terms(row, self._objective.prepare(StepLogprobs(samples)))
        figures = {"loss": float(terms.loss) / len(samples)}
        figures |= {name: float(value) / float(of) for name, (value, of) in terms.metrics.items()}
        figures |= {name: float(value) for name, value in {**terms.least, **terms.most}.items()}
        pairs = [
            {"row_id": sample.row_id, "chosen": scores[2 * i], "rejected": scores[2 * i + 1]}
            for i, sample in enumerate(samples)
        ]
        pairs.sort(key=lambda pair: pair["chosen"] - pair["rejected"])  # type: ignore[operator]
        self._result = {
            "split": self._side,
            "samples": len(samples),
            who: {**figures, "pairs": float(len(samples))},
            "scores": pairs,
        }

    def write(self, run: Run) -> dict[str, Any]:
        """Writes the file, and returns what it holds with its path."""
        if self._result is None:
            raise RunError("nothing was measured", where=str(run.path))
        folder = run.path / "eval"
        folder.mkdir(exist_ok=True)
        write_json(folder / "metrics.json", {"run": run.name, **self._result})
        return {"run": run.name, **self._result, "metrics": str(folder / "metrics.json")}
