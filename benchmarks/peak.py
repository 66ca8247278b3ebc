"""The machine's best bfloat16 matrix product, and the share of it that SFT of the small model reaches.

    python -m benchmarks.peak [--steps 12] [--repeats 3]

The product is measured before and after every training run and the best counts: the strictest peak the machine has shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks import data, models
from benchmarks.drive import RunFailed, run
from benchmarks.operations import training_operations
from benchmarks.peers import ROOT
from benchmarks.protocol import Job, Measured
from benchmarks.results import Failure, Peak
from benchmarks.sides import OURS
from benchmarks.stats import steady

PRODUCTS = ((2048, 512, 1536), (4096, 512, 1536), (1024, 2048, 2048), (4096, 4096, 4096), (2048, 512, 32768))
"""(m, k, n): those of the small model's layers, and larger ones for the processor's best."""
SECONDS_A_PRODUCT = 1.5
SEED = 42


def measure(steps: int, repeats: int, failures: list[Failure], tell: Callable[[str], None]) -> Peak:
    model = models.ensure("small")
    folder = data.ensure("sft", 4 * steps, data.tokenizer_of(model), seed=SEED)
    job = Job(OURS, "default", "sft", "small", str(model), str(folder), "", steps=steps, seed=SEED)
    best, shape = _best_product()
    training: list[float] = []
    for _ in range(repeats):
        try:
            training.append(operations_per_second(run(job), data.read_facts(folder), job))
        except RunFailed as failure:
            failures.append(Failure("share of the matmul peak", str(failure)))
            continue
        best, shape = max((best, shape), _best_product())
        tell(f"peak: {training[-1] / 1e9:,.0f} of {best / 1e9:,.0f} GFLOP/s")
    return Peak(best, shape, training)


def operations_per_second(measured: Measured, facts: data.Facts, job: Job) -> float:
    """Needed operations of the steady steps over their time, of a run that keeps the rows' order."""
    kept = steady(measured.steps)
    first = (len(measured.steps) - len(kept)) * job.batch_size
    lengths = [length for row in facts.lengths[first:] for length in row]
    trained = sum(step.trained for step in kept)
    needed = training_operations(models.SHAPES[job.model_name], lengths, trained, lora_r=job.lora_r)
    return needed / sum(step.seconds for step in kept)


def _best_product() -> tuple[float, tuple[int, int, int]]:
    """In a process of its own, so that its threads and memory are gone when a side is measured."""
    command = [sys.executable, "-m", "benchmarks.peak", "--product"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rate, shape = json.loads(said)
    return float(rate), (int(shape[0]), int(shape[1]), int(shape[2]))


def best_product(products: Sequence[tuple[int, int, int]] = PRODUCTS) -> tuple[float, tuple[int, int, int]]:
    """Operations a second of the fastest single product, and its shape."""
    return max((_rate(shape), shape) for shape in products)


def _rate(shape: tuple[int, int, int]) -> float:
    import torch

    m, k, n = shape
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16().t()  # as a linear map's weight lies in memory
    out = torch.empty(m, n, dtype=torch.bfloat16)
    quickest, until = float("inf"), time.perf_counter() + SECONDS_A_PRODUCT
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        quickest = min(quickest, time.perf_counter() - started)
    return 2.0 * m * k * n / quickest


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peak")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--product", action="store_true", help="only the product, as JSON")
    options = parser.parse_args(arguments)
    if options.product:
        print(json.dumps(best_product()))
        return 0
    failures: list[Failure] = []
    found = measure(options.steps, options.repeats, failures, lambda line: print(line, file=sys.stderr, flush=True))
    if found.training:
        rate = statistics.median(found.training)
        print(f"{rate / 1e9:,.0f} of {found.matmul / 1e9:,.0f} GFLOP/s: {rate / found.matmul:.0%}")
    for failure in failures:
        print(f"{failure.what} failed: {failure.why}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
