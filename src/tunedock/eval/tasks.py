"""lm-evaluation-harness's tasks on a run's model and on its base: `eval/tasks.json`, `tasks-samples.jsonl` and `tasks.html`.

Prompts, answers' extraction, metrics and standard errors are lm-eval's; the model is asked through the engine (`eval.task_model`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tunedock.errors import DataError, TunedockError
from tunedock.eval.task_library import KEY, LoadedTask, fetched, no_fetched_metrics
from tunedock.eval.task_page import page
from tunedock.events import Emitter, encode
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.out_of_memory import is_out_of_memory
from tunedock.model.policy import Policy
from tunedock.model.session import Base
from tunedock.recipe.schema import Eval, Recipe
from tunedock.run.record import Run, write_atomic, write_json

BOOTSTRAPS = 1000
"""Draws for the standard error of a metric that has no formula for it (a perplexity, F1): it is then known to 2%. lm-eval's command
takes 100,000, in a process for each core."""

SEEDS = (0, 1234, 1234)
"""Python's, numpy's and torch's, before each task: lm-eval's own."""

NOT_FIGURES = {"alias", "name", "sample_len", "sample_count"}


@dataclass(frozen=True, slots=True)
class Measured:
    """A task, or a group of tasks, on one model."""

    task: str
    group: bool
    version: Any
    num_fewshot: int | None
    samples: int
    """Documents measured."""
    documents: int | None
    """Documents there are; None for a group."""
    figures: dict[tuple[str, str], tuple[Any, Any, bool | None]]
    """(metric, filter) -> value, standard error or None, whether higher is better."""


class TaskRun:
    """The tasks of one evaluation, on one model after the other."""

    def __init__(
        self, tasks: Sequence[LoadedTask], base: Base, facts: ChatFacts, recipe: Recipe, options: Eval
    ) -> None:
        self._tasks = tasks
        self._base = base
        self._facts = facts
        self._recipe = recipe
        self._options = options
        self._measured: dict[str, list[Measured]] = {}
        self.samples: list[dict[str, Any]] = []

    def measure(self, policy: Policy, who: str, emit: Emitter) -> None:
        """Runs all tasks on `policy`, which is the `who` ("tuned" or "base") of the result.

        Raises DataError naming the task whose prompts or metrics fail.
        """
        from tunedock.eval.task_model import PolicyLM

        self._measured[who] = []
        for loaded in self._tasks:
            model = PolicyLM(
                self._base,
                policy,
                self._facts,
                emit,
                name=f"{loaded.name}, {who}",
                batch_size=self._options.batch_size,
                seed=self._recipe.train.seed,
            )
            results = self._evaluate(loaded, model)
            self._measured[who] += _read(results)
            self.samples += _samples(results, who)

    def _evaluate(self, loaded: LoadedTask, model: Any) -> Mapping[str, Any]:
        from lm_eval.evaluator import evaluate

        options, chat = self._options, self._options.apply_chat_template
        with _seeded(), no_fetched_metrics(options) as refused:
            try:
                results: Mapping[str, Any] = evaluate(
                    model,
                    loaded.content,
                    limit=options.limit,
                    bootstrap_iters=BOOTSTRAPS,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    system_instruction=self._facts.system if chat else None,
                )
            except Exception as error:
                # Policy: a task's templates, functions and metrics are other people's, and may raise anything.
                if refused:
                    raise fetched(loaded.name, refused) from None
                if isinstance(error, TunedockError) or is_out_of_memory(error):
                    raise
                traceback.print_exception(error, file=sys.stderr)
                first = (str(error).strip().splitlines() or [""])[0][:300]
                raise DataError(
                    f"the task fails: {type(error).__name__}: {first}",
                    where=f"{KEY}: {loaded.name}",
                    hint="its YAML and the columns of its rows may not fit each other; the traceback is in the log",
                ) from error
        return results

    def result(self, run: Run) -> dict[str, Any]:
        """What was measured, the base's figures beside the tuned model's, as `eval/tasks.json` has it."""
        options = self._options
        return {
            "run": run.name,
            "lm_eval": importlib.metadata.version("lm_eval"),
            "limit": options.limit,
            "num_fewshot": options.num_fewshot,
            "apply_chat_template": options.apply_chat_template,
            "tasks_path": options.tasks_path,
            "compared": "base" in self._measured,
            "tasks": _beside(self._measured),
        }

    def write(self, run: Run) -> dict[str, Any]:
        """Writes the three files, and returns `result` with the page's path."""
        folder = run.path / "eval"
        folder.mkdir(exist_ok=True)
        value = self.result(run)
        write_json(folder / "tasks.json", value)
        write_atomic(folder / "tasks-samples.jsonl", "".join(encode(sample) for sample in self.samples))
        write_atomic(folder / "tasks.html", page(value))
        return {**value, "page": str(folder / "tasks.html"), "metrics": str(folder / "tasks.json")}


