"""From the thread that computes to the event loop that asked: a request's tokens; and back: that nobody wants them any more."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Self

from tunedock.serve.engines.generator import Token


class Outlet:
    """Where a request's tokens are put, for the event loop it is made in."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.come: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self.lost = False
        """Whether that loop is no more."""


class Stream:
    """What a reader holds of a request, and nobody else: once it is forgotten, so is the request.

    `forgotten` is called once, from any thread and from the garbage collector too, where the reader leaves before the end: it must
    take no lock.
    """

    def __init__(self, outlet: Outlet, forgotten: Callable[[], None]) -> None:
        self._outlet = outlet
        self._forgotten = forgotten
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        if self._over:
            raise StopAsyncIteration
        try:
            come = await self._outlet.come.get()
        except asyncio.CancelledError:
            self._leave()
            raise
        if isinstance(come, Exception):
            self._over = True
            raise come
        self._over = come.finish is not None
        return come

    async def aclose(self) -> None:
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if not self._over:
            self._over = True
            self._forgotten()


Parcel = tuple[Outlet, Token | Exception]


def deliver(parcels: Iterable[Parcel]) -> None:
    """Hands a step's tokens over, with one call into each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Parcel]] = defaultdict(list)
    for parcel in parcels:
        by_loop[parcel[0].loop].append(parcel)
    for loop, some in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, some)
        except RuntimeError:  # closed
            for outlet, _ in some:
                outlet.lost = True


def _put_all(parcels: list[Parcel]) -> None:
    for outlet, come in parcels:
        outlet.come.put_nowait(come)
