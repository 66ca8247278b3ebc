"""The `eval` stage: loss, perplexity and generated answers on a held-out side, the base beside the tuned model."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from tunedock.data import prepare as preparing
from tunedock.data.conversation import Conversation, Message, Preference
from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.data.split import SIDES, Side
from tunedock.data.store import SampleStore
from tunedock.errors import DataError, RunError
from tunedock.eval.metrics import exact_match, score
from tunedock.eval.page import page
from tunedock.events import Emitter
from tunedock.model import adapter as adapters
from tunedock.model.generate import complete
from tunedock.model.policy import Policy
from tunedock.model.reference import Reference
from tunedock.model.session import Base, ChatFacts, base_policy, find_base, tuned_policy
from tunedock.objective.evaluate import measure
from tunedock.objective.registry import make as make_objective
from tunedock.recipe.schema import Eval, Recipe
from tunedock.run.record import Run, write_atomic, write_json

EVAL_TOKEN_BUDGET = 8192


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out row as a question: what stands before its last answer, and that answer."""

    row_id: str
    prompt: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    reference: str


def evaluate(run: Run, recipe: Recipe, emit: Emitter, *, side: str, options: Eval) -> dict[str, Any]:
    """Writes `eval/metrics.json` and `eval/answers.html`, and returns the metrics.

    Raises DataError when the side is empty and RunError when the run has no result yet.
    """
    if not run.model.is_dir():
        raise RunError(
            "the run has no result yet", where=str(run.path), hint=f"`tunedock train --resume {run.path}` finishes it"
        )
    facts = ChatFacts.read(run.model)
    base = find_base(recipe, stop_ids=facts.stop_ids)
    store = _held_out(base, recipe, side, emit)
    questions = questions_of(store, options.max_samples)
    objective = make_objective(recipe.objective)
    reference = None
    if objective.needs_reference and not adapters.is_adapter(run.model):
        reference = _asked_before(base, store, recipe, emit)
    policy = _probed(tuned_policy(base, run.model), base, emit)
    if objective.needs_reference and reference is None:
        reference = Reference(policy, policy.base)
    shares_weights = policy.has_adapter
    results: dict[str, Any] = {"run": run.name, "split": side, "samples": len(store), "questions": len(questions)}
    answers: dict[str, list[str]] = {}
    results["tuned"], answers["tuned"] = _measure(
        base, policy, "tuned", store, questions, facts, options, reference, recipe, emit
    )
    results["base"] = None
    if options.compare_base:
        if not shares_weights:
            del policy  # two whole models need not stand in memory at once
            gc.collect()  # a policy's head and its model refer to each other
            policy = _probed(base_policy(base), base, emit)
        with policy.base() if shares_weights else nullcontext():
            results["base"], answers["base"] = _measure(
                base, policy, "base", store, questions, facts, options, None, recipe, emit
            )
    results["answers"] = _side_by_side(questions, answers)
    folder = run.path / "eval"
    folder.mkdir(exist_ok=True)
    write_json(folder / "metrics.json", results)
    write_atomic(folder / "answers.html", page(results))
    return {**results, "page": str(folder / "answers.html"), "metrics": str(folder / "metrics.json")}


def _asked_before(base: Base, store: SampleStore, recipe: Recipe, emit: Emitter) -> Reference:
    """What the base says of the rows, so that it need not stand in memory beside the tuned model."""
    policy = _probed(base_policy(base), base, emit)
    reference = Reference(policy, nullcontext)
    tell = partial(emit.progress, "reference", total=len(store), unit="samples")
    reference.precompute(store, _layout(policy, recipe), on_progress=tell)
    reference.let_go()
    return reference


def _probed(policy: Policy, base: Base, emit: Emitter) -> Policy:
    """The policy in the leanest layout that is exact for its model."""
    for given_up in policy.probe():
        emit.warning(given_up, where=str(base.located.folder))
    return policy


def _layout(policy: Policy, recipe: Recipe) -> Callable[[Sequence[Sample]], list[Row]]:
    return partial(policy.rows, budget_tokens=max(EVAL_TOKEN_BUDGET, recipe.data.max_length))


def _held_out(base: Base, recipe: Recipe, side: str, emit: Emitter) -> SampleStore:
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
        raise DataError(
            f"the {side} split is empty",
            where="data.split",
            hint=f"set `data.split.{side}` or give `data.{side}` files",
        )
    return store


def questions_of(store: SampleStore, limit: int | None) -> list[Question]:
    """The conversations of a side as questions, in the side's order; of a pair, the chosen answer is the one wanted. Documents give
    none."""
    questions: list[Question] = []
    for i in range(len(store)):
        if limit is not None and len(questions) == limit:
            break
        stored = store.stored(i)
        example = stored.example
        if isinstance(example, Preference):
            messages = (*example.prompt, *example.chosen)
        elif isinstance(example, Conversation):
            messages = example.messages
        else:
            continue
        last = max(n for n, message in enumerate(messages) if message.role == "assistant")
        questions.append(Question(stored.sample.row_id, messages[:last], example.tools, messages[last].content))
    return questions


def _measure(
    base: Base,
    policy: Policy,
    who: str,
    store: SampleStore,
    questions: Sequence[Question],
    facts: ChatFacts,
    options: Eval,
    reference: Reference | None,
    recipe: Recipe,
    emit: Emitter,
) -> tuple[dict[str, Any], list[str]]:
    figures = _figures(policy, who, store, reference, recipe, emit)
    if not questions:
        return figures, []
    prompts = [base.chat.prompt_ids(q.prompt, q.tools, thinking=facts.thinking) for q in questions]
    made = complete(
        policy,
        prompts,
        stop_ids=facts.stop_ids,
        pad_id=base.pad_id,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        batch_size=options.batch_size,
        seed=recipe.train.seed,
        on_progress=lambda done: emit.progress(f"answers, {who}", done, len(prompts), "rows"),
    )
    texts = [answer_text(text) for text in base.tokenizer.batch_decode(made, skip_special_tokens=True)]
    scores = score(texts, [question.reference for question in questions])
    return {**figures, **scores.to_json()}, texts


def _figures(
    policy: Policy, who: str, store: SampleStore, reference: Reference | None, recipe: Recipe, emit: Emitter
) -> dict[str, Any]:
    """Loss and metrics of the objective. A base that is itself the reference has none: it prefers nothing to itself."""
    objective = make_objective(recipe.objective)
    if objective.needs_reference and who == "base":
        return {}
    measured = measure(
        policy,
        objective,
        store,
        _layout(policy, recipe),
        reference=reference,
        on_progress=lambda done: emit.progress(f"loss, {who}", done, len(store), "samples"),
    )
    if objective.unit != "tokens":
        return {"loss": measured.loss, **measured.metrics, objective.unit: measured.count}
    perplexity = math.exp(min(measured.loss, 700.0))
    return {"loss": measured.loss, "perplexity": perplexity, "trained_tokens": measured.count}


def answer_text(text: str) -> str:
    """A completion without its reasoning."""
    return text.rpartition("</think>")[2].strip()


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
