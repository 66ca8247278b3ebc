"""A template for Ollama, derived from what the model's own chat template renders and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date

from tunedock.export.ollama.calls import read_tool_turns
from tunedock.export.ollama.compose import Shape, compose
from tunedock.export.ollama.go_nodes import write
from tunedock.export.ollama.own import Own, Render
from tunedock.export.ollama.pieces import read_head, read_turns
from tunedock.export.ollama.probes import WEATHER, user
from tunedock.export.ollama.reasoning import read_thinking

_DATES = ("%d %b %Y", "%d %B %Y", "%Y-%m-%d", "%B %d, %Y")


@dataclass(frozen=True, slots=True)
class Derived:
    template: str
    notes: tuple[str, ...]
    """What the template cannot say, or says in Ollama's way, a sentence each."""
    system_before_user: bool
    """The model's template refuses a system message; here its text stands before the first user text."""
    tools: bool
    """Whether a request may bring tools; Ollama refuses them where the template does not name them."""
    thinking: bool
    """Whether Ollama can tell reasoning from text."""
    switches: bool
    """Whether thinking can be switched off."""
    bos: str
    always_off: bool


def derive(render: Render, *, bos: str = "", thinking: bool = True) -> Derived:
    """The template Ollama is given for a model whose own chat template is `render`.

    `bos`: the text of the token the engine puts before every prompt by itself (a GGUF's `tokenizer.ggml.add_bos_token`); it is
    left out, or it would stand there twice. `thinking`: whether the model was trained to answer with reasoning. Where it was not,
    every prompt is the one without, and the template names no `.Thinking`: Ollama would otherwise ask for it by default.

    Raises CheckError where the chat template does not show a plain conversation turn by turn.
    """
    own = Own(render, bos)
    off = _shape(own, thinking=False)
    if not thinking:
        off = replace(off, thinking=replace(off.thinking, earlier=None, last=None))
    on = _shape(own, thinking=True) if thinking else off
    nodes = compose(on, off)
    template = write(nodes)
    return Derived(
        template=template,
        notes=tuple(_notes(own, on, off, thinking=thinking)),
        system_before_user=on.head.system_role == "refused",
        tools=on.takes_tools,
        thinking=".Thinking" in template,
        switches=on != off,
        bos=bos,
        always_off=not thinking,
    )


def _shape(own: Own, *, thinking: bool) -> Shape:
    turns = read_turns(own, thinking=thinking)
    head = read_head(own, turns, thinking=thinking)
    tools = (WEATHER,) if head.tools_role == "told" else ()
    tool_turns = read_tool_turns(own, turns, tools, thinking=thinking)
    return Shape(head, turns, read_thinking(own, turns, tool_turns, tools, thinking=thinking), tool_turns)


def _notes(own: Own, on: Shape, off: Shape, *, thinking: bool) -> Sequence[str]:
    notes = []
    if on.head.system_role == "refused":
        notes.append("the chat template refuses a system message; its text is put before the first user text")
    if on.head.system_role == "ignored":
        notes.append("the chat template leaves a system message out, and so does this one")
    if on.head.tools_role == "otherwise":
        notes.append("the chat template tells tools in a way that cannot be said here; this one takes none")
    if on.head.tools_role == "ignored":
        notes.append("the chat template takes no tools")
    if on.head.tools_role == "told" and on.tool_turns is None:
        notes.append("the chat template shows calls in a way that cannot be said here; this one takes no tools")
    if on.tool_turns is not None and not on.tool_turns.calls.as_json:
        notes.append(
            "the model calls tools otherwise than by JSON, which Ollama does not read: its calls come back as text"
        )
    if on.tool_turns is not None and not on.tool_turns.calls.several:
        notes.append("the chat template refuses several calls in one turn; this one shows them one after the other")
    if _trims(own, thinking=thinking):
        notes.append("the chat template takes blanks off the ends of texts; here the model sees them")
    if not thinking:
        notes.append("the model was trained to answer without reasoning, so thinking cannot be asked for")
    if own.bos and not _begins_with_bos(own):
        notes.append(
            f"the engine puts {own.bos} before every prompt, the chat template does not: set add_bos_token to false"
        )
    if any(day in _all_text(on) for day in _today()):
        notes.append("the chat template tells today's date; here it stays the day of the export")
    return notes


def _trims(own: Own, *, thinking: bool) -> bool:
    return " x " not in (own.tried([user(" x ")], thinking=thinking) or " x ")


def _begins_with_bos(own: Own) -> bool:
    return Own(own.render, "").prompt([user("x")], thinking=False).startswith(own.bos)


def _all_text(shape: Shape) -> str:
    return re.sub(r"\s+", " ", write(shape.head.first.plain) + write(shape.head.first.system))


def _today() -> list[str]:
    today = date.today()
    return [today.strftime(form) for form in _DATES]
