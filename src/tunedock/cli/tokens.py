"""One row of data on a terminal: its messages, and its tokens coloured by whether they are trained.

Without a terminal there are no colours: there `⟦` and `⟧` stand around what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from tunedock.cli.show import console
from tunedock.cli.text import one_line, printable

TRAINED = ("black on green", "black on cyan")
"""Neighbours alternate, so that the borders of tokens show."""
CONTEXT = ("default", "dim")
MESSAGE_LISTS = ("messages", "prompt", "chosen", "rejected", "completion")


def show_row(value: Mapping[str, Any]) -> None:
    out = console()
    side = one_line(value.get("split") or "not made yet")
    out.print(Text(f"row {one_line(value.get('row_id'))}  number {value.get('index')}  split {side}", style="bold"))
    for role, content in messages(value.get("example") or {}):
        out.print(Text.assemble((f"\n{role}", "bold magenta"), f"\n{printable(content)}"))
    refused = value.get("refused")
    if refused:
        out.print(
            Text(f"\nrefused as {one_line(refused.get('reason'))}: {printable(refused.get('detail'))}", style="red")
        )
        return
    leaves = value.get("leaves") or []
    for number, leaf in enumerate(leaves, 1):
        tokens = leaf.get("tokens") or []
        trained = sum(token["weight"] > 0 for token in tokens)
        name = f"path {number} of {len(leaves)}: " if len(leaves) > 1 else ""
        out.print(Text(f"\n{name}{len(tokens):,} tokens, {trained:,} trained", style="bold"))
        out.print(coloured(tokens) if out.is_terminal and not out.no_color else marked(tokens))
    _show_ends(out, value)


def messages(example: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(heading, text) of everything in an example, for people."""
    if "text" in example:
        yield "text", str(example["text"])
    for part in MESSAGE_LISTS:
        for message in example.get(part) or []:
            heading = str(message.get("role", ""))
            if part != "messages":
                heading = f"{part}: {heading}"
            if message.get("weight") is not None:
                heading += f" (weight {message['weight']:g})"
            if message.get("reasoning"):
                yield f"{one_line(heading)}, reasoning", str(message["reasoning"])
            yield one_line(heading), str(message.get("content", ""))
            for call in message.get("tool_calls") or []:
                yield f"{one_line(heading)}, tool call", f"{call.get('name')} {call.get('arguments')}"


def coloured(tokens: Sequence[Mapping[str, Any]]) -> Text:
    """Trained tokens on a coloured ground, context plain; a weight other than 0 or 1 stands behind its token."""
    text = Text()
    for index, token in enumerate(tokens):
        weight = float(token["weight"])
        text.append(visible(str(token["text"])), style=(TRAINED if weight > 0 else CONTEXT)[index % 2])
        if weight not in (0.0, 1.0):
            text.append(f"×{weight:g}", style="bold yellow")
    return text


def marked(tokens: Sequence[Mapping[str, Any]]) -> Text:
    """The same without colours: runs of equal weight, the trained ones in brackets with their weight if it is not 1."""
    text = Text()
    for weight, run in groupby(tokens, key=lambda token: float(token["weight"])):
        content = "".join(visible(str(token["text"])) for token in run)
        if weight > 0:
            text.append(f"⟦{content}⟧" if weight == 1.0 else f"⟦{content}⟧×{weight:g}")
        else:
            text.append(content)
    return text


def visible(text: str) -> str:
    """A token's text with its line breaks shown and kept."""
    return printable(text.replace("\r", "␍")).replace("\n", "⏎\n").replace("\t", "⇥\t")


def _show_ends(out: Console, value: Mapping[str, Any]) -> None:
    if value.get("cut_tokens"):
        out.print(
            Text(
                f"{value['cut_tokens']:,} tokens were cut to fit data.max_length {value.get('max_length')}",
                style="yellow",
            )
        )
    if not value.get("has_stop"):
        out.print(
            Text(
                "the last trained token is no stop token: the model would not learn to end this answer", style="yellow"
            )
        )
