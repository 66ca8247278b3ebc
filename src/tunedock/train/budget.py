"""How many tokens a row may have: planned from the memory that is there, corrected by what the first steps take, recorded.

A budget decides how a step is split into rows, which changes memory and speed but, to rounding, no loss. To the last bit it does
change them, so budgets come from a fixed ladder, each change is recorded with its step, and a resumed run replays the record.

When a row does not fit, the step is done again: at the next smaller budget that makes its largest row smaller; where a row is one
path already, with activations computed again instead of kept (gradient checkpointing), in as few layers as the memory plan says,
then in more; else the run ends and names the sample.

Ranks decide together: every rank has the whole step's samples, and what was measured on one is reduced over all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.errors import OutOfMemoryError
from tunedock.events import Emitter
from tunedock.model.world import agree, least
from tunedock.plan.memory import TRUST, MemoryPlan, readable
from tunedock.plan.rungs import HEADROOM, LADDER, LEAST_PLANNED, at_least, at_most
from tunedock.train.memory import Memory, Peak

REVIEWED_STEPS = 3
"""The first steps of a run, whose peaks correct the plan. Optimizer states appear with the second."""


class Layout(Protocol):
    """Samples of a step -> rows of at most `budget_tokens` slots (`Policy.rows`); a single path may be longer."""

    def __call__(self, samples: Sequence[Sample], *, budget_tokens: int) -> list[Row]: ...


@dataclass(frozen=True, slots=True)
class Change:
    """From optimizer step `step` (from 0) on, rows have at most `tokens`."""

    step: int
    tokens: int
    why: str
    checkpointing: int = 0
    """Layers whose activations are computed again because memory ran out."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """A row that does not fit."""

    slots: int
    needed_bytes: int | None = None
    """On top of what is held; None where the device only said that it failed."""
    free_bytes: int | None = None
    elsewhere: bool = False
    """Told by another rank: what it needs there is not known here."""


class Need:
    """Bytes held at the peak of a step, by the slots of its largest row: as planned, and once measured, from there on."""

    def __init__(self, plan: MemoryPlan | None, base_bytes: int) -> None:
        """`base_bytes`: what is held with the model loaded, before the first step."""
        self._plan = plan
        self._base = base_bytes
        self._measured: tuple[int, int] | None = None

    @property
    def measured_slots(self) -> int:
        """Slots of the largest row whose peak is known; 0 when none is."""
        return self._measured[0] if self._measured else 0

    def peak(self, slots: int) -> int | None:
        """Bytes; None while there is neither plan nor measurement."""
        if self._measured is not None:
            largest, peak = self._measured
            return peak + round(self._per_token * (slots - largest))
        if self._plan is None:
            return None
        return self._base + self._plan.to_come_bytes + self._plan.bytes_per_token * slots

    def observe(self, slots: int, peak_bytes: int) -> None:
        """A step whose largest row had `slots` held `peak_bytes` at most."""
        if self._measured is None or slots > self._measured[0]:
            self._measured = (slots, peak_bytes)
        elif slots == self._measured[0]:
            self._measured = (slots, max(peak_bytes, self._measured[1]))

    @property
    def _per_token(self) -> float:
        """The measured slope, never below a tenth of the planned one: a small row's peak says little."""
        if self._measured is None:
            return 0.0
        fixed = self._base + (self._plan.to_come_bytes if self._plan else 0)
        slope = (self._measured[1] - fixed) / max(self._measured[0], 1)
        return max(slope, self._plan.bytes_per_token / 10 if self._plan else 0.0)

    def largest(self, room_bytes: int) -> int | None:
        """The highest rung whose peak stays within `room_bytes`, all in all; the lowest when none does."""
        if self.peak(0) is None:
            return None
        fitting = [rung for rung in LADDER if (self.peak(rung) or 0) <= room_bytes]
        return fitting[-1] if fitting else LADDER[0]


