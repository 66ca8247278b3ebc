"""Requests to engines in tests: asked at once, in one event loop, and answered by plain `generate` one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch

from tunedock.serve.engines.generator import Asked, Sampling, Token

GREEDY = Sampling(temperature=0.0)
CPU = torch.device("cpu")


def asked(prompt: Sequence[int], most: int = 12, sampling: Sampling = GREEDY, **more: Any) -> Asked:
    return Asked(
        **{"id": "r", "prompt": list(prompt), "max_tokens": most, "stop_ids": frozenset(), "sampling": sampling} | more
    )


async def answer(engine: Any, request: Asked) -> list[Token]:
    return [token async for token in engine.submit(request)]


def together(engine: Any, requests: Sequence[Asked]) -> list[list[Token]]:
    async def all_of_them() -> list[list[Token]]:
        return await asyncio.wait_for(asyncio.gather(*(answer(engine, request) for request in requests)), 240)

    return asyncio.run(all_of_them())


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.id for token in tokens]


def prompts(vocabulary: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (length,), generator=draw).tolist() for length in lengths]


@torch.no_grad()
def by_generate(model: Any, prompt: Sequence[int], most: int) -> list[int]:
    """Greedily, alone, to its full length."""
    given = torch.tensor([list(prompt)])
    made = model.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[0, len(prompt) :].tolist()


def until_idle(engine: Any, timeout_s: float = 20.0) -> None:
    """Waits until an engine has given everything up that it held."""

    async def idle() -> None:
        while (load := engine.load()).running or load.waiting:
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(idle(), timeout_s))
