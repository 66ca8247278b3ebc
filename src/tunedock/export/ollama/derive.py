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
    bos: str
    always_off: bool
    """Every prompt is the one of an answer without reasoning."""


def derive(render: Render, *, bos: str = "", thinking: bool = True) -> Derived:
    """The template Ollama is given for a model whose own chat template is `render`.

    `bos`: the text of the token the engine puts before every prompt by itself (a GGUF's `tokenizer.ggml.add_bos_token`); it is
    left out, or it would stand there twice. `thinking`: whether the model was trained to answer with reasoning. Where it was not,
    every prompt is the one without, and the template names no `.Thinking`: Ollama would otherwise ask for it by default.

    Raises CheckError where the chat template does not show a plain conversation turn by turn.
    """
    own = Own(render, bos)
    on, off = _shape(own, thinking=True), _shape(own, thinking=False)
    thinks = on != off or on.thinking.last is not None or on.thinking.earlier is not None
    if not thinking:
        on = off = replace(off, thinking=replace(off.thinking, earlier=None, last=None))
    template = write(compose(on, off))
    return Derived(
        template=template,
        notes=tuple(_notes(own, on, silenced=thinks and not thinking)),
        system_before_user=on.head.system_role == "refused",
        tools=on.takes_tools,
        thinking=".Thinking" in template,
        bos=bos,
        always_off=not thinking,
    )


def _shape(own: Own, *, thinking: bool) -> Shape:
    turns = read_turns(own, thinking=thinking)
    head = read_head(own, turns, thinking=thinking)
    tools = (WEATHER,) if head.tools_role == "told" else ()
    tool_turns = read_tool_turns(own, turns, tools, thinking=thinking)
    return Shape(head, turns, read_thinking(own, turns, tool_turns, tools, thinking=thinking), tool_turns)


def _notes(own: Own, shape: Shape, *, silenced: bool) -> Sequence[str]:
    head, calls = shape.head, shape.tool_turns.calls if shape.tool_turns is not None else None
    notes = []
    if head.system_role == "refused":
        notes.append("the chat template refuses a system message; its text is put before the first user text")
    if head.system_role == "ignored":
        notes.append("the chat template leaves a system message out, and so does this one")
    if head.tools_role == "otherwise":
        notes.append("the chat template tells tools in a way that cannot be said here; this one takes none")
    if head.tools_role == "ignored":
        notes.append("the chat template takes no tools")
    if head.tools_role == "told" and calls is None:
        notes.append("the chat template shows calls in a way that cannot be said here; this one takes no tools")
    if shape.takes_tools and calls is not None and not calls.as_json:
        notes.append(
            "the model calls tools otherwise than by JSON, which Ollama does not read: its calls come back as text"
        )
    if shape.takes_tools and calls is not None and not calls.several:
        notes.append("the chat template refuses several calls in one turn; this one shows them one after the other")
    if _trims(own):
        notes.append("the chat template takes blanks off the ends of texts; here the model sees them")
    if silenced:
        notes.append("the model was trained to answer without reasoning, so thinking cannot be asked for")
    if own.bos and not _begins_with_bos(own):
        notes.append(
            f"the engine puts {own.bos} before every prompt, the chat template does not: set add_bos_token to false"
        )
    if any(day in _all_text(shape) for day in _today()):
        notes.append("the chat template tells today's date; here it stays the day of the export")
    return notes


def _trims(own: Own) -> bool:
    return " x " not in (own.tried([user(" x ")], thinking=False) or " x ")


def _begins_with_bos(own: Own) -> bool:
    return Own(own.render, "").prompt([user("x")], thinking=False).startswith(own.bos)


def _all_text(shape: Shape) -> str:
    return re.sub(r"\s+", " ", write(shape.head.first.plain) + write(shape.head.first.system))


def _today() -> list[str]:
    today = date.today()
    return [today.strftime(form) for form in _DATES]
