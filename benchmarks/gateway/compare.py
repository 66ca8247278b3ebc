"""The gateway alone, beside LiteLLM's proxy: requests a second, and what a request waits longer for going through it.

    python -m benchmarks.gateway.compare [--rounds 5] [--seconds 8] [--connections 32]

Both stand in front of one engine that answers at once. What is measured has the first core to itself, wrk and the engine share the
second. Sides take turns, in each round the other way round; ratios are of rates within a round, figures medians over the rounds.
LiteLLM checks a master key and writes nothing down. Ours checks a key against its store, counts in it, and writes an access log;
once more with every limit set, which asks the store before each request. Needs wrk (`apt-get install wrk`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.gateway.beds import Rate, Service, echo, litellm, ours, wrk
from benchmarks.peers import LITELLM, ROOT
from benchmarks.results import RESULTS, this_machine

OURS, LIMITED, PEER, ENGINE = "tunedock", "tunedock, every limit set", "LiteLLM", "the engine itself"
LIMITS = (
    "--requests-per-minute", "1000000000", "--tokens-per-minute", "1000000000", "--tokens-per-day", "1000000000",
    "--concurrent", "1000",
)  # fmt: skip
WORDS = "one two three four five six seven eight"
KINDS = ("whole", "streamed")

Rates = dict[str, dict[str, list[Rate]]]
"""Kind and way of asking -> side -> a figure for each round."""


def body(kind: str) -> Mapping[str, object]:
    message = {"role": "user", "content": WORDS}
    return {
        "model": "echo",
        "messages": [message],
        "max_tokens": 16,
        **({"stream": True} if kind == "streamed" else {}),
    }


def measured(sides: Mapping[str, Service], arguments: argparse.Namespace, folder: Path) -> Rates:
    found: Rates = {}
    for number in range(arguments.rounds):
        for kind in KINDS:
            for connections in (1, arguments.connections):
                each = found.setdefault(f"{kind}, {connections} at once", {})
                for name in list(sides)[:: -1 if number % 2 else 1]:
                    rate = wrk(
                        sides[name], body(kind), connections=connections, seconds=arguments.seconds, folder=folder
                    )
                    each.setdefault(name, []).append(rate)
                    print(
                        f"round {number + 1}, {kind}, {connections} at once: {name}: {rate.requests_per_s:.0f}/s, "
                        f"median {rate.median_ms:.2f} ms, p99 {rate.p99_ms:.1f} ms",
                        flush=True,
                    )
    return found


def table(rates: Rates) -> str:
    lines = [
        "| | | requests/s | beside LiteLLM | median | added | p99 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for asked, sides in rates.items():
        for name, each in sides.items():
            if name == ENGINE:
                continue
            ratios = [mine.requests_per_s / other.requests_per_s for mine, other in zip(each, sides[PEER], strict=True)]
            added = [mine.median_ms - bare.median_ms for mine, bare in zip(each, sides[ENGINE], strict=True)]
            told = "" if name == PEER else f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
            lines.append(
                f"| {asked} | {name} | {statistics.median(one.requests_per_s for one in each):.0f} | {told} | "
                f"{statistics.median(one.median_ms for one in each):.2f} ms | {statistics.median(added):.2f} ms | "
                f"{statistics.median(one.p99_ms for one in each):.1f} ms |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (("rounds", 5), ("seconds", 8), ("connections", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-write", action="store_true", help="keep no results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gateway-") as place, ExitStack() as stack:
        folder = Path(place)
        engine = stack.enter_context(echo())
        model = [f"echo={engine.url}/v1"]
        sides = {
            OURS: stack.enter_context(ours(model, folder / "ours")),
            LIMITED: stack.enter_context(ours(model, folder / "limited", limits=LIMITS)),
            PEER: stack.enter_context(litellm(engine, folder / "litellm")),
            ENGINE: engine,
        }
        for side in sides.values():
            wrk(side, body("whole"), connections=4, seconds=2, folder=folder)
        rates = measured(sides, arguments, folder)
    print(table(rates))
    if not arguments.no_write:
        machine = this_machine()
        versions = {"litellm": LITELLM.packages[0], "fastapi": version("fastapi"), "uvicorn": version("uvicorn")}
        told = {
            "machine": asdict(machine),
            "versions": versions,
            "settings": vars(arguments),
            "rates": {
                asked: {name: [asdict(one) for one in each] for name, each in sides.items()}
                for asked, sides in rates.items()
            },
        }
        path = RESULTS / f"{machine.slug}-gateway.json"
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
