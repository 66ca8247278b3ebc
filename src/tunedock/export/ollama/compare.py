"""What the model's own chat template and the template for Ollama say to the same conversations, and where they part."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tunedock.data.conversation import RowRefused
from tunedock.errors import CheckError
from tunedock.export.ollama import go_template
from tunedock.export.ollama.derive import Derived
from tunedock.export.ollama.go_nodes import common_prefix
from tunedock.export.ollama.own import Own, Render
from tunedock.export.ollama.probes import PROBES, Kind, Probe
from tunedock.export.ollama.values import values

Status = Literal["identical", "json", "keys", "different", "refused", "not offered"]
_AROUND = 60


@dataclass(frozen=True, slots=True)
class Verdict:
    """One probe.

    identical   to the letter
    json        but for how JSON is spelled: blanks, escapes
    keys        and for the order of its keys
    different   `detail` shows where
    not offered the conversation has tools, and a note says why a request may bring none
    refused     the model's template refuses the conversation; `detail` says why
    """

    probe: str
    kind: Kind
    status: Status
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]

    def counts(self) -> dict[Kind, dict[Status, int]]:
        """How many probes of each kind came out how."""
        table: dict[Kind, dict[Status, int]] = {}
        for verdict in self.verdicts:
            row = table.setdefault(verdict.kind, {})
            row[verdict.status] = row.get(verdict.status, 0) + 1
        return table

    def to_json(self) -> dict[str, Any]:
        """For the export's record: counts, notes, and each probe that is not identical."""
        apart = [verdict for verdict in self.verdicts if verdict.status != "identical"]
        return {
            "probes": len(self.verdicts),
            "counts": self.counts(),
            "notes": list(self.notes),
            "not_identical": [
                {"probe": verdict.probe, "kind": verdict.kind, "status": verdict.status, "detail": verdict.detail}
                for verdict in apart
            ],
        }


def compare(derived: Derived, render: Render, probes: Iterable[Probe] = PROBES) -> Comparison:
    """Renders every probe with both. Raises GoTemplateError where the template is none this package would have made."""
    own = Own(render, derived.bos)
    return Comparison(tuple(_judge(derived, own, probe) for probe in probes), derived.notes)


def require(comparison: Comparison) -> None:
    """Raises CheckError where a plain conversation is not said to the letter."""
    for verdict in comparison.verdicts:
        if verdict.kind == "plain" and verdict.status not in ("identical", "refused"):
            raise CheckError(
                f"the template made for Ollama and the model's own part in a plain conversation: {verdict.detail}",
                where=f"probe `{verdict.probe}`",
                hint="serve this model with an engine that reads the chat template itself, such as llama.cpp's server",
            )


def _judge(derived: Derived, own: Own, probe: Probe) -> Verdict:
    thinking = not derived.always_off and probe.think is not False
    messages: list[Mapping[str, Any]] = list(probe.messages)
    if derived.always_off:  # such a model gives no reasoning that could come back
        messages = [{key: value for key, value in m.items() if key != "reasoning_content"} for m in messages]
    try:
        expected = own.prompt(messages, probe.tools, thinking=thinking)
    except RowRefused as refused:
        merged = _system_before_user(messages) if derived.system_before_user else None
        if merged is None:
            return Verdict(probe.name, probe.kind, "refused", refused.detail)
        try:
            expected = own.prompt(merged, probe.tools, thinking=thinking)
        except RowRefused as again:
            return Verdict(probe.name, probe.kind, "refused", again.detail)
    data = values(messages, probe.tools, think=probe.think)
    said = go_template.render(derived.template, data)
    status, detail = _status(expected, said)
    uses_tools = bool(probe.tools) or any(message.get("tool_calls") for message in messages)
    if status == "different" and uses_tools and not derived.tools:
        status = "not offered"
    return Verdict(probe.name, probe.kind, status, detail)


def _system_before_user(messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """The conversation of a template without a system role: its text before the first user text."""
    if len(messages) < 2 or (messages[0]["role"], messages[1]["role"]) != ("system", "user"):
        return None
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": content}, *messages[2:]]


def _status(expected: str, said: str) -> tuple[Status, str]:
    if expected == said:
        return "identical", ""
    spelled = [_with_plain_json(text, sort=False) for text in (expected, said)]
    if spelled[0] == spelled[1]:
        return "json", ""
    ordered = [_with_plain_json(text, sort=True) for text in (expected, said)]
    return ("keys", "") if ordered[0] == ordered[1] else ("different", _apart(*ordered))


_JSON_START = re.compile(r'[{\[]|"(?=[^"\\\n]*\\)')


def _with_plain_json(text: str, *, sort: bool) -> str:
    """The text with its JSON objects and lists, and its strings with escapes, written in one way."""
    decoder = json.JSONDecoder()
    written, at = "", 0
    while found := _JSON_START.search(text, at):
        written += text[at : found.start()]
        at = found.start()
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            written, at = written + text[at], at + 1
            continue
        written += json.dumps(value, ensure_ascii=False, sort_keys=sort)
        at = end
    return written + text[at:]


def _apart(expected: str, said: str) -> str:
    at = len(common_prefix(expected, said))
    start = max(at - 20, 0)
    return f"from character {at} the model's has {expected[start : at + _AROUND]!r}, Ollama's {said[start : at + _AROUND]!r}"
