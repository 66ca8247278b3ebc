"""What of a memory plan each device holds, where several divide it: ZeRO's three stages, the last of which is FSDP's too.

Stage 1 divides the optimizer's states, 2 the gradients too, 3 the weights too, of which a few layers at a time stand gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

from tunedock.plan.memory import MemoryPlan

SHARED_FROM = MappingProxyType(
    {"optimizer": 1, "gradients": 2, "base weights": 3, "adapter weights": 3, "reference copy": 3}
)
"""Part of a plan -> the stage that divides it."""

GATHERED_LAYERS = 2
"""Layers whose weights stand whole at once: the one that is computed and the next, which is fetched meanwhile."""

OFFLOADED = ("optimizer", "gradients", "base weights", "adapter weights")
"""What may lie in main memory; the first alone, or all."""

STAGES = MappingProxyType({"alone": 0, "ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3})
"""`parallel` -> the stage."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How what is held is divided."""

    zero: int = 0
    offload: bool = False
    """Optimizer states in main memory."""
    offload_all: bool = False
    """Weights and gradients too."""

    @classmethod
    def by(cls, parallel: str, offload: str) -> Spread:
        """As a recipe says it. FSDP2 divides what ZeRO's third stage does."""
        return cls(STAGES[parallel], offload != "none", offload == "all")


WHOLE = Spread()


def divided(plan: MemoryPlan, spread: Spread, *, devices: int, layers: int) -> tuple[MemoryPlan, int]:
    """(what one device holds, bytes that all devices together keep in main memory). `layers`: of the model."""
    parts = dict(plan.parts)
    gathered = GATHERED_LAYERS * parts["base weights"] // max(layers, 1)
    for part, stage in SHARED_FROM.items():
        if spread.zero >= stage and part in parts:
            parts[part] = -(-parts[part] // devices)
    if spread.zero >= 3:
        parts["gathered layers"] = gathered
    host = 0
    for part in OFFLOADED if spread.offload_all else OFFLOADED[:1] if spread.offload else ():
        host += parts.pop(part) * devices
    return replace(plan, parts=parts), host
