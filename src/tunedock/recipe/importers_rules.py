"""Keys of a LLaMA-Factory file that cannot stand together, or that need another: a row of the table each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunedock.recipe.importers_words import Draft, is_off


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Keys that cannot stand together, or one that needs another."""

    words: tuple[str, ...]
    """The first is where the error points."""
    holds: Callable[[Draft], bool]
    message: str
    hint: str


def _on(draft: Draft, word: str) -> bool:
    value = draft.words.get(word)
    return value is not None and not is_off(value, [False, 0])


def _held_out(draft: Draft) -> bool:
    return _on(draft, "val_size") or draft.has("eval_dataset")


def _evaluates(draft: Draft) -> bool:
    given = draft.words.get("eval_strategy", draft.words.get("evaluation_strategy"))
    return given not in (None, "no", False)


def _of_answers(metric: object) -> bool:
    """Whether LLaMA-Factory has it of generated answers."""
    return isinstance(metric, str) and metric.removeprefix("eval_").startswith(("rouge-", "bleu-"))


CONTRADICTIONS: tuple[Contradiction, ...] = (
    Contradiction(
        ("model_name_or_path",),
        lambda d: d.version == "v0" and not d.has("model_name_or_path"),
        "it is missing, and LLaMA-Factory has no default for it",
        "name the model: a hub id or a folder",
    ),
    Contradiction(
        ("train_on_prompt", "mask_history"),
        lambda d: _on(d, "train_on_prompt") and _on(d, "mask_history"),
        "one trains every token, the other the last answer alone",
        "keep one of the two",
    ),
    Contradiction(
        ("train_on_prompt", "stage"),
        lambda d: _on(d, "train_on_prompt") and d.words.get("stage") not in (None, "sft"),
        "it is for `stage: sft` alone",
        "take it out",
    ),
    Contradiction(
        ("mask_history", "stage"),
        lambda d: _on(d, "mask_history") and d.words.get("stage") not in (None, "sft"),
        "it is for `stage: sft` alone",
        "take it out",
    ),
    Contradiction(
        ("predict_with_generate", "stage"),
        lambda d: _on(d, "predict_with_generate") and d.words.get("stage") not in (None, "sft"),
        "it is for `stage: sft` alone",
        "take it out",
    ),
    Contradiction(
        ("val_size", "eval_dataset"),
        lambda d: _on(d, "val_size") and d.has("eval_dataset"),
        "one takes rows of the training data, the other names data of its own",
        "keep one of the two",
    ),
    Contradiction(
        ("fp16", "bf16"),
        lambda d: _on(d, "fp16") and (_on(d, "bf16") or _on(d, "pure_bf16")),
        "there is one precision",
        "keep one of the two",
    ),
    Contradiction(
        ("max_samples", "streaming"),
        lambda d: _on(d, "streaming") and d.has("max_samples"),
        "a stream is not cut to a number of rows",
        "use `max_steps`",
    ),
    Contradiction(
        ("streaming", "max_steps"),
        lambda d: _on(d, "streaming") and not (_on(d, "max_steps") and d.words["max_steps"] != -1),
        "nobody knows how many rows a stream has, so its epochs have no length",
        "set `max_steps`",
    ),
    Contradiction(
        ("dpo_label_smoothing", "pref_loss"),
        lambda d: _on(d, "dpo_label_smoothing") and d.words.get("pref_loss") not in (None, "sigmoid"),
        "it belongs to `pref_loss: sigmoid`",
        "take it out",
    ),
    *(
        Contradiction(
            (word, "finetuning_type"),
            lambda d, word=word: _on(d, word) and d.words.get("finetuning_type") not in (None, "lora"),  # type: ignore[misc]
            "it belongs to `finetuning_type: lora`",
            "take it out, or use LoRA",
        )
        for word in ("use_dora", "use_rslora", "pissa_init", "loraplus_lr_ratio")
    ),
    Contradiction(
        ("stage", "reward_model"),
        lambda d: d.words.get("stage") == "ppo" and not d.has("reward_model"),
        "PPO needs a `reward_model`",
        "name one",
    ),
    Contradiction(
        ("eval_strategy", "val_size"),
        lambda d: d.training and d.version == "v0" and _evaluates(d) and not _held_out(d),
        "there is nothing to evaluate on",
        "give `val_size` or `eval_dataset`",
    ),
    Contradiction(
        ("load_best_model_at_end", "eval_strategy"),
        lambda d: _on(d, "load_best_model_at_end") and not _evaluates(d),
        "without evaluations nothing tells the best",
        "set `eval_strategy`",
    ),
    Contradiction(
        ("metric_for_best_model", "predict_with_generate"),
        lambda d: _of_answers(d.words.get("metric_for_best_model")) and not _on(d, "predict_with_generate"),
        "it is a figure of answers, and evaluations make none",
        "set `predict_with_generate: true`",
    ),
)


def contradictions(draft: Draft) -> None:
    """A problem for each pair of keys that cannot stand together."""
    for rule in CONTRADICTIONS:
        if rule.holds(draft):
            others = ", ".join(f"`{word}: {draft.words[word]}`" for word in rule.words[1:] if word in draft.words)
            draft.problem(rule.words[0], f"{rule.message}{f' (here {others})' if others else ''}", rule.hint)
