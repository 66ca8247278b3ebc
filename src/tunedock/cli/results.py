"""The results of the stages as tables and a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunedock.cli.options import RUNS_DIR
from tunedock.cli.show import console
from tunedock.cli.text import one_line, printable
from tunedock.run.record import Run
from tunedock.run.store import flatten

if TYPE_CHECKING:
    from tunedock.pipeline import Outcome

EXAMPLES = 3
"""Dropped rows named per reason; the report has them all."""

SHOWN = 8
"""Columns named in a line."""

BAR_WIDTH = 40
MODELS = ("base", "tuned")


def number(value: Any) -> str:
    """A figure as people read it; anything else as one line of text."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return one_line(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1e-3 and value else f"{value:,.4f}".rstrip("0").rstrip(".")


def table(*headings: str, numbers_from: int | None = None, title: str | None = None) -> Table:
    """A table without frames, whose columns from `numbers_from` on stand to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="bold")
    for index, heading in enumerate(headings):
        right = numbers_from is not None and index >= numbers_from
        made.add_column(Text(printable(heading)), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return made


def add_row(made: Table, *cells: Any) -> None:
    """A row of text from anywhere: stripped of control characters, never read as markup."""
    made.add_row(*(cell if isinstance(cell, Text) else Text(one_line(cell)) for cell in cells))


def show_trained(outcome: Outcome) -> None:
    out = console()
    if "node" in outcome.value:
        out.print(Text("this machine's part is done; the result is in the run directory of node 0"))
        return
    # What was computed: fewer than the data's tokens where samples of a step begin alike.
    _figures(out, {"tokens computed" if key == "tokens" else key: item for key, item in outcome.value.items()})
    name = (
        outcome.run.name if outcome.run.parent == Path.cwd() / RUNS_DIR else outcome.run
    )  # what the next command finds
    scores = Run(outcome.run).state().objective == "reward"  # and writes no answers
    out.print(Text(printable(f"next: tunedock {'' if scores else f'chat {name} | tunedock '}eval {name}")))


REPORTED = (
    ("tokens of texts", "same_texts", "texts"),
    ("prompts of conversations", "same_prompts", "prompts"),
    ("answers, word for word", "same_answers", "answers"),
    ("tokens of answers", "same_tokens", "tokens"),
)
"""Rows of an export's report: what, and its two keys."""
MEASURED = ("perplexity_run", "perplexity", "perplexity_change", "limit", "load_s", "tokens_per_s")


def show_exported(value: Mapping[str, Any]) -> None:
    """What was written, and what came of trying it."""
    out = console()
    report = value.get("report") or {}
    files = value.get("files")
    told = {key: item for key, item in value.items() if key not in ("report", "notes", "checks")}
    checks = {
        key: item for key, item in (value.get("checks") or {}).items() if not isinstance(item, Mapping | Sequence)
    }
    _figures(out, {**told, **({"files": ", ".join(files)} if files else {}), **checks})
    if report.get("texts"):
        made = table("held against the run", "same", "of", numbers_from=1)
        for name, same, of in REPORTED:
            if report.get(of):
                add_row(made, name, number(report[same]), number(report[of]))
        out.print(made)
        if report.get("ties"):
            out.print(Text(f"{number(report['ties'])} answer(s) part from the run's where it was undecided"))
        _figures(out, {key: report[key] for key in MEASURED if report.get(key) is not None})
    template = (value.get("checks") or {}).get("ollama_template") or {}
    for kind, counts in template.get("counts", {}).items():
        if kind != "edge":
            same = ", ".join(f"{number(count)} {status}" for status, count in counts.items())
            out.print(Text(printable(f"Ollama's template beside the model's own, {kind}: {same}")))
    for note in [
        *(value.get("notes") or []),
        *(report.get("notes") or []),
        *(f"not tried: {what}" for what in report.get("not_run") or []),
    ]:
        out.print(Text(printable(note)))


def show_metrics(outcome: Outcome) -> None:
    """Base and tuned side by side, with what training changed."""
    out = console()
    value = outcome.value
    tasks = value.get("tasks")
    if isinstance(tasks, Mapping):
        show_tasks(out, tasks)
        value = {key: item for key, item in value.items() if key != "tasks"}
        if not value.keys() - {"run"}:
            return
        out.print()
    sides = [name for name in MODELS if isinstance(value.get(name), Mapping)]
    if not sides:
        _figures(out, {key: item for key, item in value.items() if key != "answers"})
        return
    made = table("metric", *sides, *(["change"] if len(sides) == 2 else []), numbers_from=1)
    for metric in dict.fromkeys(key for side in sides for key in value[side]):
        figures = [value[side].get(metric) for side in sides]
        cells = [number(figure) for figure in figures]
        if len(sides) == 2:
            cells.append(_change(*figures))
        add_row(made, metric, *cells)
    out.print(made)
    answers = value.get("answers")
    if isinstance(answers, Sequence) and not isinstance(answers, str):
        out.print(Text(f"{len(answers):,} answers on the {one_line(value.get('split', 'test'))} split"))
    others = {key: item for key, item in value.items() if key not in {*MODELS, "answers", "scores", "split", "run"}}
    _figures(out, others)


