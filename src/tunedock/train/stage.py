"""The `train` stage: data, model and loop put together, and what the run directory keeps of it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn

from tunedock.data import prepare as preparing
from tunedock.data.sample import Sample
from tunedock.errors import DiskError, InterruptedRun, RecipeError, RunError
from tunedock.events import Emitter, EventReader
from tunedock.model import adapter as adapters
from tunedock.model import world
from tunedock.model.adapter import parameter_counts
from tunedock.model.policy import Policy
from tunedock.model.quantize import quantised
from tunedock.model.reference import Reference, starts_at_zero
from tunedock.model.session import Base, ChatFacts, find_base, trainable_policy, write_beneath
from tunedock.model.sharding import is_sharded
from tunedock.objective.registry import make as make_objective
from tunedock.plan.memory import readable
from tunedock.plan.optimizer_memory import optimizer_bytes
from tunedock.plan.steps import plan_steps, rollouts_of
from tunedock.recipe.adapters import Lora
from tunedock.recipe.objectives.preference import Dpo
from tunedock.recipe.objectives.rollout import Rollout
from tunedock.recipe.schema import Recipe
from tunedock.run.pulse import Pulse
from tunedock.run.ranks import Rank
from tunedock.run.record import Run, read_json, write_json
from tunedock.run.stop import StopRequest
from tunedock.train.beginning import beginning, keep_beginning
from tunedock.train.budget import Budget
from tunedock.train.checkpoint import Checkpoints, Snapshot
from tunedock.train.estimate import estimate_seconds
from tunedock.train.evaluation import Evaluation, objective_on, stopping
from tunedock.train.feed import Feed, StoreFeed
from tunedock.train.grace import Grace, require_time_to_save
from tunedock.train.loop import Course, Loop, Progress
from tunedock.train.machine import hardware, versions
from tunedock.train.optimizer import Updater, make_updater
from tunedock.train.optimizer_names import require_optimizer
from tunedock.train.parallel.shared import shared, whole_model
from tunedock.train.parallel.spread import Way, shard_weights, shards_weights, spread_updater, way_of
from tunedock.train.planning import make_budget
from tunedock.train.random_states import seed_rank
from tunedock.train.rehearsal import rehearse_largest_row, settle_compiling
from tunedock.train.rollout_stage import make_rollouts
from tunedock.train.stream import StreamFeed, streamed_data
from tunedock.train.tracker_kinds import require as require_trackers
from tunedock.train.trackers import following


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
    with world.joined(timeout_s=recipe.launch.group_timeout_s, pulse=pulse) as rank:
        return _train(run, recipe, emit, rank, resume=resume, stop=stop, token_budget=token_budget, pulse=pulse)


def _train(
    run: Run,
    recipe: Recipe,
    emit: Emitter,
    rank: Rank,
    *,
    resume: bool,
    stop: StopRequest,
    token_budget: int | None,
    pulse: Pulse | None,
) -> dict[str, Any]:
    require_optimizer(recipe.train)
    require_trackers(recipe)
    checkpoints = Checkpoints(run.checkpoints, keep=recipe.train.save_total_limit)
    if rank.leads:
        checkpoints.sweep()
    if not resume and checkpoints.names():
        raise RunError(
            "this run has checkpoints already",
            where=str(run.path),
            hint=f"`tunedock train --resume {run.path}` goes on with it",
        )
    if rank.leads:
        write_json(run.path / "environment.json", {"versions": versions(), "hardware": hardware()})
    leads = rank.local == 0
    base = world.after_the_first_here(lambda: find_base(recipe), name="base", leads=leads)
    feed, validation, about = world.after_the_first_here(lambda: _data(base, recipe, emit), name="data", leads=leads)
    _same_data(run, about, resume, emit)
    course = _course(recipe, about)
    section = recipe.objective if isinstance(recipe.objective, Rollout) else None
    longest = int(feed.samples.lengths.max()) if isinstance(feed, StoreFeed) else recipe.data.max_length
    longest += section.max_new_tokens if section is not None else 0
    way = way_of(recipe, base, longest_path=longest)
    policy = trainable_policy(base, began=beginning(run) if resume else None, spread=shards_weights(way))
    if rank.leads:
        keep_beginning(run, base, policy.model, resume=resume)
    counts, at_zero = parameter_counts(policy.model), starts_at_zero(policy)
    _tell_new_tokens(base, policy, emit)
    if (narrow := quantised(policy.model)) is not None:
        how = "products are made in it" if narrow.products else "widened for each product: less memory, not less time"
        emit.note(
            f"base in {recipe.quantize}: {narrow.layers} linear layers, {readable(narrow.size_bytes)}; {how}",
            **asdict(narrow),
        )
    torch.manual_seed(recipe.train.seed)
    random.seed(recipe.train.seed)  # a package may draw from these two; a checkpoint keeps their states
    np.random.seed(recipe.train.seed)
    values = section is not None and section.kind == "ppo"
    updater: Updater | None = None
    if shards_weights(way):  # then what is called from here on is the sharded model
        if values:
            policy.add_value_head()
        shard_weights(policy, way, recipe)
        updater = _updater(recipe, policy, course, way)
    for given_up in policy.probe():
        emit.warning(given_up, where=str(base.located.folder))
    generates = base.head == "logprobs" and not base.chat.documents
    if generates and not base.chat.engine_renders(thinking=about["thinking"]):
        emit.warning(
            "no outside engine renders the prompts this model is trained on: its template cannot be told to leave the thinking out",
            where="chat template",
            hint="`tunedock chat` and `tunedock eval` render them; for other engines, train on answers with reasoning",
        )
    _same_adapters(run, base, resume)
    if rank.leads:
        run.update(lineage={**base.lineage(), "data": about["fingerprint"]})
    needed = make_objective(recipe.objective).needs_reference if section is None else section.needs_reference
    # Before the budget, which counts what is held already.
    reference = Reference.of(policy, at_zero=at_zero) if needed else None
    budget = make_budget(run, recipe, policy, way=way, longest_path=longest, resume=resume, emit=emit)
    evaluation, rollouts = None, None
    if values and (updater is None or policy.head != "chosen"):
        policy.add_value_head()
    if section is not None and isinstance(feed, StoreFeed):
        rollouts = make_rollouts(run, recipe, section, base, policy, reference, budget, emit, stop)
        feed, evaluation = rollouts.feed(feed.samples), rollouts.evaluation(validation)
    if recipe.train.predict_with_generate:
        evaluation = _answered_too(recipe, base, policy, reference, validation, budget, about, emit, stop, pulse)
    updater = updater or _updater(recipe, policy, course, way)
    _announce(recipe, policy, course, about, budget.record[-1].tokens, counts, emit)
    if rank.world > 1:
        emit.note(f"{rank.world} processes train together: {way}", parallel=way, ranks=rank.world)
        seed_rank(recipe.train.seed)
    loop = _loop(
        recipe, policy, reference, feed, validation, course, budget, updater, checkpoints, emit, stop, evaluation, pulse
    )
    snapshot = shared(_last(checkpoints, emit) if resume and rank.leads else None)
    if reference is not None:
        _ask_reference(reference, recipe, policy, feed, validation, budget, snapshot, emit)
    if snapshot is not None:
        loop.restore(snapshot)
        emit.note(f"resumed at step {snapshot.step}", step=snapshot.step)
        if isinstance(feed, StreamFeed):
            feed.tell_place(emit)
    if token_budget is not None:
        budget.lower_to(loop.progress.step, token_budget, "memory ran out, and the run was started again")
    if rank.leads:
        _require_time_to_save(run, recipe, policy, resume, emit)
    with following(run, recipe, emit) if rank.leads else nullcontext() as trackers:
        with _board(run, recipe), stop.deferred(), rollouts or nullcontext():
            try:
                if is_sharded(policy.model):
                    _rehearse(policy, loop, recipe, feed, budget)
                settle_compiling(recipe.train.torch_compile, run, policy, loop, resume=resume, emit=emit)
                progress = loop.run()
            except InterruptedRun:
                _draw(run)
                raise
        if pulse is not None:
            pulse.at(progress.step, "result", patient=True)
        result = _finish(run, recipe, base, policy, loop, checkpoints, progress, about, emit)
        if not rank.leads:
            return result
        _draw(run)
        if isinstance(feed, StreamFeed) and not resume:  # a resumed stream has counted only the rows since
            about["account"] = feed.account.to_json()
            write_json(run.path / "data.json", about)
            feed.account.verify(recipe.data.max_dropped, recipe.data.over_length)
        if trackers is not None:
            trackers.result = result
    return result


def _last(checkpoints: Checkpoints, emit: Emitter) -> Snapshot | None:
    if checkpoints.untouched():
        emit.note("the run has no checkpoint yet, so it begins at its first step")
        return None
    return checkpoints.load_last(lambda name, why: emit.warning(f"{name} is damaged and passed over: {why}"))


# What draws is loaded when there is something to draw: matplotlib alone would be a tenth of the time to the first step.


def _draw(run: Run) -> None:
    if world.rank():
        return
    from tunedock.train.plot import plot_losses

    plot_losses(EventReader(run.events).new(), run.path / "plots", run.name)


def _board(run: Run, recipe: Recipe) -> AbstractContextManager[Any]:
    """TensorBoard's files, written along with the events, when the recipe reports to it."""
    if "tensorboard" not in recipe.train.report_to or world.rank():
        return nullcontext()
    from tunedock.train.tensorboard import TensorBoard

    return TensorBoard(run.path / "tensorboard", run.events)


