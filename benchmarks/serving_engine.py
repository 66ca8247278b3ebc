"""What an engine that batches is worth: tokens a second at many requests at once, beside `generate` and `transformers serve`.

    python -m benchmarks.serving_engine [--model small] [--requests 16] [--answer-tokens 64] [--rounds 3] [--threads 1]

In each round every side answers the same new prompts (made-up words, 20 to 200 tokens), greedily, turn about; figures are medians
over the rounds, ratios are of rates within a round. `generate` goes one by one, in this process (`--alone` of the prompts: its
rate does not depend on how many), and our engine is asked here too: it must give the very tokens `generate` gives in float32, or
nothing is measured. The servers are processes of their own, asked over HTTP by as many clients as requests: `tunedock serve` with
a key and an access log, which the ratios are of, and `transformers serve`, as it comes and with `--continuous-batching`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.gateway.beds import ours
from benchmarks.peers import ROOT
from benchmarks.results import RESULTS, this_machine
from benchmarks.words import Words

GATEWAY, OURS, GENERATE = "tunedock serve", "our engine, in this process", "generate, one by one"
SERVE, BATCHING = "transformers serve", "transformers serve, continuous batching"
START_S = 180

Side = Callable[[Sequence[str]], int]
"""Answers prompts; returns how many tokens the answers have."""


def prompts_of(number: int, round_number: int) -> list[str]:
    """Others in each round: continuous batching keeps what prompts it has seen come to."""
    words = Words(77 + round_number)
    return [words.text(10 + 6 * i) for i in range(number)]


def ours_and_generate(folder: Path, arguments: argparse.Namespace) -> tuple[Side, Side, Callable[[], None]]:
    """The two sides of this process, and what ends the engine. Raises AssertionError where they differ."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunedock.serve.engines.batching import Limits
    from tunedock.serve.engines.generator import Asked, Sampling
    from tunedock.serve.engines.loading import from_folder

    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    limits = Limits(running=arguments.requests, longest=2048, cache_bytes=2 << 30)
    engine = from_folder(folder, dtype=dtype, device=torch.device("cpu"), limits=limits)
    most: int = arguments.answer_tokens
    answers: dict[str, dict[int, list[int]]] = {OURS: {}, GENERATE: {}}

    async def one(number: int, prompt: list[int]) -> None:
        request = Asked(str(number), prompt, most, frozenset(), Sampling(temperature=0.0))
        answers[OURS][number] = [token.id async for token in engine.submit(request)]

    async def all_of_them(texts: Sequence[str]) -> None:
        prompts = (tokenizer(text)["input_ids"] for text in texts)
        await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))

    def engine_here(texts: Sequence[str]) -> int:
        asyncio.run(all_of_them(texts))
        return most * len(texts)

    def generate(texts: Sequence[str]) -> int:
        chosen = range(0, len(texts), max(1, len(texts) // arguments.alone))
        for number in chosen:
            ids = torch.tensor([tokenizer(texts[number])["input_ids"]])
            made = plain.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            answers[GENERATE][number] = made[0, ids.shape[1] :].tolist()
        return most * len(chosen)

    first = prompts_of(arguments.requests, 0)
    engine_here(first)
    generate(first)
    differ = [number for number, made in answers[GENERATE].items() if answers[OURS][number] != made]
    if differ and arguments.dtype == "float32":
        raise AssertionError(f"answers {differ} are not those of `generate`")
    return engine_here, generate, engine.close


@contextmanager
def gateway(folder: Path, arguments: argparse.Namespace) -> Iterator[Side]:
    """`tunedock serve` as a side."""
    cores = ",".join(map(str, range(os.cpu_count() or 1)))
    with tempfile.TemporaryDirectory(prefix="serving-") as place:
        options = ("--dtype", arguments.dtype, "--max-length", "2048")
        with ours([f"m={folder}"], Path(place), *options, core=cores) as service:
            side = asking(service.url, "m", service.key, arguments.answer_tokens)
            side(prompts_of(arguments.requests, 0))
            yield side


def asking(url: str, model: str, key: str, answer_tokens: int) -> Side:
    """All prompts at once, each by a client of its own."""

    def ask(text: str) -> int:
        body = {"model": model, "prompt": text, "max_tokens": answer_tokens, "temperature": 0.0}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=580) as answer:  # noqa: S310 - http on loopback
            return int(json.load(answer)["usage"]["completion_tokens"])

    def side(texts: Sequence[str]) -> int:
        with ThreadPoolExecutor(len(texts)) as pool:
            return sum(pool.map(ask, texts))

    return side


@contextmanager
def served(folder: Path, arguments: argparse.Namespace, *options: str) -> Iterator[Side]:
    """`transformers serve` as a side."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", arguments.dtype, *options]
    log = folder.parent / "serve.log"
    with log.open("w") as said:
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            _wait(port, process, log)

            side = asking(f"http://127.0.0.1:{port}", str(folder), "none", arguments.answer_tokens)
            side(prompts_of(arguments.requests, 0))
            yield side
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"transformers serve did not start: {log.read_text()[-500:]}")


def measured(sides: dict[str, Side], rounds: int, requests: int) -> dict[str, list[float]]:
    """Tokens a second of each side in each round."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        texts = prompts_of(requests, number + 1)
        order = list(sides) if number % 2 else list(sides)[::-1]
        for name in order:
            began = time.perf_counter()
            tokens = sides[name](texts)
            rates[name].append(tokens / (time.perf_counter() - began))
            print(f"round {number + 1}: {name}: {rates[name][-1]:.1f} tokens/s", flush=True)
    return rates


def table(rates: dict[str, list[float]]) -> str:
    lines = ["| | tokens/s | `tunedock serve` is faster by |", "| --- | ---: | ---: |"]
    for name, each in rates.items():
        ratios = [mine / other for mine, other in zip(rates[GATEWAY], each, strict=True)]
        told = "" if name == GATEWAY else f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
        lines.append(f"| {name} | {statistics.median(each):.1f} | {told} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="small")
    parser.add_argument("--dtype", default="float32")
    defaults: tuple[tuple[str, int], ...] = (
        ("requests", 16), ("alone", 4), ("answer-tokens", 64), ("rounds", 3), ("threads", os.cpu_count() or 1),
    )  # fmt: skip
    for name, default in defaults:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only-ours", action="store_true", help="without `transformers serve`; nothing is written")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the servers; this process has its own setting
    folder = models.ensure(arguments.model)
    with ExitStack() as stack:
        engine, generate, close = ours_and_generate(folder, arguments)
        stack.callback(close)
        sides: dict[str, Side] = {
            GATEWAY: stack.enter_context(gateway(folder, arguments)),
            OURS: engine,
            GENERATE: generate,
        }
        if not arguments.only_ours:
            sides[SERVE] = stack.enter_context(served(folder, arguments))
            sides[BATCHING] = stack.enter_context(served(folder, arguments, "--continuous-batching"))
        rates = measured(sides, arguments.rounds, arguments.requests)
    print(table(rates))
    if not arguments.only_ours:
        write(arguments, rates)
    return 0


def write(arguments: argparse.Namespace, rates: dict[str, Any]) -> None:
    machine = this_machine()
    path = RESULTS / f"{machine.slug}-serving-engine.json"
    told = {"machine": asdict(machine), "settings": vars(arguments), "tokens_per_second": rates}
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    raise SystemExit(main())
