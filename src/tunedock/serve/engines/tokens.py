"""A generator of this process as an engine: conversations become its tokens by the model's own template, its tokens text again.

The prompt is the one the run was trained with (`data.chat`), so what is served is what was trained. Of tools, only calls written
between `<tool_call>` tags are read back (Qwen's and Hermes' way); a model whose template writes them otherwise is said not to call
tools.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunedock.data.chat import Chat
from tunedock.data.conversation import Message, ToolCall
from tunedock.errors import DataError
from tunedock.serve.engines.generator import Asked, EngineGone, Generator, Load, Overloaded, Sampling, Token
from tunedock.serve.errors import ApiError, invalid, no_model, too_long, unavailable, unsupported
from tunedock.serve.jobs import (
    CHARACTERS_A_TOKEN,
    ChatJob,
    Delta,
    Event,
    Finish,
    Job,
    Reason,
    TextJob,
    TokenLogprob,
    Usage,
)
from tunedock.serve.requests import arguments_of
from tunedock.serve.surface import ChatMessage
from tunedock.serve.text import CALL, THINK, UNTHINK, Detokeniser, Parts, Stops

QUICK_CHARACTERS = 16 << 10
"""Of prompts made on the spot; the tokens of a megabyte take seconds, and others want to be answered."""
DRAWN_TOGETHER = 4
"""Characters that normalising may make one of; a letter and its accents."""
_PROBE = ToolCall("probe", {"of": "tools"}, "call_1")


@dataclass(slots=True)
class _Tally:
    """What is counted of one answer."""

    tokens: int = 0
    thoughts: int = 0
    queued_s: float | None = None


class TokenEngine:
    """`chat`: prompts and stop tokens. `thinking`: whether the run was trained to answer with reasoning."""

    kind = "local"

    def __init__(
        self,
        generator: Generator,
        tokenizer: PreTrainedTokenizerBase,
        chat: Chat,
        *,
        thinking: bool,
        system: str | None = None,
    ) -> None:
        self.generator = generator
        self._tokenizer = tokenizer
        self._chat = chat
        self._thinking = thinking
        self._system = system
        self._widest = DRAWN_TOGETHER * max(map(len, tokenizer.get_vocab()))
        """Characters that a token stands for at most."""
        self._long_prompts = ThreadPoolExecutor(1, "long-prompts")
        template = tokenizer.chat_template
        self._thinks = thinking or UNTHINK in (template if isinstance(template, str) else json.dumps(template))
        tools = {"tools"} if not chat.documents and _calls_between_tags(chat) else set()
        self.can = frozenset({"n", "seed", "logprobs", "completions"} | tools)

    # -- jobs ------------------------------------------------------------------------------------------------------------

    async def chat(self, job: ChatJob) -> AsyncGenerator[Event]:
        prompt = await self._prompt(job)
        opened = self._tokenizer.decode(prompt[-8:]).rstrip("\n").endswith(THINK)
        parts = [
            Parts(index, thinks=self._thinks or opened, calls=bool(job.tools) and "tools" in self.can, inside=opened)
            for index in range(job.n)
        ]
        events = self._answers(job, prompt, parts)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def complete(self, job: TextJob) -> AsyncGenerator[Event]:
        prompt = await self._prompt(job)
        parts = [Parts(index, thinks=False, calls=False) for index in range(job.n)]
        events = self._answers(job, prompt, parts)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        raise unsupported("making embeddings", "model")

    def count(self, job: ChatJob | TextJob) -> int:
        """Exactly, but of long prompts. Raises ApiError for one that is too long whatever its tokens are."""
        if job.characters > QUICK_CHARACTERS:
            self._require_fitting(job)
            return job.characters // CHARACTERS_A_TOKEN + 1
        return len(self._ids(job))

    async def ready(self) -> str | None:
        gone = self.generator.load().more.get("gone")
        return None if gone is None else str(gone)

    def load(self) -> Load:
        return self.generator.load()

    async def close(self) -> None:
        self._long_prompts.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.generator.close)

    # -- prompts ---------------------------------------------------------------------------------------------------------

    async def _prompt(self, job: ChatJob | TextJob) -> list[int]:
        """Token ids: of a long prompt by a thread of its own, one after the other. Raises ApiError."""
        if job.ids or job.characters <= QUICK_CHARACTERS:
            return self._ids(job)
        try:
            work = asyncio.get_running_loop().run_in_executor(self._long_prompts, self._ids, job)
        except RuntimeError:  # it was closed
            raise _told(EngineGone("the engine was closed")) from None
        return await work

    def _ids(self, job: ChatJob | TextJob) -> list[int]:
        """Made once."""
        if not job.ids:
            job.ids.extend(self._chat_ids(job) if isinstance(job, ChatJob) else self._text_ids(job))
        return job.ids

    def _chat_ids(self, job: ChatJob) -> list[int]:
        """Raises ApiError for a conversation that the model's template refuses."""
        if self._chat.documents:
            raise unsupported("a conversation, for it was trained on documents,", "messages")
        messages = [_message(message, index) for index, message in enumerate(job.messages)]
        if self._system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", self._system))
        tools = [json.loads(tool.model_dump_json(exclude_none=True)) for tool in job.tools]
        thinking = self._thinking if job.thinking is None else job.thinking
        try:
            return self._chat.prompt_ids(messages, tools, thinking=thinking)
        except DataError as error:
            raise invalid(f"{error.message}: {error.hint}" if error.hint else error.message, "messages") from None

    def _require_fitting(self, job: ChatJob | TextJob) -> None:
        """Raises ApiError for more characters than the longest tokens would hold: who says so much need not be read."""
        said = _said(job) if isinstance(job, ChatJob) else len(job.prompt) if isinstance(job.prompt, str) else 0
        if said > self.generator.longest * self._widest:
            raise too_long(said // self._widest, self.generator.longest, at_least=True)

    def _text_ids(self, job: TextJob) -> list[int]:
        if isinstance(job.prompt, str):
            ids: list[int] = self._tokenizer(job.prompt)["input_ids"]
            return ids
        if any(token >= len(self._tokenizer) for token in job.prompt):
            raise invalid(f"a token is beyond the vocabulary's {len(self._tokenizer)}", "prompt")
        return list(job.prompt)

    # -- answers ---------------------------------------------------------------------------------------------------------

    async def _answers(self, job: Job, prompt: list[int], parts: Sequence[Parts]) -> AsyncGenerator[Event]:
        """All answers of a job at once, their events as they come; at the end the usage."""
        room = self.generator.longest - len(prompt)
        if not prompt:
            raise invalid("the prompt is empty", "prompt")
        if room < 1:
            raise too_long(len(prompt), self.generator.longest)
        if job.adapter is not None and job.adapter not in self.generator.adapters():
            raise no_model(job.adapter)
        asked = Asked(
            id=job.id,
            prompt=prompt,
            max_tokens=min(room, job.max_tokens or room),
            stop_ids=self._chat.stop_ids,
            sampling=job.sampling,
            adapter=job.adapter,
            top_logprobs=job.top_logprobs,
        )
        queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue(maxsize=64)
        tallies = [_Tally() for _ in parts]

        async def one(part: Parts, tally: _Tally) -> None:
            try:
                own = replace(asked, id=f"{job.id}-{part.index}", sampling=_own(job.sampling, part.index))
                async for event in self._answer(own, part, job.stops, tally):
                    await queue.put(event)
                await queue.put(None)
            except Exception as error:  # noqa: BLE001 - policy: handed to who waits for the answers, and raised there
                await queue.put(error)

        tasks = [asyncio.create_task(one(*each)) for each in zip(parts, tallies, strict=True)]
        try:
            left = len(tasks)
            while left:
                event = await queue.get()
                if event is None:
                    left -= 1
                elif isinstance(event, BaseException):
                    raise _told(event)
                else:
                    yield event
            tokens, thoughts = sum(one.tokens for one in tallies), sum(one.thoughts for one in tallies)
            yield Usage(len(prompt), tokens, thoughts, queued_s=tallies[0].queued_s)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(
        self, asked: Asked, part: Parts, stop_texts: Sequence[str], tally: _Tally
    ) -> AsyncGenerator[Event]:
        words, stops = Detokeniser(self._tokenizer), Stops(stop_texts)
        reason: Reason = "length"
        told: list[TokenLogprob] = []
        stream = self.generator.submit(asked)
        try:
            async for token in stream:
                tally.tokens += 1
                tally.thoughts += part.thinking
                tally.queued_s = tally.queued_s if token.queued_s is None else token.queued_s
                if token.finish == "stop":
                    reason = "stop"
                    break
                if token.logprob is not None:
                    told.append(self._logprob(token))
                text = stops.add(words.add(token.id))
                for event in self._with(part.add(text), told):
                    yield event
                if stops.met:
                    reason = "stop"
                    break
        finally:
            await stream.aclose()
        text = "" if stops.met else stops.add(words.rest()) + stops.rest()
        for event in self._with([*part.add(text), *part.rest()], told):
            yield event
        if told:
            yield Delta(part.index, logprobs=tuple(told))
        yield Finish(part.index, "tool_calls" if part.made else reason)

    def _with(self, events: Any, told: list[TokenLogprob]) -> list[Event]:
        """The likelihoods gathered so far go with the first text there is."""
        found: list[Event] = list(events)
        for place, event in enumerate(found):
            if isinstance(event, Delta) and event.text and told:
                found[place] = replace(event, logprobs=tuple(told))
                told.clear()
                break
        return found

    def _logprob(self, token: Token) -> TokenLogprob:
        top = tuple((*self._text(one), value) for one, value in token.alternatives)
        return TokenLogprob(*self._text(token.id), float(token.logprob or 0.0), top)

    def _text(self, token: int) -> tuple[str, tuple[int, ...]]:
        text: str = self._tokenizer.decode([token])
        return text, tuple(text.encode("utf-8", errors="replace"))


def _own(sampling: Sampling, index: int) -> Sampling:
    """Of several answers each draws its own way."""
    return sampling if sampling.seed is None or index == 0 else replace(sampling, seed=sampling.seed + index)


def _told(error: BaseException) -> BaseException:
    match error:
        case ApiError():
            return error
        case Overloaded():
            return unavailable(f"too many requests wait: {error}")
        case EngineGone():
            return unavailable(f"the engine of this model has ended: {error}", 5.0)
        case ValueError():
            return invalid(str(error), "messages")
    return error


def _message(message: ChatMessage, index: int) -> Message:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text or "" for part in content or ())
    calls = tuple(
        ToolCall(call.function.name, arguments_of(call, f"messages[{index}].tool_calls"), call.id)
        for call in message.tool_calls or ()
    )
    return Message(
        "system" if message.role == "developer" else message.role,
        text,
        reasoning=message.reasoning or message.reasoning_content,
        tool_calls=calls,
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _said(job: ChatJob) -> int:
    """Characters of what is said, all of which templates put into a prompt."""
    contents = [message.content for message in job.messages]
    return sum(
        len(one) if isinstance(one, str) else sum(len(part.text or "") for part in one or ()) for one in contents
    )


def _calls_between_tags(chat: Chat) -> bool:
    """Whether the template writes calls between tags, by rendering one."""
    asked = Message("user", "Which probe is asked?")
    call = Message("assistant", "", tool_calls=(_PROBE,))
    result = Message("tool", "done", tool_call_id="call_1", name="probe")
    try:
        return f'{CALL}\n{{"name": "probe"' in chat.prompt((asked, call, result), thinking=False)
    except DataError:
        return False
