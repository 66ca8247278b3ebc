"""The worker without its process: a launcher that runs a stage here and now, by the worker's own code.

What starts a real worker spends seconds importing torch; a test that only asks how an error reads need not. Everything between
the command line and the stage is the real part: request and events travel as lines of JSON, a run's through its events.jsonl,
errors as `failure` events. Signals and a killed process are for the tests that start real ones.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tunedock import worker
from tunedock.errors import TunedockError
from tunedock.events import Emitter, Event, EventReader, decode
from tunedock.launch.job import JobSpec, encode_line
from tunedock.run.record import Run
from tunedock.run.stop import StopRequest


class InlineJob:
    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        run = None if spec.run is None else Run.open(spec.run)
        reader = None if run is None else EventReader(run.events, at_end=True)
        told, printed = io.StringIO(), io.StringIO()
        emit = Emitter(told) if run is None else Emitter.to_file(run.events)
        request = json.loads(encode_line(spec.request))
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            self._code = worker._guarded(spec.stage, worker.Call(request, emit, StopRequest(), run))
        lines = (decode(line) for line in told.getvalue().splitlines())
        self._events = [event for event in lines if event is not None] if reader is None else list(reader.new())
        self._printed = printed.getvalue()

    @property
    def spec(self) -> JobSpec:
        return self._spec

    def poll(self) -> int | None:
        return self._code

    def events(self, timeout_s: float) -> Iterator[Event]:
        told, self._events = self._events, []
        yield from told

    def send(self, line: Mapping[str, Any]) -> None:
        raise BrokenPipeError("an inline worker has ended already")

    def signal(self, number: int) -> None:
        pass

    def kill(self) -> None:
        pass

    def killed_for_memory(self) -> bool:
        return False

    def supervised(self) -> bool:
        return False

    def verdict(self, failure: TunedockError | None, *, stopped_by: int | None) -> TunedockError | None:
        return failure

    def close(self) -> None:
        pass

    def log_tail(self, lines: int = 12) -> str:
        return "\n".join(self._printed.splitlines()[-lines:])


class InlineLauncher:
    def start(self, spec: JobSpec) -> InlineJob:
        return InlineJob(spec)
