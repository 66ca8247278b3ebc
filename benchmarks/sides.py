"""Who is measured, and with which settings: each peer as its defaults have it, and at the best that could be found.

A variant holds only what differs from what every side is given (rows, batch of 4, LoRA r=16 on the seven linear maps, AdamW at a
constant 1e-4, an epoch, seed). `candidate` variants were slower where they were tried; `--search` runs them again.

| variant | what it is |
|---|---|
| trl default | float32 weights under bf16 autocast, checkpointing |
| trl best | sft: rows packed by best fit, one packed row at a time, bf16 weights, no checkpointing; dpo: the last two |
| llamafactory default | float32, checkpointing |
| llamafactory best | sft: `neat_packing`, one packed row at a time, bf16, no checkpointing; dpo: the last two |
| trainer default | weights as saved (bf16), no autocast, no checkpointing |
| trainer best | bf16 autocast, rows of like length together |

Packed rows: a step holds four rows of 1024 tokens, so an epoch over the same rows takes fewer steps. That costs a peer nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.protocol import Job, ObjectiveName

OURS = "tunedock"


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    same_order: bool = True
    """Whether step n trains on the same rows as everybody's step n; packing and sorting by length do not."""
    candidate: bool = False


@dataclass(frozen=True, slots=True)
class Side:
    name: str
    module: str
    environment: str | None
    """A peer of `benchmarks.peers`; None for this repository's own environment."""
    variants: Mapping[ObjectiveName, tuple[Variant, ...]]


_TRL = {"model_init_kwargs": {"dtype": "bfloat16"}, "gradient_checkpointing": False}
_LLAMA_FACTORY = {"bf16": True, "disable_gradient_checkpointing": True}
_ONE_ROW = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}

SIDES = {
    side.name: side
    for side in (
        Side(OURS, "benchmarks.run_tunedock", None, {"sft": (Variant("default"),), "dpo": (Variant("default"),)}),
        Side(
            "llamafactory",
            "benchmarks.run_llamafactory",
            "llamafactory",
            {
                "sft": (
                    Variant("default"),
                    Variant("best", {**_LLAMA_FACTORY, **_ONE_ROW, "neat_packing": True}, same_order=False),
                    Variant("padded", _LLAMA_FACTORY, candidate=True),
                ),
                "dpo": (Variant("default"), Variant("best", _LLAMA_FACTORY)),
            },
        ),
        Side(
            "trl",
            "benchmarks.run_trl",
            "trl",
            {
                "sft": (
                    Variant("default"),
                    Variant("best", {**_TRL, **_ONE_ROW, "packing": True}, same_order=False),
                    Variant("unpadded", {**_TRL, "padding_free": True, "max_length": None}, candidate=True),
                ),
                "dpo": (
                    Variant("default"),
                    Variant("best", _TRL),
                    Variant("precomputed", {**_TRL, "precompute_ref_log_probs": True}, candidate=True),
                ),
            },
        ),
        Side(
            "trainer",
            "benchmarks.run_trainer",
            "trl",
            {
                "sft": (
                    Variant("default"),
                    Variant("best", {"bf16": True, "train_sampling_strategy": "group_by_length"}, same_order=False),
                    Variant("ordered", {"bf16": True}, candidate=True),
                ),
                "dpo": (),
            },
        ),
    )
}


def variant_of(job: Job) -> Variant:
    """Raises ValueError when the job's side has no such variant."""
    for variant in SIDES[job.side].variants[job.objective]:
        if variant.name == job.variant:
            return variant
    raise ValueError(f"{job.side} has no variant {job.variant!r} for {job.objective}")
