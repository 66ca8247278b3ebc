"""Rules about what is trained and what stays as it is."""

from __future__ import annotations

from tunedock.recipe.adapters import Freeze
from tunedock.recipe.rule import Rule

ADAPTER_RULES: tuple[Rule, ...] = (
    Rule(
        name="freeze-names-nothing",
        keys=("adapter.kind",),
        broken=lambda r: (
            isinstance(r.adapter, Freeze) and r.adapter.last_n_layers is None and not r.adapter.trainable_modules
        ),
        message="`adapter.kind: freeze` freezes everything, so nothing would train",
        hint="say what trains: `adapter.last_n_layers: 2`, or `adapter.trainable_modules: [norm]`",
    ),
    Rule(
        name="lora-on-random-weights",
        keys=("adapter.kind", "model.init"),
        broken=lambda r: r.adapter.kind == "lora" and r.model.init == "random",
        message="a LoRA on random weights trains nothing useful",
        hint="use `adapter: full`, or drop `model.init: random`",
    ),
    Rule(
        name="freeze-on-random-weights",
        keys=("adapter.kind", "model.init"),
        broken=lambda r: r.adapter.kind == "freeze" and r.model.init == "random",
        message="random weights that stay frozen learn nothing",
        hint="use `adapter: full`, or drop `model.init: random`",
    ),
    Rule(
        name="quantized-weights-do-not-train",
        keys=("quantize", "adapter.kind"),
        broken=lambda r: r.quantize != "none" and r.adapter.kind != "lora",
        message="quantized weights stay as they are, and without a LoRA they are what would train",
        hint="use `adapter: lora`, or `quantize: none`",
    ),
)
