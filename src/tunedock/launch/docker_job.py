"""A stage at work in a container, as a job: the run's events up, signals down, its end by the engine's own record.

The main thread never speaks to the engine: a signal's handler may interrupt it anywhere, and a connection's lock would then be held
by itself. One thread waits for the container's end, one carries signals to it. The container does not depend on us: who closes the
terminal ends what watches, and the stage goes on.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunedock.errors import EngineError, OutOfMemoryError, TunedockError, exit_codes
from tunedock.events import Event, EventReader
from tunedock.image.engine import said, told
from tunedock.launch.attached import Attached
from tunedock.launch.container import node_of
from tunedock.launch.exported import ExportAside
from tunedock.launch.job import TAIL_BYTES, JobSpec, last_lines
from tunedock.launch.watch import resume_hint, signal_of
from tunedock.plan.machine.bounds import bytes_text
from tunedock.run.ranks import RankFiles
from tunedock.run.record import Run

if TYPE_CHECKING:
    from docker import DockerClient

AGAIN_S = 1.0
"""How long an engine that does not answer is left alone before it is asked again."""

SILENT_S = 5.0
"""How long the engine may be silent before whoever watches is told that it is."""

LAST_ORDERS_S = 3.0
"""How long a signal may take to reach the engine when nobody watches any more."""

NO_COMMAND = (125, 126, 127)
"""Exit codes by which an engine says that nothing of ours came to run."""


@dataclass(frozen=True, slots=True)
class Record:
    """How a container ended, by its engine."""

    exit_code: int
    oom_killed: bool = False
    error: str = ""
    printed: str = ""
    """Its own last lines: what the stage prints goes to the run's logs."""


LOST = Record(128 + signal.SIGKILL, error="the container is gone, and nobody knows how it ended")


