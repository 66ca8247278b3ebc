"""`python -m tunedock.worker STAGE RUN_DIR [--request FILE]`: one stage of the work plane, wherever a launcher put it.

The request is one JSON object on the first line of standard input, or in a file where many processes of one training are to read
it. With a run, events go to its `events.jsonl`; for `chat` and for stages without a run (`-`) they go to standard output, which is
kept for them alone: what libraries print goes to standard error. Of the ranks of a training, rank 0 holds the run's lock and tells
its events; the others keep warnings and failures in files of their own (`run.ranks`).
The protocol: docs/decisions/0001-worker-protocol.md.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tunedock.errors import (
    BugError,
    DiskError,
    InterruptedRun,
    LostPeerError,
    OutOfMemoryError,
    RecipeError,
    TunedockError,
)
from tunedock.events import Emitter
from tunedock.recipe.data_images import DATA_IMAGES, pinned
from tunedock.recipe.schema import Recipe
from tunedock.run.pulse import Pulse
from tunedock.run.ranks import ALONE, End, Rank, RankFiles, forget_beyond
from tunedock.run.record import Run
from tunedock.run.stop import LookAgain, StopRequest, end_with_parent


@dataclass(frozen=True, slots=True)
class Call:
    """What a stage is given."""

    request: dict[str, Any]
    emit: Emitter
    stop: StopRequest
    run: Run | None = None
    rank: Rank = ALONE
    pulse: Pulse = field(default_factory=Pulse)
    look_again: LookAgain = field(default_factory=LookAgain)

    def recipe(self) -> Recipe:
        """The resolved recipe; of a run, with the model pinned to the commit it began with, and data in images to their content."""
        if self.run is None:
            if "recipe" not in self.request:
                raise BugError("the request names no recipe")
            return Recipe.model_validate(self.request["recipe"])
        lineage = self.run.state().lineage
        recipe = pinned(Recipe.model_validate(self.run.resolved()["recipe"]), lineage.get(DATA_IMAGES, {}))
        commit = lineage.get("commit")
        if commit is None:
            return recipe
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": commit})})

    def require_run(self) -> Run:
        if self.run is None:
            raise BugError("this stage needs a run directory")
        return self.run


# Stages import what they need when they begin: `chat` should not wait for matplotlib, nor `data-check` for PEFT.


def _train(call: Call) -> None:
    from tunedock.train.stage import train

    token_budget = call.request.get("token_budget")
    call.emit.result(
        train(
            call.require_run(),
            call.recipe(),
            call.emit,
            resume=bool(call.request.get("resume")),
            stop=call.stop,
            token_budget=None if token_budget is None else int(token_budget),
            pulse=call.pulse,
        )
    )


def _eval(call: Call) -> None:
    from tunedock.eval.stage import evaluate
    from tunedock.recipe.schema import Eval

    recipe = call.recipe()
    options = Eval.model_validate({**recipe.eval.model_dump(), **call.request.get("overrides", {})})
    side = str(call.request.get("split", "test"))
    only_tasks = bool(call.request.get("only_tasks"))
    run = call.require_run()
    value = evaluate(run, recipe, call.emit, side=side, options=options, only_tasks=only_tasks)
    if (run.path / "trackers").is_dir():
        from tunedock.train.trackers import report_evaluation

        report_evaluation(run, recipe, call.emit, value)
    call.emit.result(value)


def _export(call: Call) -> None:
    from tunedock.export.stage import export
    from tunedock.recipe.exporting import Order

    order = Order.model_validate(call.request)
    call.emit.result(export(call.require_run(), call.recipe(), call.emit, order=order))


def _export_verify(call: Call) -> None:
    from tunedock.export.again import verify_again

    run, limit = call.run, call.request.get("max_perplexity_change")
    recipe = None if run is None else call.recipe()
    folder = Path(str(call.request["folder"]))
    verify_again(folder, call.emit, run=run, recipe=recipe, limit=None if limit is None else float(limit))


def _serve(call: Call) -> None:
    from tunedock.recipe.serving import ServeOrder
    from tunedock.serve.stage import serve

    serve(ServeOrder.model_validate(call.request), call.emit, call.stop, call.look_again)
    call.emit.result({})


def _chat(call: Call) -> None:
    from tunedock.eval.talk import talk

    which = str(call.request.get("which", "tuned"))
    talk(call.require_run(), call.recipe(), sys.stdin, call.emit, call.stop, which=which)


def _data_check(call: Call) -> None:
    from tunedock.eval.inspect_data import check

    recipe = call.recipe()
    to = call.request.get("to")
    account = check(recipe, call.emit, to=Path(to) if to else None)
    account.verify(recipe.data.max_dropped, recipe.data.over_length)


def _data_show(call: Call) -> None:
    from tunedock.eval.inspect_data import show

    call.emit.result(show(call.recipe(), row=str(call.request["row"])))


def _data_convert(call: Call) -> None:
    from tunedock.data.convert import convert
    from tunedock.recipe.conversion import Order

    convert(Order.model_validate(call.request), call.emit)


def _data_pack(call: Call) -> None:
    from tunedock.data.pack import pack
    from tunedock.recipe.data_images import Packing

    call.emit.result(pack(Packing.model_validate(call.request), call.emit).model_dump(mode="json"))


def _data_count(call: Call) -> None:
    from tunedock.data.count import count

    call.emit.result(count(call.recipe(), call.emit))


def _calibrate(call: Call) -> None:
    from tunedock.train.estimate import calibrate

    call.emit.result(calibrate(str(call.request["compute"])))


def _doctor(call: Call) -> None:
    from tunedock.train.doctor import examine

    call.emit.result([check.to_json() for check in examine(call.emit)])


STAGES: dict[str, Callable[[Call], None]] = {
    "train": _train,
    "eval": _eval,
    "export": _export,
    "export-verify": _export_verify,
    "serve": _serve,
    "chat": _chat,
    "data-count": _data_count,
    "data-check": _data_check,
    "data-show": _data_show,
    "data-convert": _data_convert,
    "data-pack": _data_pack,
    "calibrate": _calibrate,
    "doctor": _doctor,
}


def main(arguments: list[str]) -> int:
    """Runs one stage and returns the exit code."""
    match arguments:
        case [stage, place] if stage in STAGES:
            file = None
        case [stage, place, "--request", file] if stage in STAGES:
            pass
        case _:
            usage = f"python -m tunedock.worker {{{','.join(STAGES)}}} RUN_DIR|- [--request FILE]"
            print(f"usage: {usage}", file=sys.stderr)
            return RecipeError.exit_code
    _write_utf8()
    stop = StopRequest()
    stop.listen()
    look_again = LookAgain()
    if stage == "serve":
        look_again.listen()
    run = None if place == "-" else Run.open(Path(place))
    rank = Rank.of(os.environ) if stage == "train" else ALONE
    if rank.world > 1:
        end_with_parent(
            signal.SIGKILL
        )  # torchrun gives each rank a session of its own: killed, it would leave them at work
    elif stage == "serve":
        end_with_parent(signal.SIGTERM)  # a gateway whose command was killed would keep its port and its memory
    pulse = Pulse(rank)
    if run is not None and not rank.leads:
        emit = _beside_rank_0(run, stage, rank, pulse)
    elif run is None or stage == "chat":
        emit = Emitter(_own_stdout())
    else:
        emit = Emitter.to_file(run.events, on_progress=pulse.doing)
    request = sys.stdin.readline() if file is None else Path(file).read_text(encoding="utf-8")
    return _guarded(stage, Call(json.loads(request or "{}"), emit, stop, run, rank, pulse, look_again))


def _guarded(stage: str, call: Call) -> int:
    """Runs the stage; whatever it raises becomes a `failure` event and an exit code."""
    call.emit.stage(stage, "started")
    try:
        with ExitStack() as around:
            if call.run is not None and stage == "train":
                if call.rank.leads:
                    around.enter_context(_recorded(call.run, stage, call.stop))
                    forget_beyond(call.run.ranks, call.rank.world)
                around.enter_context(call.pulse.beating(call.run.ranks))
            STAGES[stage](call)
    except BaseException as raised:  # noqa: BLE001 - policy: the last line of defence; nothing ends without a failure event
        with call.stop.deferred():  # torchrun's SIGTERM, when another rank has failed, does not cut last words short
            error = _understood(raised, call.stop)
            try:
                call.emit.emit("failure", error=error.to_json())
            except OSError:  # the disk that is full is the error, most often; the log and the exit code may still tell
                print(f"error: {error}", file=sys.stderr)
            _leave_end(call, error)
        return error.exit_code
    call.emit.stage(stage, "finished")
    _leave_end(call, None)
    return 0


def _leave_end(call: Call, error: TunedockError | None) -> None:
    """Of many ranks, each says how it ended: what started them says only that one has failed."""
    if call.run is not None and call.rank.world > 1:
        told = (0, None) if error is None else (error.exit_code, error.to_json())
        End(call.rank.number, *told).write(call.run.ranks)


def _beside_rank_0(run: Run, stage: str, rank: Rank, pulse: Pulse) -> Emitter:
    """What another rank prints and tells goes to files of its own; what rank 0 tells as well, it does not tell."""
    run.log(stage).parent.mkdir(exist_ok=True)
    run.ranks.mkdir(exist_ok=True)
    with run.log(stage, rank.number).open("ab") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    return Emitter.to_file(
        RankFiles(run.ranks, rank.number).events, only=("warning", "failure"), on_progress=pulse.doing
    )


@contextmanager
def _recorded(run: Run, stage: str, stop: StopRequest) -> Iterator[None]:
    """Holds the run's lock, and leaves in `run.json` how the stage ended."""
    with run.working(stage):
        try:
            yield
        except BaseException as raised:
            with stop.deferred():
                error = _understood(raised, stop)
                status = "interrupted" if isinstance(error, InterruptedRun) else "failed"
                with suppress(DiskError):  # the disk that is full is the error; it cannot also take the record of it
                    run.update(status=status, finished=time.time(), exit_code=error.exit_code, error=error.to_json())
            raise error from raised
        run.update(status="finished", finished=time.time(), exit_code=0)


