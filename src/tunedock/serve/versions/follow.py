"""What may change while a gateway serves: versions of a registry, and adapters in folders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunedock.errors import RecipeError
from tunedock.events import Emitter
from tunedock.recipe.serving import ServeOrder
from tunedock.serve.cold import ColdStart
from tunedock.serve.loading import load
from tunedock.serve.metrics import Metrics
from tunedock.serve.models import Models, Served
from tunedock.serve.versions.adapters import Adapters

if TYPE_CHECKING:
    from tunedock.serve.versions.watch import Watch


@dataclass(slots=True)
class Follow:
    adapters: Adapters
    versions: Watch | None
    emit: Emitter
    models: Models | None = None

    def begin(self, models: Models, metrics: Metrics) -> None:
        self.models = models
        if self.versions is not None:
            self.versions.begin(models, metrics)

    def look_again(self) -> None:
        """By the thread of the stage, after SIGHUP."""
        if self.models is not None:
            self.adapters.reload(self.models, self.emit)
        if self.versions is not None:
            self.versions.look_again()

    def at_work(self) -> bool:
        return self.versions is not None and self.versions.at_work()

    def close(self) -> None:
        if self.versions is not None:
            self.versions.close()


def loaded(order: ServeOrder, emit: Emitter, cold: ColdStart | None = None) -> tuple[Follow, list[Served]]:
    """Everything an order names, and what is to be followed of it. Raises what loading a model raises."""
    names = [name for backend in order.backends for name in (backend.name, *backend.adapters)]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise RecipeError(f"two models are called `{double}`", where="serve", hint="name one: `other=PATH`")
    fixed = [backend for backend in order.backends if backend.kind != "version"]
    moving = [backend for backend in order.backends if backend.kind == "version"]
    versions, cold = None, cold or ColdStart()
    if moving:
        from tunedock.serve.versions.watch import Watch  # MLflow's client, where it is needed

        versions = Watch(order, moving, emit)
    served = load(order.model_copy(update={"backends": fixed}), emit.note, emit.warning, cold)
    with cold.of("weights"):
        served += versions.first() if versions is not None else []
    return Follow(Adapters(order), versions, emit), served
