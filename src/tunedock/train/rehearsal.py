"""What is tried before the first step: whether compiled layers give the same and are worth it, and whether the largest row fits
into the memory of a sharded model.

A rehearsal computes gradients and throws them away (`Loop.rehearse`); the run is none the wiser.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, Protocol

import torch

from tunedock.data.layout import Row
from tunedock.data.sample import Sample
from tunedock.errors import OutOfMemoryError, RowTooLargeError, TunedockError
from tunedock.events import Emitter
from tunedock.model import world
from tunedock.model.compiling import compile_layers, run_uncompiled
from tunedock.model.policy import Policy
from tunedock.model.sharding import held
from tunedock.plan.optimizer_memory import optimizer_bytes
from tunedock.recipe.schema import Recipe
from tunedock.run.record import Run, read_json, write_json
from tunedock.train.loop import Rehearsed
from tunedock.train.step import SMALLER_ROWS, Stopped

NO_MEMORY = "there was no memory for a trial"

RECORD = "compile.json"
"""In the run directory: whether the layers are compiled, and why. A resumed run follows it: the two differ in the last bits."""

LEAST_STEPS = 100
"""Of a run that is worth a trial, which is two or three of its steps."""

WORTH_TRYING_S = 600.0
"""A run that has less to go by the uncompiled steps' pace is not worth a minute of compiling."""

GAIN = 1.03
"""How much faster compiled steps must be."""

SAME = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
"""By compute type, the largest relative difference of loss and of the gradients' norm between compiled layers and plain ones."""

Switch = Literal["auto"] | bool


class Rehearses(Protocol):
    """What is asked of the loop (`train.loop.Loop`)."""

    @property
    def steps_left(self) -> int: ...

    def rehearse(self, rows: tuple[Sequence[Sample], Sequence[Row]] | None = None) -> Rehearsed | None: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    compiled: bool
    why: str
    plain_s: float | None = None
    compiled_s: float | None = None
    """Seconds of a step."""
    compiling_s: float | None = None


def settle_compiling(asked: Switch, run: Run, policy: Policy, loop: Rehearses, *, resume: bool, emit: Emitter) -> None:
    """Compiles the layers where the recipe or a trial says so, and records it."""
    kept = read_json(run.path / RECORD) if resume and (run.path / RECORD).is_file() else None
    if (record := world.told_by_first(kept)) is not None:  # another machine may not see the file
        _follow(bool(record["compiled"]), policy, loop, emit)
        return
    if asked is False or (asked == "auto" and policy.device.type != "cuda"):
        return
    try:
        verdict = _tried(asked, policy, loop)
    except Stopped:
        return  # the loop stops at once, and a resumed run tries again
    if not verdict.compiled:
        _plain_again(policy)
    if asked is True and not verdict.compiled:
        emit.warning(f"the layers are not compiled: {verdict.why}", where="train.torch_compile")
    else:
        state = "compiled" if verdict.compiled else "not compiled"
        emit.note(f"layers {state}: {verdict.why}", **asdict(verdict))
    if world.rank() == 0:
        write_json(run.path / RECORD, asdict(verdict))


def _follow(compiled: bool, policy: Policy, loop: Rehearses, emit: Emitter) -> None:
    """What the run's beginning found holds; but another machine's compiler may fail where that one's did not."""
    if compiled and compile_layers(policy.model):
        made = _compiling(loop)
        if not isinstance(made, str):
            return
        emit.warning(
            f"the layers were compiled when this run began, and are not now: {made}",
            where=RECORD,
            hint="training goes on; its last digits are others",
        )
    _plain_again(policy)


def _plain_again(policy: Policy) -> None:
    run_uncompiled(policy.model)
    if not policy.fused:
        policy.fuse()


def _tried(asked: Switch, policy: Policy, loop: Rehearses) -> Verdict:
    """Leaves the layers compiled where the verdict says so."""
    if asked == "auto" and loop.steps_left < LEAST_STEPS:
        return Verdict(False, "the run is too short for a trial")
    loop.rehearse()  # the first call of anything is slow
    plain = loop.rehearse()
    if world.agree(plain is None) or plain is None:
        return Verdict(False, NO_MEMORY)
    if asked == "auto" and world.agree(plain.seconds * loop.steps_left < WORTH_TRYING_S):
        return Verdict(False, "the run is too short for it", plain_s=plain.seconds)
    if not compile_layers(policy.model):
        return Verdict(False, "the model has no layers that can be taken one by one", plain_s=plain.seconds)
    made = _compiling(loop)
    if isinstance(made, str):
        verdict = Verdict(False, made, plain_s=plain.seconds)
    else:
        compute = str(policy.precision.compute).removeprefix("torch.")
        verdict = judge(asked, plain, *made, same=SAME[compute])
    if world.agree(not verdict.compiled) and verdict.compiled:
        return Verdict(False, "another process found that it does not pay", plain_s=plain.seconds)
    return verdict


