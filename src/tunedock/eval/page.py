"""The evaluation as one HTML file: metrics, then every held-out row with the base's answer beside the tuned model's.

The page asks nothing of the network and holds what models and data say as text, never as markup: values are escaped by the
template, and the content security policy lets only the page's own style and script run, by their hashes. Characters that
could mislead a reader (controls, changes of writing direction) are made visible.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from tunedock.eval.difference import Kind, Part, compare
from tunedock.eval.metrics import tokens_of


@dataclass(frozen=True, slots=True)
class _Measure:
    """A row of the table: which figure, how it is written, and which way is better."""

    key: str
    label: str
    decimals: int
    lower_is_better: bool = False
    optional: bool = False
    """A row only where it was measured."""


_MEASURES = (
    _Measure("loss", "Loss", 4, lower_is_better=True),
    _Measure("perplexity", "Perplexity", 3, lower_is_better=True),
    _Measure("rewards/accuracies", "Preferred as labelled", 3, optional=True),
    _Measure("rewards/margins", "Reward margin", 3, optional=True),
    _Measure("exact_match", "Exact match", 3),
    _Measure("rouge1", "ROUGE-1", 3),
    _Measure("rouge2", "ROUGE-2", 3),
    _Measure("rougeL", "ROUGE-L", 3),
    _Measure("bleu", "BLEU", 2),
)

# Controls but tab and newline, and Unicode's bidirectional overrides and isolates.
_MISLEADING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ABSENT = "–"

MIN_SHARED = 0.2
"""Share of the reference's words below which what is missing is not shown: it would be the reference again, struck out."""


def page(result: Mapping[str, Any]) -> str:
    """The page for what `eval/metrics.json` holds.

    `result`: {"run", "split", "base": figures or null, "tuned": figures, "answers": [{"row_id", "prompt": [{"role", "content"}],
    "reference", "base" (or null), "tuned", "exact_base", "exact_tuned"}]}. A figure that is absent or null is shown as a dash.
    """
    base, tuned = result.get("base"), result["tuned"]
    css, js = own_file("page.css"), own_file("page.js")
    return _template().render(
        run=visible(str(result["run"])),
        split=visible(str(result["split"])),
        compared=base is not None,
        metrics=[_metric(m, base or {}, tuned) for m in _MEASURES if not m.optional or m.key in tuned],
        bleu_tokenize=tuned.get("bleu_tokenize"),
        rows=[_row(answer) for answer in result["answers"]],
        css=css,
        js=js,
        policy=content_policy(css, js),
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(own_file("page.html.j2"))


@cache
def own_file(name: str) -> str:
    """A file that stands beside this module, its lines ended as a browser reads them, so that its hash holds."""
    return files("tunedock.eval").joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def content_policy(css: str, js: str | None = None) -> str:
    """The content security policy of a page that holds these: nothing else runs, nothing is fetched."""
    script = [] if js is None else [f"script-src '{_hash(js)}'"]
    style = f"style-src '{_hash(css)}'"
    return "; ".join(("default-src 'none'", style, *script, "base-uri 'none'", "form-action 'none'"))


def _hash(inline: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()


def _metric(measure: _Measure, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, str]:
    before, after = base.get(measure.key), tuned.get(measure.key)
    difference, verdict = _ABSENT, ""
    if before is not None and after is not None:
        change = round(after - before, measure.decimals)
        difference = f"{change:+.{measure.decimals}f}"
        if change:
            verdict = "better" if (change < 0) == measure.lower_is_better else "worse"
    return {
        "label": measure.label,
        "base": _ABSENT if before is None else f"{before:.{measure.decimals}f}",
        "tuned": _ABSENT if after is None else f"{after:.{measure.decimals}f}",
        "difference": difference,
        "verdict": verdict,
    }


def _row(answer: Mapping[str, Any]) -> dict[str, Any]:
    reference, base, tuned = answer["reference"], answer.get("base"), answer["tuned"]
    classes = ["is-wrong"] if not answer["exact_tuned"] else []
    if base is not None and base != tuned:
        classes.append("is-changed")
    return {
        "row_id": visible(str(answer["row_id"])),
        "classes": " ".join(classes),
        "prompt": [
            {"role": visible(str(turn["role"])), "content": _content(turn["content"])} for turn in answer["prompt"]
        ],
        "reference": visible(reference),
        "base": None if base is None else _shown(base, reference, exact=bool(answer["exact_base"])),
        "tuned": _shown(tuned, reference, exact=bool(answer["exact_tuned"])),
    }


def _content(value: Any) -> str:
    """A message's text; content in parts is shown as JSON."""
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2))


@dataclass(frozen=True, slots=True)
class _ShownPart:
    kind: Kind
    lead: str
    """White space before the text: shown, not highlighted."""
    text: str


@dataclass(frozen=True, slots=True)
class _Shown:
    """An answer ready for the template; `parts` is empty when the text is shown without highlights."""

    exact: bool
    text: str
    note: str
    parts: Sequence[_ShownPart]


def _shown(text: str, reference: str, *, exact: bool) -> _Shown:
    if exact or not text.strip():
        return _Shown(exact, visible(text), "", ())
    parts = compare(text, reference)
    if parts is None:
        return _Shown(exact, visible(text), "not compared word by word: too long or too repetitive", ())
    if all(part.kind == "same" for part in parts):
        return _Shown(exact, visible(text), "differs in white space only", ())
    if _shared_words(parts) < MIN_SHARED * len(tokens_of(reference)):
        parts = [part for part in parts if part.kind != "missing"]
    return _Shown(exact, visible(text), "", [_part(part.kind, visible(part.text)) for part in parts])


def _shared_words(parts: Sequence[Part]) -> int:
    return sum(len(tokens_of(part.text)) for part in parts if part.kind == "same")


def _part(kind: Kind, text: str) -> _ShownPart:
    bare = text.lstrip()
    return _ShownPart(kind, text[: len(text) - len(bare)], bare)


def visible(text: str) -> str:
    """Text whose misleading characters are spelled out, as in `⟨U+202E⟩`."""
    return _MISLEADING.sub(lambda found: f"⟨U+{ord(found.group()):04X}⟩", text.replace("\r\n", "\n"))