def _tell_new_tokens(base: Base, policy: Policy, emit: Emitter) -> None:
    made = base.new_tokens
    if made.known:
        emit.note(f"tokens the model has already, so that none is made: {', '.join(map(repr, made.known))}")
    if made.ids:
        rows = int(policy.config.get_text_config().vocab_size)
        emit.note(
            f"{len(made.ids)} new tokens, ids {made.ids[0]} to {made.ids[-1]}, in a vocabulary of {rows:,}; rows it lacked are "
            "drawn around the mean of the others",
            ids=list(made.ids),
            vocabulary=rows,
        )


def _data(base: Base, recipe: Recipe, emit: Emitter) -> tuple[Feed, Sequence[Sample], dict[str, Any]]:
    """The feed, the validation samples, and what `data.json` says of them."""
    batch_size = recipe.train.batch_size
    if batch_size is None:
        raise ValueError("train.batch_size is filled in by recipe.resolve")
    if recipe.data.streaming:
        return streamed_data(base, recipe, batch_size, emit)
    prepared = preparing.prepare(recipe, base.chat, emit)
    prepared.account.verify(recipe.data.max_dropped, recipe.data.over_length)
    sides = prepared.summary()
    training = prepared.side("train")
    account = prepared.account
    emit.note(
        f"data: {account.read} rows read, {account.kept} kept, {account.dropped} dropped"
        + (f" ({', '.join(f'{k} {v}' for k, v in account.reasons.items())})" if account.dropped else "")
        + (", from the cache" if prepared.from_cache else ""),
        **{key: value for key, value in account.to_json().items() if key not in ("drops", "cuts")},
    )
    about = {
        "fingerprint": prepared.fingerprint,
        "files": prepared.files,
        "account": account.to_json(),
        "sides": sides,
        "stop_ids": sorted(prepared.stop_ids),
        "thinking": recipe.objective.thinking if isinstance(recipe.objective, Rollout) else prepared.thinking,
        "samples": len(training),
        "mean_tokens": float(training.lengths.mean()),
        "mean_trained": float(training.trained.mean()),
    }
    return StoreFeed(training, batch_size=batch_size, seed=recipe.train.seed), prepared.side("validation"), about