def show_tasks(out: Console, value: Mapping[str, Any]) -> None:
    """Tasks of lm-evaluation-harness, a line a metric; after ± one standard error."""
    sides = [name for name in MODELS if name == "tuned" or value.get("compared")]
    headings = ("task", "metric", *sides, *(["change"] if len(sides) == 2 else []), "documents")
    made = table(*headings, numbers_from=2)
    for task in value["tasks"]:
        for line in task["metrics"]:
            metric = line["metric"] if line["filter"] in ("none", "") else f"{line['metric']} ({line['filter']})"
            cells = [_with_error(line[side], line[f"{side}_stderr"]) for side in sides]
            if len(sides) == 2:
                cells.append(_change(line["base"], line["tuned"]))
            add_row(made, task["task"], metric, *cells, number(task["samples"]))
    out.print(made)
    made_by = f"lm-eval {value['lm_eval']}"
    if value["limit"] is not None:
        made_by += f", at most {number(value['limit'])} documents a task"
    out.print(Text(printable(f"{made_by}; page: {value['page']}")))


def _with_error(value: Any, error: Any) -> str:
    return number(value) if error is None else f"{number(value)} ± {number(error)}"


def show_data_check(value: Mapping[str, Any]) -> None:
    """The account of every row, the splits, the lengths."""
    out = console()
    account = value["account"]
    _show_account(out, account)
    splits = value.get("splits") or {}
    if splits:
        made = table("split", "samples", "tokens", "trained tokens", numbers_from=1)
        for name, sizes in splits.items():
            add_row(made, name, *(number(sizes.get(key)) for key in ("samples", "tokens", "trained_tokens")))
        out.print()
        out.print(made)
    _show_lengths(out, value)
    for path, kind in (account.get("formats") or {}).items():
        out.print(Text(f"format of {one_line(path)}: {one_line(kind)}"))
    if value.get("report"):
        out.print(Text(f"report: {printable(value['report'])}"))


def show_conversion(value: Mapping[str, Any]) -> None:
    """The account of a conversion, and where the file is."""
    out = console()
    made = table("rows", "count", numbers_from=1)
    for key in ("read", "written", "refused"):
        label = "could be written" if key == "written" and not value.get("out") else key
        add_row(made, label, number(value.get(key)))
    for part, count in (value.get("left_out") or {}).items():
        add_row(made, f"without {part}", number(count))
    out.print(made)
    _show_reasons(out, "refused because", value.get("reasons") or {}, value.get("refusals") or [])
    if unread := value.get("unread"):
        named = ", ".join(f"{one_line(name, 40)} ({number(count)})" for name, count in list(unread.items())[:SHOWN])
        more = f" and {len(unread) - SHOWN} more" if len(unread) > SHOWN else ""
        out.print(Text(f"not written, for no format has such a column (rows): {named}{more}"))
    for path, kind in (value.get("formats") or {}).items():
        out.print(Text(f"format of {one_line(path)}: {one_line(kind)}"))
    if value.get("out"):
        out.print(Text(printable(f"wrote {value['out']}: {number(value.get('rows'))} row(s), {value['to']}")))


def _show_account(out: Console, account: Mapping[str, Any]) -> None:
    made = table("rows", "count", numbers_from=1)
    for key in ("read", "kept", "dropped", "cut_rows", "duplicates", "no_stop"):
        add_row(made, key.replace("_", " "), number(account.get(key)))
    out.print(made)
    _show_reasons(out, "dropped because", account.get("reasons") or {}, account.get("drops") or [])


def _show_reasons(out: Console, heading: str, reasons: Mapping[str, int], rows: Sequence[Sequence[str]]) -> None:
    """Reasons with their counts and first rows; `rows` are [row id, reason, detail]."""
    if not reasons:
        return
    made = table(heading, "rows", "for example", numbers_from=None)
    for reason, count in reasons.items():
        examples = [row for row in rows if row[1] == reason][:EXAMPLES]
        named = "; ".join(f"{one_line(row_id)}: {one_line(detail, 100)}" for row_id, _reason, detail in examples)
        add_row(made, reason, number(count), named)
    out.print()
    out.print(made)


def _show_lengths(out: Console, value: Mapping[str, Any]) -> None:
    lengths = value.get("lengths") or {}
    if lengths:
        figures = "  ".join(f"{key} {number(lengths.get(key))}" for key in ("min", "median", "p95", "max"))
        out.print(Text(f"\ntokens in a sample: {figures}"))
    histogram = value.get("histogram") or {}
    edges, counts = histogram.get("edges") or [], histogram.get("counts") or []
    most = max(counts, default=0)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * round(BAR_WIDTH * count / most) if most else ""
        out.print(Text(f"{number(low):>8} - {number(high):<8} {count:>8,} {bar}"))
    if value.get("trained_share") is not None:
        out.print(Text(f"tokens trained: {value['trained_share']:.1%}"))
    if value.get("empty_answers"):
        out.print(Text(f"empty answers: {number(value['empty_answers'])}", style="yellow"))


def _figures(out: Console, value: Mapping[str, Any]) -> None:
    if not value:
        return
    made = table("", "")
    made.show_header = False
    for key, item in flatten(value).items():
        add_row(made, key.replace("_", " "), item if isinstance(item, str) else number(item))
    out.print(made)


def _change(before: Any, after: Any) -> str:
    if not all(isinstance(figure, int | float) and not isinstance(figure, bool) for figure in (before, after)):
        return ""
    change = after - before
    if not change:
        return "0"
    return f"{change:+,}" if isinstance(change, int) else f"{change:+,.4f}"
