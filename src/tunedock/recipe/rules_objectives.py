"""Rules about objectives and what they learn from."""

from __future__ import annotations

from tunedock.recipe.objectives.preference import SMOOTHED, Dpo, Kto
from tunedock.recipe.objectives.rollout import Grpo, Rloo, Rollout
from tunedock.recipe.rule import Rule
from tunedock.recipe.schema import Recipe


def _rollout(recipe: Recipe) -> Rollout | None:
    return recipe.objective if isinstance(recipe.objective, Rollout) else None


OBJECTIVE_RULES: tuple[Rule, ...] = (
    Rule(
        name="train-on-without-turns",
        keys=("data.train_on", "objective.kind"),
        broken=lambda r: r.objective.kind != "sft" and r.data.train_on != "assistant",
        message="`data.train_on` chooses turns of a conversation, and only `objective: sft` trains turns",
        hint="drop `data.train_on`, or use `objective: sft`",
    ),
    Rule(
        name="objective-on-random-weights",
        keys=("objective.kind", "model.init"),
        broken=lambda r: r.objective.kind not in ("sft", "pretrain") and r.model.init == "random",
        message="this objective starts from a model that can read and answer; random weights do neither",
        hint="train with `objective: sft` first and give its export as `model`, or drop `model.init: random`",
    ),
    Rule(
        name="cispo-without-a-bound",
        keys=("objective.loss_type", "objective.epsilon_high"),
        broken=lambda r: (
            isinstance(r.objective, Grpo) and r.objective.loss_type == "cispo" and r.objective.epsilon_high is None
        ),
        message="`cispo` cuts ratios at `objective.epsilon_high` itself, not at 1 plus it; `epsilon` in its place would cut all",
        hint="set `objective.epsilon_high: 5.0`",
    ),
    Rule(
        name="reward-range-upside-down",
        keys=("objective.reward_clip_range",),
        broken=lambda r: (
            isinstance(r.objective, Rloo)
            and r.objective.reward_clip_range is not None
            and r.objective.reward_clip_range[0] >= r.objective.reward_clip_range[1]
        ),
        message="`objective.reward_clip_range` leaves rewards no room",
        hint="give the lower end first: `[-1.0, 1.0]`",
    ),
    Rule(
        name="rollout-of-a-stream",
        keys=("objective.kind", "data.streaming"),
        broken=lambda r: _rollout(r) is not None and r.data.streaming,
        message="prompts are taken in an order of their own, which a stream does not allow",
        hint="drop `data.streaming`",
    ),
    Rule(
        name="rollout-without-room",
        keys=("objective.max_new_tokens", "data.max_length"),
        broken=lambda r: (found := _rollout(r)) is not None and found.max_new_tokens >= r.data.max_length,
        message="`objective.max_new_tokens` leaves no room for a prompt in `data.max_length`, which holds prompt and answer",
        hint="raise `data.max_length`, or lower `objective.max_new_tokens`",
    ),
    Rule(
        name="batch-of-parts-of-groups",
        keys=("train.batch_size", "objective.num_generations"),
        broken=lambda r: (
            (found := _rollout(r)) is not None
            and r.train.batch_size is not None
            and r.train.batch_size % found.num_generations != 0
        ),
        message="`train.batch_size` counts answers, and is no whole number of groups of `objective.num_generations`",
        hint="give a multiple of `objective.num_generations`",
    ),
    Rule(
        name="group-of-one",
        keys=("objective.num_generations", "objective.kind"),
        broken=lambda r: isinstance(r.objective, Grpo | Rloo) and r.objective.num_generations < 2,
        message="an answer is measured against the others to its prompt, and there are none",
        hint="give `objective.num_generations: 8`, or use `objective: ppo`",
    ),
    Rule(
        name="pretrain-system",
        keys=("data.system", "objective.kind"),
        broken=lambda r: r.objective.kind == "pretrain" and r.data.system is not None,
        message="plain text has no system prompt, so `objective: pretrain` cannot use `data.system`",
        hint="drop `data.system`, or use `objective: sft`",
    ),
    Rule(
        name="smoothing-needs-a-label",
        keys=("objective.label_smoothing", "objective.loss_type"),
        broken=lambda r: (
            isinstance(r.objective, Dpo) and r.objective.label_smoothing > 0 and r.objective.loss_type not in SMOOTHED
        ),
        message="`objective.label_smoothing` is defined for the losses " + ", ".join(f"`{name}`" for name in SMOOTHED),
        hint="drop it, or choose one of these losses",
    ),
    Rule(
        name="exo-needs-smoothing",
        keys=("objective.loss_type", "objective.label_smoothing"),
        broken=lambda r: (
            isinstance(r.objective, Dpo) and r.objective.loss_type == "exo_pair" and r.objective.label_smoothing == 0
        ),
        message="`exo_pair` measures a divergence from the smoothed label, and from one that is certain it is infinite",
        hint="set `objective.label_smoothing: 1.0e-3`, which is what TRL takes in place of 0",
    ),
    Rule(
        name="kto-of-one",
        keys=("train.batch_size", "objective.kind"),
        broken=lambda r: isinstance(r.objective, Kto) and r.objective.loss_type == "kto" and r.train.batch_size == 1,
        message="KTO estimates how far the model has moved from prompts with other rows' answers, and a step of one row has none",
        hint="set `train.batch_size` to 2 or more; 16 or more give an estimate to go by",
    ),
    Rule(
        name="precompute-a-stream",
        keys=("objective.precompute_ref_log_probs", "data.streaming"),
        broken=lambda r: isinstance(r.objective, Dpo) and r.objective.precompute_ref_log_probs and r.data.streaming,
        message="`objective.precompute_ref_log_probs` reads all rows before the first step, and a stream has no end",
        hint="drop one of the two; what the reference said of a row is remembered either way",
    ),
)
