"""LLaMA-Factory's own words for GaLore, APOLLO and Muon, which are optimizers by name here."""

from __future__ import annotations

from typing import Any

from tunedock.recipe.importers_sections import DEFAULT
from tunedock.recipe.importers_words import Draft

GALORE: dict[str, tuple[str, str, Any]] = {
    "galore_rank": ("rank", "int", 16),
    "galore_update_interval": ("update_proj_gap", "int", 200),
    "galore_scale": ("scale", "number", 2.0),
    "galore_proj_type": ("proj_type", "text", "std"),
}
APOLLO: dict[str, tuple[str, str, Any]] = {
    "apollo_rank": ("rank", "int", 16),
    "apollo_update_interval": ("update_proj_gap", "int", 200),
    "apollo_scale": ("scale", "number", 32.0),
    "apollo_proj": ("proj", "text", "random"),
    "apollo_proj_type": ("proj_type", "text", "std"),
    "apollo_scale_type": ("scale_type", "text", "channel"),
}
"""Word -> argument of `train.optim_args`, its type, LLaMA-Factory's default."""

MUON: dict[str, tuple[str, str]] = {
    "optim_config.momentum": ("momentum", "number"),
    "optim_config.nesterov": ("nesterov", "bool"),
    "optim_config.ns_steps": ("ns_steps", "int"),
}
_ADAM = ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf")


def optimizers(draft: Draft) -> None:
    if draft.version == "v1":
        _of_v1(draft)
        return
    used = [name for name in ("galore", "apollo", "muon") if draft.get(f"use_{name}", "bool")]
    for name in ("galore", "apollo", "muon"):
        if draft.has(f"use_{name}") and name not in used:
            draft.leave(f"use_{name}", "off, as it is here")
    if len(used) > 1:
        draft.refuse(f"use_{used[1]}", f"there is one optimizer, and `use_{used[0]}` names it", "keep one of the two")
        return
    if "muon" in used:
        _put_optimizer(draft, "muon", "use_muon")
    if "galore" in used:
        _low_rank(draft, "galore", GALORE)
    if "apollo" in used:
        _low_rank(draft, "apollo", APOLLO)


def _put_optimizer(draft: Draft, optim: str, word: str) -> None:
    """The method names the optimizer; `optim` named the one inside it."""
    draft.put("train.optim", optim, word)
    if draft.has("optim"):
        draft.leave("optim", f"`{word}` goes before it")


def _low_rank(draft: Draft, method: str, words: dict[str, tuple[str, str, Any]]) -> None:
    use = f"use_{method}"
    inner = draft.get("optim", "text") or "adamw_torch"
    optim = f"{method}_adamw" if inner in _ADAM else "galore_adafactor" if inner == "adafactor" else None
    if optim is None or (method == "apollo" and inner == "adafactor"):
        draft.refuse(
            "optim", f"with `{use}` it is AdamW{' or adafactor' if method == 'galore' else ''} here", "take it out"
        )
        return
    if draft.words.get("finetuning_type") in (None, "lora"):
        draft.refuse(use, "it holds the moments of whole weights at a low rank", "set `finetuning_type: full`")
        return
    for word in (f"{method}_layerwise", f"{method}_scale_front"):
        if draft.get(word, "bool"):
            why = "weights are updated after the backward pass" if "layerwise" in word else "the scale comes last here"
            draft.refuse(word, why, "take it out", built=False)
        elif draft.has(word):
            draft.leave(word, "off, as it is here")
    _put_optimizer(draft, optim, use)
    parts: list[str] = []
    for word, (argument, kind, default) in words.items():
        value = draft.get(word, kind)
        parts.append(f"{argument}={default if value is None else value}")
        if value is not None:
            draft.leave(word, f"it is `{argument}` of `train.optim_args`")
    draft.put("train.optim_args", ",".join(parts), use, f"{DEFAULT}s where the file gives none", default=True)
    targets = draft.get(f"{method}_target", "targets")
    if targets == "all-linear":
        draft.leave(f"{method}_target", "the matrices of attention and feed-forward parts, as it is here")
    elif targets is not None:
        draft.put("train.optim_target_modules", targets, f"{method}_target")


def _of_v1(draft: Draft) -> None:
    if not any(word.startswith("optim_config.") for word in draft.words):
        return
    name = draft.get("optim_config.name", "text")
    if name is None:
        pass
    elif name == "adamw":
        draft.leave("optim_config.name", "as it is here")
    elif name != "muon":
        draft.refuse(
            "optim_config.name", "LLaMA-Factory v1 has adamw and muon", "set `train.optim` in the recipe", built=False
        )
        return
    else:
        draft.put("train.optim", "muon", "optim_config.name")
        parts = []
        for word, (argument, kind) in MUON.items():
            if (value := draft.get(word, kind)) is not None:
                parts.append(f"{argument}={value}".lower())
                draft.leave(word, f"it is `{argument}` of `train.optim_args`")
        if parts:
            draft.put("train.optim_args", ",".join(parts), "optim_config.name", default=True)
    for word in MUON:
        if draft.has(word) and not draft.told(word):
            draft.leave(word, "it counts only with `name: muon`")
    if (decay := draft.get("optim_config.wd", "number")) is not None:
        draft.put("train.weight_decay", decay, "optim_config.wd")
    if (epsilon := draft.get("optim_config.adamw_eps", "number")) is not None:
        draft.put("train.adam_epsilon", epsilon, "optim_config.adamw_eps")
    betas = draft.get("optim_config.adamw_betas")
    if isinstance(betas, list) and len(betas) == 2 and all(isinstance(beta, float) for beta in betas):
        draft.put("train.adam_beta1", betas[0], "optim_config.adamw_betas")
        draft.put("train.adam_beta2", betas[1], "optim_config.adamw_betas")
    elif betas is not None:
        draft.refuse("optim_config.adamw_betas", "it should be two numbers", "write [0.9, 0.95]")
