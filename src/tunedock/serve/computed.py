"""Runs and folders of weights, computed in this process with PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from tunedock.model.chat_facts import ChatFacts
from tunedock.model.session import find_base
from tunedock.recipe.serving import Backend, ServeOrder
from tunedock.serve.engines.generator import Generator
from tunedock.serve.engines.loading import from_folder, from_run
from tunedock.serve.engines.tokens import TokenEngine
from tunedock.serve.exported import engine_of, limits_of
from tunedock.serve.lineage import answering, of_export, of_run
from tunedock.serve.models import Served


def run_model(backend: Backend, order: ServeOrder) -> list[Served]:
    """Of a run, and of each further adapter on its base."""
    run, recipe = answering(backend.place)
    facts = ChatFacts.read(run.model)
    base = find_base(recipe, stop_ids=facts.stop_ids)
    generator = from_run(
        run,
        recipe,
        merge=not backend.adapters,
        adapters=backend.adapters,
        dtype=dtype_of(order),
        limits=limits_of(order),
    )
    engine = TokenEngine(generator, base.tokenizer, base.chat, thinking=facts.thinking, system=facts.system)
    own = run.name if backend.adapters and run.name in generator.adapters() else None
    return _with_adapters(Served(backend.name, engine, backend.name, own, lineage=of_run(run)), generator, backend)


def folder_model(backend: Backend, order: ServeOrder) -> list[Served]:
    """Of an exported folder, and of each adapter on it."""
    folder = Path(backend.place)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = from_folder(folder, adapters=backend.adapters, dtype=dtype_of(order), limits=limits_of(order))
    engine = engine_of(folder, generator, tokenizer)
    return _with_adapters(Served(backend.name, engine, backend.name, lineage=of_export(folder)), generator, backend)


def dtype_of(order: ServeOrder) -> torch.dtype | None:
    """None: as the engine finds best."""
    return None if order.dtype == "auto" else getattr(torch, order.dtype)


def _with_adapters(served: Served, generator: Generator, backend: Backend) -> list[Served]:
    """The model, and each further adapter as a model of its own."""
    others = [
        Served(name, served.engine, served.model, name, lineage={**served.lineage, "adapter": name})
        for name in generator.adapters()
        if name in backend.adapters
    ]
    return [served, *others]