def _understood(raised: BaseException, stop: StopRequest) -> TunedockError:
    error = understood(raised)
    return stop.named(error) if isinstance(error, InterruptedRun) else error


def understood(raised: BaseException) -> TunedockError:
    """What an exception means to a user. What we do not know is our bug: its traceback goes to the log."""
    if isinstance(raised, TunedockError):
        return raised
    if isinstance(raised, KeyboardInterrupt):
        return InterruptedRun("stopped")
    torch = sys.modules.get("torch")  # what never loaded it cannot have failed by it; small images have none
    if torch is not None and _lost_a_peer(raised):
        traceback.print_exception(raised, file=sys.stderr)
        return LostPeerError(f"another process answers no more: {(str(raised).splitlines() or ['no word'])[0]}")
    out_of_memory = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    if isinstance(raised, out_of_memory) or "can't allocate memory" in str(raised):
        traceback.print_exception(raised, file=sys.stderr)
        return OutOfMemoryError(
            f"out of memory: {str(raised).splitlines()[0] if str(raised) else 'no memory left'}",
            hint="lower train.token_budget or data.max_length, set train.gradient_checkpointing: true, or use adapter: lora",
        )
    if isinstance(raised, OSError) and raised.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return DiskError(f"cannot write: {raised.strerror}", where=str(raised.filename or ""), hint="free disk space")
    traceback.print_exception(raised, file=sys.stderr)
    first = (str(raised).splitlines() or [""])[0]
    return BugError(f"{type(raised).__name__}: {first}", hint="this is a bug in tunedock; the traceback is in the log")


def _lost_a_peer(raised: BaseException) -> bool:
    """Whether a call of all ranks failed. gloo raises plain RuntimeErrors, with its own file's name in them."""
    from torch.distributed import DistError

    if isinstance(raised, DistError):
        return True
    return isinstance(raised, RuntimeError) and any(word in str(raised) for word in ("gloo/", "ProcessGroup", "NCCL"))


def _write_utf8() -> None:
    """The log is read as UTF-8, and a library's tick or bar must not end a training where the locale is ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _own_stdout() -> IO[str]:
    """Standard output for events alone: descriptor 1 then leads to standard error, whatever a library prints there."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    os.dup2(2, 1)
    return stream


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except TunedockError as error_:
        print(f"error: {error_}", file=sys.stderr)
        code = error_.exit_code
    sys.stdout.flush()
    os._exit(code) if threading.active_count() > 1 else sys.exit(code)
