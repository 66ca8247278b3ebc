"""How the stage sets up what it serves from."""

from __future__ import annotations

import asyncio
import socket

from tunedock.serve.server import listen


def test_small_answers_do_not_wait_for_an_acknowledgement() -> None:
    """asyncio turns Nagle's algorithm off only on sockets that were made as TCP's by name."""

    async def accepted() -> bool:
        listener = listen("127.0.0.1", 0)
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def come(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            own = writer.get_extra_info("socket")
            found.set_result(bool(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        server = await asyncio.start_server(come, sock=listener)
        _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        try:
            return await asyncio.wait_for(found, 5)
        finally:
            writer.close()
            server.close()

    assert asyncio.run(accepted())
