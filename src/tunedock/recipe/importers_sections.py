"""What a table of words cannot say of a LLaMA-Factory file: what it is for, and kinds with their settings."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunedock.recipe.importers_words import Draft, nearest, of_kinds, tables

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
DEFAULT = "LLaMA-Factory's default"
_KTO_PAIR = (
    "each pair is a wanted and an unwanted answer; kto_pair took its estimate of the KL from the pair's other side, "
    "KTO takes it from prompts with another row's answer"
)
_PREFERENCES = ("pref_loss", "pref_beta", "pref_ftx", "simpo_gamma", "dpo_label_smoothing", "ld_alpha")


def purpose(draft: Draft) -> str:
    """What the file is for: train, evaluate, export or inference."""
    if draft.has("dataset") or draft.has("train_dataset"):
        return "train"
    if draft.get("do_train", "bool"):
        draft.problem("do_train", "there is no `dataset` to train on", "name the data sets: `dataset: a, b`")
        return "train"
    draft.training = False
    if draft.has("export_dir") or draft.has("peft_config.export_dir"):
        return "export"
    return "evaluate" if draft.has("eval_dataset") else "inference"


def by_table(draft: Draft, word: str, entry: Mapping[str, Any]) -> None:
    """One word as its entry in the table says: its type, its key in the recipe, what its values are called there."""
    value = draft.get(word, entry["type"])
    note = entry.get("note")
    if value is None:
        return
    if value in entry.get("off", ()):
        draft.leave(word, "off, as it is here")
        return
    if "values" in entry:
        name = str(value).lower() if isinstance(value, bool) else value
        if name not in entry["values"]:
            if entry.get("else") == "refuse":
                draft.refuse(word, f"only {', '.join(entry['values'])} is known here", "take it out", built=False)
            else:
                draft.leave(word, "off, as it is here")
            return
        value = entry["values"][name]
    if entry["type"] in ("path", "model"):
        value = rebase(draft, value, hub=entry["type"] == "model")
    if entry["to"] == "train.report_to":
        value = [name for name in value if name != "none"]
    draft.put(entry["to"], value, word, note)


def rebase(draft: Draft, path: str, *, hub: bool) -> str:
    """A path from where LLaMA-Factory starts, as one from where the recipe stands. Hub ids, URLs and absolute paths stay."""
    if _URL.match(path) or path.startswith(("/", "~")) or not path.strip() or "\0" in path:
        return path
    there = Path(os.path.normpath(draft.cwd / path))
    if hub and not path.startswith(".") and not there.exists():
        return path
    return os.path.relpath(there, draft.folder)


def objective(draft: Draft, *, pairs: bool = False) -> None:
    """`stage` and `pref_loss`; of v1, whose command says the stage, what the file tells. `pairs`: its data are preferences."""
    stages, losses = tables()["stages"], tables()["preference_losses"]
    if draft.version == "v0":
        stage = draft.get("stage", "text")
        if stage is not None and stage not in stages:
            draft.refuse("stage", f"LLaMA-Factory has {', '.join(stages)}", nearest(stage, list(stages)))
        draft.kind = stages.get(stage or "sft", "sft")
        source, note = ("stage" if draft.has("stage") else None), None
    else:
        source, note = _stage_of_v1(draft, pairs)
    settings: dict[str, str] = {}
    loss = draft.get("pref_loss", "text")
    if draft.kind == "dpo" and loss is not None and loss not in losses:
        draft.refuse("pref_loss", f"tunedock knows {', '.join(losses)}", nearest(loss, list(losses)))
    elif draft.kind == "dpo" and loss is not None:
        settings = losses[loss]
        draft.kind = settings["kind"]
    if source:
        draft.put("objective.kind", draft.kind, source, note)
    if settings:
        for name, value in settings.items():
            draft.put(f"objective.{name}", value, "pref_loss", _KTO_PAIR if loss == "kto_pair" else None)
    elif draft.has("pref_loss") and not draft.told("pref_loss"):
        draft.leave("pref_loss", "it counts only with `objective: dpo`")
    if draft.kind in ("orpo", "kto") and draft.get("pref_ftx", "number"):
        why = "its loss has an SFT term of its own" if draft.kind == "orpo" else "an SFT term is not built for it"
        draft.refuse("pref_ftx", f"`objective: {draft.kind}`: {why}", "take it out", built=False)
    words_of_kind(draft, "objective", draft.kind)
    _rollouts(draft)
    reference = draft.get("ref_model", "text")
    if reference is not None and reference == draft.words.get("model_name_or_path"):
        draft.leave("ref_model", "the reference is the model as training began")
    elif reference is not None:
        draft.refuse(
            "ref_model",
            "the reference is the model as training began",
            "take it out, or give it as `model_name_or_path`",
            built=False,
        )


_SAMPLED = ("max_new_tokens", "temperature", "top_k", "top_p")
_OF_REWARDS = ("reward_model", "reward_model_type", "reward_model_adapters", "reward_model_quantization_bit")
_TRAINED_ELSEWHERE = "a reward model of tunedock or transformers; LLaMA-Factory's own value heads are not read"


def _rollouts(draft: Draft) -> None:
    """What scores answers, and how they are made: words that count for `stage: ppo` alone."""
    given = [word for word in (*_OF_REWARDS, "ppo_score_norm") if draft.has(word)]
    if draft.kind != "ppo":
        for word in given:
            draft.leave(word, "it counts only with `objective: ppo`")
        return
    model = draft.get("reward_model", "text")
    if model is not None:
        reward = {"kind": "model", "path": rebase(draft, model, hub=True)}
        draft.put("objective.rewards", [reward], "reward_model", _TRAINED_ELSEWHERE)
    if draft.get("reward_model_type", "text") == "api":
        hint = "name what scores as `objective.rewards`: a judge, or a Python function that asks your server"
        draft.refuse("reward_model_type", "LLaMA-Factory's reward server is not asked", hint, built=False)
    elif draft.has("reward_model_type"):
        draft.leave("reward_model_type", "what lies in `reward_model` tells it")
    for word in ("reward_model_adapters", "reward_model_quantization_bit"):
        if draft.has(word):
            draft.refuse(word, "a reward model is one folder, held whole", "give the merged model", built=False)
    if draft.get("ppo_score_norm", "bool"):
        draft.refuse("ppo_score_norm", "rewards are whitened over a rollout", "use `ppo_whiten_rewards`", built=False)
    elif draft.has("ppo_score_norm"):
        draft.leave("ppo_score_norm", "off, as it is here")
    for word in _SAMPLED:
        if draft.has(word):
            draft.put(
                f"objective.{word}", draft.get(word, "int" if word in ("max_new_tokens", "top_k") else "number"), word
            )


def _stage_of_v1(draft: Draft, pairs: bool) -> tuple[str | None, str | None]:
    """(the word that tells the objective, a note)."""
    model_class = draft.get("model_class", "text")
    if model_class == "cls":
        draft.kind = "reward"
        return "model_class", "a model that scores is what `llamafactory-cli rm` trains"
    if model_class not in (None, "llm"):
        draft.refuse("model_class", "only language models are trained", "use `model_class: llm`", built=False)
    elif model_class is not None:
        draft.leave("model_class", "a language model is what is trained")
    preference = next((word for word in _PREFERENCES if draft.has(word)), None)
    if not (preference or pairs):
        return None, None
    draft.kind = "dpo"
    if preference == "pref_loss":
        return None, None  # the loss tells the objective
    return (preference or "train_dataset"), "`llamafactory-cli dpo` is told by this; for `rm` write `objective: reward`"


def judged_pairs(draft: Draft) -> bool:
    """Whether pairs train as two labelled answers, and a batch of the file counts the pairs."""
    return draft.kind == "kto" and draft.source_of("objective.kind") == "pref_loss"


def words_of_kind(draft: Draft, section: str, kind: str) -> None:
    """Settings of one kind of objective or adapter; those of the others are left out, and its differing defaults written out."""
    kinds = of_kinds(draft.version, section)
    mine = kinds.get(kind, {})
    for word in dict.fromkeys(word for table in kinds.values() for word in table):
        if not draft.has(word) or draft.told(word):
            continue
        if word in mine:
            by_table(draft, word, mine[word])
        else:
            owners = [name for name, table in kinds.items() if word in table]
            draft.leave(word, f"it counts only with `{section}: {' or '.join(owners)}`")
    for word, entry in mine.items():
        if draft.training and "default" in entry and not draft.has(word):
            draft.put(entry["to"], entry["default"], word, DEFAULT, default=True)


def quantize(draft: Draft) -> None:
    """`quantization_bit` with its method and type."""
    prefix = "" if draft.version == "v0" else "quant_config."
    bit, kind, method = f"{prefix}quantization_bit", f"{prefix}quantization_type", "quantization_method"
    bits = draft.get(bit, "int")
    for word in (kind, method):
        if draft.has(word) and bits is None:
            draft.leave(word, f"it counts only with `{bit}`")
    if bits is None:
        return
    name = tables()["bits"].get(str(bits))
    if draft.adapter not in ("lora", "oft"):
        draft.refuse(
            bit,
            f"quantised weights stay as they are, and `adapter: {draft.adapter}` trains them",
            "use LoRA, or drop it",
        )
    elif name is None:
        draft.refuse(bit, "a base is held in 4 or 8 bits", "write 4 or 8", built=False)
    else:
        draft.put("quantize", name, bit)
    if draft.has(method) and str(draft.get(method)).lower() not in ("bnb", "bitsandbytes"):
        draft.refuse(method, "only bitsandbytes' way is known here", "take it out", built=False)
    elif draft.has(method):
        draft.leave(method, "bitsandbytes' way is the one that is meant")
    if draft.has(kind) and bits == 4 and draft.get(kind) != "nf4":
        draft.refuse(kind, "4 bits are held as nf4", "take it out", built=False)
    elif draft.has(kind):
        draft.leave(kind, "4 bits are held as nf4")
