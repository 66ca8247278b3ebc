"""A loop over a tiny real model and samples it can learn: what the tests of training share.

build               a loop, its policy, and the stream its events go to
data                the samples
weights, losses     what came of a run
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from families import tiny_model
from tunedock.data.layout import padded, step_indices
from tunedock.data.sample import Sample, single
from tunedock.events import Emitter
from tunedock.model.adapter import attach, checkpoint_activations
from tunedock.model.noise import EmbeddingNoise
from tunedock.model.policy import Policy, Precision
from tunedock.model.reference import Reference
from tunedock.objective.base import Objective
from tunedock.objective.likelihood import Sft
from tunedock.recipe.adapters import Adapter, Lora
from tunedock.recipe.schema import Train
from tunedock.train.budget import Budget
from tunedock.train.checkpoint import Checkpoints
from tunedock.train.evaluation import Evaluation
from tunedock.train.feed import FixedFeed
from tunedock.train.grace import Grace
from tunedock.train.loop import Loop
from tunedock.train.memory import HostMemory
from tunedock.train.optimizer import make_updater
from tunedock.train.progress import Course

CPU = torch.device("cpu")
EXAMPLES = 22
BATCH = 4
PER_EPOCH = 6


class MemoryFeed(FixedFeed):
    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def step(self, number: int) -> list[Sample]:
        return [self._samples[i] for i in step_indices(len(self._samples), BATCH, number, seed=5)]

    def state(self, number: int) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        pass


def data(seed: int = 0) -> list[Sample]:
    draw = np.random.default_rng(seed)
    made = []
    for n in range(EXAMPLES):
        start, length = int(draw.integers(1, 40)), int(draw.integers(4, 24))
        tokens = (start + 3 * np.arange(length)) % 90 + 1  # an arithmetic run: there is something to learn
        weights = np.ones(length, np.float32)
        weights[:2] = 0.0
        made.append(single(f"d:{n}", tokens, weights))
    return made


def build(
    folder: Path,
    *,
    steps: int = 9,
    adapter: Adapter | None = None,
    budget: int = 4096,
    stop: Callable[[], bool] = lambda: False,
    samples: Sequence[Sample] | None = None,
    validation: Sequence[Sample] = (),
    probed: bool = False,
    to_compile: bool = False,
    objective: Objective | None = None,
    grace: Grace | None = None,
    evaluation: Evaluation | None = None,
    **train: Any,
) -> tuple[Loop, Policy, io.StringIO]:
    folder.mkdir(exist_ok=True, parents=True)
    settings = Train(
        **{"learning_rate": 5e-3, "save_steps": 4, "eval_strategy": "no", "save_total_limit": None, **train}
    )
    compute = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else torch.float32
    model = attach(tiny_model("qwen3"), adapter or Lora(r=4, alpha=8, dropout=0.1), seed=3)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    policy = Policy(model, CPU, Precision(torch.float32, compute), to_compile=to_compile)
    if settings.neftune_noise_alpha is not None:
        policy.noise = EmbeddingNoise(model, settings.neftune_noise_alpha)
    if probed:
        policy.probe()
    torch.manual_seed(settings.seed)
    stream = io.StringIO()
    loop = Loop(
        policy=policy,
        objective=objective or Sft(),
        reference=Reference.of(policy) if objective is not None and objective.needs_reference else None,
        feed=MemoryFeed(samples or data()),
        validation=validation,
        layout=policy.rows if probed else padded,
        budget=Budget(memory=HostMemory(), plan=None, most=4096, pinned=budget, emit=Emitter(stream)),
        updater=make_updater(policy.trainable, settings, total_steps=steps, device=CPU, model=model),
        checkpoints=Checkpoints(folder, keep=settings.save_total_limit),
        course=Course(steps, PER_EPOCH, steps * BATCH),
        train=settings,
        emit=Emitter(stream),
        stop_requested=stop,
        grace=grace,
        evaluation=evaluation,
    )
    return loop, policy, stream


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable}


def losses(stream: io.StringIO, key: str = "loss") -> list[float]:
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    return [e["values"][key] for e in events if e["kind"] == "metrics" and key in e["values"]]
