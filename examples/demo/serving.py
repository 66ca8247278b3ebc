"""The demo's second half: a model on its way into service, and back.

    make demo-serve

Two versions of the demo's model are trained, a short one and the whole one. The second is exported, merged and as GGUF, and
verified; a gateway serves both exports and whichever version the registry says is in production. A client asks them by the
`openai` package, goes on asking while the second version is promoted and taken back, and counts what it gets.
It fails if a request does, if the exports answer otherwise than the run did, or if an act does not reach the callers.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from demo import RECIPE, ROOT, command, console, run, say
from openai import APIError, OpenAI
from rich.markup import escape
from rich.table import Table

from tunedock.errors import TunedockError

SHORT_STEPS = 40
"""Of the first version: enough to answer in the right form, and often wrongly."""

ASKED, AT_ONCE = 60, 8
MODEL = "triage"
START_S, REACH_S = 180, 60
VERSION_HEADER = "x-tunedock-model-version"


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    version: str | None


@dataclass
class Asking:
    """Requests one after another until it is told to stop: what they came to, in order."""

    client: OpenAI
    messages: Sequence[Any]
    answered: list[tuple[float, str | None]] = field(default_factory=list)
    """When, and by which version."""
    failures: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def go_on(self) -> None:
        number = 0
        while not self._over.is_set():
            try:
                version = ask(self.client, MODEL, self.messages[number % len(self.messages)]).version
                self.answered.append((time.monotonic(), version))
            except APIError as error:
                self.failures.append(str(error))
            number += 1

    def reached(self, version: str, since: float) -> float:
        """Seconds from a moment to the first answer of a version that came after it."""
        until = time.monotonic() + REACH_S
        while time.monotonic() < until:
            first = next((at for at, by in list(self.answered) if at >= since and by == version), None)
            if first is not None:
                return first - since
            time.sleep(0.01)
        raise TunedockError(f"no answer of version {version} came within {REACH_S} s")

    @contextmanager
    def at_once(self, clients: int) -> Iterator[Asking]:
        threads = [threading.Thread(target=self.go_on) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._over.set()
            for thread in threads:
                thread.join()


def free_name() -> str:
    """A name under which nothing was made yet."""
    number = 1
    while any((ROOT / "runs").glob(f"served-{number}-*")):
        number += 1
    return f"served-{number}"


def ask(client: OpenAI, model: str, messages: Any) -> Answer:
    raw = client.chat.completions.with_raw_response.create(model=model, messages=messages, temperature=0, max_tokens=64)
    return Answer(raw.parse().choices[0].message.content or "", raw.headers.get(VERSION_HEADER))


def ask_all(client: OpenAI, model: str, asked: Sequence[dict[str, Any]]) -> list[str]:
    """Answers to the held-out messages, some at once; the order is theirs."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [answer.text for answer in pool.map(lambda row: ask(client, model, row["prompt"]), asked)]


def right(answers: Sequence[str], asked: Sequence[dict[str, Any]]) -> float:
    pairs = zip(answers, asked, strict=True)
    return statistics.mean(answer.strip() == row["reference"].strip() for answer, row in pairs)


def new_key(folder: Path) -> str:
    """A key as `tunedock token issue` prints it: alone on standard output."""
    given = ["token", "issue", "demo", "--label", "demo", "--expires", "1d", "--store", str(folder / "access.db")]
    say(f"\n[bold]$ tunedock {' '.join(given)}[/]")
    made = subprocess.run([command(), *given], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return made.stdout.strip()


@contextmanager
def gateway(folder: Path, *models: str) -> Iterator[str]:
    """Its address, while it serves."""
    given = [*models, "--registry", str(folder / "models.db"), "--store", str(folder / "access.db"), "--port", "0"]
    given += ["--access-log", str(folder / "access.jsonl")]
    say(f"\n[bold]$ tunedock serve {escape(' '.join(given))}[/]")
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen([command(), "serve", *given], cwd=ROOT, stdout=log, stderr=log)
    try:
        yield _address(process, folder / "serve.log")
    finally:
        process.terminate()
        process.wait(60)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r" at (http://\S+/v1)", log.read_text(encoding="utf-8"))
        if found:
            return found[1]
        time.sleep(0.05)
    raise TunedockError(f"the gateway did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")


