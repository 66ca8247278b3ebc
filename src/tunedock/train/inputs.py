"""A recipe and its base -> what a run trains on, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunedock.data import prepare as preparing
from tunedock.data.account import Account
from tunedock.data.sample import Sample
from tunedock.errors import RunError
from tunedock.events import Emitter
from tunedock.model.session import Base
from tunedock.plan.steps import plan_steps, rollouts_of
from tunedock.train.data_record import DataRecord
from tunedock.train.feed import Feed, StoreFeed
from tunedock.train.progress import Course
from tunedock.train.stream import StreamFeed, streamed_data
from tunedock.train.training import Training


@dataclass(frozen=True, slots=True)
class Inputs:
    feed: Feed
    validation: Sequence[Sample]
    record: DataRecord

    def longest_path(self, training: Training) -> int:
        """Tokens of the longest way through a sample, answers to come counted in."""
        longest = training.recipe.data.max_length
        if isinstance(self.feed, StoreFeed):
            longest = int(self.feed.samples.lengths.max())
        return longest + (0 if training.rollout is None else training.rollout.max_new_tokens)

    def course(self, training: Training) -> Course:
        train, samples = training.recipe.train, self.record.samples
        if samples is None:
            return Course(train.max_steps, None, train.max_steps * training.batch_size)
        if (section := training.rollout) is not None:
            rounds = rollouts_of(training.recipe, section, samples)
            return Course(rounds.total_steps, rounds.steps_per_epoch, rounds.total_steps * training.batch_size)
        plan = plan_steps(samples, training.batch_size, train.num_train_epochs, train.max_steps)
        return Course(plan.total_steps, plan.steps_per_epoch, plan.examples_seen)


def read_inputs(training: Training, base: Base) -> Inputs:
    recipe, emit = training.recipe, training.emit
    if recipe.data.streaming:
        return Inputs(*streamed_data(base, recipe, training.batch_size, emit))
    prepared = preparing.prepare(recipe, base.chat, emit)
    account = prepared.account
    account.verify(recipe.data.max_dropped, recipe.data.over_length)
    _tell(account, emit, from_cache=prepared.from_cache)
    samples = prepared.side("train")
    record = DataRecord(
        fingerprint=prepared.fingerprint,
        files=prepared.files,
        account=account.to_json(),
        sides=prepared.summary(),
        stop_ids=sorted(prepared.stop_ids),
        thinking=prepared.thinking if training.rollout is None else training.rollout.thinking,
        samples=len(samples),
        mean_tokens=float(samples.lengths.mean()),
        mean_trained=float(samples.trained.mean()),
    )
    feed_ = StoreFeed(samples, batch_size=training.batch_size, seed=recipe.train.seed)
    return Inputs(feed_, prepared.side("validation"), record)


def _tell(account: Account, emit: Emitter, *, from_cache: bool) -> None:
    emit.note(
        f"data: {account.read} rows read, {account.kept} kept, {account.dropped} dropped"
        + (f" ({', '.join(f'{k} {v}' for k, v in account.reasons.items())})" if account.dropped else "")
        + (", from the cache" if from_cache else ""),
        **{key: value for key, value in account.to_json().items() if key not in ("drops", "cuts")},
    )


def require_same_adapters(training: Training, base: Base) -> None:
    """Raises RunError when a resumed run finds other adapters beneath than it began with."""
    before, now = training.run.state().lineage.get("adapters", {}), base.lineage().get("adapters", {})
    if training.resume and before and before != now:
        raise RunError(
            "an adapter that is merged into the weights is not what this run began with",
            where=", ".join(path for path, digest in before.items() if now.get(path) != digest),
            hint="put its files back as they were, or start a new run",
        )


def account_for_stream(training: Training, inputs: Inputs) -> None:
    """What has become of a stream's rows is known at the end; of one that was resumed, only of those since, and nothing is said."""
    if isinstance(inputs.feed, StreamFeed) and not training.resume:
        inputs.record.counted(inputs.feed.account).write(training)
        data = training.recipe.data
        inputs.feed.account.verify(data.max_dropped, data.over_length)
