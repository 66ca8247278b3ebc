"""One step of samples through a policy: rows of log-probabilities or scores, prepared constants, summed terms.

Training and evaluation share it. Where several processes train together (`model.world`), each is given the whole step and all its
rows, computes its share of them, and sums are added up over ranks; constants are those of the whole step on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from tunedock.data.batch import RowTensors
from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.model import world
from tunedock.model.out_of_memory import is_out_of_memory
from tunedock.model.reference import leaf_sums, sum_type
from tunedock.objective.base import Objective, ReadsOthers, RowLogprobs, RowScores, StepLogprobs, Terms


class GivesLogprobs(Protocol):
    """What an objective that reads log-probabilities needs of a model (`model.policy.Policy`)."""

    device: torch.device

    def logprobs(self, row: Row) -> tuple[Tensor, RowTensors]: ...

    @property
    def values_N(self) -> Tensor | None: ...


class GivesScores(Protocol):
    """What an objective that reads scores needs of a model."""

    device: torch.device

    def scores(self, row: Row) -> tuple[Tensor, RowTensors]: ...


Gives = GivesLogprobs | GivesScores


LayOut = Callable[[Sequence[Sample]], list[Row]]


class GivesLeaves(Protocol):
    """What an objective needs of the reference (`model.reference.Reference`)."""

    def leaf_logprobs(self, samples: Sequence[Sample], rows: Sequence[Row], *, remember: bool = True) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Measured:
    """An objective over many samples, without training on them."""

    loss: float
    count: float
    """What the loss is a mean over, in the objective's unit."""
    metrics: Mapping[str, float]


def row_logprobs(policy: GivesLogprobs, row: Row) -> RowLogprobs:
    logprob_N, tensors = policy.logprobs(row)
    return RowLogprobs(logprob_N, tensors.weight_N, tensors.sample_N, tensors.leaf_N, tensors.place_N, policy.values_N)


def row_scores(policy: GivesScores, row: Row) -> RowScores:
    score_N, tensors = policy.scores(row)
    return RowScores(score_N, tensors.sample_N, tensors.leaf_N)


def _ask(policy: Gives, objective: Objective, row: Row) -> RowLogprobs | RowScores:
    """What the objective reads of a row."""
    if objective.reads == "scores":
        return row_scores(cast(GivesScores, policy), row)
    return row_logprobs(cast(GivesLogprobs, policy), row)


def step_terms(
    policy: Gives,
    objective: Objective,
    samples: Sequence[Sample],
    rows: Sequence[Row],
    reference: GivesLeaves | None = None,
    lay_out: LayOut | None = None,
) -> Iterator[Terms]:
    """The terms of each of this rank's rows in turn; gradients are recorded when the caller's mode records them.

    `lay_out` makes rows of samples beside the step's own, for an objective that `ReadsOthers`. Raises ValueError when the objective
    needs one of the two and there is none.
    """
    if objective.needs_reference and reference is None:
        raise ValueError(f"{objective.name} needs a reference policy")
    with torch.no_grad():
        before = [rows[i] for i in _read_before(objective, rows)]
        read = {id(row): _ask(policy, objective, row) for row in world.share(before)}
        leaves = reference.leaf_logprobs(samples, rows) if reference is not None and objective.needs_reference else None
        logprobs = _logprobs_of_all([found for found in read.values() if isinstance(found, RowLogprobs)])
        scores = _scores_of_all([found for found in read.values() if isinstance(found, RowScores)])
        others = _others(policy, objective, samples, reference, lay_out)
        constants = objective.prepare(StepLogprobs(samples, logprobs, leaves, policy.device, scores, *others))
    if torch.is_grad_enabled() or world.together():
        read.clear()  # they have no gradient, or other ranks do not have them; else they are as good as new
    for row in world.share(rows):
        yield objective.terms(read[id(row)] if id(row) in read else _ask(policy, objective, row), constants)


def _others(
    policy: Gives,
    objective: Objective,
    samples: Sequence[Sample],
    reference: GivesLeaves | None,
    lay_out: LayOut | None,
) -> tuple[Tensor | None, Tensor | None]:
    """What policy and reference say of the leaves of the objective's other samples; None where it has none."""
    others = objective.others(samples) if isinstance(objective, ReadsOthers) else ()
    if not others:
        return None, None
    if lay_out is None:
        raise ValueError(f"{objective.name} reads other samples than the step's, and nobody lays them out")
    rows = lay_out(others)
    shape = (len(others), max(len(sample.leaves()) for sample in others))
    said_SL = torch.zeros(shape, dtype=sum_type(policy.device), device=policy.device)
    for row in world.share(rows):
        said = row_logprobs(cast(GivesLogprobs, policy), row)
        said_SL += leaf_sums(said.logprob_N, said.weight_N, said.sample_N, said.leaf_N, shape)
    world.add_up(said_SL)
    # They do not come again, or hardly: other samples meet in the next epoch.
    before_SL = reference.leaf_logprobs(others, rows, remember=False) if reference is not None else None
    return said_SL, before_SL


def _logprobs_of_all(found: Sequence[RowLogprobs]) -> list[RowLogprobs]:
    """What the ranks have read, each told all of it: constants are made of the whole step."""
    if not found or not world.together():
        return list(found)
    values_NC = torch.cat([torch.stack([one.logprob_N, one.weight_N], 1) for one in found])
    places_NC = torch.cat([torch.stack([one.sample_N, one.leaf_N, one.place_N], 1) for one in found])
    logprob_N, weight_N = world.joined_up(values_NC).unbind(1)
    return [RowLogprobs(logprob_N, weight_N, *world.joined_up(places_NC).unbind(1))]


