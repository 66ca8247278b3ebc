"""An engine that is another program: started here, listened to on loopback, started again when it ends.

A request that comes while it is down is answered 503 with the reason; one that is being answered when it dies ends with an error.
After an end it is started again, at first soon, then after longer and longer waits; a start that lasts is forgiven.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path

from tunedock.errors import DependencyError, EngineError
from tunedock.run.stop import end_with_parent
from tunedock.serve.engines.commands import Command
from tunedock.serve.engines.generator import Load
from tunedock.serve.engines.output import Output
from tunedock.serve.engines.remote import RemoteEngine, Trained
from tunedock.serve.errors import unavailable
from tunedock.serve.jobs import ChatJob, Event, TextJob

WAITS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0)
FORGIVEN_S = 300.0
"""A start that lived this long counts as one that went well."""
STOP_S = 20.0
THEN_S = 1800.0
"""For a command after the start: Ollama copies a model into its store."""
TOLD_LINES = 8
LOG = "engine.log"

Tell = Callable[[str], None]


class ChildEngine:
    """`start_s`: seconds it may take to be ready. `trained`: what requests get that do not say it. `log`: for what it prints."""

    def __init__(
        self,
        kind: str,
        command: Command,
        *,
        name: str = "",
        key: str | None = None,
        secret: str | None = None,
        start_s: float = 900.0,
        trained: Trained | None = None,
        tell: Tell | None = None,
        warn: Tell | None = None,
        log: Path | None = None,
    ) -> None:
        """`key`: what it wants to see. `secret`: what is never kept of what it prints; None: the key."""
        self.kind = kind
        self._command = command
        self._name = f"{kind} of {name}" if name else kind
        self._secret = secret or key
        self._start_s = start_s
        self._tell, self._warn = tell or _to_standard_error, warn or _to_standard_error
        self._port = 0
        """Another with each start: what a killed engine has left behind may listen at the one before."""
        self._remote = RemoteEngine(kind, "", key=key, trained=trained)
        self.can = self._remote.can
        self._folder: Path | None = None
        """For its user alone; made when it starts."""
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._output: Output | None = None
        self._task: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()
        """Set once the first start has come to something."""
        self._state = "it is starting"
        self._why = ""
        self._up = False
        self._closing = False
        self.starts = 0
        self.start_took_s: float | None = None
        """Of the first start."""

    def start(self) -> None:
        """Begins to keep it alive; to be called in the event loop that serves."""
        if self._task is None:
            self._folder = Path(tempfile.mkdtemp(prefix="tunedock-engine-"))
            self._task = asyncio.get_running_loop().create_task(self._keep())

    async def begin(self) -> None:
        """Starts it and waits until it is up for the first time. Raises EngineError where it ends before that."""
        self.start()
        await self._looked.wait()
        if self.start_took_s is None:
            said = self._output.tail(TOLD_LINES) if self._output is not None else ""
            raise EngineError(
                f"the engine {self._name} does not come up: {self._why}"
                + (f"\nits last lines:\n{said}" if said else ""),
                where=self._name,
                hint=f"all it said is in {self.log}; give it other arguments by --engine-arg",
            )

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
        self._clear()

    @property
    def log(self) -> Path | None:
        """What it prints; None before it is started, where no file was named."""
        return self._log or (self._folder and self._folder / LOG)

    def _clear(self) -> None:
        """Removes its folder, with the key; what it printed stays where it never came up."""
        if self._folder is None:
            return
        for entry in self._folder.iterdir():
            if entry != self.log or self.start_took_s is not None:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

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
            self._state = f"{self._state}; it is starting again" if failures else "it is starting"
            self._why = await self._once()
            self._up = False
            await self._end()
            self._looked.set()
            self._state = f"it ended ({self._why})"
            self._warn(f"the engine {self._name} ended: {self._why}")
            failures = 1 if time.monotonic() - began >= FORGIVEN_S else failures + 1

    async def _once(self) -> str:
        """One life of it; why it ended."""
        began, ended = time.monotonic(), None
        self._port = free_port()
        self._remote.move(f"http://127.0.0.1:{self._port}/v1")
        try:
            self._process = process = await self._started(self._command.arguments)
        except OSError as error:
            return f"it cannot be started: {error.strerror}"
        self.starts += 1
        while process.returncode is None:
            if await self._remote.ready() is None:
                ended = await self._afterwards()
                break
            if time.monotonic() - began > self._start_s:
                ended = self._with_last_line(f"it was not ready within {self._start_s:.0f} s")
                break
            await asyncio.sleep(0.25)
        if ended is not None:
            return ended
        if process.returncode is None:
            self._up, self._state = True, "it is up"
            took = time.monotonic() - began
            self.start_took_s = self.start_took_s or took
            self._looked.set()
            self._tell(f"the engine {self._name} is up after {took:.1f} s; what it prints is in {self.log}")
        code = await process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return await asyncio.to_thread(self._with_last_line, name)

    async def _started(self, arguments: Sequence[str]) -> asyncio.subprocess.Process:
        """Raises OSError."""
        folder, log = self._folder, self.log
        assert folder is not None and log is not None  # noqa: S101 - it has been started
        for file, content in self._command.files.items():
            _write_private(folder / file, content)
        output = Output(log, secret=self._secret)
        try:
            return await asyncio.create_subprocess_exec(
                *map(self._filled, arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output.write_end,
                stderr=output.write_end,
                env={**os.environ, **{name: self._filled(text) for name, text in self._command.environment.items()}},
                start_new_session=True,
                # A gateway that is killed leaves no engine on the GPU.
                preexec_fn=partial(end_with_parent, signal.SIGTERM if self._command.tidies else signal.SIGKILL),
            )
        finally:
            self._output = output
            output.start()

    async def _afterwards(self) -> str | None:
        """Runs what is to be run once it answers; why that failed, or None."""
        for arguments in self._command.then:
            self._state = f"it is told: {' '.join(arguments[:2])}"
            try:
                process = await self._started(arguments)
                async with asyncio.timeout(THEN_S):
                    code = await process.wait()
            except OSError as error:
                return f"`{' '.join(arguments[:2])}` cannot be started: {error.strerror}"
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
                return f"`{' '.join(arguments[:2])}` did not end within {THEN_S:.0f} s"
            if code != 0:
                return await asyncio.to_thread(self._with_last_line, f"`{' '.join(arguments[:2])}` ended with {code}")
        return None

    def _filled(self, text: str) -> str:
        return text.replace("{port}", str(self._port)).replace("{folder}", str(self._folder))

    def _with_last_line(self, why: str) -> str:
        """What happened, and the last it said."""
        if self._output is None:
            return why
        if self._process is not None and self._process.returncode is not None:
            self._output.join()
        last = self._output.last()
        return f"{why}: {last[:300]}" if last else why

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


def require_program(command: Command, name: str, hint: str) -> None:
    """Raises DependencyError where the program is not here."""
    if shutil.which(command.program) is None:
        raise DependencyError(f"the program `{command.program}` is not here", where=name, hint=hint)


def _write_private(path: Path, content: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(content)


def _to_standard_error(what: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may be gone
        print(what, file=sys.stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
