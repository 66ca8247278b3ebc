"""The `eval` stage: loss, perplexity and generated answers on a held-out side, the base beside the tuned model."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from tunedock.data import prepare as preparing
from tunedock.data.conversation import Conversation, Message
from tunedock.data.layout import padded
from tunedock.data.split import SIDES, Side
from tunedock.data.store import SampleStore
from tunedock.errors import DataError, RunError
from tunedock.eval.metrics import exact_match, score
from tunedock.eval.page import page
from tunedock.events import Emitter
from tunedock.model.generate import complete
from tunedock.model.policy import Policy
from tunedock.model.session import Base, ChatFacts, base_policy, find_base, tuned_policy
from tunedock.objective.evaluate import mean_loss
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
    policy = tuned_policy(base, run.model)
    shares_weights = policy.has_adapter
    results: dict[str, Any] = {"run": run.name, "split": side, "samples": len(store), "questions": len(questions)}
    answers: dict[str, list[str]] = {}
    results["tuned"], answers["tuned"] = _measure(base, policy, "tuned", store, questions, facts, options, recipe, emit)
    results["base"] = None
    if options.compare_base:
        if not shares_weights:
            del policy  # two whole models need not stand in memory at once
            gc.collect()  # a policy's head and its model refer to each other
            policy = base_policy(base)
        with policy.base() if shares_weights else nullcontext():
            results["base"], answers["base"] = _measure(
                base, policy, "base", store, questions, facts, options, recipe, emit
            )
    results["answers"] = _side_by_side(questions, answers)
    folder = run.path / "eval"
    folder.mkdir(exist_ok=True)
    write_json(folder / "metrics.json", results)
    write_atomic(folder / "answers.html", page(results))
    return {**results, "page": str(folder / "answers.html"), "metrics": str(folder / "metrics.json")}


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
    """The conversations of a side as questions, in the side's order; documents and refused shapes give none."""
    questions: list[Question] = []
    for i in range(len(store)):
        if limit is not None and len(questions) == limit:
            break
        stored = store.stored(i)
        example = stored.example
        if not isinstance(example, Conversation):
            continue
        last = max(n for n, message in enumerate(example.messages) if message.role == "assistant")
        questions.append(
            Question(stored.sample.row_id, example.messages[:last], example.tools, example.messages[last].content)
        )
    return questions


def _measure(
    base: Base,
    policy: Policy,
    who: str,
    store: SampleStore,
    questions: Sequence[Question],
    facts: ChatFacts,
    options: Eval,
    recipe: Recipe,
    emit: Emitter,
) -> tuple[dict[str, Any], list[str]]:
    layout = partial(padded, budget_tokens=max(EVAL_TOKEN_BUDGET, recipe.data.max_length), pad_id=base.pad_id)
    loss, count = mean_loss(
        policy,
        make_objective(recipe.objective),
        store,
        layout,
        on_progress=lambda done: emit.progress(f"loss, {who}", done, len(store), "samples"),
    )
    figures: dict[str, Any] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "trained_tokens": count}
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
