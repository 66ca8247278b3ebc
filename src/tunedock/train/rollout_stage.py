"""Rollouts put together from a recipe: who answers, who scores, and how both become the loop's feed and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunedock.data.sample import Sample
from tunedock.data.store import SampleStore
from tunedock.eval.budget import EvalBudget
from tunedock.eval.judged import Answerer, Judged, Prompts
from tunedock.eval.rewards.completion import Moment
from tunedock.eval.rewards.scoring import make_scorer
from tunedock.events import Emitter
from tunedock.model import world
from tunedock.model.answers import Sampler, Sampling
from tunedock.model.engine.answerer import Engine
from tunedock.model.engine.folders import AdapterFolders
from tunedock.model.policy import Policy
from tunedock.model.reference import Reference
from tunedock.model.session import Base
from tunedock.objective.evaluate import Measured
from tunedock.plan.steps import rollouts_of
from tunedock.recipe.adapters import Lora
from tunedock.recipe.objectives.rollout import Local, Rollout
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.budget import Budget
from tunedock.train.rollout import RolloutFeed
from tunedock.train.step import Stopped


@dataclass(frozen=True, slots=True)
class Rollouts:
    recipe: Recipe
    section: Rollout
    policy: Policy
    reference: Reference | None
    budget: Budget
    judged: Judged
    emit: Emitter
    stop: StopRequest
    closing: tuple[Callable[[], None], ...] = ()

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *raised: object) -> None:
        for close in self.closing:
            close()

    def feed(self, store: SampleStore) -> RolloutFeed:
        batch_size, seed = self.recipe.train.batch_size or 1, self.recipe.train.seed

        def reading() -> EvalBudget:
            """Of rows that are read, not trained on: as large as those of training are now."""
            return EvalBudget(self.policy, self.emit, tokens=self.budget.tokens)

        return RolloutFeed(
            Prompts(store),
            self.judged,
            self.section,
            rollouts_of(self.recipe, self.section, len(store)),
            self.policy,
            self.reference,
            layout=lambda samples: reading().rows(samples),
            smaller=lambda samples, rows: reading().smaller(samples, rows),
            seed=seed,
            batch_size=batch_size,
            always_read=not isinstance(self.section.engine, Local),
            on_progress=lambda done, total: self.emit.progress("answers", done, total, "answers"),
            check=self._check,
            on_warning=lambda text: self.emit.warning(text, where="objective.engine"),
        )

    def evaluation(self, validation: Sequence[Sample]) -> Callable[[], Measured] | None:
        """Answers to the validation prompts, decoded as the recipe's `eval` says, and their mean reward; a loss is minus that."""
        if not isinstance(validation, SampleStore) or not len(validation):
            return None
        options = self.recipe.eval
        some = range(min(len(validation), options.max_samples or len(validation)))
        asked = Prompts(validation).take(list(some))

        def measure() -> Measured:
            _, reward_PG, told = self.judged(
                asked,
                1,
                Sampling(self.section.max_new_tokens, options.temperature),
                seed=self.recipe.train.seed,
                between=self._evaluating(len(asked)),
                moment=Moment(),
            )
            metrics = {name: total / max(of, 1e-12) for name, (total, of) in told.items()}
            return Measured(-float(reward_PG.mean()), float(len(asked)), metrics)

        return measure

    def _evaluating(self, total: int) -> Callable[[int], None]:
        def between(done: int) -> None:
            self.emit.progress("validation", done, total, "answers")
            self._check()

        return between

    def _check(self) -> None:
        if (
            not world.together() and self.stop.asked()
        ):  # of several ranks one cannot leave alone: it is asked at the next row
            raise Stopped


def make_rollouts(
    run: Run,
    recipe: Recipe,
    section: Rollout,
    base: Base,
    policy: Policy,
    reference: Reference | None,
    budget: Budget,
    emit: Emitter,
    stop: StopRequest,
) -> Rollouts:
    """Of a policy that is probed and has not begun to train; from here on its log-probabilities are those of sampling."""
    policy.at_temperature(section.temperature)
    scorer = make_scorer(
        section.rewards,
        hub=recipe.hub,
        offline=recipe.offline,
        on_warning=lambda text: emit.warning(text, where="rewards"),
    )
    answerer = _answerer(run, recipe, section, base, policy, emit)
    closing = (scorer.close, answerer.close) if isinstance(answerer, Engine) else (scorer.close,)
    judged = Judged(answerer, scorer, base.tokenizer, section.missing_eos_penalty)
    return Rollouts(recipe, section, policy, reference, budget, judged, emit, stop, closing)


def _answerer(run: Run, recipe: Recipe, section: Rollout, base: Base, policy: Policy, emit: Emitter) -> Answerer:
    found = section.engine
    if isinstance(found, Local):
        return Sampler(policy, stop_ids=base.chat.stop_ids, pad_id=base.pad_id, batch_size=found.max_num_seqs)
    root = Path(found.adapter_dir) if found.adapter_dir else run.path / "engine"
    engine = Engine(
        found,
        policy,
        AdapterFolders(root, run.path, on_server=found.adapter_dir_on_server),
        base.tokenizer,
        rank=recipe.adapter.r if isinstance(recipe.adapter, Lora) else 1,
        stop_ids=base.chat.stop_ids,
        longest=recipe.data.max_length,
        on_warning=lambda text: emit.warning(text, where=found.base_url),
    )
    if world.rank() == 0:
        engine.begin()
    emit.note(f"answers are made by {found.model} at {found.base_url}", base_url=found.base_url, model=found.model)
    return engine