def _same_adapters(run: Run, base: Base, resume: bool) -> None:
    """When resuming, refuses adapters beneath that are not what the run began with."""
    before, now = run.state().lineage.get("adapters", {}), base.lineage().get("adapters", {})
    if resume and before and before != now:
        raise RunError(
            "an adapter that is merged into the weights is not what this run began with",
            where=", ".join(path for path, digest in before.items() if now.get(path) != digest),
            hint="put its files back as they were, or start a new run",
        )


def _same_data(run: Run, about: dict[str, Any], resume: bool, emit: Emitter) -> None:
    """Writes `data.json`; when resuming, refuses data that is not what the run began with."""
    path = run.path / "data.json"
    if resume and path.is_file():
        before = read_json(path)
        changed = [name for name, digest in about["files"].items() if before["files"].get(name) != digest]
        if changed or before["samples"] != about["samples"]:
            raise RunError(
                "the data is not what this run began with",
                where=", ".join(changed) or f"{before['samples']} samples then, {about['samples']} now",
                hint="put the files back as they were, or start a new run",
            )
        if before["fingerprint"] != about["fingerprint"]:
            emit.warning(
                "the same files no longer give the same tokens: the tokenizer, its chat template or a version has changed "
                "since this run began",
                where=str(path),
                hint="environment.json names the versions it was resumed with last; a new run is exact again",
            )
    if world.rank() == 0:
        write_json(path, about)


