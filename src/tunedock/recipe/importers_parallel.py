"""Many processes in a LLaMA-Factory file: DeepSpeed's JSON files, transformers' `fsdp`, and v1's `dist_config`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tunedock.errors import RecipeError
from tunedock.recipe.deepspeed import Said, read_deepspeed, said_in
from tunedock.recipe.importers_sections import rebase
from tunedock.recipe.importers_words import Draft

OWN_FILES = re.compile(r"ds_z([0-3])(?:_(offload|fp8|autotp))?_config\.json")
"""Those that LLaMA-Factory brings, `examples/deepspeed/ds_z3_offload_config.json`."""

SHARDINGS = {"full_shard": "fsdp", "shard_grad_op": "zero2", "no_shard": "ddp"}
"""transformers' words for `fsdp` -> `parallel`; `shard_grad_op` divides all but the weights, as ZeRO's second stage does."""

_WRAPPING = "each decoder layer is divided by itself"


def parallel(draft: Draft) -> None:
    """What the file says of how a model lies on many devices."""
    if draft.version == "v0":
        if draft.has("deepspeed"):
            _deepspeed(draft, "deepspeed")
        _fsdp(draft)
    else:
        _dist_config(draft)


def _deepspeed(draft: Draft, word: str) -> None:
    """A file of LLaMA-Factory's own is its stage and its offloading; another stays a file."""
    value = draft.words[word]
    try:
        if isinstance(value, Mapping):
            _put(draft, said_in(value, draft.where(word)), word, "of the mapping, its stage and its offloading")
            return
        if not isinstance(value, str):
            draft.refuse(word, "it is the path of a JSON file", None)
            return
        file = draft.cwd / value
        own = OWN_FILES.fullmatch(Path(value).name)
        if own is None:
            draft.put("train.deepspeed", rebase(draft, value, hub=False), word)
            return
        said = read_deepspeed(file) if file.is_file() else _named(int(own.group(1)), own.group(2) == "offload")
        _put(draft, said, word, "the rest of the file is what DeepSpeed is told anyway")
        if own.group(2) in ("fp8", "autotp"):
            draft.refuse(word, f"its `{own.group(2)}` is not built", "name the file without it", built=False)
    except RecipeError as error:
        draft.refuse(word, error.message, error.hint)


def _named(stage: int, offload: bool) -> Said:
    kept = ("none", "none", "optimizer", "all")[stage] if offload else "none"
    return Said(("ddp", "zero1", "zero2", "zero3")[stage], kept)


def _put(draft: Draft, said: Said, word: str, note: str) -> None:
    draft.put("parallel", said.parallel, word, note)
    if said.offload != "none":
        draft.put("offload", said.offload, word)


def _fsdp(draft: Draft) -> None:
    given = draft.words.get("fsdp")
    options = given.split() if isinstance(given, str) else ["full_shard"] if given is True else given
    if not options:
        for word in ("fsdp", "fsdp_config"):
            if draft.has(word):
                draft.leave(word, "off, as it is here" if word == "fsdp" else "it counts only with `fsdp`")
        return
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        draft.refuse("fsdp", "it is one or more of transformers' words for it", "write for example `full_shard`")
        return
    sharding = [option for option in options if option not in ("auto_wrap", "offload")]
    unknown = [option for option in sharding if option not in SHARDINGS]
    if unknown or len(sharding) > 1:
        known = ", ".join(SHARDINGS)
        draft.refuse("fsdp", f"one of {known}, with `offload` and `auto_wrap`, is known here", None, built=False)
        return
    how = SHARDINGS[sharding[0]] if sharding else "fsdp"
    draft.put("parallel", how, "fsdp", _WRAPPING if how == "fsdp" else None)
    if "offload" in options:
        draft.put("offload", "all" if how == "fsdp" else "optimizer", "fsdp")
    if draft.has("fsdp_config"):
        draft.leave("fsdp_config", _WRAPPING)


def _dist_config(draft: Draft) -> None:
    name, file = draft.get("dist_config.name", "text"), "dist_config.config_file"
    offload = draft.get("dist_config.offload_params", "bool")
    if name == "deepspeed" and draft.has(file):
        _deepspeed(draft, file)
        draft.leave("dist_config.name", f"`{file}` says it")
    elif name == "deepspeed":
        draft.refuse("dist_config.name", f"without `{file}` it says no stage", f"give `{file}`")
    elif name == "fsdp2":
        draft.put("parallel", "fsdp", "dist_config.name", _WRAPPING)
        if offload:
            draft.put("offload", "all", "dist_config.offload_params")
    elif name == "ddp":
        draft.put("parallel", "ddp", "dist_config.name")
    elif name is not None:
        draft.refuse("dist_config.name", "fsdp2, deepspeed and ddp are known here", None, built=False)
    for word in (file, "dist_config.offload_params"):
        if draft.has(word) and not draft.told(word):
            draft.leave(
                word, "it counts only with `dist_config.name: deepspeed`" if word == file else "off, as it is here"
            )
