"""What the first rank has read, given to all, and what all of them hold, put together on the first."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tunedock.model import world
from tunedock.model.adapter import load_trainable_state
from tunedock.model.load import CPU
from tunedock.model.policy import VALUE_HEAD, Policy
from tunedock.model.session import Base, trainable_model
from tunedock.model.sharding import is_sharded
from tunedock.train.checkpoint import Snapshot
from tunedock.train.optimizer import Updater


def shared(snapshot: Snapshot | None) -> Snapshot | None:
    """The first rank's snapshot, on all; None where it has none. Trained weights and the optimizer's tensors stay with the first:
    an updater hands them out as it takes them (`load_trained`, `restore`)."""
    if not world.together():
        return snapshot
    told = world.told_by_first(None if snapshot is None else {"step": snapshot.step, "state": snapshot.state})
    if told is None:
        return None
    mine = snapshot or Snapshot(told["step"], {}, {}, told["state"], {})
    for name in ("random", "reference", "feed"):
        setattr(mine, name, dict(world.tensors_of_first(getattr(mine, name))))
    return mine


def whole_model(
    base: Base, policy: Policy, updater: Updater, *, began: Mapping[str, Tensor] | None
) -> nn.Module | None:
    """The trained model as it is saved, on the first rank; None on the others. A collective call.

    One whose weights are sharded is made again on the CPU, as it was before it was spread, with the trained weights put in.
    """
    if not is_sharded(policy.model):
        policy.drop_value_head()
        return policy.model if world.rank() == 0 else None
    trained = updater.trained_state()
    if world.rank():
        return None
    model = trainable_model(base, policy.precision, CPU, began=began)
    load_trainable_state(model, {name: of for name, of in trained.items() if not name.startswith(f"{VALUE_HEAD}.")})
    return model
