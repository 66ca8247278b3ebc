"""An OpenAI-compatible server as an engine: vLLM, SGLang, Ollama, llama.cpp's, another gateway. What a client asked is asked again.

Answers are always streamed from it, so that a client that goes away ends the work there too. Whatever it says is read by our own
rules: what is no event of OpenAI's kind is an error of the engine, not the client's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from tunedock.serve.engines.generator import Load
from tunedock.serve.engines.remote_words import (
    LONGEST_LINE,
    broken,
    chat_events,
    refused,
    silent,
    text_events,
    theirs,
    usage_of,
    values,
)
from tunedock.serve.errors import unavailable, unsupported
from tunedock.serve.jobs import CHARACTERS_A_TOKEN, ChatJob, Event, Finish, Job, TextJob, Usage

CAN: Mapping[str, frozenset[str]] = {
    "vllm": frozenset(
        {"n", "seed", "logprobs", "tools", "tool_choice", "response_format", "completions", "embeddings"}
    ),
    "sglang": frozenset(
        {"n", "seed", "logprobs", "tools", "tool_choice", "response_format", "completions", "embeddings"}
    ),
    "llama-server": frozenset({"seed", "logprobs", "tools", "response_format", "completions", "embeddings"}),
    "ollama": frozenset({"seed", "tools", "response_format", "completions", "embeddings"}),
    "openai": frozenset(
        {"n", "seed", "logprobs", "tools", "tool_choice", "response_format", "completions", "embeddings"}
    ),
    "tunedock": frozenset({"n", "seed", "logprobs", "tools", "completions"}),
}
"""By the kind of server."""
OWN_FIELDS = frozenset({"top_k", "min_p", "repetition_penalty"})
"""vLLM's, which others refuse."""
TAKES_OWN = frozenset({"vllm", "sglang", "tunedock"})
IDLE_S = 2.0
"""How long a connection is kept for the next request: shorter than servers keep theirs, which would close it as it is used."""
LONGEST_AFTER = 1 << 10
AFTER_S = 0.25
"""For what an engine sends after `[DONE]`: the end, so that the connection can be used again."""


@dataclass(frozen=True, slots=True)
class Trained:
    """How a model was trained to be asked, for requests that do not say it themselves. Of servers that are not told otherwise."""

    system: str | None = None
    thinking: bool | None = None
    """None: its template has no switch for it."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end its answers, which its generation config may lack."""


