"""A conversation with a run's model: the worker stays, a line goes down for each turn, text comes back as it is made."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tunedock.errors import InterruptedRun, TunedockError
from tunedock.events import Event
from tunedock.launch.job import Job, JobSpec, Launcher
from tunedock.launch.watch import POLL_S, ending

Which = Literal["tuned", "base"]

INTERRUPT_GRACE_S = 3.0
"""How long an interrupted answer may take to end by itself before its worker is ended and a fresh one started."""

CLOSE_GRACE_S = 5.0

READY = "ready"
"""The worker's note once the model is loaded."""


class ChatSession:
    """Use as a context manager. The worker starts with the first turn; one that ended is started afresh by the next turn."""

    def __init__(
        self, run: Path, launcher: Launcher, *, which: Which = "tuned", on_event: Callable[[Event], None] | None = None
    ) -> None:
        self._run = run
        self._launcher = launcher
        self._which: Which = which
        self._on_event = on_event
        self._job: Job | None = None
        self.ready = False
        """Whether the worker has loaded the model: an error from then on is about one turn, and the next may go well."""

    def turn(
        self,
        messages: Sequence[Mapping[str, str]],
        on_text: Callable[[str], None],
        *,
        which: Which | None = None,
        **options: Any,
    ) -> str:
        """The answer to `messages`; `on_text` gets its pieces as they come. `options`: max_new_tokens, temperature.

        KeyboardInterrupt stops the answer, and goes on when the worker has stopped too; the session stays usable.
        Raises the worker's error (a turn it refuses leaves the session usable), or what `launch.watch.ending` makes of its death.
        """
        self._which = which or self._which
        job = self._job
        if job is None or job.poll() is not None:
            self._let_go()
            self.ready = False
            job = self._job = self._launcher.start(JobSpec("chat", self._run, {"which": self._which}))
        try:
            with contextlib.suppress(BrokenPipeError):  # it is ending: its last events or its exit code say why
                job.send({"messages": list(messages), "which": self._which, **options})
            return self._answer(job, on_text)
        except KeyboardInterrupt:
            self._stop_answer(job)
            raise

    def close(self) -> None:
        """Ends the worker: by the end of its input, then by force."""
        job = self._job
        if job is None:
            return
        job.close()
        deadline = time.monotonic() + CLOSE_GRACE_S
        while job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self._let_go()

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, job: Job, on_text: Callable[[str], None]) -> str:
        while True:
            ended = job.poll() is not None
            for event in job.events(0.0 if ended else POLL_S):
                if event["kind"] == "delta":
                    on_text(str(event.get("text", "")))
                elif event["kind"] == "result":
                    value = event.get("value")
                    return str(value.get("text", "")) if isinstance(value, dict) else str(value)
                elif event["kind"] == "failure":
                    raise TunedockError.from_json(event.get("error") or {})
                elif event["kind"] == "note" and event.get("message") == READY:
                    self.ready = True
                elif self._on_event is not None:
                    self._on_event(event)
            if ended:
                ending(job, None, [])
                raise InterruptedRun("the model's process ended")  # `ending` raises for every end without a result

    def _stop_answer(self, job: Job) -> None:
        job.signal(signal.SIGINT)
        deadline = time.monotonic() + INTERRUPT_GRACE_S
        try:
            while time.monotonic() < deadline:
                ended = job.poll() is not None
                kinds = [event["kind"] for event in job.events(0.0 if ended else POLL_S)]
                if "result" in kinds and not ended:
                    return  # it stopped the answer and takes the next turn
                if ended:
                    break
        except KeyboardInterrupt:
            pass  # a second Ctrl-C does not wait
        self._let_go()

    def _let_go(self) -> None:
        if self._job is not None:
            self._job.kill()
            deadline = time.monotonic() + CLOSE_GRACE_S
            while self._job.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            self._job.close()
            self._job = None
