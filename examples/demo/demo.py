"""The demo: the user's own commands on a small model, and what came of them.

    make demo

It runs `tunedock data check`, `train`, `eval` and `export` on examples/demo/recipe.yaml, as anyone would in a shell, and
ends with three answers of the base model beside the tuned one, a table of both, and the commands to do each step oneself.
It fails unless the base files less than 10 % of the held-out messages right and the tuned model at least 90 %.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tunedock.errors import TunedockError
from tunedock.events import EventReader

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "examples/demo/recipe.yaml"
BASE_BELOW, TUNED_FROM = 0.10, 0.90
ANSWERS_SHOWN = 3

console = Console(highlight=False)


def say(text: str) -> None:
    """Prints with markup, and leaves the wrapping of long lines to the terminal, so that commands can be copied."""
    console.print(text, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Figures:
    """What the run left on disk."""

    base: dict[str, Any]
    tuned: dict[str, Any]
    answers: list[dict[str, Any]]
    steps: int
    step_s: float
    """Median time of a training step."""


def command() -> str:
    """The `tunedock` beside this Python, so that the demo needs no activated environment."""
    beside = Path(sys.executable).parent / "tunedock"
    found = str(beside) if beside.exists() else shutil.which("tunedock")
    if found is None:
        raise TunedockError("the `tunedock` command is not installed", hint="run `make demo`")
    return found


def run(*arguments: str) -> float:
    """Shows a command and runs it in the project's folder. Returns seconds; where it fails, the demo ends with its code."""
    say(f"\n[bold]$ tunedock {escape(shlex.join(arguments))}[/]")
    sys.stdout.flush()
    started = time.monotonic()
    code = subprocess.run([command(), *arguments], cwd=ROOT, check=False).returncode
    if code:
        say(f"[red]the demo stops here:[/] the command above ended with exit code {code}")
        sys.exit(code)
    return time.monotonic() - started


def free_name() -> str:
    """`demo`, or `demo-2`, `demo-3` ...: a run never writes over another's results, and the demo can be run again."""
    number = 1
    while any((ROOT / folder / _numbered(number)).exists() for folder in ("runs", "exports")):
        number += 1
    return _numbered(number)


def _numbered(number: int) -> str:
    return "demo" if number == 1 else f"demo-{number}"


def figures(run_folder: Path) -> Figures:
    metrics = json.loads((run_folder / "eval" / "metrics.json").read_text(encoding="utf-8"))
    steps = [event for event in EventReader(run_folder / "events.jsonl").new() if "loss" in event.get("values", {})]
    gaps = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairwise(steps)]
    return Figures(metrics["base"], metrics["tuned"], metrics["answers"], steps[-1]["step"], statistics.median(gaps))


def picked(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few answers, both languages among them: messages of middling length, then the shortest."""
    by_length = sorted(answers, key=lambda answer: len(answer["prompt"][-1]["content"]))
    english = [answer for answer in by_length if answer["prompt"][-1]["content"].isascii()]
    chinese = [answer for answer in by_length if not answer["prompt"][-1]["content"].isascii()]
    middle = [some[len(some) // 2] for some in (english, chinese) if some]
    return [*middle, *(answer for answer in by_length if answer not in middle)][:ANSWERS_SHOWN]


def show_answers(found: Figures) -> None:
    for answer in picked(found.answers):
        right = answer["tuned"].strip() == answer["reference"].strip()
        say(f"[bold]{escape(answer['prompt'][-1]['content'])}[/]")
        say(f"  base    {escape(one_line(answer['base']))}")
        say(f"  tuned   [{'green' if right else 'red'}]{escape(one_line(answer['tuned']))}[/]")
        say(f"  wanted  {escape(answer['reference'])}\n")


def one_line(text: str) -> str:
    """A model's text for the terminal: its line breaks shown, nothing unprintable, and not too long."""
    shown = "".join(c if c.isprintable() else " " for c in text.replace("\n", " / "))
    return shown if len(shown) <= 160 else shown[:160] + " ..."


def show_table(found: Figures, name: str, seconds: dict[str, float]) -> None:
    table = Table(title="held-out messages", title_justify="left")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("tuned", justify="right", style="bold")
    table.add_row("answered exactly right", f"{found.base['exact_match']:.1%}", f"{found.tuned['exact_match']:.1%}")
    table.add_row("loss per token of the answer", f"{found.base['loss']:.3f}", f"{found.tuned['loss']:.4f}")
    table.add_row("ROUGE-L", f"{found.base['rougeL']:.3f}", f"{found.tuned['rougeL']:.3f}")
    console.print(table)
    say(
        f"{found.steps} steps of {found.step_s * 1000:.0f} ms; "
        + ", ".join(f"{stage} {spent:.0f} s" for stage, spent in seconds.items())
    )
    for what, where in (
        ("run (recipe, metrics, log, checkpoints)", f"runs/{name}/"),
        ("loss curve", f"runs/{name}/plots/loss.png"),
        ("every answer, base beside tuned", f"runs/{name}/eval/answers.html"),
        ("merged model, Hugging Face layout", f"exports/{name}/"),
    ):
        say(f"  {what:<42}{where}")


def show_commands(name: str) -> None:
    say(
        f"""
[bold]The same by hand[/]
  . .venv/bin/activate
  tunedock data check {RECIPE}
  tunedock data show {RECIPE} --row 3         [dim]# which tokens are trained on[/]
  tunedock recipe show {RECIPE}               [dim]# every value, and where it comes from[/]
  tunedock train {RECIPE} train.num_train_epochs=1
  tunedock eval runs/{name}
  tunedock export runs/{name} --to exports/mine
  tunedock chat runs/{name} --system "File the customer's message as JSON."
    [dim]then write, say:[/] my bike has not arrived, order 4071, please hurry
    [dim]or:[/] 烧水壶坏了，订单号是2093。不急。"""
    )


def verdict(found: Figures) -> int:
    base, tuned = found.base["exact_match"], found.tuned["exact_match"]
    if base < BASE_BELOW and tuned >= TUNED_FROM:
        say(f"\n[green]The model has learnt its task:[/] {base:.1%} right before, {tuned:.1%} after.")
        return 0
    say(
        f"\n[red]The demo did not do what it promises:[/] base {base:.1%} (below {BASE_BELOW:.0%} expected), "
        f"tuned {tuned:.1%} (at least {TUNED_FROM:.0%} expected)."
    )
    return 1


def main() -> int:
    name = free_name()
    say(
        "tunedock demo: a model of 3 million parameters learns to file customers' messages, in English and Chinese, "
        "as JSON.\nIt takes a few minutes on two CPU cores, and touches no network."
    )
    seconds = {"data check": run("data", "check", RECIPE)}
    seconds["train"] = run("train", RECIPE, f"train.output_dir=runs/{name}")
    seconds["eval"] = run("eval", f"runs/{name}")
    seconds["export"] = run("export", f"runs/{name}", "--to", f"exports/{name}")
    found = figures(ROOT / "runs" / name)
    say("")
    show_answers(found)
    show_table(found, name, seconds)
    show_commands(name)
    return verdict(found)


if __name__ == "__main__":
    sys.exit(main())
