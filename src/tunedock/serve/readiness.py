"""Whether the engines answer and the access store takes what is written: asked once a second at most, however many want to know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from tunedock.serve.access import Access
from tunedock.serve.jobs import Engine
from tunedock.serve.models import Models

FRESH_S = 1.0
LONGEST_S = 5.0
"""An engine that says nothing for so long does not answer."""


class Readiness:
    def __init__(self, models: Models, gate: Access) -> None:
        self._models = models
        self._gate = gate
        self._asked = float("-inf")
        self._asking: asyncio.Task[tuple[dict[int, str | None], bool | None]] | None = None
        self._found: dict[int, str | None] = {}
        """By the engine's identity: why it does not answer."""
        self.store: bool | None = None
        """Whether the access store took what was written last; None where there is none, or nobody has asked."""

    async def look(self) -> dict[str, str | None]:
        """Name -> why its engine does not answer, None where it does. Whoever asks meanwhile waits for the same answer."""
        models = self._models.all()
        if self._asking is None and (
            time.monotonic() - self._asked >= FRESH_S or any(id(one.engine) not in self._found for one in models)
        ):
            self._asking = asyncio.ensure_future(_ask(self._models.engines(), self._gate))
            self._asking.add_done_callback(self._came)
        if self._asking is not None:
            await asyncio.shield(self._asking)
        return {one.name: self._found.get(id(one.engine)) for one in models}

    def forget(self) -> None:
        """Something did not answer: whoever wants to know is told what is so now."""
        self._asked = float("-inf")

    def known(self, engine: Engine) -> bool | None:
        """What was found last; None where nobody has asked."""
        return None if id(engine) not in self._found else self._found[id(engine)] is None

    def _came(self, task: asyncio.Task[tuple[dict[int, str | None], bool | None]]) -> None:
        self._asking, self._asked = None, time.monotonic()
        if not task.cancelled():
            self._found, self.store = task.result()


async def _ask(engines: Sequence[Engine], gate: Access) -> tuple[dict[int, str | None], bool | None]:
    answers, store = await asyncio.gather(asyncio.gather(*(_one(engine) for engine in engines)), _store(gate))
    return {id(engine): answer for engine, answer in zip(engines, answers, strict=True)}, store


async def _store(gate: Access) -> bool | None:
    try:
        return await gate.store_answers()
    except Exception:  # noqa: BLE001 - policy: a mistake of ours is told where it was made; who cannot ask the store lets nobody in
        return False


async def _one(engine: Engine) -> str | None:
    try:
        async with asyncio.timeout(LONGEST_S):
            return await engine.ready()
    except TimeoutError:
        return f"the engine said nothing for {LONGEST_S:g} s"
    except Exception as error:  # noqa: BLE001 - policy: an engine that cannot even say that it is not ready is not
        return f"{type(error).__name__}: the engine cannot say"
