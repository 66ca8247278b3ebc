"""A gateway for clients of all kinds: a model, one that calls tools, and vectors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import families
from access_bed import issued, opened
from gateway_bed import NoEngine, gateway, token_engine
from tunedock.serve.access import AccessSettings
from tunedock.serve.engines.generator import Asked, Load, Token
from tunedock.serve.engines.tokens import TokenEngine
from tunedock.serve.turn import Bounds

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


class FakeCaller:
    """A generator that knows two answers: where tools are in the prompt it calls one, with its result there it says so."""

    longest = 4096

    def __init__(self) -> None:
        self._tokenizer = families.tokenizer("qwen3")

    async def submit(self, asked: Asked) -> AsyncGenerator[Token]:
        prompt = self._tokenizer.decode(asked.prompt)
        text = CALL if "<tools>" in prompt and "<tool_response>" not in prompt else "It is sunny in Paris."
        for token in self._tokenizer(text)["input_ids"]:
            yield Token(token)
        yield Token(next(iter(asked.stop_ids)), finish="stop")

    def adapters(self) -> list[str]:
        return []

    def load_adapter(self, name: str, folder: str) -> None: ...

    def drop_adapter(self, name: str) -> None: ...

    def load(self) -> Load:
        return Load(0, 0)

    def close(self) -> None: ...


class FakeVectors(NoEngine):
    """An engine of embeddings: a text's vector is its length and 1."""

    can = frozenset({"embeddings"})

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        return [[float(len(text)), 1.0] for text in texts], sum(map(len, texts))


@dataclass(frozen=True)
class Called:
    """A gateway with keys, and one of them."""

    url: str
    key: str


@contextmanager
def called(folder: Path) -> Iterator[Called]:
    """Of models `tiny` (a real one), `caller` and `vectors`."""
    key = issued(folder / "access.db", "ada")
    real, _ = token_engine()
    caller = TokenEngine(FakeCaller(), families.tokenizer("qwen3"), real._chat, thinking=False)
    with (
        opened(AccessSettings(store=str(folder / "access.db"))) as access,
        gateway(
            folder, gate=access, bounds=Bounds(body_bytes=200_000), others={"caller": caller, "vectors": FakeVectors()}
        ) as made,
    ):
        yield Called(made.url, key)
