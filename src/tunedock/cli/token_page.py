"""One row of data as a page: the same as on the terminal, to send to a colleague.

Self-contained and without scripts; the row is hostile text, so everything is escaped, and a content security policy allows nothing
but this page's one style sheet.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from html import escape
from typing import Any

from tunedock.cli.text import printable
from tunedock.cli.tokens import messages, visible

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --dim: #6a6a6a; --edge: #d8d8d8;
  --trained: #b9ecc3; --part: #ffd98a; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #16181b; --ink: #e8e8e8; --dim: #9a9a9a; --edge: #3a3d42;
    --trained: #1f5a31; --part: #6d4d10; }
}
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.6 system-ui, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .75rem; border: 1px solid var(--edge); border-radius: 6px;
  font: 14px/1.9 ui-monospace, Menlo, Consolas, "Noto Sans Mono CJK SC", monospace; }
span { border: 1px solid var(--edge); border-radius: 3px; color: var(--dim); }
span.trained, span.part { background: var(--trained); color: var(--ink); }
span.part { background: var(--part); }
.bad { color: #c62828; }
"""


def page(value: Mapping[str, Any]) -> str:
    """The page of a `data-show` result."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"row {_text(value.get('row_id'))}"
    body = [
        f"<h1>{title}</h1>",
        f"<p>number {_text(value.get('index'))}, split {_text(value.get('split') or 'not made yet')}</p>",
    ]
    for heading, content in messages(value.get("example") or {}):
        body.append(f"<h2>{_text(heading)}</h2><pre>{_text(content)}</pre>")
    refused = value.get("refused")
    if refused:
        body.append(f'<p class="bad">refused as {_text(refused.get("reason"))}: {_text(refused.get("detail"))}</p>')
    else:
        body += _leaves(value)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


def _leaves(value: Mapping[str, Any]) -> list[str]:
    leaves = value.get("leaves") or []
    parts = []
    for number, leaf in enumerate(leaves, 1):
        tokens = leaf.get("tokens") or []
        trained = sum(token["weight"] > 0 for token in tokens)
        name = f"path {number} of {len(leaves)}: " if len(leaves) > 1 else ""
        parts.append(f"<h2>{name}{len(tokens):,} tokens, {trained:,} trained</h2>")
        parts.append(f"<pre>{''.join(_token(token) for token in tokens)}</pre>")
    if value.get("cut_tokens"):
        parts.append(
            f"<p>{_text(value['cut_tokens'])} tokens were cut to fit data.max_length {_text(value.get('max_length'))}</p>"
        )
    if not value.get("has_stop"):
        parts.append('<p class="bad">the last trained token is no stop token</p>')
    return parts


def _token(token: Mapping[str, Any]) -> str:
    weight = float(token["weight"])
    kind = "" if weight <= 0 else ' class="trained"' if weight == 1.0 else ' class="part"'
    title = f"id {int(token['id'])}, weight {weight:g}"
    return f'<span{kind} title="{title}">{escape(visible(str(token["text"])))}</span>'


def _text(value: object) -> str:
    return escape(printable(value))