class RemoteEngine:
    """`base_url` ends in `/v1`. `key`: what it wants to see, if anything."""

    def __init__(
        self,
        kind: str,
        base_url: str,
        *,
        key: str | None = None,
        connect_s: float = 5.0,
        silence_s: float = 300.0,
        trained: Trained | None = None,
    ) -> None:
        self.kind = kind
        self._trained = trained or Trained()
        self.can = CAN[kind]
        self._url = base_url.rstrip("/")
        self._headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._times = aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=silence_s)
        self._session: aiohttp.ClientSession | None = None
        self._running = 0

    def move(self, base_url: str) -> None:
        """Asks there from now on."""
        self._url = base_url.rstrip("/")

    async def chat(self, job: ChatJob) -> AsyncGenerator[Event]:
        body = self._common(job)
        body["messages"] = [message.model_dump(mode="json", exclude_none=True) for message in job.messages]
        if self._trained.system is not None and job.messages[0].role not in ("system", "developer"):
            body["messages"].insert(0, {"role": "system", "content": self._trained.system})
        if job.tools:
            body["tools"] = [tool.model_dump(mode="json", exclude_none=True) for tool in job.tools]
            body["tool_choice"] = job.tool_choice
            if not job.parallel_tool_calls:
                body["parallel_tool_calls"] = False
        if job.response_format is not None:
            body["response_format"] = dict(job.response_format)
        if job.top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": job.top_logprobs}
        if job.thinking is not None:
            if self.kind not in TAKES_OWN:
                raise unsupported("switching reasoning on or off", "chat_template_kwargs")
            body["chat_template_kwargs"] = {"enable_thinking": job.thinking}
        elif self._trained.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self._trained.thinking}
        events = self._events("chat/completions", body, chat_events)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def complete(self, job: TextJob) -> AsyncGenerator[Event]:
        body = self._common(job)
        body["prompt"] = job.prompt if isinstance(job.prompt, str) else list(job.prompt)
        if job.top_logprobs is not None:
            body["logprobs"] = job.top_logprobs
        events = self._events("completions", body, text_events)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        body = {"model": model, "input": [text if isinstance(text, str) else list(text) for text in texts]}
        async with self._asked("embeddings", body) as answer:
            try:
                value = json.loads(await _bounded(answer, LONGEST_LINE))
                rows = sorted(value["data"], key=lambda row: int(row["index"]))
                vectors = [[float(number) for number in row["embedding"]] for row in rows]
                return vectors, int(value.get("usage", {}).get("prompt_tokens", 0))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise broken(error) from error

    def count(self, job: ChatJob | TextJob) -> int:
        return job.characters // CHARACTERS_A_TOKEN + 1

    async def ready(self) -> str | None:
        times = aiohttp.ClientTimeout(total=5.0)
        try:
            async with self._client().get(f"{self._url}/models", timeout=times, allow_redirects=False) as answer:
                return None if answer.status == 200 else f"the engine answers with HTTP {answer.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"{type(error).__name__}: the engine does not answer"

    def load(self) -> Load:
        return Load(self._running, 0)

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _client(self) -> aiohttp.ClientSession:
        """Made where it is first used: it belongs to one event loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=self._headers,
                timeout=self._times,
                auto_decompress=False,
                trust_env=False,
            )
        return self._session

    def _common(self, job: Job) -> dict[str, Any]:
        """What all requests have. Sampling is only said where the client said it: else the engine's own defaults hold."""
        given = {name: getattr(job.sampling, name) for name in sorted(job.given)}
        if (own := OWN_FIELDS & given.keys()) and self.kind not in TAKES_OWN:
            raise unsupported(f"`{min(own)}`", min(own))
        body: dict[str, Any] = {
            "model": job.adapter or job.model,
            **given,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if job.max_tokens is not None:
            body["max_tokens"] = job.max_tokens
        if job.n > 1:
            body["n"] = job.n
        if job.stops:
            body["stop"] = list(job.stops)
        if self._trained.stop_ids:
            body["stop_token_ids"] = list(self._trained.stop_ids)
        return body

    async def _events(
        self, path: str, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], list[Event]]
    ) -> AsyncGenerator[Event]:
        usage, finished = None, set()
        async with self._asked(path, body) as answer:
            try:
                async for value in values(answer):
                    if "error" in value:
                        raise theirs(502, value)
                    if value.get("usage"):
                        usage = usage_of(value["usage"])
                    for event in read(value):
                        if isinstance(event, Finish):
                            finished.add(event.index)
                        yield event
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                raise broken(error) from error
            except TimeoutError as error:
                raise silent() from error
            except aiohttp.ClientError as error:
                raise unavailable(f"the engine broke off: {type(error).__name__}") from error
            if len(finished) < int(body.get("n", 1)):
                raise unavailable("the engine ended its answer without an end")
            yield usage or Usage(0, 0)
            await _ended(answer)

    @asynccontextmanager
    async def _asked(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        self._running += 1
        try:
            async with await self._posted(f"{self._url}/{path}", json.dumps(body).encode()) as answer:
                if answer.status != 200:
                    raise refused(answer.status, await _bounded(answer, 1 << 20))
                yield answer
        finally:
            self._running -= 1

    async def _posted(self, url: str, data: bytes) -> aiohttp.ClientResponse:
        """The answer's head. A connection that was kept may be closed as it is used: then once more, on another."""
        try:
            for again in (True, False):
                try:
                    return await self._client().post(url, data=data, headers=_JSON, allow_redirects=False)
                except aiohttp.ServerDisconnectedError:
                    if not again:
                        raise
        except TimeoutError as error:
            raise silent() from error
        except aiohttp.ClientError as error:
            raise unavailable("the engine of this model does not answer") from error
        raise AssertionError("unreachable")


_JSON = {"Content-Type": "application/json"}


async def _ended(answer: aiohttp.ClientResponse) -> None:
    """Reads the end that follows `[DONE]`. Without it the connection is closed with the answer, which is slow and not wrong."""
    with suppress(aiohttp.ClientError, TimeoutError):
        async with asyncio.timeout(AFTER_S):
            left = LONGEST_AFTER
            while left > 0 and (piece := await answer.content.readany()):
                left -= len(piece)


async def _bounded(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """At most so many bytes of it."""
    data = b""
    try:
        async for piece in answer.content.iter_any():
            data += piece
            if len(data) > most:
                break
    except TimeoutError as error:
        raise silent() from error
    except aiohttp.ClientError as error:
        raise unavailable(f"the engine broke off: {type(error).__name__}") from error
    return data[:most]