@contextmanager
def _seeded() -> Iterator[None]:
    """lm-eval's seeds; and its bootstrap in this process: one forked from a process with torch's threads may hang."""
    python, numpy, of_torch = SEEDS
    random.seed(python)
    np.random.seed(numpy)  # what tasks draw from
    torch.manual_seed(of_torch)
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _read(results: Mapping[str, Any]) -> Iterator[Measured]:
    """lm-eval's results: its tasks and groups, in its order."""
    counts = results["n-samples"]
    groups = results.get("groups", {})
    for name, told in {**results["results"], **groups}.items():
        better = results["higher_is_better"].get(name) or {}
        figures = {}
        for key, value in told.items():
            metric, comma, of = key.partition(",")
            if key in NOT_FIGURES or not comma or metric.endswith("_stderr"):
                continue
            error = told.get(f"{metric}_stderr,{of}")
            figures[metric, of] = (_number(value), _number(error), better.get(metric))
        if not figures:
            continue  # a group without a figure of its own
        count = counts.get(name, {})
        yield Measured(
            name,
            name in groups,
            results["versions"].get(name),
            results["n-shot"].get(name),
            int(count.get("effective", told.get("sample_len", 0))),
            count.get("original"),
            figures,
        )


def _number(value: Any) -> Any:
    """A figure as Python's own; text and lists as they are, what is none (lm-eval's "N/A") as None."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if value == "N/A" else value


def _samples(results: Mapping[str, Any], who: str) -> Iterator[dict[str, Any]]:
    """Each document with what the model made of it, a line of `tasks-samples.jsonl`."""
    for task, samples in results.get("samples", {}).items():
        for sample in samples:
            shown = {key: value for key, value in sample.items() if key not in ("doc", "arguments")}
            asked = [arguments[0] for arguments in sample["arguments"]]
            answers = [arguments[1] for arguments in sample["arguments"] if len(arguments) > 1]
            shown["prompt"] = asked[0] if len(set(asked)) == 1 else asked
            shown["choices"] = [answer for answer in answers if isinstance(answer, str)]
            yield {"model": who, "task": task, **json.loads(json.dumps(shown, default=str))}


def _beside(measured: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i, tuned in enumerate(measured["tuned"]):
        base = measured["base"][i] if "base" in measured else None
        metrics = []
        for (metric, of), (value, error, better) in tuned.figures.items():
            line = {"metric": metric, "filter": of, "higher_is_better": better}
            if base is not None:
                line |= {"base": base.figures[metric, of][0], "base_stderr": base.figures[metric, of][1]}
            metrics.append({**line, "tuned": value, "tuned_stderr": error})
        found.append(
            {
                "task": tuned.task,
                "group": tuned.group,
                "version": tuned.version,
                "num_fewshot": tuned.num_fewshot,
                "samples": tuned.samples,
                "documents": tuned.documents,
                "metrics": metrics,
            }
        )
    return found
