"""Rollouts put together from a recipe: who answers, who scores, and how both become the loop's feed and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tunedock.data.sample import Sample
from tunedock.data.store import SampleStore
from tunedock.eval.budget import EvalBudget
from tunedock.eval.judged import Answerer, Judged, Prompts
from tunedock.eval.rewards.completion import Moment
from tunedock.eval.rewards.scoring import Scorer, make_scorer
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
from tunedock.train.budget import Budget
from tunedock.train.rollout import RolloutFeed
from tunedock.train.step import Stopped
from tunedock.train.training import Training


@dataclass(frozen=True, slots=True)
class Rollouts:
    training: Training
    section: Rollout
    policy: Policy
    reference: Reference | None
    budget: Budget
    judged: Judged
    close: Callable[[], None]
    """Lets go of what makes the answers."""

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def feed(self, store: SampleStore) -> RolloutFeed:
        recipe, emit = self.training.recipe, self.training.emit

        def reading() -> EvalBudget:
            """Of rows that are read, not trained on: as large as those of training are now."""
            return EvalBudget(self.policy, emit, tokens=self.budget.tokens)

        return RolloutFeed(
            Prompts(store),
            self.judged,
            self.section,
            rollouts_of(recipe, self.section, len(store)),
            self.policy,
            self.reference,
            layout=lambda samples: reading().rows(samples),
            smaller=lambda samples, rows: reading().smaller(samples, rows),
            seed=recipe.train.seed,
            batch_size=self.training.batch_size,
            always_read=not isinstance(self.section.engine, Local),
            between=partial(self._between, "answers"),
            check=self._check,
            on_warning=lambda text: emit.warning(text, where="objective.engine"),
        )

    def evaluation(self, validation: Sequence[Sample]) -> Callable[[], Measured] | None:
        """Answers to the validation prompts, decoded as the recipe's `eval` says, and their mean reward; a loss is minus that."""
        if not isinstance(validation, SampleStore) or not len(validation):
            return None
        options = self.training.recipe.eval
        some = range(min(len(validation), options.max_samples or len(validation)))
        asked = Prompts(validation).take(list(some))

        def measure() -> Measured:
            _, reward_PG, told = self.judged(
                asked,
                1,
                Sampling(self.section.max_new_tokens, options.temperature),
                seed=self.training.recipe.train.seed,
                between=partial(self._between, "validation", total=len(asked)),
                moment=Moment(),
            )
            metrics = {name: total / max(of, 1e-12) for name, (total, of) in told.items()}
            return Measured(-float(reward_PG.mean()), float(len(asked)), metrics)

        return measure

    def _between(self, name: str, done: int, total: int) -> None:
        """Before each batch of answers. Where several ranks make them, one that is asked to stop takes the others with it."""
        self.training.emit.progress(name, done, total, "answers")
        if world.together() and self.judged.shared_out and world.agree(self.training.stop.asked()):
            raise Stopped
        self._check()

    def _check(self) -> None:
        """While answers are scored, or made elsewhere: of several ranks none can leave alone there."""
        if not world.together() and self.training.stop.asked():
            raise Stopped


def open_scorer(training: Training, until_done: ExitStack) -> Scorer | None:
    """What scores answers, where the objective makes them; let go of when the training is done. Comes before data and weights are
    read: a function's mistake is found in a second."""
    if training.rollout is None:
        return None
    scorer = make_scorer(
        training.rollout.rewards,
        hub=training.recipe.hub,
        offline=training.recipe.offline,
        on_warning=lambda text: training.emit.warning(text, where="rewards"),
    )
    until_done.callback(scorer.close)
    return scorer


def make_rollouts(
    training: Training, base: Base, policy: Policy, reference: Reference | None, budget: Budget, scorer: Scorer
) -> Rollouts:
    """Of a policy that is probed and has not begun to train; from here on its log-probabilities are those of sampling."""
    section = training.rollout
    if section is None:
        raise ValueError(f"objective.kind: {training.recipe.objective.kind} makes no answers")
    policy.at_temperature(section.temperature)
    answerer = _answerer(training, section, base, policy)
    judged = Judged(answerer, scorer, base.tokenizer, section.missing_eos_penalty)
    close = answerer.close if isinstance(answerer, Engine) else _nothing
    return Rollouts(training, section, policy, reference, budget, judged, close)


def _nothing() -> None:
    """The policy itself answers, and stays."""


def _answerer(training: Training, section: Rollout, base: Base, policy: Policy) -> Answerer:
    found, recipe = section.engine, training.recipe
    if isinstance(found, Local):
        return Sampler(policy, stop_ids=base.chat.stop_ids, pad_id=base.pad_id, batch_size=found.max_num_seqs)
    root = Path(found.adapter_dir) if found.adapter_dir else training.run.path / "engine"
    engine = Engine(
        found,
        policy,
        AdapterFolders(root, training.run.path, on_server=found.adapter_dir_on_server),
        base.tokenizer,
        rank=recipe.adapter.r if isinstance(recipe.adapter, Lora) else 1,
        stop_ids=base.chat.stop_ids,
        longest=recipe.data.max_length,
        on_warning=lambda text: training.emit.warning(text, where=found.base_url),
    )
    if training.rank.leads:
        engine.begin()
    training.emit.note(
        f"answers are made by {found.model} at {found.base_url}", base_url=found.base_url, model=found.model
    )
    return engine
