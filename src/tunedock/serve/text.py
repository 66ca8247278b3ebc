"""Tokens -> text as it comes, and what stands in it: where it stops, what was thought, which tools are called.

Detokeniser    ids -> text, never half a character
Stops          text -> text up to a stop string, which may begin at the end of one piece and end in the next
Parts          text -> reasoning, answer, calls, by the tags a model's template writes
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunedock.serve.jobs import Delta, ToolDelta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK, UNTHINK = "<think>", "</think>"
CALL, UNCALL = "<tool_call>", "</tool_call>"
BROKEN = "\N{REPLACEMENT CHARACTER}"


class Detokeniser:
    """Text of a growing list of ids. What may still change with the next token waits for it."""

    MOST_HELD = 16
    """Tokens after which bytes that are no character are told as they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = 0
        """From here the text is decoded: a token's text depends on the one before it."""
        self._told = 0

    def add(self, token: int) -> str:
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(BROKEN) and len(self._ids) - self._told < self.MOST_HELD:
            return ""
        self._before, self._told = self._told, len(self._ids)
        return text

    def rest(self) -> str:
        """What was held back, at the end."""
        text = self._new_text() if self._told < len(self._ids) else ""
        self._told = len(self._ids)
        return text

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._before : self._told])
        return self._decode(self._ids[self._before :])[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Stops:
    """Text up to the stop string that is complete first; what could be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.met = False

    def add(self, text: str) -> str:
        if self.met:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.met = True
            out, self._held = self._held[: min(found)[1]], ""
            return out
        keep = beginning_of(self._held, self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def rest(self) -> str:
        out, self._held = self._held, ""
        return out


def beginning_of(text: str, words: Sequence[str]) -> int:
    """Length of the longest end of a text that is a beginning of a word."""
    longest = max((len(word) for word in words), default=0) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(word.startswith(text[len(text) - size :]) for word in words):
            return size
    return 0


@dataclass(slots=True)
class Parts:
    """Splits an answer's text. Reasoning stands before all else; calls are told whole, each when it has ended."""

    index: int
    thinks: bool
    """Whether tags of reasoning are the model's."""
    calls: bool
    """Whether tags of calls are, and tools were offered."""
    inside: bool = False
    """Whether the prompt has opened the reasoning."""
    made: int = 0
    """Calls told so far."""
    _held: str = ""
    _place: str = field(default="start", init=False)
    _fresh: bool = field(default=False, init=False)
    """After a tag: the line ends that follow it belong to nothing, in whatever piece they come."""

    def __post_init__(self) -> None:
        self._place = "thought" if self.inside else "start" if self.thinks else "answer"

    @property
    def thinking(self) -> bool:
        """Whether what comes now is thought."""
        return self._place == "thought"

    def add(self, text: str) -> Iterator[Delta | ToolDelta]:
        self._held += text
        moved = True
        while moved:
            moved = False
            for event in self._step():
                if event is None:
                    moved = True
                else:
                    yield event

    def _step(self) -> Iterator[Delta | ToolDelta | None]:
        """What can be told now; None where another place was come to and there may be more."""
        if self._fresh:
            self._held = self._held.lstrip("\n")
            if not self._held:
                return
            self._fresh = False
        match self._place:
            case "start":
                begun = self._held.lstrip()
                if begun.startswith(THINK):
                    self._held, self._place, self._fresh = begun.removeprefix(THINK), "thought", True
                    yield None
                elif begun and not THINK.startswith(begun):
                    self._place = "answer"
                    yield None
            case "thought":
                before, found, after = self._held.partition(UNTHINK)
                if found:
                    self._held, self._place, self._fresh = after, "answer", True
                    if before.rstrip("\n"):
                        yield Delta(self.index, reasoning=before.rstrip("\n"))
                    yield None
                else:
                    yield from self._let_go((UNTHINK, "\n" + UNTHINK, "\n\n" + UNTHINK), thought=True)
            case "answer":
                if not self.calls:
                    yield from self._let_go((), thought=False)
                    return
                before, found, after = self._held.partition(CALL)
                if found:
                    self._held, self._place = after, "call"
                    if before.rstrip("\n"):
                        yield Delta(self.index, before.rstrip("\n"))
                    yield None
                else:
                    yield from self._let_go((CALL, "\n" + CALL, "\n\n" + CALL), thought=False)
            case "call":
                before, found, after = self._held.partition(UNCALL)
                if found:
                    self._held, self._place, self._fresh = after, "answer", True
                    yield from self._call(before)
                    yield None

    def _let_go(self, words: Sequence[str], *, thought: bool) -> Iterator[Delta]:
        keep = beginning_of(self._held, words)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if out:
            yield Delta(self.index, reasoning=out) if thought else Delta(self.index, out)

    def _call(self, text: str) -> Iterator[Delta | ToolDelta]:
        call = parsed(text)
        if call is None:  # what is no call is the model's text, tags and all
            yield Delta(self.index, f"{CALL}{text}{UNCALL}")
            return
        name, arguments = call
        yield ToolDelta(self.index, self.made, f"call_{uuid.uuid4().hex[:24]}", name)
        yield ToolDelta(self.index, self.made, arguments=arguments)
        self.made += 1

    def rest(self) -> Iterator[Delta | ToolDelta]:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        if self._place == "call":
            yield from self._call(held)
        elif held and self._place == "thought":
            yield Delta(self.index, reasoning=held)
        elif held:
            yield Delta(self.index, held)


def parsed(text: str) -> tuple[str, str] | None:
    """(name, arguments as JSON text) of a call between its tags; None for what is none."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return (value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
