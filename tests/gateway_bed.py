"""A gateway on this machine's loopback, by the real server, in front of a small real model."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from tunedock.serve.access import Access, AccessSettings

import families
from one_by_one import OneByOne
from tunedock.data.chat import Chat
from tunedock.serve.app import Bounds, Gateway, create_app
from tunedock.serve.engines.tokens import TokenEngine
from tunedock.serve.metrics import Metrics
from tunedock.serve.models import Models, Served
from tunedock.serve.records import AccessLog


@dataclass
class Bed:
    url: str
    gateway: Gateway
    generator: OneByOne
    log: Path
    loop: asyncio.AbstractEventLoop


def token_engine(family: str = "qwen3", *, thinking: bool = False) -> tuple[TokenEngine, OneByOne]:
    generator = OneByOne(families.tiny_model(family))
    tokenizer = families.tokenizer(family)
    chat = Chat(
        tokenizer, stop_ids=families.stop_ids(family), max_length=4096, over_length="drop", train_on="assistant"
    )
    return TokenEngine(generator, tokenizer, chat, thinking=thinking), generator


@contextmanager
def gateway(
    folder: Path, *, gate: Access | None = None, bounds: Bounds | None = None, family: str = "qwen3"
) -> Iterator[Bed]:
    engine, generator = token_engine(family)
    models = Models([Served("tiny", engine, "tiny", lineage={"run": "r1"})])
    log = AccessLog(folder / "access.jsonl")
    made = Gateway(
        models,
        gate or Access.open(AccessSettings(off=True, bind="127.0.0.1")),
        log,
        Metrics(models),
        bounds or Bounds(),
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(create_app(made), host="127.0.0.1", port=port, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()
        for one in made.models.engines():
            await one.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    try:
        yield Bed(f"http://127.0.0.1:{port}", made, generator, folder / "access.jsonl", loops[0])
    finally:
        server.should_exit = True
        thread.join(10)
        log.close()
