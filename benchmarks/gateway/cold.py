"""From the command to the first token: how long until a gateway that is started answers.

    python -m benchmarks.gateway.cold [NAME=]RUN|DIR|FILE.gguf ... [--rounds 5]

In each round every model is served by a command of its own, turn about. Ready is when `/ready` says so; the first token is the
first piece of a stream that is asked for then. Files are in the system's cache after the first round, which is therefore not
counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

from openai import OpenAI

from benchmarks.gateway.beds import REST, Service, ours
from benchmarks.peers import ROOT
from benchmarks.results import RESULTS, this_machine

EVERY_S = 0.02


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the command's start."""

    listening: float
    ready: float
    first_token: float


def started(model: str, folder: Path) -> Start:
    """`model`: as `tunedock serve` takes it, under the name `m`."""
    folder.mkdir()
    place = model.partition("=")[2] or model
    with ours([f"m={place}"], folder, core=f"0,{REST}") as service:
        listening = time.monotonic() - service.began
        _wait_ready(service)
        ready = time.monotonic() - service.began
        client = OpenAI(base_url=f"{service.url}/v1", api_key=service.key, max_retries=0)
        stream = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Where is my order?"}], max_tokens=4, stream=True
        )
        next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content is not None)
        return Start(listening, ready, time.monotonic() - service.began)


def _wait_ready(service: Service) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{service.url}/ready", timeout=5):  # noqa: S310 - http on loopback
                return
        except urllib.error.HTTPError:
            time.sleep(EVERY_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", metavar="[NAME=]RUN|DIR|FILE.gguf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="keep no results")
    arguments = parser.parse_args()
    named = {model.partition("=")[0] if "=" in model else Path(model).name: model for model in arguments.models}
    found: dict[str, list[Start]] = {name: [] for name in named}
    with tempfile.TemporaryDirectory(prefix="cold-") as place:
        for number in range(arguments.rounds + 1):
            for name, model in named.items():
                start = started(model, Path(place) / f"{name}-{number}")
                if number:
                    found[name].append(start)
    print(f"{'':24}{'listens':>10}{'first token':>14}   seconds, medians of {arguments.rounds}")
    for name, starts in found.items():
        middle = [statistics.median(getattr(one, part) for one in starts) for part in ("listening", "first_token")]
        print(f"{name:24}{middle[0]:10.2f}{middle[1]:14.2f}")
    if not arguments.no_write:
        machine = this_machine()
        told = {
            "machine": asdict(machine),
            "starts": {name: [asdict(one) for one in each] for name, each in found.items()},
        }
        path = RESULTS / f"{machine.slug}-gateway-cold.json"
        path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
