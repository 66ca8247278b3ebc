"""An engine that is another program: started here, listened to on loopback, started again when it ends.

A request that comes while it is down is answered 503 with the reason; one that is being answered when it dies ends with an error.
After an end it is started again, at first soon, then after longer and longer waits; a start that lasts is forgiven.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence

from tunedock.serve.engines.generator import Load
from tunedock.serve.engines.remote import RemoteEngine
from tunedock.serve.errors import unavailable
from tunedock.serve.jobs import ChatJob, Event, TextJob

WAITS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0)
FORGIVEN_S = 300.0
"""A start that lived this long counts as one that went well."""
STOP_S = 20.0
TAIL = 20
"""Last lines of what it prints, for who asks why it ended."""
_PR_SET_PDEATHSIG = 1


class ChildEngine:
    """`command`: an argument list; `{port}` in it is the port it is to listen on. `start_s`: seconds it may take to be ready."""

    def __init__(
        self,
        kind: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        key: str | None = None,
        start_s: float = 900.0,
    ) -> None:
        self.kind = kind
        self._command = tuple(command)
        self._environment = dict(environment or {})
        self._start_s = start_s
        self._port = free_port()
        self._remote = RemoteEngine(kind, f"http://127.0.0.1:{self._port}/v1", key=key)
        self.can = self._remote.can
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._state = "it is starting"
        self._up = False
        self._closing = False
        self._lines: deque[str] = deque(maxlen=TAIL)
        self.starts = 0

    def start(self) -> None:
        """Begins to keep it alive; to be called in the event loop that serves."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep())

    # -- as an engine ----------------------------------------------------------------------------------------------------

    async def chat(self, job: ChatJob) -> AsyncGenerator[Event]:
        self._require_up()
        events = self._remote.chat(job)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def complete(self, job: TextJob) -> AsyncGenerator[Event]:
        self._require_up()
        events = self._remote.complete(job)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def embed(self, model: str, texts: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        self._require_up()
        return await self._remote.embed(model, texts)

    def count(self, job: ChatJob | TextJob) -> int:
        return self._remote.count(job)

    async def ready(self) -> str | None:
        self.start()
        return None if self._up else self._state

    def load(self) -> Load:
        return self._remote.load()

    async def close(self) -> None:
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._end()
        await self._remote.close()

    def _require_up(self) -> None:
        self.start()
        if not self._up:
            raise unavailable(f"the engine of this model cannot answer now: {self._state}", 5.0)

    # -- the process -----------------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Starts it, waits for its end, starts it again."""
        failures = 0
        while not self._closing:
            wait_s = WAITS_S[min(failures, len(WAITS_S) - 1)]
            if wait_s:
                self._state = f"{self._state}; it is started again in {wait_s:.0f} s"
                await asyncio.sleep(wait_s)
            began = time.monotonic()
            self._state = "it is starting" if failures == 0 else "it is starting again"
            why = await self._once()
            self._up = False
            await self._end()
            self._state = f"it ended ({why})"
            print(f"warning: the engine {self._command[0]} ended: {why}", file=sys.stderr)
            failures = 1 if time.monotonic() - began >= FORGIVEN_S else failures + 1

    async def _once(self) -> str:
        """One life of it; why it ended."""
        self._lines.clear()
        command = [part.replace("{port}", str(self._port)) for part in self._command]
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,
                preexec_fn=_die_with_us,
                limit=1 << 20,
            )
        except OSError as error:
            return f"cannot be started: {error.strerror}"
        self.starts += 1
        reading = asyncio.ensure_future(self._read(self._process))
        try:
            deadline = time.monotonic() + self._start_s
            while self._process.returncode is None:
                if await self._remote.ready() is None:
                    self._up, self._state = True, "it is up"
                    break
                if time.monotonic() > deadline:
                    return f"it was not ready within {self._start_s:.0f} s"
                await asyncio.sleep(0.25)
            code = await self._process.wait()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        last = next((line for line in reversed(self._lines) if line.strip()), "")
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"{name}: {last[:300]}" if last else name

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """What it prints goes on to our own standard error, and its end is kept."""
        assert process.stdout is not None  # noqa: S101 - asked for
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # a line without end
                continue
            if not line:
                return
            text = line.decode("utf-8", errors="replace").rstrip()
            self._lines.append(text)
            print(text, file=sys.stderr)

    async def _end(self) -> None:
        """Ends the process and all it has started, at first politely."""
        process, self._process = self._process, None
        if process is None:
            return
        for number, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            if process.returncode is not None:
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), wait_s)


def _die_with_us() -> None:
    """Linux: a gateway that is killed leaves no engine on the GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
