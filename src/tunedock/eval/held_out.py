"""A run's held-out rows on its model and on its base: loss, perplexity, generated answers; `eval/metrics.json`, `answers.html`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from tunedock.data import prepare as preparing
from tunedock.data.split import SIDES, Side
from tunedock.data.store import SampleStore
from tunedock.errors import DataError
from tunedock.eval.budget import EVAL_TOKEN_BUDGET, EvalBudget
from tunedock.eval.judged import Judged, Prompts
from tunedock.eval.metrics import exact_match
from tunedock.eval.page import page
from tunedock.eval.questions import Question, Questions, answer_text, questions_of
from tunedock.eval.rewards.completion import Moment
from tunedock.eval.rewards.scoring import Scorer, make_scorer
from tunedock.events import Emitter
from tunedock.model import adapter as adapters
from tunedock.model.answers import Sampler, Sampling
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.policy import Policy
from tunedock.model.reference import Reference
from tunedock.model.session import Base, continues
from tunedock.objective.base import ReadsOthers
from tunedock.objective.evaluate import batches, measure
from tunedock.objective.registry import make as make_objective
from tunedock.recipe.objectives.rollout import Rollout
from tunedock.recipe.schema import Eval, Recipe
from tunedock.run.record import Run, write_atomic, write_json


class HeldOut:
    """The rows of one side, measured on one model after the other."""

    def __init__(
        self, base: Base, facts: ChatFacts, recipe: Recipe, emit: Emitter, *, side: str, options: Eval
    ) -> None:
        """Raises DataError when the side is empty."""
        self._base = base
        self._facts = facts
        self._recipe = recipe
        self._options = options
        self._side = side
        self._store = held_out_rows(base, recipe, side, emit)
        self._questions = Questions(base, facts, questions_of(self._store, options.max_samples))
        self._objective = make_objective(recipe.objective)
        self._reference: Reference | None = None
        self._results: dict[str, Any] = {"tuned": None, "base": None}
        self._answers: dict[str, list[str]] = {}
        self._scorer: Scorer | None = None

    def needs_base_first(self, run: Run) -> bool:
        """Whether the base must be asked about the rows before the tuned model stands in memory: it is the objective's reference,
        and no adapter to switch off."""
        alone = adapters.is_adapter(run.model) and not continues(self._recipe)
        return self._objective.needs_reference and not alone

    def ask_base(self, policy: Policy, emit: Emitter) -> None:
        """What the base says of the rows. It is not kept."""
        reference = Reference(policy, nullcontext)
        tell = partial(emit.progress, "reference", total=len(self._store), unit="samples")
        budget = self._budget(policy, emit)
        reference.precompute(self._store, budget.rows, on_progress=tell)
        if isinstance(self._objective, ReadsOthers):
            for part in batches(self._store):
                reference.precompute(self._objective.others(part), budget.rows)
        reference.let_go()
        self._reference = reference

    def measure(self, policy: Policy, who: str, emit: Emitter) -> None:
        """Figures and answers of `policy`, the `who` ("tuned" or "base") of the result."""
        if isinstance(self._recipe.objective, Rollout):
            self._results[who] = self._rewarded(self._recipe.objective, policy, who, emit)
            return
        figures = self._figures(policy, who, emit)
        if self._questions:
            figures |= self._answer(policy, who, emit)
        self._results[who] = figures

    def _rewarded(self, section: Rollout, policy: Policy, who: str, emit: Emitter) -> dict[str, Any]:
        """Answers, their mean reward by the recipe's own scorers, and what they have of the rows' answers where there are any."""
        options = self._options
        if self._scorer is None:
            told = partial(emit.warning, where="objective.rewards")
            hub, offline = self._recipe.hub, self._recipe.offline
            self._scorer = make_scorer(section.rewards, hub=hub, offline=offline, on_warning=told)
        asked = Prompts(self._store).take(range(len(self._questions)))
        sampler = Sampler(
            policy, stop_ids=self._facts.stop_ids, pad_id=self._base.pad_id, batch_size=options.batch_size
        )
        judged = Judged(sampler, self._scorer, self._base.tokenizer, section.missing_eos_penalty)
        made, reward_PG, told_ = judged(
            asked,
            1,
            Sampling(options.max_new_tokens, options.temperature),
            seed=self._recipe.train.seed,
            between=lambda done: emit.progress(f"answers, {who}", done, len(asked), "rows"),
            moment=Moment(),
        )
        figures = {name: total / max(of, 1e-12) for name, (total, of) in told_.items()}
        figures |= {"loss": -float(reward_PG.mean()), "completions": float(len(asked))}
        texts = [answer_text(text) for (text,) in map(judged.texts, made)]
        self._answers[who] = texts
        if all(question.reference for question in self._questions.asked):
            figures |= self._questions.scored(texts).to_json()
        return figures

    def _figures(self, policy: Policy, who: str, emit: Emitter) -> dict[str, Any]:
        """Loss and metrics of the objective. A base that is itself the reference has none: it prefers nothing to itself."""
        objective = self._objective
        if objective.needs_reference and who == "base":
            return {}
        reference = self._reference
        if objective.needs_reference and reference is None:
            reference = Reference(policy, policy.base)
        budget = self._budget(policy, emit)
        measured = measure(
            policy,
            objective,
            self._store,
            budget.rows,
            reference=reference,
            on_progress=lambda done: emit.progress(f"loss, {who}", done, len(self._store), "samples"),
            smaller=budget.smaller,
        )
        if objective.unit != "tokens":
            return {"loss": measured.loss, **measured.metrics, objective.unit: measured.count}
        perplexity = math.exp(min(measured.loss, 700.0))
        return {"loss": measured.loss, "perplexity": perplexity, "trained_tokens": measured.count}

    def _answer(self, policy: Policy, who: str, emit: Emitter) -> dict[str, Any]:
        tell = partial(emit.progress, f"answers, {who}", total=len(self._questions), unit="rows")
        texts = self._questions.answered(policy, self._options, seed=self._recipe.train.seed, on_progress=tell)
        self._answers[who] = texts
        return self._questions.scored(texts).to_json()

    def _budget(self, policy: Policy, emit: Emitter) -> EvalBudget:
        return EvalBudget(policy, emit, tokens=max(EVAL_TOKEN_BUDGET, self._recipe.data.max_length))

    def write(self, run: Run) -> dict[str, Any]:
        """Writes the two files, and returns what the first holds with both paths."""
        results: dict[str, Any] = {
            "run": run.name,
            "split": self._side,
            "samples": len(self._store),
            "questions": len(self._questions),
            **self._results,
            "answers": _side_by_side(self._questions.asked, self._answers),
        }
        folder = run.path / "eval"
        folder.mkdir(exist_ok=True)
        write_json(folder / "metrics.json", results)
        write_atomic(folder / "answers.html", page(results))
        return {**results, "page": str(folder / "answers.html"), "metrics": str(folder / "metrics.json")}


def held_out_rows(base: Base, recipe: Recipe, side: str, emit: Emitter) -> SampleStore:
    """The prepared rows of a side. Raises DataError for a side that is none or empty, and for a stream."""
    if side not in SIDES:
        raise DataError(f"there is no split `{side}`", where="--split", hint=f"one of {', '.join(SIDES)}")
    if recipe.data.streaming:
        raise DataError(
            "a stream has no stored test rows",
            where="data.streaming",
            hint="train a run on the held-out file without `streaming`, or evaluate with data.test in a recipe of its own",
        )
    prepared = preparing.prepare(recipe, base.chat, emit)
    prepared.account.verify(recipe.data.max_dropped, recipe.data.over_length)
    name: Side = side
    store = prepared.side(name)
    if not len(store):
        others = [other for other in ("validation", "test") if other != side and len(prepared.side(other))]
        here = f"this run has `--split {others[0]}`; for the next, " if others else "for the next run, "
        raise DataError(
            f"the {side} split is empty",
            where="data.split",
            hint=f"{here}set `data.split.{side}` or give `data.{side}` files",
        )
    return store


def _side_by_side(questions: Sequence[Question], answers: dict[str, list[str]]) -> list[dict[str, Any]]:
    base = answers.get("base")
    return [
        {
            "row_id": question.row_id,
            "prompt": [{"role": message.role, "content": message.content} for message in question.prompt],
            "reference": question.reference,
            "base": base[i] if base else None,
            "tuned": answers["tuned"][i],
            "exact_base": exact_match(base[i], question.reference) if base else None,
            "exact_tuned": exact_match(answers["tuned"][i], question.reference),
        }
        for i, question in enumerate(questions)
    ]
