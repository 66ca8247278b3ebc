"""A gateway on this machine's loopback, by the real server, in front of a small real model."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
from one_by_one import OneByOne
from tunedock.data.chat import Chat
from tunedock.serve.access import Access, AccessSettings
from tunedock.serve.connection import Waits
from tunedock.serve.engines.generator import Generator, Load
from tunedock.serve.engines.tokens import TokenEngine
from tunedock.serve.jobs import ChatJob, Engine, Event, TextJob
from tunedock.serve.metrics import Metrics
from tunedock.serve.models import Models, Served
from tunedock.serve.records import AccessLog
from tunedock.serve.server import Server, listen
from tunedock.serve.turn import Bounds, Gateway


@dataclass
class Bed:
    url: str
    gateway: Gateway
    log: Path
    loop: asyncio.AbstractEventLoop
    generator: OneByOne = field(init=False)
    """Of `tiny`."""


def token_engine(family: str = "qwen3", *, thinking: bool = False) -> tuple[TokenEngine, OneByOne]:
    generator = OneByOne(families.tiny_model(family))
    return engine_of(generator, family, thinking=thinking), generator


def engine_of(generator: Generator, family: str, *, thinking: bool = False) -> TokenEngine:
    tokenizer = families.tokenizer(family)
    chat = Chat(
        tokenizer, stop_ids=families.stop_ids(family), max_length=4096, over_length="drop", train_on="assistant"
    )
    return TokenEngine(generator, tokenizer, chat, thinking=thinking)


class NoEngine:
    """What every engine has, of one that answers nothing: for fakes that do one thing."""

    kind = "fake"
    can: frozenset[str] = frozenset()

    def chat(self, job: ChatJob) -> AsyncGenerator[Event]:
        raise NotImplementedError

    def complete(self, job: TextJob) -> AsyncGenerator[Event]:
        raise NotImplementedError

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        raise NotImplementedError

    def count(self, job: ChatJob | TextJob) -> int:
        return 1

    async def ready(self) -> str | None:
        return None

    def load(self) -> Load:
        return Load(0, 0)

    async def close(self) -> None: ...


@contextmanager
def gateway(
    folder: Path,
    *,
    gate: Access | None = None,
    bounds: Bounds | None = None,
    waits: Waits | None = None,
    tls: ssl.SSLContext | None = None,
    others: Mapping[str, Engine] | None = None,
    family: str = "qwen3",
    **settings: Any,
) -> Iterator[Bed]:
    """In front of a small model called `tiny`, and others."""
    engine, generator = token_engine(family)
    served = [
        Served("tiny", engine, "tiny", lineage={"run": "r1"}),
        *(Served(name, one, name) for name, one in (others or {}).items()),
    ]
    with gateway_of(folder, served, gate=gate, bounds=bounds, waits=waits, tls=tls, **settings) as bed:
        bed.generator = generator
        yield bed


@contextmanager
def gateway_of(
    folder: Path,
    served: Sequence[Served],
    *,
    gate: Access | None = None,
    bounds: Bounds | None = None,
    waits: Waits | None = None,
    tls: ssl.SSLContext | None = None,
    **settings: Any,
) -> Iterator[Bed]:
    """`settings`: of the `Gateway`."""
    models = Models(served)
    log = AccessLog(folder / "access.jsonl")
    made = Gateway(
        models,
        gate or Access.open(AccessSettings(off=True, bind="127.0.0.1")),
        log,
        Metrics(models),
        bounds or Bounds(),
        **settings,
    )
    listener = listen("127.0.0.1", 0)
    server = Server(made, waits=waits, tls=tls)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listener])
        for one in made.models.engines():
            await one.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.001)
    scheme = "https" if tls else "http"
    try:
        yield Bed(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}", made, folder / "access.jsonl", loops[0])
    finally:
        server.should_exit = True
        thread.join(10)
        log.close()
