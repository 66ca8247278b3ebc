"""`tunedock doctor`: what this machine has, what is wanted, and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from tunedock.cli.options import Json
from tunedock.errors import CheckError

if TYPE_CHECKING:
    from tunedock.plan.machine.check import Check

MARKS = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "failure": ("failure", "red"),
    "not applicable": ("n/a", "dim"),
}
"""Verdict -> how it stands in the table, and its colour."""


def doctor(as_json: Json = False) -> None:
    """Check this machine: Python, PyTorch, GPU, memory, disk, packages, Docker, the hub.

    Ends with exit code 6 when a check failed; a warning fails nothing.
    """
    from tunedock import pipeline
    from tunedock.cli.show import console
    from tunedock.cli.text import print_json
    from tunedock.plan.machine.check import count, overall

    with console(stderr=True).status("looking at the machine", spinner="line"):
        checks = pipeline.doctor()
    failed = _error(checks)
    if not as_json:
        _print(checks)
        if failed is not None:
            raise failed
        return
    document = {
        "verdict": overall(checks),
        "counts": count(checks),
        "checks": [check.to_json() for check in checks],
        **({"error": failed.to_json()} if failed is not None else {}),
    }
    print_json(document)
    if failed is not None:
        raise typer.Exit(failed.exit_code)


def _error(checks: Sequence[Check]) -> CheckError | None:
    names = [f"{check.group}: {check.name}" for check in checks if check.verdict == "failure"]
    if not names:
        return None
    many = "1 check failed" if len(names) == 1 else f"{len(names)} checks failed"
    return CheckError(
        f"{many}: {', '.join(names)}",
        where="this machine",
        hint="each failure above names a way out; fix the first one first",
    )


def _print(checks: Sequence[Check]) -> None:
    from rich.text import Text

    from tunedock.cli.results import add_row, table
    from tunedock.cli.show import console
    from tunedock.plan.machine.check import count, overall

    out = console()
    made = table("", "", "")
    made.show_header = False
    for column in (0, 1):
        made.columns[column].no_wrap = True
    group = ""
    for check in checks:
        if check.group != group:
            if group:
                made.add_row("")
            group = check.group
            add_row(made, "", Text(_line(group), style="bold"))
        word, style = MARKS[check.verdict]
        found = Text.assemble(_line(check.found), (_line(_wanted(check)), "dim"))
        add_row(made, Text(word, style=style), Text(f"  {_line(check.name)}"), found)
        if check.way_out:
            add_row(made, "", "", Text(_line(f"→ {check.way_out}"), style="cyan"))
    out.print(made)
    counts = count(checks)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in counts if counts[verdict])
    worst = overall(checks)
    out.print(Text.assemble("\nverdict: ", (worst, MARKS[worst][1]), f" ({told})"))


def _line(text: str) -> str:
    """One line; what it is indented by stays."""
    from tunedock.cli.text import one_line

    return text[: len(text) - len(text.lstrip(" "))] + one_line(text)


def _wanted(check: Check) -> str:
    """`  (≥ 4 GiB, better 16 GiB)`; empty for a check without bounds."""
    least, better = check.minimum or "", check.recommended or ""
    parts = [least if least.startswith("≤") else f"≥ {least}"] if least else []
    parts += [f"better {better}"] if better and better != least else []
    return f"  ({', '.join(parts)})" if parts else ""
