"""Stands in for an engine that serves a judge: an OpenAI-compatible server whose score is the share of the reference's words that
the answer has, worked out from the request's own prompt. The model's name says how it misbehaves before it answers.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

KEY = "judge-key"


class StandInJudge:
    """Models: `words` behaves; `NAME-N` misbehaves N times for each prompt (500, 429, slow, cut, prose, nothing, html), without a
    number always; `keyed` wants the key."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = 0
        self.most_at_once = 0
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.app = FastAPI()
        self.app.post("/v1/chat/completions", response_model=None)(self._complete)

    def _complete(self, body: dict[str, Any], request: Request) -> Response | dict[str, Any]:
        with self._lock:
            self.requests.append(body)
            self.headers.append(dict(request.headers))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self._answer(body, request)
        finally:
            with self._lock:
                self.at_once -= 1

    def _answer(self, body: dict[str, Any], request: Request) -> Response | dict[str, Any]:
        name, _, times = body["model"].partition("-")
        prompt = body["messages"][-1]["content"]
        with self._lock:
            self._seen[prompt] += 1
            misbehaves = not times or self._seen[prompt] <= int(times)
        if name == "busy":
            time.sleep(0.05)
        if name == "keyed" and request.headers.get("authorization") != f"Bearer {KEY}":
            return Response('{"error": {"message": "wrong key"}}', 401, media_type="application/json")
        if misbehaves and name.isdecimal():
            headers = {"retry-after": "0.05"} if name == "429" else {}
            return Response('{"error": {"message": "no"}}', int(name), headers, media_type="application/json")
        if misbehaves and name == "slow":
            time.sleep(1.0)
        if misbehaves and name == "html":
            return PlainTextResponse("<html>gateway</html>", media_type="text/html")
        if misbehaves and name == "broken":
            return PlainTextResponse('{"choices": [', media_type="application/json")
        text = json.dumps({"score": round(10 * words_found(prompt), 3)})
        if misbehaves and name in REPLIES:
            text = REPLIES[name]
        reason = "length" if misbehaves and name == "cut" else "stop"
        message = {"role": "assistant", "content": text}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }


REPLIES = {"prose": "I would say it deserves a 9.", "nothing": "", "beyond": '{"score": 11}', "nan": '{"score": NaN}'}


def words_found(prompt: str) -> float:
    """Of the reference, in the answer."""
    wanted = re.search(r"<reference>\n(.*?)\n</reference>", prompt, re.DOTALL)
    said = re.search(r"<answer>\n(.*?)\n</answer>", prompt, re.DOTALL)
    words = set(wanted[1].split()) if wanted else set()
    return len(words & set(said[1].split() if said else [])) / len(words) if words else 0.0


@contextmanager
def serving() -> Iterator[StandInJudge]:
    """The server on a free port of this machine, for as long as the block lasts."""
    judge = StandInJudge()
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    judge.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    server = uvicorn.Server(uvicorn.Config(judge.app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield judge
    finally:
        server.should_exit = True
        thread.join(5)
        listening.close()
