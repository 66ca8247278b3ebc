"""What is tried before the first step: whether compiled layers give the same and are worth it, and whether the largest row fits
into the memory of a sharded model.

A rehearsal computes gradients and throws them away (`Loop.rehearse`); the run is none the wiser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import numpy as np

from tunedock.data.layout import Row
from tunedock.data.sample import Sample, single
from tunedock.errors import RowTooLargeError
from tunedock.events import Emitter
from tunedock.model.compiling import compile_layers, run_uncompiled
from tunedock.model.policy import Policy
from tunedock.run.record import Run, read_json, write_json
from tunedock.train.budget import agree
from tunedock.train.loop import Rehearsed

RECORD = "compile.json"
"""In the run directory: whether the layers are compiled, and why. A resumed run follows it: the two differ in the last bits."""

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
    if resume and (run.path / RECORD).is_file():
        if read_json(run.path / RECORD)["compiled"]:
            compile_layers(policy.model)
        return
    if asked is False or (asked == "auto" and policy.device.type != "cuda"):
        return
    verdict = _tried(asked, policy, loop, loop.steps_left)
    if asked is True and not verdict.compiled:
        emit.warning(f"the layers are not compiled: {verdict.why}", where="train.torch_compile")
    else:
        state = "compiled" if verdict.compiled else "not compiled"
        emit.note(f"layers {state}: {verdict.why}", **asdict(verdict))
    write_json(run.path / RECORD, asdict(verdict))


def _tried(asked: Switch, policy: Policy, loop: Rehearses, steps_left: int) -> Verdict:
    """Leaves the layers compiled where the verdict says so."""
    loop.rehearse()  # the first call of anything is slow
    plain = loop.rehearse()
    if agree(plain is None) or plain is None:
        return Verdict(False, "there was no memory for a trial")
    if asked == "auto" and not agree(plain.seconds * steps_left >= WORTH_TRYING_S):
        return Verdict(False, "the run is too short for it", plain_s=plain.seconds)
    if not compile_layers(policy.model):
        return Verdict(False, "the model has no layers that can be taken one by one", plain_s=plain.seconds)
    first = loop.rehearse()
    compiled = loop.rehearse()
    if agree(first is None or compiled is None) or first is None or compiled is None:
        verdict = Verdict(False, "there was no memory for a trial", plain_s=plain.seconds)
    else:
        compute = str(policy.precision.compute).removeprefix("torch.")
        verdict = judge(asked, plain, first, compiled, steps_left=steps_left, same=SAME[compute])
    if agree(not verdict.compiled):
        run_uncompiled(policy.model)
        if verdict.compiled:
            return Verdict(False, "another process found that it does not pay", plain_s=plain.seconds)
    return verdict


def judge(
    asked: Switch, plain: Rehearsed, first: Rehearsed, compiled: Rehearsed, *, steps_left: int, same: float
) -> Verdict:
    """Whether compiled layers give the same, and for `auto`, whether they pay. `first` is the step in which they were compiled."""
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
    saved = (plain.seconds - compiled.seconds) * steps_left
    pays = plain.seconds >= GAIN * compiled.seconds and saved > compiling
    return Verdict(asked is True or pays, told, **figures)


def rehearse_largest_row(policy: Policy, loop: Rehearses, slots: int) -> None:
    """For a sharded model, whose ranks wait for each other in the middle of a row: running out of memory there cannot be mended by
    doing the step again. So the largest row there can be is computed once, and where it does not fit, every rank starts anew.

    Raises RowTooLargeError.
    """
    sample = _longest(slots, int(policy.config.get_text_config().vocab_size))
    done = loop.rehearse(([sample], policy.rows([sample], slots)))
    if agree(done is None):
        raise RowTooLargeError(
            f"a row of {slots} tokens does not fit into the memory of a device",
            hint="training starts again with smaller rows; `train.token_budget` sets them, and activations computed again "
            "(`train.gradient_checkpointing: true`) need less",
        )


def _longest(slots: int, vocabulary: int) -> Sample:
    """One path of as many tokens, all of them trained."""
    tokens_T = np.random.Generator(np.random.Philox(key=[7, 8])).integers(0, vocabulary, slots).astype(np.int32)
    return single("rehearsal", tokens_T, np.ones(slots, np.float32))