class Budget:
    """The token budget of a run, step by step."""

    def __init__(
        self,
        *,
        memory: Memory,
        plan: MemoryPlan | None,
        plan_again: Callable[[int], MemoryPlan | None] = lambda layers: None,
        most: int,
        longest_path: int = 1,
        pinned: int | None = None,
        layers: int = 0,
        checkpointing: int = 0,
        checkpoint: Callable[[int], None] = lambda layers: None,
        emit: Emitter | None = None,
        keep: Callable[[list[dict[str, Any]]], None] = lambda record: None,
    ) -> None:
        """`pinned`: the recipe's own budget, neither planned nor corrected. Of `layers` layers that can compute their activations
        again, `checkpointing` do so anyway; `checkpoint` makes it more, `plan_again` tells what then holds. `keep` is given the
        record at each change."""
        self.memory = memory
        self._base = memory.used_bytes()
        self._plan_again = plan_again
        self.need = Need(plan, self._base)
        self._room = memory.used_bytes() + int(memory.free_bytes() * HEADROOM)
        self._pinned = pinned is not None
        self._most = pinned or most
        self._emit = emit or Emitter(None)
        self._keep = keep
        self._checkpoint = checkpoint
        self._layers = layers
        self._again = checkpointing
        self._failed: set[int] = set()
        self._redone = 0
        self._forced = 0
        tokens, why = (pinned, "train.token_budget") if pinned else self._first(longest_path)
        self._record = [Change(0, tokens, why)]
        self._now = self._record[0]

    def _first(self, longest_path: int) -> tuple[int, str]:
        fitting = self.need.largest(self._room)
        planned = None if fitting is None else least(fitting)
        tokens = max(LEAST_PLANNED, min(at_most(self._most), planned or self._most))
        longest = at_least(longest_path)
        if tokens >= longest:
            return tokens, "planned from the memory that is free" if planned else "no plan for this model"
        if planned is not None and planned < longest:
            self._emit.warning(
                f"the longest sample has {longest_path} tokens, and by the memory plan rows of {planned} fit",
                where="data.max_length",
                hint="training goes on and computes activations again where it must; a lower data.max_length needs less",
            )
        return longest, "one row takes the longest sample"

    @property
    def tokens(self) -> int:
        return self._now.tokens

    @property
    def record(self) -> list[Change]:
        return list(self._record)

    # -- step by step --------------------------------------------------------------------------------------------------

    def begin(self, step: int) -> int:
        """The budget of a step, as recorded for it."""
        now = [change for change in self._record if change.step <= step][-1]
        if now.checkpointing > self._again:
            self._compute_again(now.checkpointing)
        self._now = now
        return now.tokens

    def shortage(self, row: Row) -> Shortage | None:
        """Whether a row would not fit, where the device cannot be asked by trying."""
        peak = self.need.peak(row.slots) if self.memory.looks_ahead else None
        if peak is None or (row.slots <= self._forced and not self.need.measured_slots):
            return None
        needed, free = peak - self.memory.used_bytes(), self.memory.free_bytes()
        return Shortage(row.slots, needed, free) if needed > free else None

    def smaller(
        self, step: int, samples: Sequence[Sample], rows: Sequence[Row], layout: Layout, shortage: Shortage | None
    ) -> list[Row]:
        """Rows for a step that did not fit, here or on another rank (`elsewhere`, or None).

        Raises OutOfMemoryError naming the sample when a single path is too much.
        """
        self._failed.add(self.tokens)
        self._redone += 1
        largest = max(row.slots for row in rows)
        for rung in reversed([rung for rung in LADDER if rung < min(self.tokens, largest)]):
            smaller = layout(samples, budget_tokens=rung)
            if max(row.slots for row in smaller) < largest:
                self._change(step, rung, f"rows of {largest} tokens do not fit{_figures(shortage)}")
                return smaller
        if self._again < self._layers:
            layers = self._layers_for(largest)
            self._compute_again(layers)
            why = (
                f"one sample of {largest} tokens does not fit{_figures(shortage)}: "
                f"activations of {layers} of {self._layers} layers are computed again from here on"
            )
            self._change(step, self.tokens, why, checkpointing=layers)
            return list(rows)
        if agree(self._certain(shortage)):
            raise _too_long(samples, shortage)
        self._forced = largest
        self._emit.warning(
            f"by the memory plan one sample of {largest} tokens does not fit{_figures(shortage)}; it is tried all the same",
            where=_longest(samples).row_id,
        )
        return list(rows)

    def _layers_for(self, slots: int) -> int:
        """How many layers must compute their activations again for a row: more than now, twice as many where the plan was wrong."""
        for layers in range(min(max(self._again + 1, 2 * self._again), self._layers), self._layers):
            peak = Need(self._plan_again(layers), self._base).peak(slots)
            if peak is None:
                break
            if not agree(peak > self._room):
                return layers
        return self._layers

    def _compute_again(self, layers: int) -> None:
        """What was measured with fewer layers no longer holds."""
        self._checkpoint(layers)
        self._again = layers
        self.need, self._forced = Need(self._plan_again(layers), self._base), 0

    def _certain(self, shortage: Shortage | None) -> bool:
        """Whether the row is sure not to fit: it failed, or what it needs was measured, or is more than a plan can be wrong by."""
        if shortage is None or shortage.elsewhere:
            return False
        if shortage.needed_bytes is None or shortage.free_bytes is None or self.need.measured_slots:
            return True
        return shortage.needed_bytes > TRUST * shortage.free_bytes

    @contextmanager
    def watching(self, step: int, rows: Sequence[Row]) -> Iterator[None]:
        """Around a step: measures its peak while the plan is under review, or when its rows are larger than any before."""
        largest = max(row.slots for row in rows)
        if step >= REVIEWED_STEPS and largest <= self.need.measured_slots:
            yield
            return
        redone = self._redone
        peak: Peak
        with self.memory.watched() as peak:
            yield
        if self._redone == redone:  # else its rows were others than these
            self.need.observe(largest, peak.size)
            self._review(step, rows)

    def _review(self, step: int, rows: Sequence[Row]) -> None:
        """Corrects the budget for the next step, down at once, up when the rows were large enough to tell."""
        fitting = self.need.largest(self._room)
        if self._pinned or step >= REVIEWED_STEPS or fitting is None:
            return
        fitting = least(fitting)
        large = agree(2 * self.need.measured_slots > self.tokens)
        telling = large and len(rows) > 1
        if fitting < self.tokens and large:
            self._change(step + 1, max(fitting, LEAST_PLANNED), "the first steps took more than planned")
        elif telling and step == REVIEWED_STEPS - 1:
            wanted = min(fitting, at_most(self._most), 2 * self.tokens)
            if wanted > self.tokens and wanted not in self._failed:
                self._change(step + 1, wanted, "the first steps took less than planned")

    # -- the record ----------------------------------------------------------------------------------------------------

    def state(self) -> list[dict[str, Any]]:
        return [asdict(change) for change in self._record]

    def restore(self, record: Sequence[Mapping[str, Any]]) -> None:
        """Takes over a run's record, to be replayed. One that has gone on from there is kept: it was taken over before."""
        taken = [Change(**change) for change in record]
        if taken and self._record[: len(taken)] != taken:
            self._record = taken
        self._now = self._record[0]

    def lower_to(self, step: int, tokens: int, why: str) -> None:
        """From `step` on at most `tokens` (the next rung below), whatever the record says of later steps."""
        self._record = [change for change in self._record if change.step <= step] or self._record[:1]
        self._most = tokens
        before = self._record[-1]
        self._now = before
        self._change(step, min(at_most(tokens), before.tokens), why, checkpointing=before.checkpointing)

    def _change(self, step: int, tokens: int, why: str, *, checkpointing: int = 0) -> None:
        change = Change(step, tokens, why, max(checkpointing, self._now.checkpointing))
        if (change.tokens, change.checkpointing) == (self._now.tokens, self._now.checkpointing):
            return
        self._record = [*(earlier for earlier in self._record if earlier.step < step), change]
        self._now = change
        self._keep(self.state())
        self._emit.note(
            f"token budget {tokens} from step {step + 1}: {why}", step=step + 1, token_budget=tokens, why=why
        )


def _figures(shortage: Shortage | None) -> str:
    if shortage is None or shortage.needed_bytes is None or shortage.free_bytes is None:
        return ""
    return f" ({readable(shortage.needed_bytes)} more are needed, {readable(shortage.free_bytes)} are free)"


def _longest(samples: Sequence[Sample]) -> Sample:
    return max(samples, key=lambda sample: sample.longest_path)


def _too_long(samples: Sequence[Sample], shortage: Shortage | None) -> OutOfMemoryError:
    sample = _longest(samples)
    return OutOfMemoryError(
        f"a sample of {sample.longest_path} tokens alone in its row does not fit into memory{_figures(shortage)}",
        where=sample.row_id,
        hint="lower data.max_length, use `adapter: lora`, a smaller model, or more memory",
    )
