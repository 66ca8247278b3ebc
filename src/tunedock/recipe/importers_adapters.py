"""What of a LLaMA-Factory file says what is trained: the kind of adapter, how it starts, and the adapters it goes on from."""

from __future__ import annotations

from tunedock.recipe.importers_sections import DEFAULT, rebase, words_of_kind
from tunedock.recipe.importers_words import Draft, nearest, of_kinds

PISSA_ITERATIONS = 16
"""LLaMA-Factory's default for `pissa_iter`; -1 is the whole decomposition."""


def adapter(draft: Draft) -> None:
    """`finetuning_type`, or `peft_config.name`, and the settings of that kind."""
    flat = draft.version == "v0"
    word = "finetuning_type" if flat else "peft_config.name"
    prefix = "" if flat else "peft_config."
    kinds = of_kinds(draft.version, "adapter")
    kind = draft.get(word, "text")
    usual = "lora" if flat else "full"
    if kind is not None and kind not in kinds:
        hint = (
            "write `finetuning_type: lora` with `quantization_bit: 4`"
            if kind == "qlora"
            else nearest(kind, list(kinds))
        )
        draft.refuse(word, f"LLaMA-Factory has {', '.join(kinds)}", hint)
        kind = None
    elif kind is not None:
        draft.put("adapter.kind", kind, word)
    elif draft.training:
        draft.put("adapter.kind", usual, word, DEFAULT, default=True)
    draft.adapter = kind or usual
    _layers(draft, f"{prefix}freeze_trainable_layers")
    _modules_of_layers(draft, f"{prefix}freeze_trainable_modules")
    if flat:
        _pissa(draft)
    _adapters(draft, f"{prefix}adapter_name_or_path")
    words_of_kind(draft, "adapter", draft.adapter)


def _only_of(draft: Draft, word: str, kind: str) -> bool:
    """Whether a word that the file has counts; says so where it does not."""
    if not draft.has(word):
        return False
    if draft.adapter != kind:
        draft.leave(word, f"it counts only with `adapter: {kind}`")
    return draft.adapter == kind


def _layers(draft: Draft, word: str) -> None:
    """The last layers, or, below 0, the first."""
    if not _only_of(draft, word, "freeze"):
        if draft.adapter == "freeze" and draft.training:
            draft.put("adapter.last_n_layers", 2, word, DEFAULT, default=True)
        return
    number = draft.get(word, "int")
    if number == 0:
        draft.leave(word, "none of the layers")
    elif number is not None:
        draft.put("adapter.last_n_layers" if number > 0 else "adapter.first_n_layers", abs(number), word)


def _modules_of_layers(draft: Draft, word: str) -> None:
    if not _only_of(draft, word, "freeze"):
        return
    names = draft.get(word, "names")
    if names == ["all"]:
        draft.leave(word, "every module of these layers trains")
    elif names:
        draft.put("adapter.layer_modules", names, word)


def _pissa(draft: Draft) -> None:
    on = _only_of(draft, "pissa_init", "lora") and draft.get("pissa_init", "bool") is True
    if not on:
        if draft.has("pissa_init") and not draft.told("pissa_init"):
            draft.leave("pissa_init", "off, as it is here")
        for word in ("pissa_iter", "pissa_convert"):
            if draft.has(word):
                draft.leave(word, "it counts only with `pissa_init`")
        return
    iterations = draft.get("pissa_iter", "int") if draft.has("pissa_iter") else PISSA_ITERATIONS
    if iterations is not None:
        start = "pissa" if iterations == -1 else f"pissa_niter_{iterations}"
        for word in ("pissa_init", "pissa_iter"):
            if draft.has(word):
                draft.put("adapter.init_lora_weights", start, word)
    if draft.has("pissa_convert"):
        draft.leave("pissa_convert", "the result is always a plain LoRA on the untouched base")


def _adapters(draft: Draft, word: str) -> None:
    """Of several, the last is gone on with and those before it are merged; with `create_new_adapter` all are."""
    new = draft.has("create_new_adapter") and draft.get("create_new_adapter", "bool") is True
    if draft.has("create_new_adapter") and not new:
        draft.leave("create_new_adapter", "off, as it is here")
    if not draft.has(word):
        if new:
            draft.leave("create_new_adapter", f"it counts only with `{word}`")
        return
    if not draft.training:
        draft.leave(word, "a run knows its adapter: `tunedock chat RUN`, `tunedock export RUN --to DIR`")
        return
    folders = [rebase(draft, folder, hub=False) for folder in draft.get(word, "names") or []]
    merged = folders if new or draft.adapter != "lora" else folders[:-1]
    if merged:
        draft.put("model.adapters", merged, word)
    if folders != merged:
        draft.put("adapter.continue_from", folders[-1], word)
    if new:
        draft.put("model.adapters", merged, "create_new_adapter")