class DockerJob:
    def __init__(
        self,
        spec: JobSpec,
        client: DockerClient,
        container: str,
        name: str,
        *,
        memory_bytes: int | None,
        aside: ExportAside | None = None,
        beside: Sequence[str] = (),
    ) -> None:
        """`container`: the id of one that has been made and not started. `aside`: where an export is written. `beside`: ids of
        further ones that start with it, get its signals and go with it; only its own end counts."""
        self._spec = spec
        self._client = client
        self._id = container
        self._beside = tuple(beside)
        self._name = name
        self._memory = memory_bytes
        self._log_start = _size(spec.log)  # an earlier start's last words are not this one's
        self._aside = aside
        self._record: Record | None = None
        self._closed = False
        self._silent_since: float | None = None
        self._told_silence = False
        self._orders: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._reader: EventReader | None = None
        self._attached: Attached | None = None
        if spec.converses:
            self._attached = Attached(client, container, spec.log)
        elif spec.run is not None:
            self._reader = EventReader(_events_of(spec, Run(spec.run)), at_end=True)
        with told(f"container {name}"):
            for each in (container, *beside):
                client.api.start(each)
        self._carrier = threading.Thread(target=self._carry, name=f"orders to {name}", daemon=True)
        self._carrier.start()
        threading.Thread(target=self._wait, name=f"the end of {name}", daemon=True).start()
        if self._attached is not None:
            with suppress(BrokenPipeError):  # it ended at once; its exit code and log say why
                self.send(spec.request)

    # -- what a job is -------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> JobSpec:
        return self._spec

    @property
    def name(self) -> str:
        return self._name

    def poll(self) -> int | None:
        return None if self._record is None else self._record.exit_code

    def events(self, timeout_s: float) -> Iterator[Event]:
        ended = self.poll() is not None
        yield from self._silence()
        if self._attached is not None:
            yield from self._attached.events(0.0 if ended else timeout_s, ended=ended)
            return
        found = False
        for event in self._reader.new() if self._reader is not None else ():
            found = True
            yield self._aside.finish(event) if self._aside is not None and event["kind"] == "result" else event
        if ended and self.poll() == 0 and node_of(self._spec):  # what rank 0 tells is told where it runs
            yield {"kind": "result", "time": time.time(), "value": {"node": node_of(self._spec)}}
        if not found and timeout_s and not ended:
            time.sleep(timeout_s)

    def send(self, line: Mapping[str, Any]) -> None:
        if self._attached is None:
            raise BrokenPipeError("the stage takes no input")
        self._attached.send(line)

    def signal(self, number: int) -> None:
        if self._record is None:
            self._orders.put(number)

    def kill(self) -> None:
        if self._record is None:
            self._orders.put(signal.SIGKILL)

    def killed_for_memory(self) -> bool:
        """Of the container as a whole: a worker that was killed in it, its own supervisor starts again."""
        record = self._record
        return record is not None and record.oom_killed and signal_of(record.exit_code) == signal.SIGKILL

    def supervised(self) -> bool:
        record = self._record
        return record is not None and record.exit_code in exit_codes()

    def verdict(self, failure: TunedockError | None, *, stopped_by: int | None) -> TunedockError | None:
        record = self._record
        if record is None or (failure is not None and not isinstance(failure, OutOfMemoryError)):
            return failure
        if record.oom_killed and record.exit_code != 0 and stopped_by is None:
            return self._out_of_memory(failure)
        if failure is not None or stopped_by is not None:
            return failure
        if record is LOST:
            return EngineError(record.error, where=self._name, hint=resume_hint(self._spec))
        if record.exit_code in NO_COMMAND:
            return EngineError(
                f"nothing came to run in the container: {record.error or record.printed or 'no word'}",
                where=self._name,
                hint="`launch.image` is to be one that `tunedock image build` makes: it holds python and tunedock",
            )
        if signal_of(record.exit_code) == signal.SIGKILL:
            return OutOfMemoryError(
                "the container was killed (SIGKILL), and by the engine's record not for want of its own memory: by somebody, or "
                "because the machine ran out of memory",
                where=self._name,
                hint=resume_hint(self._spec),
            )
        return None

    def close(self) -> None:
        """A worker that converses sees the end of its input. A container that has ended is taken away, one at work goes on."""
        if self._attached is not None:
            self._attached.close()
            if self._record is None:
                return  # it ends by itself, or is ended; then this is called again
        if self._aside is not None:
            self._aside.close()
        self._orders.put(None)
        self._carrier.join(LAST_ORDERS_S)  # who ends now has asked it to stop just before
        if self._record is not None and not self._closed:
            with suppress(TunedockError):  # the next stage of the run takes it away
                remove(self._client, self._id)
                for each in self._beside:
                    remove(self._client, each, force=True)
            self._client.close()
        self._closed = True

    def log_tail(self, lines: int = 12) -> str:
        logged = b""
        if self._spec.log is not None:
            with suppress(OSError), self._spec.log.open("rb") as log:
                log.seek(max(self._log_start, _size(self._spec.log) - TAIL_BYTES))
                logged = log.read()
        return last_lines(logged, lines) or ("" if self._record is None else self._record.printed)

    # -- threads -------------------------------------------------------------------------------------------------------

    def _carry(self) -> None:
        """Signals, one after the other; the thread ends with the job."""
        while (number := self._orders.get()) is not None:
            for each in self._beside:
                with suppress(Exception):  # it may have ended; the first one's end is what counts
                    self._client.api.kill(each, int(number))
            try:
                self._client.api.kill(self._id, int(number))
            except Exception:  # noqa: BLE001 - policy: it has ended, or its engine is gone; whoever waits for its end finds out
                if number == signal.SIGKILL and self._record is None and not self._answers():
                    self._record = LOST

    def _wait(self) -> None:
        from docker.errors import NotFound

        while self._record is None:
            try:
                self._client.api.wait(self._id, timeout=None)
                self._record = self._ended()
            except NotFound:
                self._record = LOST
            except Exception:  # noqa: BLE001 - policy: an engine that is restarted is asked again; the container may go on
                self._silent_since = None if self._answers() else self._silent_since or time.monotonic()
                time.sleep(AGAIN_S)

    def _silence(self) -> Iterator[Event]:
        """Told once: what watches goes on waiting, for the engine may come back and the container may be at work."""
        since = self._silent_since
        if since is None or self._told_silence or time.monotonic() - since < SILENT_S:
            return
        self._told_silence = True
        yield {
            "kind": "warning",
            "time": time.time(),
            "message": f"the container engine does not answer; whether {self._name} goes on is seen when it does",
            "where": None,
            "hint": "start the engine again, or give up waiting by Ctrl-C, pressed twice",
        }

    def _ended(self) -> Record:
        state = self._client.api.inspect_container(self._id)["State"]
        printed = self._client.api.logs(self._id, stdout=not self._spec.converses, stderr=True, tail=60)
        return Record(
            exit_code=int(state.get("ExitCode", 0)),
            oom_killed=bool(state.get("OOMKilled")),
            error=str(state.get("Error") or ""),
            printed=last_lines(printed, 12),
        )

    def _answers(self) -> bool:
        try:
            return bool(self._client.ping())
        except Exception:  # noqa: BLE001 - policy: whatever keeps it from answering
            return False

    def _out_of_memory(self, failure: TunedockError | None) -> OutOfMemoryError:
        limit = "no limit of its own" if self._memory is None else f"a limit of {bytes_text(self._memory)}"
        record = f"the engine's record of {self._name}: OOMKilled, with {limit}"
        if failure is None:
            message = f"the container was killed because memory ran out ({record})"
        else:
            message = f"{failure.message} ({record})"
        return OutOfMemoryError(
            message,
            where=None if self._spec.log is None else str(self._spec.log),
            hint="raise `launch.container.memory`, or lower `train.token_budget` or `data.max_length`",
        )


def _events_of(spec: JobSpec, run: Run) -> Path:
    """Of a node beside the first: what its own first rank tells, which is what goes wrong there."""
    node = node_of(spec)
    if not node or spec.launch is None:
        return run.events
    return RankFiles(run.ranks, node * (spec.launch.processes or 1)).events


def _size(file: Path | None) -> int:
    try:
        return 0 if file is None else file.stat().st_size
    except OSError:
        return 0


def remove(client: DockerClient, container: str, *, force: bool = False) -> None:
    """Takes a container away with its own volumes; one that is gone already is no matter. Raises EngineError."""
    from docker.errors import NotFound

    with told("container engine"):
        try:
            client.api.remove_container(container, v=True, force=force)
        except NotFound:
            return
        except Exception as error:
            if "is already in progress" not in said(error):
                raise
