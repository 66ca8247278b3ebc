"""What it saves to compute a prompt once for all its answers: rollout and update of GRPO and PPO, shared against not.

    python -m benchmarks.rollouts [--model tiny] [--prompts 4] [--answers 8] [--prompt-tokens 256] [--answer-tokens 64] [--rounds 5]

Both ways run in this process, turn about, on the same prompts: answers are sampled (to the full length, so that both make as many
tokens), every token is read once by the policy and the reference, and one optimizer step is taken on all of them. Shared: a prompt
goes through the model once when its answers are made, and stands once in the rows that are read and trained on. Not shared: each
answer brings its own copy of the prompt, packed. Tokens a second are those of the answers, over the whole round; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Literal

from benchmarks import models
from benchmarks.results import RESULTS, this_machine

Way = Literal["shared", "not shared"]
WAYS: tuple[Way, ...] = ("shared", "not shared")


def rounds_of(objective: str, arguments: argparse.Namespace) -> dict[Way, list[dict[str, float]]]:
    """Seconds of each part of each round, by way."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from tunedock.data.sample import Sample
    from tunedock.model.adapter import attach
    from tunedock.model.answers import Sampler, Sampling
    from tunedock.model.load import find_device, has_bf16
    from tunedock.model.policy import Policy, Precision
    from tunedock.model.reference import Reference, evaluating
    from tunedock.objective.base import Objective
    from tunedock.objective.credit import Measured, credited
    from tunedock.objective.evaluate import step_terms
    from tunedock.objective.experience import Experience, asked_and_answered
    from tunedock.objective.registry import make
    from tunedock.recipe.adapters import Lora
    from tunedock.recipe.objectives.rewards import FunctionReward
    from tunedock.recipe.objectives.rollout import Grpo, Ppo, Rollout

    device = find_device()
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(models.ensure(arguments.model), dtype=dtype).to(device)
    policy = Policy(attach(model, Lora(r=16, alpha=32), seed=0), device, Precision(dtype, dtype))
    policy.probe()
    reference = Reference.of(policy)
    rewards: list[Any] = [FunctionReward(name="exact_match")]
    section: Rollout = Grpo(rewards=rewards, beta=0.04) if objective == "grpo" else Ppo(rewards=rewards)
    if objective == "ppo":
        policy.add_value_head()
    loss: Objective = make(section)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable], lr=1e-5)
    draw = np.random.default_rng(0)
    vocabulary = int(policy.config.get_text_config().vocab_size)
    prompts = [draw.integers(5, vocabulary, arguments.prompt_tokens).astype(np.int32) for _ in range(arguments.prompts)]
    samplers = {
        way: Sampler(policy, stop_ids=[vocabulary - 1], pad_id=0, batch_size=1024, share=way == "shared")
        for way in WAYS
    }
    layouts: dict[Way, Literal["tree", "packed"]] = {"shared": "tree", "not shared": "packed"}

    def read(reader: Policy, samples: Sequence[Sample]) -> tuple[list[Any], list[Any]]:
        logprobs, values = [], []
        for row in reader.rows(samples, arguments.budget):
            logprob_N, _ = reader.logprobs(row)
            logprobs.append(logprob_N)
            values.append(reader.values_N)
        return logprobs, values

    def one_round(way: Way, number: int) -> dict[str, float]:
        policy.layout = layouts[way]
        marks = [time.perf_counter()]

        def mark() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

        # The stop token is never drawn: a bias would change the model, so answers it ends are filled up.
        made = samplers[way](
            [p.tolist() for p in prompts], arguments.answers, Sampling(arguments.answer_tokens), seed=number
        )
        filled = [[(list(a.ids) * arguments.answer_tokens)[: arguments.answer_tokens] for a in group] for group in made]
        mark()
        samples = [
            asked_and_answered(str(p), prompt, [np.asarray(ids, np.int32) for ids in group], [True] * len(group))
            for p, (prompt, group) in enumerate(zip(prompts, filled, strict=True))
        ]
        with torch.no_grad(), evaluating(policy.model):
            read(policy, samples)
        with reference.entered() as began:
            read(began, samples)
        mark()
        numbers = [draw.normal(size=(arguments.answers, arguments.answer_tokens)).astype(np.float32) for _ in prompts]
        known = [
            [Measured(float(row.mean()), len(row), True, row - 7, row - 7, row) for row in group] for group in numbers
        ]
        experiences = [
            Experience(s.row_id, s.segments, answers=tuple(answers))
            for s, answers in zip(samples, credited(section, known, kl_coef=0.05), strict=True)
        ]
        policy.model.train()
        for terms in step_terms(policy, loss, experiences, policy.rows(experiences, arguments.budget)):
            (terms.loss / loss.count(experiences)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        mark()
        parts = dict(zip(("sampling", "reading", "update"), (b - a for a, b in pairwise(marks)), strict=True))
        return {**parts, "whole": marks[-1] - marks[0]}

    found: dict[Way, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds + 1):
        for way in WAYS if number % 2 else WAYS[::-1]:
            told = one_round(way, number)
            if number:  # the first warms up
                found[way].append(told)
    return found


def table(results: dict[str, dict[Way, list[dict[str, float]]]], answer_tokens: int) -> str:
    def median(rounds: Sequence[dict[str, float]], part: str) -> float:
        return statistics.median(told[part] for told in rounds)

    def rate(rounds: Sequence[dict[str, float]]) -> float:
        return answer_tokens / median(rounds, "whole")

    lines = [
        "| | way | sampling s | reading s | update s | answer tokens/s | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for objective, ways in results.items():
        for way in WAYS:
            parts = " | ".join(f"{median(ways[way], part):.2f}" for part in ("sampling", "reading", "update"))
            ratio = f"{rate(ways['shared']) / rate(ways['not shared']):.2f}" if way == "shared" else ""
            lines.append(f"| {objective} | {way} | {parts} | {rate(ways[way]):,.0f} | {ratio} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="tiny")
    for name, default in (("prompts", 4), ("answers", 8), ("prompt-tokens", 256), ("answer-tokens", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--budget", type=int, default=2048)
    arguments = parser.parse_args()
    results = {objective: rounds_of(objective, arguments) for objective in ("grpo", "ppo")}
    machine = this_machine()
    shown = table(results, arguments.prompts * arguments.answers * arguments.answer_tokens)
    print(shown)
    path = RESULTS / f"{machine.slug}-rollouts.json"
    path.write_text(
        json.dumps({"machine": asdict(machine), "settings": vars(arguments), "rounds": results}, indent=1) + "\n"
    )
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
