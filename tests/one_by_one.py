"""A generator that answers with a real model, one token after the other, without batching: what the gateway's tests stand on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import torch
from transformers import PreTrainedModel

from tunedock.serve.engines.generator import Asked, EngineGone, Load, Overloaded, Token


class OneByOne:
    def __init__(self, model: PreTrainedModel, *, longest: int = 256, most: int = 32) -> None:
        self.longest = longest
        self._model = model
        self._most = most
        self._running = 0
        self.pause_s = 0.0
        """Between tokens, so that there is time to go away."""
        self.dies_after: int | None = None
        self.cancelled = 0

    def adapters(self) -> list[str]:
        return []

    def load_adapter(self, name: str, folder: str) -> None:
        raise ValueError("there are none")

    def drop_adapter(self, name: str) -> None: ...

    def load(self) -> Load:
        return Load(self._running, 0)

    def close(self) -> None: ...

    async def submit(self, asked: Asked) -> AsyncGenerator[Token]:
        if self._running >= self._most:
            raise Overloaded(f"{self._running} are at work")
        self._running += 1
        whole = False
        draw = torch.Generator().manual_seed(asked.sampling.seed or 0)
        ids = list(asked.prompt)
        try:
            for number in range(asked.max_tokens):
                if self.dies_after is not None and number >= self.dies_after:
                    raise EngineGone("out of memory")
                await asyncio.sleep(self.pause_s)
                with torch.no_grad():
                    logprobs = torch.log_softmax(self._model(torch.tensor([ids])).logits[0, -1].float(), -1)
                if asked.sampling.temperature == 0:
                    token = int(logprobs.argmax())
                else:
                    token = int(
                        torch.multinomial((logprobs / asked.sampling.temperature).softmax(-1), 1, generator=draw)
                    )
                ids.append(token)
                if token in asked.stop_ids:
                    whole = True
                    yield Token(token, finish="stop")
                    return
                told, top = None, ()
                if asked.top_logprobs is not None:
                    told = float(logprobs[token])
                    best = logprobs.topk(asked.top_logprobs)
                    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
                whole = number + 1 == asked.max_tokens
                yield Token(token, told, top, "length" if whole else None)
        finally:
            self._running -= 1
            self.cancelled += not whole
