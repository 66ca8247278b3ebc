"""Backends -> what is served: models computed in this process, and servers at addresses."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tunedock.data.chat import Chat
from tunedock.errors import ModelError, RecipeError, RunError
from tunedock.model.load import stop_ids
from tunedock.model.session import ChatFacts, find_base
from tunedock.recipe.data_images import DATA_IMAGES
from tunedock.recipe.schema import Recipe
from tunedock.recipe.serving import Backend, ServeOrder
from tunedock.run.record import Run, read_json
from tunedock.serve.engines.batching import Limits
from tunedock.serve.engines.generator import Generator
from tunedock.serve.engines.loading import from_folder, from_run
from tunedock.serve.engines.remote import RemoteEngine
from tunedock.serve.engines.tokens import TokenEngine
from tunedock.serve.models import Served

Tell = Callable[[str], None]


def load(order: ServeOrder, tell: Tell) -> list[Served]:
    """Everything an order names. Raises what loading a model raises; what was loaded before is closed by the caller's end."""
    found: list[Served] = []
    for backend in order.backends:
        tell(f"loading {backend.name}")
        found += _LOAD[backend.kind](backend, order)
    names = [served.name for served in found]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise RecipeError(f"two models are called `{double}`", where="serve", hint="name one: `other=PATH`")
    return found


def _run(backend: Backend, order: ServeOrder) -> list[Served]:
    run = Run.open(Path(backend.place))
    if not run.model.is_dir():
        raise RunError(
            "the run has no result yet", where=str(run.path), hint=f"`tunedock train --resume {run.path}` finishes it"
        )
    recipe = Recipe.model_validate(run.resolved()["recipe"])
    if recipe.objective.kind == "reward":
        raise RecipeError(
            "a reward model scores and does not answer", where=str(run.path), hint="serve the model it scores"
        )
    facts = ChatFacts.read(run.model)
    base = find_base(recipe, stop_ids=facts.stop_ids)
    generator = from_run(run, recipe, merge=not backend.adapters, adapters=backend.adapters, limits=_limits(order))
    engine = TokenEngine(generator, base.tokenizer, base.chat, thinking=facts.thinking, system=facts.system)
    state = run.state()
    lineage = {
        "run": state.name,
        "recipe_hash": state.recipe_hash,
        "model": state.model,
        "commit": state.lineage.get("commit"),
        "data": state.lineage.get("data"),
        "data_images": state.lineage.get(DATA_IMAGES),
    }
    told = {key: value for key, value in lineage.items() if value}
    own = run.name if backend.adapters and run.name in generator.adapters() else None
    return _with_adapters(Served(backend.name, engine, backend.name, own, lineage=told), generator, backend)


def _folder(backend: Backend, order: ServeOrder) -> list[Served]:
    folder = Path(backend.place)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = from_folder(folder, adapters=backend.adapters, limits=_limits(order))
    engine = _engine(folder, generator, tokenizer)
    return _with_adapters(Served(backend.name, engine, backend.name, lineage=_exported(folder)), generator, backend)


def _gguf(backend: Backend, order: ServeOrder) -> list[Served]:
    from tunedock.serve.engines.gguf import find_file, tokenizer_of  # llama.cpp, where a model needs it
    from tunedock.serve.engines.llama import from_gguf

    file = find_file(Path(backend.place))
    tokenizer = tokenizer_of(file)
    engine = _engine(file.parent, from_gguf(file, limits=_limits(order)), tokenizer)
    return [Served(backend.name, engine, backend.name, lineage=_exported(file.parent))]


def _remote(backend: Backend, order: ServeOrder) -> list[Served]:
    key = None
    if backend.key_env is not None:
        key = os.environ.get(backend.key_env)
        if not key:
            raise RecipeError(
                f"the variable {backend.key_env} is not set",
                where=backend.name,
                hint="it holds the key the server wants",
            )
    engine = RemoteEngine(backend.kind, backend.place, key=key)
    return [Served(backend.name, engine, backend.model or backend.name, lineage={"server": backend.kind})]


_LOAD: Mapping[str, Callable[[Backend, ServeOrder], list[Served]]] = {
    "run": _run,
    "folder": _folder,
    "gguf": _gguf,
    **dict.fromkeys(("vllm", "sglang", "ollama", "llama-server", "openai", "tunedock"), _remote),
}


def _engine(folder: Path, generator: Generator, tokenizer: PreTrainedTokenizerBase) -> TokenEngine:
    """By what an export left beside its weights; of a folder from elsewhere by its generation config."""
    facts = ChatFacts.read(folder) if (folder / "chat.json").is_file() else None
    stops = frozenset(facts.stop_ids) if facts else stop_ids(folder, tokenizer)
    documents = not tokenizer.chat_template
    chat = Chat(
        tokenizer,
        stop_ids=stops,
        max_length=generator.longest,
        over_length="drop",
        train_on="assistant",
        documents=documents,
        thinking=facts.thinking if facts else False,
    )
    return TokenEngine(
        generator, tokenizer, chat, thinking=facts.thinking if facts else False, system=facts.system if facts else None
    )


def _exported(folder: Path) -> dict[str, Any]:
    """What an export says of the run it is of."""
    if not (folder / "export.json").is_file():
        return {}
    record = read_json(folder / "export.json")
    if not isinstance(record, dict):
        raise ModelError("it is not what an export writes", where=str(folder / "export.json"), hint="export again")
    return {key: record[key] for key in ("run", "recipe_hash", "format", "kind") if record.get(key)}


def _with_adapters(served: Served, generator: Generator, backend: Backend) -> list[Served]:
    """The model, and each further adapter as a model of its own."""
    others = [
        Served(name, served.engine, served.model, name, lineage={**served.lineage, "adapter": name})
        for name in generator.adapters()
        if name in backend.adapters
    ]
    return [served, *others]


def _limits(order: ServeOrder) -> Limits:
    given = {"running": order.max_running, "waiting": order.max_waiting, "longest": order.longest}
    return Limits(**{name: value for name, value in given.items() if value is not None})
