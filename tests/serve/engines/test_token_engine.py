"""Conversations as tokens: made once for a request, as it asks for them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway_bed import token_engine
from tunedock.serve.engines.generator import Sampling
from tunedock.serve.jobs import ChatJob, Usage
from tunedock.serve.surface import ChatMessage


def job(text: str, *, thinking: bool | None = None) -> ChatJob:
    return ChatJob(
        id="1", model="tiny", adapter=None, max_tokens=2, n=1, stops=(), sampling=Sampling(temperature=0.0),
        given=frozenset(), messages=(ChatMessage(role="user", content=text),), thinking=thinking,
    )  # fmt: skip


async def usage_of(engine: Any, asked: ChatJob) -> Usage:
    (usage,) = [event async for event in engine.chat(asked) if isinstance(event, Usage)]
    return usage


@pytest.mark.parametrize("thinking", [None, False, True])
def test_what_was_counted_is_what_is_asked_and_is_made_once(
    monkeypatch: pytest.MonkeyPatch, thinking: bool | None
) -> None:
    engine, _ = token_engine()
    made: list[bool] = []
    real = engine._chat.prompt_ids

    def counted(*given: Any, **named: Any) -> list[int]:
        made.append(named["thinking"])
        return real(*given, **named)

    monkeypatch.setattr(engine._chat, "prompt_ids", counted)
    asked = job("Where is my order?", thinking=thinking)
    assert engine.count(asked) == asyncio.run(usage_of(engine, asked)).prompt_tokens
    assert made == [bool(thinking)]
