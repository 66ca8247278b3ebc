"""A report as Markdown tables and as a plot.

python -m benchmarks.report benchmarks/results/FILE.json      writes FILE.md and FILE.png beside it, and the tables into
                                                              docs/performance.md
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import ROOT
from benchmarks.results import Report
from benchmarks.sides import OURS
from benchmarks.stats import Summary, summaries
from benchmarks.targets import MATMUL_SHARE, PREPROCESSING, START_OVER_IMPORT, Verdict, verdicts

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures and stand to the right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, marks, *rows))


def markdown(report: Report) -> str:
    """All tables of a report."""
    found = summaries(report.runs)
    parts = [_heading(report)]
    for key in dict.fromkeys((summary.model_name, summary.objective) for summary in found):
        group = [summary for summary in found if (summary.model_name, summary.objective) == key]
        parts.append(f"### {key[1].upper()} LoRA, {key[0]}\n\n{_sides(group)}")
    parts += [part for part in (_preparing(report), _start_up(report), _peak(report)) if part]
    parts.append(_targets([*verdicts(found), *_more_verdicts(report)]))
    if report.disagreements or report.failures:
        said = [f"- {line}" for line in report.disagreements]
        said += [f"- {failure.what} failed: {_gist(failure.why)}" for failure in report.failures]
        parts.append("### What did not agree or did not run\n\n" + "\n".join(said))
    elif found:
        parts.append("Every side trained on the same tokens, and the losses agree.")
    return "\n\n".join(parts) + "\n"


def _gist(why: str) -> str:
    """The line that names the error; the last one where none does."""
    lines = why.splitlines()
    return next((line for line in reversed(lines) if "rror:" in line), lines[-1] if lines else "").strip()


def _heading(report: Report) -> str:
    machine = report.machine
    bf16 = "with" if machine.bf16 else "without"
    return (
        f"Measured on {report.date}: {machine.cpu}, {machine.cores} cores, {machine.memory_gib} GiB, {bf16} bf16 dot "
        f"products; torch {machine.torch}, {machine.threads} threads; tunedock {report.tunedock}. Medians."
    )


def _sides(group: Sequence[Summary]) -> str:
    ours = next((summary for summary in group if summary.side == OURS), None)
    rows = []
    for summary in sorted(group, key=lambda one: -one.tokens_per_second):
        ratio = f"{ours.tokens_per_second / summary.tokens_per_second:.2f}x" if ours else ""
        rows.append(
            [
                f"**{summary.name}**" if summary is ours else summary.name,
                f"{summary.tokens_per_second:,.0f}",
                f"{summary.low:,.0f} to {summary.high:,.0f}",
                str(summary.runs),
                ratio,
                f"{summary.above_imports_bytes / 1e9:.2f}",
                f"{summary.first_step_s:.1f}",
                f"{summary.first_loss:.4f}",
                f"{summary.mean_loss:.4f}",
            ]
        )
    head = [
        "",
        "tokens/s",
        "range",
        "runs",
        "ours is",
        "peak above imports, GB",
        "first step after, s",
        "first loss",
        "mean loss",
    ]
    return table(head, rows)


def _preparing(report: Report) -> str:
    if report.preparing is None:
        return ""
    rates = {side: statistics.median(values) for side, values in report.preparing.rows_per_second.items()}
    rows = [[side, f"{rate:,.0f}"] for side, rate in sorted(rates.items(), key=lambda item: -item[1])]
    title = f"### Preparing {report.preparing.rows:,} chats, {report.preparing.workers} processes"
    return f"{title}\n\n{table(['', 'rows/s'], rows)}"


def _start_up(report: Report) -> str:
    if report.start_up is None:
        return ""
    bare = statistics.median(report.start_up.bare_import_s)
    rows = [["import of torch, the model's module and peft", f"{bare:.2f}", "1.00x"]]
    for name, values in report.start_up.first_step_s.items():
        median = statistics.median(values)
        rows.append([name, f"{median:.2f}", f"{median / bare:.2f}x"])
    return f"### From the command to the first step\n\n{table(['', 'seconds', 'of the import'], rows)}"


def _peak(report: Report) -> str:
    if report.peak is None or not report.peak.training:
        return ""
    peak = report.peak
    rate = statistics.median(peak.training)
    shape = "x".join(str(size) for size in peak.best_shape)
    rows = [
        [f"best bf16 product ({shape})", f"{peak.matmul / 1e9:,.0f}", ""],
        ["SFT LoRA, small", f"{rate / 1e9:,.0f}", f"{rate / peak.matmul:.0%}"],
    ]
    return f"### Share of the matmul peak\n\n{table(['', 'GFLOP/s', 'of the peak'], rows)}"


def _more_verdicts(report: Report) -> list[Verdict]:
    """Of preparing, start-up and the matmul peak."""
    found = []
    if report.preparing is not None:
        rates = {side: statistics.median(values) for side, values in report.preparing.rows_per_second.items()}
        if OURS in rates and "llamafactory" in rates:
            ratio = rates[OURS] / rates["llamafactory"]
            found.append(Verdict("preparing, rows/s against llamafactory", ratio, PREPROCESSING, at_least=True))
    if report.start_up is not None and OURS in report.start_up.first_step_s:
        seconds = {name: statistics.median(values) for name, values in report.start_up.first_step_s.items()}
        ours = seconds.pop(OURS)
        bare = statistics.median(report.start_up.bare_import_s)
        found.append(Verdict("command to first step against the bare import", ours / bare, START_OVER_IMPORT, False))
        if seconds:
            quickest = min(seconds, key=lambda name: seconds[name])
            ratio = ours / seconds[quickest]
            found.append(Verdict(f"command to first step against the quickest peer ({quickest})", ratio, 1.0, False))
    if report.peak is not None and report.peak.training:
        share = statistics.median(report.peak.training) / report.peak.matmul
        found.append(Verdict("share of the bf16 matmul peak, SFT small", share, MATMUL_SHARE, at_least=True))
    return found


def _targets(found: Sequence[Verdict]) -> str:
    rows = [
        [
            verdict.what,
            f"{verdict.ratio:.2f}",
            f"{'at least' if verdict.at_least else 'at most'} {verdict.target:g}",
            "met" if verdict.met else "missed",
        ]
        for verdict in found
    ]
    return f"### Against the targets\n\n{table(['', 'ratio', 'target', ''], rows)}"


def into_page(page: str, tables: str) -> str:
    """The page with its measured part replaced. Raises ValueError when the page has no place for it."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no `{BEGIN}` followed by `{END}`")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m benchmarks.report benchmarks/results/FILE.json", file=sys.stderr)
        return 2
    from benchmarks.plot import plot

    path = Path(arguments[0])
    report = Report.read(path)
    tables = markdown(report)
    path.with_suffix(".md").write_text(tables, encoding="utf-8")
    plot(summaries(report.runs), path.with_suffix(".png"))
    PAGE.write_text(into_page(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
