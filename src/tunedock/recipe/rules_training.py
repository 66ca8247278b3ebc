"""Rules about optimizers, their schedules, what is done to gradients and embeddings, and what evaluations answer."""

from __future__ import annotations

from tunedock.recipe.optimizers import table
from tunedock.recipe.rule import Rule
from tunedock.recipe.schema import Recipe, Train


def _schedule_free(recipe: Recipe) -> bool:
    return recipe.train.optim.startswith("schedule_free")


def _low_rank(recipe: Recipe) -> bool:
    facts = table().get(recipe.train.optim)
    return facts is not None and facts.low_rank is not None


def _adam_keys_unused(recipe: Recipe) -> bool:
    facts = table().get(recipe.train.optim)
    keys = ("adam_beta1", "adam_beta2", "adam_epsilon")
    changed = any(getattr(recipe.train, key) != Train.model_fields[key].default for key in keys)
    return facts is not None and facts.refused is None and not facts.adam and changed


def _answers(recipe: Recipe, *kinds: str) -> bool:
    return recipe.train.predict_with_generate and (not kinds or recipe.objective.kind in kinds)


TRAINING_RULES: tuple[Rule, ...] = (
    Rule(
        name="answers-to-no-questions",
        keys=("train.predict_with_generate", "objective.kind"),
        broken=lambda r: _answers(r, "pretrain", "reward"),
        message="`train.predict_with_generate` compares answers with those of the rows: documents have none, and a reward model "
        "makes none",
        hint="leave it out",
    ),
    Rule(
        name="answers-made-anyway",
        keys=("train.predict_with_generate", "objective.kind"),
        broken=lambda r: _answers(r, "ppo", "grpo", "rloo"),
        message="this objective answers validation prompts at each evaluation anyway, and tells their mean reward",
        hint="leave `train.predict_with_generate` out; a reward function is given the rows' answers to compare with",
    ),
    Rule(
        name="answers-of-a-stream",
        keys=("train.predict_with_generate", "data.streaming"),
        broken=lambda r: _answers(r) and r.data.streaming,
        message="`train.predict_with_generate` asks stored validation rows, and those of a stream are kept as tokens alone",
        hint="leave it out, or drop `data.streaming`",
    ),
    Rule(
        name="answers-without-evaluation",
        keys=("train.predict_with_generate", "train.eval_strategy"),
        broken=lambda r: _answers(r) and r.train.eval_strategy == "no",
        message="`train.predict_with_generate` answers at evaluations, and there are none",
        hint="set `train.eval_strategy: epoch`, with a share in `data.split.validation` or files in `data.validation`",
    ),
    Rule(
        name="metric-of-no-answers",
        keys=("train.metric_for_best_model", "train.predict_with_generate"),
        broken=lambda r: r.train.metric_for_best_model != "eval_loss" and not r.train.predict_with_generate,
        message="this `train.metric_for_best_model` is a figure of answers, and evaluations make none",
        hint="set `train.predict_with_generate: true`, or use `eval_loss`",
    ),
    Rule(
        name="schedule-free-with-a-schedule",
        keys=("train.lr_scheduler_type", "train.optim"),
        broken=lambda r: _schedule_free(r) and r.train.lr_scheduler_type != "constant",
        message="a schedule-free optimizer averages weights instead of lowering the learning rate, and takes no schedule",
        hint="leave `train.lr_scheduler_type` out: it is constant then, and `train.warmup_steps` still counts",
    ),
    Rule(
        name="warmup-of-its-own",
        keys=("train.warmup_steps", "train.optim"),
        broken=lambda r: r.train.optim == "schedule_free_radam" and r.train.warmup_steps > 0,
        message="`schedule_free_radam` warms up by itself",
        hint="leave `train.warmup_steps` out, or use `schedule_free_adamw`",
    ),
    Rule(
        name="low-rank-under-lora",
        keys=("train.optim", "adapter.kind"),
        broken=lambda r: _low_rank(r) and r.adapter.kind not in ("full", "freeze"),
        message="GaLore and APOLLO hold the moments of whole weights at a low rank, and the factors of an adapter are of low rank",
        hint="use `adapter: full`, or `train.optim: adamw_torch`",
    ),
    Rule(
        name="target-modules-unused",
        keys=("train.optim_target_modules", "train.optim"),
        broken=lambda r: r.train.optim_target_modules is not None and not _low_rank(r),
        message="`train.optim_target_modules` says which matrices GaLore and APOLLO work on",
        hint="drop it, or set `train.optim: galore_adamw`",
    ),
    Rule(
        name="adam-keys-unused",
        keys=("train.optim", "train.adam_beta1", "train.adam_beta2", "train.adam_epsilon"),
        broken=_adam_keys_unused,
        message="this optimizer does not read `train.adam_beta1`, `adam_beta2` and `adam_epsilon`",
        hint="drop them; what it takes goes to `train.optim_args`",
    ),
    Rule(
        name="nothing-to-roll-back-to",
        keys=("train.on_divergence", "train.save_strategy"),
        broken=lambda r: r.train.on_divergence == "roll_back" and r.train.save_strategy == "no",
        message="`train.on_divergence: roll_back` goes back to a checkpoint, and `train.save_strategy: no` writes none",
        hint="use `train.on_divergence: skip`, or `train.save_strategy: steps`",
    ),
)
