"""How speed and memory go with the shape of a row: one document from 512 to 32k tokens, and 256-token documents side by side.

    python -m benchmarks.scaling [--models tiny,small] [--lengths 512,...] [--seconds 6]

Each point is a process of its own, so that its peak memory is its own: LoRA SFT of the benchmark's model, 29.5 % of the tokens
trained, one row a step, forward and backward (the optimizer is a millisecond). The shares come from PyTorch's profiler over one
step: where the time of that shape goes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.memory import high_water_bytes, resident_bytes
from benchmarks.peers import ROOT
from benchmarks.results import RESULTS, this_machine
from tunedock.launch.process import worker_environment

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
DOCUMENT = 256
TRAINED = 0.295
TIMEOUT_S = 900

PARTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("WeighedAttention", "SegmentAttention", "aten::bmm", "flash_attention", "_scaled_dot_product"),
    "head": ("FrozenHead",),
    "products": ("aten::mm", "aten::addmm", "aten::linear"),
    "norms, gates, rotary": ("_Norm", "_Gate", "_Rotate"),
}
"""Part of a step -> the operations, by the beginning of their names, whose own time belongs to it. The head's products are counted
among the products."""


@dataclass(frozen=True, slots=True)
class Point:
    model: str
    documents: int
    length: int

    @property
    def tokens(self) -> int:
        return self.documents * self.length


@dataclass(frozen=True, slots=True)
class Found:
    point: Point
    tokens_per_second: float
    peak_bytes: int
    """Above the loaded model."""
    shares: dict[str, float]


def points(model: str, lengths: Sequence[int]) -> list[Point]:
    alone = [Point(model, 1, length) for length in lengths]
    return alone + [Point(model, length // DOCUMENT, DOCUMENT) for length in lengths]


def measure(point: Point, seconds: float) -> Found:
    """In this process. Steps are repeated for `seconds`, at least three times; the median counts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunedock.model.adapter import attach
    from tunedock.model.load import find_device, has_bf16
    from tunedock.model.policy import Policy, Precision
    from tunedock.recipe.adapters import Lora

    folder = models.ensure(point.model)
    device = find_device()
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    config = AutoConfig.from_pretrained(folder, max_position_embeddings=max(point.length, 4096))
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).to(device)
    policy = Policy(attach(model, Lora(r=16, alpha=32), seed=0), device, Precision(dtype, dtype))
    policy.probe()
    policy.model.train()
    rows = policy.rows(_samples(point, int(config.vocab_size)), point.tokens)
    trained = sum(len(row.chosen) for row in rows)

    def step() -> None:
        for row in rows:
            logprob_N, tensors = policy.logprobs(row)
            (-(logprob_N * tensors.weight_N).sum() / trained).backward()  # type: ignore[no-untyped-call]
        policy.model.zero_grad()

    before = resident_bytes()
    step()
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    peak = high_water_bytes(os.getpid()) - before
    return Found(point, point.tokens / statistics.median(taken), peak, _shares(step))


def _samples(point: Point, vocabulary: int) -> list[Any]:
    import numpy as np

    from tunedock.data.sample import single

    draw = np.random.default_rng(point.length)
    made = []
    for number in range(point.documents):
        weights = np.zeros(point.length, np.float32)
        weights[-max(1, int(point.length * TRAINED)) :] = 1.0
        made.append(single(str(number), draw.integers(0, vocabulary, point.length).astype(np.int32), weights))
    return made


def _shares(step: Any) -> dict[str, float]:
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    own = {event.key: float(event.self_cpu_time_total) for event in profile.key_averages()}
    total = sum(own.values())
    shares = dict.fromkeys(PARTS, 0.0)
    for name, spent in own.items():
        part = next(
            (part for part, starts in PARTS.items() if any(name.startswith(s) or s in name for s in starts)), None
        )
        if part is not None:
            shares[part] += spent / total
    return {**shares, "the rest": 1.0 - sum(shares.values())}


def _in_a_process(point: Point, seconds: float) -> Found:
    command = [
        sys.executable,
        "-m",
        "benchmarks.scaling",
        "--point",
        json.dumps(asdict(point)),
        "--seconds",
        str(seconds),
    ]
    said = subprocess.run(
        command,
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=worker_environment(os.environ),
    ).stdout
    value = json.loads(said.splitlines()[-1])
    return Found(Point(**value["point"]), value["tokens_per_second"], value["peak_bytes"], value["shares"])


def plot(found: Sequence[Found], path: Path) -> None:
    """Tokens a second and peak memory against a row's tokens, a line for each model and kind of row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11.0, 4.0))
    for model in dict.fromkeys(one.point.model for one in found):
        for alone, style in ((True, "-o"), (False, "--s")):
            line = [one for one in found if one.point.model == model and (one.point.documents == 1) == alone]
            name = f"{model}, {'one document' if alone else f'documents of {DOCUMENT}'}"
            tokens = [one.point.tokens for one in line]
            speed.plot(tokens, [one.tokens_per_second for one in line], style, label=name, markersize=4)
            memory.plot(tokens, [one.peak_bytes / 1e9 for one in line], style, label=name, markersize=4)
    for axes, label in ((speed, "tokens a second"), (memory, "peak above the loaded model, GB")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of a row")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def table(found: Sequence[Found]) -> str:
    parts = [*PARTS, "the rest"]
    lines = [
        "| model | row | tokens/s | peak, GB | MB a token | " + " | ".join(parts) + " |",
        "|---|---|---:|---:|---:|" + "---:|" * len(parts),
    ]
    for one in found:
        row = (
            f"1 x {one.point.length:,}" if one.point.documents == 1 else f"{one.point.documents:,} x {one.point.length}"
        )
        each = one.peak_bytes / 1e6 / one.point.tokens
        shares = " | ".join(f"{one.shares[part]:.0%}" for part in parts)
        lines.append(
            f"| {one.point.model} | {row} | {one.tokens_per_second:,.0f} | {one.peak_bytes / 1e9:.2f} | {each:.2f} | {shares} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--models", default=",".join(models.SHAPES))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--point", help="one point, as JSON, in this process")
    options = parser.parse_args(arguments)
    if options.point:
        print(json.dumps(asdict(measure(Point(**json.loads(options.point)), options.seconds))))
        return 0
    lengths = [int(length) for length in options.lengths.split(",")]
    found: list[Found] = []
    for model in options.models.split(","):
        models.ensure(model)
        for point in points(model, lengths):
            try:
                found.append(_in_a_process(point, options.seconds))
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                print(f"{point}: {type(error).__name__}", file=sys.stderr, flush=True)
                continue
            print(f"{point}: {found[-1].tokens_per_second:,.0f} tokens/s", file=sys.stderr, flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"{this_machine().slug}-scaling"
    (RESULTS / f"{name}.json").write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(table(found), encoding="utf-8")
    plot(found, RESULTS / f"{name}.png")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
