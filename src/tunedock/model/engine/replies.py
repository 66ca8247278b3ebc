"""A completion as an engine sends it -> answers in token ids. What comes over the network is read strictly.

vLLM says the ids themselves (`return_token_ids`, or in the log-probabilities by `return_tokens_as_token_ids`). Of a server
that does neither there is only text, and the ids found for it are a guess: the model may have said the same in other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tunedock.model.answers import Sampled

TOKEN_ID = "token_id:"  # noqa: S105 - no password
"""What vLLM puts before an id that stands where a token's text would."""


class NotAnAnswer(ValueError):  # noqa: N818 - who asked makes an error of it
    """The reply is not what was asked for."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What is known of a reply before it comes."""

    prompt: Sequence[int]
    answers: int
    max_new_tokens: int
    stop_ids: Collection[int]
    stop_id: int
    """The one an answer ended with, where the server does not say."""
    vocabulary: int
    tokens_of: Callable[[str], Sequence[int]]


def read(reply: Any, expected: Expected) -> tuple[list[Sampled], int]:
    """The answers in the server's order, and of how many the token ids are guessed. Raises NotAnAnswer."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise NotAnAnswer("it has no `choices`")
    if len(choices) != expected.answers:
        raise NotAnAnswer(f"it has {len(choices)} answers and not {expected.answers}")
    order = [choice.get("index", 0) if expected.answers == 1 else choice.get("index") for choice in choices]
    if sorted(order, key=str) != sorted(range(expected.answers), key=str):
        raise NotAnAnswer("its answers are not numbered")
    made, guessed = [], 0
    for choice in (choices[order.index(number)] for number in range(expected.answers)):
        sampled, guess = _answer(choice, expected)
        made.append(sampled)
        guessed += guess
    return made, guessed


def _answer(choice: dict[str, Any], expected: Expected) -> tuple[Sampled, bool]:
    asked = choice.get("prompt_token_ids")
    if asked is not None and asked != list(expected.prompt):
        raise NotAnAnswer("it answers another prompt than it was asked: the server has cut or changed it")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise NotAnAnswer(f"an answer ended by `{str(reason)[:40]}`")
    logprobs = choice.get("logprobs")
    said = logprobs if isinstance(logprobs, dict) else {}
    ids, guess = _ids(choice, said, expected)
    if len(ids) > expected.max_new_tokens and not guess:
        raise NotAnAnswer(f"an answer has {len(ids)} tokens, more than the {expected.max_new_tokens} asked for")
    if any(not 0 <= token < expected.vocabulary for token in ids):
        raise NotAnAnswer(f"a token id is none of the model's {expected.vocabulary}")
    stop = next((place for place, token in enumerate(ids) if token in expected.stop_ids), None)
    if stop is not None:
        ids = ids[: stop + 1]
    elif reason == "stop":
        by = choice.get("stop_reason")
        ids = [*ids, by if type(by) is int and by in expected.stop_ids else expected.stop_id]
    if not ids:
        raise NotAnAnswer("an answer has no token")
    own = None if guess else _logprobs(said.get("token_logprobs"))
    return Sampled(tuple(ids), reason == "stop" or stop is not None, None if own is None else own[: len(ids)]), guess


def _ids(choice: dict[str, Any], said: dict[str, Any], expected: Expected) -> tuple[list[int], bool]:
    """Token ids, and whether they are guessed."""
    given = choice.get("token_ids")
    if given is not None:
        if not isinstance(given, list) or not all(type(token) is int for token in given):
            raise NotAnAnswer("`token_ids` are no whole numbers")
        return list(given), False
    tokens = said.get("tokens")
    if isinstance(tokens, list) and tokens and all(_is_id(token) for token in tokens):
        return [int(token.removeprefix(TOKEN_ID)) for token in tokens], False
    text = choice.get("text")
    if not isinstance(text, str):
        raise NotAnAnswer("an answer has neither token ids nor text")
    return list(expected.tokens_of(text)), True


def _is_id(token: object) -> bool:
    if not isinstance(token, str) or not token.startswith(TOKEN_ID):
        return False
    digits = token.removeprefix(TOKEN_ID)
    return digits.isascii() and digits.isdecimal() and len(digits) < 10


def _logprobs(given: object) -> tuple[float, ...] | None:
    """None where one is missing: they are asked for, and not every server has them."""
    if not isinstance(given, list) or not given:
        return None
    if not all(type(value) in (int, float) and not math.isnan(value) for value in given):
        return None
    return tuple(float(value) for value in given)