def _course(recipe: Recipe, about: dict[str, Any]) -> Course:
    train_ = recipe.train
    if isinstance(recipe.objective, Rollout):
        rounds = rollouts_of(recipe, recipe.objective, about["samples"])
        return Course(rounds.total_steps, rounds.steps_per_epoch, rounds.total_steps * (train_.batch_size or 1))
    if about["samples"] is None:
        return Course(train_.max_steps, None, train_.max_steps * (train_.batch_size or 1))
    plan = plan_steps(about["samples"], train_.batch_size or 1, train_.num_train_epochs, train_.max_steps)
    return Course(plan.total_steps, plan.steps_per_epoch, plan.examples_seen)


def _updater(recipe: Recipe, policy: Policy, course: Course, way: Way) -> Updater:
    plain = make_updater(
        policy.trainable,
        recipe.train,
        total_steps=course.total_steps,
        device=policy.device,
        model=policy.model,
        loraplus_lr_ratio=recipe.adapter.loraplus_lr_ratio if isinstance(recipe.adapter, Lora) else None,
    )
    return spread_updater(plain, policy, way, recipe)


def _loop(
    recipe: Recipe,
    policy: Policy,
    reference: Reference | None,
    feed: Feed,
    validation: Sequence[Sample],
    course: Course,
    budget: Budget,
    updater: Updater,
    checkpoints: Checkpoints,
    emit: Emitter,
    stop: StopRequest,
    evaluation: Evaluation | None,
    pulse: Pulse | None,
) -> Loop:
    return Loop(
        policy=policy,
        objective=make_objective(recipe.objective),
        reference=reference,
        feed=feed,
        validation=validation,
        layout=policy.rows,
        budget=budget,
        updater=updater,
        checkpoints=checkpoints,
        course=course,
        train=recipe.train,
        emit=emit,
        stop_requested=stop.asked,
        evaluation=evaluation,
        pulse=pulse,
        grace=Grace(recipe.launch.grace_s, partial(stop.left_s, recipe.launch.grace_s), emit),
    )


def _answered_too(
    recipe: Recipe,
    base: Base,
    policy: Policy,
    reference: Reference | None,
    validation: Sequence[Sample],
    budget: Budget,
    about: dict[str, Any],
    emit: Emitter,
    stop: StopRequest,
    pulse: Pulse | None,
) -> Evaluation:
    """The usual evaluation, and answers to its questions."""
    from tunedock.train.predictions import with_answers  # what scores them takes a second to load, and few runs do

    objective, check = make_objective(recipe.objective), stopping(stop.asked)
    usual = objective_on(validation, objective, policy, reference, policy.rows, budget, emit, check)
    facts = ChatFacts(about["stop_ids"], about["thinking"], recipe.data.system)
    return with_answers(usual, recipe, base, facts, policy, validation, emit, pulse or Pulse(), check)


