"""Evaluation, warm-up, batches and checkpoints of a LLaMA-Factory file: keys that hang together."""

from __future__ import annotations

from tunedock.recipe.importers_sections import DEFAULT, by_table, judged_pairs
from tunedock.recipe.importers_words import Draft


def training(draft: Draft) -> None:
    """What the file says of them, and LLaMA-Factory's defaults where it says nothing."""
    _evaluation(draft)
    _warmup(draft)
    _generation(draft)
    if judged_pairs(draft):
        _batch_of_pairs(draft)
    if draft.version == "v0":
        _packing(draft)
        _precision(draft)
    else:
        _batch_of_v1(draft)
        _checkpoints_of_v1(draft)


def _evaluation(draft: Draft) -> None:
    strategy = None
    for word in ("eval_strategy", "evaluation_strategy"):
        if draft.has(word) and (given := draft.get(word, "strategy")) is not None:
            strategy = given
            draft.put("train.eval_strategy", strategy, word)
    if strategy is None and draft.training:
        draft.put("train.eval_strategy", "no", "eval_strategy", DEFAULT, default=True)
    if draft.has("eval_steps") and strategy != "steps":
        draft.leave("eval_steps", "it counts only with `eval_strategy: steps`")
    elif draft.has("eval_steps"):
        by_table(draft, "eval_steps", {"to": "train.eval_steps", "type": "int"})
    elif strategy == "steps":
        every = draft.get("logging_steps", "int") or 500
        draft.put("train.eval_steps", every, "eval_steps", f"{DEFAULT}: as `logging_steps`", default=True)
    _answers(draft, evaluates=strategy not in (None, "no"))


def _answers(draft: Draft, *, evaluates: bool) -> None:
    """`predict_with_generate`, which LLaMA-Factory asks for wherever it generates: after training too."""
    if not (asked := draft.get("predict_with_generate", "bool")):
        if asked is not None:
            draft.leave("predict_with_generate", "off, as it is here")
    elif draft.training and evaluates:
        draft.put("train.predict_with_generate", True, "predict_with_generate")
    else:
        draft.leave(
            "predict_with_generate", "nothing is evaluated while training; `tunedock eval` answers held-out rows"
        )


def _warmup(draft: Draft) -> None:
    steps, share = draft.get("warmup_steps", "number"), draft.get("warmup_ratio", "number")
    if steps:
        draft.put("train.warmup_steps", steps, "warmup_steps")
    elif steps is not None:
        draft.leave("warmup_steps", "0 is the default here too")
    if share is None:
        return
    if steps:
        draft.leave("warmup_ratio", "`warmup_steps` goes before it")
    elif not 0 <= share < 1:
        draft.refuse("warmup_ratio", "it is a share of all steps", "give a number from 0 to below 1")
    else:
        draft.put("train.warmup_steps", share, "warmup_ratio", "below 1 it is a share of all steps")


def _generation(draft: Draft) -> None:
    sampled = draft.get("do_sample", "bool")
    if sampled is False:
        draft.put("eval.temperature", 0.0, "do_sample", "0 is greedy")
    elif sampled:
        draft.leave("do_sample", "`eval.temperature` above 0 samples")
    if draft.has("temperature") and sampled is False:
        draft.leave("temperature", "`do_sample: false` is greedy")
    elif draft.has("temperature"):
        by_table(draft, "temperature", {"to": "eval.temperature", "type": "number"})


def _packing(draft: Draft) -> None:
    """Rows packed full are what a batch of LLaMA-Factory counts then; a step counts samples here. Pretraining packs unasked."""
    note = "rows are always laid out without padding, each sample apart from the others"
    neat, given = draft.get("neat_packing", "bool"), draft.get("packing", "bool")
    packed = neat or (draft.kind == "pretrain" if given is None else given)
    if packed:
        note += (
            "; LLaMA-Factory's batch counted full rows, a step here counts samples: raise `train.batch_size` to match"
        )
    for word in ("packing", "neat_packing"):
        if draft.has(word) and not draft.told(word):
            draft.leave(word, note)
    if packed and draft.training and not (draft.has("packing") or draft.has("neat_packing")):
        draft.leave("packing", f"on for `stage: pt`; {note}")


def _precision(draft: Draft) -> None:
    if draft.training and not any(draft.has(word) for word in ("bf16", "fp16", "pure_bf16")):
        why = (
            "LLaMA-Factory loads the model in the type it was saved in; tunedock takes bfloat16 where the device has it"
        )
        draft.leave("bf16", f"not in the file: {why}")


def _batch_of_pairs(draft: Draft) -> None:
    """A batch of `kto_pair` counts pairs, one of `objective: kto` the answers in them: twice as many."""
    words = (
        {"per_device_train_batch_size": 8}
        if draft.version == "v0"
        else {"global_batch_size": None, "micro_batch_size": 1}
    )
    for word, usual in words.items():
        pairs = draft.get(word, "int")
        key = "train.batch_size" if word == "global_batch_size" else "train.per_device_train_batch_size"
        if pairs is not None:
            draft.put(key, 2 * pairs, word, "it counted pairs; `objective: kto` counts their answers")
            return
        if usual is not None and draft.training and not draft.told(word):
            draft.put(key, 2 * usual, word, f"{DEFAULT} in pairs: two answers each", default=True)


def _batch_of_v1(draft: Draft) -> None:
    whole = draft.get("global_batch_size", "int")
    if whole is not None:
        if not draft.told("global_batch_size"):
            draft.put("train.batch_size", whole, "global_batch_size")
        if draft.has("micro_batch_size"):
            draft.leave("micro_batch_size", "what is computed at once is planned from the memory")
    elif draft.has("micro_batch_size"):
        if not draft.told("micro_batch_size"):
            by_table(draft, "micro_batch_size", {"to": "train.per_device_train_batch_size", "type": "int"})
    elif draft.training:
        draft.put("train.per_device_train_batch_size", 1, "micro_batch_size", DEFAULT, default=True)
    if draft.training:
        draft.put("train.lr_scheduler_type", "constant", "lr_scheduler_config", DEFAULT, default=True)
        draft.put("train.weight_decay", 0.01, "optim_config", f"{DEFAULT}: PyTorch's AdamW", default=True)


def _checkpoints_of_v1(draft: Draft) -> None:
    epochs = draft.get("save_epochs", "number")
    if epochs is not None and draft.has("save_steps"):
        draft.refuse("save_epochs", "`save_steps` says something else", "keep one of the two")
    elif epochs == 1:
        draft.put("train.save_strategy", "epoch", "save_epochs")
    elif epochs is not None:
        draft.refuse(
            "save_epochs", "a checkpoint comes every epoch, or every so many steps", "use `save_steps`", built=False
        )
    elif draft.training and not draft.has("save_steps"):
        draft.put(
            "train.save_strategy",
            "no",
            "save_steps",
            f"{DEFAULT}; a run that keeps checkpoints can be resumed",
            default=True,
        )
    if draft.has("save_steps"):
        by_table(draft, "save_steps", {"to": "train.save_steps", "type": "int"})
