"""An idle engine: OpenAI's chat interface, answered at once with the last message, by as little code as there can be.

    python -m benchmarks.gateway.echo PORT

It must never be what a gateway waits for, so it reads requests by their length alone and has two answers, whole and streamed.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import cast

MODELS = {"object": "list", "data": [{"id": "echo", "object": "model", "created": 0, "owned_by": "echo"}]}


def whole(text: str) -> bytes:
    return json.dumps(
        {
            "id": "chatcmpl-echo",
            "object": "chat.completion",
            "created": 0,
            "model": "echo",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 8, "completion_tokens": 8, "total_tokens": 16},
        }
    ).encode()


def streamed(text: str) -> bytes:
    """The words of it, an event each, then the end and the usage."""
    head = {"id": "chatcmpl-echo", "object": "chat.completion.chunk", "created": 0, "model": "echo"}
    deltas = [{"role": "assistant", "content": ""}, *({"content": word + " "} for word in text.split())]
    chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {"prompt_tokens": 8, "completion_tokens": 8, "total_tokens": 16}
    chunks.append({**head, "choices": [], "usage": usage})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


class Echo(asyncio.Protocol):
    def __init__(self) -> None:
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            at = head.find(b"\r\ncontent-length:")
            length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._data) < end + 4 + length:
                return
            body, self._data = self._data[end + 4 : end + 4 + length], self._data[end + 4 + length :]
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        kind, answer = b"application/json", json.dumps(MODELS).encode()
        if body:
            request = json.loads(body)
            text = request["messages"][-1]["content"]
            answer = streamed(text) if request.get("stream") else whole(text)
            kind = b"text/event-stream" if request.get("stream") else kind
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (kind, len(answer))
        self._transport.write(head + answer)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
