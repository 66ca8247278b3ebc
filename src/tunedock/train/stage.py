"""The `train` stage: data, model and loop put together, and what the run directory keeps of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from tunedock.errors import InterruptedRun, RecipeError, RunError
from tunedock.events import Emitter
from tunedock.model import world
from tunedock.model.policy import Policy
from tunedock.model.reference import Reference
from tunedock.model.session import Base, find_base
from tunedock.model.sharding import is_sharded, whole_size
from tunedock.objective.registry import make as make_objective
from tunedock.plan.optimizer_memory import optimizer_bytes
from tunedock.recipe.schema import Recipe
from tunedock.run.pulse import Pulse
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest
from tunedock.train.announce import announce, warn_of_engines
from tunedock.train.budget import Budget
from tunedock.train.checkpoint import Checkpoints, Snapshot
from tunedock.train.data_record import require_same_data
from tunedock.train.environment import keep_environment
from tunedock.train.evaluation import Evaluation, objective_on, stopping
from tunedock.train.feed import Feed, StoreFeed
from tunedock.train.grace import Grace, require_time_to_save
from tunedock.train.inputs import Inputs, account_for_stream, read_inputs, require_same_adapters
from tunedock.train.loop import Loop
from tunedock.train.optimizer_names import require_optimizer
from tunedock.train.parallel.shared import shared
from tunedock.train.placing import ask_reference, complete, place
from tunedock.train.planning import make_budget
from tunedock.train.random_states import seed_rank
from tunedock.train.rehearsal import rehearse_largest_row, settle_compiling, states_to_come
from tunedock.train.result import draw, write_result
from tunedock.train.rollout_stage import make_rollouts, open_scorer
from tunedock.train.stream import StreamFeed
from tunedock.train.tracker_kinds import require as require_trackers
from tunedock.train.trackers import following
from tunedock.train.training import Training


def train(
    run: Run,
    recipe: Recipe,
    emit: Emitter,
    *,
    resume: bool,
    stop: StopRequest,
    token_budget: int | None = None,
    pulse: Pulse | None = None,
) -> dict[str, Any]:
    """Trains, and leaves the result in `run.model`. Raises InterruptedRun (resumable) when `stop` is set.

    `token_budget`: the most tokens of a row from here on, after the run was killed for want of memory. Where torchrun started
    several of these processes they train together (`model.world`): the first one writes the run directory.
    """
    pulse = pulse or Pulse()
    with world.joined(timeout_s=recipe.launch.group_timeout_s, pulse=pulse) as rank:
        return _train(Training(run, recipe, emit, stop, resume, rank, token_budget, pulse))


@dataclass(frozen=True, slots=True)
class _Ready:
    """All that a training is made of, before its first step."""

    base: Base
    inputs: Inputs
    policy: Policy
    reference: Reference | None
    feed: Feed
    budget: Budget
    loop: Loop


def _train(training: Training) -> dict[str, Any]:
    checkpoints = Checkpoints(training.run.checkpoints, keep=training.recipe.train.save_total_limit)
    _require_may_begin(training, checkpoints)
    with ExitStack() as until_done:
        ready = _assemble(training, checkpoints, until_done)
        _go_on(training, ready, checkpoints)
        if training.rank.leads:
            _require_time_to_save(training, ready.policy)
        return _run(training, ready, checkpoints)


def _require_may_begin(training: Training, checkpoints: Checkpoints) -> None:
    require_optimizer(training.recipe.train)
    require_trackers(training.recipe)
    if training.rank.leads:
        checkpoints.sweep()
    if not training.resume and checkpoints.names():
        raise RunError(
            "this run has checkpoints already",
            where=str(training.run.path),
            hint=f"`tunedock train --resume {training.run.path}` goes on with it",
        )
    if training.rank.leads:
        keep_environment(training)


def _assemble(training: Training, checkpoints: Checkpoints, until_done: ExitStack) -> _Ready:
    """What is cheap to find wrong comes first. A collective call."""
    scorer = open_scorer(training, until_done)
    base, inputs = _read(training)
    course, longest_path = inputs.course(training), inputs.longest_path(training)
    placed = place(training, base, course, longest_path=longest_path)
    policy, reference = placed.policy, placed.reference
    warn_of_engines(base, inputs.record, training.emit)
    budget = make_budget(training, policy, way=placed.way, longest_path=longest_path)  # counts what is held already
    updater = complete(placed, training.recipe, course)
    feed, evaluation = inputs.feed, None
    if scorer is not None and isinstance(feed, StoreFeed):
        rollouts = until_done.enter_context(make_rollouts(training, base, policy, reference, budget, scorer))
        feed, evaluation = rollouts.feed(feed.samples), rollouts.evaluation(inputs.validation)
    if training.recipe.train.predict_with_generate:
        evaluation = _answered_too(training, base, policy, reference, inputs, budget)
    announce(training, policy, course, inputs.record, placed.counts, budget_tokens=budget.record[-1].tokens)
    if training.rank.world > 1:
        told = f"{training.rank.world} processes train together: {placed.way}"
        training.emit.note(told, parallel=placed.way, ranks=training.rank.world)
        seed_rank(training.recipe.train.seed)
    grace_s = training.recipe.launch.grace_s
    loop = Loop(
        policy=policy,
        objective=make_objective(training.recipe.objective),
        reference=reference,
        feed=feed,
        validation=inputs.validation,
        layout=policy.rows,
        budget=budget,
        updater=updater,
        checkpoints=checkpoints,
        course=course,
        train=training.recipe.train,
        emit=training.emit,
        stop_requested=training.stop.asked,
        evaluation=evaluation,
        pulse=training.pulse,
        grace=Grace(grace_s, partial(training.stop.left_s, grace_s), training.emit),
    )
    return _Ready(base, inputs, policy, reference, feed, budget, loop)


def _read(training: Training) -> tuple[Base, Inputs]:
    """The base's tokenizer and the data. Raises RunError where a resumed run's are not what it began with."""
    leads = training.rank.local == 0
    base = world.after_the_first_here(lambda: find_base(training.recipe), name="base", leads=leads)
    inputs = world.after_the_first_here(lambda: read_inputs(training, base), name="data", leads=leads)
    require_same_data(training, inputs.record)
    require_same_adapters(training, base)
    inputs.record.write(training)
    if training.rank.leads:
        began = training.run.state().lineage
        training.run.update(lineage={**began, **base.lineage(), "data": inputs.record.fingerprint})
    return base, inputs


def _answered_too(
    training: Training, base: Base, policy: Policy, reference: Reference | None, inputs: Inputs, budget: Budget
) -> Evaluation:
    """The usual evaluation, and answers to its questions."""
    from tunedock.train.predictions import with_answers  # what scores them takes a second to load, and few runs do

    recipe, emit, validation = training.recipe, training.emit, inputs.validation
    objective, check = make_objective(recipe.objective), stopping(training.stop.asked)
    usual = objective_on(validation, objective, policy, reference, policy.rows, budget, emit, check)
    facts = inputs.record.chat_facts(recipe.data.system)
    return with_answers(usual, recipe, base, facts, policy, validation, emit, training.pulse, check)


def _go_on(training: Training, ready: _Ready, checkpoints: Checkpoints) -> None:
    """From the last checkpoint of a resumed run. A collective call."""
    emit, loop = training.emit, ready.loop
    snapshot = shared(_last(checkpoints, emit) if training.resume and training.rank.leads else None)
    if ready.reference is not None:
        ask_reference(
            ready.reference,
            training.recipe,
            ready.policy,
            ready.feed,
            ready.inputs.validation,
            ready.budget,
            snapshot,
            emit,
        )
    if snapshot is not None:
        loop.state.restore(snapshot)
        emit.note(f"resumed at step {snapshot.step}", step=snapshot.step)
        if isinstance(ready.feed, StreamFeed):
            ready.feed.tell_place(emit)
    if training.token_budget is not None:
        why = "memory ran out, and the run was started again"
        ready.budget.lower_to(loop.progress.step, training.token_budget, why)


def _last(checkpoints: Checkpoints, emit: Emitter) -> Snapshot | None:
    if checkpoints.untouched():
        emit.note("the run has no checkpoint yet, so it begins at its first step")
        return None
    return checkpoints.load_last(lambda name, why: emit.warning(f"{name} is damaged and passed over: {why}"))


def _require_time_to_save(training: Training, policy: Policy) -> None:
    """Before the first step, while the states of the optimizer are still to come. A run that has begun keeps its recipe: it is
    warned."""
    recipe = training.recipe
    if recipe.train.save_strategy == "no":
        return
    trained = sum(whole_size(p) for _, p in policy.trainable)
    states = int(trained * optimizer_bytes(recipe.train.optim, recipe.train.optim_args))
    weights = sum(whole_size(p) * p.element_size() for _, p in policy.trainable)
    try:
        require_time_to_save(training.run.checkpoints, weights + states, recipe.launch.grace_s)
    except RecipeError as error:
        if not training.resume:
            raise
        training.emit.warning(error.message, where=error.where, hint=error.hint)


def _run(training: Training, ready: _Ready, checkpoints: Checkpoints) -> dict[str, Any]:
    """The steps, and the result they leave. A collective call."""
    run, recipe, loop = training.run, training.recipe, ready.loop
    with following(run, recipe, training.emit) if training.rank.leads else nullcontext() as trackers:
        with _board(run, recipe), training.stop.deferred():
            try:
                if is_sharded(ready.policy.model):
                    _rehearse(recipe, ready)
                settle_compiling(
                    recipe.train.torch_compile,
                    run,
                    ready.policy,
                    loop,
                    resume=training.resume,
                    emit=training.emit,
                )
                loop.run()
            except InterruptedRun:
                draw(run)
                raise
        result = write_result(training, ready.base, ready.policy, loop, checkpoints, ready.inputs.record)
        if training.rank.leads:
            draw(run)
            account_for_stream(training, ready.inputs)
            if trackers is not None:
                trackers.result = result
    return result


def _rehearse(recipe: Recipe, ready: _Ready) -> None:
    """The largest row of a sharded model, its optimizer's states counted in."""
    step, feed = ready.loop.progress.step, ready.feed
    if isinstance(feed, StoreFeed):
        sample = feed.samples[int(feed.samples.lengths.argmax())]
    else:
        sample = max(feed.step(step), key=lambda one: one.longest_path)
    to_come = 0 if step else states_to_come(recipe, ready.policy)
    rehearse_largest_row(ready.policy, ready.loop, sample, ready.budget.begin(step), to_come_bytes=to_come)


def _board(run: Run, recipe: Recipe) -> AbstractContextManager[Any]:
    """TensorBoard's files, written along with the events, when the recipe reports to it."""
    if "tensorboard" not in recipe.train.report_to or world.rank():
        return nullcontext()
    from tunedock.train.tensorboard import TensorBoard  # where it is asked for: it takes time to load

    return TensorBoard(run.path / "tensorboard", run.events)
