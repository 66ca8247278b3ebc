"""What a finished training leaves: the weights in the run's `model` folder, its curves, and the figures of its result."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from torch import nn

from tunedock.errors import DiskError
from tunedock.events import EventReader
from tunedock.model import adapter as adapters
from tunedock.model import world
from tunedock.model.policy import Policy
from tunedock.model.session import Base, write_beneath
from tunedock.run.record import Run
from tunedock.train.beginning import beginning
from tunedock.train.checkpoint import Checkpoints, Snapshot
from tunedock.train.data_record import DataRecord
from tunedock.train.loop import Loop
from tunedock.train.parallel.shared import shared, whole_model
from tunedock.train.training import Training


def write_result(
    training: Training, base: Base, policy: Policy, loop: Loop, checkpoints: Checkpoints, record: DataRecord
) -> dict[str, Any]:
    """Writes the best checkpoint's weights when the recipe says so, else the last; returns the stage's result. A collective
    call."""
    run, progress = training.run, loop.progress
    training.pulse.at(progress.step, "result", patient=True)
    used = _take_best(training, loop, checkpoints)
    model = whole_model(base, policy, loop.updater, began=beginning(run))
    if model is not None:
        _write(training, base, model, record)
    return {
        "run": str(run.path),
        "steps": progress.step,
        "tokens": progress.tokens,
        "eval_loss": progress.best_loss if used == "best" else progress.last_eval,
        f"best_{training.recipe.train.metric_for_best_model}": progress.best,
        "weights": used,
        "model": str(run.model),
        "skipped_steps": progress.skipped + progress.left_out.steps,
    }


def draw(run: Run) -> None:
    """The curves so far. What draws is loaded when there is something to draw: matplotlib alone would be a tenth of the time to the
    first step."""
    if world.rank():
        return
    from tunedock.train.plot import plot_losses

    plot_losses(EventReader(run.events).new(), run.path / "plots", run.name)


def _take_best(training: Training, loop: Loop, checkpoints: Checkpoints) -> str:
    """Puts the best checkpoint's weights in where they are to be the result; which they are, `best` or `last`."""
    best: Snapshot | None = None
    if world.rank() == 0 and training.recipe.train.load_best_model_at_end:
        index = checkpoints.index()
        damage = checkpoints.damage(index.best) if index.best and index.best != index.last else None
        if damage:
            training.emit.warning(
                f"the best checkpoint is damaged, so the last one's weights are kept: {damage}", where=index.best
            )
        elif index.best and index.best != index.last:
            best = checkpoints.load(index.best)
    if (snapshot := shared(best)) is None:
        return "last"
    loop.state.take_weights(snapshot)
    return "best"


def _write(training: Training, base: Base, model: nn.Module, record: DataRecord) -> None:
    run, recipe = training.run, training.recipe
    try:
        adapters.save(model, run.model, adapter=recipe.adapter, began=beginning(run))
        write_beneath(base, run.model)
        base.tokenizer.save_pretrained(run.model)
        record.chat_facts(recipe.data.system).write(run.model)
    except (OSError, SafetensorError) as error:
        raise DiskError(
            f"the result cannot be written: {getattr(error, 'strerror', None) or error}",
            where=str(run.model),
            hint=f"free disk space, then `tunedock train --resume {run.path}`",
        ) from error
