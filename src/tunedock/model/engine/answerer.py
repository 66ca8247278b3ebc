"""Prompts -> sampled answers of an engine that has just been given the adapter as it is.

What is drawn depends on the rollout's seed and the prompt's place in it, as far as the engine keeps to seeds: vLLM batches requests
as they come, so that the last digits of its log-probabilities, and now and then a token, differ from one time to the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunedock.errors import EngineError
from tunedock.model.answers import Sampled, Sampling
from tunedock.model.engine.folders import AdapterFolders, require_loadable
from tunedock.model.engine.replies import Expected, NotAnAnswer, read
from tunedock.model.engine.server import CLOSING_S, Refusal, Server
from tunedock.model.policy import Policy
from tunedock.recipe.objectives.rollout import OpenAIEngine

POLL_S = 0.2
"""How often is looked at whether to stop."""

Between = Callable[[int], None]


class Engine:
    """Makes answers with the policy as it is, on a server (beside `model.answers.Sampler`). To be closed at the end."""

    def __init__(
        self,
        section: OpenAIEngine,
        policy: Policy,
        folders: AdapterFolders,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rank: int,
        stop_ids: Collection[int],
        longest: int,
        on_warning: Callable[[str], None],
    ) -> None:
        """`longest`: tokens of prompt and answer together, at most. Raises DependencyError, RecipeError (`Server`)."""
        self._section = section
        self._policy = policy
        self._folders = folders
        self._tokenizer = tokenizer
        self._stop_ids = sorted(stop_ids)
        eos = tokenizer.eos_token_id
        self._stop_id = int(eos) if eos in stop_ids else self._stop_ids[0]
        self._vocabulary = int(policy.config.get_text_config().vocab_size)
        self._longest = longest
        self._on_warning = on_warning
        self._server = Server(section, rank=rank)
        self._runner: asyncio.Runner | None = None
        self._loaded: str | None = None
        self._given_again: set[str] = set()
        self._told: set[str] = set()

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        answers: int,
        sampling: Sampling,
        *,
        seed: int,
        between: Between = lambda done: None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sampled]]:
        """As `Sampler` does. `between` is asked several times a second, and may raise to stop. Raises EngineError."""
        made: list[list[Sampled]] = self._run(self._all(prompts, answers, sampling, seed, between))
        return made

    @property
    def shared_out(self) -> bool:
        """One process asks: the engine has its own way to answer much at once, and one adapter to be given."""
        return False

    def begin(self) -> None:
        """Makes sure that the engine is there, has the model and can run the adapter; takes back what a killed process of this run
        left with it. Raises EngineError, ModelError."""
        require_loadable(self._policy.model)
        self._run(self._greeted())

    def close(self) -> None:
        """Takes the last adapter back. An engine that is gone is let go."""
        if self._runner is None:
            return
        with suppress(EngineError, TimeoutError):
            self._run(self._farewell())
        self._runner.close()
        self._runner = None
        self._folders.prune(keep=0)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(work)

    # -- the adapter ---------------------------------------------------------------------------------------------------

    async def _greeted(self) -> None:
        models = {served.name: served for served in await self._server.models()}
        if self._section.model not in models:
            others = [name for name in models if not name.startswith(self._folders.prefix)]
            raise EngineError(
                f"the engine has no model `{self._section.model}`",
                where=self._server.url,
                hint=f"it serves {', '.join(others[:5]) or 'none'}; write one of these as `objective.engine.model`, or start "
                f"another: {self._server.how_to_start}",
            )
        room = models[self._section.model].max_model_len
        if room is not None and room < self._longest:
            raise EngineError(
                f"the engine takes {room} tokens, and prompt and answer may have {self._longest}",
                where=self._server.url,
                hint=f"start it with `--max-model-len {self._longest}`, or lower `data.max_length`",
            )
        for name in models:
            if name.startswith(self._folders.prefix):
                await self._take_back(name)
        self._folders.prune(keep=0)

    async def _publish(self) -> None:
        """The adapter as it is, under a new name; the one before it is taken back."""
        name = self._folders.write(self._policy.model)
        await self._server.load(name, self._folders.seen_by_server(name))
        before, self._loaded = self._loaded, name
        if before is not None:
            await self._take_back(before)
        self._folders.prune()

    async def _take_back(self, name: str) -> None:
        try:
            await self._server.unload(name)
        except Refusal as refusal:
            self._warn(f"the engine keeps adapters that are no longer in use: {refusal}")

    async def _had_lost(self, name: str) -> bool:
        """Whether the engine had lost the adapter, which it then has again."""
        if name not in {served.name for served in await self._server.models()}:
            await self._server.load(name, self._folders.seen_by_server(name))
            self._given_again.add(name)
            self._on_warning("the engine had lost the adapter, and was given it again: was it started anew?")
        return name in self._given_again

    async def _farewell(self) -> None:
        try:
            async with asyncio.timeout(CLOSING_S):
                if self._loaded is not None:
                    await self._take_back(self._loaded)
        finally:
            self._loaded = None
            await self._server.close()

    # -- answers -------------------------------------------------------------------------------------------------------

    async def _all(
        self, prompts: Sequence[Sequence[int]], answers: int, sampling: Sampling, seed: int, between: Between
    ) -> list[list[Sampled]]:
        await _watched([self._publish()], lambda: between(0))
        made: list[list[Sampled]] = [[] for _ in prompts]
        guessed = 0
        turns, lost = asyncio.Semaphore(self._section.concurrency), asyncio.Lock()

        async def one(number: int) -> None:
            nonlocal guessed
            async with turns:
                made[number], guesses = await self._answers(prompts[number], answers, sampling, seed, number, lost)
                guessed += guesses

        await _watched([one(number) for number in range(len(prompts))], lambda: between(sum(map(len, made))))
        between(sum(map(len, made)))
        if guessed:
            self._warn(
                f"the engine gives no token ids: those of {guessed} of {len(prompts) * answers} answers are guessed from their "
                "text, and the model may have said it in other tokens"
            )
        return made

    async def _answers(
        self, prompt: Sequence[int], answers: int, sampling: Sampling, seed: int, number: int, lost: asyncio.Lock
    ) -> tuple[list[Sampled], int]:
        """To one prompt, and how many are guessed."""
        drawn = sampling.temperature > 0
        asked = answers if drawn else 1  # greedy answers are all the same, and vLLM refuses to make several
        body = self._body(prompt, asked, sampling, _seed(seed, number))
        try:
            reply = await self._completed(body, lost)
        except Refusal as refusal:
            raise self._server.error(refusal, f"the engine refuses a prompt of {len(prompt)} tokens") from None
        expected = Expected(
            prompt,
            asked,
            sampling.max_new_tokens,
            self._stop_ids,
            self._stop_id,
            self._vocabulary,
            lambda text: self._tokens(prompt, text),
        )
        try:
            made, guessed = read(reply, expected)
        except NotAnAnswer as wrong:
            raise EngineError(
                f"the engine's reply is not what was asked for: {wrong}",
                where=self._server.url,
                hint="rollouts are made with vLLM's /v1/completions; another server must speak it alike",
            ) from None
        return made * (answers // asked), guessed * (answers // asked)

    async def _completed(self, body: dict[str, Any], lost: asyncio.Lock) -> Any:
        """The reply; asked for again where the engine had lost the adapter. Raises Refusal, EngineError."""
        name = self._loaded
        assert name is not None  # noqa: S101 - `_publish` comes first
        try:
            return await self._server.complete({"model": name, **body})
        except Refusal as refusal:
            if refusal.status != 404:
                raise
            async with lost:
                if not await self._had_lost(name):
                    raise
        return await self._server.complete({"model": name, **body})

    def _body(self, prompt: Sequence[int], answers: int, sampling: Sampling, seed: int) -> dict[str, Any]:
        """Every setting is said: what is left out, vLLM takes from the model's generation_config.json."""
        return {
            "prompt": list(prompt),
            "n": answers,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "stop_token_ids": self._stop_ids,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def _tokens(self, prompt: Sequence[int], text: str) -> list[int]:
        """Of text that goes on from the prompt."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._text([*prompt, *ids]) != self._text(prompt) + text:
            self._warn("the text of some answers does not come out the same from the tokens found for it")
        return ids

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _warn(self, text: str) -> None:
        """Once of a kind."""
        kind = text.split(":")[0]
        if kind not in self._told:
            self._told.add(kind)
            self._on_warning(text)


async def _watched(works: Sequence[Coroutine[Any, Any, None]], look: Callable[[], None]) -> None:
    """Done side by side; the first error ends them all, and so does `look` when it raises."""
    pending = {asyncio.ensure_future(work) for work in works}
    every = tuple(pending)
    try:
        while pending:
            look()
            done, pending = await asyncio.wait(pending, timeout=POLL_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
    finally:
        for task in every:
            task.cancel()
        await asyncio.gather(*every, return_exceptions=True)


def _seed(seed: int, number: int) -> int:
    """Of a request. vLLM counts on from it for a request's answers; small enough for every server's integers."""
    return int(np.random.Generator(np.random.Philox(key=[seed, number])).integers(0, 1 << 30))
