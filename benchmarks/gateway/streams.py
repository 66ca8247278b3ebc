"""Many streams for long: is one lost, is one mixed up with another, does memory grow?

    python -m benchmarks.gateway.streams [--streams 200] [--minutes 5]

A small model is served by the engine of the gateway's own process, with keys, limits and an access log. So many clients at once ask
for streams, one after the other, each by a prompt of its own among many; each answer is held to the letter against what the prompt
is answered when it is asked alone, in float32. Lost is a stream that ends in any other way than with its finish, its usage and
`[DONE]`. Prompts at which two tokens are within a thousandth of being equally likely are left out: how a sum is rounded, and with
it which of them is taken, depends on how many are computed at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp
import psutil

from benchmarks import models
from benchmarks.gateway.beds import REST, Service, ours
from benchmarks.peers import ROOT
from benchmarks.results import RESULTS, this_machine
from benchmarks.words import Words

PROMPTS = 64
TOKENS = 24
MARGIN = 1e-3
"""Between the logarithms of the two likeliest tokens, at each token of an answer."""
EVERY_S = 5.0


@dataclass(slots=True)
class Found:
    answered: int = 0
    lost: list[str] = field(default_factory=list)
    mixed_up: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)


async def streamed(session: aiohttp.ClientSession, service: Service, prompt: str) -> tuple[str, float]:
    """(the text, seconds to its first piece). Raises ValueError for a stream that does not end as it should."""
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    text, first_s, finished, used, done, began = "", 0.0, False, 0, False, time.perf_counter()
    async with session.post(f"{service.url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise ValueError(f"HTTP {answer.status}: {(await answer.text())[:200]}")
        async for line in answer.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                done = True
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(f"an error: {chunk['error']}")
            used = (chunk.get("usage") or {}).get("completion_tokens", used)
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") or ""
                first_s = first_s or (time.perf_counter() - began if piece else 0.0)
                text += piece
                finished = finished or choice["finish_reason"] is not None
    if not (done and finished and used):
        raise ValueError(f"no end: [DONE] {done}, finish {finished}, usage {used}")
    return text, first_s


async def chosen(session: aiohttp.ClientSession, service: Service) -> dict[str, str]:
    """Prompts, and what each is answered alone."""
    words, found, number = Words(5), dict[str, str](), 0
    while len(found) < PROMPTS:
        prompt, number = f"{number}: {words.text(4 + number % PROMPTS)}", number + 1
        body = {
            "model": "tiny", "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0,
            "logprobs": True, "top_logprobs": 2,
        }  # fmt: skip
        async with session.post(f"{service.url}/v1/chat/completions", json=body) as answer:
            (choice,) = (await answer.json())["choices"]
        best = [[one["logprob"] for one in token["top_logprobs"]] for token in choice["logprobs"]["content"]]
        if all(first - second > MARGIN for first, second in best):
            found[prompt] = choice["message"]["content"]
    print(f"{PROMPTS} prompts of {number}", flush=True)
    return found


async def measured(service: Service, streams: int, minutes: float) -> Found:
    found, times = Found(), aiohttp.ClientTimeout(total=600)
    headers = {"Authorization": f"Bearer {service.key}"}
    async with aiohttp.ClientSession(
        headers=headers, timeout=times, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        alone = await chosen(session, service)
        prompts = list(alone)
        until = time.monotonic() + 60 * minutes

        async def client(number: int) -> None:
            turn = number
            while time.monotonic() < until:
                prompt, began = prompts[turn % PROMPTS], time.perf_counter()
                turn += 7
                try:
                    text, first_s = await streamed(session, service, prompt)
                except (ValueError, aiohttp.ClientError, TimeoutError) as error:
                    found.lost.append(f"{type(error).__name__}: {error}")
                    continue
                found.answered += 1
                found.first_s.append(first_s)
                found.whole_s.append(time.perf_counter() - began)
                if text != alone[prompt]:
                    found.mixed_up.append(f"{prompt[:20]}: {text[:60]!r} instead of {alone[prompt][:60]!r}")

        async def watch() -> None:
            process = psutil.Process(service.pid)
            while True:
                found.resident_mb.append(process.memory_info().rss / 1e6)
                await asyncio.sleep(EVERY_S)

        watching = asyncio.ensure_future(watch())
        await asyncio.gather(*(client(number) for number in range(streams)))
        watching.cancel()
    return found


def report(found: Found, streams: int, minutes: float) -> str:
    first = sorted(found.first_s)
    early, late = found.resident_mb[len(found.resident_mb) // 5 :][:3], found.resident_mb[-3:]
    return (
        f"{streams} streams at once for {minutes:g} min: {found.answered} answered, {len(found.lost)} lost, "
        f"{len(found.mixed_up)} mixed up; first piece after {statistics.median(first):.2f} s "
        f"(p95 {first[int(0.95 * len(first))]:.2f} s), whole after {statistics.median(found.whole_s):.1f} s; "
        f"memory {statistics.mean(early):.0f} MB after a fifth of the time, {statistics.mean(late):.0f} MB at its end"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--no-write", action="store_true", help="keep no results")
    arguments = parser.parse_args()
    model = models.ensure(arguments.model)
    limits = ("--concurrent", "1000", "--requests-per-minute", "1000000", "--tokens-per-minute", "1000000000")
    options = ("--max-requests", str(arguments.streams), "--max-length", "1024", "--dtype", "float32")
    with tempfile.TemporaryDirectory(prefix="streams-") as folder:
        with ours([f"tiny={model}"], Path(folder), *options, limits=limits, core=f"0,{REST}") as service:
            found = asyncio.run(measured(service, arguments.streams, arguments.minutes))
        log = (Path(folder) / "access.jsonl").read_text(encoding="utf-8").splitlines()
    print(report(found, arguments.streams, arguments.minutes))
    print(f"the access log has {len(log)} lines")
    for text in [*found.lost[:5], *found.mixed_up[:5]]:
        print(text)
    if not arguments.no_write:
        machine = this_machine()
        told = {
            "machine": asdict(machine),
            "settings": vars(arguments),
            "answered": found.answered,
            "lost": len(found.lost),
            "mixed_up": len(found.mixed_up),
            "resident_mb": [round(one) for one in found.resident_mb],
            "first_s": statistics.quantiles(found.first_s, n=20),
            "whole_s": statistics.quantiles(found.whole_s, n=20),
        }
        path = RESULTS / f"{machine.slug}-gateway-streams.json"
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path.relative_to(ROOT)}")
    return bool(found.lost or found.mixed_up)


if __name__ == "__main__":
    raise SystemExit(main())
