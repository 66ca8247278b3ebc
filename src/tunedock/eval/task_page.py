"""The tasks of an evaluation as one HTML file: a line a metric, base beside tuned, with standard errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from tunedock.eval.page import content_policy, own_file, visible

_ABSENT = "–"


def page(result: Mapping[str, Any]) -> str:
    """The page for what `eval/tasks.json` holds (`eval.tasks.TaskRun.result`)."""
    css = own_file("page.css")
    return _template().render(
        run=visible(str(result["run"])),
        settings=visible(settings(result)),
        compared=bool(result["compared"]),
        rows=list(_rows(result)),
        css=css,
        policy=content_policy(css),
    )


def settings(result: Mapping[str, Any]) -> str:
    """How the figures were made, in a line."""
    said = [f"lm-eval {result['lm_eval']}"]
    said.append("chat template applied" if result["apply_chat_template"] else "plain prompts")
    if result["limit"] is not None:
        said.append(f"at most {result['limit']:,} documents a task: not comparable with figures on all")
    return " · ".join(said)


@cache
def _template() -> Template:
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(own_file("tasks.html.j2"))


def _rows(result: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for task in result["tasks"]:
        for i, line in enumerate(task["metrics"]):
            change, verdict = _difference(line)
            documents = f"{task['samples']:,}"
            if task["documents"] not in (None, task["samples"]):
                documents += f" of {task['documents']:,}"
            yield {
                "task": visible(str(task["task"])) if i == 0 else "",
                "metric": visible(metric_name(line)),
                "base": visible(figure(line.get("base"), line.get("base_stderr"))),
                "tuned": visible(figure(line["tuned"], line["tuned_stderr"])),
                "difference": change,
                "verdict": verdict,
                "documents": documents if i == 0 else "",
                "shots": visible(str(task["num_fewshot"])) if i == 0 and task["num_fewshot"] is not None else "",
                "version": visible(str(task["version"])) if i == 0 and task["version"] is not None else "",
            }


def metric_name(line: Mapping[str, Any]) -> str:
    """`acc`, or with its filter `exact_match (strict-match)`."""
    return str(line["metric"]) if line["filter"] in ("none", "") else f"{line['metric']} ({line['filter']})"


def figure(value: Any, error: Any) -> str:
    """`0.512 ± 0.014`."""
    if not _is_number(value):
        return _ABSENT if value is None else str(value)
    return f"{value:.4g}" + (f" ± {error:.2g}" if _is_number(error) else "")


def _difference(line: Mapping[str, Any]) -> tuple[str, str]:
    before, after, better = line.get("base"), line["tuned"], line["higher_is_better"]
    if not _is_number(before) or not _is_number(after):
        return _ABSENT, ""
    change = after - before
    if better is None or not change:
        return f"{change:+.4g}", ""
    return f"{change:+.4g}", "better" if (change > 0) == bool(better) else "worse"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
