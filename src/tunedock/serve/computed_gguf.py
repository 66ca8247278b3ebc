"""A GGUF file, computed in this process by llama.cpp, without PyTorch."""

from __future__ import annotations

from pathlib import Path

from tunedock.recipe.serving import Backend, ServeOrder
from tunedock.serve.engines.gguf import find_file, tokenizer_of
from tunedock.serve.engines.llama import from_gguf
from tunedock.serve.exported import engine_of, limits_of
from tunedock.serve.lineage import of_export
from tunedock.serve.models import Served


def gguf_model(backend: Backend, order: ServeOrder) -> list[Served]:
    file = find_file(Path(backend.place))
    tokenizer = tokenizer_of(file)
    engine = engine_of(file.parent, from_gguf(file, limits=limits_of(order)), tokenizer)
    return [Served(backend.name, engine, backend.name, lineage=of_export(file.parent))]