def _require_time_to_save(run: Run, recipe: Recipe, policy: Policy, resume: bool, emit: Emitter) -> None:
    """Before the first step, while the states of the optimizer are still to come. A run that has begun keeps its recipe: it is
    warned."""
    if recipe.train.save_strategy == "no":
        return
    trained = sum(p.numel() for _, p in policy.trainable)
    states = int(trained * optimizer_bytes(recipe.train.optim, recipe.train.optim_args))
    held = sum(p.numel() * p.element_size() for _, p in policy.trainable)
    try:
        require_time_to_save(run.checkpoints, held + states, recipe.launch.grace_s)
    except RecipeError as error:
        if not resume:
            raise
        emit.warning(error.message, where=error.where, hint=error.hint)


def _rehearse(policy: Policy, loop: Loop, recipe: Recipe, feed: Feed, budget: Budget) -> None:
    """The largest row of a sharded model, its optimizer's states counted in."""
    step = loop.progress.step
    seen = feed.samples if isinstance(feed, StoreFeed) else feed.step(step)
    at = int(feed.samples.lengths.argmax()) if isinstance(feed, StoreFeed) else 0
    sample = seen[at] if isinstance(feed, StoreFeed) else max(seen, key=lambda one: one.longest_path)
    held = sum(p.numel() for _, p in policy.trainable)  # of a sharded parameter, this rank's part
    states = int(held * optimizer_bytes(recipe.train.optim, recipe.train.optim_args))
    rehearse_largest_row(policy, loop, sample, budget.begin(step), to_come_bytes=0 if step else states)


def _ask_reference(
    reference: Reference,
    recipe: Recipe,
    policy: Policy,
    feed: Feed,
    validation: Sequence[Sample],
    budget: Budget,
    snapshot: Snapshot | None,
    emit: Emitter,
) -> None:
    """While the policy is as it began: takes over what a checkpoint remembers, asks about all rows if the recipe says so."""
    if snapshot is not None:
        reference.restore(snapshot.reference)
    kept = f"a copy of what is trained, {reference.kept_bytes / 2**20:,.1f} MiB" if reference.kept_bytes else ""
    if isinstance(recipe.objective, Dpo) and recipe.objective.precompute_ref_log_probs and isinstance(feed, StoreFeed):
        layout = partial(policy.rows, budget_tokens=budget.record[-1].tokens)
        for name, samples in (("reference", feed.samples), ("reference, validation", validation)):
            tell = partial(emit.progress, name, total=len(samples), unit="samples")
            reference.precompute(samples, layout, on_progress=tell)
        reference.let_go()
        kept = "asked about all rows before the first step"
    emit.note(f"reference policy: {kept or 'the base, with the adapter switched off'}", kept_bytes=reference.kept_bytes)


def _announce(
    recipe: Recipe,
    policy: Policy,
    course: Course,
    about: dict[str, Any],
    budget: int,
    counts: dict[str, Any],
    emit: Emitter,
) -> None:
    """Steps, tokens and an estimate of the time, before the first step."""
    if isinstance(recipe.objective, Rollout):
        _announce_rollouts(recipe.objective, policy, course, about, budget, counts, emit)
        return
    tokens = round(course.examples * about["mean_tokens"])
    trained = round(course.examples * about["mean_trained"])
    seconds = estimate_seconds(policy, tokens, trained, full=recipe.adapter.kind != "lora")
    parts = [f"{course.total_steps} steps"]
    if course.steps_per_epoch:
        parts[0] += f" ({course.steps_per_epoch} an epoch)"
    parts.append(f"batch {recipe.train.batch_size}")
    parts += [f"about {tokens:,} tokens", f"about {_duration(seconds)} (corrected as steps run)"]
    parts.append(f"{counts['trained']:,} of {counts['parameters']:,} parameters trained")
    parts.append(f"{policy.device.type} {str(policy.precision.compute).removeprefix('torch.')}")
    emit.note(
        "; ".join(parts),
        steps=course.total_steps,
        steps_per_epoch=course.steps_per_epoch,
        tokens=tokens,
        estimated_seconds=seconds,
        token_budget=budget,
        layout=policy.layout,
        head=policy.head,
        **counts,
    )