def models(act: str, folder: Path, *given: str) -> None:
    run("models", act, MODEL, *given, "--registry", str(folder / "models.db"))


def made(name: str, folder: Path) -> list[dict[str, Any]]:
    """Two runs, two exports that are verified, two versions. Returns the held-out messages and what the second run answered."""
    run("train", RECIPE, f"train.max_steps={SHORT_STEPS}", f"train.output_dir=runs/{name}-short")
    run("train", RECIPE, f"train.output_dir=runs/{name}-whole")
    run("eval", f"runs/{name}-whole")
    run("export", f"runs/{name}-whole", "--to", f"exports/{name}-merged")
    run("export", f"runs/{name}-whole", "--format", "gguf", "--to", f"exports/{name}-gguf")
    for form in ("merged", "gguf"):
        run("export", "verify", f"exports/{name}-{form}")
    models("register", folder, f"runs/{name}-short", "--alias", "production")
    models("register", folder, f"runs/{name}-whole")
    answers: list[dict[str, Any]] = json.loads((ROOT / f"runs/{name}-whole/eval/metrics.json").read_text())["answers"]
    return answers[:ASKED]


def show_metrics(address: str, key: str) -> None:
    """Some lines of what Prometheus would scrape."""
    text = httpx.get(address.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {key}"}).text
    wanted = (
        "tunedock_requests_total",
        "tunedock_generation_tokens_total",
        "tunedock_time_to_first_token_seconds_count",
    )
    say("\n[bold]$ curl -H 'Authorization: Bearer ...' /metrics[/]")
    for line in text.splitlines():
        if line.startswith(wanted):
            say(f"  {escape(line)}")


def main() -> int:
    name = free_name()
    folder = ROOT / "runs" / f"{name}-service"
    folder.mkdir(parents=True)
    asked = made(name, folder)
    key = new_key(folder)
    served = (f"{MODEL}=models:/{MODEL}@production", f"merged=exports/{name}-merged", f"gguf=exports/{name}-gguf")
    table = Table(title=f"{len(asked)} held-out messages, asked by the openai package", title_justify="left")
    for column in ("model", "right", "as the run answered"):
        table.add_column(column, justify="left" if column == "model" else "right")
    with gateway(folder, *served) as address:
        client = OpenAI(base_url=address, api_key=key, max_retries=0)
        tuned = [row["tuned"] for row in asked]

        def row(label: str, model: str) -> float:
            answers = ask_all(client, model, asked)
            alike = sum(a.strip() == b.strip() for a, b in zip(answers, tuned, strict=True))
            table.add_row(label, f"{right(answers, asked):.1%}", f"{alike} of {len(asked)}")
            return alike / len(asked)

        alike = {form: row(f"{form} (whole training)", form) for form in ("merged", "gguf")}
        first = row(f"{MODEL}, version 1 (short training)", MODEL)
        asking = Asking(client, [one["prompt"] for one in asked])
        with asking.at_once(4):
            asking.reached("1", time.monotonic())
            began = time.monotonic()
            models("promote", folder, "2")
            promoted = asking.reached("2", began)
            second = row(f"{MODEL}, version 2 (whole training)", MODEL)
            began = time.monotonic()
            models("rollback", folder)
            back = asking.reached("1", began)
        again = row(f"{MODEL}, version 1 again", MODEL)
        show_metrics(address, key)
    say("")
    console.print(table)
    say(
        f"{len(asking.answered)} requests of 4 clients while versions changed, {len(asking.failures)} failed; version 2 answered "
        f"{promoted:.1f} s after `models promote` was typed, version 1 again {back:.1f} s after `models rollback`"
    )
    place = folder.relative_to(ROOT)
    say(f"  {'who asked, which model and version, tokens, times':<54}{place}/access.jsonl")
    say(
        f"  {'what stood behind the name, and since when':<54}tunedock models list {MODEL} --registry {place}/models.db"
    )
    if asking.failures:
        raise TunedockError(asking.failures[0])
    if min(alike["merged"], alike["gguf"], second) < 1:
        raise TunedockError("an answer of the whole training differs from the run's")
    if first == 1 or again != first:
        raise TunedockError("the first version did not answer as the first version")
    say("\n[green]Promoted and taken back, and no request was lost.[/]")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TunedockError as error:
        say(f"\n[red]The demo did not do what it promises:[/] {escape(str(error))}")
        sys.exit(1)
