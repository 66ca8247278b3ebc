"""The `chat` stage: a conversation over lines of JSON; the terminal is the control plane's.

A line `{"messages": [...]}` is answered by `delta` events and a `result` with the whole text; SIGINT ends the answer under way, and
the conversation goes on. The prompt is rendered by the code that rendered it in training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tunedock.data.conversation import Message
from tunedock.errors import RecipeError, RunError, TunedockError
from tunedock.events import Emitter
from tunedock.model.chat_facts import ChatFacts
from tunedock.model.generate import stream
from tunedock.model.policy import Policy
from tunedock.model.session import Base, base_policy, find_base, tuned_policy
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest


def talk(run: Run, recipe: Recipe, lines: Iterable[str], emit: Emitter, stop: StopRequest, *, which: str) -> None:
    """Answers lines until they end. A line that makes no sense is answered by a `failure` event and the conversation goes on."""
    run.require_model()
    if recipe.objective.kind == "reward":
        raise RunError(
            "the run trained a reward model, which scores answers and writes none",
            where=str(run.path),
            hint="`tunedock eval` shows how it ranks held-out pairs; talk to the model its answers come from",
        )
    facts = ChatFacts.read(run.model)
    base = find_base(recipe, stop_ids=facts.stop_ids)
    policies = {"tuned": tuned_policy(base, run.model)}
    emit.note("ready", stop_ids=facts.stop_ids, thinking=facts.thinking)
    for line in lines:
        if not line.strip():
            continue
        try:
            turn = _turn(line, which)
            with stop.deferred(), _speaking(base, policies, turn.which) as policy:
                _answer(base, policy, facts, turn, emit, stop)
        except TunedockError as error:
            emit.emit("failure", error=error.to_json())
        stop.clear()


@contextmanager
def _speaking(base: Base, policies: dict[str, Policy], which: str) -> Iterator[Policy]:
    """The policy that answers. The base is the tuned model with its adapter off; whole weights need the base beside them."""
    tuned = policies["tuned"]
    if which == "tuned":
        yield tuned
    elif tuned.has_base:
        with tuned.base():
            yield tuned
    else:
        if "base" not in policies:
            policies["base"] = base_policy(base)
        yield policies["base"]


def _answer(base: Base, policy: Policy, facts: ChatFacts, turn: Turn, emit: Emitter, stop: StopRequest) -> None:
    messages = turn.messages
    if facts.system and messages[0].role != "system":
        messages = (Message("system", facts.system), *messages)
    prompt = base.chat.prompt_ids(messages, (), thinking=facts.thinking)
    text = ""
    for piece in stream(
        policy,
        base.tokenizer,
        prompt,
        stop_ids=facts.stop_ids,
        pad_id=base.pad_id,
        max_new_tokens=turn.max_new_tokens,
        temperature=turn.temperature,
        stop_requested=stop.asked,
    ):
        text += piece
        emit.emit("delta", text=piece)
    emit.result({"text": text, "stopped": stop.asked(), "prompt_tokens": len(prompt)})


@dataclass(frozen=True, slots=True)
class Turn:
    messages: tuple[Message, ...]
    which: str
    max_new_tokens: int
    temperature: float


def _turn(line: str, which: str) -> Turn:
    wrong = RecipeError("a turn is an object with `messages`: [{role, content}, ...]", where="chat")
    try:
        value = json.loads(line)
        turn = Turn(
            messages=tuple(Message(m["role"], str(m["content"])) for m in value["messages"]),
            which=value.get("which", which),
            max_new_tokens=int(value.get("max_new_tokens", 512)),
            temperature=float(value.get("temperature", 0.0)),
        )
        known = all(message.role in ("system", "user", "assistant") for message in turn.messages)
        sound = turn.max_new_tokens > 0 and 0.0 <= turn.temperature < math.inf and turn.which in ("tuned", "base")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise wrong from None
    if not turn.messages or not known or not sound:
        raise wrong
    return turn
