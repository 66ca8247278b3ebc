"""How a side is asked to train and how it answers: one `Job` as JSON on standard input, one `Measured` as a line of JSON.

Every side runs as a process of its own, in its own environment, and speaks this protocol and nothing else. The module is read in
each of those environments, so it needs the standard library alone. What libraries print to standard output goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Literal

ObjectiveName = Literal["sft", "dpo"]


@dataclass(frozen=True, slots=True)
class Job:
    """One training run: an epoch over the rows of `data`, with the same adapter, batch and optimizer for every side."""

    side: str
    variant: str
    objective: ObjectiveName
    model_name: str
    model: str
    """Folder of the model and its tokenizer."""
    data: str
    """Folder made by `benchmarks.data`."""
    work: str
    """An empty folder for whatever the side writes."""
    steps: int
    """Optimizer steps at `batch_size` rows each, which is the epoch. A side that packs rows takes fewer."""
    batch_size: int = 4
    max_length: int = 1024
    learning_rate: float = 1e-4
    lora_r: int = 16
    lora_alpha: int = 32
    beta: float = 0.1
    seed: int = 42
    limit_steps: int | None = None
    """End after so many steps, not at the end of the epoch."""
    workers: int | None = None
    """Processes for preparing data; None leaves the side's default."""
    spawned_at: float = 0.0
    """Seconds since the epoch at which the side's process was started."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. `seconds` is from the end of the step before (the first: from the start of training)."""

    seconds: float
    tokens: int
    """Without padding. A pair's prompt counts twice, as it is read by a model that does not share it."""
    trained: int
    """Tokens that carry loss; in DPO, tokens of answers."""
    loss: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run showed."""

    side: str
    variant: str
    objective: ObjectiveName
    model_name: str
    steps: tuple[Step, ...]
    first_step_s: float
    """From the start of the process to the end of its first optimizer step."""
    preprocessing_s: float
    """From rows in a file to tokens in memory or on disk."""
    rows: int
    reference_s: float
    """A pass of the reference policy over all rows before training; 0 where each step has its own."""
    peak_bytes: int
    """Largest resident memory of the process and its children."""
    imports_bytes: int
    """Resident memory after the imports, before anything is loaded."""
    same_order: bool
    """Whether step n trained on the same rows as everybody's step n."""
    first_figures: dict[str, float] = field(default_factory=dict)
    """What the side logged with its first step."""
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """What was set for this run and is not the same for every side."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Measured:
        """Raises KeyError or TypeError on what `to_json` did not write."""
        return cls(**{**value, "steps": tuple(Step(**step) for step in value["steps"])})


def receive() -> Job:
    return Job(**json.loads(sys.stdin.readline()))


def answer_channel() -> IO[str]:
    """Standard output for the answer alone: from here on, what anything prints goes to standard error."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return channel


def answer(channel: IO[str], measured: Measured) -> None:
    channel.write(json.dumps(measured.to_json()) + "\n")
    channel.flush()
