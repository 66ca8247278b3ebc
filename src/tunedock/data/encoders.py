"""Chunks of rows -> samples, over processes, in reading order, exactly as one process makes them.

`data.num_proc: n` encodes in n processes; 1 stays in this one. By default the first `ALONE_ROWS` rows are encoded here, since
processes take a second or two to start and ten thousand rows are done in that; when more come, a process a core is started, `MOST`
at most: beyond that they wait for this one, which reads the rows and writes the samples. While they start, this one goes on.

Processes come from a fork server that has imported this module and runs no thread: forking the running process would be quicker but
copies locks that torch's, Arrow's and the tokenizer's threads may hold, and spawning would import transformers (0.9 s) once a
process. The server never imports torch. A program that prepares data itself needs the usual `if __name__ == "__main__":`.

What a process cannot do alone is done again here, in order: a chunk that raised (so the error is that of one process), and a chunk
encoded before an earlier one taught another stop token.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from tunedock.data.chat import Chat
from tunedock.data.chunks import Chunk, Made, make
from tunedock.errors import OutOfMemoryError, RunError, TunedockError

ALONE_ROWS = 24_576
MOST = 8
WINDOW = 2
"""Chunks in flight, a process: one it works on and one that waits, so that memory is bounded and nobody is idle."""


class Encoders:
    """The processes of one preparation. Leaving the context ends them, whatever they are doing."""

    def __init__(self, chat: Chat, num_proc: int | None) -> None:
        self._chat = chat
        self._count = (num_proc or min(cores(), MOST)) if chat.portable else 1
        self._alone_rows = ALONE_ROWS if num_proc is None else 0
        self._pool: _Pool | None = None
        self._collecting = gc.get_threshold()

    def __enter__(self) -> Self:
        self._collecting = gc.get_threshold()
        _collect_rarely()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.set_threshold(*self._collecting)
        gc.unfreeze()
        if self._pool is not None:
            self._pool.close()

    def made(self, chunks: Iterator[Chunk]) -> Iterator[Made]:
        """What the chunks become, in order.

        Raises what reading and encoding raise; RunError or OutOfMemoryError for a process that died.
        """
        flying: deque[tuple[Chunk, Future[Made | None]]] = deque()
        unreadable: Exception | None = None
        while True:
            try:
                chunk = next(chunks, None)
            except Exception as error:  # noqa: BLE001 - policy: raised below, after the rows before it, as one process would
                unreadable = error
                break
            if chunk is None:
                break
            pool = self._ready_pool(chunk)
            if pool is None:
                yield make(chunk, self._chat)
                continue
            flying.append((chunk, pool.submit(chunk, self._chat.stop_ids)))
            if len(flying) > WINDOW * self._count:
                yield self._landed(*flying.popleft())
        while flying:
            yield self._landed(*flying.popleft())
        if unreadable is not None:
            raise unreadable

    def _ready_pool(self, chunk: Chunk) -> _Pool | None:
        if self._count == 1 or chunk.first_index < self._alone_rows:
            return None
        if self._pool is None:
            self._pool = _Pool(self._chat, self._count)
        return self._pool if self._pool.ready() else None

    def _landed(self, chunk: Chunk, future: Future[Made | None]) -> Made:
        made = future.result()
        if made is None or made.stops_before != self._chat.stop_ids:
            return make(chunk, self._chat)
        self._chat.know(made.stops_after)
        return made


class _Encoder:
    """One process, and the thread here that talks to it."""

    def __init__(self, process: BaseProcess, connection: Connection) -> None:
        self.process = process
        self._connection = connection

    def begin(self, chat: memoryview) -> None:
        try:
            self._connection.send_bytes(chat)
            self._connection.recv()
        except (EOFError, OSError):
            raise self._died("starting", None) from None

    def ask(self, chunk: Chunk, stop_ids: frozenset[int]) -> Made | None:
        try:
            self._connection.send((chunk, stop_ids))
            made: Made | None = self._connection.recv()
        except (EOFError, OSError):
            raise self._died("tokenising", chunk.place) from None
        return made

    def _died(self, doing: str, where: str | None) -> TunedockError:
        self.process.join(timeout=5)
        code = self.process.exitcode
        who = f"{self.process.name} (process {self.process.pid})"
        if code == -int(signal.SIGKILL):
            return OutOfMemoryError(
                f"{who} was killed (signal 9) while {doing}; most often the system does that when memory runs out",
                where=where,
                hint="set `data.num_proc` lower; 1 tokenises without other processes",
            )
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return RunError(
            f"{who} {how} while {doing}",
            where=where,
            hint="the log may say why; `data.num_proc: 1` tokenises without other processes",
        )


class _Pool:
    def __init__(self, chat: Chat, count: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._chat = ForkingPickler.dumps(chat)
        self._idle: SimpleQueue[_Encoder] = SimpleQueue()
        self._all: list[_Encoder] = []
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="encoder")
        self._starts = [self._threads.submit(self._start, number + 1) for number in range(count)]

    def ready(self) -> bool:
        """Whether all processes stand. Raises what kept one from it."""
        if not all(start.done() for start in self._starts):
            return False
        for start in self._starts:
            start.result()
        return True

    def submit(self, chunk: Chunk, stop_ids: frozenset[int]) -> Future[Made | None]:
        return self._threads.submit(self._ask, chunk, stop_ids)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._kill()  # frees the threads that wait for an answer
        self._threads.shutdown(wait=True)
        self._kill()  # what a thread was just starting
        for encoder in self._all:
            encoder.process.join()

    def _kill(self) -> None:
        for encoder in list(self._all):
            encoder.process.kill()  # it holds nothing that must be put in order

    def _start(self, number: int) -> None:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_encode, args=(there,), name=f"tokenising process {number}", daemon=True)
        process.start()
        there.close()
        encoder = _Encoder(process, here)
        self._all.append(encoder)
        encoder.begin(self._chat)
        self._idle.put(encoder)

    def _ask(self, chunk: Chunk, stop_ids: frozenset[int]) -> Made | None:
        encoder = self._idle.get()
        try:
            return encoder.ask(chunk, stop_ids)
        finally:
            self._idle.put(encoder)  # a dead one too: whoever asks it next hears of it, and waits for none


def _encode(connection: Connection) -> None:
    """What a process does until its parent closes the pipe, by dying too. Interrupts are the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _collect_rarely()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough
    try:
        chat: Chat = connection.recv()
        connection.send(None)
        while True:
            chunk, stop_ids = connection.recv()
            chat.know(stop_ids)
            connection.send(_made_or_none(chunk, chat))
    except (EOFError, OSError):
        return


def _collect_rarely() -> None:
    """Rows and samples hold no cycles, and looking for some took a fifth of the time."""
    gc.freeze()  # what libraries hold is looked at no more
    gc.set_threshold(200_000, 20, 100)


def _made_or_none(chunk: Chunk, chat: Chat) -> Made | None:
    try:
        return make(chunk, chat)
    except Exception:  # noqa: BLE001 - policy: the parent makes the chunk again, and what is raised there is raised for good
        return None


def cores() -> int:
    """Cores this process may use: its affinity, and its control group's share of time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return allowed
    return max(1, min(allowed, int(quota) // int(period))) if quota.isdecimal() else allowed