def _announce_rollouts(
    section: Rollout,
    policy: Policy,
    course: Course,
    about: dict[str, Any],
    budget: int,
    counts: dict[str, Any],
    emit: Emitter,
) -> None:
    """The same where nobody knows how long the answers will be."""
    rollouts = math.ceil(course.total_steps / (section.steps_per_generation * section.times))
    answers = course.examples // section.times
    most = round(answers * (about["mean_tokens"] / section.num_generations + section.max_new_tokens))
    emit.note(
        f"{course.total_steps} steps ({course.steps_per_epoch} an epoch) in {rollouts} rollouts; "
        f"{answers:,} answers, {section.num_generations} to a prompt, of {section.max_new_tokens} tokens at most; "
        f"{counts['trained']:,} of {counts['parameters']:,} parameters trained; "
        f"{policy.device.type} {str(policy.precision.compute).removeprefix('torch.')}",
        steps=course.total_steps,
        steps_per_epoch=course.steps_per_epoch,
        tokens=most,
        token_budget=budget,
        layout=policy.layout,
        head=policy.head,
        **counts,
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _take_best(recipe: Recipe, loop: Loop, checkpoints: Checkpoints, emit: Emitter) -> str:
    """Puts the best checkpoint's weights in where they are to be the result; which they are, `best` or `last`."""
    best: Snapshot | None = None
    if world.rank() == 0 and recipe.train.load_best_model_at_end:
        index = checkpoints.index()
        damage = checkpoints.damage(index.best) if index.best and index.best != index.last else None
        if damage:
            emit.warning(
                f"the best checkpoint is damaged, so the last one's weights are kept: {damage}", where=index.best
            )
        elif index.best and index.best != index.last:
            best = checkpoints.load(index.best)
    if (snapshot := shared(best)) is None:
        return "last"
    loop.take_weights(snapshot)
    return "best"


def _write_result(run: Run, recipe: Recipe, base: Base, model: nn.Module, about: dict[str, Any]) -> None:
    try:
        adapters.save(model, run.model, adapter=recipe.adapter, began=beginning(run))
        write_beneath(base, run.model)
        base.tokenizer.save_pretrained(run.model)
        ChatFacts(about["stop_ids"], about["thinking"], recipe.data.system).write(run.model)
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"the result cannot be written: {getattr(error, 'strerror', None) or error}",
            where=str(run.model),
            hint=f"free disk space, then `tunedock train --resume {run.path}`",
        ) from error


def _finish(
    run: Run,
    recipe: Recipe,
    base: Base,
    policy: Policy,
    loop: Loop,
    checkpoints: Checkpoints,
    progress: Progress,
    about: dict[str, Any],
    emit: Emitter,
) -> dict[str, Any]:
    """Writes the result: the best checkpoint's weights when the recipe says so, else the last."""
    used = _take_best(recipe, loop, checkpoints, emit)
    model = whole_model(base, policy, loop.updater, began=beginning(run))
    if model is not None:
        _write_result(run, recipe, base, model, about)
    return {
        "run": str(run.path),
        "steps": progress.step,
        "tokens": progress.tokens,
        "eval_loss": progress.best_loss if used == "best" else progress.last_eval,
        f"best_{recipe.train.metric_for_best_model}": progress.best,
        "weights": used,
        "model": str(run.model),
        "skipped_steps": progress.skipped + progress.left_out.steps,
    }
