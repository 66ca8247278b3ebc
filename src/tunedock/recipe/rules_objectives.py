"""Rules about objectives and what they learn from."""

from __future__ import annotations

from tunedock.recipe.objectives.preference import Dpo
from tunedock.recipe.rule import Rule

OBJECTIVE_RULES: tuple[Rule, ...] = (
    Rule(
        name="pretrain-train-on",
        keys=("data.train_on", "objective.kind"),
        broken=lambda r: r.objective.kind == "pretrain" and r.data.train_on != "assistant",
        message="`data.train_on` chooses turns of a conversation; `objective: pretrain` trains every token of its text",
        hint="drop `data.train_on`, or use `objective: sft`",
    ),
    Rule(
        name="pretrain-system",
        keys=("data.system", "objective.kind"),
        broken=lambda r: r.objective.kind == "pretrain" and r.data.system is not None,
        message="plain text has no system prompt, so `objective: pretrain` cannot use `data.system`",
        hint="drop `data.system`, or use `objective: sft`",
    ),
    Rule(
        name="dpo-train-on",
        keys=("data.train_on", "objective.kind"),
        broken=lambda r: r.objective.kind == "dpo" and r.data.train_on != "assistant",
        message="`data.train_on` chooses turns of a conversation; `objective: dpo` compares the two completions whole",
        hint="drop `data.train_on`, or use `objective: sft`",
    ),
    Rule(
        name="dpo-on-random-weights",
        keys=("objective.kind", "model.init"),
        broken=lambda r: r.objective.kind == "dpo" and r.model.init == "random",
        message="`objective: dpo` moves a model that answers towards the better answers; random weights give none",
        hint="train with `objective: sft` first and give its export as `model`, or drop `model.init: random`",
    ),
    Rule(
        name="precompute-a-stream",
        keys=("objective.precompute_ref_log_probs", "data.streaming"),
        broken=lambda r: isinstance(r.objective, Dpo) and r.objective.precompute_ref_log_probs and r.data.streaming,
        message="`objective.precompute_ref_log_probs` reads all rows before the first step, and a stream has no end",
        hint="drop one of the two; what the reference said of a row is remembered either way",
    ),
)