def _compiling(loop: Rehearses) -> tuple[Rehearsed, Rehearsed] | str:
    """The step in which the layers are compiled, and the next; or why there are none."""
    try:
        first, second = loop.rehearse(), loop.rehearse()
    except (Stopped, TunedockError):
        raise
    except Exception as error:  # noqa: BLE001 - policy: whatever a compiler raises only means: not compiled
        traceback.print_exception(error, file=sys.stderr)
        return f"the compiler fails ({type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}); more is in the log"
    return NO_MEMORY if first is None or second is None else (first, second)


def judge(asked: Switch, plain: Rehearsed, first: Rehearsed, compiled: Rehearsed, *, same: float) -> Verdict:
    """Whether compiled layers give the same, and for `auto`, whether they are faster.

    `first`: the step in which they were compiled, which is paid.
    """
    compiling = max(first.seconds - compiled.seconds, 0.0)
    figures = {"plain_s": plain.seconds, "compiled_s": compiled.seconds, "compiling_s": compiling}
    for name, before, after in (
        ("loss", plain.loss, compiled.loss),
        ("norm of the gradients", plain.grad_norm, compiled.grad_norm),
    ):
        if not math.isclose(before, after, rel_tol=same, abs_tol=1e-9):
            return Verdict(False, f"compiled layers give a {name} of {after:.6g} instead of {before:.6g}", **figures)
    told = (
        f"a step takes {compiled.seconds:.3g} s instead of {plain.seconds:.3g} s, after {compiling:.0f} s of compiling"
    )
    return Verdict(asked is True or plain.seconds >= GAIN * compiled.seconds, told, **figures)


def rehearse_largest_row(
    policy: Policy, loop: Rehearses, sample: Sample, slots: int, *, to_come_bytes: int = 0
) -> None:
    """For a sharded model, whose ranks wait for each other in the middle of a row: running out of memory there cannot be mended by
    doing the step again. So the largest row there can be is computed once; a rank on which it does not fit ends, and its launcher
    starts all of them anew.

    `sample`: the longest there is, of which the row is made; `to_come_bytes`: what the device will hold on top from the first
    update on. Raises RowTooLargeError, or OutOfMemoryError where smaller rows are no way out.
    """
    rows = _filled(policy, sample, slots)
    largest = max(row.slots for row in rows[1])
    held = None
    try:
        held = torch.empty(to_come_bytes, dtype=torch.uint8, device=policy.device)
        done = loop.rehearse(rows)
    except (torch.OutOfMemoryError, RowTooLargeError):
        done = None
    except Stopped:
        return  # the loop stops at once
    finally:
        del held
    if done is not None:
        return
    if largest > sample.longest_path:
        raise RowTooLargeError(f"a row of {largest} tokens does not fit into the memory of a device", hint=SMALLER_ROWS)
    raise OutOfMemoryError(
        f"a sample of {sample.longest_path} tokens does not fit into the memory of a device",
        where=sample.row_id,
        hint="set `train.gradient_checkpointing: true`, lower `data.max_length`, or divide the model over more devices",
    )


def states_to_come(recipe: Recipe, policy: Policy) -> int:
    """Bytes that this rank's device will hold of the optimizer's states from the first update on: those of its own parts."""
    if recipe.offload != "none":  # they wait in the host's memory
        return 0
    here = sum(held(parameter).numel() for _, parameter in policy.trainable)
    return int(here * optimizer_bytes(recipe.train.optim, recipe.train.optim_args))


def _filled(policy: Policy, sample: Sample, slots: int) -> tuple[list[Sample], list[Row]]:
    """A row of as many copies of the sample as go into it, each with another first token, so that no two share a beginning."""
    vocabulary = int(policy.config.get_text_config().vocab_size)
    root = sample.segments[0]
    copies = []
    for number in range(max(1, slots // sample.tokens)):
        tokens_T = root.tokens_T.copy()
        tokens_T[0] = (int(tokens_T[0]) + number) % vocabulary
        copies.append(replace(sample, segments=(replace(root, tokens_T=tokens_T), *sample.segments[1:])))
    return copies, policy.rows(copies, max(slots, sample.tokens))
