"""Rules about what is trained and what stays as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tunedock.recipe.adapters import Freeze, Lora, leaves_the_base
from tunedock.recipe.rule import Rule

ADAPTER_RULES: tuple[Rule, ...] = (
    Rule(
        name="freeze-names-nothing",
        keys=("adapter.kind",),
        broken=lambda r: (
            isinstance(r.adapter, Freeze)
            and r.adapter.last_n_layers is None
            and r.adapter.first_n_layers is None
            and not r.adapter.trainable_modules
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
    Rule(
        name="modules-of-no-layers",
        keys=("adapter.layer_modules",),
        broken=lambda r: (
            isinstance(r.adapter, Freeze)
            and bool(r.adapter.layer_modules)
            and r.adapter.last_n_layers is None
            and r.adapter.first_n_layers is None
        ),
        message="`adapter.layer_modules` chooses among the first or last layers, and none are named",
        hint="give `adapter.last_n_layers` or `first_n_layers`; `adapter.trainable_modules` names parameters of any place",
    ),
    Rule(
        name="start-in-quantized-weights",
        keys=("adapter.init_lora_weights", "quantize"),
        broken=lambda r: isinstance(r.adapter, Lora) and leaves_the_base(r.adapter) and r.quantize != "none",
        message="this start takes its part out of the base's weights, and quantised ones cannot give it exactly",
        hint="leave `adapter.init_lora_weights` out, or use `quantize: none`",
    ),
    Rule(
        name="dora-on-eight-bits",
        keys=("adapter.use_dora", "quantize"),
        broken=lambda r: isinstance(r.adapter, Lora) and r.adapter.use_dora and r.quantize in ("fp8", "int8"),
        message="DoRA needs the lengths of the base's weights, and PEFT does not read those of eight bits everywhere",
        hint="use `quantize: nf4`, or drop `adapter.use_dora`",
    ),
    Rule(
        name="layers-need-names",
        keys=("adapter.layers_to_transform", "adapter.target_modules"),
        broken=lambda r: (
            isinstance(r.adapter, Lora)
            and r.adapter.layers_to_transform is not None
            and isinstance(r.adapter.target_modules, str)
        ),
        message="`adapter.layers_to_transform` needs `adapter.target_modules` as a list of names",
        hint="write the names, `[q_proj, v_proj]`, or the layers into the expression: `.*layers\\.[0-3]\\..*_proj`",
    ),
    Rule(
        name="starts-twice",
        keys=("adapter.init_lora_weights", "adapter.continue_from"),
        broken=lambda r: (
            isinstance(r.adapter, Lora)
            and r.adapter.continue_from is not None
            and r.adapter.init_lora_weights is not True
        ),
        message="an adapter that is gone on with starts as it is",
        hint="drop `adapter.init_lora_weights`, or `adapter.continue_from`",
    ),
    Rule(
        name="adapters-into-quantized-weights",
        keys=("model.adapters", "quantize"),
        broken=lambda r: bool(r.model.adapters) and r.quantize in ("nf4", "int8"),
        message="adapters are merged into whole weights, and these are quantised as they are read",
        hint="merge them first and give the merged folder as `model`, or use `quantize: fp8`",
    ),
    Rule(
        name="adapters-into-random-weights",
        keys=("model.adapters", "model.init"),
        broken=lambda r: bool(r.model.adapters) and r.model.init == "random",
        message="an adapter on random weights says nothing",
        hint="drop `model.adapters`, or `model.init: random`",
    ),
    Rule(
        name="expression-cannot-be-read",
        keys=("adapter.target_modules", "adapter.kind"),
        broken=lambda r: isinstance(r.adapter, Lora) and not all(_reads(text) for text in _expressions(r.adapter)),
        message="an expression for names of modules cannot be read",
        hint="`target_modules` and `exclude_modules` as one text, and all names in `rank_pattern`, `alpha_pattern` and "
        "`modules_to_save`, are regular expressions of Python",
    ),
    Rule(
        name="token-named-twice",
        keys=("model.add_tokens", "model.add_special_tokens"),
        broken=lambda r: _doubtful([*r.model.add_tokens, *r.model.add_special_tokens]),
        message="a new token is a text that is not empty, and is named once",
        hint="take out what is empty or named twice",
    ),
)


def _expressions(lora: Lora) -> Iterator[str]:
    """What PEFT reads as regular expressions."""
    yield from (text for text in (lora.target_modules, lora.exclude_modules) if isinstance(text, str))
    yield from (*lora.rank_pattern, *lora.alpha_pattern, *lora.modules_to_save)


def _reads(expression: str) -> bool:
    try:
        re.compile(expression)
    except re.error:
        return False
    return True


def _doubtful(tokens: list[str]) -> bool:
    return len(set(tokens)) < len(tokens) or any(not token.strip() for token in tokens)
