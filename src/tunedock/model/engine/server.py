"""What is asked of an engine over HTTP: its models, an adapter loaded and unloaded (vLLM's runtime LoRA interface), completions.

What may pass (a lost connection, a time-out, 408, 409, 429, 5xx) is tried again by the `openai` client, after growing pauses or
those the server asks for. What is left is told apart here: nobody there, no reply in time, a refusal.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunedock.errors import DependencyError, EngineError, RecipeError
from tunedock.recipe.objectives.rollout import OpenAIEngine

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""

LONGEST_PAUSE_S = 8.0
"""Of the client, between two tries, unless the server asks for another."""

CLOSING_S = 5.0
"""For good-byes, at the end of a run."""


class Refusal(Exception):  # noqa: N818 - the engine's, which who asked makes an error of
    """The server has answered, and not with what was asked for."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"HTTP {status}: {said}" if said else f"HTTP {status}")
        self.status = status
        self.said = said


@dataclass(frozen=True, slots=True)
class Served:
    """An entry of /v1/models."""

    name: str
    max_model_len: int | None
    """Tokens of prompt and answer together; None where the server does not say."""


class Server:
    def __init__(self, engine: OpenAIEngine, *, rank: int) -> None:
        """`rank`: of the adapters to come. Raises DependencyError without the package openai, RecipeError without the key."""
        if importlib.util.find_spec("openai") is None:
            raise DependencyError(
                "rollouts on an engine need the package openai, which is not installed",
                where="objective.engine",
                hint="pip install 'tunedock[engine]'",
            )
        self._engine = engine
        self._rank = rank
        self._key = _key(engine)
        self._client: AsyncOpenAI | None = None

    @property
    def url(self) -> str:
        return self._engine.base_url.rstrip("/")

    @property
    def how_to_start(self) -> str:
        most = next((rank for rank in LORA_RANKS if rank >= self._rank), self._rank)
        return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {self._engine.model} --enable-lora --max-lora-rank {most}"

    async def models(self) -> list[Served]:
        """Raises EngineError when nobody answers, or something else than an engine."""
        try:
            listed = await self._ask("get", "/models", object)
        except Refusal as refusal:
            raise self.error(refusal, "the models cannot be listed") from None
        data = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(data, list):
            raise EngineError("what answers is no OpenAI-compatible server", where=self.url, hint=self._url_hint)
        return [
            Served(entry["id"], length if isinstance(length := entry.get("max_model_len"), int) else None)
            for entry in data
            if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        ]

    async def load(self, name: str, path: str) -> None:
        """Has the server load an adapter from a folder that it sees as `path`. Raises EngineError with what it wants."""
        try:
            await self._ask("post", "/load_lora_adapter", str, {"lora_name": name, "lora_path": path})
        except Refusal as refusal:
            # a try that was given up may have been done all the same, and the next one then comes too late
            if "already" in refusal.said and name in {served.name for served in await self.models()}:
                return
            raise self._not_loaded(refusal, name, path) from None

    async def unload(self, name: str) -> None:
        """Raises Refusal; an adapter that is not there any more is none."""
        try:
            await self._ask("post", "/unload_lora_adapter", str, {"lora_name": name})
        except Refusal as refusal:
            if name in {served.name for served in await self.models()}:
                raise refusal from None

    async def complete(self, body: Mapping[str, Any]) -> Any:
        """The reply, whatever JSON it is. Raises Refusal, EngineError."""
        return await self._ask("post", "/completions", object, body)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
        self._client = None

    def error(self, refusal: Refusal, what: str) -> EngineError:
        if refusal.status in (401, 403):
            name = self._engine.api_key_env
            said = (
                f"the environment variable {name} holds another key" if name else "name its variable in `api_key_env`"
            )
            return EngineError(f"{what}: {refusal}", where=self.url, hint=f"the engine wants a key; {said}")
        hint = self._url_hint if refusal.status in (404, 405) else "the engine's own log says more"
        return EngineError(f"{what}: {refusal}", where=self.url, hint=hint)

    def _not_loaded(self, refusal: Refusal, name: str, path: str) -> EngineError:
        what = f"the engine does not load the adapter: {refusal}"
        if refusal.status in (401, 403):
            return self.error(refusal, "the engine does not load the adapter")
        if name in refusal.said and "rank" not in refusal.said and refusal.status == 404:
            hint = (
                f"it must see the folder {path}: on another machine or in a container, share one and name it in "
                "`objective.engine.adapter_dir`, and as the engine sees it in `adapter_dir_on_server`"
            )
            return EngineError(what, where=self.url, hint=hint)
        return EngineError(
            what, where=self.url, hint=f"adapters are changed while vLLM runs, so start it by: {self.how_to_start}"
        )

    async def _ask(self, method: str, path: str, form: type[Any], body: Mapping[str, Any] | None = None) -> Any:
        import openai

        client = self._connected()
        tries = self._engine.max_retries + 1
        total_s = tries * self._engine.timeout_s + (tries - 1) * LONGEST_PAUSE_S
        try:
            async with asyncio.timeout(total_s):
                if method == "get":
                    return await client.get(path, cast_to=form)
                return await client.post(path, cast_to=form, body=dict(body or {}))
        except (openai.APITimeoutError, TimeoutError):
            raise EngineError(
                f"{path} gave no reply within {self._engine.timeout_s:g} s, tried {_times(tries)}",
                where=self.url,
                hint="raise `objective.engine.timeout_s`, or lower `objective.engine.concurrency`",
            ) from None
        except openai.APIStatusError as raised:
            raise Refusal(raised.status_code, _said(raised)) from None
        except openai.APIConnectionError as raised:
            raise EngineError(
                f"{_short(str(raised.__cause__ or raised))}, tried {_times(tries)}",
                where=self.url,
                hint=f"is the engine running, and is this its address? Start it by: {self.how_to_start}",
            ) from None
        except (openai.APIError, ValueError) as raised:
            raise EngineError(
                f"{path} did not reply with JSON: {_short(str(raised))}", where=self.url, hint=self._url_hint
            ) from None

    @property
    def _url_hint(self) -> str:
        return "`objective.engine.base_url` ends with `/v1` as a rule: http://localhost:8000/v1"

    def _connected(self) -> AsyncOpenAI:
        if self._client is None:
            from openai import AsyncOpenAI

            # A key is always given: without one the client would send OPENAI_API_KEY to whatever server this is.
            self._client = AsyncOpenAI(
                base_url=self.url,
                api_key=self._key,
                timeout=self._engine.timeout_s,
                max_retries=self._engine.max_retries,
            )
        return self._client


def _key(engine: OpenAIEngine) -> str:
    if engine.api_key_env is None:
        return "none"
    key = os.environ.get(engine.api_key_env, "").strip()
    if not key:
        raise RecipeError(
            f"the environment variable {engine.api_key_env} is not set",
            where="objective.engine.api_key_env",
            hint="it holds the key of the engine; set it where training runs",
        )
    return key


def _times(tries: int) -> str:
    return "once" if tries == 1 else f"{tries} times"


def _said(raised: APIStatusError) -> str:
    """By the server, where it says it as OpenAI does; else the beginning of what came."""
    message = raised.body.get("message") if isinstance(raised.body, dict) else None
    if isinstance(message, str):
        return _short(message)
    return _short(raised.message.removeprefix(f"Error code: {raised.status_code}").lstrip(" -"))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"
