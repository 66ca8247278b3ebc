"""Versions that PyTorch computes: runs, adapters and folders of weights.

An adapter goes onto a base that is in memory where that is the same model at the same commit, or with the same files; else its base
is loaded, for others to join. What cannot be one of several on a base (DoRA, new tokens) is merged, in an engine of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tunedock.data.chat import Chat
from tunedock.errors import ModelError, RecipeError, RunError
from tunedock.model.adapter import is_adapter
from tunedock.model.chat_facts import ChatFacts, stop_ids
from tunedock.model.hub import locate
from tunedock.model.load import find_device, held_in, parameters_of, require_config
from tunedock.model.session import find_base
from tunedock.recipe.schema import Model, Recipe
from tunedock.recipe.serving import ServeOrder
from tunedock.registry.digest import digest_of, files_of, require_same
from tunedock.registry.record import Version
from tunedock.run.record import Run
from tunedock.serve.computed import dtype_of
from tunedock.serve.engines.batching import Engine
from tunedock.serve.engines.loading import from_base, from_folder, from_run
from tunedock.serve.engines.loras import is_plain
from tunedock.serve.engines.precision import usual
from tunedock.serve.engines.tokens import TokenEngine
from tunedock.serve.exported import engine_of, limits_of
from tunedock.serve.versions.bases import Bases
from tunedock.serve.versions.loaded import Loaded
from tunedock.serve.versions.room import require_room
from tunedock.train.memory import memory_of


def run_version(version: Version, order: ServeOrder, bases: Bases) -> Loaded:
    run = Run.open(version.place)
    recipe = Recipe.model_validate(run.resolved()["recipe"])
    if recipe.model.trust_remote_code:
        raise RecipeError(
            "a version is loaded because a registry says so, and this model brings code of its own",
            where=str(version),
            hint=f"`tunedock serve {run.path}` serves it, as you say so yourself",
        )
    if version.record.base_commit is not None:
        recipe = recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"revision": version.record.base_commit})}
        )
    facts = ChatFacts.read(run.model)
    base = find_base(recipe, stop_ids=facts.stop_ids)

    def as_engine(generator: Engine) -> TokenEngine:
        return TokenEngine(generator, base.tokenizer, base.chat, thinking=facts.thinking, system=facts.system)

    # Adapters merged into the base are held against what they were as the run trained, where the result is put together.
    if is_adapter(run.model) and is_plain(run.model) and not recipe.model.adapters:
        key = _key(version, base.located.folder, recipe.quantize, recipe.model)
        make = partial(from_base, recipe, dtype=dtype_of(order), limits=limits_of(order))
        folder = base.located.folder
        size = _bytes(folder, _dtype(folder, order), quantised=recipe.quantize != "none")
        return _on_base(version, bases, key, folder, size, run.model, make, as_engine)
    _require_base(version, base.located.folder)
    if is_adapter(run.model):  # merged in float32 before it is rounded
        require_room(version, _bytes(base.located.folder, torch.float32), _free())
    else:
        require_room(version, _bytes(run.model, _dtype(run.model, order)), _free())
    generator = from_run(run, recipe, merge=True, dtype=dtype_of(order), limits=limits_of(order))
    return Loaded(version, as_engine(generator), None, generator.close)


def adapter_version(version: Version, order: ServeOrder, bases: Bases) -> Loaded:
    record, folder = version.record, version.place
    if record.base is None:
        raise RunError("the registry does not say which model it sits on", where=str(version), hint="register it anew")
    located = locate(record.base, revision=record.base_commit, hub="huggingface", offline=False)
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder if own else located.folder)
    key = _key(version, located.folder, "none", Model(path=record.base))
    make = partial(from_folder, located.folder, dtype=dtype_of(order), limits=limits_of(order))
    as_engine = partial(_adapters_engine, folder, located.folder, tokenizer)
    size = _bytes(located.folder, _dtype(located.folder, order))
    return _on_base(version, bases, key, located.folder, size, folder, make, as_engine)


def _on_base(
    version: Version,
    bases: Bases,
    key: Hashable,
    base: Path,
    base_bytes: int,
    adapter: Path,
    make: Callable[[], Engine],
    as_engine: Callable[[Engine], TokenEngine],
) -> Loaded:
    """As one of several adapters on a base, whose files are looked at when it is loaded."""
    if not bases.here(key):
        _require_base(version, base)
        require_room(version, base_bytes, _free())
    name = f"{version.model}@v{version.number}"
    generator = bases.take(key, make)
    try:
        generator.load_adapter(name, str(adapter))
        engine = as_engine(generator)
    except BaseException:
        if name in generator.adapters():
            generator.drop_adapter(name)
        bases.leave(key)
        raise

    def close() -> None:
        generator.drop_adapter(name)
        bases.leave(key)

    return Loaded(version, engine, name, close)


def folder_version(version: Version, order: ServeOrder) -> Loaded:
    require_room(version, _bytes(version.place, _dtype(version.place, order)), _free())
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(version.place)
    generator = from_folder(version.place, dtype=dtype_of(order), limits=limits_of(order))
    return Loaded(version, engine_of(version.place, generator, tokenizer), None, generator.close)


def _adapters_engine(folder: Path, base: Path, tokenizer: PreTrainedTokenizerBase, generator: Engine) -> TokenEngine:
    """By what an export left beside the adapter; else answers end where the base's do."""
    if (folder / "chat.json").is_file():
        return engine_of(folder, generator, tokenizer)
    chat = Chat(
        tokenizer,
        stop_ids=stop_ids(base, tokenizer),
        max_length=generator.longest,
        over_length="drop",
        train_on="assistant",
        documents=not tokenizer.chat_template,
    )
    return TokenEngine(generator, tokenizer, chat, thinking=False)


def _key(version: Version, folder: Path, quantize: str, model: Model) -> Hashable:
    """The same for versions that may share a base: the same files, at the same commit or of the same sums, loaded the same way."""
    sums = version.record.base_sums()
    content = version.record.base_commit if sums is None else digest_of(sums)
    settings = model.model_dump(mode="json", exclude_defaults=True, exclude={"path", "revision"})
    return str(folder.resolve()), content, quantize, json.dumps(settings, sort_keys=True)


def _require_base(version: Version, folder: Path) -> None:
    """A base at a commit is what it was; one at a path is looked at."""
    sums = version.record.base_sums()
    if sums is not None:
        require_same(folder, files_of(folder), sums, f"the base of {version}")
    elif version.record.base_commit is None and version.record.kind != "folder":
        raise ModelError(
            "the registry does not say what its base was: neither a commit nor sums",
            where=str(version),
            hint="register it anew",
        )


def _bytes(folder: Path, dtype: torch.dtype, *, quantised: bool = False) -> int:
    """Of a folder's weights in memory: in few bits as many as in the files, else by what they are computed in."""
    if quantised or held_in(require_config(folder)):
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return parameters_of(folder) * dtype.itemsize


def _dtype(folder: Path, order: ServeOrder) -> torch.dtype:
    return dtype_of(order) or usual(find_device(), parameters_of(folder))


def _free() -> int:
    return memory_of(find_device()).free_bytes()
