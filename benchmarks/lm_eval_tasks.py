"""lm-evaluation-harness's requests: tunedock's engine beside lm-eval's own HFLM, the same model in float32 on this machine.

    python -m benchmarks.lm_eval_tasks [--model small] [--questions 24] [--repeats 3] [--batch 16]

Two shapes of request, over made-up words: `endings`, a text with four continuations of about 20 tokens (as HellaSwag has), and
`letters`, five examples before each question and four answers of one token (as MMLU has; HFLM computes such answers in one call).
Both sides run in this process, interleaved, after a round that is not counted; the time is that of `loglikelihood`, tokenising
included. The log-likelihoods of both must agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.words import Words

SEED = 11
AGREE = 1e-2
"""Absolute, of a continuation's log-likelihood: a sum over some 20 tokens."""

Pairs = list[tuple[str, str]]


def endings(questions: int) -> Pairs:
    words = Words(SEED)
    return [(context, f" {words.text(18)}") for context in [words.text(75) for _ in range(questions)] for _ in range(4)]


def letters(questions: int) -> Pairs:
    words = Words(SEED + 1)
    asked = [f"{words.text(40)}\nA. {words.text(6)}\nB. {words.text(6)}\nAnswer:" for _ in range(questions + 5)]
    shown = "".join(f"{question} B\n\n" for question in asked[:5])
    return [(shown + question, f" {letter}") for question in asked[5:] for letter in "ABCD"]


WORKLOADS: dict[str, Callable[[int], Pairs]] = {"endings": endings, "letters": letters}


def ours(folder: Path) -> Any:
    from tunedock.eval.task_model import PolicyLM
    from tunedock.events import Emitter
    from tunedock.model.chat_facts import ChatFacts
    from tunedock.model.session import base_policy, find_base
    from tunedock.recipe.schema import Recipe

    recipe = Recipe.model_validate(
        {"model": str(folder), "data": {"train": ["rows.jsonl"]}, "offline": True, "train": {"bf16": False}}
    )
    base = find_base(recipe)
    policy = base_policy(base)
    policy.probe()
    facts = ChatFacts(sorted(base.chat.stop_ids), thinking=False)
    return PolicyLM(base, policy, facts, Emitter(None), name="bench", batch_size=16, seed=SEED)


def theirs(folder: Path, batch: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch)


def timed(model: Any, pairs: Pairs) -> tuple[float, list[float]]:
    """Seconds, and the log-likelihoods."""
    from lm_eval.api.instance import Instance

    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    started = time.perf_counter()
    answers = model.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - started, [total for total, _ in answers]


def compare(sides: Sequence[Any], pairs: Pairs, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both sides, round by round. Raises AssertionError where the sides disagree."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 1):
        found = [timed(side, pairs) for side in sides]
        apart = max(abs(a - b) for a, b in zip(found[0][1], found[1][1], strict=True))
        if apart > AGREE:
            raise AssertionError(f"the sides differ by {apart:.3g}")
        if number:
            for kept, (took, _) in zip(seconds, found, strict=True):
                kept.append(took)
    return seconds


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=models.SHAPES)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="HFLM's batch size")
    given = parser.parse_args(arguments)
    folder = models.ensure(given.model)
    sides = ours(folder), theirs(folder, given.batch)
    for name, make in WORKLOADS.items():
        mine, hflm = compare(sides, make(given.questions), given.repeats)
        ratio = statistics.median(hflm) / statistics.median(mine)
        shown = "  ".join(f"{a:.2f}/{b:.2f}" for a, b in zip(mine, hflm, strict=True))
        print(f"{name:8} {ratio:5.2f} times as fast as HFLM (seconds, round by round: {shown})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
