"""The `chat` stage: a conversation over lines of JSON; the terminal is the control plane's.

A line `{"messages": [...]}` is answered by `delta` events and a `result` with the whole text; `{"stop": true}` ends the answer under
way. The prompt is rendered by the code that rendered it in training.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from tunedock.data.conversation import Message
from tunedock.errors import RecipeError, RunError, TunedockError
from tunedock.events import Emitter
from tunedock.model.generate import stream
from tunedock.model.session import ChatFacts, base_policy, find_base, tuned_policy
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run


def talk(run: Run, recipe: Recipe, lines: Iterable[str], emit: Emitter, *, which: str) -> None:
    """Answers lines until they end. A line that makes no sense is answered by a `failure` event and the conversation goes on."""
    if not run.model.is_dir():
        raise RunError("the run has no result yet", where=str(run.path), hint="`tunedock train --resume` finishes it")
    facts = ChatFacts.read(run.model)
    base = find_base(recipe, stop_ids=facts.stop_ids)
    policy = tuned_policy(base, run.model)
    adapter = hasattr(policy.model, "disable_adapter")
    untrained = None if adapter or which == "tuned" else base_policy(base)
    emit.note("ready", stop_ids=facts.stop_ids, thinking=facts.thinking)
    inbox: queue.Queue[str | None] = queue.Queue()
    stop = threading.Event()
    threading.Thread(target=_receive, args=(lines, inbox, stop), name="stdin", daemon=True).start()
    while (line := inbox.get()) is not None:
        stop.clear()
        try:
            turn = _turn(line, which)
            if turn["which"] == "base" and not adapter and untrained is None:
                untrained = base_policy(base)
            answering = untrained if turn["which"] == "base" and untrained is not None else policy
            messages = tuple(Message(m["role"], m["content"]) for m in turn["messages"])
            if recipe.data.system and messages[0].role != "system":
                messages = (Message("system", recipe.data.system), *messages)
            prompt = base.chat.prompt_ids(messages, (), thinking=facts.thinking)
            text = ""
            with policy.base() if turn["which"] == "base" and adapter else nullcontext():
                for piece in stream(
                    answering,
                    base.tokenizer,
                    prompt,
                    stop_ids=facts.stop_ids,
                    pad_id=base.pad_id,
                    max_new_tokens=turn["max_new_tokens"],
                    temperature=turn["temperature"],
                    stop=stop,
                ):
                    text += piece
                    emit.emit("delta", text=piece)
            emit.result({"text": text, "stopped": stop.is_set(), "prompt_tokens": len(prompt)})
        except TunedockError as error:
            emit.emit("failure", error=error.to_json())


def _receive(lines: Iterable[str], inbox: queue.Queue[str | None], stop: threading.Event) -> None:
    for line in lines:
        if line.strip() == '{"stop": true}':
            stop.set()
        elif line.strip():
            inbox.put(line)
    inbox.put(None)


def _turn(line: str, which: str) -> dict[str, Any]:
    wrong = RecipeError("a turn is an object with `messages`: [{role, content}, ...]", where="chat")
    try:
        value = json.loads(line)
        turn = {
            "messages": [{"role": str(m["role"]), "content": str(m["content"])} for m in value["messages"]],
            "which": value.get("which", which),
            "max_new_tokens": int(value.get("max_new_tokens", 512)),
            "temperature": float(value.get("temperature", 0.0)),
        }
    except (ValueError, KeyError, TypeError):
        raise wrong from None
    if not turn["messages"] or turn["which"] not in ("tuned", "base"):
        raise wrong
    return turn