def _scores_of_all(found: Sequence[RowScores]) -> list[RowScores]:
    """As `_logprobs_of_all`."""
    if not found or not world.together():
        return list(found)
    places_NC = torch.cat([torch.stack([one.sample_N, one.leaf_N], 1) for one in found])
    score_N = world.joined_up(torch.cat([one.score_N for one in found])[:, None])[:, 0]
    return [RowScores(score_N, *world.joined_up(places_NC).unbind(1))]


def _read_before(objective: Objective, rows: Sequence[Row]) -> Sequence[int]:
    """The rows that go through the policy before the step's terms are taken."""
    if objective.needs_logprobs:
        return range(len(rows))
    return rows_of_split_samples(rows) if objective.whole_samples else ()


def rows_of_split_samples(rows: Sequence[Row]) -> list[int]:
    """Rows that hold a leaf of a sample whose other leaves stand elsewhere. Raises ValueError when one leaf is in two rows."""
    width = 1 + max((int(row.chosen.leaf_N.max()) for row in rows if len(row.chosen)), default=0)
    leaves = [np.unique(row.chosen.sample_N * width + row.chosen.leaf_N) for row in rows]
    if rows and len(np.unique(every := np.concatenate(leaves))) < len(every):
        raise ValueError("a leaf's trained tokens stand in two rows")
    held = [np.unique(codes // width) for codes in leaves]
    sample, times = np.unique(np.concatenate(held) if held else np.zeros(0, np.int64), return_counts=True)
    split = sample[times > 1]
    return [i for i, samples in enumerate(held) if np.isin(samples, split).any()]


MEASURED_TOGETHER = 128
"""Samples of a step without training."""


def batches(samples: Sequence[Sample], size: int = MEASURED_TOGETHER) -> Iterator[list[Sample]]:
    """The samples as `measure` takes them, in order."""
    for start in range(0, len(samples), size):
        yield [samples[i] for i in range(start, min(start + size, len(samples)))]


T = TypeVar("T")


@dataclass(slots=True)
class StepSums:
    """Terms of rows as numbers, added up."""

    loss: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> (sum, what it is divided by)."""
    least: dict[str, float] = field(default_factory=dict)
    most: dict[str, float] = field(default_factory=dict)

    def add(self, other: StepSums) -> None:
        self.loss += other.loss
        for name, (value, of) in other.metrics.items():
            before = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (before[0] + value, before[1] + of)
        self.least |= {name: min(value, self.least.get(name, value)) for name, value in other.least.items()}
        self.most |= {name: max(value, self.most.get(name, value)) for name, value in other.most.items()}

    def over_ranks(self) -> StepSums:
        """Those of all ranks together, on each. A collective call."""
        if not world.together():
            return self
        whole = StepSums()
        for told in world.told_by_all(asdict(self)):
            pairs = {name: (float(value), float(of)) for name, (value, of) in told["metrics"].items()}
            whole.add(StepSums(told["loss"], pairs, told["least"], told["most"]))
        return whole


class Smaller(Protocol):
    """Smaller rows for samples whose `rows` took more memory than there is. Raises OutOfMemoryError where there are none."""

    def __call__(self, samples: Sequence[Sample], rows: Sequence[Row]) -> list[Row]: ...


def once_it_fits(
    samples: Sequence[Sample],
    rows: Sequence[Row],
    compute: Callable[[Sequence[Row]], T],
    smaller: Smaller | None,
) -> T:
    """What `compute` makes of the samples' rows: of the first that it can be done with."""
    while True:
        try:
            return compute(rows)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if smaller is None or world.together() or not is_out_of_memory(error):
                raise  # of several ranks one cannot go back alone: the others wait for it
        rows = smaller(samples, rows)  # here, for an exception under way holds the tensors there is no room for


def _read(terms: Terms) -> StepSums:
    return StepSums(
        float(terms.loss),
        {name: (float(value), float(of)) for name, (value, of) in terms.metrics.items()},
        {name: float(value) for name, value in terms.least.items()},
        {name: float(value) for name, value in terms.most.items()},
    )


@torch.no_grad()
def measure(
    policy: Gives,
    objective: Objective,
    samples: Sequence[Sample],
    layout: LayOut,
    *,
    reference: GivesLeaves | None = None,
    batch: int = MEASURED_TOGETHER,
    on_progress: Callable[[int], None] | None = None,
    smaller: Smaller | None = None,
    check: Callable[[], None] = lambda: None,
) -> Measured:
    """The objective over all samples, `batch` of them at a time. `smaller` lays out anew what did not fit into memory. `check` is
    called after each row, and may raise to stop."""
    count = 0.0
    sums = StepSums()
    if on_progress is not None:
        on_progress(0)
    done = 0
    for part in batches(samples, batch):
        count += objective.count(part)

        def read(rows: Sequence[Row], part: Sequence[Sample] = part) -> list[StepSums]:
            told = []
            for terms in step_terms(policy, objective, part, rows, reference, layout):
                check()
                told.append(_read(terms))
            return told

        for told in once_it_fits(part, layout(part), read, smaller):
            sums.add(told)
        done += len(part)
        if on_progress is not None:
            on_progress(done)
    whole = sums.over_ranks()
    metrics = {name: value / of for name, (value, of) in whole.metrics.items() if of}
    return Measured(whole.loss / max(count, 1e-12), count, metrics | whole.least | whole.most)
